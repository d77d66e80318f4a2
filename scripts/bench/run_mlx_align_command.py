"""A whole run of `mlx_align.dpo` on rows of text, as a user calls it."""

import time
from pathlib import Path
from typing import Any

import common
import yaml

import mlx_align as ma

# isort: split
import mlx.core as mx

from mlx_align.models import patches
from mlx_align.training import offline
from mlx_align.training.metrics import Progress


def main() -> None:
    job = common.read_job()
    patches.EXPONENTIAL_BY_POWER = job.power_exponential
    result = common.Result(f"mlx-align {ma.__version__}")
    clock = common.StepClock()
    compute_reference = offline.reference_logprobs

    def reference(*given: Any) -> Any:
        result.model_bytes = mx.get_active_memory()
        mx.reset_peak_memory()
        began = time.perf_counter()
        found = compute_reference(*given)
        result.reference_seconds = time.perf_counter() - began
        result.peak_bytes = mx.get_peak_memory()
        return found

    class Listener(ma.Callback):
        def on_train_begin(self, progress: Progress, total_steps: int) -> None:
            self.progress = progress
            clock.start()

        def on_step_end(self, step: int, metrics: Any) -> None:
            clock.tick()
            result.losses.append(metrics["loss"])
            result.pairs.append(self.progress.groups - sum(result.pairs))

    offline.reference_logprobs = reference
    run = ma.dpo(
        model=job.model,
        output=Path(job.out) / "adapter",
        reference_cache=Path(job.out) / "reference",
        callbacks=[Listener()],
        progress=False,
        **job.options,
    )
    summary = run.record.summary
    result.steps, result.cpu = clock.seconds, clock.cpu
    result.reference_pairs = len(job.pairs)
    result.peak_bytes = max(result.peak_bytes, summary["peak_memory_bytes"])
    result.tokens = round(summary["tokens"] / (1 - summary["padding_share"]))
    result.shapes = len(summary["shapes"])
    result.config = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
    result.print()


if __name__ == "__main__":
    main()
