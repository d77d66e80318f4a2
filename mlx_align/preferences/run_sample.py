"""`mlx-align data sample`: from its options to the best of sampled completions, or to all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_align.config import SampleConfig
from mlx_align.config.schema import fingerprint_options
from mlx_align.data.columns import configure_data
from mlx_align.data.formats import read_prompts
from mlx_align.data.readers import DataSource
from mlx_align.data.tokenization import tokenize_prompts
from mlx_align.errors import ConfigError, DataError
from mlx_align.inference.reward_model import find_reward_model
from mlx_align.models.adapters import fingerprint_adapters, fingerprint_folder
from mlx_align.models.loading import ModelFolder, open_model
from mlx_align.models.row_limits import check_rows
from mlx_align.preferences.run_label import sample_to_file
from mlx_align.preferences.sample_answers import partial_file
from mlx_align.rollout.rejection_sampling import (
    RejectionSamplingConfig,
    load_sampler,
    sample_rows,
)
from mlx_align.rollout.reward_functions import RewardSource
from mlx_align.rollout.rewards import (
    Rewards,
    RewardSettings,
    fingerprint_rewards,
    require_rewards,
    reward_settings,
)
from mlx_align.rollout.sampler import Prompt
from mlx_align.system.json_text import to_json
from mlx_align.system.progress import Console
from mlx_align.system.row_file import hash_rows, new_file, open_rows
from mlx_align.system.starter import resolve_starter


class SampleOutcome(NamedTuple):
    """The result of `mlx-align data sample`.

    Attributes:
        content: As JSON-serialisable values.
        text: What was written, in a sentence or two.
    """

    content: Mapping[str, Any]
    text: str


def sample_data(
    config: SampleConfig,
    console: Console,
    *,
    data: DataSource | None = None,
    rewards: Sequence[RewardSource] = (),
) -> SampleOutcome:
    """Sample completions, and write the best of each prompt; all of them without a reward.

    Args:
        config: The options.
        console: Shows notes and progress.
        data: Opened prompts, instead of those that the options name.
        rewards: Python functions in addition to the option `reward`.

    Raises:
        MlxAlignError: An option is wrong, or the data, a model or a reward can't be used.
    """
    _check_config(config, rewards)
    if not config.reward and not rewards and config.reward_model is None:
        return _sample_answers(config, console, data)
    weight = 1.0 if config.reward_model_weight is None else config.reward_model_weight
    settings = require_rewards(
        reward_settings(
            (*(config.reward or ()), *rewards),
            config.reward_model,
            weight,
            config.reward_timeout,
        )
    )
    target = new_file(config.output, resume=config.resume)
    source = configure_data(resolve_starter(config.data, "data") if data is None else data, config)
    groups, reading = read_prompts(source, "train", config.format)
    console.note(str(reading))
    folder = open_model(resolve_starter(config.model, "model"))
    tokens, report = tokenize_prompts(
        groups, folder.tokenizer, config.max_prompt_length, config.thinking
    )
    prompts = [Prompt(groups[i], one) for i, one in zip(report.indices, tokens, strict=True)]
    dropped = sum(report.dropped.values())
    if dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        console.note(f"! {dropped:,} prompts dropped: {reasons}")
    remarks = check_rows(
        folder,
        tokens,
        config.max_completion_length,
        source="the longest prompt with --max-completion-length",
    )
    for note in (*report.notes, *remarks):
        console.note(f"! {note}")
    sampling = RejectionSamplingConfig(
        config.n,
        config.keep or 1,
        config.threshold,
        config.pairs,
        config.max_completion_length,
        config.temperature,
        config.seed,
    )
    key = "score_chosen" if config.pairs else "score"
    inputs = fingerprint_options(config, _hashes(config, settings, folder, prompts))
    output = open_rows(target, inputs, resume=config.resume, total=len(prompts), note=console.note)
    # The rewards are opened before the model is loaded, so that an error in one is found at once.
    with output as written, Rewards(settings, note=console.note) as scorer:
        scorer.check([prompt.text for prompt in prompts])
        loaded, policy, score = load_sampler(folder, config.adapter_path, config.reward_model)
        scorer.score_model = score
        earlier = list(written.read())
        scores = [float(row[key]) for row in earlier]
        kept = {to_json(row["prompt"]) for row in earlier}
        with console.bar("Sampling", len(prompts), written.done) as bar:

            def count(finished: int) -> None:
                written.commit(written.done + finished)
                bar.advance(finished)

            for row in sample_rows(loaded, policy, scorer, prompts, sampling, count, written.done):
                written.write(row)
                scores.append(row[key])
                kept.add(to_json(row["prompt"]))
    if not scores:
        target.unlink()
        above = "" if config.threshold is None else f" of at least --threshold {config.threshold:g}"
        same = ", or all completions of each prompt score the same" if config.pairs else ""
        zero = ", or the best score is 0" if config.threshold is None else ""
        raise DataError(
            f"nothing to write: no completion has a score{above}{zero}{same}; raise -n, or choose "
            "another model, prompts or reward"
        )
    mean = sum(scores) / len(scores)
    different = len({prompt.text.prompt for prompt in prompts})
    if left_out := different - len(kept):
        why = "its completions score the same" if config.pairs else "no completion scores"
        console.note(f"! {left_out:,} of {different:,} prompts have no row, because {why}")
    content = {
        "output": str(target),
        "prompts": len(prompts),
        "dropped": dict(report.dropped),
        "rows": len(scores),
        "n": config.n,
        "score": mean,
        "seed": config.seed,
    }
    return SampleOutcome(
        content,
        f"Wrote {len(scores):,} rows from {len(prompts):,} prompts to {target}, mean score "
        f"{mean:+.4f}. Train on them:\n"
        f"  mlx-align {'dpo' if config.pairs else 'sft'} --model {config.model} --data {target}",
    )


def _sample_answers(
    config: SampleConfig, console: Console, data: DataSource | None
) -> SampleOutcome:
    """Write all answers, a line per prompt."""
    if config.resume and Path(config.output).expanduser().is_file():
        # There, if a command was killed in its last moment.
        partial_file(Path(config.output).expanduser()).unlink(missing_ok=True)
        raise ConfigError(f"--resume: {config.output} is complete; name another --output")
    target = new_file(config.output)
    source = configure_data(resolve_starter(config.data, "data") if data is None else data, config)
    groups, reading = read_prompts(source, "train", config.format)
    console.note(str(reading))
    found = sample_to_file(groups, config, target, console)
    left_out = ", ".join(
        f"{count:,} {what}"
        for what, count in (("empty", found.empty), ("duplicates", found.duplicates))
        if count
    )
    return SampleOutcome(
        {"output": str(target), **dataclasses.asdict(found)},
        f"Wrote {found.answers:,} answers to {found.lines:,} prompts to {target}"
        f"{f' ({left_out} left out)' if left_out else ''}. Compare them:\n"
        f"  mlx-align label {target} --output labels.jsonl",
    )


def _hashes(
    config: SampleConfig, settings: RewardSettings, folder: ModelFolder, prompts: list[Prompt]
) -> dict[str, str]:
    """Hashes of what the rows depend on, by the option that names it."""
    model = None
    if config.reward_model is not None:
        model = find_reward_model(config.reward_model, folder)
    rewards = fingerprint_rewards(settings, model, "reward model", folder)
    hashes = {
        **fingerprint_adapters(config),
        "model": fingerprint_folder(folder.path),
        "data": hash_rows([one.tokens.prompt.tolist(), dict(one.text.columns)] for one in prompts),
        "reward": f"{config.reward!r} {rewards}",
    }
    if "reward model" in rewards:
        hashes["reward_model"] = rewards["reward model"]
    return hashes


def _check_config(config: SampleConfig, rewards: Sequence[RewardSource]) -> None:
    """Check that options which need a reward have one.

    Raises:
        ConfigError: One has no effect.
    """
    if not config.reward and not rewards and config.reward_model is None:
        for name in ("keep", "threshold", "pairs"):
            value = getattr(config, name)
            if value not in (None, False):
                shown = "" if value is True else f" {value:g}"
                raise ConfigError(f"--{name}{shown} needs --reward or --reward-model")
    elif config.arms is not None or config.temperatures is not None:
        given = "arms" if config.arms is not None else "temperatures"
        raise ConfigError(
            f"--{given} is for all answers, without --reward and --reward-model; drop one"
        )
    if config.pairs and config.keep is not None:
        raise ConfigError(f"--keep {config.keep} has no effect with --pairs; drop one")
    one_temperature = config.arms is None and config.temperatures is None
    if config.temperature == 0 and config.n > 1 and one_temperature:
        raise ConfigError(
            "--temperature 0 makes all completions the same; add -n 1, or give a temperature above "
            "0"
        )
    if config.pairs and config.n < 2:
        raise ConfigError(f"-n {config.n}: --pairs needs at least 2 completions per prompt")
    if config.keep is not None and config.keep > config.n:
        raise ConfigError(f"--keep {config.keep} exceeds the -n {config.n} sampled completions")
    if config.reward_model_weight is not None and config.reward_model is None:
        raise ConfigError(
            f"--reward-model-weight {config.reward_model_weight:g} needs --reward-model"
        )
