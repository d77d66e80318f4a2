"""The built-in rewards against answers worked out by hand."""

import time
from fractions import Fraction

import pytest

from mlx_align.rollout.builtin_rewards import (
    BUILTIN_REWARDS,
    CompletionFacts,
    first_number,
    last_number,
    marked_answer,
    parse_number,
)
from mlx_align.rollout.reward_functions import parse_rewards


def reward(spec, text="", *, tokens=1, max_tokens=100, **columns):
    (parsed,) = parse_rewards([spec])
    return parsed.builtin(text, CompletionFacts(tokens, True, max_tokens), columns)


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("So 48 + 24 = 72.\n#### 72", "72", 1),
        ("So 48 + 24 = 72.\n#### 71", "72", 0),
        ("#### 5 apples, of 10\nQ: what else? 7", "5", 1),
        ("#### 3\n#### 4", "4", 1),
        ("#### 10 - 3 = 7", "7", 1),
        ("####", "0", 0),
        ("I think 5 #### none", "5", 0),
        (r"hence \boxed{\frac{1}{2}} of 9", "0.5", 1),
        (r"\boxed{x = 3}", "3", 1),
        (r"\boxed{3} or \boxed{4}", "4", 1),
        (r"\boxed{72\text{ clips}}", "72", 1),
        (r"\boxed{12", "12", 1),
        ("First 3, then 4.", "4", 1),
        ("First 3, then 4.", "3", 0),
        ("It costs $1,234.50.", "1234.5", 1),
        ("1,000, and no more", "1000", 1),
        (r"1{,}000", 1000, 1),
        ("72", 72.0, 1),
        ("72.0", "72", 1),
        ("about 50%", "50", 1),
        ("it is −5", "-5", 1),
        ("it is -$5", "$-5", 1),
        ("10-3", "3", 1),
        ("- 5", "5", 1),
        ("3/4", ".75", 1),
        ("2 / 4", r"\frac{1}{2}", 1),
        (r"2\frac{1}{2}", "2.5", 1),
        ("1/0", "0", 0),
        ("9" * 5000, "9", 0),
        ("no number at all", "4", 0),
        ("", "4", 0),
        ("48/2 = <<48/2=24>>24\n#### 24", "first 2, then 3\n#### 24", 1),
        ("42", r"It is \boxed{42}", 1),
        ("Canberra.", "canberra", 1),
        ("It is Canberra", "Canberra", 0),
        (r"\boxed{\text{New  York}}", "new york", 1),
        ("#### x + 1", "x+1", 1),
        ("1", "x+1", 0),
        ("1", "2 or 1", 0),
    ],
)
def test_exact_answer(text, answer, right):
    assert reward("exact_answer", text, answer=answer) == right


def test_exact_answer_of_another_column_and_of_none():
    assert reward("exact_answer(column='gold')", "5", gold=5, answer=6) == 1
    assert reward("exact_answer", "5", other=5) is None
    assert reward("exact_answer", "5", answer="") is None


def test_numbers_are_found_in_text():
    assert first_number("from 3/4 to 1,234") == Fraction(3, 4)
    assert last_number("from 3/4 to 1,234") == 1234
    assert last_number("in 2020,300 people") == 300
    assert last_number("1,23") == 23
    assert first_number("1,0000") == first_number("1,000,5") == 1
    assert parse_number(" $1,200.00 ") == 1200
    assert parse_number("$72$") == 72
    assert parse_number("7 apples") is None
    assert marked_answer("none") is None


def test_long_texts_are_read_quickly():
    size = 50_000
    hard = ["1", "1,", "111,", r"\frac{", "$ ", r"\boxed{", r"\text{", " ", "-", "1/", "=", "1{,}"]
    start = time.process_time()
    for piece in hard:
        text = piece * size + "1"
        assert reward("exact_answer", text, answer="7") == 0
        assert reward("exact_answer", text, answer="seven") == 0
    # A second in all. A square would take minutes.
    assert time.process_time() - start < 15


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("<think>\na\nb\n</think>\n<answer>5</answer>", 1),
        ("  <think></think><answer></answer>\n", 1),
        ("<think>a</think> so <answer>5</answer>", 0),
        ("<think>a</think><answer>5</answer> more", 0),
        ("<think>a<think>b</think><answer>5</answer>", 0),
        ("<think>a</think><answer>5</answer><answer>6</answer>", 0),
        ("<answer>5</answer><think>a</think>", 0),
        ("5", 0),
    ],
)
def test_default_format(text, fits):
    assert reward("format", text) == fits


def test_format_where_the_template_opened_the_thinking():
    (parsed,) = parse_rewards(["format"])
    opened = CompletionFacts(1, True, 100, opened="<think>")
    answer = "a</think><answer>b</answer>"
    assert parsed.builtin(answer, opened, {}) == 1
    assert parsed.builtin("<think>" + answer, opened, {}) == 0
    assert reward("format", answer) == 0


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("It is 2e3.", "2000", 1),
        ("#### 2E3", "2000", 1),
        (r"\boxed{1.5e-3}", "0.0015", 1),
        ("2000", "2e3", 1),
        ("2e3", "2", 0),
        ("the 2e3rd", "2000", 0),
        ("1e999", "7", 0),
    ],
)
def test_powers_of_ten(text, answer, right):
    assert reward("exact_answer", text, answer=answer) == right


def test_patterns():
    assert reward(r"format(pattern='a.*b')", "a\nb") == 1
    assert reward(r"format(pattern='a.*b')", "a\nb.") == 0
    assert reward(r"regex(pattern=r'\d\d')", "the year 20") == 1
    assert reward(r"regex(pattern=r'^\d\d')", "the year 20") == 0
    assert reward(r"regex(pattern='(?i)YEAR')", "the year 20") == 1


def test_length():
    assert reward("length(target=200)", tokens=200) == 1
    assert reward("length(target=200)", tokens=150) == 0.75
    assert reward("length(target=200)", tokens=250) == 0.75
    assert reward("length(target=200)", tokens=1000) == 0
    assert reward("length(target=4, unit='words')", "one  two\nthree", tokens=99) == 0.75
    assert reward("length", tokens=25, max_tokens=100) == 0.75
    assert reward("length", tokens=100, max_tokens=100) == 0


def test_repetition():
    assert reward("repetition(n=1)", "a b A b") == -0.5
    assert reward("repetition(n=2)", "a b a b a") == -0.5  # ab ba ab ba
    assert reward("repetition", "a b c d e") == 0
    assert reward("repetition", "a " * 103) == pytest.approx(1 / 100 - 1)
    assert reward("repetition", "a a a") == 0
    assert reward("repetition") == 0


def test_overlong_is_equation_13():
    def published(n, most, cache):
        if n <= most - cache:
            return 0.0
        return ((most - cache) - n) / cache if n <= most else -1.0

    for n in (1, 16384, 16385, 18432, 20480, 20481, 30000):
        got = reward("overlong(max_tokens=20480, buffer=4096)", tokens=n)
        assert got == published(n, 20480, 4096)
        assert reward("overlong", tokens=n, max_tokens=20480) == got
    assert reward("overlong(max_tokens=20480)", tokens=18432) == -0.5
    assert reward("overlong", tokens=1, max_tokens=1) == -1
    assert reward("overlong(buffer=50)", tokens=10, max_tokens=10) == -1


@pytest.mark.parametrize("name", BUILTIN_REWARDS)
def test_an_empty_completion_has_a_finite_reward(name):
    options = "(pattern='x')" if name == "regex" else ""
    assert abs(reward(name + options, tokens=0, answer="1")) <= 1
