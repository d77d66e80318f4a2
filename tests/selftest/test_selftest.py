"""The self-test: its checks on tiny models, its limits, its table and its file."""

import json
from dataclasses import replace

import pytest

from mlx_align.cli.main import run
from mlx_align.selftest import checks, report
from mlx_align.selftest.cases import GradientCase, RandomModel, SamplingCase, StepCase, cases
from mlx_align.selftest.report import judge_case, run_selftest, verdict

TINY = RandomModel(hidden=64, intermediate=96, heads=2, kv_heads=1, head=32, vocabulary=128)
GRADIENT = GradientCase("gradient", TINY, ((9, 5, 3), (4, 2, 6)))
STEP = StepCase("32 tokens", TINY, 32)
SAMPLING = SamplingCase("sampling", TINY, prompt=8, completion=4, group_size=2)
GOOD = {"loss": 0.7, "loss_cpu": 0.7, "loss_exact": 0.7, "error": 1e-6, "error_cpu": 0.0}


@pytest.mark.parametrize("size", ["small", "full"])
def test_every_check_has_a_name_of_its_own_and_survives_the_command_line(size):
    found = cases(size)
    assert len({case.name for case in found}) == len(found)
    for case in found:
        assert checks.case_from_json(checks.case_to_json(case)) == case
    names = [case.name for case in found]
    for case in found:
        if isinstance(case, StepCase) and case.twice:
            assert names.index(case.twice) < names.index(case.name)


def test_full_checks_are_those_of_a_gpu():
    kinds = cases("full")
    gradients = [case for case in kinds if isinstance(case, GradientCase)]
    assert {(case.model.family, case.model.precision) for case in gradients} == {
        (family, precision)
        for family in ("llama", "qwen3_5")
        for precision in ("float32", "bf16", "4-bit")
    }
    lengths = {case.length: case.twice for case in kinds if isinstance(case, StepCase)}
    assert lengths[8192] == "4,096 tokens"
    assert next(c for c in kinds if isinstance(c, SamplingCase)).group_size == 8


def test_gradient_on_the_cpu_is_the_cpus():
    found = checks.measure_gradient(GRADIENT)
    assert found["error"] < 1e-5
    assert found["loss"] == pytest.approx(found["loss_cpu"], rel=1e-6)
    assert found["load_check"].startswith("prompts are shared")
    assert all(row.passed for row in judge_case(GRADIENT, {"gradient": found}, gpu=True))


def test_bf16_is_compared_with_float32_weights():
    case = replace(GRADIENT, model=replace(TINY, precision="bf16"))
    found = checks.measure_gradient(case)
    assert 1e-4 < found["error_cpu"] < 0.2
    assert found["error"] <= 3 * found["error_cpu"]


def test_step_and_sampling_are_measured():
    found = checks.measure_step(STEP)
    assert found["fixed"] < found["peak"]
    assert found["planned"] == sum(found["parts"].values()) - found["parts"]["running ahead"]
    assert found["tokens_per_second"] == pytest.approx(32 / found["seconds"])
    assert checks.measure_sampling(SAMPLING)["tokens_per_second"] > 0


@pytest.mark.parametrize(
    ("precision", "change", "passed"),
    [
        ("float32", {}, True),
        ("float32", {"error": 1e-3}, False),
        ("float32", {"error": float("nan")}, False),
        ("float32", {"loss": 0.71}, False),
        ("bf16", {"error": 0.02, "error_cpu": 0.01}, True),
        ("bf16", {"error": 0.04, "error_cpu": 0.01}, False),
        ("4-bit", {"error": 0.02, "error_cpu": 0.01, "loss": 0.75}, False),
    ],
)
def test_wrong_gradients_and_losses_fail(precision, change, passed):
    case = replace(GRADIENT, model=replace(TINY, precision=precision))
    (row,) = judge_case(case, {"gradient": {**GOOD, **change}}, gpu=True)
    assert row.passed is passed


def test_a_model_that_fails_the_check_at_load_fails():
    rows = judge_case(GRADIENT, {"gradient": {**GOOD, "load_check": "prompts are run"}}, gpu=True)
    assert [row.passed for row in rows] == [True, False]


def step_numbers(peak, planned=1e9, fixed=0.2e9):
    speed = {"seconds": 1.0, "tokens_per_second": 32.0}
    return {"peak": peak, "planned": planned, "fixed": fixed, **speed}


def test_peaks_off_the_plan_and_attention_of_quadratic_memory_fail():
    long = StepCase("64 tokens", TINY, 64, twice="32 tokens")
    linear = {"32 tokens": step_numbers(1e9), "64 tokens": step_numbers(1.8e9, 1.75e9)}
    rows = judge_case(long, linear, gpu=True)
    assert [row.passed for row in rows] == [True, None, True]
    assert rows[2].result == "2.00 times"
    square = {"32 tokens": step_numbers(1e9), "64 tokens": step_numbers(3.2e9, 1.75e9)}
    assert [row.passed for row in judge_case(long, square, gpu=True)] == [False, None, False]
    # On a CPU attention keeps its scores.
    assert judge_case(long, square, gpu=False)[2].passed is None


def run_with(monkeypatch, found, seconds=100.0):
    monkeypatch.setattr(report, "cases", lambda _size: [GRADIENT, STEP])
    monkeypatch.setattr(report, "_in_own_process", lambda case, _left: found[case.name])
    rows = []
    return run_selftest("small", seconds, rows.append), rows


def test_a_failed_process_is_a_line_and_the_others_run(monkeypatch):
    found = {"gradient": {"error_message": "signal 9: Killed"}, "32 tokens": step_numbers(1e9)}
    result, rows = run_with(monkeypatch, found)
    assert rows == result.rows
    assert [row.passed for row in rows] == [False, True, None]
    assert not result.passed
    assert verdict(rows) == "1 of 3 checks failed: gradient."


def test_real_processes_that_fail_or_take_too_long():
    wrong = replace(GRADIENT, model=replace(TINY, family="no such family"))
    assert "no such family" in report._in_own_process(wrong, 100)["error_message"]
    assert "no time left" in report._in_own_process(GRADIENT, 0.01)["error_message"]
    assert "left out" in report._in_own_process(GRADIENT, -1)["error_message"]


def test_the_command_writes_the_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "cases", lambda _size: [SAMPLING])
    file = tmp_path / "selftest.json"
    assert run(["selftest", "--output", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "tokens/s" in shown
    assert "All checks passed." in shown
    content = json.loads(file.read_text())
    assert content["passed"] is True
    assert content["numbers"]["sampling"]["tokens_per_second"] > 0
    assert set(content["versions"]) == {"mlx", "mlx-lm", "system"}
    monkeypatch.setattr(report, "_in_own_process", lambda *_: {"error_message": "crashed"})
    assert run(["selftest", "--output", str(file), "--json"]) == 1
    shown = capsys.readouterr()
    assert "1 of 1 checks failed: sampling." in shown.err
    assert json.loads(shown.out) == json.loads(file.read_text())


def test_wrong_options_are_errors_before_anything_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "_in_own_process", lambda *_: pytest.fail("it ran"))
    (tmp_path / "file").write_text("")
    assert run(["selftest", "--output", str(tmp_path / "file" / "x.json")]) == 1
    assert "x.json" in capsys.readouterr().err
    assert run(["selftest", "--minutes", "0"]) == 1
    assert "--minutes" in capsys.readouterr().err
