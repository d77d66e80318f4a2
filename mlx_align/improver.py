"""`mlx-align improve`: rounds of sampling, comparing, training and evaluation (iterated DPO).

Each round starts from the policy of the last one, which is also the reference. A guard stops when a
held-out judge no longer prefers the new policy. Every step of a round writes a file when it is
done, so the same command continues after an interruption.

Source: Xiong et al. 2024, "Iterative Preference Learning from Human Feedback"; the guard is against
over-optimisation of the judge that labels (Gao et al. 2023).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_align.config import ImproveConfig, JudgeConfig
from mlx_align.config.schema import flag_of
from mlx_align.data.columns import configure_data
from mlx_align.data.formats import read_prompts
from mlx_align.data.judgements import AnswerPair
from mlx_align.data.messages import text_as_json
from mlx_align.data.provenance import check_circularity
from mlx_align.data.readers import DataSource, has_split
from mlx_align.data.transforms import split_validation
from mlx_align.errors import ConfigError, DataError
from mlx_align.evaluation.statistics import mean_estimate, wins
from mlx_align.models.loading import resolve_model_path
from mlx_align.preferences.ai_feedback import (
    VERDICT_FIELDS,
    Feedback,
    both_orders,
)
from mlx_align.preferences.constitution import (
    STEP_FIELDS,
    RevisedPrompt,
    Reviser,
    RevisionSettings,
)
from mlx_align.preferences.judge_statistics import average_orders
from mlx_align.preferences.lineage import model_lineage
from mlx_align.preferences.rubric import read_rubric
from mlx_align.preferences.run_judge import JudgeSpec, judge_data, open_judge
from mlx_align.preferences.writers import ModelWriter
from mlx_align.rollout.reward_functions import RewardSource
from mlx_align.system.atomic_io import open_atomic, wrap_write_errors, write_text
from mlx_align.system.intervals import Estimate, wilson_interval
from mlx_align.system.json_text import to_json
from mlx_align.system.keyed_log import KeyedLog
from mlx_align.system.progress import Console
from mlx_align.system.starter import resolve_starter
from mlx_align.types import Message, PromptGroup

ANSWERS, JUDGED, LABELS, RUN, EVALUATION = (
    "answers.jsonl", "judged.jsonl", "labels.jsonl", "run", "evaluation.json",
)  # fmt: skip
TEXTS, VERDICTS, SETTINGS, SUMMARY = (
    "texts.jsonl", "verdicts.jsonl", "settings.json", "improve.json",
)  # fmt: skip
# Options that a continued command may change: they don't affect the rounds that are done.
_MAY_CHANGE = frozenset({"rounds", "output", "guard"})


@dataclass(frozen=True)
class Round:
    """The result of one round.

    Attributes:
        number: 1 for the first.
        run: Run folder of the training.
        pairs: Pairs that it was trained on.
        win_rate: Share of held-out prompts on which the held-out judge prefers the new policy's
            answer to that of the policy at the start; ties count ½.
        gain: The difference of that rate from the best earlier round (from ½ in the first), on the
            same prompts.
        words: Mean words of the answers at the start and now.
        invalid: Held-out prompts without a valid verdict.
    """

    number: int
    run: Path
    pairs: int
    win_rate: Estimate
    gain: Estimate
    words: tuple[float, float]
    invalid: int

    def as_json(self) -> dict[str, Any]:
        """As JSON-serialisable values."""
        return {**asdict(self), "run": str(self.run)}


@dataclass(frozen=True)
class ImproveOutcome:
    """The result of `mlx-align improve`.

    Attributes:
        rounds: The rounds that are done.
        best: The round with the highest win rate; None if none beats the start.
        stopped: Why no further round is run.
    """

    rounds: Sequence[Round]
    best: Round | None
    stopped: str

    def as_json(self) -> dict[str, Any]:
        """As JSON-serialisable values."""
        return {
            "rounds": [one.as_json() for one in self.rounds],
            "best_round": None if self.best is None else self.best.number,
            "best_adapter": None if self.best is None else str(self.best.run),
            "stopped": self.stopped,
        }


class WaitingForLabels(Exception):
    """The round waits for people's labels; the text says what to do."""


