"""Judges: probabilities of verdict tokens, endpoints, reward models and functions."""

import math
import socket

import mlx.core as mx
import numpy as np
import pytest
from helpers.endpoints import Reply, serve
from helpers.paths import TINY_MODEL

from mlx_align.errors import ConfigError, ModelError
from mlx_align.preferences.endpoint import Endpoint, EndpointJudge
from mlx_align.preferences.judges import LanguageModelJudge, open_reward_judge, verdict_tokens
from mlx_align.preferences.verdicts import (
    Comparison,
    judge_prompt,
    label_of_token,
    parse_reply,
    verdict_from_probabilities,
)
from mlx_align.types import Message

CRITERIA = {"helpful": "does what the user asks for"}


def comparison(first="Canberra.", second="Sydney.", prompt="Capital of Australia?"):
    turns = (Message("user", prompt),)
    return Comparison(
        turns, (Message("assistant", first),), (Message("assistant", second),), CRITERIA, "a:1"
    )


def test_the_prompt_shows_everything_in_order():
    (turn,) = judge_prompt(comparison())
    places = [
        turn.content.index(text)
        for text in ("Capital of Australia?", "Canberra.", "Sydney.", "helpful: does what", "A, B")
    ]
    assert places == sorted(places)
    (swapped,) = judge_prompt(comparison().swapped())
    assert swapped.content.index("Sydney.") < swapped.content.index("Canberra.")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("A", "A"), (" B", "B"), ("B.", "B"), ("**A**", "A"), ("[[C]]", "C"), ("Answer: B", "B"),
        ("The better answer is A.", "A"), ("answer a", "A"),
    ],
)  # fmt: skip
def test_replies_that_are_a_verdict(text, label):
    found = parse_reply(text)
    assert not found.invalid
    assert (found.first, found.second, found.tie) == tuple(float(label == one) for one in "ABC")


@pytest.mark.parametrize("text", ["", "A good answer", "Both A and B", "I can't", "AB", "D", "A B"])
def test_other_replies_are_invalid(text):
    assert parse_reply(text).invalid


def test_too_little_probability_on_a_verdict_is_invalid():
    assert verdict_from_probabilities([0.2, 0.1, 0.1], 0.5).invalid
    assert verdict_from_probabilities([0.0, 0.0, 0.0], 0.0).invalid
    assert verdict_from_probabilities([math.nan, 0.5, 0.5], 0.0).invalid
    found = verdict_from_probabilities([0.3, 0.2, 0.1], 0.5)
    assert (found.first, found.second, found.tie) == pytest.approx((0.5, 1 / 3, 1 / 6))
    assert found.first_wins == pytest.approx(0.5 + 1 / 12)


def test_tokens_with_a_space_in_front_are_verdicts_too():
    vocabulary = {"A": 0, "ĠA": 1, "▁B": 2, "C": 3, "a": 4, "AA": 5, "B": 99, "Ċ": 6}
    assert verdict_tokens(vocabulary, 10) == ((0, 0), (1, 0), (2, 1), (3, 2))
    assert label_of_token("\nC") == "C"


def test_language_model_verdicts_are_the_next_tokens_probabilities():
    """Against softmax of mlx-lm's logits, one row at a time, without prefix sharing or padding."""
    judge = LanguageModelJudge.load(str(TINY_MODEL), min_mass=0.0)
    shown = [comparison(), comparison("No.", "Yes, it is."), comparison(prompt="Hi" * 40)]
    found = judge.compare(shown)
    ids_of = judge.model.folder.tokenizer.get_vocab()
    for one, verdict in zip(shown, found, strict=True):
        ids = judge.style.render(judge_prompt(one), generation_prompt=True)
        logits = judge.model.module(mx.array([ids]))[0, -1]
        p = np.array(mx.softmax(logits.astype(mx.float32)))
        labels = np.array([p[ids_of[label]] for label in "ABC"])
        assert verdict.mass == pytest.approx(labels.sum(), rel=1e-4)
        np.testing.assert_allclose(
            [verdict.first, verdict.second, verdict.tie], labels / labels.sum(), rtol=1e-4
        )


def test_language_model_gives_invalid_verdicts_rather_than_guesses():
    judge = LanguageModelJudge.load(str(TINY_MODEL))
    assert "of the probability is on a verdict" in judge.compare([comparison()])[0].invalid
    long = LanguageModelJudge.load(str(TINY_MODEL), min_mass=0.0, max_seq_length=50)
    assert "too long" in long.compare([comparison()])[0].invalid


