"""The tiny models of `tests/oracle/transformers`, as folders, and their log-probs.

`scripts/make_oracle_transformers.py` wrote them with transformers 5 and 4, in float32.
"""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_align.models.loading import ModelFolder, read_model_config
from mlx_align.types import GroupBatch

ORACLE = Path(__file__).parent / "oracle" / "transformers"
TOKENIZER = Path(__file__).parent / "oracle" / "models" / "policy"
_CONTENT = json.loads((ORACLE / "logprobs.json").read_text())
ROWS = _CONTENT["rows"]
CASES = _CONTENT["cases"]
VERSIONS = {major: _CONTENT[f"transformers {major}"] for major in ("5", "4")}
# (case, version of transformers that saved it)
FOLDERS = [(name, major) for name, case in CASES.items() for major in VERSIONS if major in case]

# Longest row, in tokens, that is computed as transformers does; the others are said to differ.
EXACT_UP_TO = {
    **{f"{family}-window": 8 for family in ("mistral", "qwen2", "qwen3", "gemma2", "phi3")},
    "starcoder2-window": 8,
    "llama-longrope": 32,
    "phi3-longrope": 32,
}
# Refused when loaded: part of the message.
REFUSED = {
    "qwen3_moe-yarn": "asks for rotary embeddings of type yarn",
}


def make_folder(name: str, major: str, folder: Path, tokenizer: bool = False) -> Path:
    """The model folder of a case, as transformers saved it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ORACLE / "configs" / f"{name}.{major}.json", folder / "config.json")
    weights = ORACLE / "weights" / f"{CASES[name]['weights']}.safetensors"
    shutil.copy(weights, folder / "model.safetensors")
    for file in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
        shutil.copy(TOKENIZER / file, folder / file)
    return folder


def open_folder(folder: Path) -> ModelFolder:
    """The folder as `open_model` opens it, without a tokenizer."""
    return ModelFolder(str(folder), folder, read_model_config(folder), None)


def differences(model, name, major):
    """Per row, the largest difference of a token's log-prob from transformers, in nats."""
    found = []
    for row, wanted in zip(ROWS, CASES[name][major], strict=True):
        batch = GroupBatch(
            prompt_tokens=mx.array([row[:1]]),
            prompt_lengths=mx.array([1]),
            completion_tokens=mx.array([row[1:]]),
            completion_mask=mx.ones((1, len(row) - 1), mx.bool_),
        )
        own = np.array(model.token_logprobs({}, batch))[0]
        found.append(float(np.abs(own - np.array(wanted)).max()))
    return found
