"""Reward models to and from transformers, family by family: the table of it, for the README.

    pip install torch transformers
    python scripts/verify_classifiers.py [--families llama,qwen2]

Of each family a tiny random classifier is made by transformers and scored here: ragged rows, padded
with a token of their own and with the end token. A LoRA run with two heads on it is exported, and
what transformers scores with that is compared with the run here. Largest differences are printed;
exits with 1 where one of a family that mlx-align exports is above 1e-4, or a tensor is not taken.
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
from mlx_align.models.adapters import AdapterLayout, install, save_adapter
from mlx_align.models.heads import HEAD_NAME, put_head
from mlx_align.models.loading import load_language_model, open_model
from mlx_align.types import TokenizedGroup

TOKENIZER = Path(__file__).parent.parent / "tests" / "oracle" / "models" / "policy"
ALLOWED = 1e-4


def scores_here(model: RewardModel, content: dict[str, Any]) -> np.ndarray:
    """What the package scores the rows, each cut into prompt and completion."""
    groups = []
    for row in content["rows"]:
        ids = np.array(row, np.int32)
        while model.unread is not None and ids[-1] == model.unread:
            ids = ids[:-1]
        prompt, completion = ids[: content["prompt"]], ids[content["prompt"] :]
        groups.append(TokenizedGroup(prompt, (completion,), "row"))
    return np.array([scores[0].mean() for scores in model.score_tokens(groups)])


def make_run(base: Path, folder: Path) -> None:
    """A run folder on `base`: adapters away from the identity, two heads."""
    model = load_language_model(open_model(str(base)))
    layout = AdapterLayout(rank=4)
    mx.random.seed(1)
    tree = install(model.module, layout)
    tree = tree_map(lambda w: w + 0.05 * mx.random.normal(w.shape), tree)
    head = put_head(model.anatomy, members=2).parameters()
    folder.mkdir()
    save_adapter(folder, {**tree, HEAD_NAME: head}, layout, str(base))


def verify(family: str, folder: Path) -> list[float]:
    """Largest differences: import, import where pad is EOS, export, export loaded again."""
    content = make(family, folder, TOKENIZER)
    base, run, exported = folder / family, folder / "run", folder / "exported"
    model = RewardModel.load(str(base))
    gaps = [np.abs(scores_here(model, content) - content["scores"]).max()]
    same = scores_here(replace(model, unread=EOS), content)
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
