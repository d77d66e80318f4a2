"""The machine that a run is planned for: memory, working set, and known problems."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_align.errors import ConfigError

# The working set that Metal recommends: two thirds of the memory up to 32 GB, three quarters above
# (newer versions of macOS allow up to four fifths there).
SMALL_MAC_BYTES = 34e9
SMALL_FRACTION, LARGE_FRACTION = 2 / 3, 3 / 4
# Earlier versions of mlx apply wrong rope positions to every batch row but the first.
OLDEST_MLX = (0, 32)
# Since this version of macOS, memory can be wired (kept resident). Earlier versions may page out a
# large model.
WIRED_MACOS = (15, 0)
# The first chip generation with native bf16; M1 and M2 emulate it.
NATIVE_BF16 = 3

_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(?:gb|gib|g)\b", re.IGNORECASE)
_CHIP = re.compile(r"\bM(\d)(?:\s*(Pro|Max|Ultra))?\b", re.IGNORECASE)
_IGNORED = re.compile(r"\b(?:apple|i?mac\w*|air|mini|pro|studio|ram|memory|with|of)\b|[,/+]")


@dataclass(frozen=True)
class Machine:
    """A machine to plan for.

    Attributes:
        name: Name to display.
        memory_bytes: Total memory.
        working_set_bytes: Memory that a run may use.
        metal: Whether mlx runs on Metal there.
        chip: Generation of the Apple chip (2 for an M2); None if unknown.
        macos: Version of macOS; None for machines other than this one, or without macOS.
        here: Whether it is this machine.
    """

    name: str
    memory_bytes: int
    working_set_bytes: int
    metal: bool
    chip: int | None = None
    macos: tuple[int, ...] | None = None
    here: bool = True


def this_machine() -> Machine:
    """This machine, with Metal's recommended working set, or all memory if there is no Metal."""
    if mx.metal.is_available():
        info: dict[str, Any] = dict(mx.device_info())
        name = str(info.get("device_name", "Apple GPU"))
        memory = int(info["memory_size"])
        chip = _CHIP.search(name)
        return Machine(
            name=f"{name}, {memory / 2**30:.0f} GB",
            memory_bytes=memory,
            working_set_bytes=int(info["max_recommended_working_set_size"]),
            metal=True,
            chip=int(chip[1]) if chip else None,
            macos=_numbers(platform.mac_ver()[0]),
        )
    memory = _total_memory()
    name = f"{platform.system()} {platform.machine()}"
    return Machine(name, memory, memory, metal=False)


def parse_machine(text: str) -> Machine:
    """Parse the description of a Mac, like "16 GB M2" or "M3 Max 64GB".

    A GB is counted as 1e9 bytes, 7% less than the 2^30 of Apple's specifications, as a margin.

    Raises:
        ConfigError: The text names no plausible amount of memory, or contains unknown words.
    """
    memory, chip = _MEMORY.search(text), _CHIP.search(text)
    rest = _CHIP.sub(" ", _MEMORY.sub(" ", text, count=1), count=1)
    rest = _IGNORED.sub(" ", rest.lower()).strip()
    if memory is None or rest or not 4 <= float(memory[1]) <= 2048:
        raise ConfigError(
            f'--machine {text!r}: expected the memory and chip of a Mac, like "16 GB M2" or '
            '"M3 Max 64GB"'
        )
    total = int(float(memory[1]) * 1e9)
    fraction = SMALL_FRACTION if total <= SMALL_MAC_BYTES else LARGE_FRACTION
    kind = f" {chip[2].title()}" if chip and chip[2] else ""
    named = f"Apple M{chip[1]}{kind}" if chip else "Mac"
    return Machine(
        name=f"{named}, {float(memory[1]):g} GB",
        memory_bytes=total,
        working_set_bytes=int(total * fraction),
        metal=True,
        chip=int(chip[1]) if chip else None,
        here=False,
    )


def platform_warnings(machine: Machine, activation_dtype: str) -> list[str]:
    """Known problems and recommendations for a machine, one line each.

    Args:
        machine: The machine.
        activation_dtype: Dtype of the hidden states as safetensors names it: F32, F16 or BF16.
    """
    found = []
    mlx_version = _version("mlx")
    if _numbers(mlx_version) < OLDEST_MLX:
        found.append(
            f"mlx {mlx_version} applies wrong positions to batch rows after the first: "
            "pip install -U mlx"
        )
    if not machine.metal:
        found.append("No Metal on this machine: training takes many times longer than on a Mac.")
        return found
    if machine.macos is not None and machine.macos < WIRED_MACOS:
        text = ".".join(map(str, machine.macos))
        found.append(
            f"macOS {text} may page out a large model; macOS 15 and later keep it resident."
        )
    if activation_dtype == "BF16" and machine.chip is not None and machine.chip < NATIVE_BF16:
        found.append(
            f"M{machine.chip} emulates bf16: mlx_lm.convert --dtype float16 makes a faster copy "
            "(float16 overflows above 65,504: watch the first losses)."
        )
    found.append(
        "Long runs: connect the power adapter and start with caffeinate -is mlx-align …; let the "
        "display sleep, because an active display can trigger the GPU watchdog."
    )
    return found


def software_versions() -> dict[str, str]:
    """Versions of mlx, mlx-lm and the operating system."""
    mac = platform.mac_ver()[0]
    return {
        "mlx": _version("mlx"),
        "mlx-lm": _version("mlx-lm"),
        "system": f"macOS {mac}" if mac else f"{platform.system()} {platform.release()}",
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "0"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])


def _total_memory() -> int:
    """Bytes of memory, or the container's limit if it is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return total
    return min(total, int(limit)) if limit.isdigit() else total
