"""Steps of this package, as `mlx-align dpo` makes them: its objective, reference and updates."""

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
from mlx_align.algorithms.dpo import DPO
from mlx_align.algorithms.update import make_optimizer, make_schedule
from mlx_align.config import DPOConfig
from mlx_align.data.batching import microbatch_stream
from mlx_align.data.buckets import BatchLimit, plan_shapes
from mlx_align.inference.scoring import make_logprob_scorer
from mlx_align.models import patches
from mlx_align.models.loading import open_model
from mlx_align.models.policy import make_policy
from mlx_align.training.metrics import Progress
from mlx_align.training.offline import OfflineTrainer
from mlx_align.training.reference import ReferenceCache, cached_logprobs
from mlx_align.training.setup import resolve_layout
from mlx_align.types import TokenizedGroup


def main() -> None:
    job = common.read_job()
    patches.EXPONENTIAL_BY_POWER = job.power_exponential
    result = common.Result(f"mlx-align {mlx_align.__version__}")
    config = DPOConfig(
        model=job.model,
        lora_rank=job.rank,
        lora_alpha=job.rank * job.scale,
        iters=job.updates,
        batch_size=job.batch_size,
        grad_accumulation_steps=job.accumulation,
        learning_rate=job.learning_rate,
        lr_schedule="constant",
        warmup=0,
        weight_decay=job.weight_decay,
        grad_checkpoint=job.grad_checkpoint,
        beta=job.beta,
    )
    algorithm = DPO(config)
    groups = [
        TokenizedGroup(
            np.array(pair.prompt, np.int32),
            (np.array(pair.chosen, np.int32), np.array(pair.rejected, np.int32)),
            f"pair {i}",
        )
        for i, pair in enumerate(job.pairs)
    ]
    shapes = plan_shapes(groups, BatchLimit(job.batch_size))
    policy = make_policy(config, open_model(job.model), resolve_layout(config))
    mx.eval(policy.model.module.parameters())
    result.model_bytes = mx.get_active_memory()
    mx.reset_peak_memory()

    scorer = make_logprob_scorer(policy.model)
    clock = common.StepClock()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cache = ReferenceCache(Path(folder), "bench")
        clock.start()
        reference = cached_logprobs(
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

    rate = make_schedule(config.lr_schedule, config.learning_rate, job.updates, 0)
    trainer = OfflineTrainer(
        policy.model,
        algorithm.objective(policy, groups, reference, scorer),
        lambda start: microbatch_stream(groups, shapes, seed=config.seed, start=start),
        policy.start,
        make_optimizer(policy.start, config.weight_decay),
        accumulation=config.grad_accumulation_steps,
        max_grad_norm=config.max_grad_norm,
    )
    clock = common.StepClock()
    progress = Progress()
    clock.start()
    with trainer.memory:
        for step in range(job.updates):
            done = trainer.step(progress, rate(step))
            progress.add(done)
            clock.tick()
            result.losses.append(done.metrics["loss"])
    result.steps, result.cpu = clock.seconds, clock.cpu
    # The memory limit resets mlx's own counter, and keeps what it had counted.
    result.peak_bytes = int(trainer.memory.peak_bytes)
    result.note = policy.model.check
    result.print()


if __name__ == "__main__":
    main()
