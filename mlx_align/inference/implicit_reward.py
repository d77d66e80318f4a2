"""Implicit rewards β·log(π/π_ref) of completions, with policy and reference on one base model.

A policy trained against a reference is a reward model: at the optimum of the KL-regularised
objective, β·log(π*(y|x)/π_ref(y|x)) = r(x, y) − β·log Z(x), which ranks the completions of a prompt
as r does.

Source: Rafailov et al. 2023, "Direct Preference Optimization", eq. 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlx_align.data.batching import completion_mask
from mlx_align.data.chat_template import ChatTemplate, Thinking, inspect_chat_template
from mlx_align.errors import DataError
from mlx_align.inference.scoring import (
    GroupScores,
    TextOrMessages,
    make_group,
    map_groups,
    tokenize_for_scoring,
)
from mlx_align.inference.trained_run import (
    ImplicitRewardSettings,
    TrainedRun,
    match_adapter_dtype,
    read_trained_run,
)
from mlx_align.models.forward import token_logprobs
from mlx_align.models.loading import LanguageModel, ModelFolder, load_adapters, open_model
from mlx_align.models.row_limits import check_rows
from mlx_align.models.weights import AdapterWeights
from mlx_align.types import Logps, PromptGroup, TokenizedGroup

Floats = npt.NDArray[np.float64]
Rows = Sequence[npt.NDArray[np.float32]]

MAX_SEQ_LENGTH = 4096
BATCH_SIZE = 4


def implicit_rewards(
    policy: Rows, reference: Rows, masks: Sequence[npt.NDArray[np.bool_]], beta: float
) -> Floats:
    """β·log(π/π_ref) (K,) of K completions, from their per-token log-probs (nats).

    Differences are taken per token and then summed: between sums near −1,000 nats, float32 loses
    1e-4.
    """
    rows = zip(policy, reference, masks, strict=True)
    return beta * np.array([(p - r)[m].sum(dtype=np.float64) for p, r, m in rows])


@dataclass(frozen=True)
class ImplicitReward:
    """A policy and its reference, loaded to score completions.

    Make one with `load_implicit_reward`, or with `load_logprob_scorer` for plain log-probs.

    Attributes:
        model: The base model.
        style: Chat template of its tokenizer.
        policy: Adapter weights of the policy.
        reference: Adapter weights of the reference; None to score by the policy's log-probs alone.
        beta: Temperature β.
        per_token: Whether scores are divided by the completion's length.
        max_seq_length: Maximum length of prompt and completion, tokens.
        batch_size: Prompts per batch.
        description: A line that describes the scores.
    """

    model: LanguageModel
    style: ChatTemplate
    policy: AdapterWeights
    reference: AdapterWeights | None
    beta: float = 1.0
    per_token: bool = False
    max_seq_length: int = MAX_SEQ_LENGTH
    batch_size: int = BATCH_SIZE
    description: str = ""

    def score(self, prompt: TextOrMessages, completions: Sequence[TextOrMessages]) -> list[float]:
        """Score completions of one prompt; higher is better.

        Args:
            prompt: Text, used verbatim, or messages ({"role": …, "content": …}), rendered with the
                chat template.
            completions: Text or messages; with a prompt of messages, text is the assistant's.

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
        scores = iter(self.score_tokens([r for r in results if isinstance(r, TokenizedGroup)]))
        return [next(scores) if isinstance(r, TokenizedGroup) else r for r in results]

    def tokenize(self, groups: Sequence[PromptGroup]) -> list[TokenizedGroup | GroupScores]:
        """The groups as the model reads them, or why one can't be scored."""
        return tokenize_for_scoring(groups, self.style, self.max_seq_length)

    def score_tokens(self, groups: Sequence[TokenizedGroup]) -> list[GroupScores]:
        """Score tokenized groups; each prompt is run once per role.

        Raises:
            DataError: The model doesn't embed one of the tokens, or a row is too long for it.
        """
        check_rows(self.model.folder, groups)
        policy = self._token_logprobs(self.policy, groups)
        reference = (
            policy if self.reference is None else self._token_logprobs(self.reference, groups)
        )
        found = []
        for group, policy_rows, reference_rows in zip(groups, policy, reference, strict=True):
            masks = [completion_mask(group, k) for k in range(len(group.completions))]
            own = [row[: len(mask)] for row, mask in zip(policy_rows, masks, strict=True)]
            other = [row[: len(mask)] for row, mask in zip(reference_rows, masks, strict=True)]
            logps = _masked_sums(own, masks)
            if self.reference is None:
                rewards = logps
            else:
                rewards = implicit_rewards(own, other, masks, self.beta)
            if self.per_token:
                rewards = rewards / np.array([max(1, int(mask.sum())) for mask in masks])
            found.append(
                GroupScores(
                    rewards.astype(np.float32),
                    tokens=group,
                    policy_logps=logps,
                    reference_logps=None if self.reference is None else _masked_sums(other, masks),
                )
            )
        return found

    def _token_logprobs(
        self, weights: AdapterWeights, groups: Sequence[TokenizedGroup]
    ) -> list[Logps]:
        """The token log-probs (K, C) of each group under `weights`, padded on the right."""
        backbone, shared = self.model.backbone, self.model.shared
        with self.model.use_adapter(weights):
            return map_groups(
                groups,
                lambda batch: token_logprobs(backbone, batch, shared=shared),
                self.batch_size,
            )


