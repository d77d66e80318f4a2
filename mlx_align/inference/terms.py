"""What a finished run's log-ratio is worth: its β, its reference, and over what it is taken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_align.config import DpoConfig
from mlx_align.errors import ConfigError, ModelError
from mlx_align.inference.finished import CHECKPOINTS, CONFIG, Finished
from mlx_align.losses.registry import PAIRWISE_LOSSES, combine, parse_losses
from mlx_align.settings import resolve

# Losses of log-ratios per token: what they fit is that, and a sum would be another reward.
_PER_TOKEN = frozenset({"ipo", "sigmoid_norm"})


class Terms(NamedTuple):
    """How a run's log-ratio becomes a reward.

    Attributes:
        beta: Its temperature.
        reference: The adapter it started from; None for the bare base.
        per_token: Whether the log-ratio is divided by the completion's length.
        said: The same for people, one line.
    """

    beta: float
    reference: Path | None
    per_token: bool
    said: str


def terms_of(
    run: Finished,
    *,
    beta: float | None = None,
    reference_adapter: str | Path | None = None,
    per_token: bool | None = None,
) -> Terms:
    """The reward that a run stands for, with what was given instead of what the run says.

    Raises:
        ConfigError: The run has no β, or no reference to be rewarded against, and none is given.
        ModelError: The adapter it started from is gone.
    """
    losses = _losses(run)
    if beta is None:
        beta = _beta(run, losses)
    elif not 0 < beta < float("inf"):
        raise ConfigError(f"--beta {beta:g}: must be above 0")
    reference = _reference(run, reference_adapter)
    if per_token is None:
        per_token = bool(losses) and losses[0] in _PER_TOKEN
    against = "the bare base" if reference is None else str(reference)
    how = ", per token" if per_token else ""
    said = f"implicit reward: {beta:g} x log(policy / reference){how}; reference: {against}"
    return Terms(beta, reference, per_token, said)


def _losses(run: Finished) -> list[str]:
    """The losses against a reference that the run was trained with, by name."""
    if run.command == "dpo":
        names = [name for name, _ in parse_losses(_dpo_config(run).loss)]
        return [name for name in names if PAIRWISE_LOSSES[name].needs_reference]
    return ["kto"] if run.command == "kto" else []


def _dpo_config(run: Finished) -> DpoConfig:
    inside = run.folder.parent.name == CHECKPOINTS
    return resolve(DpoConfig, {}, (run.folder.parent.parent if inside else run.folder) / CONFIG)


def _beta(run: Finished, losses: Sequence[str]) -> float:
    if run.command is None:
        raise ConfigError(
            f"{run.folder}: no {CONFIG} in it, so neither β nor what it started from is known; "
            "give --beta (and --reference-adapter, if it did not start from the bare base)"
        )
    if run.command == "dpo" and losses:
        config = _dpo_config(run)
        options = combine(parse_losses(config.loss), config.loss_options()).options
        found = next((options[name] for name in losses if "beta" in options[name]), None)
        if found is not None:
            return float(found["beta"])
    if run.command == "kto" and run.beta is not None:
        return run.beta
    what = _dpo_config(run).loss if run.command == "dpo" else run.command
    raise ConfigError(
        f"{run.folder}: a run of {what} has no β of a reward against a reference; give --beta to "
        "score by β x log(policy / start) all the same, or rank with --reward-model"
    )


def _reference(run: Finished, given: str | Path | None) -> Path | None:
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_dir():
            raise ModelError(f"--reference-adapter {given}: no such folder")
        return path
    if run.config is None or run.config.init_adapter is None:
        return None
    init = Path(run.config.init_adapter).expanduser()
    if not init.is_dir():
        raise ModelError(
            f"{run.folder}: started from the adapter {init}, its reference, which is not there "
            f"(seen from {Path.cwd()}); say where it is with --reference-adapter"
        )
    return init
