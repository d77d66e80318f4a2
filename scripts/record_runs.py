"""Write tests/training/recorded_runs.json again: the numbers of short runs of every command.

    python scripts/record_runs.py
    python scripts/record_runs.py --cases dpo-ipo,grpo

Only for changes that are meant to change numbers. With --cases, the other cases stay as recorded.
With --interrupted-runs, the run folders from which the tests resume are made again too; without it
they stay those of an older version, which is what they are kept for.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "training")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import recorded_runs as runs


def dump(value: Any, depth: int = 0) -> str:
    """JSON with a line per row of metrics and per tensor, so that changes can be read."""
    if depth == 4 or not isinstance(value, dict | list) or not value:
        return json.dumps(value, ensure_ascii=False)
    space = " " * depth
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {dump(item, depth + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(f"{space} {item}" for item in items) + f"\n{space}}}"
    items = [dump(item, depth + 1) for item in value]
    return "[\n" + ",\n".join(f"{space} {item}" for item in items) + f"\n{space}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", help="comma-separated; default: all")
    parser.add_argument("--interrupted-runs", action="store_true")
    given = parser.parse_args()
    chosen = given.cases
    cases = chosen.split(",") if chosen else list(runs.CASES)
    recorded: dict[str, Any] = {
        "environment": runs.environment(),
        "rounding": runs.rounding(),
        "runs": {},
    }
    if chosen:
        recorded["runs"] = json.loads(runs.RECORDED.read_text())["runs"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder + "/cache"
        work = Path(folder, "work")
        work.mkdir()
        recorder = runs.Recorder(work)
        for case in cases:
            print(case, flush=True)
            recorded["runs"][case] = recorder.record(case)
    if given.interrupted_runs:
        shutil.rmtree(runs.INTERRUPTED, ignore_errors=True)
        with tempfile.TemporaryDirectory() as folder:
            recorder = runs.Recorder(Path(folder))
            for case in runs.CASES:
                if case.endswith("-resumed"):
                    recorder.interrupt(case, runs.INTERRUPTED)
    ordered = {case: recorded["runs"][case] for case in runs.CASES if case in recorded["runs"]}
    runs.RECORDED.write_text(dump({**recorded, "runs": ordered}) + "\n")
    print(f"{runs.RECORDED}: {len(ordered)} cases")


if __name__ == "__main__":
    main()
