"""Compare reward models with transformers, family by family, and print the table.

    pip install torch transformers
    python scripts/verify_classifiers.py [--families llama,qwen2]

For each family transformers makes a tiny random classifier, and its scores are compared with the
package's: rows of different lengths, padded with a pad token and with the end token. A LoRA run
with two heads is exported, and its scores in transformers are compared with the run's. Prints the
largest differences. Exits with 1 if one exceeds 1e-4 in a family that mlx-align exports, or if a
tensor is missing or unknown.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
import transformers
from make_classifiers import ALL, EOS, PAD, make, scores_of
from mlx.utils import tree_map

from mlx_align import RewardModel
from mlx_align.errors import MlxAlignError
from mlx_align.inference.export import FAMILIES, export_reward_model
from mlx_align.models.adapters import AdapterLayout, install_adapters, save_adapter
from mlx_align.models.heads import REWARD_HEAD, add_reward_head
from mlx_align.models.loading import load_language_model, open_model
from mlx_align.types import TokenizedGroup

TOKENIZER = Path(__file__).parent.parent / "tests" / "oracle" / "models" / "policy"
ALLOWED = 1e-4


def scores_here(model: RewardModel, content: dict[str, Any]) -> np.ndarray:
    """The package's scores of the rows, each split into prompt and completion."""
    groups = []
    for row in content["rows"]:
        ids = np.array(row, np.int32)
        while model.padding is not None and ids[-1] == model.padding:
            ids = ids[:-1]
        prompt, completion = ids[: content["prompt"]], ids[content["prompt"] :]
        groups.append(TokenizedGroup(prompt, (completion,), "row"))
    return np.array([scores[0].mean() for scores in model.score_tokens(groups)])


def make_run(base: Path, folder: Path) -> None:
    """A run folder on `base`: random adapters and two heads."""
    model = load_language_model(open_model(str(base)))
    layout = AdapterLayout(rank=4)
    mx.random.seed(1)
    weights = install_adapters(model.module, layout)
    weights = tree_map(lambda w: w + 0.05 * mx.random.normal(w.shape), weights)
    head = add_reward_head(model.backbone, members=2).parameters()
    folder.mkdir()
    save_adapter(folder, {**weights, REWARD_HEAD: head}, layout, str(base))


def verify(family: str, folder: Path) -> list[float]:
    """Largest differences: import, import where pad is EOS, export, export loaded again."""
    content = make(family, folder, TOKENIZER)
    base, run, exported = folder / family, folder / "run", folder / "exported"
    model = RewardModel.load(str(base))
    gaps = [np.abs(scores_here(model, content) - content["scores"]).max()]
    same = scores_here(replace(model, padding=EOS), content)
    gaps.append(np.abs(same - content["scores_where_pad_is_eos"]).max())
    if family not in FAMILIES:
        return [*map(float, gaps)]
    make_run(base, run)
    ours = scores_here(RewardModel.load(str(base), run), content)
    export_reward_model(open_model(str(base)), run, exported)
    auto = transformers.AutoModelForSequenceClassification
    theirs, info = auto.from_pretrained(
        exported, output_loading_info=True, dtype=torch.float32, local_files_only=True
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(f"{family}: {info}")
    found = scores_of(theirs.eval(), content["rows"], theirs.config.pad_token_id)
    gaps.append(np.abs(ours - found).max())
    gaps.append(np.abs(ours - scores_here(RewardModel.load(str(exported)), content)).max())
    return [*map(float, gaps)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default=",".join(ALL))
    transformers.logging.set_verbosity_error()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, pad {PAD}\n")
    print("| family | import | pad = EOS | export | loaded again |\n|---|---:|---:|---:|---:|")
    failed = False
    for family in parser.parse_args().families.split(","):
        with tempfile.TemporaryDirectory() as folder:
            try:
                gaps = verify(family, Path(folder))
            except (MlxAlignError, ValueError) as error:
                failed = True
                print(f"| {family} | {error} |", flush=True)
                continue
        failed |= family in FAMILIES and max(gaps) > ALLOWED
        cells = [f"{gap:.1e}" for gap in gaps] + ["–"] * (4 - len(gaps))
        print(f"| {family} | {' | '.join(cells)} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
