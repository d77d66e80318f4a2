"""The plan of a run: headers, memory by part, advice, machines, the refusal, and the page."""

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import pytest
from helpers.paths import TINY_MODEL

from mlx_align.cli.main import run
from mlx_align.config import GRPOConfig
from mlx_align.data.buckets import BatchLimit, Shape
from mlx_align.errors import ConfigError, ModelError
from mlx_align.models import loading
from mlx_align.models.adapters import AdapterLayout, install_adapters
from mlx_align.models.loading import load_module, read_model_config
from mlx_align.planning import plan as plan_module
from mlx_align.planning.advice import advise
from mlx_align.planning.duration import rollout_batches
from mlx_align.planning.machine import Machine, parse_machine, platform_warnings, this_machine
from mlx_align.planning.memory import PARTS, Sampling, Workload, plan_memory, trained_parameters
from mlx_align.planning.model_shape import Linear, ModelShape, read_header, read_model_shape
from mlx_align.planning.plan import attention_on
from mlx_align.system.memory_limit import headroom_bytes

GIB = 2**30


def seven_b(bits=4):
    """Qwen2.5-7B, 4-bit unless told otherwise (16: not quantised)."""
    d, f, kv, v, blocks = 3584, 18944, 512, 152064, 28
    names = (("q", d, d), ("k", d, kv), ("v", d, kv), ("o", d, d), ("gate", d, f), ("up", d, f))
    linears = tuple(
        Linear(block, name, inputs, outputs, 1)
        for block in range(blocks)
        for name, inputs, outputs in (*names, ("down", f, d))
    )
    width = (bits + 0.5 if bits < 16 else 16) / 8
    linear_bytes = int(width * sum(linear.inputs * linear.outputs for linear in linears))
    weights = linear_bytes + int(2 * v * d * width)
    return ModelShape(
        weights, blocks, d, f, 28, kv, d, v, 2, "BF16", bits < 16, bits, linears, linear_bytes
    )


PAIR = Workload((Shape(512, 512, 1),), accumulation=8)


def test_header_is_read_without_the_weights(tmp_path):
    file = tmp_path / "model.safetensors"
    mx.save_safetensors(
        str(file), {"a": mx.zeros((3, 5)), "b": mx.zeros((4,), mx.bfloat16)}, {"format": "mlx"}
    )
    header = read_header(file)
    assert header["a"] == ("F32", (3, 5), 60)
    assert header["b"] == ("BF16", (4,), 8)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 16, (4).to_bytes(8, "little") + b"[1]]", b"\x02" + b"\0" * 7 + b"{]"]
)
def test_a_damaged_header_is_refused(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match="not a complete safetensors file"):
        read_header(file)


def test_a_truncated_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    mx.save_safetensors(str(file), {"a": mx.zeros((300, 5))})
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ModelError, match="fetch the file again"):
        read_header(file)


def test_reward_models_need_no_memory_for_the_vocabulary_head():
    """Its last completion tokens run too; in return no logits are made."""
    reward, policy = (
        plan_memory(seven_b(), replace(PAIR, vocabulary=vocabulary)) for vocabulary in (False, True)
    )
    assert reward.parts["vocabulary head"] == 0
    assert policy.peak_bytes - reward.peak_bytes > 0.5 * policy.parts["vocabulary head"]
    assert policy.parts["vocabulary head"] > 0


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no model"):
        read_model_shape(tmp_path, {"hidden_size": 8})


@pytest.mark.parametrize(
    ("kind", "quantised"),
    [("lora", False), ("lora", True), ("dora", False), ("dora", True), ("full", False)],
)
def test_shape_and_trained_parameters_are_the_loaded_models(tmp_path, kind, quantised):
    from mlx.utils import tree_flatten
    from mlx_lm.convert import convert

    folder = TINY_MODEL
    if quantised:
        folder = tmp_path / "4-bit"
        convert(str(TINY_MODEL), str(folder), quantize=True, q_bits=4, q_group_size=32)
    config = read_model_config(folder)
    shape = read_model_shape(folder, config)
    model = load_module(folder)
    assert shape.weights_bytes == sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    assert shape.blocks == len(model.layers)
    assert shape.quantised is quantised
    assert shape.activation_dtype == "F32"
    layout = AdapterLayout(kind, rank=4, num_layers=1)
    tree = tree_flatten(install_adapters(model, layout))
    if kind == "full":
        tree = [(name, array) for name, array in tree if array.ndim > 1]
    work = replace(PAIR, fine_tune_type=kind, rank=4, num_layers=1)
    assert trained_parameters(shape, work) == sum(array.size for _, array in tree)


