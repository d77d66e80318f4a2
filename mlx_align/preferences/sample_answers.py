"""Sample answers to prompts by several arms, resumable, and write them one line per prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlx_align.data.chat_template import Thinking
from mlx_align.data.messages import text_as_json
from mlx_align.data.tokenization import tokenize_prompts
from mlx_align.errors import DataError
from mlx_align.inference.trained_run import match_adapter_dtype, read_trained_run
from mlx_align.models.loading import ModelFolder, load_adapters, open_model
from mlx_align.models.row_limits import check_rows
from mlx_align.preferences.arms import Arm
from mlx_align.preferences.records import Answers
from mlx_align.rollout.sampler import Prompt, sample_completions
from mlx_align.system.atomic_io import open_atomic
from mlx_align.system.json_text import to_json
from mlx_align.system.keyed_log import KeyedLog, hash_key
from mlx_align.system.progress import Console
from mlx_align.system.starter import resolve_starter
from mlx_align.types import Message, PromptGroup, Text, TokenizedGroup

# Prompts whose answers are sampled together.
PROMPTS_PER_BATCH = 16


@dataclass(frozen=True)
class SamplingOptions:
    """What all arms have in common.

    Attributes:
        max_prompt_length: Longest prompt, tokens; longer ones get no answer.
        max_tokens: Longest answer, tokens.
        thinking: Thinking of the chat template.
        seed: Random seed.
    """

    max_prompt_length: int
    max_tokens: int
    thinking: Thinking
    seed: int


@dataclass(frozen=True)
class SampledAnswers:
    """What became of the prompts.

    Attributes:
        lines: Prompts with answers.
        answers: Answers.
        empty: Empty answers, left out.
        duplicates: Answers equal to an earlier one of the same prompt, left out.
        dropped: Prompts without an answer of some arm, by reason.
    """

    lines: int
    answers: int
    empty: int
    duplicates: int
    dropped: dict[str, int]


def sample_answers(
    prompts: Sequence[PromptGroup],
    arms: Sequence[Arm],
    options: SamplingOptions,
    output: Path,
    console: Console,
) -> SampledAnswers:
    """Sample answers and write a file of them.

    What is sampled is kept in a file next to the output until all is done; after an interruption
    the same call continues there. A model is loaded once for all of its arms.

    Args:
        prompts: The prompts.
        arms: The arms.
        options: What they have in common.
        output: The file of answers to write.
        console: For progress and notes.

    Raises:
        ModelError: A model or adapter can't be used.
        DataError: No prompt has an answer.
        WriteError: A file can't be written.
    """
    log = KeyedLog(partial_file(output), ("texts",))
    found: list[dict[int, list[str]]] = [{} for _ in arms]
    dropped: Counter[str] = Counter()
    for model in dict.fromkeys(arm.model for arm in arms):
        own = [i for i, arm in enumerate(arms) if arm.model == model]
        folder = open_model(resolve_starter(model, "model"))
        sampler = _ArmSampler(folder, [arms[i] for i in own], options, log, console)
        for place, i in enumerate(own):
            found[i] = sampler.sample(place, prompts, dropped)
    empty = duplicates = answers = 0
    lines = []
    for index, group in enumerate(prompts):
        texts: dict[str, Arm] = {}
        for arm, by_prompt in zip(arms, found, strict=True):
            for text in by_prompt.get(index, ()):
                if not text.strip():
                    empty += 1
                elif text in texts:
                    duplicates += 1
                else:
                    texts[text] = arm
        if texts:
            answers += len(texts)
            models = [arm.author for arm in texts.values()]
            names = [arm.name for arm in texts.values()]
            lines.append(Answers(group.prompt, list(texts), models, names, _columns(group)))
    if not lines:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise DataError(f"no answers: {reasons or 'all of them are empty'}")
    with open_atomic(output) as stream:
        for line in lines:
            stream.write(to_json(line.to_dict(), ascii=False) + "\n")
    log.file.unlink(missing_ok=True)
    return SampledAnswers(len(lines), answers, empty, duplicates, dict(dropped))


def partial_file(output: Path) -> Path:
    """The file that keeps what is sampled so far."""
    return output.with_name(f"{output.stem}.partial.jsonl")


class _ArmSampler:
    """Samples the arms of one model, whose weights they share."""

    def __init__(
        self,
        folder: ModelFolder,
        arms: Sequence[Arm],
        options: SamplingOptions,
        log: KeyedLog,
        console: Console,
    ) -> None:
        self._folder, self._arms, self._options = folder, arms, options
        self._log, self._console = log, console
        runs = [arm.adapter_path and read_trained_run(arm.adapter_path) for arm in arms]
        model, self._weights = load_adapters(folder, [run.folder if run else None for run in runs])
        self._models = [match_adapter_dtype(model, run) if run else model for run in runs]

    def sample(
        self, place: int, prompts: Sequence[PromptGroup], dropped: Counter[str]
    ) -> dict[int, list[str]]:
        """The answers of an arm, by index of the prompt."""
        arm, options = self._arms[place], self._options
        groups = [
            replace(one, prompt=with_system_prompt(one.prompt, arm.system)) for one in prompts
        ]
        tokens, report = tokenize_prompts(
            groups, self._folder.tokenizer, options.max_prompt_length, options.thinking
        )
        dropped.update(report.dropped)
        remarks = check_rows(
            self._folder,
            tokens,
            options.max_tokens,
            source="the longest prompt with --max-completion-length",
        )
        for note in dict.fromkeys((*report.notes, *remarks)):
            self._console.note(f"! {arm.name}: {note}")
        rows = list(zip(report.indices, tokens, strict=True))
        batches = [rows[k : k + PROMPTS_PER_BATCH] for k in range(0, len(rows), PROMPTS_PER_BATCH)]
        keys = [self._key(arm, [groups[i] for i, _ in batch]) for batch in batches]
        ready = sum(
            len(batch)
            for batch, key in zip(batches, keys, strict=True)
            if self._log.get(key) is not None
        )
        found: dict[int, list[str]] = {}
        with self._console.bar(f"Sampling {arm.name}", len(rows), ready) as bar:
            for batch, key in zip(batches, keys, strict=True):
                kept = self._log.get(key)
                if kept is None:
                    kept = {"key": key, "arm": arm.name, "texts": self._texts(place, groups, batch)}
                    self._log.add([kept])
                    bar.advance(len(batch))
                for (i, _), texts in zip(batch, kept["texts"], strict=True):
                    found[int(i)] = [str(text) for text in texts]
        return found

    def _key(self, arm: Arm, groups: Sequence[PromptGroup]) -> str:
        options = self._options
        common = [options.max_tokens, options.thinking, options.seed, str(self._folder.path)]
        about = [arm.name, arm.author, arm.system, arm.temperature, arm.n]
        return hash_key(*common, *about, [text_as_json(group.prompt) for group in groups])

    def _texts(
        self, place: int, groups: Sequence[PromptGroup], batch: Sequence[tuple[int, TokenizedGroup]]
    ) -> list[list[str]]:
        arm, options = self._arms[place], self._options
        # Arms differ although they have the same seed; so do the batches of an arm.
        name = int(hash_key(arm.name, arm.author)[:8], 16)
        entropy = np.random.SeedSequence((options.seed, name, int(batch[0][0])))
        completions = sample_completions(
            self._models[place],
            self._weights[place],
            [Prompt(groups[i], one) for i, one in batch],
            group_size=arm.n,
            max_tokens=options.max_tokens,
            temperature=arm.temperature,
            seed=int(entropy.generate_state(1, np.uint64)[0]),
        )
        texts = list(completions.texts)
        return [texts[k : k + arm.n] for k in range(0, len(texts), arm.n)]


def with_system_prompt(prompt: Text, system: str | None) -> Text:
    """The prompt with this system prompt and no other; None leaves it as it is."""
    if system is None:
        return prompt
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return (Message("system", system), *(turn for turn in turns if turn.role != "system"))


def _columns(group: PromptGroup) -> dict[str, object]:
    """The other columns of a prompt's row, without those that would make another format of it."""
    reserved = {"prompt", "completions", "models", "arms", "chosen", "rejected", "completion"}
    reserved |= {"responses", "answers", "label", "messages", "conversations", "scores", "ratings"}
    columns: dict[str, object] = {k: v for k, v in group.columns.items() if k not in reserved}
    if group.tools:
        columns["tools"] = list(group.tools)
    return columns