def load_implicit_reward(
    model: str | ModelFolder,
    adapter_path: str | Path | TrainedRun,
    *,
    beta: float | None = None,
    reference_adapter: str | Path | None = None,
    per_token: bool | None = None,
    thinking: Thinking | None = None,
    max_seq_length: int = MAX_SEQ_LENGTH,
    batch_size: int = BATCH_SIZE,
) -> ImplicitReward:
    """Load the implicit reward of a run.

    Args:
        model: The run's base model, folder or hub name.
        adapter_path: The run folder.
        beta: Temperature β; None for the run's own.
        reference_adapter: Folder of the reference's adapter; None for where the run started.
        per_token: Divide by the completion's length; None to do so if the run's loss did.
        thinking: Whether to render with the chat template's thinking on; None for as the run was
            trained.
        max_seq_length: Maximum length of prompt and completion, tokens.
        batch_size: Prompts per batch.

    Raises:
        ModelError: Model, run or reference can't be loaded.
        ConfigError: The run has no β and none is given.
    """
    run = adapter_path if isinstance(adapter_path, TrainedRun) else read_trained_run(adapter_path)
    settings = ImplicitRewardSettings.from_run(
        run, beta=beta, reference_adapter=reference_adapter, per_token=per_token
    )
    folder = open_model(model) if isinstance(model, str) else model
    loaded, (policy, reference) = load_adapters(folder, [run.folder, settings.reference])
    return ImplicitReward(
        match_adapter_dtype(loaded, run),
        inspect_chat_template(loaded.folder.tokenizer, thinking or run.thinking),
        policy,
        reference,
        beta=settings.beta,
        per_token=settings.per_token,
        max_seq_length=max_seq_length,
        batch_size=batch_size,
        description=settings.description,
    )


def load_logprob_scorer(
    model: str,
    adapter_path: str | Path | None = None,
    *,
    per_token: bool | None = None,
    thinking: Thinking | None = None,
    max_seq_length: int = MAX_SEQ_LENGTH,
    batch_size: int = BATCH_SIZE,
) -> ImplicitReward:
    """Load a model, with a run's adapter if given, to score completions by their log-probs (nats).

    Arguments and errors are those of `load_implicit_reward`.
    """
    run = None if adapter_path is None else read_trained_run(adapter_path)
    loaded, (policy,) = load_adapters(open_model(model), [None if run is None else run.folder])
    return ImplicitReward(
        loaded if run is None else match_adapter_dtype(loaded, run),
        inspect_chat_template(
            loaded.folder.tokenizer, thinking or ("auto" if run is None else run.thinking)
        ),
        policy,
        None,
        per_token=bool(per_token),
        max_seq_length=max_seq_length,
        batch_size=batch_size,
        description="log-probs of the completions, nats" + (" per token" if per_token else ""),
    )


def _masked_sums(rows: Rows, masks: Sequence[npt.NDArray[np.bool_]]) -> Floats:
    return np.array([row[m].sum(dtype=np.float64) for row, m in zip(rows, masks, strict=True)])
