"""`mlx_align.dpo(...)` and the other functions: the same runs as the commands, from Python."""

import inspect
import json
import os
import pydoc
import signal
import subprocess
import sys
import types
import typing

import mlx.core as mx
import pytest
from datasets import Dataset, DatasetDict

import mlx_align as ma
from mlx_align import api
from mlx_align.cli.main import run as command_line
from mlx_align.config import TRAINING_CONFIGS, keywords
from mlx_align.config.schema import declared_options
from mlx_align.config.spelling import python_spelling
from mlx_align.system import console


def adapter(run):
    return (run.path / "adapters.safetensors").read_bytes()


def as_arguments(options):
    """Options as on the command line."""
    found = []
    for name, value in options.items():
        if name != "progress":
            found += [f"--{name.replace('_', '-')}", str(value)]
    return found


# --- importing ---


def test_importing_is_light_and_sets_the_evaluation_order():
    program = (
        "import os, sys; import mlx_align as ma\n"
        "heavy = ('mlx', 'mlx_lm', 'datasets', 'pydantic', 'transformers', 'click', 'rich')\n"
        "assert not [name for name in heavy if name in sys.modules], sys.modules.keys()\n"
        "assert os.environ['MLX_BFS_MAX_WIDTH'] == '1'\n"
        "assert set(ma.__all__) <= set(dir(ma))\n"
        "assert all(getattr(ma, name) is getattr(ma, name) for name in ma.__all__)\n"
    )
    environment = {**os.environ, "MLX_BFS_MAX_WIDTH": "1"}
    del environment["MLX_BFS_MAX_WIDTH"]
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'ipo'"):
        _ = ma.ipo


# --- the same runs as the commands ---