def test_the_parts_add_up_to_the_peak():
    plan = plan_memory(seven_b(), PAIR)
    assert tuple(plan.parts) == PARTS
    assert plan.peak_bytes == sum(plan.parts.values())
    assert all(value > 0 for name, value in plan.parts.items() if name != "reward models")
    # 40,370,176 parameters of rank 16 on all linear layers of this model.
    assert plan.trained_parameters == 40_370_176


def pair(length, attention):
    return Workload((Shape(length // 2, length // 2, 1),), attention=attention)


@pytest.mark.parametrize("attention", ["kernel", "blocks"])
def test_attention_on_a_gpu_grows_with_the_length(attention):
    """With all scores kept, twice the length takes nearly four times as much."""

    def grown(attention):
        short, long = (
            plan_memory(seven_b(), pair(length, attention)).parts["attention"]
            for length in (8192, 16384)
        )
        return long / short

    assert grown("scores") > 3.8
    assert grown(attention) <= 2.1
    for length in (2048, 8192):
        peaks = [plan_memory(seven_b(), pair(length, a)).peak_bytes for a in (attention, "scores")]
        assert peaks[0] < peaks[1]


def test_a_long_prompt_with_short_completions_is_not_copied():
    """Blocks then compute less than mlx's kernel, and read the prompt's keys where they are."""
    copied, shared = (
        plan_memory(
            seven_b(),
            Workload((Shape(prompt, 257, 1),), attention="kernel", grad_checkpoint=False),
        ).parts["attention"]
        for prompt in (8 * 256, 8 * 256 + 8)
    )
    assert shared < 0.5 * copied


def test_attention_is_planned_for_the_machine_and_the_model():
    mac, here = parse_machine("16 GB M2"), replace(parse_machine("16 GB M2"), metal=False)
    model = seven_b()
    assert attention_on(here, model, {"model_type": "qwen2"}) == "scores"
    assert attention_on(mac, model, {"model_type": "qwen2"}) == "kernel"
    window = {"model_type": "qwen2", "sliding_window": 4096}
    assert attention_on(mac, model, window) == "blocks"
    assert attention_on(mac, model, {**window, "use_sliding_window": False}) == "kernel"
    assert attention_on(mac, model, {"attn_logit_softcapping": 50.0}) == "blocks"
    assert attention_on(mac, model, {"text_config": {"model_type": "gpt_oss"}}) == "blocks"
    assert attention_on(mac, model, {"qk_nope_head_dim": 128}) == "blocks"
    assert attention_on(mac, replace(model, query_width=28 * 40), {}) == "blocks"
    assert attention_on(mac, model, {"model_type": "deepseek_v32"}) == "scores"


def test_options_that_need_memory_raise_the_peak():
    base = plan_memory(seven_b(), PAIR).peak_bytes
    for change in (
        {"grad_checkpoint": False},
        {"shapes": (Shape(512, 512, 2),)},
        {"rank": 64},
        {"shapes": (Shape(1024, 1024, 1),)},
        {"shared": False},
        {"accumulation": 8, "rows": 4},
        {"dropout": True, "grad_checkpoint": False},
    ):
        assert plan_memory(seven_b(), replace(PAIR, **change)).peak_bytes > base, change
    for change in ({"rank": 4}, {"num_layers": 4}, {"shapes": (Shape(128, 128, 1),)}, {"rows": 1}):
        assert plan_memory(seven_b(), replace(PAIR, **change)).peak_bytes < base, change
    assert plan_memory(seven_b(16), PAIR).peak_bytes > base + 5e9


def test_the_peak_is_that_of_the_largest_shape():
    small, large = Shape(64, 64, 1), Shape(512, 512, 1)
    both = plan_memory(seven_b(), replace(PAIR, shapes=(small, large)))
    assert both.shape == large
    assert both.peak_bytes == plan_memory(seven_b(), PAIR).peak_bytes


SAID = Sampling(prompts=16, held_out=0, group_size=2, prompt=512, completion=512)
# The same tokens as PAIR, four roles.
PPO = replace(PAIR, sampling=SAID, critic=True, reward_model_bytes=40_370_176 * 4)


def test_four_roles_cost_little_more_than_dpo():
    update = replace(PPO, sampling=replace(SAID, prompts=1))
    dpo, ppo = plan_memory(seven_b(), PAIR), plan_memory(seven_b(), update)
    assert ppo.moment == dpo.moment
    # Three trees of the critic and the reward model's.
    assert ppo.needed_bytes - dpo.needed_bytes == 4 * 4 * dpo.trained_parameters
    assert ppo.peak_bytes < 1.15 * dpo.peak_bytes


def test_sampling_is_the_peak_where_many_long_completions_are_decoded():
    said = replace(SAID, prompts=64, group_size=8, prompt=2048, completion=2048)
    plan = plan_memory(seven_b(), replace(PPO, sampling=said, shapes=(Shape(128, 128, 1),)))
    assert plan.moment == "sampling"
    # 32 rows of 4,096 tokens, 512 keys and as many values in each of 28 blocks, 2 bytes.
    cache = 32 * 4096 * 2 * 512 * 28 * 2
    assert cache < plan.parts["attention"] < 1.1 * cache
    ahead = plan.parts["running ahead"]
    assert ahead == pytest.approx(headroom_bytes(plan.needed_bytes), abs=8)
    assert sum(plan.parts.values()) == plan.peak_bytes
    few = plan_memory(seven_b(), replace(PPO, sampling=replace(said, prompts=1, group_size=4)))
    assert few.peak_bytes < plan.peak_bytes
    held_out = replace(said, prompts=1, group_size=4, held_out=100)
    assert held_out.rows == 32


def completions_of(length, limit):
    return [Shape(512, length, limit.groups_per_microbatch(1))]


def test_advice_for_sampling():
    said = replace(SAID, group_size=8, min_group_size=2)
    work = replace(PPO, sampling=said, rows=8)
    steps = advise(seven_b(), work, 1024, completions_of, int(7e9))
    words = [step.options.split()[0] for step in steps]
    assert words[:2] == ["--group-size", "--max-completion-length"]
    assert steps[0].options == "--group-size 2"
    assert "--max-seq-length" in steps[1].options
    length, longest = int(steps[1].options.split()[1]), int(steps[1].options.split()[3])
    assert longest - length == 512  # prompts stay as long
    peaks = [step.peak_bytes for step in steps]
    assert peaks == sorted(peaks, reverse=True)
    smaller = replace(work, sampling=replace(said, group_size=2), rows=2)
    assert steps[0].peak_bytes == plan_memory(seven_b(), smaller).peak_bytes
    own_limit = advise(seven_b(), work, None, completions_of, int(7e9))
    assert own_limit[1].options == f"--max-completion-length {length}"


def halves(length, limit):
    return [Shape(length // 2, length // 2, limit.groups_per_microbatch(3 * length // 2))]


def test_a_7b_pair_fits_16_gb_with_checkpointing_only():
    available = parse_machine("16 GB M2").working_set_bytes
    assert advise(seven_b(), PAIR, 1024, halves, available) == []
    steps = advise(seven_b(), replace(PAIR, grad_checkpoint=False), 1024, halves, available)
    assert [step.options for step in steps] == ["--grad-checkpoint"]
    assert steps[0].fits
    assert steps[0].peak_bytes == plan_memory(seven_b(), PAIR).peak_bytes


def test_advice_is_cheapest_first_and_ends_when_the_run_fits():
    four = {"shapes": (Shape(512, 512, 4),), "limit": BatchLimit(4)}
    work = replace(PAIR, grad_checkpoint=False, **four, accumulation=2, rank=64)
    steps = advise(seven_b(16), work, 1024, halves, int(10.7e9))
    words = [step.options.split()[0] for step in steps]
    order = [
        *("--grad-checkpoint", "--batch-size", "--max-seq-length"),
        *("--lora-rank", "--num-layers", "a"),
    ]
    assert words == [word for word in order if word in words]
    assert words[:2] == ["--grad-checkpoint", "--batch-size"]
    assert steps[1].options == "--batch-size 1 --grad-accumulation-steps 8"
    assert words[-1] == "a"
    assert [step.fits for step in steps] == [False] * (len(steps) - 1) + [True]
    peaks = [step.peak_bytes for step in steps]
    assert peaks == sorted(peaks, reverse=True)


def test_advice_lowers_a_token_budget():
    within = replace(PAIR, shapes=(Shape(256, 256, 10), Shape(512, 512, 5)))
    work = replace(within, limit=BatchLimit(tokens=8000), accumulation=2)
    half = replace(work, shapes=(Shape(256, 256, 5), Shape(512, 512, 2)), accumulation=4)
    available = plan_memory(seven_b(), half).peak_bytes
    steps = advise(seven_b(), work, 1024, halves, available)
    assert [step.options for step in steps] == ["--batch-tokens 4000 --grad-accumulation-steps 4"]
    assert steps[0].fits
    # A further step keeps the smaller budget.
    steps = advise(seven_b(), work, 1024, halves, int(0.97 * available))
    assert steps[0].options == "--batch-tokens 2000 --grad-accumulation-steps 8"
    limits = []
    advise(seven_b(), work, 1024, lambda n, limit: limits.append(limit) or halves(n, limit), 1)
    assert BatchLimit(tokens=2000) in limits


def test_advice_admits_when_nothing_helps():
    steps = advise(seven_b(), PAIR, 1024, halves, int(1e9))
    assert steps
    assert not any(step.fits for step in steps)


@pytest.mark.parametrize(
    ("text", "memory", "working_set", "chip"),
    [
        ("16 GB M2", 16e9, 16e9 * 2 / 3, 2),
        ("16GB", 16e9, 16e9 * 2 / 3, None),
        ("M3 Max 64GB", 64e9, 48e9, 3),
        ("Apple M4 Pro, 48 GB", 48e9, 36e9, 4),
        ("m1 8gb", 8e9, 8e9 * 2 / 3, 1),
        ("MacBook Pro M1 32 GB", 32e9, 32e9 * 2 / 3, 1),
    ],
)
def test_machines_are_parsed(text, memory, working_set, chip):
    machine = parse_machine(text)
    assert machine.memory_bytes == memory
    assert machine.working_set_bytes == int(working_set)
    assert machine.chip == chip
    assert machine.metal
    assert not machine.here


@pytest.mark.parametrize(
    "text", ["", "toaster", "M2", "16", "16 GB Pentium", "0 GB M1", "M2 9999 GB"]
)
def test_unknown_machines_are_refused(text):
    with pytest.raises(ConfigError, match="--machine"):
        parse_machine(text)


def test_this_machine_has_memory():
    machine = this_machine()
    assert machine.here
    assert 0 < machine.working_set_bytes <= machine.memory_bytes


def test_warnings_about_the_platform():
    m2 = " ".join(platform_warnings(parse_machine("16 GB M2"), "BF16"))
    assert "bf16" in m2
    assert "caffeinate" in m2
    assert "bf16" not in " ".join(platform_warnings(parse_machine("16 GB M3"), "BF16"))
    assert "bf16" not in " ".join(platform_warnings(parse_machine("16 GB M2"), "F16"))
    old = replace(parse_machine("64 GB M2"), macos=(14, 6))
    assert "macOS 14.6" in " ".join(platform_warnings(old, "F16"))


def pairs_file(folder, n=20):
    row = {"chosen": " yes", "rejected": " no"}
    file = folder / "pairs.jsonl"
    lines = [json.dumps({"prompt": f"Say yes {i}.", **row}) for i in range(n)]
    file.write_text("\n".join(lines) + "\n")
    return file


SCHEMA = {
    *("peak_bytes", "parts", "moment", "shape", "trained_parameters", "machine", "fits"),
    *("advice", "time", "remarks", "software", "basis"),
}


def test_json_output(tmp_path, capsys, monkeypatch):
    def no_weights(*_):
        raise AssertionError("the plan loaded the weights")

    monkeypatch.setattr(loading, "load_module", no_weights)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = ["--model", str(TINY_MODEL), "--data", str(pairs_file(tmp_path)), "--json"]
    assert run(["plan", *options]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert set(plan) == SCHEMA
    assert plan["fits"] is True
    assert plan["advice"] == []
    assert plan["time"] is None
    assert sum(plan["parts"].values()) == plan["peak_bytes"]
    assert run(["plan", *options, "--machine", "8 GB M1", "--command", "sft"]) in (0, 1)


def test_printed_plan_with_a_token_budget(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = ["--model", str(TINY_MODEL), "--data", str(pairs_file(tmp_path)), "--json"]
    shapes = []
    for batch in (["--batch-tokens", "100"], ["--batch-size", "3"]):
        assert run(["plan", *options, *batch]) == 0
        shapes.append(json.loads(capsys.readouterr().out)["shape"])
    prompt, completion, groups, longest = shapes[0]
    assert prompt + completion <= 100
    assert groups > 1
    assert longest <= completion
    assert shapes[1][2] == 3
    assert run(["plan", *options, *batch, "--batch-tokens", "100"]) == 1
    assert "--batch-size and --batch-tokens exclude each other" in capsys.readouterr().err


def test_printed_plan_without_data(capsys):
    arguments = ["--model", str(TINY_MODEL), "--machine", "16 GB M2", "--max-seq-length", "262144"]
    assert run(["plan", *arguments, "--batch-size", "64"]) == 0
    page = capsys.readouterr().out
    assert "It does not fit: Apple M2, 16 GB" in page
    assert "--batch-size 1 --grad-accumulation-steps 512" in page
    assert "scripts/verify_plan.py" in page
    assert "caffeinate" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--machine", "toaster"], "--machine 'toaster'"),
        (["--machine", "16 GB M2", "--measure"], "--measure"),
        (["--run", "nowhere"], "--data is missing"),
        (["--loss", "nonsense"], "nonsense"),
        (["--desirable-weight", "2"], "--desirable-weight is not an option of dpo"),
    ],
)
def test_errors_are_one_line(arguments, said, capsys):
    assert run(["plan", "--model", str(TINY_MODEL), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error


def test_time_of_a_run_and_of_a_measurement(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("pathlib.Path.home", lambda: tmp_path)
    earlier = tmp_path / "run"
    earlier.mkdir()
    (earlier / "summary.json").write_text(json.dumps({"tokens_per_second": 100.0}))
    options = [
        "--model",
        str(TINY_MODEL),
        "--data",
        str(pairs_file(tmp_path)),
        "--epochs",
        "2",
        "--json",
    ]
    assert run(["plan", *options, "--run", str(earlier)]) == 0
    time = json.loads(capsys.readouterr().out)["time"]
    assert time["tokens_per_second"] == 100
    assert time["training_seconds"] == pytest.approx(6 * time["reference_seconds"])
    assert run(["plan", *options, "--run", str(tmp_path)]) == 1
    assert "summary.json" in capsys.readouterr().err
    assert run(["plan", *options, "--measure"]) == 0
    measured = json.loads(capsys.readouterr().out)["time"]
    assert measured["source"] == "measured now"
    assert run(["plan", *options]) == 0
    again = json.loads(capsys.readouterr().out)["time"]
    assert again["tokens_per_second"] == measured["tokens_per_second"]


def test_dpo_refuses_what_does_not_fit_and_force_overrides(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = Machine("toy, 0.001 GB", 1_000_000, 1_000_000, metal=False)
    monkeypatch.setattr(plan_module, "this_machine", lambda: tiny)
    monkeypatch.setattr(plan_module, "ALWAYS_FITS_BYTES", 0)
    loads = []
    real = loading.load_module
    monkeypatch.setattr(loading, "load_module", lambda path: loads.append(path) or real(path))
    command = ["dpo", "--model", str(TINY_MODEL), "--data", str(pairs_file(tmp_path))]
    command += ["--output", "out", "--iters", "1", "--samples", "0", "--batch-size", "2"]
    command += ["--reference-cache", str(tmp_path / "cache"), "--grad-accumulation-steps", "1"]
    assert run(command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: this run needs about")
    assert "--batch-size 1 --grad-accumulation-steps 2" in error
    assert "--force" in error
    assert not loads
    assert not (tmp_path / "out").exists()
    assert run([*command, "--force"]) == 0
    assert loads
    assert (tmp_path / "out" / "summary.json").exists()


def test_tiny_models_are_never_refused(monkeypatch):
    machine = Machine("toy", 1000, 1000, metal=False)
    monkeypatch.setattr(plan_module, "this_machine", lambda: machine)
    config = read_model_config(TINY_MODEL)
    folder = loading.ModelFolder(str(TINY_MODEL), TINY_MODEL, config, None)
    from mlx_align.config import DPOConfig

    assert plan_module.make_plan(DPOConfig(), AdapterLayout(), folder, None, machine).fits


def prompts_file(folder):
    file = folder / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"Say yes {'again ' * (i % 5)}{i}."}) for i in range(20)]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_on_policy_runs_are_planned(command, tmp_path, capsys, monkeypatch):
    classifier = shutil.copytree(TINY_MODEL, tmp_path / "classifier")
    config = json.loads((TINY_MODEL / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (classifier / "config.json").write_text(json.dumps(config))

    def no_weights(*_):
        raise AssertionError("the plan loaded the weights")

    monkeypatch.setattr(loading, "load_module", no_weights)
    options = ["plan", "--command", command, "--model", str(TINY_MODEL), "--json"]
    plans = {}
    for name, more in {
        "alone": [],
        "with data": ["--data", str(prompts_file(tmp_path))],
        "another base": ["--reward-model", str(classifier)],
    }.items():
        assert run([*options, *more]) == 0
        plans[name] = json.loads(capsys.readouterr().out)
        assert sum(plans[name]["parts"].values()) == plans[name]["peak_bytes"]
    prompt, completion, groups = plans["alone"]["shape"]
    assert (prompt, completion, groups) == (768, 256, 1)
    assert plans["with data"]["peak_bytes"] < plans["alone"]["peak_bytes"]
    assert plans["alone"]["parts"]["reward models"] == 0
    assert plans["another base"]["parts"]["reward models"] == plans["alone"]["parts"]["weights"]


def test_time_of_rollout_batches(tmp_path, capsys):
    earlier = tmp_path / "run"
    earlier.mkdir()
    # 8 completions a second.
    summary = {"command": "grpo", "completions": 320, "seconds": 40.0}
    (earlier / "summary.json").write_text(json.dumps(summary))
    options = ["plan", "--command", "grpo", "--model", str(TINY_MODEL), "--iters", "6", "--json"]
    options += ["--data", str(prompts_file(tmp_path)), "--group-size", "4"]
    options += ["--batch-size", "2", "--grad-accumulation-steps", "2"]
    assert run([*options, "--run", str(earlier)]) == 0
    time = json.loads(capsys.readouterr().out)["time"]
    assert (time["batches"], time["seconds_per_batch"], time["training_seconds"]) == (6, 2, 12)
    for more, said in (
        (["--measure"], "--iters 3"),
        (["--run", str(tmp_path)], "summary.json"),
        (["--run", str(earlier), "--command", "ppo"], "a run of grpo"),
        (["--group-size", "1"], "--group-size 1"),
        (["--reward-model", "nowhere"], "--reward-model nowhere"),
    ):
        assert run([*options, *more]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert said in error


@pytest.mark.parametrize(("epochs", "batches"), [(None, 3), (1.0, 3), (2.0, 5), (0.1, 1), (0.8, 2)])
def test_epochs_of_prompts_leave_none_out(epochs, batches):
    config = GRPOConfig(batch_size=2, grad_accumulation_steps=2, minibatches=1, epochs=epochs)
    # 10 prompts, 4 in a rollout batch: the third one has the last two.
    assert rollout_batches(config, prompts=10) == batches


@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_on_policy_training_refuses_what_does_not_fit(command, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = Machine("toy, 0.001 GB", 1_000_000, 1_000_000, metal=False)
    monkeypatch.setattr(plan_module, "this_machine", lambda: tiny)
    monkeypatch.setattr(plan_module, "ALWAYS_FITS_BYTES", 0)
    options = [
        "--model",
        str(TINY_MODEL),
        "--data",
        str(prompts_file(tmp_path)),
        "--reward",
        "length",
    ]
    options += ["--iters", "3", "--samples", "0", "--batch-size", "1", "--output", "out"]
    options += ["--grad-accumulation-steps", "2", "--group-size", "2", "--valid-fraction", "0"]
    options += ["--max-completion-length", "4", "--grad-checkpoint"]
    if command == "ppo":
        options += ["--reward-rollouts", "0", "--critic-warmup", "0"]
    assert run([command, *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: this run needs about")
    assert "--force" in error
    assert not (tmp_path / "out").exists()
    assert run([command, *options, "--force"]) == 0
    assert "--force starts it anyway" in capsys.readouterr().out
    # Its speed is remembered for plans.
    assert run(["plan", "--command", command, *options, "--json"]) == 0
    time = json.loads(capsys.readouterr().out)["time"]
    assert time["batches"] == 3
    assert time["training_seconds"] > 0
