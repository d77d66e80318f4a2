"""Fixtures of all tests, and the environment that they run in.

mlx and the package are imported by the fixtures that use them: huggingface_hub reads the
environment on import, and a test that needs none of them starts at once.
"""

import os
import random
import signal

import pytest
from helpers.data import assistant, user, write_splits
from helpers.paths import TINY_MODEL

# Tests need no network: they make what they read, or it is in the repository.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A process that a shell starts in the background ignores Ctrl-C, and under nohup a hangup too, and
# runs respect that. Tests of interruptions must not depend on how they were started.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


# Files that take longest come first, so that no process works alone on one of them at the end.
LONG_FILES = {
    "test_killed_runs.py",
    "test_on_policy.py",
    "test_docs.py",
    "test_fuse.py",
    "test_dpo.py",
    "test_resumed_runs.py",
    "test_recorded_runs.py",
}


def pytest_collection_modifyitems(items):
    """Order the tests of `LONG_FILES` before all others."""
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Runs save their speed and reference log-probs in the test's folder, not the user's."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / ".cache"))


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """The folders of the tiny model in float32, bfloat16 and 4 bits."""
    from mlx_lm.convert import convert

    folder = tmp_path_factory.mktemp("models")
    convert(str(TINY_MODEL), str(folder / "bfloat16"), dtype="bfloat16")
    convert(str(TINY_MODEL), str(folder / "4-bit"), quantize=True, q_bits=4, q_group_size=32)
    return {"float32": TINY_MODEL, "bfloat16": folder / "bfloat16", "4-bit": folder / "4-bit"}


@pytest.fixture(scope="module")
def tiny_policy():
    """A random llama with adapters that are no longer at their start."""
    import mlx.core as mx
    from helpers.families import make_model
    from helpers.oracle import language_model
    from mlx.utils import tree_map

    from mlx_align.models.adapters import AdapterLayout, install_adapters

    module = make_model("llama")
    start = install_adapters(module, AdapterLayout(rank=4))
    mx.random.seed(1)
    module.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), start))
    return language_model(module)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """40 pairs to train on and 12 held out, of many lengths: the chosen say yes, the others no."""
    draw = random.Random(0)

    def pair(split, i):
        words = " ".join(draw.choices(["sun", "rain", "wind"], k=draw.randint(1, 5)))
        tails = ["a" * draw.randint(0, 8) for _ in range(2)]
        return {
            "prompt": user(f"{split} {i}: is {words} good?"),
            "chosen": assistant(f"yes {tails[0]}"),
            "rejected": assistant(f"no {tails[1]}"),
        }

    return write_splits(
        tmp_path_factory.mktemp("pairs"),
        train=[pair("train", i) for i in range(40)],
        valid=[pair("valid", i) for i in range(12)],
    )


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train in this process, in an empty folder; the exit code and the run folder."""
    from helpers.runs import mlx_align

    monkeypatch.chdir(tmp_path)

    def call(name, *options, data, model=TINY_MODEL, output="run"):
        where = ("--model", model, "--data", data, "--output", output)
        return mlx_align(name, *where, *options), tmp_path / output

    return call