def test_a_run_has_the_bytes_of_the_command(tiny, pairs, small, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    options = {**small, "model": tiny, "lora_rank": 4, "beta": 0.3}
    arguments = as_arguments({**options, "data": file, "output": "command"})
    assert command_line(["dpo", *arguments]) == 0
    from_file = ma.dpo(data=file, output="file", **options)
    again = ma.dpo(data=pairs, output="list", **options)
    expected = (tmp_path / "command" / "adapters.safetensors").read_bytes()
    assert adapter(from_file) == adapter(again) == expected
    assert from_file.config.beta == 0.3


def test_data_of_every_kind(tiny, pairs, small):
    train, valid = pairs[:16], pairs[16:]
    kinds = {
        "lists": {"train": train, "valid": valid},
        "datasets": DatasetDict(
            {"train": Dataset.from_list(train), "validation": Dataset.from_list(valid)}
        ),
    }
    runs = [ma.dpo(model=tiny, data=data, output=name, **small) for name, data in kinds.items()]
    assert adapter(runs[0]) == adapter(runs[1])
    single = Dataset.from_list(pairs)
    assert adapter(ma.dpo(model=tiny, data=single, output="dataset", **small)) == adapter(
        ma.dpo(model=tiny, data=pairs, output="list", **small)
    )


def test_sft_and_kto_train_on_objects_too(tiny, pairs, small):
    demonstrations = [{"messages": row["prompt"] + row["chosen"]} for row in pairs]
    run = ma.sft(model=tiny, data=demonstrations, output="sft", loss_on="assistant", **small)
    assert run.command == "sft"
    assert run.metrics["eval/perplexity"] > 0
    data = {"train": pairs[:12], "valid": pairs[12:]}
    start = ma.kto(model=tiny, data=data, output="kto", init_adapter=run, **small)
    assert start.config.init_adapter == "sft"


def test_options_from_a_yaml_file(tiny, pairs, small, tmp_path):
    (tmp_path / "run.yaml").write_text(f"model: {tiny}\nbeta: 0.5\nlora_rank: 4\n")
    run = ma.dpo(config="run.yaml", data=pairs, output="run", beta=0.2, **small)
    assert (run.config.beta, run.config.lora_rank) == (0.2, 4)


# --- Run ---


@pytest.fixture
def run(tiny, pairs, small):
    """A finished dpo run."""
    return ma.dpo(model=tiny, data=pairs, output="runs/first", **small)


def test_a_run_has_what_its_folder_holds(run, tmp_path):
    assert str(run.path) == "runs/first"
    assert run.adapter_path == run.path
    assert os.fspath(run) == "runs/first"
    assert run.command == "dpo"
    assert run.config.iters == 3
    assert run.summary["steps"] == 3
    assert [row["step"] for row in run.history] == [0, 1, 3, 3]
    assert run.metrics["step"] == 3
    assert run.metrics["loss"] == run.history[2]["loss"]
    accuracy = run.metrics["eval/rewards/accuracies"]
    assert accuracy == run.summary["eval"]["rewards/accuracies"]
    assert run.verdict.sentence == run.summary["verdict"]["sentence"]
    assert run.report() == run.path / "report.html"
    opened = ma.load_run(run.path)
    assert opened.metrics == run.metrics
    assert "finished after 3 updates" in repr(opened)
    assert "rewards/accuracies" in repr(opened)
    html = opened._repr_html_()
    assert 'href="runs/first/report.html"' in html
    assert "<script" not in html


def test_a_run_generates_scores_and_ranks(run, tiny):
    text = run.generate("Is it good?", max_tokens=4)
    assert text == run.generate([{"role": "user", "content": "Is it good?"}], max_tokens=4)
    assert text != run.generate("Is it good?", max_tokens=4, apply_chat_template=False)
    ranked = run.rerank("Is it good?", n=4, max_tokens=4)
    assert sum(one.count for one in ranked) == 4
    assert [one.score for one in ranked] == sorted((one.score for one in ranked), reverse=True)
    # One model serves both: generating does not load it again.
    assert run.generate("Is it good?", max_tokens=4) == text
    scores = run.score("Is it good?", ["yes", "no never"])
    reranker = ma.Reranker.load(tiny, run.path)
    messages = [{"role": "user", "content": "Is it good?"}]
    assert scores == reranker.scorer.score(messages, ["yes", "no never"])
    assert run.score("Is it good?", ["yes"], beta=0.2)[0] == pytest.approx(2 * scores[0], rel=1e-5)
    run.release()
    with pytest.raises(ma.ModelError, match="is a run of dpo, not a reward model"):
        _ = run.reward_model


def test_a_run_is_evaluated_on_what_it_held_out(run, pairs, capsys, tmp_path):
    options = {"samples": 2, "n": 2, "sample_tokens": 4, "progress": False}
    found = run.evaluate(**options)
    assert found["data"] == "data, the part that the run held out"
    assert found["preferences"]["pairs"] == 4
    assert ma.evaluate(adapter_path=run, **options) == found
    with pytest.raises(ma.ConfigError, match=r"^data is missing: .* data passed from Python"):
        ma.load_run(run.path).evaluate(**options)
    assert ma.load_run(run.path, data=pairs).evaluate(**options) == found
    other = ma.load_run(run.path).evaluate(data={"valid": pairs[:3]}, output="eval", **options)
    assert other["preferences"]["pairs"] == 3
    assert json.loads((tmp_path / "eval" / "evaluation.json").read_text()) == other
    assert capsys.readouterr().out == ""


def test_fuse_and_plan_return_what_the_commands_print(run, tiny, pairs, capsys, tmp_path):
    report = run.fuse("fused")
    arguments = ["--model", tiny, "--adapter-path", "runs/first", "--output", "again", "--json"]
    assert command_line(["fuse", *arguments]) == 0
    assert json.loads(capsys.readouterr().out) == {**report, "output": "again"}
    assert report["output"] == "fused"
    assert (tmp_path / "fused" / "config.json").is_file()
    planned = ma.plan("kto", model=tiny, data=pairs, batch_size=2)
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    arguments = ["--model", tiny, "--data", str(file), "--batch-size", "2", "--json"]
    assert command_line(["plan", "--command", "kto", *arguments]) == 0
    assert json.loads(capsys.readouterr().out) == planned


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ma.ConfigError, match="no such folder"):
        ma.load_run("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ma.ConfigError, match="give the output folder of a run"):
        ma.load_run("empty")


# --- functions as options ---


def hinge(logps: ma.PairLogps, *, beta: float = 0.1) -> mx.array:
    return mx.maximum(0.0, 1 - beta * (logps.chosen_logratio - logps.rejected_logratio))


def sigmoid(logps: ma.PairLogps, *, beta: float = 0.1) -> mx.array:
    return hinge(logps, beta=beta)


def test_a_loss_function_has_the_bytes_of_the_same_loss(tiny, pairs, small):
    named = ma.dpo(model=tiny, data=pairs, output="named", loss="hinge", beta=0.2, **small)
    own = ma.dpo(model=tiny, data=pairs, output="own", loss=hinge, beta=0.2, **small)
    # A function's name does not select the loss of that name.
    other = ma.dpo(model=tiny, data=pairs, output="other", loss=sigmoid, beta=0.2, **small)
    assert adapter(own) == adapter(named) == adapter(other)
    assert own.config.loss == "hinge()"
    assert own.score("q", ["a"], beta=0.2) == named.score("q", ["a"])
    with pytest.raises(ma.ConfigError, match=r"loss hinge\(\) was passed from Python.*loss=…"):
        ma.dpo(resume="own", data=pairs, progress=False)
    assert adapter(ma.dpo(resume="own", data=pairs, loss=hinge, progress=False)) == adapter(own)
    with pytest.raises(ma.ConfigError, match=r"data was passed from Python.*resume='named'"):
        ma.dpo(resume="named")


def test_rewards_are_functions_and_specs(tiny, prompts, sampling):
    seen = []

    def length(prompts, completions, completion_ids, answer):
        seen.append((prompts, completions, completion_ids, answer))
        return [float(len(ids)) for ids in completion_ids]

    def wrong(prompts, completions, **columns):
        assert columns.keys() == {"answer"}
        return [0.0 for _ in completions]

    options = {"model": tiny, "data": prompts, **sampling}
    run = ma.grpo(
        reward=[(length, 0.5), "length(target=4)=0.2"], eval_reward=wrong, output="run", **options
    )
    prompt, completions, ids, answers = (one[0] for one in seen[0])
    assert prompt[0]["content"] == f"What is {int(answers) - 1} + 1?"
    assert isinstance(completions, str)
    assert len(ids) <= 6
    assert run.config.reward == ("length(target=4)=0.2",)
    assert "rewards/length_2/mean" in run.metrics
    assert run.metrics["eval/held_out"] == 0
    with pytest.raises(ma.ConfigError, match=r"reward .* passed from Python.*reward=…"):
        ma.grpo(resume="run", data=prompts, progress=False)
    again = ma.grpo(
        resume="run",
        data=prompts,
        reward=[(length, 0.5), "length(target=4)=0.2"],
        eval_reward=wrong,
        progress=False,
    )
    assert adapter(again) == adapter(run)


def test_several_functions_are_normalised_each(tiny, prompts, sampling):
    def one(completions):
        return [float(len(text)) for text in completions]

    def two(completions):
        return [float(len(set(text))) for text in completions]

    run = ma.grpo(
        model=tiny,
        data=prompts,
        reward=[one, two],
        multi_objective_aggregation="normalize_then_sum",
        output="run",
        **sampling,
    )
    assert {"rewards/one/mean", "rewards/two/mean"} <= run.metrics.keys()


def test_a_reward_run_scores_and_is_a_reward_model(tiny, pairs, prompts, small, sampling):
    rm = ma.reward(model=tiny, data=pairs, output="rm", **small)
    messages = [{"role": "user", "content": "Is it good?"}]
    scores = rm.score("Is it good?", ["yes", "no"])
    assert scores == rm.reward_model.score(messages, ["yes", "no"])
    run = ma.ppo(model=tiny, data=prompts, reward_model=rm, output="ppo", **sampling)
    assert run.config.reward_model == "rm"
    assert "reward" in run.metrics
    ranked = run.rerank("Is it good?", n=2, max_tokens=4, reward_model=rm)
    assert ranked[0].policy_logp is None
    with pytest.raises(ma.MlxAlignError, match="generates no text"):
        rm.generate("Is it good?")
    with pytest.raises(ma.ConfigError, match="a run of ppo has no β"):
        run.score("Is it good?", ["yes"])


# --- callbacks, interrupts, resuming ---


class Recorder(ma.Callback):
    def __init__(self, stop_at=None, interrupt_at=None):
        self.events, self.stop_at, self.interrupt_at = [], stop_at, interrupt_at

    def on_train_begin(self, progress, total_steps):
        self.events.append(("begin", total_steps))

    def on_step_end(self, step, metrics):
        self.events.append(("step", step))
        if step == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        return step == self.stop_at

    def on_evaluate(self, step, metrics):
        self.events.append(("evaluate", step, metrics["loss"] > 0))

    def on_run_end(self, summary):
        self.events.append(("end", summary["steps"]))


def test_callbacks_are_called_and_can_stop(tiny, pairs, small):
    recorder = Recorder(stop_at=2)
    run = ma.dpo(model=tiny, data=pairs, output="run", callbacks=[recorder], **small)
    assert recorder.events == [
        ("begin", 3),
        ("evaluate", 0, True),
        ("step", 1),
        ("step", 2),
        ("evaluate", 2, True),
        ("end", 2),
    ]
    assert run.summary["steps"] == 2


def test_callbacks_of_other_libraries_are_refused(tiny, pairs, small):
    with pytest.raises(ma.ConfigError, match=r"callbacks: object is not .* mlx_align\.trl"):
        ma.dpo(model=tiny, data=pairs, callbacks=[object()], **small)


def test_an_interrupted_run_is_resumed_to_the_same_bytes(tiny, pairs, small, capsys):
    whole = ma.dpo(model=tiny, data=pairs, output="whole", **small)
    with pytest.raises(KeyboardInterrupt):
        ma.dpo(
            model=tiny,
            data=pairs,
            output="run",
            callbacks=[Recorder(interrupt_at=2)],
            **{**small, "progress": True},
        )
    assert "resume with: mlx_align.dpo(resume='run', data=…)" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    stopped = ma.load_run("run", data=pairs)
    assert stopped.summary == {}
    assert "interrupted after 2 updates" in repr(stopped)
    resumed = stopped.resume(save_every=2, progress=False)
    assert adapter(resumed) == adapter(whole)
    assert [row["step"] for row in resumed.history] == [0, 1, 3, 3]
    with pytest.raises(ma.ConfigError, match=r"^beta=0.7: the run has 0.1"):
        stopped.resume(beta=0.7)
    with pytest.raises(ma.ConfigError, match="config and resume"):
        ma.dpo(resume="run", config="run/config.yaml")


# --- errors and messages ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": -1}, "beta=-1: out of range; must be above 0"),
        ({"bta": 0.1}, "unknown option bta; did you mean beta?"),
        ({"loss": "sigmod"}, "loss='sigmod': unknown"),
        ({"wpo": True, "loss": "aot"}, "wpo=True can't be combined with loss='aot'"),
        ({"lora_keys": "self_attn.x"}, "lora_keys='self_attn.x': no such layer"),
        ({"model": "nowhere"}, "model='nowhere': no such folder"),
        ({"data": "nowhere.jsonl"}, "data='nowhere.jsonl': no such file"),
        ({"data": None}, "data is missing"),
        ({"data": 3}, "data is of type int"),
        ({"data": [{"prompt": "q", "chosen": "a"}]}, "data"),
        ({"output": "taken"}, "output='taken': already contains another run"),
        ({"fine_tune_type": "full", "lora_rank": 3}, "lora_rank: has no effect on fine_tune_type"),
    ],
)
def test_errors_name_keywords(options, said, tiny, pairs, small, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.yaml").write_text("")
    with pytest.raises(ma.MlxAlignError) as error:
        ma.dpo(**{"model": tiny, "data": pairs, **small, **options})
    assert said in str(error.value)
    assert "--" not in str(error.value)
    assert "\n" not in str(error.value)


def test_on_policy_errors_name_keywords(tiny, prompts, sampling):
    options = {"model": tiny, "data": prompts, **sampling}
    with pytest.raises(ma.ConfigError, match=r"^reward or reward_model is missing"):
        ma.grpo(**options)
    with pytest.raises(ma.ConfigError, match=r"^batch_tokens can't be used here"):
        ma.grpo(**{**options, "batch_size": None}, batch_tokens=64, reward="length")

    def broken(completions):
        raise RuntimeError("oh")

    with pytest.raises(ma.TrainingError, match="reward function broken: raised RuntimeError: oh"):
        ma.grpo(reward=broken, output="run", **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--beta -1: must be above 0", "beta=-1: must be above 0"),
        ("give --batch-size or --epochs 2.", "give batch_size or epochs=2."),
        ("--no-guard has no effect", "guard=False has no effect"),
        ("--sum: leave it out", "per_token=False: leave it out"),
        ("--force starts it anyway", "force=True starts it anyway"),
        ("mlx-align dpo --resume runs/a", "mlx_align.dpo(resume='runs/a')"),
        ("data[3]: the prompt --x y", "data[3]: the prompt --x y"),
        ("--loss online_dpo; drop it", "loss='online_dpo'; drop it"),
        ("--loss-option gamma: unknown", "loss_option gamma: unknown"),
        ("a--beta b", "a--beta b"),
    ],
)
def test_spelling(text, expected):
    assert python_spelling(text) == expected


