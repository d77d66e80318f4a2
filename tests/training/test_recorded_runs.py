"""Every command still ends with the numbers that were recorded.

See `recorded_runs.py` for the runs and `scripts/record_runs.py` for recording them again.
"""

import json
from typing import Any, NamedTuple

import pytest
from recorded_runs import CASES, INTERRUPTED, RECORDED, Recorder, environment, rounding


class Tolerance(NamedTuple):
    """How far numbers may be off: relative and absolute. Tensors are held to `relative`."""

    relative: float
    absolute: float
    noise: bool


# With the BLAS of mlx's own wheel, all 11,000 numbers came out the same to 9 digits, in any order
# of the runs. This leaves room for sums in another order.
SAME_ROUNDING = Tolerance(1e-6, 1e-6, noise=True)
# With OpenBLAS preloaded, tensors moved by up to 3.2e-5 of their norm (Adam divides small
# gradients by their own size) and log-prob differences by up to 7e-6 nats.
OTHER_ROUNDING = Tolerance(1e-4, 2e-5, noise=False)
# Before the first update the policy is the reference: these are the signs of rounding errors.
# dpop penalises a chosen log-ratio below 0, which makes all of its run depend on them.
NOISE, NOISY_CASES = "rewards/accuracies", ("dpo-dpop",)


@pytest.fixture(scope="module")
def recorded():
    stored = json.loads(RECORDED.read_text())
    # Another random stream or another device is another run, and says nothing about this package.
    if stored["environment"] != environment():
        pytest.skip(f"recorded with {stored['environment']}, and this is {environment()}")
    return stored


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    return Recorder(tmp_path_factory.mktemp("recorded-runs") / "work")


def differences(got: Any, expected: Any, tolerance: Tolerance, where: str = "") -> list[str]:
    """Where two JSON values differ by more than the tolerance."""
    if isinstance(expected, dict) and isinstance(got, dict):
        if got.keys() != expected.keys():
            return [f"{where}: fields {sorted(got.keys() ^ expected.keys())} are in only one"]
        if expected.keys() == {"shape", "norm", "dot"}:
            gap = max(abs(got[key] - expected[key]) for key in ("norm", "dot"))
            same = got["shape"] == expected["shape"]
            same = same and gap <= tolerance.relative * expected["norm"]
            return [] if same else [f"{where}: {got}, {expected} recorded"]
        unsure = {NOISE} if expected.get("step") == 1 and not tolerance.noise else set()
        return [
            difference
            for key in expected.keys() - unsure
            for difference in differences(got[key], expected[key], tolerance, f"{where}/{key}")
        ]
    if isinstance(expected, list) and isinstance(got, list):
        if len(got) != len(expected):
            return [f"{where}: {len(got)} items, {len(expected)} recorded"]
        return [
            difference
            for i, (a, b) in enumerate(zip(got, expected, strict=True))
            for difference in differences(a, b, tolerance, f"{where}/{i}")
        ]
    if isinstance(expected, float) and isinstance(got, float | int):
        same = abs(got - expected) <= tolerance.absolute + tolerance.relative * abs(expected)
    else:
        same = got == expected
    return [] if same else [f"{where}: {got!r}, {expected!r} recorded"]


def check(case: str, recorder: Recorder, recorded: dict[str, Any]) -> None:
    same = recorded["rounding"] == rounding()
    if case in NOISY_CASES and not same:
        pytest.skip("depends on the rounding of the BLAS that it was recorded with")
    # Through JSON, as the recorded numbers went.
    got = json.loads(json.dumps(recorder.record(case)))
    tolerance = SAME_ROUNDING if same else OTHER_ROUNDING
    found = sorted(differences(got, recorded["runs"][case], tolerance))
    assert not found, "\n".join([f"{len(found)} numbers differ", *found[:20]])


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_as_recorded(case, recorder, recorded):
    check(case, recorder, recorded)


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("-resumed")])
def test_runs_of_an_older_version_are_resumed(case, recorded, tmp_path):
    check(case, Recorder(tmp_path / "work", INTERRUPTED), recorded)


def test_every_recorded_case_is_run(recorded):
    assert list(recorded["runs"]) == list(CASES)