class Improver:
    """Runs the rounds in one folder.

    Args:
        config: The options.
        console: Shows notes and progress.
        data: Opened prompts, instead of those that the options name.
        rewards: Python functions in addition to the option `reward`.
        eval_rewards: Python functions in addition to the option `eval_reward`.

    Raises:
        MlxAlignError: The options are wrong, or the prompts can't be read.
    """

    def __init__(
        self,
        config: ImproveConfig,
        console: Console,
        *,
        data: DataSource | None = None,
        rewards: Sequence[RewardSource] = (),
        eval_rewards: Sequence[RewardSource] = (),
    ) -> None:
        self._config, self._console, self._data = config, console, data
        self._rewards = rewards
        if config.labels_by == "people" and rewards:
            raise ConfigError("--reward: has no effect with --labels-by people; drop one")
        self._judge = _spec(config, "judge", rewards)
        held_out = _spec(config, "eval", eval_rewards)
        assert held_out is not None
        self._eval_judge = held_out
        _check_options(config, self._judge, self._eval_judge)
        self._model = resolve_starter(config.model, "model")
        self._train, self._held_out = self._read_prompts()
        self._folder = _open_folder(config)
        self._texts = KeyedLog(self._folder / TEXTS, STEP_FIELDS)
        self._verdicts = KeyedLog(self._folder / VERDICTS, VERDICT_FIELDS)
        self._outcomes: dict[int, np.ndarray[Any, Any]] = {}

    def run(self) -> ImproveOutcome:
        """Run all rounds, or continue.

        Raises:
            MlxAlignError: A step failed; those before it are kept.
            WaitingForLabels: A round waits for people's labels.
            Interrupted: A signal stopped training, after a checkpoint.
        """
        config = self._config
        self._check_circularity()
        adapter = None if config.init_adapter is None else Path(config.init_adapter).expanduser()
        rounds: list[Round] = []
        stopped = f"all {config.rounds} rounds are done"
        for number in range(1, config.rounds + 1):
            self._console.note(f"\nRound {number} of {config.rounds}")
            folder = self._folder / f"round-{number}"
            with wrap_write_errors(folder):
                folder.mkdir(exist_ok=True)
            labels = self._label(number, folder, adapter)
            run, pairs = self._train_round(folder, labels, adapter)
            found = self._evaluate(number, run, pairs, rounds)
            write_text(folder / EVALUATION, to_json(found.as_json(), indent=2) + "\n")
            rounds.append(found)
            self._console.note(describe_round(found))
            adapter = run
            if config.guard and found.gain.value <= 0 and number < config.rounds:
                stopped = f"the held-out judge prefers round {number} no more than what was before"
                break
        best = max(rounds, key=lambda one: one.win_rate.value)
        outcome = ImproveOutcome(rounds, best if best.win_rate.value > 0.5 else None, stopped)
        write_text(self._folder / SUMMARY, to_json(outcome.as_json(), indent=2) + "\n")
        return outcome

    def _read_prompts(self) -> tuple[list[PromptGroup], list[PromptGroup]]:
        config = self._config
        given = resolve_starter(config.data, "data") if self._data is None else self._data
        data = configure_data(given, config)
        train, reading = read_prompts(data, "train", config.format)
        if has_split(data, "valid"):
            held_out, _ = read_prompts(data, "valid", config.format)
        else:
            train, held_out = split_validation(train, config.valid_fraction, config.seed)
        order = np.random.default_rng(config.seed).permutation(len(held_out))
        held_out = [held_out[int(i)] for i in sorted(order[: config.eval_prompts])]
        self._console.note(f"{reading}; {len(train):,} to train on, {len(held_out):,} held out")
        return train, held_out

    def _check_circularity(self) -> None:
        """Refuse a judge that is the policy before anything is sampled."""
        judge = self._judge
        if judge is None or judge.model is None or judge.url is not None:
            return
        config = self._config
        path = resolve_model_path(resolve_starter(judge.model, "model"))
        adapter = judge.adapter_path and Path(judge.adapter_path).expanduser()
        init = config.init_adapter and Path(config.init_adapter).expanduser()
        policy = model_lineage(resolve_model_path(self._model), init or None)
        found = check_circularity(
            policy, {judge.model: model_lineage(path, adapter or None)}, allow=config.allow_circular
        )
        if found:
            self._console.note(f"! Circular: {found}.")

    def _prompts_of(self, number: int) -> list[PromptGroup]:
        """The training prompts of a round."""
        size = self._config.prompts_per_round
        if size is None or size >= len(self._train):
            return self._train
        order = np.random.default_rng((self._config.seed, 3)).permutation(len(self._train))
        start = (number - 1) * size
        return [self._train[int(order[(start + k) % len(order)])] for k in range(size)]

    def _sample(
        self, prompts: Sequence[PromptGroup], adapter: Path | None, answers: int, label: str
    ) -> list[RevisedPrompt]:
        """Answers of a policy, from the log or sampled now."""
        config = self._config
        writer = _LazyWriter(self._model, adapter)
        lineage = model_lineage(resolve_model_path(self._model), adapter)
        settings = RevisionSettings(
            answers, 0, config.max_completion_length, config.temperature, config.seed
        )
        reviser = Reviser(writer, " ".join(lineage), (), settings, self._texts)
        found = reviser.revise(prompts, self._console, label)
        writer.close()
        return found

    def _label(self, number: int, folder: Path, adapter: Path | None) -> Path:
        """The file of the round's preferences: judged, or labelled by people."""
        config = self._config
        answers = folder / ANSWERS
        if not answers.exists():
            sampled = self._sample(self._prompts_of(number), adapter, config.answers, "Sampling")
            name = self._model if adapter is None else f"{self._model} + {adapter}"
            with open_atomic(answers) as stream:
                for one in sampled:
                    row = _answer_row(one, name)
                    if row is not None:
                        stream.write(to_json(row, ascii=False) + "\n")
            if not answers.stat().st_size:
                answers.unlink()
                raise DataError(
                    f"round {number}: no prompt has two different answers that end within "
                    f"{config.max_completion_length} tokens; raise --max-completion-length or "
                    "--temperature"
                )
        if config.labels_by == "people":
            labels = folder / LABELS
            if not labels.exists():
                raise WaitingForLabels(
                    f"Round {number} waits for labels. Compare the answers in {answers}, write the "
                    f"preferences to {labels}, and give the same command again."
                )
            return labels
        judged = folder / JUDGED
        if not judged.exists():
            assert self._judge is not None
            judge_options = JudgeConfig(
                data=str(answers),
                output=str(judged),
                model=self._judge.model,
                adapter_path=self._judge.adapter_path,
                reward_model=self._judge.reward_model,
                reward=config.reward,
                url=self._judge.url,
                api_key_variable=self._judge.api_key_variable,
                human=config.human,
                rubric=config.rubric,
                allow_unproven=config.allow_unproven,
                min_confidence=config.min_confidence,
                seed=config.seed,
            )
            judge_data(
                judge_options,
                judged,
                self._console,
                log_file=self._folder / VERDICTS,
                rewards=self._rewards,
            )
            self._verdicts = KeyedLog(self._folder / VERDICTS, VERDICT_FIELDS)
            mx.clear_cache()
        return judged

    def _train_round(self, folder: Path, labels: Path, adapter: Path | None) -> tuple[Path, int]:
        """Train on the preferences, or continue; the run folder and its number of pairs."""
        from mlx_align import commands
        from mlx_align.tracking.run_dir import CONFIG_FILE, read_run_record

        config, run = self._config, folder / RUN
        if (run / CONFIG_FILE).is_file() and read_run_record(run).finished:
            return run, _pairs_of(read_run_record(run).summary)
        if (run / CONFIG_FILE).is_file():
            _, summary = commands.train(
                "dpo", {}, self._console, resume=str(run), source="command line"
            )
            return run, _pairs_of(summary)
        options: dict[str, Any] = {
            "model": self._model,
            "data": str(labels),
            "output": str(run),
            "seed": config.seed,
            "allow_circular": config.allow_circular,
        }
        for name in ("iters", "learning_rate", "beta"):
            if getattr(config, name) is not None:
                options[name] = getattr(config, name)
        if adapter is not None:
            options["init_adapter"] = str(adapter)
        file = None if config.train_config is None else Path(config.train_config).expanduser()
        _, summary = commands.train("dpo", options, self._console, file=file, source="command line")
        mx.clear_cache()
        return run, _pairs_of(summary)

    def _evaluate(self, number: int, run: Path, pairs: int, earlier: Sequence[Round]) -> Round:
        """Compare the new policy's answers to held-out prompts with those at the start."""
        config = self._config
        init = None if config.init_adapter is None else Path(config.init_adapter).expanduser()
        start, new = (
            self._sample(self._held_out, adapter, 1, "Answering held-out prompts")
            for adapter in (init, run)
        )
        both = [
            AnswerPair(
                one.prompt,
                (Message("assistant", two.answers[0].text),),
                (Message("assistant", one.answers[0].text),),
                one.group.source,
                columns=one.group.columns,
            )
            for one, two in zip(start, new, strict=True)
        ]
        outcomes, invalid = self._compare(both)
        self._outcomes[number] = outcomes
        known = ~np.isnan(outcomes)
        if not known.any():
            raise DataError(
                "the held-out judge gave no valid verdict on any held-out prompt; use another"
            )
        best = max(earlier, key=lambda one: one.win_rate.value, default=None)
        before = np.full(len(outcomes), 0.5) if best is None else self._outcomes[best.number]
        rows = known & ~np.isnan(before)
        gain = mean_estimate((outcomes - before)[rows], np.flatnonzero(rows))
        words = [
            float(np.mean([len(one.answers[0].text.split()) for one in answers]))
            for answers in (start, new)
        ]
        rate = wilson_interval(float(outcomes[known].mean()), int(known.sum()))
        return Round(number, run, pairs, rate, gain, (words[0], words[1]), invalid)

    def _compare(self, pairs: Sequence[AnswerPair]) -> tuple[np.ndarray[Any, Any], int]:
        """(n,) 1 where the held-out judge prefers a, ½ for a tie, NaN without a valid verdict."""
        outcomes = np.full(len(pairs), np.nan)
        same = [pair.a == pair.b for pair in pairs]
        outcomes[same] = 0.5
        places = [i for i, equal in enumerate(same) if not equal]
        if not places:
            return outcomes, 0
        with open_judge(self._eval_judge) as opened:
            criteria = read_rubric(self._config.rubric)
            feedback = Feedback(
                opened.judge, f"held out: {opened.identity}", criteria, False, self._verdicts
            )
            judged = feedback.judge_pairs([pairs[i] for i in places], self._console, "Evaluating")
        mx.clear_cache()
        valid = [(i, one) for i, one in zip(places, judged, strict=True) if not one.invalid]
        if valid:
            odds = average_orders(both_orders([one for _, one in valid]))
            outcomes[[i for i, _ in valid]] = wins(odds, np.zeros_like(odds))
        return outcomes, len(places) - len(valid)


