"""Checkpoints: complete or skipped, exactly what was saved, and only the last ones kept."""

import json
import os
import shutil

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from mlx_align.errors import ModelError, WriteError
from mlx_align.models.adapters import AdapterLayout
from mlx_align.models.patches import random_key
from mlx_align.training.checkpoint import State, has_checkpoint, load_checkpoint, save_checkpoint
from mlx_align.training.metrics import Progress

LAYOUT = AdapterLayout(rank=2)


def tree(value):
    return {"layer": {"lora_a": mx.full((4, 2), value), "lora_b": mx.full((2, 4), 2.0 * value)}}


def stepped(value):
    """Two optimizers after a step each, so that they have something to keep."""
    optimizers = {"policy": optim.AdamW(0.1), "critic": optim.AdamW(0.2)}
    for optimizer in optimizers.values():
        weights = tree(value)
        optimizer.init(weights)
        optimizer.apply_gradients(tree(value + 1.0), weights)
    return optimizers


def save(run, step, **named):
    trees = {"policy": tree(1.0 * step), "critic": tree(-1.0 * step)}
    extra = {"kl_coef": 0.1 * step, "window": [1, None, {"loss": 0.25}]}
    state = State(Progress(step=step, tokens=7 * step), trees, stepped(1.0 * step), extra)
    save_checkpoint(run, state, LAYOUT, "base", **named)


def load(run, said=None):
    fresh = {"policy": tree(0.0), "critic": tree(0.0)}
    optimizers = {"policy": optim.AdamW(0.1), "critic": optim.AdamW(0.2)}
    for optimizer in optimizers.values():
        optimizer.init(tree(0.0))
    note = (lambda _: None) if said is None else said.append
    return load_checkpoint(run, fresh, optimizers, note)


def equal(one, other):
    one, other = dict(tree_flatten(one)), dict(tree_flatten(other))
    return one.keys() == other.keys() and all(mx.array_equal(one[k], other[k]) for k in one)


def steps_in(run):
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


def test_a_checkpoint_is_restored_exactly(tmp_path):
    assert load(tmp_path) is None
    assert not has_checkpoint(tmp_path)
    mx.random.seed(3)
    mx.random.normal((2,))
    key = random_key()
    save(tmp_path, 5)
    following = mx.random.normal((3,))
    mx.random.seed(11)
    state = load(tmp_path)
    assert mx.array_equal(mx.random.normal((3,)), following)
    assert key != (0, 11)
    assert state.progress == Progress(step=5, tokens=35)
    assert equal(state.weights["policy"], tree(5.0))
    assert equal(state.weights["critic"], tree(-5.0))
    for name, optimizer in stepped(5.0).items():
        assert equal(state.optimizers[name].state, optimizer.state)
    assert state.extra == {"kl_coef": 0.5, "window": [1, None, {"loss": 0.25}]}
    # Stock mlx-lm's two files, of the first tree.
    folder = tmp_path / "checkpoints" / "0000005"
    assert set(mx.load(str(folder / "adapters.safetensors"))) == {"layer.lora_a", "layer.lora_b"}
    assert json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]["rank"] == 2


def test_the_last_two_and_the_best_are_kept(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, best=2 if step >= 2 else None)
    assert steps_in(tmp_path) == [2, 4, 5]
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]


def damage(folder, how):
    weights = folder / "critic.optimizer.safetensors"
    if how == "a bit":
        content = bytearray(weights.read_bytes())
        content[-3] ^= 1
        weights.write_bytes(content)
    elif how == "cut":
        os.truncate(weights, weights.stat().st_size // 2)
    elif how == "missing":
        weights.unlink()
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "another state":
        (folder / "state.json").write_text("{}")
    else:
        (folder / "manifest.json").write_text(how)


@pytest.mark.parametrize(
    "how",
    [
        *("a bit", "cut", "missing", "no manifest", "another state"),
        *("", "null", "[]", '{"files": {}}', '{"files": 3}', "[" * 100_000),
        '{"files": {"state.json": {"bytes": 1, "blake2b": 0}, "adapters.safetensors": 1}}',
        '{"files": {"../../../x": {"bytes": 0, "blake2b": ""}}}',
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, how):
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "checkpoints" / "0000002", how)
    said = []
    state = load(tmp_path, said)
    assert state.progress.step == 1
    assert equal(state.weights["policy"], tree(1.0))
    assert len(said) == 1
    assert "0000002" in said[0]
    assert "using the one before it" in said[0]
    damage(tmp_path / "checkpoints" / "0000001", how)
    with pytest.raises(ModelError, match="damaged, all 2 of them"):
        load(tmp_path)
    # A run that continues from the first one removes the damaged second one.
    shutil.rmtree(tmp_path / "checkpoints")
    save(tmp_path, 1)
    save(tmp_path, 3)
    damage(tmp_path / "checkpoints" / "0000003", how)
    save(tmp_path, 2)
    assert steps_in(tmp_path) == [1, 2]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    save(tmp_path, 1)
    wider = {"layer": {"lora_a": mx.zeros((8, 2)), "lora_b": mx.zeros((2, 4))}}
    with pytest.raises(ModelError, match="don't fit this model"):
        load_checkpoint(tmp_path, {"policy": wider}, {}, print)
    with pytest.raises(ModelError, match="not a checkpoint of this command"):
        load_checkpoint(tmp_path, {"policy": tree(0.0), "value": tree(0.0)}, {}, print)
    other = optim.SGD(0.1)
    other.init(tree(0.0))
    with pytest.raises(ModelError, match="its policy optimizer is not one of this run"):
        load_checkpoint(tmp_path, {"policy": tree(0.0)}, {"policy": other}, print)


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(path, *_, **__):
        with open(path, "wb") as stream:
            stream.write(b"half")
        raise RuntimeError("[write] Unable to write 4096 bytes to file.")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(WriteError, match="Unable to write"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0000001"]
    assert load(tmp_path).progress.step == 1
