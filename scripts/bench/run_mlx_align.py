"""Steps of this package, on the way that `mlx-align dpo` takes: its objective, reference, loop."""

# The command itself comes first: it tells mlx how to order evaluation, which mlx reads once.
import mlx_align.cli.main

# isort: split
import tempfile
import time
from pathlib import Path

import common
import mlx.core as mx
import numpy as np

import mlx_align
import mlx_align.cli.main
from mlx_align.config import DpoConfig
from mlx_align.data.batching import microbatch_stream
from mlx_align.data.shapes import BatchLimit, plan_shapes
from mlx_align.inference.score import make_scorer
from mlx_align.models.loading import open_model
from mlx_align.train.loop import (
    LoopHooks,
    LoopSettings,
    Progress,
    make_optimizer,
    make_schedule,
    train,
)
from mlx_align.train.preference import dpo_task
from mlx_align.train.reference import ReferenceCache, reference_logps
from mlx_align.train.setup import make_policy, resolve_layout
from mlx_align.types import TokenizedGroup


def main() -> None:
    args = common.runner_arguments()
    result = common.Result(f"mlx-align {mlx_align.__version__}")
    config = DpoConfig(
        model=args.model,
        lora_rank=common.RANK,
        lora_alpha=common.RANK * common.SCALE,
        iters=args.steps,
        batch_size=args.batch_size,
        grad_accumulation_steps=1,
        learning_rate=common.LEARNING_RATE,
        lr_schedule="constant",
        warmup=0,
        weight_decay=common.WEIGHT_DECAY,
        grad_checkpoint=args.grad_checkpoint,
        beta=common.BETA,
    )
    task = dpo_task(config)
    groups = [
        TokenizedGroup(
            np.array(pair.prompt, np.int32),
            (np.array(pair.chosen, np.int32), np.array(pair.rejected, np.int32)),
            f"pair {i}",
        )
        for i, pair in enumerate(common.synthetic_pairs(args))
    ]
    shapes = plan_shapes(groups, BatchLimit(args.batch_size))
    policy = make_policy(config, open_model(args.model), resolve_layout(config))
    mx.eval(policy.model.module.parameters())
    result.model_bytes = mx.get_active_memory()
    mx.reset_peak_memory()

    scorer = make_scorer(policy.model)
    clock = common.StepClock()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cache = ReferenceCache(Path(folder), "bench")
        clock.start()
        reference = reference_logps(
            scorer,
            policy.start,
            groups,
            shapes,
            cache,
            range(len(groups)),
            lambda count: clock.tick() if count else None,
        )
        cache.close()
    result.reference_seconds = time.perf_counter() - began
    result.reference_pairs = len(groups)
    result.reference_batches = clock.seconds

    settings = LoopSettings(
        total_steps=args.steps,
        accumulation=config.grad_accumulation_steps,
        learning_rate=make_schedule(config.lr_schedule, config.learning_rate, args.steps, 0),
        max_grad_norm=config.max_grad_norm,
        steps_per_report=1,
        steps_per_eval=0,
        save_every=0,
    )
    rows: list[dict[str, float]] = []
    clock = common.StepClock()
    hooks = LoopHooks(
        report=lambda _, row: rows.append(row),
        evaluate=lambda _, __: False,
        save=lambda _, __, ___: None,
        tick=lambda _: clock.tick(),
    )
    objective = task.objective(policy, groups, reference, scorer)
    stream = microbatch_stream(groups, shapes, seed=config.seed)
    optimizer = make_optimizer(policy.start, config.weight_decay)
    clock.start()
    train(policy.model, policy.start, optimizer, objective, stream, settings, hooks, Progress())
    result.steps, result.cpu = clock.seconds, clock.cpu
    result.losses = [row["loss"] for row in rows]
    # The loop resets mlx's own counter, and keeps what it had counted.
    result.peak_bytes = int(rows[-1]["peak_memory_bytes"])
    result.note = policy.model.check
    result.print()


if __name__ == "__main__":
    main()
