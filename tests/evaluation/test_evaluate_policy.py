"""`mlx-align eval` from options to numbers, on a tiny model with a chat template."""

import fcntl
import json
import re
import shutil

import mlx.core as mx
import numpy as np
import pytest
from helpers.data import assistant, read_rows, user, write_rows
from helpers.paths import TINY_MODEL
from helpers.runs import before_call, interrupt, mlx_align
from mlx_lm import load as mlx_lm_load

from mlx_align.algorithms.dpo import DPO, read_pairs
from mlx_align.algorithms.kto import KTO
from mlx_align.algorithms.sft import SFT
from mlx_align.config import DPOConfig, KTOConfig, SFTConfig
from mlx_align.config.schema import to_yaml
from mlx_align.data.tokenization import tokenize_groups
from mlx_align.evaluation import policy
from mlx_align.evaluation.data import EvalPrompt, read_held_out_data, trained_on_warning
from mlx_align.evaluation.parts import FinishedParts
from mlx_align.evaluation.policy import completion_text
from mlx_align.inference.trained_run import read_trained_run
from mlx_align.models.adapters import AdapterLayout, install_adapters, load_adapter, save_adapter
from mlx_align.models.generation import Generated
from mlx_align.models.loading import load_module, open_model
from mlx_align.system.keyed_log import KeyedLog
from mlx_align.training.setup import prepare_data
from mlx_align.types import Message, PromptGroup, TokenizedGroup

HOT = ("--learning-rate", "3e-3", "--warmup", 0, "--iters", 12)
SMALL = ("--batch-size", 4, "--grad-accumulation-steps", 2, "--samples", 2, "--sample-tokens", 6)
QUICK = ("--samples", 6, "-n", 3, "--sample-tokens", 6)


