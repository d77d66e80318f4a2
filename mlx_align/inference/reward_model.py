"""Reward models: finding, loading, and scoring completions with them.

A reward model is the run of `mlx-align reward` (a base model with an adapter and a scalar head), or
a *ForSequenceClassification model with one label. If the policy has the same base model, the reward
model can share its weights in memory.

A prompt runs once for all its completions. A score depends only on its prompt and completion, not
on padding or on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_align.data.chat_template import ChatTemplate, Thinking, inspect_chat_template
from mlx_align.errors import ConfigError, DataError, ModelError
from mlx_align.inference.scoring import (
    GroupScores,
    TextOrMessages,
    make_group,
    map_groups,
    tokenize_for_scoring,
)
from mlx_align.inference.trained_run import read_thinking
from mlx_align.models.adapters import (
    ADAPTER_CONFIG_FILE,
    AdapterLayout,
    install_adapters,
    load_adapter,
    read_layout,
)
from mlx_align.models.classifiers import AT_END_TOKEN, READS_AT, is_classifier, padding_id
from mlx_align.models.heads import (
    REWARD_HEAD,
    add_reward_head,
    completion_scores,
    has_reward_head,
    read_reward_head,
)
from mlx_align.models.loading import (
    LanguageModel,
    ModelFolder,
    load_adapters,
    load_language_model,
    open_model,
)
from mlx_align.models.row_limits import check_rows
from mlx_align.models.weights import AdapterWeights
from mlx_align.system.regular_files import read_json
from mlx_align.types import PromptGroup, TokenizedGroup

Scores = npt.NDArray[np.float32]
COMBINATIONS = ("mean", "min", "mean-variance")
MAX_SEQ_LENGTH = 4096
BATCH_SIZE = 4


@dataclass(frozen=True)
class RewardModel:
    """A loaded reward model; make one with `RewardModel.load` or `open_reward_model`.

    Attributes:
        model: Base model with reward head, and the adapter unless `weights` has it.
        style: Chat template of its tokenizer.
        combine: Combination of the members' scores: mean, min, or mean-variance (mean
            minus `variance_penalty` times the variance).
        variance_penalty: λ of mean-variance.
        max_seq_length: Maximum length of prompt and completion, tokens.
        batch_size: Prompts per batch.
        suffix: Ids that the chat template writes after a completion's end token and that the model
            expects.
        padding: Id that the model skips at the end of a row; None if it skips no id.
        weights: Adapter weights to use while scoring; None if `model` holds them already.
    """

    model: LanguageModel
    style: ChatTemplate
    combine: str = "mean"
    variance_penalty: float = 0.0
    max_seq_length: int = MAX_SEQ_LENGTH
    batch_size: int = BATCH_SIZE
    suffix: tuple[int, ...] = ()
    padding: int | None = None
    weights: AdapterWeights | None = None

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
            model: The base model of a run, or a *ForSequenceClassification model with one label:
                folder or hub name.
            adapter_path: The run folder of `mlx-align reward`; None for a classifier.
            combine: mean, min, or mean-variance; for models with several members.
            variance_penalty: λ of mean-variance.
            max_seq_length: Maximum length of prompt and completion, tokens.
            batch_size: Prompts per batch.

        Raises:
            ModelError: The model does not exist or is not a reward model, or the run's tensors
                don't fit it.
            ConfigError: The combination has no effect, or lacks its λ.
        """
        folder = open_model(model)
        if adapter_path is None and not is_classifier(folder.config):
            raise ModelError(
                f"{model}: not a reward model; give a run of mlx-align reward with "
                "--adapter-path, or a *ForSequenceClassification model"
            )
        loaded = load_language_model(folder)
        if adapter_path is not None:
            install_reward_model(loaded, Path(adapter_path).expanduser())
        members = int(loaded.module[REWARD_HEAD].weight.shape[0])
        _check_combination(combine, variance_penalty, members)
        thinking: Thinking = "auto"
        if adapter_path is not None:
            thinking = read_thinking(Path(adapter_path).expanduser())
        style = inspect_chat_template(folder.tokenizer, thinking)
        suffix: tuple[int, ...] = ()
        padding = None
        if adapter_path is None:
            # Classifiers of the hub were trained on whole renderings of their template.
            suffix = () if folder.config.get(READS_AT) == AT_END_TOKEN else style.ending[1:]
            padding = padding_id(folder.path, folder.config)
        return cls(
            loaded,
            style,
            combine=combine,
            variance_penalty=variance_penalty or 0.0,
            max_seq_length=max_seq_length,
            batch_size=batch_size,
            suffix=suffix,
            padding=padding,
        )

    def score(self, prompt: TextOrMessages, completions: Sequence[TextOrMessages]) -> list[float]:
        """Score completions of one prompt; higher is better.

        Args:
            prompt: Text, used verbatim, or messages ({"role": …, "content": …}), rendered with the
                chat template.
            completions: Text or messages; with a prompt of messages, text is the assistant's.

        Returns:
            One score per completion, in their order.

        Raises:
            DataError: Prompt and completion are too long or can't be rendered.
        """
        (found,) = self.score_groups([make_group("score()", prompt, completions)])
        if found.scores is None:
            raise DataError(f"can't be scored: {found.reason}")
        return [float(score) for score in found.scores]

    def score_groups(self, groups: Sequence[PromptGroup]) -> list[GroupScores]:
        """Score the completions of each group."""
        results = self.tokenize(groups)
        tokens = [result for result in results if isinstance(result, TokenizedGroup)]
        found = iter(zip(tokens, self.score_tokens(tokens), strict=True))
        return [
            self._combined(*next(found)) if isinstance(result, TokenizedGroup) else result
            for result in results
        ]

    def tokenize(self, groups: Sequence[PromptGroup]) -> list[TokenizedGroup | GroupScores]:
        """The groups as the model reads them, or why one can't be scored."""
        results = tokenize_for_scoring(groups, self.style, self.max_seq_length)
        return [
            self._with_ending(group, result) if isinstance(result, TokenizedGroup) else result
            for group, result in zip(groups, results, strict=True)
        ]

    def score_tokens(self, groups: Sequence[TokenizedGroup]) -> list[Scores]:
        """The scores (K, members) of each group's completions, read at their last tokens.

        Raises:
            DataError: The model doesn't embed one of the tokens, or a row is too long for it.
        """
        check_rows(self.model.folder, groups)
        backbone, shared = self.model.backbone, self.model.shared
        with nullcontext() if self.weights is None else self.model.use_adapter(self.weights):
            return map_groups(
                groups,
                lambda batch: completion_scores(backbone, batch, shared=shared),
                self.batch_size,
            )

    def _combined(self, group: TokenizedGroup, members: Scores) -> GroupScores:
        combined = combine_members(members, self.combine, self.variance_penalty)
        return GroupScores(combined, members, tokens=group)

    def _with_ending(self, text: PromptGroup, group: TokenizedGroup) -> TokenizedGroup:
        """The group with the endings of completions that the model expects; every token counts."""
        suffix = () if isinstance(text.prompt, str) else self.suffix
        completions = []
        for ids in group.completions:
            ids = np.concatenate([ids, np.array(suffix, np.int32)])
            while self.padding is not None and len(ids) and ids[-1] == self.padding:
                ids = ids[:-1]
            completions.append(ids)
        return replace(group, completions=tuple(completions), loss_masks=None)


