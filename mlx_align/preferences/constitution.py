"""Constitutional AI: critiques and revisions by principles, then comparisons by principles.

For each prompt, a model answers, criticises its answer by a principle that is drawn at random, and
revises it; possibly several times. The last revisions are demonstrations for `sft`. Then a judge
compares the prompt's answers, each pair by a principle drawn at random, which gives pairs for
`dpo` and `reward`. Every step is kept in a log, and looked up there when the command is given
again.

Source: Bai et al. 2022, "Constitutional AI: Harmlessness from AI Feedback", sections 3.1 and 4.1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from mlx_align.data.judgements import AnswerPair
from mlx_align.data.messages import text_as_json
from mlx_align.data.provenance import PROVENANCE
from mlx_align.preferences.principles import Principle
from mlx_align.preferences.writers import Writer, Written
from mlx_align.system.keyed_log import KeyedLog, hash_key
from mlx_align.system.progress import Console
from mlx_align.types import Message, PromptGroup

# Conversations that are continued before their texts are written to the log.
AT_ONCE = 16
# Fields of a row in the log of steps.
STEP_FIELDS = ("stage", "text", "problem")


@dataclass(frozen=True)
class RevisionSettings:
    """How answers are sampled and revised.

    Attributes:
        answers: Answers per prompt; the first is revised.
        rounds: Critiques and revisions of an answer, one after another.
        max_tokens: Longest text, tokens.
        temperature: Sampling temperature.
        seed: Random seed of texts and principles.
    """

    answers: int
    rounds: int
    max_tokens: int
    temperature: float
    seed: int


@dataclass
class RevisedPrompt:
    """A prompt with what was written about it.

    Attributes:
        group: The prompt.
        answers: The sampled answers.
        principles: The principle of each round.
        critiques: The critique of each round.
        revisions: The revised answer of each round.
        problem: Why it has no usable revision, such as a truncated one; empty if it has one.
    """

    group: PromptGroup
    answers: list[Written] = field(default_factory=list)
    principles: list[Principle] = field(default_factory=list)
    critiques: list[str] = field(default_factory=list)
    revisions: list[str] = field(default_factory=list)
    problem: str = ""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The prompt as messages."""
        prompt = self.group.prompt
        return (Message("user", prompt),) if isinstance(prompt, str) else prompt

    @property
    def latest(self) -> str:
        """The last revision, or the first answer."""
        return self.revisions[-1] if self.revisions else self.answers[0].text

    @property
    def changed(self) -> bool:
        """Whether the last revision has other words than the first answer."""
        return self.latest.split() != self.answers[0].text.split()


class Reviser:
    """Answers prompts and revises the answers, with every step in a log.

    Args:
        writer: Writes answers, critiques and revisions.
        identity: What determines its texts, for the log.
        principles: The principles.
        settings: How to sample.
        log: The steps so far.
    """

    def __init__(
        self,
        writer: Writer,
        identity: str,
        principles: Sequence[Principle],
        settings: RevisionSettings,
        log: KeyedLog,
    ) -> None:
        self._writer, self._identity, self._principles = writer, identity, principles
        self._settings, self._log = settings, log

    def revise(
        self, groups: Sequence[PromptGroup], console: Console, label: str = "Revising"
    ) -> list[RevisedPrompt]:
        """Answer and revise every prompt; without rounds, only answer.

        Raises:
            MlxAlignError: The writer can't be used any longer; the steps so far are in the log.
        """
        settings = self._settings
        steps = settings.answers + 2 * settings.rounds
        found: list[RevisedPrompt] = []
        with console.bar(label, len(groups) * steps) as bar:
            for start in range(0, len(groups), AT_ONCE):
                part = [RevisedPrompt(group) for group in groups[start : start + AT_ONCE]]
                for k in range(settings.answers):
                    texts = self._write([(one, one.prompt) for one in part], f"answer {k}", start)
                    for one, text in zip(part, texts, strict=True):
                        one.answers.append(text)
                    bar.advance(len(part))
                for one in part:
                    one.problem = one.answers[0].problem
                for k in range(settings.rounds):
                    self._revise_once(part, k, start)
                    bar.advance(2 * len(part))
                found += part
        return found

    def _revise_once(self, part: Sequence[RevisedPrompt], k: int, start: int) -> None:
        """Round k of the prompts without a problem: a critique of the latest answer, a revision."""
        usable = [one for one in part if not one.problem]
        for one in usable:
            one.principles.append(self._draw(one, k))
        asks = [
            (one, (*one.prompt, _assistant(one.latest), _user(one.principles[-1].critique)))
            for one in usable
        ]
        critiques = self._write(asks, f"critique {k}", start)
        for one, critique in zip(usable, critiques, strict=True):
            # A truncated critique still says something; a truncated answer is not kept.
            one.critiques.append(critique.text)
            one.problem = "" if critique.text else f"critique: {critique.problem}"
        ready = [
            (one, conversation) for one, (_, conversation) in zip(usable, asks, strict=True)
            if not one.problem
        ]  # fmt: skip
        revisions = self._write(
            [
                (
                    one,
                    (
                        *conversation,
                        _assistant(one.critiques[-1]),
                        _user(f"{one.principles[-1].revision} Reply with the new answer only."),
                    ),
                )
                for one, conversation in ready
            ],
            f"revision {k}",
            start,
        )
        for (one, _), revision in zip(ready, revisions, strict=True):
            if revision.problem:
                one.problem = f"revision: {revision.problem}"
            else:
                one.revisions.append(revision.text)

    def _draw(self, one: RevisedPrompt, k: int) -> Principle:
        """The principle of round k: drawn by seed and prompt, without repetition while possible."""
        key = hash_key(text_as_json(one.group.prompt), self._settings.seed)
        order = np.random.default_rng(int(key[:15], 16)).permutation(len(self._principles))
        return self._principles[int(order[k % len(order)])]

    def _write(
        self, asks: Sequence[tuple[RevisedPrompt, tuple[Message, ...]]], stage: str, start: int
    ) -> list[Written]:
        """The next turn of each conversation, from the log or written now."""
        settings = self._settings
        about = [self._identity, settings.max_tokens, settings.temperature, settings.seed, stage]
        keys = [hash_key(about, text_as_json(turns)) for _, turns in asks]
        waiting = [i for i, key in enumerate(keys) if self._log.get(key) is None]
        if waiting:
            entropy = np.random.SeedSequence((settings.seed, start, *stage.encode()))
            texts = self._writer.write(
                [asks[i][1] for i in waiting],
                max_tokens=settings.max_tokens,
                temperature=settings.temperature,
                seed=int(entropy.generate_state(1, np.uint32)[0] >> 1),
            )
            rows = []
            for i, written in zip(waiting, texts, strict=True):
                one, turns = asks[i]
                row = {"key": keys[i], "source": one.group.source, "stage": stage}
                if not stage.startswith("answer"):
                    row["principle"] = one.principles[-1].name
                row |= {"request": turns[-1].content, **written._asdict()}
                rows.append(row)
            self._log.add(rows)
        found = [self._log.get(key) for key in keys]
        return [Written(row["text"], row["problem"]) for row in found if row is not None]


