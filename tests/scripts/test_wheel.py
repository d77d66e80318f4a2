"""What is in the wheel: the whole package, the starter, and nothing else."""

import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    (file,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(file) as archive:
        yield archive


def test_it_has_the_package_and_the_starter(wheel):
    wanted = {
        f"{target}/{file.relative_to(ROOT / folder)}"
        for folder, target in (("mlx_align", "mlx_align"), ("data", "mlx_align/_shipped"))
        for file in (ROOT / folder).rglob("*")
        if file.is_file()
        and "__pycache__" not in file.parts
        # Conversations for the scripts of a clone.
        and not file.is_relative_to(ROOT / "data" / "real")
    }
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == wanted
    for name in (
        "starter.yaml",
        "starter/train.jsonl",
        "starter/valid.jsonl",
        "starter/model/model.safetensors",
        "starter/model/tokenizer.json",
    ):
        assert wheel.getinfo(f"mlx_align/_shipped/{name}").file_size
    assert "mlx_align/py.typed" in names


def test_its_command_and_its_extras_are_those_of_the_project(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    text = wheel.read(metadata).decode()
    extras = {line.split()[1] for line in text.splitlines() if line.startswith("Provides-Extra:")}
    assert extras == set(PROJECT["optional-dependencies"])
    entry_points = wheel.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert "mlx-align = mlx_align.cli.main:main" in entry_points
    assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())
