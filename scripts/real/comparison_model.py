"""What `compare.py` needs a model for: the pairs as token ids, the start, and the held-out loss.

    python scripts/real/comparison_model.py prepare FOLDER    # writes prepared.json and start/
    python scripts/real/comparison_model.py evaluate FOLDER ADAPTER ...   # writes evaluation.json

`compare.py` calls it. FOLDER holds settings.json, and the rows in data/ and held-out/.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_align.algorithms.dpo import DPO
from mlx_align.config import DPOConfig
from mlx_align.data.batching import epoch_order
from mlx_align.data.buckets import BatchLimit, microbatch_tokens, plan_shapes
from mlx_align.inference.scoring import score_groups
from mlx_align.models.adapters import load_adapter, save_adapter
from mlx_align.models.loading import open_model
from mlx_align.models.policy import Policy, make_policy
from mlx_align.system.intervals import metric_interval
from mlx_align.training.offline import OfflineSetup, prepare_offline
from mlx_align.training.setup import resolve_layout
from mlx_align.types import TokenizedGroup

# Sizes of packed microbatches that are tried, tokens.
PACKED_TOKENS = range(64, 4096, 16)
HELD_OUT = ("loss", "rewards/accuracies", "rewards/margins")


def options(folder: Path, rows: str) -> dict[str, Any]:
    """Options of `mlx_align.dpo` for the rows in a folder of the comparison."""
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    return {**settings["options"], "model": settings["model"], "data": str(folder / rows)}


def read(folder: Path, rows: str) -> tuple[DPO, OfflineSetup]:
    """The rows as a run reads them, with the defaults that it chooses."""
    config = DPOConfig(**options(folder, rows))
    algorithm = DPO(config)
    return algorithm, prepare_offline(algorithm, config, open_model(str(config.model)))


def policy_of(config: DPOConfig) -> Policy:
    """The model with the adapters that a run starts from."""
    return make_policy(config, open_model(str(config.model)), resolve_layout(config))


def order_of_pairs(groups: Sequence[TokenizedGroup], seed: int) -> list[int]:
    """Indices of the pairs in the order in which a run with --batch-size 1 trains on them."""
    batches = epoch_order(groups, plan_shapes(groups, BatchLimit(1)), seed=seed)
    return [index for batch in batches for index in batch.indices]


def packed_tokens(groups: Sequence[TokenizedGroup], seed: int, updates: int) -> int | None:
    """Tokens of packed microbatches of which there are `updates`, with the least padding."""
    cost = {}
    for tokens in PACKED_TOKENS:
        shapes = plan_shapes(groups, BatchLimit(tokens=tokens, packed=True))
        batches = epoch_order(groups, shapes, seed=seed)
        if len(batches) == updates:
            cost[tokens] = sum(microbatch_tokens(batch.shape, 2) for batch in batches)
    return min(cost, key=lambda tokens: cost[tokens]) if cost else None


def prepare(folder: Path, updates: int) -> None:
    """Write prepared.json (pairs in order, defaults) and the adapter that all start from."""
    _, setup = read(folder, "data")
    groups, config = setup.train, setup.config
    order = order_of_pairs(groups, config.seed)
    pairs = [
        [groups[i].prompt.tolist(), *(ids.tolist() for ids in groups[i].completions)] for i in order
    ]
    content = {
        "pairs": pairs,
        "order": order,
        "packed_tokens": packed_tokens(groups, config.seed, updates),
        "grad_checkpoint": config.grad_checkpoint,
    }
    assert isinstance(config, DPOConfig)
    policy = policy_of(config)
    (folder / "start").mkdir(exist_ok=True)
    save_adapter(folder / "start", policy.start, policy.layout, str(config.model))
    # Last: with it, the folder is prepared.
    (folder / "prepared.json").write_text(json.dumps(content), encoding="utf-8")


def evaluate(folder: Path, adapters: Sequence[Path]) -> None:
    """Write evaluation.json to the folder of each adapter: held-out means and their intervals."""
    algorithm, setup = read(folder, "held-out")
    groups, shapes = setup.train, plan_shapes(setup.train, BatchLimit(4))
    policy = policy_of(DPOConfig(**options(folder, "held-out")))
    scorer = algorithm.make_scorer(policy.model)
    reference = score_groups(scorer, policy.start, groups, shapes)
    for adapter in adapters:
        weights = load_adapter(adapter, policy.start, policy.layout)
        logps = score_groups(scorer, weights, groups, shapes)
        found = algorithm.evaluate(logps, reference, groups)
        content: dict[str, Any] = {"pairs": len(groups)}
        for name in HELD_OUT:
            interval = metric_interval(found, name, len(groups))
            assert interval is not None
            content[name] = [interval.value, interval.low, interval.high]
        (adapter / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "evaluate"):
        commands.add_parser(name).add_argument("folder", type=Path)
    commands.choices["prepare"].add_argument("updates", type=int)
    commands.choices["evaluate"].add_argument("adapters", type=Path, nargs="+")
    arguments = parser.parse_args()
    if arguments.command == "prepare":
        prepare(arguments.folder, arguments.updates)
    else:
        evaluate(arguments.folder, arguments.adapters)


if __name__ == "__main__":
    main()