class _LazyWriter:
    """A writer that loads its model when it first writes: all texts may be in the log."""

    def __init__(self, model: str, adapter: Path | None) -> None:
        self.name = model if adapter is None else f"{model} + {adapter}"
        self._model, self._adapter = model, adapter
        self._writer: ModelWriter | None = None

    def write(self, conversations: Sequence[tuple[Message, ...]], **settings: Any) -> Any:
        """As `ModelWriter.write`."""
        if self._writer is None:
            adapter = None if self._adapter is None else str(self._adapter)
            self._writer = ModelWriter.load(self._model, adapter)
        return self._writer.write(conversations, **settings)

    def close(self) -> None:
        """Free the model's memory."""
        self._writer = None
        mx.clear_cache()


def _answer_row(one: RevisedPrompt, model: str) -> dict[str, Any] | None:
    """A row with the different answers that are whole; None with fewer than two."""
    texts = list(dict.fromkeys(answer.text for answer in one.answers if not answer.problem))
    if len(texts) < 2:
        return None
    return {
        **{name: value for name, value in one.group.columns.items() if name not in _RESERVED},
        "prompt": text_as_json(one.prompt),
        "completions": texts,
        "models": [model] * len(texts),
    }


# Columns that would make a reader detect another format.
_RESERVED = frozenset(
    {"prompt", "completion", "completions", "chosen", "rejected", "messages", "conversations",
     "responses", "answers", "scores", "ratings", "rank", "ranks", "models", "question",
     "instruction", "input", "output", "text", "label"}
)  # fmt: skip


