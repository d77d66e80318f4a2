"""An offline run from options to run folder: what dpo, kto, sft and reward have in common.

A command is a `Task`: how its data is read, what it optimises, how it is measured. The rest
(reference, order, loop, checkpoints, samples, summary) is here, once.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_align.config import TrainConfig
from mlx_align.data.batching import epoch_order, microbatch_stream, padding_waste
from mlx_align.data.checks import DataFacts, render_facts
from mlx_align.data.shapes import AnyShape, batch_limit, plan_shapes
from mlx_align.errors import ModelError
from mlx_align.models.adapters import AdapterLayout, save_adapter
from mlx_align.models.loading import ModelFolder, open_model
from mlx_align.models.roles import Tree
from mlx_align.plan.check import check_fits
from mlx_align.plan.machine import this_machine
from mlx_align.plan.timing import rate_key, store_rate
from mlx_align.train import runlog
from mlx_align.train.checkpoint import State, checkpoint_folder, load_checkpoint, save_checkpoint
from mlx_align.train.display import Display
from mlx_align.train.fingerprints import fingerprints
from mlx_align.train.heldout import (
    Evaluation,
    answers,
    held_out_groups,
    kl_from_reference,
    prompt_texts,
)
from mlx_align.train.loop import (
    LoopHooks,
    LoopSettings,
    Progress,
    make_optimizer,
    make_schedule,
    train,
)
from mlx_align.train.opening import opened
from mlx_align.train.pace import Pace
from mlx_align.train.publish import Publication
from mlx_align.train.refer import References, run_references, used_groups
from mlx_align.train.setup import Policy, make_policy, prepare_data, resolve_layout
from mlx_align.train.task import Task
from mlx_align.train.trackers import check_trackers
from mlx_align.train.window import Window, window_of
from mlx_align.types import TokenizedGroup


def run_offline(
    task: Task, config: TrainConfig, run: Path, display: Display, *, resume: bool = False
) -> dict[str, Any]:
    """Train and write the run folder; the content of its summary.json, and the samples.

    What can be wrong with options, data and tokenizer is found before the weights are loaded.

    Args:
        task: The command.
        config: Resolved options; `model` and `data` are set.
        run: The run folder; made once data and options are found good.
        display: Where the run speaks.
        resume: Go on from the folder's last checkpoint.

    Raises:
        MlxAlignError: Something is the user's to mend.
        Interrupted: A signal ended the run, after a checkpoint.
    """
    assert config.model is not None
    began = time.perf_counter()
    check_trackers(config)
    layout = resolve_layout(config)
    folder = open_model(config.model)
    data = prepare_data(config, folder, task.read)
    remarks = task.check(data)
    train_groups = task.arrange(data.train)
    valid_groups = task.arrange(data.valid)
    held_out = held_out_groups(valid_groups, config)
    display.note("\n".join([render_facts(data.facts), *remarks]))
    display.note(check_fits(config, layout, folder, train_groups))
    ready = _Ready(layout, folder, data.facts, train_groups, valid_groups, held_out)
    parts = {"training data": train_groups, "held-out data": valid_groups}
    made_of = fingerprints(task.command, config, folder.path, parts)
    with opened(run, config, made_of, display.note, resume=resume):
        return _run(task, config, run, display, ready, began, resume=resume)


class _Ready(NamedTuple):
    """What is known before the weights are loaded."""

    layout: AdapterLayout
    folder: ModelFolder
    facts: DataFacts
    train: list[TokenizedGroup]
    valid: list[TokenizedGroup]
    held_out: list[TokenizedGroup]


def _run(
    task: Task,
    config: TrainConfig,
    run: Path,
    display: Display,
    ready: _Ready,
    began: float,
    *,
    resume: bool,
) -> dict[str, Any]:
    """All that needs the weights; the run folder is this process's."""
    layout, folder, facts, train_groups, valid_groups, held_out = ready
    data_facts = dataclasses.asdict(facts)
    publication = Publication(run, task.command, config, data_facts, display)
    policy = make_policy(config, folder, layout)
    display.note(_say_policy(policy, layout))
    scorer = task.scorer(policy.model)
    limit = batch_limit(config, packs=policy.model.packs and task.packs)
    shapes = plan_shapes(train_groups, limit)
    settings = _loop_settings(config, train_groups, shapes)
    reference = References(None, [])
    if task.has_reference:
        microbatches = settings.total_steps * settings.accumulation if task.needs_reference else 0
        used = used_groups(config, train_groups, shapes, microbatches)
        reference = run_references(
            run, config, policy, scorer, train_groups, used, held_out, shapes, limit, display
        )
    optimizer = make_optimizer(policy.start, config.weight_decay)
    progress, tree, window = Progress(), policy.start, Window()
    evaluation = Evaluation(task, limit, scorer, held_out, reference.valid, run, display)
    optimizers = {"policy": optimizer}
    state = None
    if resume:
        state = load_checkpoint(run, {"policy": policy.start}, optimizers, display.note)
    if state is not None:
        progress, tree = state.progress, state.trees["policy"]
        window, evaluation.best = _restored(run, state)
        policy.model.module.update(tree)
        runlog.drop_rows_after(run, progress.step)
        display.note(f"Going on after update {progress.step} of {settings.total_steps}.")
    elif resume:
        runlog.drop_rows_after(run, -1)
        display.note("No checkpoint yet: from the start.")
    if state is None and task.has_reference:
        evaluation.record(0, reference.valid)
    elif state is None:
        evaluation(0, policy.start)
    prompts = held_out[: config.samples] if task.conclude is None else []
    before = answers(policy, policy.start, prompts, config)
    objective = task.objective(policy, train_groups, reference.train, scorer)
    stream = microbatch_stream(train_groups, shapes, seed=config.seed, start=progress.microbatches)
    pace = Pace(progress)
    mx.reset_peak_memory()
    with (
        display.bar(task.title, settings.total_steps, progress.step) as bar,
        publication.training(progress.step, settings.total_steps, progress.seconds),
    ):

        def tick(at: Progress) -> None:
            pace.tick(at)
            bar.advance()

        def save(at: Progress, now: Tree, since: Window) -> None:
            extra = {"window": since.as_json(), "best": evaluation.best}
            state = State(at, {"policy": now}, optimizers, extra)
            best = None if evaluation.best is None else int(evaluation.best["step"])
            save_checkpoint(run, state, layout, str(folder.path), best=best)

        def report(at: Progress, row: dict[str, float]) -> None:
            _report(run, at, settings.total_steps, task.refine(row), display)
            publication.tell(at.step, at.seconds)

        def evaluate(at: Progress, now: Tree) -> bool:
            best = evaluation(at.step, now)
            publication.tell(at.step, at.seconds, evaluated=True)
            return best

        hooks = LoopHooks(
            report=report,
            evaluate=evaluate,
            save=save,
            tick=tick,
            note=display.note,
        )
        watched = pace.watched(stream)
        tree = train(
            *(policy.model, tree, optimizer, objective, watched, settings, hooks, progress),
            window=window,
        )
    save_adapter(run, tree, layout, str(folder.path))
    if (rate := pace.rate()) is not None:
        machine = this_machine().name
        store_rate(rate_key(task.command, folder.path, config, layout, machine), rate)

    after = answers(policy, tree, prompts, config)
    samples = [
        {"source": group.source, "prompt": prompt, "before": old, "after": new}
        for group, prompt, old, new in zip(
            prompts, prompt_texts(folder, prompts), before.texts, after.texts, strict=True
        )
    ]
    held_out_facts = None
    if task.conclude is not None and valid_groups:
        concluded = task.conclude(scorer, tree, folder, valid_groups, limit, display)
        held_out_facts, samples = concluded.facts, concluded.samples
        display.note(concluded.text)
    runlog.write_samples(run, samples)
    kl = None
    if task.has_reference:
        kl = kl_from_reference(scorer, policy, tree, prompts, config, limit)
    order = epoch_order(train_groups, shapes, seed=config.seed)
    held_out_rows, last_row = runlog.eval_rows(run), (runlog.training_rows(run) or [{}])[-1]
    summary = {
        "command": task.command,
        "model": config.model,
        "data": config.data,
        "steps": progress.step,
        task.unit: progress.groups,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "seconds_in_all": time.perf_counter() - began,
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "peak_memory_bytes": last_row.get("peak_memory_bytes"),
        "trained_parameters": sum(array.size for _, array in tree_flatten(tree)),
        "prompts_shared": policy.model.shared,
        "shapes": [list(shape) for shape in shapes],
        "padding_share": padding_waste(order, train_groups),
        "train": last_row,
        "eval_before": next(iter(held_out_rows), {}),
        "eval": held_out_rows[-1] if held_out_rows else {},
        "best": evaluation.best,
        "skipped": progress.skipped,
        "kl": kl,
        **({} if held_out_facts is None else {"held_out": held_out_facts}),
        "data_facts": data_facts,
        "talk": task.afterwards(folder, run),
        "versions": runlog.versions(),
        "seed": config.seed,
    }
    runlog.write_json(run / runlog.SUMMARY_FILE, summary)
    publication.finish()
    if evaluation.best is not None and evaluation.best["step"] < progress.step:
        step, loss = int(evaluation.best["step"]), evaluation.best["loss"]
        where = checkpoint_folder(run, step)
        display.note(f"! Held-out loss was lowest after update {step} ({loss:.4f}): {where}.")
    return {**summary, "samples": samples}


