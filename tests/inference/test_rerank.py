"""`mlx-align rerank` and `Reranker`: what is sampled, how it is ranked, and what is written."""

import json
import sys

import numpy as np
import pytest
from helpers.data import read_rows, write_rows
from helpers.inference import ANSWERS, PROMPT, dpo_config, two_model_rewards, write_adapter
from helpers.paths import CLASSIFIERS, TINY_MODEL
from helpers.runs import fingerprint, mlx_align

from mlx_align import Reranker, RewardModel
from mlx_align.data.formats import read_preferences
from mlx_align.errors import ConfigError, DataError, ModelError
from mlx_align.evaluation.metrics import expected_best
from mlx_align.inference.generate import TextGenerator
from mlx_align.models import generation
from mlx_align.models.adapters import AdapterLayout
from mlx_align.models.loading import open_model
from mlx_align.system.starter import shipped_file
from mlx_align.types import Message, PromptGroup, TokenizedGroup

QUESTION = PROMPT[0]["content"]
CLASSIFIER = CLASSIFIERS / "qwen2"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A run of dpo."""
    where = tmp_path_factory.mktemp("rerank") / "policy"
    return write_adapter(where, AdapterLayout(rank=4), dpo_config(beta=0.5), size=0.1)


@pytest.fixture(scope="module")
def reranker(policy):
    return Reranker.load(str(TINY_MODEL), policy)


# ---------------------------------------------------------------- ranking what is given


def test_given_completions_are_ranked_and_all_kept(reranker, policy):
    answers = [*ANSWERS, ANSWERS[0]]
    ranked = reranker.rank(PROMPT, answers)
    assert sorted(one.index for one in ranked) == list(range(6))
    assert [one.text for one in ranked] == [answers[one.index] for one in ranked]
    scores = [one.score for one in ranked]
    assert scores == sorted(scores, reverse=True)
    (group,) = reranker.rank_groups([PromptGroup("Say", (" yes", " no"), "x")])
    assert [one.count for one in group.ranked] == [1, 1]
    twice = [one for one in ranked if one.text == answers[0]]
    assert twice[0].score == pytest.approx(twice[1].score, abs=1e-6)
    assert not any(one.truncated for one in ranked)


def test_ranking_by_a_reward_model_on_the_same_base(policy, reward_run):
    """It swaps with the policy, and says what it says alone."""
    both = Reranker.load(str(TINY_MODEL), policy, reward_run)
    assert "an adapter on the same weights" in both.description
    assert both.scorer.model is both.model or both.scorer.model.module is both.model.module
    alone = RewardModel.load(str(TINY_MODEL), reward_run).score(PROMPT, ANSWERS)
    ranked = both.rank(PROMPT, ANSWERS)
    by_index = [one.score for one in sorted(ranked, key=lambda one: one.index)]
    np.testing.assert_allclose(by_index, alone, atol=1e-5)
    assert ranked[0].policy_logp is None
    # What it samples is the policy's, as without it.
    without = Reranker.load(str(TINY_MODEL), policy)
    drawn = [r.sample(PROMPT, 6, max_tokens=8, seed=2) for r in (both, without)]
    assert {one.text for one in drawn[0]} == {one.text for one in drawn[1]}
    texts = [one.text for one in drawn[0]]
    alone = RewardModel.load(str(TINY_MODEL), reward_run).score(PROMPT, texts)
    np.testing.assert_allclose([one.score for one in drawn[0]], alone, atol=1e-5)


def test_ranking_by_a_second_model(policy):
    second = Reranker.load(str(TINY_MODEL), policy, str(CLASSIFIER))
    assert "a second model in memory" in second.description
    alone = RewardModel.load(str(CLASSIFIER)).score("Say", [" yes", " no"])
    ranked = second.rank("Say", [" yes", " no"])
    by_index = [one.score for one in sorted(ranked, key=lambda one: one.index)]
    np.testing.assert_allclose(by_index, alone, atol=1e-6)


def test_best_of_n_of_the_base_model(reward_run):
    reranker = Reranker.load(str(TINY_MODEL), reward_model=reward_run)
    ranked = reranker.sample(PROMPT, 5, max_tokens=6, seed=1)
    assert sum(one.count for one in ranked) == 5
    alone = RewardModel.load(str(TINY_MODEL), reward_run).score(
        PROMPT, [one.text for one in ranked]
    )
    np.testing.assert_allclose([one.score for one in ranked], alone, atol=1e-5)
    bare = write_adapter(reward_run.parent / "zero", AdapterLayout(rank=2), dpo_config(), size=0.0)
    # An adapter that changes nothing samples the same.
    same = Reranker.load(str(TINY_MODEL), bare, reward_run).sample(PROMPT, 5, max_tokens=6, seed=1)
    assert [one.text for one in same] == [one.text for one in ranked]


# ---------------------------------------------------------------- sampling


def test_samples_are_scored_by_their_own_tokens(reranker, policy, monkeypatch):
    kept = []

    def keeping(*arguments, **options):
        kept.append(generation.generate_groups(*arguments, **options))
        return kept[-1]

    monkeypatch.setattr("mlx_align.inference.generate.generate_groups", keeping)
    ranked = reranker.sample(PROMPT, 8, max_tokens=7, temperature=1.0, seed=3)
    (drawn,) = kept[0]
    assert sum(one.count for one in ranked) == len(drawn) == 8
    for one in ranked:
        sample = drawn[one.index]
        assert one.tokens == len(sample.tokens)
        assert one.truncated == (not sample.finished)
        # The policy's log-prob is what the sampler drew it with, at temperature 1.
        assert one.policy_logp == pytest.approx(sum(sample.logps), abs=1e-4)
        same = [k for k, other in enumerate(drawn) if other.tokens == sample.tokens]
        assert (one.index, one.count) == (same[0], len(same))
    assert ranked == sorted(ranked, key=lambda one: (-one.score, one.index))

    tokenizer = open_model(str(TINY_MODEL)).tokenizer
    prompt = np.array(tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True), np.int32)
    rows = tuple(np.array(drawn[one.index].tokens, np.int32) for one in ranked)
    wanted = two_model_rewards(TokenizedGroup(prompt, rows, "x"), policy, None, 0.5)
    np.testing.assert_allclose([one.score for one in ranked], wanted, atol=1e-5)


def test_one_sample_greedy_and_empty(reranker, monkeypatch):
    (only,) = reranker.sample(PROMPT, 1, max_tokens=5, temperature=0)
    assert (only.count, only.index) == (1, 0)
    assert only == reranker.best_of(PROMPT, 1, max_tokens=5, temperature=0)
    end = open_model(str(TINY_MODEL)).tokenizer.eos_token_id

    ended = generation.Generated([end], [-1.0], True)
    truncated = generation.Generated([5, 6], [-1.0] * 2, False)
    samples = [[ended, ended, ended, truncated]]
    monkeypatch.setattr("mlx_align.inference.generate.generate_groups", lambda *_, **__: samples)
    ranked = reranker.sample(PROMPT, 4)
    empty = next(one for one in ranked if one.text == "")
    assert (empty.count, empty.truncated, empty.tokens) == (3, False, 1)
    other = next(one for one in ranked if one.text)
    assert (other.count, other.truncated, other.tokens) == (1, True, 2)


def test_text_becomes_a_user_message_where_there_is_a_chat_template(reranker):
    """`sample` and `best_of` treat text as `rerank --prompt` does."""
    options = {"max_tokens": 6, "seed": 4}
    assert reranker.style.has_template
    sampled = reranker.sample(QUESTION, 4, **options)
    assert sampled == reranker.sample(PROMPT, 4, **options)
    best = reranker.best_of(QUESTION, 4, **options)
    assert best == reranker.best_of(PROMPT, 4, **options) == sampled[0]
    verbatim = reranker.sample(QUESTION, 4, **options, apply_chat_template=False)
    (group,) = reranker.sample_groups([PromptGroup(QUESTION, (), "x")], 4, **options)
    assert verbatim == group.completions()
    assert [one.score for one in verbatim] != [one.score for one in sampled]


def test_generated_text_is_that_of_the_policy(reranker, policy):
    """Greedy text equals the one sample at temperature 0; the base model answers by itself."""
    generator = TextGenerator.load(str(TINY_MODEL), policy)
    (only,) = reranker.sample(PROMPT, 1, max_tokens=6, temperature=0)
    assert generator.generate(QUESTION, max_tokens=6) == only.text
    assert generator.generate(PROMPT, max_tokens=6) == only.text
    (verbatim,) = reranker.sample(
        QUESTION, 1, max_tokens=6, temperature=0, apply_chat_template=False
    )
    found = generator.generate(QUESTION, max_tokens=6, apply_chat_template=False)
    assert found == verbatim.text
    assert isinstance(TextGenerator.load(str(TINY_MODEL)).generate(QUESTION, max_tokens=3), str)
    with pytest.raises(DataError, match="too long"):
        generator.generate("x " * 5000)


def test_an_implicit_reward_scores_like_it_ranks(reranker):
    scores = reranker.scorer.score(PROMPT, ANSWERS)
    ranked = reranker.rank(PROMPT, ANSWERS)
    assert [scores[one.index] for one in ranked] == [one.score for one in ranked]


def test_long_prompts_are_reported(policy):
    reranker = Reranker.load(str(TINY_MODEL), policy, max_seq_length=40)
    with pytest.raises(DataError, match=r"too long \(\d+ tokens, at most 40\)"):
        reranker.sample("x " * 200, 2)
    groups = [PromptGroup("x " * 200, (), "a"), PromptGroup("Say", (), "b")]
    long, short = reranker.sample_groups(groups, 2, max_tokens=3)
    assert long.reason.startswith("too long")
    assert long.ranked == ()
    assert short.ranked


def test_errors_of_loading(policy, reward_run, tmp_path):
    for arguments, error, message in (
        ((str(TINY_MODEL),), ConfigError, "no scorer to rank by"),
        ((str(TINY_MODEL), reward_run), ModelError, "generates no text"),
        (
            (str(TINY_MODEL), policy, str(TINY_MODEL)),
            ModelError,
            "neither a run of mlx-align reward nor a",
        ),
        ((str(CLASSIFIER), policy), ModelError, "sequence classifier|is --model"),
    ):
        with pytest.raises(error, match=message):
            Reranker.load(*arguments)
    with pytest.raises(ConfigError, match="--beta: has no effect on --reward-model"):
        Reranker.load(str(TINY_MODEL), policy, reward_run, beta=1.0)
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in reward_run.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    content = json.loads((moved / "adapter_config.json").read_text())
    content["model"] = str(tmp_path / "gone")
    (moved / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r'correct "model" in .*adapter_config\.json'):
        Reranker.load(str(TINY_MODEL), policy, moved)


# ---------------------------------------------------------------- cost


def test_the_prompt_is_computed_once_per_role(reranker, monkeypatch):
    """K = 8, a prompt of 256 tokens, completions of 64: tokens through the backbone, two roles."""
    random = np.random.default_rng(0)
    lengths = []
    backbone = type(reranker.model.backbone)
    original = backbone.hidden

    def counting(self, tokens, cache=None):
        lengths.append(tokens.size)
        return original(self, tokens, cache)

    monkeypatch.setattr(backbone, "hidden", counting)

    draw = [random.integers(3, 90, n).astype(np.int32) for n in [256] + [64] * 8]
    reranker.scorer.score_tokens([TokenizedGroup(draw[0], tuple(draw[1:]), "x")])
    assert sum(lengths) == 2 * (256 + 8 * 63)
    assert sum(lengths) / (2 * 8 * (256 + 64)) <= 0.45


# ---------------------------------------------------------------- mlx-align rerank


@pytest.fixture
def rerank(tmp_path, monkeypatch, capsys, policy):
    """Runs `mlx-align rerank` with the policy; exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*options, run_folder=policy):
        where = () if run_folder is None else ("--adapter-path", run_folder)
        code = mlx_align("rerank", "--model", TINY_MODEL, *where, *options)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_prompt_option(rerank, reranker, policy):
    before = fingerprint(policy)
    options = ("--prompt", QUESTION, "-n", 4, "--max-tokens", 6, "--seed", 2)
    code, out, _ = rerank(*options, "--json")
    assert code == 0
    row = json.loads(out)
    assert row["prompt"] == PROMPT
    wanted = reranker.sample(PROMPT, 4, max_tokens=6, seed=2)
    assert [one["text"] for one in row["completions"]] == [one.text for one in wanted]
    assert row["completions"][0]["score"] == pytest.approx(wanted[0].score, abs=1e-6)
    code, out, _ = rerank(*options)
    lines = out.splitlines()
    assert lines[0].startswith(
        "implicit reward: 0.5 x log(policy / reference); reference: the base"
    )
    assert f"{wanted[0].score:+.4f}" in lines[1]
    assert "(truncated)" in out
    code, out, _ = rerank(*options, "--ignore-chat-template", "--json")
    assert json.loads(out)["prompt"] == QUESTION
    assert fingerprint(policy) == before


