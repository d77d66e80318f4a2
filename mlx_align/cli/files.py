"""Files that a command writes, checked before it works for them."""

from __future__ import annotations

from pathlib import Path

from mlx_align.errors import ConfigError


def free_file(output: str) -> Path:
    """The file that `--output` names, which is not there yet.

    Raises:
        ConfigError: It is, or its folder is not.
    """
    file = Path(output).expanduser()
    if file.exists():
        raise ConfigError(f"--output {output}: is there already; name a new file")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {file.absolute().parent}")
    return file
