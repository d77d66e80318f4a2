"""scripts/bench.py: its arguments and table, and this package's own runner on a tiny model."""

import json
import math
import subprocess
import sys

import pytest
from helpers.paths import SCRIPTS
from helpers.scripts import load_script

BENCH = SCRIPTS / "bench"


@pytest.fixture(scope="module")
def bench():
    return load_script("bench")


def test_cases_are_read(bench):
    args = bench.parse(["--cases", "1,256,128", "2,512,64,ckpt", "--steps", "8"])
    assert args.cases == [bench.Case(1, 256, 128), bench.Case(2, 512, 64, True)]
    assert [str(case) for case in args.cases] == ["B=1 256+128", "B=2 512+64 checkpointed"]
    assert bench.parse([]).cases == list(bench.CASES)


@pytest.mark.parametrize(
    "wrong",
    [["--cases", "1,2"], ["--cases", "1,0,4"], ["--cases", "1,2,3,x"], ["--steps", "3"]],
)
def test_wrong_arguments_are_refused(bench, wrong):
    with pytest.raises(SystemExit) as stop:
        bench.parse(wrong)
    assert stop.value.code == 2


def test_packages_are_chosen(bench):
    def names(*arguments):
        return [package.name for package in bench.chosen_packages(bench.parse(arguments))]

    assert names() == ["mlx-align", "mlx-lm-lora", "mlx-tune", "unsloth_zoo"]
    assert names("--ours-only") == ["mlx-align"]
    assert names("--packages", "mlx-tune", "--trl") == ["mlx-align", "mlx-tune", "trl"]
    both = ["mlx-align", "mlx-align with power"]
    assert names("--ours-only", "--power-exponential") == both
    assert names("--packages", "mlx-tune", "--power-exponential") == [*both, "mlx-tune"]
    with pytest.raises(SystemExit, match="mlx-toon"):
        names("--packages", "mlx-toon")


def test_every_package_has_a_runner_and_fixed_versions(bench):
    for package in (bench.OURS, bench.WITH_POWER, *bench.PEERS, bench.TRL):
        assert (BENCH / package.runner).is_file()
    assert any("5.10.2" in install for install in bench.PEERS[0].installs[0])


def test_ratios_are_medians_of_rounds(bench):
    case, tune = bench.Case(1, 8, 8), bench.PEERS[1]
    runs = [
        bench.Measured(name, str(case), turn, step_seconds=seconds, cpu_seconds=1, peak_bytes=peak)
        for turn, ours, theirs in ((0, 1.0, 2.0), (1, 3.0, 4.0), (2, 9.0, 10.0))
        for name, seconds, peak in (("mlx-align", ours, 10), (tune.name, theirs, 40))
    ]
    assert bench.ratios(runs, tune) == ["0.75", "1.00", "0.25"]
    assert bench.ratios(runs, bench.OURS) == ["", "", ""]
    failed = [bench.Measured(bench.PEERS[0].name, str(case), 0, error="no such thing")]
    rows = bench.table([case], [bench.OURS, *bench.PEERS[:2]], runs + failed).splitlines()
    assert rows[2].startswith("| B=1 8+8 | mlx-align | 3.000 | 1.000 |")
    assert "failed: no such thing" in rows[3]
    assert rows[4].endswith("| 0.75 | 1.00 | 0.25 |")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "model"
    size = ("--vocabulary", "320", "--hidden", "32", "--layers", "2", "--intermediate", "48")
    make = [BENCH / "model.py", folder, *size, "--heads", "2", "--kv-heads", "1"]
    subprocess.run([sys.executable, *map(str, make)], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("checkpoint", [False, True])
def test_runner_of_this_package(bench, model, tmp_path, checkpoint):
    case = bench.Case(2, 12, 6, grad_checkpoint=checkpoint)
    args = bench.parse(["--steps", "4", "--warmup", "2", "--model", str(model)])
    environment, _ = bench.runner_environment()
    ours = bench.WITH_POWER if checkpoint else bench.OURS
    one = bench.run(ours, case, 0, args, environment)
    assert one.error == ""
    assert one.step_seconds > 0
    assert one.cpu_seconds > 0
    assert one.peak_bytes > one.result["model_bytes"] > 0
    assert one.reference_seconds_per_pair > 0
    assert one.result["reference_pairs"] == 8
    assert len(one.result["steps"]) == len(one.result["losses"]) == 4
    # The reference is where the policy starts; were it another model, this would not hold.
    assert one.result["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    args.json = tmp_path / "runs.json"
    bench.write_json(args, [bench.OURS], [one], "")
    assert json.loads(args.json.read_text())["runs"][0]["case"] == str(case)