def test_input_file_of_prompts(rerank, reranker):
    rows = [{"prompt": PROMPT, "id": i} for i in range(3)] + [{"prompt": [{**PROMPT[0]}], "id": 3}]
    write_rows("prompts.jsonl", rows)
    options = ("--input", "prompts.jsonl", "-n", 4, "--max-tokens", 5, "--output", "out.jsonl")
    code, out, _ = rerank(*options)
    assert code == 0
    assert "Wrote 4 rankings to out.jsonl" in out
    found = read_rows("out.jsonl")
    assert [row["id"] for row in found] == [0, 1, 2, 3]
    for row in found:
        scores = [one["score"] for one in row["completions"]]
        assert scores == sorted(scores, reverse=True)
        assert sum(one["count"] for one in row["completions"]) == 4
    # What it writes can be trained on.
    groups, reading = read_preferences("out.jsonl")
    assert reading.format == "ranked"
    assert len(groups[0].completions) == len(found[0]["completions"])
    code, _, err = rerank(*options)
    assert code == 1
    assert "exists already" in err
    code, out, _ = rerank("--input", "prompts.jsonl", "-n", 2, "--max-tokens", 3, "--json")
    assert [json.loads(line)["id"] for line in out.splitlines()] == [0, 1, 2, 3]


def test_input_file_of_completions(rerank, reranker):
    texts = [text for text in ANSWERS if text]
    rows = [
        {"prompt": PROMPT, "completions": texts, "scores": [1, 2, 3, 4]},
        {"prompt": PROMPT, "completions": []},
        {"prompt": PROMPT, "completions": [texts[1], texts[1]]},
    ]
    write_rows("given.jsonl", rows)
    code, out, _ = rerank("--input", "given.jsonl", "--json", "--output", "out.jsonl")
    assert code == 0
    assert json.loads(out) == {"output": "out.jsonl", "prompts": 3, "unranked": 1}
    found = read_rows("out.jsonl")
    wanted = reranker.rank(PROMPT, texts)
    assert [one["index"] for one in found[0]["completions"]] == [one.index for one in wanted]
    assert "scores" not in found[0]  # they were of another order
    assert found[1]["completions"] is None
    assert found[1]["rerank_note"] == "no completions"
    assert len(found[2]["completions"]) == 2
    code, _, err = rerank("--input", "given.jsonl", "-n", 3)
    assert code == 1
    assert "-n has no effect: the rows have completions" in err


