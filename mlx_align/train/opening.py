"""A run folder is opened: made or found again, locked, and known to be the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_align.config import TrainConfig
from mlx_align.files import write_text, writing
from mlx_align.settings import to_yaml
from mlx_align.train import runlog
from mlx_align.train.fingerprints import FINGERPRINTS_FILE, check_same_run
from mlx_align.train.lock import locked


@contextmanager
def opened(
    run: Path,
    config: TrainConfig,
    made_of: dict[str, Any],
    note: Callable[[str], None],
    *,
    resume: bool,
) -> Iterator[None]:
    """Within the block, the run folder is this process's; it says what the run is made of.

    Args:
        run: The run folder; made where it is not there.
        config: The resolved options.
        made_of: `fingerprints` of the run.
        note: Told what differs from when the run began.
        resume: Whether the folder holds this run already.

    Raises:
        ConfigError: Another process trains there, it holds another run, or what it began with has
            changed.
        WriteError: The folder can't be written to.
    """
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
    with locked(run):
        if resume:
            for line in check_same_run(run, made_of):
                note(line)
        else:
            runlog.new_run_folder(str(run), made_of["command"])  # nobody was faster
            runlog.write_json(run / FINGERPRINTS_FILE, made_of)
        write_text(run / runlog.CONFIG_FILE, to_yaml(config))
        yield