def _spec(
    config: ImproveConfig, which: str, rewards: Sequence[RewardSource] = ()
) -> JudgeSpec | None:
    """The judge that labels, or the held-out judge; None if people label."""
    if which == "judge":
        if config.labels_by == "people":
            return None
        return JudgeSpec(
            config.judge_model,
            config.judge_adapter_path,
            config.reward_model,
            (*(config.reward or ()), *rewards) or None,
            config.judge_url,
            config.api_key_variable if config.judge_url else None,
            prefix="--judge-",
            reward_prefix="--",
        )
    return JudgeSpec(
        model=config.eval_judge_model,
        reward_model=config.eval_reward_model,
        reward=(*(config.eval_reward or ()), *rewards) or None,
        url=config.eval_judge_url,
        api_key_variable=config.api_key_variable if config.eval_judge_url else None,
        prefix="--eval-judge-",
        reward_prefix="--eval-",
    )


def _check_options(config: ImproveConfig, judge: JudgeSpec | None, held_out: JudgeSpec) -> None:
    given = [
        name
        for name in ("judge_model", "judge_adapter_path", "judge_url", "reward_model", "reward",
                     "human")
        if getattr(config, name)
    ]  # fmt: skip
    if judge is None and given:
        raise ConfigError(f"{flag_of(given[0])}: has no effect with --labels-by people; drop one")
    if judge is not None:
        if not any((judge.model, judge.reward_model, judge.reward, judge.url)):
            raise ConfigError(
                "no judge; give --judge-model, --judge-url, --reward-model or --reward, or "
                "--labels-by people"
            )
        judge.check()
    kinds = (held_out.model, held_out.reward_model, held_out.reward, held_out.url)
    if not any(kinds):
        raise ConfigError(
            "no held-out judge; give --eval-judge-model, --eval-judge-url, --eval-reward-model or "
            "--eval-reward: another than the one that labels, which the policy may learn to please"
        )
    held_out.check()
    if judge is not None and judge == held_out:
        raise ConfigError(
            "the held-out judge is the one that labels, and can't show whether the policy only "
            "learns to please it; give another"
        )


