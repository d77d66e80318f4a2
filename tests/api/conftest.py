"""A tiny model and small data for tests of the Python functions."""

import pytest
from helpers.paths import TINY_MODEL


def message(role, content):
    return [{"role": role, "content": content}]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    """Runs are written to, and relative paths start from, an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny():
    """The path of the tiny model."""
    return str(TINY_MODEL)


@pytest.fixture
def pairs():
    """Preference pairs of several lengths."""
    return [
        {
            "prompt": message("user", f"Is number {i} good?{' Really?' * (i % 3)}"),
            "chosen": message("assistant", f"yes {'a' * (i % 5)}"),
            "rejected": message("assistant", f"no {'b' * (i % 4)} never"),
        }
        for i in range(20)
    ]


@pytest.fixture
def prompts():
    """Prompts with a column for rewards."""
    return [
        {"prompt": message("user", f"What is {i} + 1?"), "answer": str(i + 1)} for i in range(12)
    ]


@pytest.fixture
def small():
    """Options of a short offline run."""
    return {
        "iters": 3,
        "batch_size": 2,
        "grad_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "samples": 2,
        "sample_tokens": 4,
        "progress": False,
    }


@pytest.fixture
def sampling():
    """Options of a short on-policy run."""
    return {
        "iters": 2,
        "batch_size": 2,
        "grad_accumulation_steps": 1,
        "group_size": 2,
        "max_completion_length": 6,
        "samples": 1,
        "sample_tokens": 4,
        "progress": False,
    }