def test_progress_is_shown_or_not(tiny, pairs, small, capsys):
    ma.dpo(model=tiny, data=pairs, output="silent", **small)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    ma.dpo(model=tiny, data=pairs, output="shown", **{**small, "progress": True})
    out = capsys.readouterr().out
    for part in ("update 3/3", "held-out after 3", "Held-out data", "Run folder: shown"):
        assert part in out
    assert "mlx-align dpo" not in out


def test_without_model_and_data_the_starter_is_trained(small, capsys):
    run = ma.dpo(**{**small, "progress": True, "iters": 1}, output="run")
    assert "No model and no data: training the starter." in capsys.readouterr().out
    assert run.summary["steps"] == 1


class FakeDisplay:
    def __init__(self, shown):
        self.shown = shown

    def update(self, html):
        self.shown.append(html)


def test_progress_in_a_notebook_is_one_output(monkeypatch, capsys):
    shown = []

    def display(html, display_id):
        assert display_id is True
        shown.append(html)
        return FakeDisplay(shown)

    kernel = types.SimpleNamespace(kernel=object())
    ipython = types.SimpleNamespace(get_ipython=lambda: kernel)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(
        sys.modules, "IPython.display", types.SimpleNamespace(display=display, HTML=str)
    )
    monkeypatch.setattr(console._NotebookBar, "EVERY_SECONDS", 0.0)
    terminal = console.Console()
    with terminal.bar("DPO <b>", 4) as bar:
        bar.advance()
        bar.advance(2)
        terminal.note("! a warning")
    counts = [html.split("</progress> ")[1][:3] for html in shown[:3]]
    assert counts == ["0/4", "1/4", "3/4"]
    assert "DPO &lt;b&gt;" in shown[0]
    assert shown[-1] == ""
    assert capsys.readouterr().out == "! a warning\n"


