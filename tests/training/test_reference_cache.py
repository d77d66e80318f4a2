"""The cache of reference log-probs: checksums, and places that can't be written."""

import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from helpers.data import write_rows
from helpers.runs import metric_rows

from mlx_align.training.reference import ReferenceCache, missing_groups
from mlx_align.types import TokenizedGroup


def group(*completions):
    arrays = [np.array(ids, np.int32) for ids in completions]
    return TokenizedGroup(np.array([1, 2], np.int32), tuple(arrays), "data.jsonl:1")


GROUPS = [group([3, 4, 5], [6, 7, 8]), group([9, 3, 4])]
VALUES = [
    (np.array([-1.0, -2.0, -3.0], np.float32), np.array([-4.0, -5.0, -6.0], np.float32)),
    (np.array([-7.0, -8.0, -9.0], np.float32),),
]


@pytest.fixture
def file(tmp_path):
    cache = ReferenceCache(tmp_path, "key")
    cache.put(GROUPS, VALUES)
    cache.close()
    return cache.file


def change(file, statement, *values):
    with closing(sqlite3.connect(file)) as db, db:
        db.execute(statement, values)


def rows(file):
    with closing(sqlite3.connect(file)) as db:
        return db.execute("SELECT row, nats FROM logps ORDER BY row").fetchall()


@pytest.mark.parametrize("place", range(0, 20, 3))
def test_a_changed_bit_is_noticed_and_computed_again(file, place):
    key, nats = rows(file)[1]
    spoiled = bytearray(nats)
    spoiled[place] ^= 4
    change(file, "UPDATE logps SET nats = ? WHERE row = ?", bytes(spoiled), key)
    cache = ReferenceCache(file.parent, "key")
    missing = missing_groups(cache, GROUPS)
    assert len(missing) == 1
    cache.put([GROUPS[i] for i in missing], [VALUES[i] for i in missing])
    assert missing_groups(cache, GROUPS) == []
    for one, values in zip(GROUPS, VALUES, strict=True):
        np.testing.assert_array_equal(np.stack(cache.get(one)), np.stack(values))
    cache.close()


def test_values_of_another_row_are_noticed(file):
    (first, nats), (second, _), _ = rows(file)
    change(file, "UPDATE logps SET nats = ? WHERE row = ?", nats, second)
    cache = ReferenceCache(file.parent, "key")
    assert missing_groups(cache, GROUPS)
    cache.close()
    assert first != second


def test_rows_of_earlier_versions_are_read(file):
    for key, nats in rows(file):
        change(file, "UPDATE logps SET nats = ? WHERE row = ?", nats[:12], key)
    cache = ReferenceCache(file.parent, "key")
    assert missing_groups(cache, GROUPS) == []
    cache.close()


def test_a_cache_that_cannot_be_written_is_replaced_by_one_in_the_run(
    train, tmp_path, monkeypatch, capsys
):
    pairs = [{"prompt": f"{i}?", "chosen": " yes", "rejected": " no"} for i in range(12)]
    data = write_rows(tmp_path / "pairs.jsonl", pairs)
    options = ("--iters", 2, "--samples", 0, "--val-batches", 0)
    assert train("dpo", *options, data=data, output="whole")[0] == 0
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/dev/null")
    code, run = train("dpo", *options, data=data, output="run")
    assert code == 0
    assert "can't be written (not a directory): log-probs are stored in the run" in " ".join(
        capsys.readouterr().out.split()
    )
    assert list((run / "reference-cache").glob("*.sqlite"))
    losses = [[row["loss"] for row in metric_rows(name, "loss")] for name in ("whole", "run")]
    assert losses[0] == losses[1]
    named = ("--reference-cache", "/dev/null/cache")
    assert train("dpo", *options, *named, data=data, output="named")[0] == 1
    assert "--reference-cache /dev/null/cache: can't be used" in capsys.readouterr().err
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert train("dpo", *options, data=data, output="homeless")[0] == 0
