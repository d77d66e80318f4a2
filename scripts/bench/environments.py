"""The packages that are compared, at fixed versions, each in a virtual environment of its own."""

import json
import platform
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

# The one that mlx-align is tested with; the same for all, so that packages are compared, not mlx.
MLX = "mlx==0.32.4" if sys.platform == "darwin" else "mlx[cpu]==0.32.4"
TRANSFORMERS = "transformers==5.23.0"


@dataclass(frozen=True)
class Package:
    """A package and how to run it.

    Attributes:
        name: What it is called in the table, in options, and its environment's folder.
        runner: The script, beside this file.
        installs: Arguments of one `pip install` after the other; none for the environment that
            the benchmark itself runs in.
        shares_mlx: Whether it stands on mlx, so that its peak is measured as ours is.
        power_exponential: Whether ours runs with the faster exponential that it has on x86.
    """

    name: str
    runner: str
    installs: tuple[tuple[str, ...], ...] = ()
    shares_mlx: bool = True
    power_exponential: bool = False


# With mlx's own exponential: a Mac has no other.
OURS = Package("mlx-align", "run_mlx_align.py")
# As it runs on x86, with the faster exponential of `mlx_align/models/patches.py`.
WITH_POWER = Package("mlx-align with power", "run_mlx_align.py", power_exponential=True)
PEERS = (
    Package("mlx-lm-lora", "run_mlx_lm_lora.py", (("mlx-lm-lora==5.10.2", MLX),)),
    Package("mlx-tune", "run_mlx_tune.py", (("mlx-tune==0.6.0", MLX),)),
    Package(
        "unsloth_zoo",
        "run_unsloth_zoo.py",
        (
            (MLX, "mlx-lm==0.32.2"),
            # Without its dependencies: they are those of its CUDA half.
            (
                "--no-deps",
                "unsloth_zoo==2026.10.9",
                *("psutil", "pillow", "msgspec", "tqdm", "requests", "certifi"),
                *("charset-normalizer", "urllib3"),
            ),
            ("datasets>=3.4.1,<5",),
        ),
    ),
)
TRL = Package(
    "trl",
    "run_trl.py",
    (("torch==2.13.0", "trl==1.16.0", "peft==0.21.2", TRANSFORMERS),),
    shares_mlx=False,
)


def python_of(package: Package, folder: Path) -> Path:
    """The interpreter to run `package` with; its environment is made if it is not there yet.

    Args:
        package: The package.
        folder: Holds the environments, one folder each.

    Raises:
        subprocess.CalledProcessError: pip could not install it.
    """
    if not package.installs:
        return Path(sys.executable)
    home = folder / package.name
    python = home / "bin" / "python"
    # Written last, so a half-made environment is made again; other versions, another content.
    stamp = home / "installed.json"
    content = json.dumps([platform.python_version(), package.installs])
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == content:
        return python
    print(f"Installing {package.name} into {home} …", file=sys.stderr, flush=True)
    venv.create(home, with_pip=True, clear=True, symlinks=True)
    for arguments in package.installs:
        subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)
    stamp.write_text(content, encoding="utf-8")
    return python