@dataclass(frozen=True)
class RewardModelSource:
    """A reward model that was found by name, without its weights.

    Attributes:
        name: Name as given by the user.
        run: Run folder with adapter and head; None for a classifier.
        base: Base model of the run, or the classifier.
    """

    name: str
    run: Path | None
    base: ModelFolder

    def shares_base(self, folder: ModelFolder, layout: AdapterLayout | None = None) -> bool:
        """Whether it can run as an adapter on the policy's base model.

        Args:
            folder: The policy's base model.
            layout: Layout of the policy's adapter; None if it has none.
        """
        if self.run is None or self.base.path.resolve() != folder.path.resolve():
            return False
        return layout is None or read_layout(self.run).fine_tune_type == layout.fine_tune_type


def find_reward_model(
    name: str | Path, base: ModelFolder | None = None, *, option: str = "--reward-model"
) -> RewardModelSource:
    """Find a reward model by name, without loading weights.

    Args:
        name: A run folder of `mlx-align reward`, or a classifier's folder or hub name.
        base: A model that is open already, to be used if it is the run's base.
        option: The option that `name` was given with, for error messages.

    Raises:
        ModelError: It is neither, or the base model of the run can't be opened.
    """
    run = Path(name).expanduser()
    if has_reward_head(run):
        return RewardModelSource(str(name), run, find_base_model(run, base, option=option))
    try:
        folder = open_model(str(name))
    except ModelError as error:
        raise ModelError(f"{option} {str(error).removeprefix('--model ')}") from error
    if not is_classifier(folder.config):
        raise ModelError(
            f"{option} {name}: neither a run of mlx-align reward nor a "
            "*ForSequenceClassification model"
        )
    return RewardModelSource(str(name), None, folder)


def find_base_model(
    run: Path, base: ModelFolder | None = None, *, option: str = "--reward-model"
) -> ModelFolder:
    """The base model of a reward model's run, as named in its adapter_config.json.

    Args:
        run: The run folder.
        base: A model that is open already; returned if it is the one named, or if none is named.
        option: The option that `run` was given with, for error messages.

    Raises:
        ModelError: The run can't be read, or its base model can't be opened.
    """
    read_layout(run)
    named = read_json(run / ADAPTER_CONFIG_FILE).get("model")
    if base is not None:
        if not isinstance(named, str) or named == base.name:
            return base
        local = Path(named).expanduser()
        if local.exists() and base.path.exists() and local.samefile(base.path):
            return base
    elif not isinstance(named, str):
        raise ModelError(
            f'{run / ADAPTER_CONFIG_FILE}: "model" is missing; expected the base model'
        )
    try:
        return open_model(named)
    except ModelError as error:
        raise ModelError(
            f"{option} {run}: its base model {named} can't be opened; restore it, or correct "
            f'"model" in {run / ADAPTER_CONFIG_FILE}'
        ) from error