def test_reward_functions_judge_exactly():
    def capital(prompts, completions):
        return [float("Canberra" in text) if "skip" not in text else None for text in completions]

    with open_reward_judge([capital]) as judge:
        first, second, tie, missing = judge.compare(
            [
                comparison(),
                comparison("Sydney.", "Canberra!"),
                comparison("Perth.", "Sydney."),
                comparison("skip", "Canberra"),
            ]
        )
    assert (first.first, second.second, tie.tie) == (1, 1, 1)
    assert missing.invalid == "an answer has no reward"
    with (
        pytest.raises(ConfigError, match="no built-in reward"),
        open_reward_judge(["lenght(target=3)"]),
    ):
        pass


# Endpoints


def ask(answer, *comparisons, **settings):
    with serve(answer) as (url, requests):
        endpoint = Endpoint(url, "judge-1", retry_seconds=0.01, **settings)
        return EndpointJudge(endpoint).compare(comparisons or [comparison()]), requests


def test_endpoint_with_logprobs():
    spread = {"A": 0.5, "ĠA": 0.1, "B": 0.2, " C": 0.1, "The": 0.1}
    (verdict,), requests = ask(lambda request: Reply("A", spread))
    assert (verdict.first, verdict.second, verdict.tie) == pytest.approx((0.6 / 0.9, 2 / 9, 1 / 9))
    assert verdict.mass == pytest.approx(0.9)
    (request,) = requests
    assert request["path"] == "/v1/chat/completions"
    assert request["model"] == "judge-1"
    assert request["logprobs"] is True
    assert request["temperature"] == 0
    assert "Authorization" not in request["headers"]
    assert "Canberra." in request["messages"][0]["content"]


def test_endpoint_without_logprobs_counts_the_letter_and_nothing_else():
    replies = iter(["B", "I like both.", ""])
    found, _ = ask(lambda request: Reply(next(replies)), *[comparison()] * 3, concurrency=1)
    assert (found[0].second, found[0].invalid) == (1, "")
    assert "no verdict in the reply 'I like both.'" in found[1].invalid
    assert found[2].invalid == "empty reply"


def test_endpoint_keeps_the_order_of_many_requests():
    def longest(request):
        text = request["messages"][0]["content"]
        answers = [text.split(f"[Answer {x}]\n")[1].split("\n[End")[0] for x in "AB"]
        return Reply("A" if len(answers[0]) > len(answers[1]) else "B")

    shown = [comparison("x" * (i % 7 + 1), "y" * 4) for i in range(40)]
    found, _ = ask(longest, *shown, concurrency=8)
    assert [v.first == 1 for v in found] == [i % 7 + 1 > 4 for i in range(40)]


def test_endpoint_is_tried_again_after_temporary_errors():
    replies = iter([Reply("busy", code=429), Reply("busy", code=503), Reply("A")])
    (verdict,), requests = ask(lambda request: next(replies))
    assert verdict.first == 1
    assert len(requests) == 3


def test_endpoint_leaves_out_options_that_the_server_refuses():
    def strict(request):
        if "max_tokens" in request:
            return Reply("Unsupported: max_tokens. Use max_completion_tokens.", code=400)
        if "logprobs" in request:
            return Reply("this model gives no logprobs", code=400)
        return Reply("C")

    found, requests = ask(strict, comparison(), comparison(), concurrency=1)
    assert [verdict.tie for verdict in found] == [1, 1]
    assert len(requests) == 4  # the second comparison knows
    assert requests[-1]["max_completion_tokens"] > 0


def test_endpoint_errors_are_one_line(monkeypatch):
    with pytest.raises(ModelError, match=r"answered 401 for model judge-1 .*wrong key"):
        ask(lambda request: Reply("wrong key", code=401))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nothing = Endpoint(f"http://127.0.0.1:{port}/v1", "m", retry_seconds=0.001)
    with pytest.raises(ModelError, match=r"no usable answer after 4 attempts .*is the server"):
        EndpointJudge(nothing).compare([comparison()])
    with pytest.raises(ConfigError, match="--url ftp://x: expected an address"):
        Endpoint("ftp://x", "m")
    with pytest.raises(ConfigError, match="--api-key-variable NO_SUCH_KEY: no such environment"):
        Endpoint("http://127.0.0.1/v1", "m", "NO_SUCH_KEY")
    monkeypatch.setenv("TEST_JUDGE_KEY", "sesame")
    _, requests = ask(lambda request: Reply("A"), key_variable="TEST_JUDGE_KEY")
    assert requests[0]["headers"]["Authorization"] == "Bearer sesame"
    assert "sesame" not in repr(Endpoint("http://127.0.0.1/v1", "m", "TEST_JUDGE_KEY"))
