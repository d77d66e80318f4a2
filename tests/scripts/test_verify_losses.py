"""`scripts/verify_losses.py` in small: a few losses of each kind, a few updates, all its checks."""

import pytest
from helpers.data import read_rows, write_rows
from helpers.paths import STARTER
from helpers.scripts import load_script

from mlx_align.losses.registry import PAIRWISE_LOSSES, TOKEN_LOSSES, UNPAIRED_LOSSES

SMALL = ("--iters", "4", "--learning-rate", "1e-3", "--warmup", "0", "--batch-size", "4")
SMALL += ("--grad-accumulation-steps", "1", "--no-grad-checkpoint", "--steps-per-eval", "0")


@pytest.fixture(scope="module")
def script():
    return load_script("verify_losses")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The starter's pairs, few enough for a machine without a fast matrix product."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("train", 32), ("valid", 8)):
        write_rows(folder / f"{name}.jsonl", read_rows(STARTER / f"{name}.jsonl")[:rows])
    return folder


def test_every_loss_of_the_package_is_in_the_script(script):
    assert {*PAIRWISE_LOSSES, *UNPAIRED_LOSSES, *TOKEN_LOSSES} <= set(script.RUNS)


@pytest.mark.parametrize("name", ["sigmoid --wpo", "aot", "orpo", "kto", "nll"])
def test_a_run_improves_on_held_out_data_and_loads(script, data, name, tmp_path):
    result = script.verify(name, "starter", str(data), tmp_path, SMALL)
    assert result.failures == []
    assert script.row(name, result).endswith("| ok |")
