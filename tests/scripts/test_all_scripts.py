"""Every script starts, and what it imports from the package exists."""

import ast
import importlib
import importlib.util
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
from helpers.paths import SCRIPTS

FILES = sorted((*SCRIPTS.glob("*.py"), *SCRIPTS.glob("bench/*.py")))
# Packages that only some scripts need; the tests need none of them.
OPTIONAL = {
    *("torch", "trl", "peft", "mlx_lm_lora", "mlx_tune", "unsloth_zoo", "playwright"),
    *("krippendorff", "pandas", "crowdkit", "statsmodels"),
}


def name_of(file: Path) -> str:
    return file.relative_to(SCRIPTS).as_posix()


def imported(module: str, name: str) -> Any:
    """What `from module import name` gives.

    Raises:
        AttributeError, ModuleNotFoundError: There is no such name.
    """
    parent = importlib.import_module(module)
    if not hasattr(parent, name) and hasattr(parent, "__path__"):
        return importlib.import_module(f"{module}.{name}")
    return getattr(parent, name)


def unknown_names(tree: ast.Module) -> list[str]:
    """Names of the package that a script uses, also in its functions, and that don't exist."""
    unknown, modules = [], {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("mlx_align"):
            continue
        for alias in node.names:
            try:
                value = imported(node.module, alias.name)
            except (AttributeError, ModuleNotFoundError):
                unknown.append(f"{node.lineno}: {node.module}.{alias.name}")
            else:
                if isinstance(value, ModuleType):
                    modules[alias.asname or alias.name] = value
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        module = modules.get(node.value.id)
        if module is not None and not hasattr(module, node.attr):
            unknown.append(f"{node.lineno}: {module.__name__}.{node.attr}")
    return unknown


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_names_from_the_package_exist(file):
    assert unknown_names(ast.parse(file.read_text(encoding="utf-8"))) == []


def test_unknown_names_are_found():
    script = (
        "from mlx_align.training import run\nfrom mlx_align.errors import DataError\n"
        "def f():\n    from mlx_align.errors import NoError\n    run.train\n    run.no_train\n"
    )
    assert unknown_names(ast.parse(script)) == [
        "4: mlx_align.errors.NoError",
        "6: mlx_align.training.run.no_train",
    ]


def is_program(file: Path) -> bool:
    return '__name__ == "__main__"' in file.read_text(encoding="utf-8")


def missing_packages(file: Path) -> set[str]:
    """The optional packages that a script imports at its top and that are not installed."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    return {name for name in imported & OPTIONAL if importlib.util.find_spec(name) is None}


@pytest.mark.parametrize("file", filter(is_program, FILES), ids=name_of)
def test_help_is_printed(file, monkeypatch, capsys):
    if missing := missing_packages(file):
        pytest.skip(f"needs {', '.join(sorted(missing))}")
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    monkeypatch.setattr(sys, "path", [str(file.parent), *sys.path])
    with patch.dict(os.environ), pytest.raises(SystemExit) as stop:
        runpy.run_path(str(file), run_name="__main__")
    assert not stop.value.code
    assert "usage" in capsys.readouterr().out.lower()
