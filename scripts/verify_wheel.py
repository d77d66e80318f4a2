"""Install the wheel into fresh environments, and use it there as a stranger would.

    python scripts/verify_wheel.py [dist]

Checks that the source distribution makes the same wheel, that the console script and `python -m
mlx_align` start, that the starter comes along and trains two updates, and that the extras install
(those with torch are only resolved, unless --all is given). Everything happens in a temporary
folder. Takes three minutes, most of it pip's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
# Extras that take gigabytes.
LARGE = ("interop", "oracle")


def run(*command: str | Path, where: Path) -> str:
    """Run a command in a folder outside the checkout; returns what it prints.

    Raises:
        click.ClickException: It fails.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in command], cwd=where, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        shown = " ".join(map(str, command))
        raise click.ClickException(f"{shown}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def fresh_environment(folder: Path) -> Path:
    """A new virtual environment; returns its bin folder."""
    venv.create(folder, with_pip=True)
    return folder / "bin"


def files_of(wheel: Path) -> dict[str, int]:
    """The files in a wheel and their checksums, without its own list of them."""
    with zipfile.ZipFile(wheel) as archive:
        return {i.filename: i.CRC for i in archive.infolist() if not i.filename.endswith("/RECORD")}


def check_source(sdist: Path, wheel: Path, pip: Path, where: Path) -> None:
    """The wheel made from the source distribution has the same files."""
    run(pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", where / "again", sdist, where=where)
    (again,) = (where / "again").glob("*.whl")
    if files_of(again) != files_of(wheel):
        different = sorted(set(files_of(again).items()) ^ set(files_of(wheel).items()))
        raise click.ClickException(f"the source distribution makes another wheel: {different[:5]}")


@click.command(help=__doc__)
@click.argument("dist", type=click.Path(exists=True, path_type=Path), default=ROOT / "dist")
@click.option("--all", "everything", is_flag=True, help="Install the large extras too.")
def main(dist: Path, everything: bool) -> None:
    """Run all checks."""
    (wheel,) = (file.resolve() for file in dist.glob("*.whl"))
    (sdist,) = (file.resolve() for file in dist.glob("*.tar.gz"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    where = Path(tempfile.mkdtemp())
    try:
        bin_folder = fresh_environment(where / "environment")
        python, program = bin_folder / "python", bin_folder / "mlx-align"
        run(python, "-m", "pip", "install", "--quiet", wheel, where=where)
        found = Path(run(python, "-c", "import mlx_align; print(mlx_align.__file__)", where=where))
        if ROOT in found.parents:
            raise click.ClickException(f"{found}: is the checkout, not the wheel")
        for command in ((program,), (python, "-m", "mlx_align")):
            version = run(*command, "--version", where=where).split()[-1]
            if version != project["version"]:
                raise click.ClickException(f"{command[0]} --version: {version}")
            if "dpo" not in run(*command, where=where):
                raise click.ClickException(f"{command[0]}: prints no help")
        click.echo(f"console script and python -m mlx_align: {version}")
        options = ("--iters", "2", "--samples", "0", "--val-batches", "1", "--json")
        out = run(program, "dpo", *options, "--output", where / "run", where=where)
        steps = json.loads(out)["steps"]
        if steps != 2 or not (where / "run" / "adapters.safetensors").is_file():
            raise click.ClickException(f"mlx-align dpo made {steps} updates, expected 2")
        click.echo("mlx-align dpo trained the starter for 2 updates")
        check_source(sdist, wheel, bin_folder / "pip", where)
        click.echo("the source distribution makes the same wheel")
        for extra in project["optional-dependencies"]:
            dry = () if everything or extra not in LARGE else ("--dry-run",)
            target = f"{wheel}[{extra}]"
            run(python, "-m", "pip", "install", "--quiet", *dry, target, where=where)
            click.echo(f"[{extra}]: {'resolves' if dry else 'installs'}")
        run(program, "--version", where=where)
    finally:
        shutil.rmtree(where, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
