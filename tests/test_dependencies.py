"""The dependencies in pyproject.toml are exactly what the package imports."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Names under which a distribution is imported, where they differ from its own.
IMPORTED_AS = {"pyyaml": "yaml", "mlx-lm": "mlx_lm", "markdown-it-py": "markdown_it"}


def imported() -> set[str]:
    """Names of the outside packages that any file of the package imports, anywhere in it."""
    names = set()
    for path in (ROOT / "mlx_align").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add((node.module or "").split(".")[0])
    return names - sys.stdlib_module_names - {"mlx_align"}


def declared() -> tuple[set[str], set[str]]:
    """Import names of the dependencies, and of the optional ones."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements):
        found = (re.match(r"[A-Za-z0-9_.-]+", line)[0].lower() for line in requirements)
        return {IMPORTED_AS.get(name, name.replace("-", "_")) for name in found}

    optional = project["optional-dependencies"].values()
    return names(project["dependencies"]), names(line for lines in optional for line in lines)


def test_what_is_imported_is_declared():
    needed, optional = declared()
    # IPython is imported in a notebook alone, where it is there.
    assert imported() <= needed | optional | {"IPython"}


def test_what_is_declared_is_imported():
    assert declared()[0] <= imported()
