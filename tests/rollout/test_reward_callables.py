"""Python callables as reward functions: they run in this process, and mix with specs."""

import asyncio
import datetime
import functools
from pathlib import Path

import numpy as np
import pytest

from mlx_align.errors import ConfigError, TrainingError
from mlx_align.rollout.builtin_rewards import CompletionFacts
from mlx_align.rollout.reward_functions import open_rewards, parse_rewards
from mlx_align.rollout.rewards import fingerprint_rewards, reward_settings
from mlx_align.types import Message, PromptGroup

DAY = datetime.date(2025, 3, 1)
GROUPS = [
    PromptGroup((Message("user", "2 + 2?"),), (), "train.jsonl:1", columns={"answer": "4"}),
    PromptGroup("Why?", (), "train.jsonl:7", columns={"day": DAY}),
]
TEXTS = [["4", "3"], ["x", ""]]
FACTS = [[CompletionFacts(3, True, 8), CompletionFacts(8, False, 8)]] * 2


def rewarded(*sources):
    with open_rewards(parse_rewards(sources), 20.0) as rewards:
        rewards.check(GROUPS)
        return rewards(GROUPS, TEXTS, FACTS)


def lengths(completions):
    return [len(text) for text in completions]


def right(prompts, completions, answer, **columns):
    """As in TRL's documentation: named columns, and all others."""
    assert columns.keys() == {"day"}
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def test_callables_and_specs_have_names_and_weights():
    specs = parse_rewards([lengths, (lengths, 0.5), "length(target=40)=0.2", lambda **_: [1.0]])
    assert [spec.name for spec in specs] == ["lengths", "lengths_2", "length", "lambda"]
    assert [spec.weight for spec in specs] == [1, 0.5, 0.2, 1]
    names = [
        parse_rewards([source])[0].name
        for source in (functools.partial(lengths), functools.lru_cache(lengths), Scorer())
    ]
    assert names == ["lengths", "lengths", "Scorer"]


class Scorer:
    def __call__(self, completions, **columns):
        return np.arange(len(completions), dtype=np.float32)


def test_they_are_called_with_the_data_itself():
    seen = []

    def everything(prompts, completions, **columns):
        seen.append((prompts, completions, columns))
        return [None, 1, True, 0.5]

    table = rewarded((everything, 2.0), "length(target=6)")
    ((prompts, completions, columns),) = seen
    assert prompts == [[{"role": "user", "content": "2 + 2?"}]] * 2 + ["Why?"] * 2
    assert completions == ["4", "3", "x", ""]
    assert columns == {"answer": ["4", "4", None, None], "day": [None, None, DAY, DAY]}
    np.testing.assert_array_equal(table.values[:, 0], [np.nan, 1, 1, 0.5])
    length = table.values[:, 1]
    np.testing.assert_array_equal(table.total, np.nan_to_num(table.values[:, 0]) * 2 + length)


def test_token_ids_are_passed_to_functions_that_name_them(tmp_path):
    """In this process and in the reward process; functions with **columns don't get them."""
    (tmp_path / "ids.py").write_text(
        "def total(completion_ids):\n    return [float(sum(ids)) for ids in completion_ids]\n"
        "def others(completions, **columns):\n    return [float(len(columns))] * len(completions)\n"
    )
    facts = [
        [CompletionFacts(2, True, 8, (1, 2)), CompletionFacts(1, True, 8, (5,))],
        [CompletionFacts(1, True, 8, (7,)), CompletionFacts(0, True, 8, ())],
    ]

    def count(completion_ids):
        return [float(len(ids)) for ids in completion_ids]

    sources = [count, right, f"{tmp_path / 'ids.py'}:total", f"{tmp_path / 'ids.py'}:others"]
    with open_rewards(parse_rewards(sources), 20.0) as rewards:
        rewards.check(GROUPS)
        table = rewards(GROUPS, TEXTS, facts)
    assert table.values[:, 0].tolist() == [2, 1, 1, 0]
    assert table.values[:, 2].tolist() == [3, 5, 7, 0]
    assert table.values[:, 3].tolist() == [3, 3, 3, 3]  # answer, day, prompts


