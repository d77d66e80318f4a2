"""A trained reward model at work: completions in, scores out.

Scores come from a base model with the adapter and head of a run, or from a sequence classifier of
the hub. A prompt is run once for all its completions, and a score depends on nothing but its
prompt and completion: not on padding, not on what else is in the batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from mlx_align.data.rendering import ChatStyle, chat_style
from mlx_align.errors import ConfigError, DataError, ModelError
from mlx_align.inference.score import run_groups
from mlx_align.inference.scored import Prompt, Scored, as_group, tokenize_to_score
from mlx_align.models.adapters import ADAPTER_CONFIG, install, load_tree, read_layout, read_weights
from mlx_align.models.classifiers import AT_END_TOKEN, MARK, is_classifier, padding_id
from mlx_align.models.heads import HEAD_NAME, completion_scores, put_head, read_head
from mlx_align.models.loading import LanguageModel, ModelFolder, load_language_model, open_model
from mlx_align.types import PromptGroup, TokenizedGroup

Scores = npt.NDArray[np.float32]
COMBINATIONS = ("mean", "min", "mean-variance")
MAX_SEQ_LENGTH = 4096
BATCH_SIZE = 4


@dataclass(frozen=True)
class RewardModel:
    """A reward model ready to score; make one with `RewardModel.load`.

    Attributes:
        model: Base, adapter and head.
        style: How its tokenizer writes conversations.
        combine: How several members' scores become one: mean, min, or mean-variance (mean minus
            `variance_penalty` times their variance).
        variance_penalty: See above.
        max_seq_length: Longest row that is scored, tokens.
        batch_size: Prompts run at once.
        behind: Ids that its template writes behind an answer's end token and that it reads.
        unread: The id it passes over at the end of a row, if any.
    """

    model: LanguageModel
    style: ChatStyle
    combine: str = "mean"
    variance_penalty: float = 0.0
    max_seq_length: int = MAX_SEQ_LENGTH
    batch_size: int = BATCH_SIZE
    behind: tuple[int, ...] = ()
    unread: int | None = None

    @classmethod
    def load(
        cls,
        model: str,
        adapter_path: str | Path | None = None,
        *,
        combine: str = "mean",
        variance_penalty: float | None = None,
        max_seq_length: int = MAX_SEQ_LENGTH,
        batch_size: int = BATCH_SIZE,
    ) -> RewardModel:
        """Load a reward model.

        Args:
            model: A run's base model, or a *ForSequenceClassification model with one label:
                folder or hub name.
            adapter_path: The run folder of `mlx-align reward`; None for a classifier.
            combine: mean, min, or mean-variance, where the model has several members.
            variance_penalty: λ of mean-variance.
            max_seq_length: Longest row to score, tokens.
            batch_size: Prompts to run at once.

        Raises:
            ModelError: There is no such model, it is no reward model, or the run's tensors are
                not exactly those that fit it.
            ConfigError: The combination has no effect, or lacks its λ.
        """
        folder = open_model(model)
        if adapter_path is None and not is_classifier(folder.config):
            raise ModelError(
                f"{model}: no reward model by itself; name the run of mlx-align reward with "
                "--adapter-path, or a *ForSequenceClassification model"
            )
        loaded = load_language_model(folder)
        if adapter_path is not None:
            put_run(loaded, Path(adapter_path).expanduser())
        members = int(loaded.module[HEAD_NAME].weight.shape[0])
        _check_combination(combine, variance_penalty, members)
        style = chat_style(folder.tokenizer)
        behind, unread = _reading(folder, style) if adapter_path is None else ((), None)
        return cls(
            loaded,
            style,
            combine=combine,
            variance_penalty=variance_penalty or 0.0,
            max_seq_length=max_seq_length,
            batch_size=batch_size,
            behind=behind,
            unread=unread,
        )

    def score(
        self,
        prompt: Prompt,
        completions: Sequence[str | Sequence[Mapping[str, str]]],
    ) -> list[float]:
        """Scores of completions of one prompt, in their order; higher is better.

        Args:
            prompt: Text as it stands, or messages ({"role": …, "content": …}) for the model's
                chat template.
            completions: Text, beside messages the assistant's answer; or messages.

        Raises:
            DataError: The prompt and a completion are too long together, or can't be rendered.
        """
        (scored,) = self.score_groups([as_group("score()", prompt, completions)])
        if scored.scores is None:
            raise DataError(f"can't be scored: {scored.reason}")
        return [float(score) for score in scored.scores]

    def score_groups(self, groups: Sequence[PromptGroup]) -> list[Scored]:
        """What each group's completions score, in the groups' order."""
        results = tokenize_to_score(groups, self.style, self.max_seq_length)
        tokens = [
            self._as_read(group, result)
            for group, result in zip(groups, results, strict=True)
            if isinstance(result, TokenizedGroup)
        ]
        found = iter(zip(tokens, self.score_tokens(tokens), strict=True))
        return [
            self._combined(*next(found)) if isinstance(result, TokenizedGroup) else result
            for result in results
        ]

    def score_tokens(self, groups: Sequence[TokenizedGroup]) -> list[Scores]:
        """Per group (K, members) scores of its completions, each read at its last token."""
        anatomy, shared = self.model.anatomy, self.model.shared
        return run_groups(
            groups, lambda batch: completion_scores(anatomy, batch, shared=shared), self.batch_size
        )

    def _combined(self, group: TokenizedGroup, members: Scores) -> Scored:
        combined = combine_members(members, self.combine, self.variance_penalty)
        return Scored(combined, members, tokens=group)

    def _as_read(self, text: PromptGroup, group: TokenizedGroup) -> TokenizedGroup:
        """The group with its completions ended as the model reads them; every token counts."""
        behind = () if isinstance(text.prompt, str) else self.behind
        completions = []
        for ids in group.completions:
            ids = np.concatenate([ids, np.array(behind, np.int32)])
            while self.unread is not None and len(ids) and ids[-1] == self.unread:
                ids = ids[:-1]
            completions.append(ids)
        return replace(group, completions=tuple(completions), loss_masks=None)


def put_run(model: LanguageModel, run: Path) -> None:
    """Put the adapter and the head of a run into its base model.

    Raises:
        ModelError: The run is no reward model's, or its tensors are not exactly those that fit.
    """
    layout = read_layout(run)
    weight = read_head(run)
    fresh = install(model.module, replace(layout, dropout=0.0))
    names = {name for name, _ in tree_flatten(fresh)}
    stored = set(read_weights(run))
    for what, odd in (("is missing", names - stored), ("fits nothing", stored - names)):
        if odd:
            raise ModelError(
                f"{run}: {sorted(odd)[0]} {what} (of {len(odd)} such tensors); is --model its base?"
            )
    model.module.update(load_tree(run, fresh, layout))
    put_head(model.anatomy, weight)
    model.module.eval()
    mx.eval(model.module.parameters())


def base_of(run: Path, folder: ModelFolder) -> ModelFolder:
    """The base of a reward model's run: `folder` itself, or the other one that the run names.

    Raises:
        ModelError: The run can't be read, or the base it names can't be opened.
    """
    read_layout(run)
    named = json.loads((run / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("model")
    if not isinstance(named, str) or named == folder.name:
        return folder
    local = Path(named).expanduser()
    if local.exists() and folder.path.exists() and local.samefile(folder.path):
        return folder
    try:
        return open_model(named)
    except ModelError as error:
        raise ModelError(
            f"--reward-model {run}: its base {named} can't be opened; put it back, or correct "
            f'"model" in {run / ADAPTER_CONFIG}'
        ) from error


def combine_members(members: Scores, how: str, variance_penalty: float) -> Scores:
    """The scores (K,) of an ensemble from those (K, members) of its members.

    `min` and `mean-variance` are low where the members disagree: a policy that is trained on them
    gains nothing from completions that only some of them like.

    Source: Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization", worst-case
    and uncertainty-weighted optimisation.
    """
    if how == "min":
        least: Scores = members.min(axis=1)
        return least
    mean: Scores = members.mean(axis=1)
    if how == "mean":
        return mean
    penalised: Scores = mean - np.float32(variance_penalty) * members.var(axis=1)
    return penalised


def _check_combination(how: str, variance_penalty: float | None, members: int) -> None:
    if how not in COMBINATIONS:
        raise ConfigError(f"--combine {how}: unknown; choose from {', '.join(COMBINATIONS)}")
    if how != "mean" and members == 1:
        raise ConfigError(f"--combine {how}: has no effect on a model of one member; leave it out")
    if how == "mean-variance" and variance_penalty is None:
        raise ConfigError("--combine mean-variance: say with --variance-penalty how much")
    if how != "mean-variance" and variance_penalty is not None:
        raise ConfigError(
            f"--variance-penalty {variance_penalty:g}: has no effect on --combine {how}; give "
            "--combine mean-variance"
        )
    if variance_penalty is not None and not 0 < variance_penalty < float("inf"):
        raise ConfigError(f"--variance-penalty {variance_penalty:g}: must be above 0")


def _reading(folder: ModelFolder, style: ChatStyle) -> tuple[tuple[int, ...], int | None]:
    """How a classifier reads the end of a row: ids behind the end token, and the id passed over."""
    # A classifier of the hub was trained on whole renderings of its template.
    behind = () if folder.config.get(MARK) == AT_END_TOKEN else style.ending[1:]
    return behind, padding_id(folder.path, folder.config)
