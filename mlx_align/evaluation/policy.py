"""Evaluation of a trained policy against its reference, on data it was not trained on.

One model is in memory at a time. The reward model is loaded first, so that a wrong one is reported
early; then it is released, and loaded again when the completions have been sampled.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_align.config import EvalConfig, TrainConfig
from mlx_align.config.schema import fingerprint_options
from mlx_align.data.batching import completion_mask, prompt_numbers
from mlx_align.data.buckets import AnyShape, BatchLimit, plan_shapes
from mlx_align.data.chat_template import ChatTemplate, inspect_chat_template
from mlx_align.data.readers import DataSource
from mlx_align.data.tokenization import tokenize_groups
from mlx_align.errors import ConfigError, DataError
from mlx_align.evaluation.data import (
    EvalPrompt,
    HeldOutData,
    read_documents,
    read_held_out_data,
    sample_prompts,
    split_into_segments,
    trained_on_warning,
)
from mlx_align.evaluation.metrics import (
    BestOf,
    Divergence,
    Perplexity,
    Preferences,
    WinRate,
    best_of_curve,
    divergence,
    perplexity_change,
    preferences,
    win_rate,
)
from mlx_align.evaluation.parts import FinishedParts, pack, unpack
from mlx_align.evaluation.statistics import Floats
from mlx_align.inference.reward_model import find_reward_model, open_reward_model
from mlx_align.inference.scoring import Scorer, make_logprob_scorer, score_groups
from mlx_align.inference.trained_run import TrainedRun, match_adapter_dtype, read_trained_run
from mlx_align.models.adapters import fingerprint_adapters, fingerprint_folder
from mlx_align.models.generation import Generated, generate_groups
from mlx_align.models.loading import LanguageModel, ModelFolder, load_adapters, open_model
from mlx_align.models.row_limits import check_lengths, check_token_ids, row_lengths
from mlx_align.models.weights import AdapterWeights
from mlx_align.rollout.rewards import fingerprint_reward_model
from mlx_align.system.formatting import counted
from mlx_align.system.progress import Console, ProgressBar, SilentConsole
from mlx_align.system.row_file import hash_rows
from mlx_align.types import Logps, Message, PromptGroup, Text, TokenizedGroup

# Tokens per batch, padding counted; at least one group per batch.
BATCH_TOKENS = 2048
# Completions sampled, and prompts scored, between two steps of the progress bar.
COMPLETIONS_AT_ONCE = 64
PROMPTS_AT_ONCE = 16


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a run; those that the data or the options don't allow are None.

    Attributes:
        run: The run folder.
        model: Its base model.
        reference: Description of the reference.
        data: Description of the held-out rows.
        judge: The reward model; None if none was given.
        seed: Random seed of prompts, samples and intervals.
        preferences: Accuracy and margins on held-out pairs.
        divergence: KL from the reference.
        wins: Win rate against the reference, by the reward model.
        best_of: Best-of-n, by the reward model or else by the implicit reward.
        perplexity: Perplexity of other text.
        warnings: Problems that a reader should know of, one sentence each.
    """

    run: str
    model: str
    reference: str
    data: str
    judge: str | None
    seed: int
    preferences: Preferences | None
    divergence: Divergence
    wins: WinRate | None
    best_of: list[BestOf]
    perplexity: Perplexity | None
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The evaluation as JSON-serialisable values, with the keys of evaluation.json."""
        content = asdict(self)
        content["divergence"]["cut"] = content["divergence"].pop("truncated")
        return content


class EvaluationResult(NamedTuple):
    """An evaluation and the completions it was computed from.

    Attributes:
        evaluation: The metrics.
        rows: A JSON row per prompt: the prompt, and each role's completions with their scores.
    """

    evaluation: Evaluation
    rows: list[dict[str, Any]]


class Samples(NamedTuple):
    """K completions of each role to P prompts.

    Attributes:
        policy: Texts of the policy's completions.
        reference: Texts of the reference's completions; None without a reward model.
        policy_lengths: (P, K) tokens.
        reference_lengths: (P, K) tokens.
        logratios: (P, K) log-ratios policy − reference of the policy's completions, nats.
        truncated: Fraction of the policy's completions that reached the maximum length.
    """

    policy: list[list[str]]
    reference: list[list[str]] | None
    policy_lengths: Floats
    reference_lengths: Floats
    logratios: Floats
    truncated: float


class _PolicyMetrics(NamedTuple):
    """The metrics and samples for which policy and reference are in memory."""

    preferences: Preferences | None
    samples: Samples
    perplexity: Perplexity | None


def evaluate_policy(
    config: EvalConfig,
    console: Console | None = None,
    *,
    data: DataSource | None = None,
    own_data: DataSource | None = None,
    parts: FinishedParts | None = None,
) -> EvaluationResult:
    """Evaluate a run against its reference.

    Args:
        config: The options of `mlx-align eval`; `model` and `adapter_path` are required.
        console: Shows progress; None for no output.
        data: Held-out data in place of `config.data`.
        own_data: The data that the run was trained on, if it was passed from Python.
        parts: Keeps finished parts, and has those of an earlier call; None to keep nothing.

    Raises:
        MlxAlignError: An option is wrong, or a model, run or data can't be used.
    """
    parts = FinishedParts() if parts is None else parts
    console = SilentConsole() if console is None else console
    if config.model is None or config.adapter_path is None:
        missing = "--model" if config.model is None else "--adapter-path"
        raise ConfigError(
            f"{missing} is missing; give the run with --adapter-path, and its base model with "
            "--model"
        )
    run = read_trained_run(config.adapter_path)
    held_out = read_held_out_data(
        run, data or config.data, config.format, own_data, config.columns, config.split
    )
    documents = None if config.perplexity_data is None else read_documents(config.perplexity_data)
    folder = open_model(config.model)
    style = inspect_chat_template(folder.tokenizer, run.sampling_thinking)
    limits = run.config or TrainConfig()
    max_length = config.max_seq_length or limits.max_seq_length
    prompts = sample_prompts(
        held_out.prompts, style, count=config.samples, max_length=max_length, seed=config.seed
    )
    pairs = _tokenize_pairs(held_out, folder, limits, max_length)
    questions = [prompt.tokens for prompt in prompts]
    check_token_ids(folder, (*pairs, *questions))
    longest = check_lengths(
        folder, [*row_lengths(pairs), *row_lengths(questions, config.max_completion_length)]
    )
    if config.reward_model is not None:
        open_reward_model(config.reward_model, folder)
        _free_memory()
    if parts.is_kept:
        hashes = _hashes(config, folder, held_out, pairs, documents or ())
        if finished := parts.begin(fingerprint_options(config, hashes)):
            console.note(f"Resuming after {counted(finished, 'finished part')}.")
    measured = _measure_policy(
        config, folder, run, style, pairs, prompts, documents, max_length, console, parts
    )
    _free_memory()
    samples = measured.samples
    scores = _beta(run) * samples.logratios
    wins = reference_scores = None
    scored = np.ones(len(prompts), np.bool_)
    if samples.reference is not None:
        texts = [a + b for a, b in zip(samples.policy, samples.reference, strict=True)]
        both = score_samples(config, folder, prompts, texts, console, parts)
        scored = np.asarray(np.isfinite(both).all(axis=1))
        if not scored.any():
            raise DataError(
                f"--reward-model {config.reward_model}: none of the {len(prompts)} prompts' "
                "answers could be scored (too long for it, or refused by its chat template)"
            )
        scores, reference_scores = both[:, : config.n], both[:, config.n :]
        wins = win_rate(
            scores[scored],
            reference_scores[scored],
            samples.policy_lengths[scored],
            samples.reference_lengths[scored],
            unjudged=int((~scored).sum()),
            seed=config.seed,
        )
    prompt_of_sample = np.repeat(np.arange(len(prompts)), config.n)
    evaluation = Evaluation(
        run=str(run.folder),
        model=config.model,
        reference=_describe_reference(run),
        data=held_out.title,
        judge=config.reward_model,
        seed=config.seed,
        preferences=measured.preferences,
        divergence=divergence(
            samples.logratios.ravel(),
            samples.policy_lengths.ravel(),
            prompt_of_sample,
            samples.truncated,
        ),
        wins=wins,
        best_of=best_of_curve(scores[scored]),
        perplexity=measured.perplexity,
        warnings=(
            *trained_on_warning(held_out.trained, len(held_out.prompts)),
            *_warnings(config, run, folder, samples, len(prompts)),
            *longest,
        ),
    )
    return EvaluationResult(evaluation, _sample_rows(prompts, samples, scores, reference_scores))


@dataclass(frozen=True)
class PolicyAndReference:
    """A policy and its reference, two adapters on one base model in memory.

    Attributes:
        model: The base model.
        policy: Adapter weights of the policy.
        reference: Adapter weights of the reference.
        scorer: Token log-probs under either.
        console: Shows progress.
        parts: Keeps finished parts, and has those of an earlier command.
    """

    model: LanguageModel
    policy: AdapterWeights
    reference: AdapterWeights
    scorer: Scorer
    console: Console
    parts: FinishedParts = dataclasses.field(default_factory=FinishedParts)

    @classmethod
    def load(
        cls, folder: ModelFolder, run: TrainedRun, console: Console, parts: FinishedParts
    ) -> PolicyAndReference:
        """Load the policy of a run and its reference: the adapter or model the run started from.

        Raises:
            ModelError: The model can't be loaded, the run does not fit it, or the adapter that the
                run started from no longer exists.
        """
        start = run.find_reference("restore it, or run this in the folder the run was started in")
        model, (policy, reference) = load_adapters(folder, [run.folder, start])
        model = match_adapter_dtype(model, run)
        return cls(model, policy, reference, make_logprob_scorer(model), console, parts)

    def compare(self, groups: Sequence[TokenizedGroup], label: str) -> tuple[Floats, Floats]:
        """Sequence log-probs under the reference, and log-ratios policy − reference.

        A log-ratio is the sum of per-token differences.

        Args:
            groups: Groups with the same number of completions.
            label: Label of the progress bar.

        Returns:
            Two arrays (groups, completions), nats.
        """
        shapes = plan_shapes(groups, BatchLimit(tokens=BATCH_TOKENS))
        found = []
        with self.console.bar(label, 2 * len(groups)) as bar:
            for role, weights in (("policy", self.policy), ("reference", self.reference)):
                found.append(self._role_logps((label, role), weights, groups, shapes, bar))
        policy, reference = found
        size = len(groups), len(groups[0].completions)
        logps, logratios = np.zeros(size), np.zeros(size)
        for i, group in enumerate(groups):
            for k in range(size[1]):
                mask = completion_mask(group, k)
                reference_logps = reference[i][k][mask].astype(np.float64)
                logps[i, k] = reference_logps.sum()
                logratios[i, k] = (policy[i][k][mask] - reference_logps).sum()
        return logps, logratios

    def _role_logps(
        self,
        name: tuple[str, str],
        weights: AdapterWeights,
        groups: Sequence[TokenizedGroup],
        shapes: Sequence[AnyShape],
        bar: ProgressBar,
    ) -> list[tuple[Logps, ...]]:
        """The log-probs of each group's completions, without the batches that are finished."""
        earlier: list[tuple[Logps, ...]] = [()] * len(groups)

        def keep(indices: list[int], scored: list[tuple[Logps, ...]]) -> None:
            self.parts.add(*name, indices, value=[pack(logps) for logps in scored])
            bar.advance(len(indices))

        def is_finished(indices: list[int]) -> bool:
            found = self.parts.get(*name, indices)
            if found is None:
                return False
            for index, packed in zip(indices, found, strict=True):
                earlier[index] = unpack(packed)
            bar.advance(len(indices))
            return True

        scored = score_groups(self.scorer, weights, groups, shapes, on_batch=keep, skip=is_finished)
        return [new or old for new, old in zip(scored, earlier, strict=True)]

    def sample(self, config: EvalConfig, prompts: Sequence[EvalPrompt]) -> Samples:
        """Sample the policy's completions and, if a reward model compares them, the reference's.

        Both use the same random numbers, unless there is one completion per prompt: then this pair
        itself is compared (see `WinRate`).
        """
        policy = self._generate(config, prompts, self.policy, (config.seed, 0), "policy")
        groups = [
            TokenizedGroup(
                prompt.tokens.prompt,
                tuple(np.array(one.tokens, np.int32) for one in completions),
                prompt.tokens.source,
            )
            for prompt, completions in zip(prompts, policy, strict=True)
        ]
        _, logratios = self.compare(groups, "KL")
        reference = None
        if config.reward_model is not None:
            seed = config.seed, int(config.n == 1)
            reference = self._generate(config, prompts, self.reference, seed, "reference")
        return Samples(
            policy=self._texts(prompts, policy),
            reference=None if reference is None else self._texts(prompts, reference),
            policy_lengths=_lengths(policy),
            reference_lengths=_lengths(reference or []),
            logratios=logratios,
            truncated=float(np.mean([not one.finished for group in policy for one in group])),
        )

    def _generate(
        self,
        config: EvalConfig,
        prompts: Sequence[EvalPrompt],
        weights: AdapterWeights,
        seed: tuple[int, int],
        role: str,
    ) -> list[list[Generated]]:
        stop = sorted(self.model.folder.tokenizer.eos_token_ids)
        self.model.module.eval()
        found: list[list[Generated]] = []
        step = max(1, COMPLETIONS_AT_ONCE // config.n)
        label = f"Answers of the {role}"
        with self.console.bar(label, len(prompts)) as bar, self.model.use_adapter(weights):
            for start in range(0, len(prompts), step):
                part = prompts[start : start + step]
                kept = self.parts.get(label, start)
                if kept is None:
                    sampled = generate_groups(
                        self.model.module,
                        [prompt.tokens.prompt.tolist() for prompt in part],
                        config.n,
                        stop,
                        max_tokens=config.max_completion_length,
                        temperature=1.0,
                        seed=int(np.random.SeedSequence([*seed, start]).generate_state(1)[0]),
                    )
                    kept = [[[one.tokens, one.finished] for one in group] for group in sampled]
                    self.parts.add(label, start, value=kept)
                found += [[Generated(one[0], [], one[1]) for one in group] for group in kept]
                bar.advance(len(part))
        return found

    def _texts(
        self, prompts: Sequence[EvalPrompt], sampled: Sequence[Sequence[Generated]]
    ) -> list[list[str]]:
        return [
            [completion_text(self.model.folder, prompt, one) for one in completions]
            for prompt, completions in zip(prompts, sampled, strict=True)
        ]


def score_samples(
    config: EvalConfig,
    folder: ModelFolder,
    prompts: Sequence[EvalPrompt],
    texts: list[list[str]],
    console: Console,
    parts: FinishedParts,
) -> Floats:
    """Score completions with the reward model; equal texts are scored once.

    Args:
        config: The options; `reward_model` is set.
        folder: The policy's base model.
        prompts: The P prompts.
        texts: The texts of each prompt's completions, the same number for all.
        console: Shows progress.
        parts: Keeps finished parts, and has those of an earlier command.

    Returns:
        (P, completions) scores; NaN in rows that could not be scored.
    """
    assert config.reward_model is not None
    reward_model = open_reward_model(config.reward_model, folder)
    distinct = [list(dict.fromkeys(row)) for row in texts]
    groups = [
        PromptGroup(
            prompt.text.prompt,
            tuple(_as_completion(prompt, text) for text in row),
            prompt.text.source,
        )
        for prompt, row in zip(prompts, distinct, strict=True)
    ]
    scores = np.full((len(groups), len(texts[0])), np.nan)
    with console.bar("Scoring", len(groups)) as bar:
        for start in range(0, len(groups), PROMPTS_AT_ONCE):
            part = groups[start : start + PROMPTS_AT_ONCE]
            kept = parts.get("scores", start)
            if kept is None:
                found = reward_model.score_groups(part)
                kept = [None if one.scores is None else pack([one.scores])[0] for one in found]
                parts.add("scores", start, value=kept)
            for row, packed in enumerate(kept, start):
                if packed is not None:
                    (values,) = unpack([packed])
                    by_text = dict(zip(distinct[row], values.tolist(), strict=True))
                    scores[row] = [by_text[text] for text in texts[row]]
            bar.advance(len(part))
    return scores


def completion_text(folder: ModelFolder, prompt: EvalPrompt, completion: Generated) -> str:
    """The text of a sampled completion, as it has to be appended to its prompt."""
    decode = folder.tokenizer.decode
    tokens = completion.tokens[: len(completion.tokens) - completion.finished]
    if not isinstance(prompt.text.prompt, str):
        # The chat template writes the whitespace between prompt and completion.
        return str(decode(tokens)).strip()
    # Decoded on its own, the first token would lose its leading space.
    ids = prompt.tokens.prompt.tolist()
    return str(decode(ids + tokens))[len(str(decode(ids))) :]


def _measure_policy(
    config: EvalConfig,
    folder: ModelFolder,
    run: TrainedRun,
    style: ChatTemplate,
    pairs: Sequence[TokenizedGroup],
    prompts: Sequence[EvalPrompt],
    documents: Sequence[PromptGroup] | None,
    max_length: int,
    console: Console,
    parts: FinishedParts,
) -> _PolicyMetrics:
    """Compute what needs policy and reference in memory; both are released on return."""
    roles = PolicyAndReference.load(folder, run, console, parts)
    preferred = perplexity = None
    if pairs:
        reference, logratios = roles.compare(pairs, "Held-out pairs")
        preferred = preferences(reference, logratios, prompt_numbers(pairs), _beta(run))
    samples = roles.sample(config, prompts)
    if documents is not None:
        segments, document = split_into_segments(documents, style, max_length)
        check_token_ids(folder, segments)
        reference, logratios = roles.compare(segments, "Perplexity")
        tokens = np.array([len(segment.completions[0]) for segment in segments], np.float64)
        perplexity = perplexity_change(
            reference[:, 0], logratios[:, 0], tokens, np.array(document), seed=config.seed
        )
    return _PolicyMetrics(preferred, samples, perplexity)


def _hashes(
    config: EvalConfig,
    folder: ModelFolder,
    held_out: HeldOutData,
    pairs: Sequence[TokenizedGroup],
    documents: Sequence[PromptGroup],
) -> dict[str, str]:
    """Hashes of what the numbers depend on, by the option that names it."""
    tokens = [[one.prompt.tolist(), *(c.tolist() for c in one.completions)] for one in pairs]
    hashes = {
        **fingerprint_adapters(config),
        "model": fingerprint_folder(folder.path),
        "data": hash_rows([*tokens, *(one.prompt for one in held_out.prompts)]),
    }
    if config.perplexity_data is not None:
        hashes["perplexity_data"] = hash_rows(str(one.completions[0]) for one in documents)
    if config.reward_model is not None:
        hashes["reward_model"] = fingerprint_reward_model(
            find_reward_model(config.reward_model, folder), folder
        )
    return hashes


def _tokenize_pairs(
    held_out: HeldOutData, folder: ModelFolder, limits: TrainConfig, max_length: int
) -> list[TokenizedGroup]:
    if not held_out.pairs:
        return []
    return tokenize_groups(
        held_out.pairs,
        folder.tokenizer,
        max_seq_length=max_length,
        max_completion_length=limits.max_completion_length,
        thinking=limits.thinking,
    )[0]


def _beta(run: TrainedRun) -> float:
    return 1.0 if run.beta is None else run.beta


def _free_memory() -> None:
    """Free the memory of models that are no longer referenced."""
    gc.collect()
    mx.clear_cache()


def _lengths(sampled: Sequence[Sequence[Generated]]) -> Floats:
    return np.array([[len(one.tokens) for one in group] for group in sampled], np.float64)


def _as_completion(prompt: EvalPrompt, text: str) -> Text:
    return text if isinstance(prompt.text.prompt, str) else (Message("assistant", text),)


def _sample_rows(
    prompts: Sequence[EvalPrompt],
    samples: Samples,
    scores: Floats,
    reference_scores: Floats | None,
) -> list[dict[str, Any]]:
    rows = []
    for i, prompt in enumerate(prompts):
        text = prompt.text.prompt
        row = {
            "source": prompt.text.source,
            "prompt": text if isinstance(text, str) else [asdict(turn) for turn in text],
            "policy": _with_scores(samples.policy[i], scores[i]),
        }
        if samples.reference is not None and reference_scores is not None:
            row["reference"] = _with_scores(samples.reference[i], reference_scores[i])
        rows.append(row)
    return rows


def _with_scores(texts: list[str], scores: Floats) -> list[dict[str, Any]]:
    return [
        {"text": text, "score": float(score) if np.isfinite(score) else None}
        for text, score in zip(texts, scores, strict=True)
    ]


def _describe_reference(run: TrainedRun) -> str:
    if run.config is not None and run.config.init_adapter is not None:
        return f"the adapter the run started from, {run.config.init_adapter}"
    return "the base model"


def _warnings(
    config: EvalConfig, run: TrainedRun, folder: ModelFolder, samples: Samples, prompts: int
) -> tuple[str, ...]:
    found = []
    named = None if run.config is None or run.base is None else Path(run.base).expanduser()
    if named is not None and named.resolve() != folder.path.resolve():
        found.append(f"the run was trained on {run.base}: does --model have the same weights?")
    if samples.truncated > 0.1:
        found.append(
            f"{samples.truncated:.0%} of the policy's answers were cut off at "
            f"--max-completion-length {config.max_completion_length}: they are scored unfinished"
        )
    if prompts < 30:
        found.append(f"{prompts} prompts are few: intervals from so few are too narrow")
    return tuple(found)
