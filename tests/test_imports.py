"""The direction of imports: a part imports only parts below it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mlx_align"

# From the bottom up. A part imports itself and the levels below.
LEVELS = (
    {"errors", "types", "system"},
    {"losses"},
    {"config"},
    {"data", "models", "tracking"},
    {"inference", "planning", "report"},
    {"rollout", "evaluation"},
    {"preferences"},
    {"algorithms"},
    {"training"},
    {"commands", "selftest"},
    {"improver"},
    {"run"},
    {"api"},
    {"trl"},
    {"__init__"},
    {"cli"},
    {"__main__"},
)
# Parts of one level that import each other, in one direction.
ACROSS = {
    ("types", "errors"),
    ("system", "errors"),
    ("models", "data"),
    ("report", "tracking"),
    ("evaluation", "rollout"),
}
# Parts below that are off limits all the same.
EXCEPTIONS = {
    # Losses are pure functions of arrays.
    ("losses", "system"),
    # The page is made from run folders alone.
    ("report", "models"),
    ("report", "data"),
    ("report", "losses"),
}
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}


def part_of(module: str) -> str:
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


def imports_of(file: Path) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            if node.module == "mlx_align":
                modules += [
                    f"mlx_align.{alias.name}"
                    if (PACKAGE / alias.name).exists() or (PACKAGE / f"{alias.name}.py").exists()
                    else "mlx_align"
                    for alias in node.names
                ]
            else:
                modules.append(node.module)
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    return modules


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_point_down(file):
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imports_of(file):
        if module.split(".")[0] == "mlx_align":
            target = part_of(module)
            below = LEVEL[target] < LEVEL[part] and (part, target) not in EXCEPTIONS
            assert target == part or below or (part, target) in ACROSS, f"{file}: {module}"


def test_losses_know_no_framework_but_mlx():
    for file in (PACKAGE / "losses").glob("*.py"):
        for name in imports_of(file):
            assert name.split(".")[0] not in {"mlx_lm", "numpy", "datasets", "click"}, file
