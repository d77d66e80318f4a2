"""`scripts/verify_losses.py` in small: a few losses of each kind, a few updates, all its checks."""

import importlib.util
import sys
from pathlib import Path

import pytest

from mlx_align.losses.registry import PAIRWISE_LOSSES, TOKEN_LOSSES, UNPAIRED_LOSSES

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ("--iters", "4", "--learning-rate", "1e-3", "--warmup", "0", "--batch-size", "4")
SMALL += ("--grad-accumulation-steps", "1", "--no-grad-checkpoint", "--steps-per-eval", "0")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "verify_losses", ROOT / "scripts" / "verify_losses.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there for their own module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The starter's pairs, few enough for a machine without a fast matrix product."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("train", 32), ("valid", 8)):
        lines = (ROOT / "data" / "starter" / f"{name}.jsonl").read_text().splitlines()
        (folder / f"{name}.jsonl").write_text("\n".join(lines[:rows]) + "\n")
    return folder


def test_every_loss_of_the_package_is_in_the_script(script):
    assert {*PAIRWISE_LOSSES, *UNPAIRED_LOSSES, *TOKEN_LOSSES} <= set(script.RUNS)


@pytest.mark.parametrize("name", ["sigmoid --wpo", "aot", "orpo", "kto", "nll"])
def test_a_run_improves_on_held_out_data_and_loads(script, data, name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = script.verify(name, "starter", str(data), tmp_path, SMALL)
    assert result.failures == []
    assert script.row(name, result).endswith("| ok |")
