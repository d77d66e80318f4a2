"""The implicit reward at work: β·log(π/π_ref) of given completions, by adapter swap on one base.

A policy trained against a reference is a reward model: for the optimum of the regularised
objective, β·log(π*(y|x)/π_ref(y|x)) = r(x, y) − β·log Z(x), which ranks the completions of a prompt
as r does (Rafailov et al. 2023, "Direct Preference Optimization", eq. 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from mlx_align.data.batching import scored as counting
from mlx_align.data.rendering import ChatStyle, chat_style
from mlx_align.inference.finished import Finished, read_run
from mlx_align.inference.score import run_groups
from mlx_align.inference.scored import Scored, tokenize_to_score
from mlx_align.inference.terms import terms_of
from mlx_align.inference.trees import load_trees
from mlx_align.models.adapters import compute_dtype
from mlx_align.models.loading import LanguageModel, open_model
from mlx_align.models.logps import batch_token_logps
from mlx_align.models.roles import Tree
from mlx_align.types import Logps, PromptGroup, TokenizedGroup

Floats = npt.NDArray[np.float64]
Rows = Sequence[npt.NDArray[np.float32]]

MAX_SEQ_LENGTH = 4096
BATCH_SIZE = 4


def implicit_rewards(
    policy: Rows, reference: Rows, masks: Sequence[npt.NDArray[np.bool_]], beta: float
) -> Floats:
    """β·log(π/π_ref) (K,) of K completions, from their per-token log-probs (nats).

    Differences are summed token by token: between sums near −1,000 nats, float32 loses 1e-4.
    """
    rows = zip(policy, reference, masks, strict=True)
    return beta * np.array([(p - r)[m].sum(dtype=np.float64) for p, r, m in rows])


@dataclass(frozen=True)
class ImplicitReward:
    """A policy and its reference, ready to score; make one with `load_implicit`.

    Attributes:
        model: Their base.
        style: How its tokenizer writes conversations.
        policy: The policy's tree.
        reference: The reference's; None to score by the policy's own log-probs.
        beta: Temperature.
        per_token: Whether scores are divided by the completion's length.
        max_seq_length: Longest row that is scored, tokens.
        batch_size: Prompts run at once.
    """

    model: LanguageModel
    style: ChatStyle
    policy: Tree
    reference: Tree | None
    beta: float = 1.0
    per_token: bool = False
    max_seq_length: int = MAX_SEQ_LENGTH
    batch_size: int = BATCH_SIZE

    def score_groups(self, groups: Sequence[PromptGroup]) -> list[Scored]:
        """What each group's completions score, in the groups' order."""
        results = tokenize_to_score(groups, self.style, self.max_seq_length)
        found = iter(self.score_tokens([r for r in results if isinstance(r, TokenizedGroup)]))
        return [next(found) if isinstance(result, TokenizedGroup) else result for result in results]

    def score_tokens(self, groups: Sequence[TokenizedGroup]) -> list[Scored]:
        """The same of groups of tokens: each prompt is run once a role."""
        policy = self._logps(self.policy, groups)
        reference = policy if self.reference is None else self._logps(self.reference, groups)
        scored = []
        for group, own_rows, other_rows in zip(groups, policy, reference, strict=True):
            masks = [counting(group, k) for k in range(len(group.completions))]
            own = [row[: len(mask)] for row, mask in zip(own_rows, masks, strict=True)]
            others = [row[: len(mask)] for row, mask in zip(other_rows, masks, strict=True)]
            logps = _totals(own, masks)
            if self.reference is None:
                rewards = logps
            else:
                rewards = implicit_rewards(own, others, masks, self.beta)
            if self.per_token:
                rewards = rewards / np.array([max(1, int(mask.sum())) for mask in masks])
            scored.append(
                Scored(
                    rewards.astype(np.float32),
                    tokens=group,
                    policy_logps=logps,
                    reference_logps=None if self.reference is None else _totals(others, masks),
                )
            )
        return scored

    def _logps(self, tree: Tree, groups: Sequence[TokenizedGroup]) -> list[Logps]:
        """Per group and completion, the role's log-prob of each token and padding behind."""
        with self.model.acting_as(tree):
            return run_groups(
                groups,
                lambda batch: batch_token_logps(
                    self.model.anatomy, batch, shared=self.model.shared
                ),
                self.batch_size,
            )


def load_implicit(
    model: str,
    adapter_path: str | Path,
    *,
    beta: float | None = None,
    reference_adapter: str | Path | None = None,
    per_token: bool | None = None,
    max_seq_length: int = MAX_SEQ_LENGTH,
    batch_size: int = BATCH_SIZE,
) -> tuple[ImplicitReward, str]:
    """The implicit reward of a run on its base, and what it is in words.

    Args:
        model: The run's base model, folder or hub name.
        adapter_path: The run folder.
        beta: Instead of the run's own.
        reference_adapter: Instead of the adapter that the run started from.
        per_token: Divide by the completion's length; None does where the run's loss did.
        max_seq_length: Longest row to score, tokens.
        batch_size: Prompts to run at once.

    Raises:
        ModelError: Model, run or reference can't be loaded.
        ConfigError: The run has no β or reference, and none is given.
    """
    run = read_run(adapter_path)
    terms = terms_of(run, beta=beta, reference_adapter=reference_adapter, per_token=per_token)
    loaded, (policy, reference) = load_trees(open_model(model), [run.folder, terms.reference])
    loaded = computing_as_trained(loaded, run)
    implicit = ImplicitReward(
        loaded,
        chat_style(loaded.folder.tokenizer),
        policy,
        reference,
        beta=terms.beta,
        per_token=terms.per_token,
        max_seq_length=max_seq_length,
        batch_size=batch_size,
    )
    return implicit, terms.said


def load_logps(
    model: str,
    adapter_path: str | Path | None = None,
    *,
    per_token: bool | None = None,
    max_seq_length: int = MAX_SEQ_LENGTH,
    batch_size: int = BATCH_SIZE,
) -> tuple[ImplicitReward, str]:
    """The log-probs of a model, under a run's adapter if there is one, as scores.

    Arguments and errors as in `load_implicit`.
    """
    run = None if adapter_path is None else read_run(adapter_path)
    adapters = [None if run is None else run.folder]
    loaded, (policy,) = load_trees(open_model(model), adapters)
    if run is not None:
        loaded = computing_as_trained(loaded, run)
    style = chat_style(loaded.folder.tokenizer)
    scorer = ImplicitReward(
        loaded,
        style,
        policy,
        None,
        per_token=bool(per_token),
        max_seq_length=max_seq_length,
        batch_size=batch_size,
    )
    return scorer, "log-probs of the completions, nats" + (" per token" if per_token else "")


def computing_as_trained(model: LanguageModel, run: Finished) -> LanguageModel:
    """The model with adapters that compute in what they did while the run trained.

    Raises:
        ConfigError: The model does not compute in it.
    """
    if run.config is None or run.layout.fine_tune_type != "lora":
        return model
    dtypes = {array.dtype for _, array in tree_flatten(model.module.parameters())}
    return replace(model, adapter_dtype=compute_dtype(run.config.adapter_dtype, dtypes))


def _totals(rows: Rows, masks: Sequence[npt.NDArray[np.bool_]]) -> Floats:
    return np.array([row[m].sum(dtype=np.float64) for row, m in zip(rows, masks, strict=True)])