def open_reward_model(
    name: str | Path | RewardModelSource,
    base: ModelFolder | None = None,
    *,
    max_seq_length: int = MAX_SEQ_LENGTH,
    batch_size: int = BATCH_SIZE,
) -> RewardModel:
    """Load a reward model by name; a run names its base model.

    Args:
        name: A run folder of `mlx-align reward`, or a classifier's folder or hub name.
        base: A model that is open already, to be used if it is the run's base.
        max_seq_length: Maximum length of prompt and completion, tokens.
        batch_size: Prompts per batch.

    Raises:
        ModelError: It is neither, or can't be loaded.
    """
    source = name if isinstance(name, RewardModelSource) else find_reward_model(name, base)
    return RewardModel.load(
        source.base.name, source.run, max_seq_length=max_seq_length, batch_size=batch_size
    )


def load_policy_and_reward_model(
    folder: ModelFolder,
    adapter_path: Path | None,
    source: RewardModelSource,
    *,
    max_seq_length: int = MAX_SEQ_LENGTH,
    batch_size: int = BATCH_SIZE,
) -> tuple[LanguageModel, AdapterWeights, RewardModel]:
    """Load a policy and a reward model, on one base model in memory if they can share it.

    Args:
        folder: The policy's base model.
        adapter_path: Folder of the policy's adapter; None for the base model itself.
        source: The reward model.
        max_seq_length: Maximum length of prompt and completion to score, tokens.
        batch_size: Prompts to score per batch.

    Returns:
        The policy's model, its adapter weights, and the reward model, which has `weights` if it
        shares the policy's model.

    Raises:
        ModelError: One of them can't be loaded.
    """
    layout = None if adapter_path is None else read_layout(adapter_path)
    if source.shares_base(folder, layout):
        assert source.run is not None
        model, (policy, weights) = load_adapters(folder, [adapter_path, source.run])
        add_reward_head(model.backbone, read_reward_head(source.run)).freeze()
        reward = RewardModel(
            model,
            inspect_chat_template(folder.tokenizer, read_thinking(source.run)),
            max_seq_length=max_seq_length,
            batch_size=batch_size,
            weights=weights,
        )
        return model, policy, reward
    model, (policy,) = load_adapters(folder, [adapter_path])
    reward = open_reward_model(source, max_seq_length=max_seq_length, batch_size=batch_size)
    return model, policy, reward


def load_reward_weights(
    run: Path, model: LanguageModel, initial: AdapterWeights, layout: AdapterLayout
) -> AdapterWeights:
    """The adapter and head of a reward model as weights on the policy's base, at their own rank.

    Args:
        run: Run folder of `mlx-align reward`.
        model: The policy's base model with adapters on every layer that either of them adapts.
        initial: The weights of those adapters as created.
        layout: The layout they were created with.

    Raises:
        ModelError: The run does not fit.
    """
    weights = load_adapter(run, initial, layout, keep_rank=True)
    head = add_reward_head(model.backbone, read_reward_head(run))
    # Frozen, or it would be trained with the policy.
    head.freeze()
    return {**weights, REWARD_HEAD: {"weight": head.weight}}


def install_reward_model(model: LanguageModel, run: Path) -> None:
    """Load the adapter and the head of a run into its base model.

    Raises:
        ModelError: The run is not a reward model, or its tensors are not exactly those expected.
    """
    layout = read_layout(run)
    weight = read_reward_head(run)
    initial = install_adapters(model.module, replace(layout, dropout=0.0))
    model.module.update(load_adapter(run, initial, layout))
    add_reward_head(model.backbone, weight)
    model.module.eval()
    mx.eval(model.module.parameters())


def combine_members(members: Scores, how: str, variance_penalty: float) -> Scores:
    """Combine the scores (K, members) of an ensemble into (K,).

    `min` and `mean-variance` are low where members disagree, so that a policy gains nothing from
    completions that only some of them prefer.

    Source: Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization", worst-case
    and uncertainty-weighted optimisation.
    """
    if how == "min":
        lowest: Scores = members.min(axis=1)
        return lowest
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
        raise ConfigError(
            "--combine mean-variance: needs --variance-penalty, the weight of the variance"
        )
    if how != "mean-variance" and variance_penalty is not None:
        raise ConfigError(
            f"--variance-penalty {variance_penalty:g}: has no effect on --combine {how}; give "
            "--combine mean-variance"
        )
    if variance_penalty is not None and not 0 < variance_penalty < float("inf"):
        raise ConfigError(f"--variance-penalty {variance_penalty:g}: must be above 0")