def _open_folder(config: ImproveConfig) -> Path:
    """The output folder: new, or one of an earlier call with the same options."""
    folder = Path(config.output).expanduser()
    settings = {k: v for k, v in asdict(config).items() if k not in _MAY_CHANGE and v is not None}
    settings = json.loads(json.dumps(settings))
    file = folder / SETTINGS
    if file.is_file():
        earlier = json.loads(file.read_text(encoding="utf-8"))
        changed = sorted(
            k for k in settings.keys() | earlier.keys() if settings.get(k) != earlier.get(k)
        )
        if changed:
            raise ConfigError(
                f"--output {config.output}: was started with another {flag_of(changed[0])}; name a "
                "new folder, or give the same options to continue"
            )
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--output {config.output}: exists already; name a new folder")
    with wrap_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(file, to_json(settings, indent=2) + "\n")
    return folder


def _pairs_of(summary: Mapping[str, Any]) -> int:
    return int(summary.get("data_facts", {}).get("groups") or 0)


def describe_round(found: Round) -> str:
    """A line about a round."""
    rate, gain = found.win_rate, found.gain
    before = "½" if found.number == 1 else "the best round before"
    invalid = f"; {found.invalid:,} without a valid verdict" if found.invalid else ""
    return (
        f"Round {found.number}: the held-out judge prefers it to the start on {rate.value:.1%} "
        f"({rate.low:.1%} to {rate.high:.1%}) of the prompts, {gain.value:+.1%} "
        f"({gain.low:+.1%} to {gain.high:+.1%}) over {before}; {found.words[0]:.0f} words at the "
        "start, "
        f"{found.words[1]:.0f} now; {found.pairs:,} pairs{invalid}"
    )