def test_functions_objects_and_closures():
    bonus = 3.0
    table = rewarded(right, Scorer(), lambda completions: [bonus] * len(completions))
    assert table.values.tolist() == [[1, 0, 3], [0, 1, 3], [0, 2, 3], [0, 3, 3]]


def test_only_specs_need_a_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def one(completions):\n    return [1.0] * len(completions)\n")
    with open_rewards(parse_rewards([lengths]), 20.0) as rewards:
        assert rewards.pid is None
    with open_rewards(parse_rewards([lengths, "mine.py:one", "length=0", Scorer()]), 20.0) as both:
        assert both.pid is not None
        # The order of the columns is that of the sources, wherever each of them runs.
        table = both([GROUPS[0]], TEXTS[:1], FACTS[:1])
    assert table.names == ("lengths", "one", "length", "Scorer")
    assert table.values[:, [0, 1, 3]].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_async_functions_are_awaited_even_inside_an_event_loop():
    async def later(completions):
        await asyncio.sleep(0.001)
        return lengths(completions)

    async def notebook():
        return rewarded(later)

    for table in (rewarded(later), asyncio.run(notebook())):
        assert table.values[:, 0].tolist() == [1, 1, 1, 0]


def test_a_function_may_change_its_lists():
    def changes(prompts, completions):
        prompts.clear()
        completions.append("x")
        return [1.0] * 4

    assert rewarded(changes, lengths).values.tolist() == [[1, 1], [1, 1], [1, 1], [1, 0]]


def test_an_exception_is_the_cause_of_the_error():
    def raises(completions):
        return [float(text) for text in completions]

    message = r"^reward function raises: raised ValueError: could not convert .*'x' \(.*\.py:\d+\)"
    with pytest.raises(TrainingError, match=message + r", on 4 completions, the first") as caught:
        rewarded(raises)
    assert isinstance(caught.value.__cause__, ValueError)
    assert "\n" not in str(caught.value)
    with pytest.raises(TrainingError, match="reward function exits: raised SystemExit: enough"):
        rewarded(exits)


def exits(completions):
    raise SystemExit("enough")


def test_ctrl_c_is_not_an_error_of_the_function():
    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewarded(interrupted)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned a list of 1 for 4 completions, on 4 completions"),
        (1.0, "returned float; expected a list of 4 numbers or None"),
        ([0.0, float("nan"), 0.0, 0.0], "returned nan; .*, at completion 2 of train.jsonl:1"),
        (["a"] * 4, "returned str; expected a number or None, at completion 1"),
    ],
)
def test_returned_values_are_checked(returned, message):
    def wrong(completions):
        return returned

    with pytest.raises(TrainingError, match=f"^reward function wrong: {message}"):
        rewarded(wrong)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3, "reward 3: expected text such as .*, a function, or .function, weight."),
        (("length", 0.5), r"reward \('length', 0.5\): expected text such as"),
        ((lengths, 1.0, 2.0), "expected text such as"),
        ((lengths, "much"), "reward function lengths: weight 'much'; expected a number"),
        ((lengths, float("nan")), "reward function lengths: weight nan"),
        ((lengths, 0.0), "reward function lengths: all weights are 0"),
    ],
)
def test_objects_that_are_no_rewards_are_named(source, message):
    with pytest.raises(ConfigError, match=message):
        parse_rewards([source])


def test_columns_are_checked_before_training():
    def needs_gold(completions, gold):
        return gold

    with pytest.raises(ConfigError, match=r"^reward function needs_gold: needs 'gold', .*answer"):
        rewarded(needs_gold)
    with pytest.raises(ConfigError, match="takes 'completions' by position only"):
        open_rewards(parse_rewards([lambda completions, /: [1.0]]), 20.0)


def test_a_changed_function_changes_the_fingerprint():
    def fingerprint(function):
        settings = reward_settings([function], None, 1.0, 20.0)
        assert settings is not None
        return fingerprint_rewards(settings, None, "reward model", None)

    def same(completions):
        return [1.0]

    first = fingerprint(same)
    assert first.keys() == {"reward function same"}

    def same(completions):
        return [2.0]

    assert fingerprint(same) != first
    assert fingerprint(functools.partial(same)) == {}