def _restored(run: Path, state: State) -> tuple[Window, dict[str, float] | None]:
    """The window of updates not reported yet, and the best evaluation."""
    try:
        best = state.extra["best"]
        if best is not None:
            best = {"step": int(best["step"]), "loss": float(best["loss"])}
        return window_of(state.extra["window"]), best
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"{run}: its last checkpoint is not one of this command") from error


def _say_policy(policy: Policy, layout: AdapterLayout) -> str:
    trained = sum(array.size for _, array in tree_flatten(policy.start))
    kind = {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tuning"}[layout.fine_tune_type]
    rank = (
        "" if layout.fine_tune_type == "full" else f" rank {layout.rank}, scale {layout.scale:g},"
    )
    return f"{kind},{rank} {trained:,} parameters; {policy.model.check}."


def _loop_settings(
    config: TrainConfig, groups: Sequence[TokenizedGroup], shapes: Sequence[AnyShape]
) -> LoopSettings:
    per_epoch = len(epoch_order(groups, shapes, seed=config.seed))
    epochs = config.epochs or 1.0
    total = config.iters or max(1, round(epochs * per_epoch / config.grad_accumulation_steps))
    return LoopSettings(
        total_steps=total,
        accumulation=config.grad_accumulation_steps,
        learning_rate=make_schedule(config.lr_schedule, config.learning_rate, total, config.warmup),
        max_grad_norm=config.max_grad_norm,
        steps_per_report=config.steps_per_report,
        steps_per_eval=config.steps_per_eval,
        save_every=config.save_every,
        skip_non_finite=config.on_non_finite == "skip",
    )


def _report(
    run: Path,
    progress: Progress,
    total: int,
    row: dict[str, float],
    display: Display,
) -> None:
    runlog.append_row(run, row)
    left = runlog.say_seconds((total - progress.step) * progress.seconds / progress.step)
    display.note(f"  update {progress.step}/{total}: {runlog.say_metrics(row)}, {left} left")