def _user(text: str) -> Message:
    return Message("user", text)


def _assistant(text: str) -> Message:
    return Message("assistant", text)


def revision_rows(
    revised: Sequence[RevisedPrompt], provenance: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Demonstrations for `sft`: the last revision of every prompt that has one."""
    return [
        {
            "prompt": text_as_json(one.prompt),
            "completion": text_as_json((_assistant(one.latest),)),
            "changed": one.changed,
            "principles": [principle.name for principle in one.principles],
            PROVENANCE: dict(provenance),
        }
        for one in revised
        if not one.problem
    ]


def candidate_pairs(
    revised: Sequence[RevisedPrompt], principles: Sequence[Principle], writer: str, seed: int
) -> list[AnswerPair]:
    """Every two different answers of a prompt, revision included, with a principle to compare by.

    Order and principle are drawn at random.
    """
    draw = np.random.default_rng((seed, 1))
    found = []
    for one in revised:
        texts = [answer.text for answer in one.answers if not answer.problem]
        if not one.problem and one.revisions:
            texts.append(one.latest)
        texts = list(dict.fromkeys(texts))
        for i, j in combinations(range(len(texts)), 2):
            first, second = (i, j) if draw.random() < 0.5 else (j, i)
            principle = principles[int(draw.integers(len(principles)))]
            a, b = ((_assistant(texts[k]),) for k in (first, second))
            found.append(
                AnswerPair(
                    one.prompt,
                    a,
                    b,
                    one.group.source,
                    (writer, writer),
                    {"principle": principle.name},
                    criteria={principle.name: principle.comparison},
                )
            )
    return found


@dataclass(frozen=True)
class RevisionReport:
    """What came of the revisions.

    Attributes:
        prompts: Number of prompts.
        revised: Prompts with a usable revision.
        changed: Revisions that have other words than the first answer.
        problems: Prompts without a usable revision, by reason.
        words: Mean words of first answers and of last revisions.
        by_principle: Revised prompts whose last principle this was, and the share that changed.
    """

    prompts: int
    revised: int
    changed: int
    problems: Mapping[str, int]
    words: tuple[float, float]
    by_principle: Mapping[str, tuple[int, float]]

    @property
    def share_changed(self) -> float:
        """Share of the revised answers that changed."""
        return self.changed / self.revised if self.revised else 0.0


def report_revisions(revised: Sequence[RevisedPrompt]) -> RevisionReport:
    """Count what changed."""
    usable = [one for one in revised if not one.problem and one.revisions]
    by_name: dict[str, list[bool]] = {}
    for one in usable:
        by_name.setdefault(one.principles[-1].name, []).append(one.changed)
    before = [len(one.answers[0].text.split()) for one in usable]
    after = [len(one.latest.split()) for one in usable]
    return RevisionReport(
        prompts=len(revised),
        revised=len(usable),
        changed=sum(one.changed for one in usable),
        problems=dict(Counter(one.problem for one in revised if one.problem)),
        words=(float(np.mean(before or [0])), float(np.mean(after or [0]))),
        by_principle={
            name: (len(flags), float(np.mean(flags))) for name, flags in sorted(by_name.items())
        },
    )


def render_samples(revised: Sequence[RevisedPrompt], count: int, seed: int) -> str:
    """Samples to read, as Markdown: prompts with every step in full, drawn at random."""
    usable = [one for one in revised if one.revisions]
    draw = np.random.default_rng((seed, 2))
    picked = sorted(draw.permutation(len(usable))[:count].tolist())
    return "\n".join(line for index in picked for line in _sample_lines(usable[index]))


def _sample_lines(one: RevisedPrompt) -> Iterator[str]:
    yield f"# {one.group.source}\n"
    yield f"**Prompt**\n\n{_quote(one.prompt[-1].content)}\n"
    yield f"**Answer**\n\n{_quote(one.answers[0].text)}\n"
    steps = zip(one.principles, one.critiques, one.revisions, strict=False)
    for principle, critique, revision in steps:
        yield f"**Critique** ({principle.name}: {principle.critique})\n\n{_quote(critique)}\n"
        yield f"**Revision** ({principle.revision})\n\n{_quote(revision)}\n"
    yield f"{'Changed' if one.changed else 'Not changed'}.\n"


def _quote(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines() or [""])
