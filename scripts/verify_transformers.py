"""Compare log-probs with those of transformers, for folders that its versions 5 and 4 save.

    python scripts/verify_transformers.py [--cases llama,gemma3_text]

For every case of tests/oracle/transformers prints the largest difference of a token's log-prob, in
nats: mlx-lm by itself on the folder of transformers 5, this package on the folders of 5 and 4, and
this package on rows longer than the model is computed exactly. Exits with 1 if a difference within
the exact length is above 1e-4.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from mlx_lm.utils import load_model

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from transformers_oracle import (
    CASES,
    EXACT_UP_TO,
    REFUSED,
    ROWS,
    VERSIONS,
    differences,
    make_folder,
    open_folder,
)

from mlx_align.errors import ModelError
from mlx_align.models.backbone import split_backbone
from mlx_align.models.loading import LanguageModel, load_language_model

ALLOWED = 1e-4
NONE = "–"


def alone(name: str, major: str) -> str:
    """The largest difference of mlx-lm by itself, as a cell."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_folder(name, major, Path(temporary))
        try:
            module, _ = load_model(folder)
            backbone = split_backbone(module)
            model = LanguageModel(open_folder(folder), backbone, shared=False, check="")
            return f"{max(differences(model, name, major)):.1e}"
        except Exception:  # mlx-lm refuses it, in many ways
            return "not loaded"


def here(name: str, major: str) -> tuple[str, str, bool]:
    """The largest difference within the exact length, that beyond it, whether it is allowed."""
    if major not in CASES[name]:
        return NONE, "", True
    with tempfile.TemporaryDirectory() as temporary:
        folder = open_folder(make_folder(name, major, Path(temporary)))
        try:
            gaps = differences(load_language_model(folder), name, major)
        except ModelError:
            return "refused", "", name in REFUSED
    exact = EXACT_UP_TO.get(name, len(ROWS[-1]))
    within = max(gap for row, gap in zip(ROWS, gaps, strict=True) if len(row) <= exact)
    beyond = [gap for row, gap in zip(ROWS, gaps, strict=True) if len(row) > exact]
    cell = f"beyond {exact} tokens {max(beyond):.1e}" if beyond else ""
    return f"{within:.1e}", cell, within <= ALLOWED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    names = ", ".join(f"transformers {version}" for version in VERSIONS.values())
    print(f"{names}; rows of {', '.join(str(len(row)) for row in ROWS)} tokens, float32\n")
    print("| case | mlx-lm alone, 5.x folder | 5.x folder | 4.x folder | longer rows |")
    print("|---|---:|---:|---:|---|")
    passed = True
    for name in parser.parse_args().cases.split(","):
        five, beyond, right = here(name, "5")
        four, _, also = here(name, "4")
        passed &= right and also
        print(f"| {name} | {alone(name, '5')} | {five} | {four} | {beyond} |", flush=True)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
