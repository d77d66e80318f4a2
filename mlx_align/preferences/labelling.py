"""A labelling session: which pair a rater sees next, in which order, and what becomes of a verdict.

The terminal (`label_terminal`) and the browser (`label_web`) show the same session. All raters get
the pairs in the same order, so that those who stop early have judged the same pairs. Which answer
is shown first is drawn for each rater and pair, and is the same again after a restart.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from mlx_align.data.judgements import AnswerPair, Judgement, Side, Winner
from mlx_align.errors import ConfigError
from mlx_align.preferences.records import JudgementLog
from mlx_align.types import Text

# Keys of a rater, and what they say about the answers on the screen.
CHOICES: Mapping[str, str] = {
    "1": "the first is better",
    "2": "the second is better",
    "=": "both are equally good",
    "?": "can't tell",
    "s": "skip; it comes again at the end",
}
# Keys that are verdicts on a criterion.
CRITERION_CHOICES = ("1", "2", "=")
LONGEST_NAME = 80


@dataclass(frozen=True, slots=True)
class Task:
    """A pair as a rater sees it.

    Attributes:
        pair: The pair.
        shown_first: The answer on the left or on top.
    """

    pair: AnswerPair
    shown_first: Side

    @property
    def answers(self) -> tuple[Text, Text]:
        """The answers in the order in which they are shown."""
        a, b = self.pair.a, self.pair.b
        return (a, b) if self.shown_first == "a" else (b, a)

    def winner(self, choice: str) -> Winner:
        """The verdict that a key of `CHOICES` means."""
        other: Side = "b" if self.shown_first == "a" else "a"
        meaning: dict[str, Winner] = {
            "1": self.shown_first,
            "2": other,
            "=": "tie",
            "?": "unsure",
            "s": "skip",
        }
        return meaning[choice]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rater has come.

    Attributes:
        done: Pairs with a verdict, unsure ones included.
        total: All pairs.
        skipped: Pairs left for later.
    """

    done: int
    total: int
    skipped: int


class LabelSession:
    """Pairs, their judgements, and what comes next for each rater. Safe to use from threads.

    Args:
        pairs: The pairs, in the order in which they are shown.
        log: The file of judgements; pairs that a rater has judged in it aren't shown again.
        criteria: Descriptions of the rubric's criteria by name.
        by_criterion: Whether a verdict on each criterion is required.
        seed: Draws the order of the answers.
    """

    def __init__(
        self,
        pairs: Sequence[AnswerPair],
        log: JudgementLog,
        criteria: Mapping[str, str],
        *,
        by_criterion: bool = False,
        seed: int = 0,
    ) -> None:
        self.pairs = list({pair.id: pair for pair in pairs}.values())
        self.criteria = dict(criteria)
        self.by_criterion = by_criterion
        self._by_id = {pair.id: pair for pair in self.pairs}
        self._log = log
        self._seed = seed
        self._lock = threading.RLock()
        self._shown: dict[tuple[str, str], float] = {}
        self._skips: Counter[tuple[str, str]] = Counter()

    def next(self, rater: str) -> Task | None:
        """The pair to judge next; None if the rater is through.

        Pairs that were skipped come last. A pair that is skipped twice waits for the next session.
        """
        with self._lock:
            judged = self._log.by(rater)
            waiting = [pair for pair in self.pairs if pair.id not in judged]
            skipped = [
                pair
                for pair in self.pairs
                if pair.id in judged
                and judged[pair.id].winner == "skip"
                and self._skips[rater, pair.id] < 2
            ]
            for pair in (*waiting, *sorted(skipped, key=lambda one: judged[one.id].time)):
                self._shown.setdefault((rater, pair.id), time.monotonic())
                return self.task(rater, pair.id)
            return None

    def task(self, rater: str, pair_id: str) -> Task:
        """A pair as this rater sees it.

        Raises:
            ConfigError: There is no such pair.
        """
        pair = self._by_id.get(pair_id)
        if pair is None:
            raise ConfigError(f"pair {pair_id[:40]!r}: unknown; reload the page")
        key = f"{self._seed}\0{rater}\0{pair_id}".encode("utf-8", "replace")
        odd = hashlib.blake2b(key, digest_size=1).digest()[0] & 1
        return Task(pair, "b" if odd else "a")

    def judge(
        self,
        rater: str,
        pair_id: str,
        choice: str,
        criteria: Mapping[str, str] | None = None,
        note: str = "",
    ) -> Judgement:
        """Write a rater's verdict to the file.

        Args:
            rater: The rater.
            pair_id: The pair.
            choice: A key of `CHOICES`, about the answers as they are shown.
            criteria: One of `CRITERION_CHOICES` for each criterion that the rater judged.
            note: The rater's note.

        Raises:
            ConfigError: The verdict isn't one, or lacks a criterion.
            WriteError: The file can't be written.
        """
        with self._lock:
            task = self.task(rater, pair_id)
            given = {name: one for name, one in (criteria or {}).items() if one}
            if choice not in CHOICES:
                raise ConfigError(f"{choice[:20]!r}: expected one of {' '.join(CHOICES)}")
            for name, one in given.items():
                if name not in self.criteria or one not in CRITERION_CHOICES:
                    raise ConfigError(
                        f"criterion {name[:40]!r}: expected {' '.join(CRITERION_CHOICES)} for one "
                        f"of {', '.join(self.criteria)}"
                    )
            if (
                self.by_criterion
                and choice in CRITERION_CHOICES
                and set(given) < set(self.criteria)
            ):
                lacking = next(name for name in self.criteria if name not in given)
                raise ConfigError(f"--by-criterion: no verdict on {lacking!r}; give one first")
            shown = self._shown.pop((rater, pair_id), None)
            if choice == "s":
                self._skips[rater, pair_id] += 1
            judgement = Judgement(
                task.pair,
                task.winner(choice),
                rater,
                time=_now(),
                seconds=None if shown is None else round(time.monotonic() - shown, 2),
                shown_first=task.shown_first,
                criteria={
                    name: task.winner(given[name]) if name in given else None
                    for name in self.criteria
                },
                note=note.strip(),
            )
            self._log.add(judgement)
            return judgement

    def undo(self, rater: str) -> AnswerPair | None:
        """Take the rater's last verdict back; its pair comes next. None without a verdict."""
        with self._lock:
            judged = [one for one in self._log.by(rater).values() if one.pair.id in self._by_id]
            if not judged:
                return None
            last = judged[-1]
            self._log.add(
                replace(last, winner="undone", time=_now(), seconds=None, criteria={}, note="")
            )
            self._skips.pop((rater, last.pair.id), None)
            # First in the order, so that it is shown at once.
            pair = self._by_id[last.pair.id]
            self.pairs = [pair, *(one for one in self.pairs if one.id != pair.id)]
            return pair

    def progress(self, rater: str) -> Progress:
        """How far a rater has come."""
        with self._lock:
            judged = [one.winner for key, one in self._log.by(rater).items() if key in self._by_id]
            skipped = judged.count("skip")
            return Progress(len(judged) - skipped, len(self.pairs), skipped)


def check_rater(name: Any) -> str:
    """A rater's name without spaces around it.

    Raises:
        ConfigError: It is empty, too long, or no text.
    """
    text = name.strip() if isinstance(name, str) else ""
    if not text or len(text) > LONGEST_NAME or not text.isprintable():
        raise ConfigError(f"rater: expected a name of 1 to {LONGEST_NAME} characters")
    return text


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