# --- signatures ---


@pytest.mark.parametrize("name", [*TRAINING_CONFIGS, "evaluate", "fuse", "plan"])
def test_help_describes_every_option(name):
    function = getattr(ma, name)
    configs = {"evaluate": "EvalConfig", "fuse": "FuseConfig", "plan": "PlanConfig"}
    config = TRAINING_CONFIGS.get(name) or getattr(api, configs[name])
    signature = inspect.signature(function)
    text = pydoc.render_doc(function, renderer=pydoc.plaintext)
    for option, declared in declared_options(config).items():
        assert option in signature.parameters
        assert f"{option}: " in text
        if not declared.required and option != "command":
            assert signature.parameters[option].default == declared.default
    assert "--" not in function.__doc__.replace("--json", "")
    assert "Returns:" in text
    assert "Raises:" in text


@pytest.mark.parametrize("name", TRAINING_CONFIGS)
def test_types_for_editors_have_the_options_of_the_schema(name):
    hints = typing.get_type_hints(getattr(api, name))
    (options,) = typing.get_args(hints["options"])
    assert options.__name__ == f"{TRAINING_CONFIGS[name].__name__.removesuffix('Config')}Options"
    assert options is getattr(keywords, options.__name__)
    assert set(options.__annotations__) == set(declared_options(TRAINING_CONFIGS[name]))
    own = set(inspect.signature(getattr(api, name)).parameters) - set(options.__annotations__)
    assert own == {"resume", "accept_changed", "config", "callbacks", "progress"}