def pair(name, i):
    words = " ".join(["sun", "rain", "wind"][i % 3 :])
    return {
        "prompt": user(f"{name} {i}: is {words} good?"),
        "chosen": assistant("yes " + "a" * (i % 7)),
        "rejected": assistant("no " + "a" * (i % 5) + " never"),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_rows(folder / "train.jsonl", [pair("train", i) for i in range(40)])
    write_rows(folder / "valid.jsonl", [pair("valid", i) for i in range(16)])
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """A DPO run and a reward model's, both away from where they started."""
    folder = tmp_path_factory.mktemp("runs")
    shared = ("--model", TINY_MODEL, "--data", data, *SMALL, *HOT)
    cache = ("--reference-cache", folder / "cache")
    assert mlx_align("dpo", *shared, "--output", folder / "dpo", "--beta", 0.3, *cache) == 0
    assert mlx_align("reward", *shared, "--output", folder / "rm") == 0
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("The sun is good.\n\nThe rain is good, and the wind.\n\nNever mind.\n")
    return file


def saved_adapter(folder, layout=None, change=None, config=None):
    """An adapter of the tiny model that `change`s nothing, or each tensor so."""
    layout = layout or AdapterLayout()
    model = load_module(TINY_MODEL)
    tree = install_adapters(model, layout)
    if change is not None:
        model.apply_to_modules(lambda _, module: change(module))
        tree = model.trainable_parameters()
    folder.mkdir()
    save_adapter(folder, tree, layout, str(TINY_MODEL))
    if config is not None:
        (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def away(module):
    if "lora_b" in module:
        module.lora_b = mx.full(module.lora_b.shape, 0.02)


@pytest.fixture
def evaluate(capsys):
    """Runs `mlx-align eval --json` in this process; the numbers."""

    def call(adapter_path, *options):
        capsys.readouterr()
        where = ("--model", TINY_MODEL, "--adapter-path", adapter_path)
        code = mlx_align("eval", *where, *QUICK, *options, "--json")
        streams = capsys.readouterr()
        assert code == 0, streams.err
        return json.loads(streams.out)

    return call


@pytest.fixture
def refused(capsys):
    """Runs `mlx-align eval` in this process; the one line it refuses with."""

    def call(*options):
        capsys.readouterr()
        assert mlx_align("eval", *options) == 1
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        return line

    return call


def assert_unmoved(found):
    assert found["divergence"]["per_answer"] == 0
    assert found["divergence"]["standard_error"] == 0
    assert found["preferences"]["accuracy"] == found["preferences"]["reference_accuracy"]
    assert found["preferences"]["reward_accuracy"]["value"] == 0.5
    assert found["preferences"]["reward_margin"]["value"] == 0
    assert found["preferences"]["chosen_change"]["value"] == 0


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_two_identical_models(tmp_path, data, runs, text, evaluate, kind):
    same = saved_adapter(
        tmp_path / "same", AdapterLayout(kind, num_layers=1 if kind == "full" else -1)
    )
    judged = ("--reward-model", runs / "rm", "--perplexity-data", text)
    found = evaluate(same, "--data", data, *judged)
    assert_unmoved(found)
    assert found["wins"]["rate"]["value"] == 0.5
    assert found["wins"]["rate"]["low"] < 0.5 < found["wins"]["rate"]["high"]
    controlled = found["wins"]["length_controlled"]
    assert controlled["low"] <= 0.5 <= controlled["high"]
    assert controlled["value"] == pytest.approx(0.5, abs=1e-9)
    assert found["wins"]["reward_gain"]["value"] == 0
    assert found["wins"]["detectable"] > 0.3
    assert found["perplexity"]["ratio"] == {"value": 1, "low": 1, "high": 1}


def test_a_trained_run_is_better_and_says_by_how_much(tmp_path, runs, text, evaluate):
    output = tmp_path / "numbers"
    more = ("--reward-model", runs / "rm", "--perplexity-data", text, "--samples", 16, "-n", 4)
    found = evaluate(runs / "dpo", *more, "--output", output)
    assert json.loads((output / "evaluation.json").read_text()) == found
    assert found["reference"] == "the base model"
    preferred = found["preferences"]
    assert (preferred["pairs"], preferred["prompts"], preferred["beta"]) == (16, 16, 0.3)
    assert preferred["accuracy"]["value"] > preferred["reference_accuracy"]["value"]
    assert preferred["reward_accuracy"]["value"] > 0.9
    # What the run itself measured at its end, on the same rows.
    own = json.loads((runs / "dpo" / "summary.json").read_text())["eval"]
    assert preferred["reward_accuracy"]["value"] == pytest.approx(own["rewards/accuracies"])
    assert preferred["reward_margin"]["value"] == pytest.approx(own["rewards/margins"], rel=1e-5)
    assert preferred["accuracy"]["value"] == pytest.approx(own["logps/accuracies"])
    assert preferred["margin"]["value"] == pytest.approx(own["logps/margins"], rel=1e-4)
    assert found["divergence"]["per_answer"] > 2 * found["divergence"]["standard_error"] > 0
    assert found["divergence"]["answers"] == 64
    assert found["wins"]["rate"]["low"] > 0.5
    assert found["wins"]["reward_gain"]["low"] > 0
    scores = [one["score"]["value"] for one in found["best_of"]]
    assert scores == sorted(scores)
    assert len(scores) == 4
    assert scores[0] == pytest.approx(found["wins"]["reward"])
    assert found["best_of"][3]["kl_at_most"] == pytest.approx(0.636294, abs=1e-6)
    assert found["perplexity"]["documents"] == 3

    # The answers that are written are those that the numbers are of.
    rows = read_rows(output / "answers.jsonl")
    assert len(rows) == 16
    outcomes = [
        0.5 * (1 + np.sign(ours["score"] - theirs["score"]))
        for row in rows
        for i, ours in enumerate(row["policy"])
        for j, theirs in enumerate(row["reference"])
        if i != j
    ]
    assert np.mean(outcomes) == pytest.approx(found["wins"]["rate"]["value"])


def sequence_logp(model, tokens, start):
    """Log-prob of `tokens` from `start` on, from stock mlx-lm's full logits."""
    logits = model(mx.array([tokens[:-1]]))[0].astype(mx.float32)
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    picked = mx.take_along_axis(logps, mx.array(tokens[1:])[:, None], axis=-1)[:, 0]
    return float(picked[start - 1 :].sum())


def test_numbers_agree_with_two_separate_models(runs, data, text, evaluate):
    found = evaluate(runs / "dpo", "--perplexity-data", text)
    policy, tokenizer = mlx_lm_load(str(TINY_MODEL), adapter_path=str(runs / "dpo"))
    reference, _ = mlx_lm_load(str(TINY_MODEL))
    sums = {"policy": [], "reference": []}
    pairs, _ = read_pairs(str(data), "valid", None)
    groups, _ = tokenize_groups(pairs, tokenizer, max_seq_length=99)
    for group in groups:
        for completion in group.completions:
            whole = [*group.prompt.tolist(), *completion.tolist()]
            for name, model in (("policy", policy), ("reference", reference)):
                sums[name].append(sequence_logp(model, whole, len(group.prompt)))
    ours, theirs = (np.array(sums[name]).reshape(-1, 2) for name in ("policy", "reference"))
    preferred = found["preferences"]
    assert preferred["margin"]["value"] == pytest.approx((ours @ [1, -1]).mean(), abs=1e-4)
    gap = ours - theirs
    assert preferred["reward_margin"]["value"] == pytest.approx(
        0.3 * (gap @ [1, -1]).mean(), abs=1e-4
    )
    assert preferred["chosen_change"]["value"] == pytest.approx(gap[:, 0].mean(), abs=1e-4)
    nats, count = [0.0, 0.0], 0
    for document in text.read_text().split("\n\n"):
        ids = tokenizer.encode(document)
        count += len(ids) - 1
        for k, model in enumerate((policy, reference)):
            nats[k] -= sequence_logp(model, ids, 1)
    assert found["perplexity"]["tokens"] == count
    assert found["perplexity"]["nats_per_token"] == pytest.approx(nats[0] / count, abs=1e-5)
    change = (nats[0] - nats[1]) / count
    assert found["perplexity"]["change"]["value"] == pytest.approx(change, abs=1e-5)


def test_kl_is_the_mean_log_ratio_of_own_answers(runs, evaluate):
    """Two draws of many short answers agree within their errors, and KL is not negative."""
    more = ("--samples", 16, "-n", 8)
    found = [evaluate(runs / "dpo", *more, "--seed", seed)["divergence"] for seed in (0, 1)]
    error = np.hypot(*(one["standard_error"] for one in found))
    assert found[0]["per_answer"] != found[1]["per_answer"]
    assert abs(found[0]["per_answer"] - found[1]["per_answer"]) < 4 * error


def test_the_reference_is_where_the_run_started(tmp_path, data, evaluate, refused):
    init = saved_adapter(tmp_path / "init", change=away)
    config = DPOConfig(model=str(TINY_MODEL), data=str(data), init_adapter=str(init))
    layout = AdapterLayout(rank=24, scale=1.0)
    later = tmp_path / "later"
    later.mkdir()
    # The init adapter as a run of another rank and scale holds it, untrained.
    model = load_module(TINY_MODEL)
    fresh = install_adapters(model, layout)
    save_adapter(later, load_adapter(init, fresh, layout), layout, str(TINY_MODEL))
    (later / "config.yaml").write_text(to_yaml(config))
    found = evaluate(later)
    assert_unmoved(found)
    assert found["reference"].endswith(str(init))
    # Without the run's word for it the bare base is the reference.
    (later / "config.yaml").unlink()
    moved = evaluate(later, "--data", data)
    assert abs(moved["preferences"]["chosen_change"]["value"]) > 0.01
    (later / "config.yaml").write_text(to_yaml(config))
    shutil.rmtree(init)
    line = refused("--model", TINY_MODEL, "--adapter-path", later)
    assert f"started from --init-adapter {init}, which does not exist" in line


@pytest.mark.parametrize("splits", [True, False])
@pytest.mark.parametrize("kind", ["dpo", "kto", "sft"])
def test_held_out_rows_are_those_of_the_run(tmp_path, data, kind, splits):
    where = data if splits else data / "train.jsonl"
    more = {"model": str(TINY_MODEL), "data": str(where), "valid_fraction": 0.2, "seed": 3}
    config, task = {
        "dpo": (DPOConfig(**more), DPO),
        "kto": (KTOConfig(**more, loss="kto"), KTO),
        "sft": (SFTConfig(**more), SFT),
    }[kind]
    finished = read_trained_run(saved_adapter(tmp_path / "run", config=config))
    assert finished.command == kind
    found = read_held_out_data(finished, None, None)
    folder = open_model(str(TINY_MODEL))
    own = prepare_data(config, folder, task(config).read).valid
    decode = folder.tokenizer.decode
    questions = {group.prompt[0].content for group in found.prompts}
    assert len(questions) == len(found.prompts) == len(found.pairs) == (16 if splits else 8)
    asked = {decode(group.prompt.tolist()) for group in own}
    assert len(asked) == len(questions)
    assert all(any(question in text for text in asked) for question in questions)


def test_other_data_and_prompts_alone(tmp_path, runs, evaluate, capsys):
    prompts = [{"prompt": pair("other", i)["prompt"]} for i in range(9)]
    found = evaluate(runs / "dpo", "--data", write_rows(tmp_path / "prompts.jsonl", prompts))
    assert found["preferences"] is None
    assert found["divergence"]["prompts"] == 6
    strings = [{"prompt": f"Is sun {i} good?", "chosen": " yes", "rejected": " no"} for i in (1, 2)]
    file = write_rows(tmp_path / "strings.jsonl", strings)
    found = evaluate(runs / "dpo", "--data", file, "--reward-model", runs / "rm", "-n", 1)
    assert found["preferences"]["pairs"] == found["wins"]["prompts"] == 2
    assert any("2 prompts are few" in warning for warning in found["warnings"])
    where = ("--model", TINY_MODEL, "--adapter-path", runs / "dpo", *QUICK)
    assert mlx_align("eval", *where, "--data", tmp_path / "prompts.jsonl") == 0
    shown = capsys.readouterr().out
    assert "Held-out pairs: none in the data" in shown
    assert "Win rate: not measured; it needs a judge, --reward-model." in shown


def test_rows_that_were_trained_on_are_called_that(data, runs):
    run = read_trained_run(runs / "dpo")
    trained = read_held_out_data(run, str(data / "train.jsonl"), None)
    assert trained.trained == len(trained.prompts) > 0
    assert trained.title.endswith("(trained on: all of the prompts)")
    (warning,) = trained_on_warning(trained.trained, len(trained.prompts))
    assert f"{trained.trained} of the {trained.trained} prompts are in the run's" in warning
    held_out = read_held_out_data(run, str(data / "valid.jsonl"), None)
    assert (held_out.trained, trained_on_warning(0, len(held_out.prompts))) == (0, ())


def test_a_text_completion_continues_its_prompt():
    folder = open_model(str(TINY_MODEL))
    encode, end = folder.tokenizer.encode, min(folder.tokenizer.eos_token_ids)
    for prompt, answer in (("Is the sun good?", " yes, it is"), ("ab", "cd e"), ("Say:\n", "\nno")):
        asked, whole = encode(prompt), encode(prompt + answer)
        assert whole[: len(asked)] == asked
        tokens = TokenizedGroup(np.array(asked, np.int32), (), "one")
        question = EvalPrompt(PromptGroup(prompt, (), "one"), tokens)
        rest = whole[len(asked) :]
        for drawn, ended in ((rest, False), ([*rest, end], True)):
            one = Generated(drawn, [0.0] * len(drawn), ended)
            assert completion_text(folder, question, one) == answer
        chat = EvalPrompt(PromptGroup((Message("user", prompt),), (), "one"), tokens)
        assert completion_text(folder, chat, Generated(rest, [], False)) == answer.strip()


def test_printed_scorecard(runs, text, capsys):
    where = ("--model", TINY_MODEL, "--adapter-path", runs / "dpo", *QUICK)
    more = ("--reward-model", runs / "rm", "--perplexity-data", text)
    assert mlx_align("eval", *where, *more) == 0
    shown = capsys.readouterr().out
    for words in (
        "against the base model",
        "16 pairs of 16 prompts",
        "reward margin (β = 0.3)",
        "KL from the reference: ",
        "Win rate against the reference: ",
        "at equal length: ",
        "(80% power, 5%)",
        "best of",
        "what alignment cost on other text",
        "! 6 prompts are few",
    ):
        assert words in shown
    number = r"-?\d+\.\d\d"
    assert re.search(rf"KL from the reference: {number} \({number} to {number}\) nats", shown)
    assert max(map(len, shown.splitlines())) < 140


def test_a_checkpoint_can_be_evaluated(runs):
    (checkpoint,) = (runs / "dpo" / "checkpoints").iterdir()
    found = read_trained_run(checkpoint)
    assert (found.command, found.beta, found.folder) == ("dpo", 0.3, checkpoint)


def test_the_policy_is_freed_before_the_reward_model_is_loaded(runs, evaluate, monkeypatch):
    from mlx_align.evaluation import policy as policy_module

    before, sizes = mx.get_active_memory(), []
    original = policy_module._free_memory

    def let_go():
        original()
        sizes.append(mx.get_active_memory() - before)

    monkeypatch.setattr(policy_module, "_free_memory", let_go)
    evaluate(runs / "dpo", "--reward-model", runs / "rm")
    assert len(sizes) == 2
    assert max(sizes) < 20_000  # the model has 200 kB


def test_errors_are_one_line(tmp_path, data, runs, refused):
    model = ("--model", TINY_MODEL)
    dpo = (*model, "--adapter-path", runs / "dpo")
    unnamed = tmp_path / "unnamed"
    shutil.copytree(runs / "dpo", unnamed)
    (unnamed / "adapter_config.json").write_text("{}")
    assert "--model is missing" in refused("--adapter-path", unnamed)
    assert "give a run (a folder that mlx-align wrote)" in refused(*model)
    assert "no such folder" in refused(*model, "--adapter-path", tmp_path / "nowhere")
    assert "not an adapter folder" in refused(*model, "--adapter-path", data)
    assert "mlx-align score" in refused(*model, "--adapter-path", runs / "rm")
    assert "-n 0: out of range" in refused(*dpo, "-n", 0)
    bare = saved_adapter(tmp_path / "bare")
    assert "no config.yaml that names its data" in refused(*model, "--adapter-path", bare)
    assert "gone.jsonl" in refused(*dpo, "--data", tmp_path / "gone.jsonl")
    assert "neither a run of mlx-align reward" in refused(*dpo, "--reward-model", TINY_MODEL)
    nowhere = tmp_path / "nowhere"
    line = refused(*dpo, "--reward-model", nowhere)
    assert line.startswith(f"error: --reward-model {nowhere}: no such folder")
    assert "gone.txt" in refused(*dpo, "--perplexity-data", tmp_path / "gone.txt")
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n\n ")
    assert "contains no text" in refused(*dpo, "--perplexity-data", empty)
    nothing = DPOConfig(model=str(TINY_MODEL), data=str(data / "train.jsonl"), valid_fraction=0.0)
    none = saved_adapter(tmp_path / "none", config=nothing)
    assert "held no rows out" in refused(*model, "--adapter-path", none)
    long = (*dpo, "--max-seq-length", 2)
    assert "--max-seq-length 2" in refused(*long)
    broken = write_rows(tmp_path / "broken.jsonl", [pair("a", 0), {"prompt": "b", "chosen": "c"}])
    assert "broken.jsonl:2" in refused(*dpo, "--data", broken)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "evaluation.json").write_text("{}")
    assert "already" in refused(*dpo, "--output", tmp_path / "out")


def test_an_interrupted_evaluation_continues(tmp_path, runs, text, evaluate, monkeypatch, capsys):
    """The same bytes as one that was never stopped, and no part is computed again."""
    more = ("--reward-model", runs / "rm", "--perplexity-data", text, "--json")
    command = ("eval", "--model", TINY_MODEL, "--adapter-path", runs / "dpo", *QUICK, *more)
    monkeypatch.setattr(policy, "COMPLETIONS_AT_ONCE", 6)
    monkeypatch.setattr(policy, "PROMPTS_AT_ONCE", 4)
    monkeypatch.setattr(policy, "BATCH_TOKENS", 256)
    names, add = [], FinishedParts.add

    def counted(self, *name, value):
        names.append(name)
        add(self, *name, value=value)

    monkeypatch.setattr(FinishedParts, "add", counted)
    assert mlx_align(*command, "--output", tmp_path / "whole") == 0
    expected, printed = sorted(map(str, names)), capsys.readouterr().out
    assert len({name[0] for name in names}) == 6
    assert len(names) >= 12
    names.clear()
    folder = tmp_path / "out"
    resumed = (*command, "--output", folder)
    for n, resume in ((1, ()), (3, ("--resume",)), (len(expected) // 2, ("--resume",))):
        with monkeypatch.context() as patched:
            before_call(patched, KeyedLog, "add", n + 1, interrupt)
            assert mlx_align(*resumed, *resume) == 130
        error = capsys.readouterr().err
        assert (f"stopped; {folder} keeps what is finished" in error) == (n > 1)
        assert folder.exists() == (n > 1)
        assert not list(folder.glob("evaluation.json"))
        if n > 1:
            assert mlx_align(*resumed) == 1
            assert "has an unfinished evaluation; add --resume" in capsys.readouterr().err
            assert mlx_align(*resumed, "--resume", "--seed", 3) == 1
            assert "--resume: --seed changed since" in capsys.readouterr().err
    with (folder / "evaluation.partial.jsonl").open() as log:
        fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert mlx_align(*resumed, "--resume") == 1
        assert "another command is writing it" in capsys.readouterr().err
    assert mlx_align(*resumed, "--resume") == 0
    assert capsys.readouterr().out == printed
    assert sorted(path.name for path in folder.iterdir()) == ["answers.jsonl", "evaluation.json"]
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()
    # Those that were interrupted as they were written are there twice.
    assert sorted(set(map(str, names))) == expected
    assert len(names) == len(expected) + 3
    assert mlx_align(*resumed, "--resume") == 1
    assert "has evaluation.json already" in capsys.readouterr().err


def test_a_run_on_another_base_is_refused(tmp_path, refused):
    other = saved_adapter(tmp_path / "other", AdapterLayout(keys=("self_attn.q_proj",)))
    weights = mx.load(str(other / "adapters.safetensors"))
    name = next(iter(weights))
    del weights[name]
    mx.save_safetensors(str(other / "adapters.safetensors"), weights)
    write_rows(tmp_path / "data.jsonl", [pair("a", i) for i in range(3)])
    where = ("--model", TINY_MODEL, "--adapter-path", other, "--data", tmp_path / "data.jsonl")
    line = refused(*where)
    assert f"can't be used with --model {TINY_MODEL}; is that its base model?" in line
    assert f"{name} is missing" in line
    weights[name] = mx.zeros((3, 3))
    mx.save_safetensors(str(other / "adapters.safetensors"), weights)
    assert "has shape (3, 3)" in refused(*where)