def test_interactive_prompts(rerank, monkeypatch):
    typed = iter(["is sun good?", "", "is sun good?"])

    def answer(*_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", answer)
    code, out, err = rerank("-n", 3, "--max-tokens", 4, "--json")
    assert code == 0
    assert "Ctrl-D ends" in err
    first, second = (json.loads(line) for line in out.splitlines())
    assert first["prompt"] == second["prompt"]
    # Asked again, it is answered anew.
    assert first["completions"] != second["completions"]

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert rerank("-n", 1)[0] == 130


def test_errors_of_the_command(rerank, policy, reward_run):
    write_rows("text.jsonl", [{"prompt": "Say"}])
    write_rows("odd.jsonl", [{"question?": "Say"}])
    for options, message in (
        ((), "no terminal to read prompts from; give --prompt or --input"),
        (("--prompt", "x", "--input", "y"), "exclude each other"),
        (("--prompt", " "), "--prompt is empty"),
        (("--prompt", "x", "--temperature", 0), "add -n 1"),
        (("--prompt", "x", "-n", 0), "-n"),
        (("--prompt", "x", "--temperature", -1), "--temperature"),
        (("--prompt", "x", "--beta", 0), "--beta 0: must be above 0"),
        (("--prompt", "x", "--reward-model", reward_run, "--sum"), "--per-token: has no effect"),
        (("--prompt", "x", "--output", "nowhere/o.jsonl"), "there is no folder"),
        (("--input", "nowhere.jsonl"), "--input nowhere.jsonl: no such file"),
        (("--input", "odd.jsonl"), "odd.jsonl:1: not recognised as prompts data"),
        (("--input", "text.jsonl", "--ignore-chat-template"), "has no effect with --input"),
    ):
        code, out, err = rerank(*options)
        assert code == 1, options
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1
        assert out == ""
    code, _, err = rerank("--prompt", "x", run_folder=None)
    assert "no scorer to rank by" in err
    code, out, _ = rerank("--input", "text.jsonl", "-n", 1, "--max-tokens", 2)
    assert code == 0
    assert "! text prompts are used verbatim" in out
    assert mlx_align("rerank", "--help") == 0


# ---------------------------------------------------------------- the starter


def test_best_of_n_finds_right_answers_on_the_starter(tmp_path, monkeypatch, capsys):
    """A moment of DPO; the whole of it is scripts/verify_rerank.py."""
    monkeypatch.chdir(tmp_path)
    options = ["--iters", "12", "--batch-size", "4", "--warmup", "0", "--learning-rate", "1e-3"]
    options += ["--samples", "0", "--val-batches", "1", "--output", "run"]
    options += ["--reference-cache", str(tmp_path / "cache")]
    assert mlx_align("dpo", "-c", shipped_file("starter.yaml"), *options) == 0
    capsys.readouterr()
    world = json.loads((shipped_file("starter") / "world.json").read_text())
    some = world["countries"][::3]
    sampled = [
        PromptGroup(_user(f"What is the capital of {country['name']}?"), (), country["name"])
        for country in some
    ]
    reranker = Reranker.load(str(shipped_file("starter/model")), "run")
    rankings = reranker.sample_groups(sampled, 16, max_tokens=40)
    curve = np.zeros(3)
    for country, ranking in zip(some, rankings, strict=True):
        scores, right = [], []
        for one in ranking.ranked:
            scores += [one.score] * one.count
            right += [country["capital"] in one.text] * one.count
        curve += [expected_best(scores, n, right) / len(some) for n in (1, 4, 8)]
    assert curve[2] > curve[1] + 0.05 > curve[0] + 0.15


def _user(text):

    return (Message("user", text),)
