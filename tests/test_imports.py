"""The arrows of the house: who may import whom."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mlx_align"

# A part may import itself and what stands here.
GROUND = {"types", "errors", "config", "settings", "files"}
ALLOWED = {
    "types": set(),
    "errors": set(),
    "files": {"errors"},
    "settings": {"errors"},
    "config": {"errors", "settings"},
    "shipped": set(),
    "thresholds": set(),
    "losses": {"types", "errors"},
    "data": GROUND,
    "models": GROUND,
    "rollout": GROUND | {"losses", "data", "models"},
    "inference": GROUND | {"losses", "data", "models", "rollout"},
    "plan": GROUND | {"data", "models"},
    # Reads run folders only.
    "report": {"errors", "thresholds"},
    "train": GROUND
    | {"losses", "data", "models", "rollout", "inference", "plan", "report", "thresholds"},
    "cli": GROUND
    | {"losses", "data", "models", "rollout", "inference", "plan", "train", "shipped", "__init__"}
    | {"report"},
    "__init__": {"losses", "inference"},
}


def part_of(module: str) -> str:
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_arrows_point_one_way(file):
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            modules = [node.module]
            if node.module == "mlx_align":
                modules = [
                    f"mlx_align.{alias.name}" if (PACKAGE / alias.name).exists() else "mlx_align"
                    for alias in node.names
                ]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            if module.split(".")[0] == "mlx_align":
                target = part_of(module)
                assert target == part or target in ALLOWED[part], f"{file} imports {module}"


def test_losses_know_no_framework_but_mlx():
    for file in (PACKAGE / "losses").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            for name in names:
                assert name.split(".")[0] not in {"mlx_lm", "numpy", "datasets", "click"}, file
