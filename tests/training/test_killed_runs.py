"""Every training command is killed three times, once in a checkpoint, and ends with the same bytes.

`scripts/verify_resume.py` does it: 3 moments of each command here, 200 at random by hand.
"""

import json
import subprocess
import sys

import pytest
from helpers.paths import SCRIPTS, TINY_MODEL

COMMANDS = ("dpo", "kto", "sft", "reward", "ppo", "grpo")


@pytest.fixture(scope="module")
def killed():
    """What the script says of all commands; one process for all, as imports take seconds."""
    script = SCRIPTS / "verify_resume.py"
    command = [sys.executable, str(script), "--json", "--commands", ",".join(COMMANDS)]
    command += ["--model", str(TINY_MODEL), "--moments", "update:3,checkpoint:5,write:14"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_run_ends_with_the_same_bytes(killed, command):
    assert killed["kills"][command] == 3
    assert killed["faults"][command] == []
