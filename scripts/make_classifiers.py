r"""Make tests/oracle/classifiers: tiny reward models of transformers, and its own scores of rows.

    pip install torch transformers
    python scripts/make_classifiers.py --output tests/oracle/classifiers \
        --tokenizer tests/oracle/models/policy

Writes for each family a random *ForSequenceClassification folder with one label, and scores.json:
rows of token ids of different lengths, and transformers' scores of them as one right-padded batch
in float32 on the CPU, once with a pad token and once with the end token as padding. The tests
need two families; `--families all` makes those of scripts/verify_classifiers.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

FAMILIES = ("llama", "qwen2")
ALL = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2", "smollm3", "glm4"),
    *("helium", "nemotron", "seed_oss", "stablelm", "ministral3"),
)
EOS, PAD = 2, 0
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def tiny_config(family: str, pad: int) -> Any:
    """A configuration of two small blocks."""
    return transformers.AutoConfig.for_model(
        family,
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=pad,
        num_labels=1,
        tie_word_embeddings=False,
    )


def scores_of(model: Any, rows: list[list[int]], pad: int) -> list[float]:
    """Scores by transformers of one right-padded batch of rows."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        scores: list[float] = model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()
    return scores


def make(family: str, output: Path, tokenizer: Path | None) -> dict[str, Any]:
    """One family's folder, and the scores of its rows."""
    torch.manual_seed(0)
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_config(tiny_config(family, PAD)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # The usual .02 gives scores that hardly differ, and norms of 1 hide how they are kept.
            scale = 0.2 if parameter.ndim > 1 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape))
    generator = torch.Generator().manual_seed(1)
    rows = [
        [*torch.randint(3, 400, (length,), generator=generator).tolist(), EOS]
        for length in (5, 17, 9, 30, 12, 3)
    ]
    own = scores_of(model, rows, PAD)
    folder = output / family
    model.save_pretrained(folder)
    if tokenizer is not None:
        for name in TOKENIZER:
            shutil.copy(tokenizer / name, folder / name)
    model.config.pad_token_id = EOS
    same = scores_of(model, rows, EOS)
    # A prompt takes the first three tokens, so that every row is prompt and completion.
    return {"rows": rows, "prompt": 3, "scores": own, "scores_where_pad_is_eos": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--families", default="")
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer goes along")
    options = parser.parse_args()
    wanted = ALL if options.families == "all" else options.families.split(",")
    found: dict[str, Any] = {}
    for family in filter(None, wanted) if options.families else FAMILIES:
        found[family] = make(family, options.output, options.tokenizer)
        print(family, [round(score, 4) for score in found[family]["scores"]])
    content = {"transformers": transformers.__version__, "torch": torch.__version__, **found}
    (options.output / "scores.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
