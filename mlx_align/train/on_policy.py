"""An on-policy run from options to run folder: what ppo and grpo have in common."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten, tree_unflatten

from mlx_align.config import OnPolicyConfig
from mlx_align.models.adapters import ADAPTER_WEIGHTS, save_adapter
from mlx_align.models.compat import read_tensors
from mlx_align.models.loading import open_model
from mlx_align.models.roles import Tree
from mlx_align.train import runlog
from mlx_align.train.checkpoint import checkpoint_folder
from mlx_align.train.course import Course
from mlx_align.train.display import Display
from mlx_align.train.heldout import answers, prompt_texts
from mlx_align.train.heldout_rewards import HeldOut
from mlx_align.train.learner import Learner, MakeLearner
from mlx_align.train.on_policy_setup import prepare_on_policy, set_up
from mlx_align.train.opening import opened
from mlx_align.train.publish import Publication
from mlx_align.train.task import how_to_talk
from mlx_align.train.trackers import check_trackers
from mlx_align.train.workplace import Workplace


def run_on_policy(
    make_learner: MakeLearner,
    command: str,
    config: OnPolicyConfig,
    run: Path,
    display: Display,
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """Train and write the run folder; the content of its summary.json, and the samples.

    What can be wrong with options, data and tokenizer is found before the weights are loaded.

    Args:
        make_learner: (options, workplace) -> the learner.
        command: Its name.
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
    folder = open_model(config.model)
    prepared = prepare_on_policy(command, config, folder)
    display.note("\n".join(prepared.lines))
    with ExitStack() as stack:
        stack.enter_context(opened(run, config, prepared.made_of, display.note, resume=resume))
        publication = Publication(run, command, config, prepared.facts, display)
        workplace, watched = set_up(config, folder, prepared, stack, display)
        learner = make_learner(config, workplace)
        course = Course(config, run, display, workplace, watched, learner, publication)
        course.begin(resume)
        prompts = watched.groups[: config.samples]
        before = answers(workplace.policy, workplace.policy.start, prompts, config).texts
        course.train()
        tree = _kept(course, run, workplace, watched, learner, display)
        policy = workplace.policy
        save_adapter(run, tree, policy.layout, str(folder.path))
        course.log.store_rate(command, policy)
        after = answers(policy, tree, prompts, config).texts
    samples = [
        {"source": group.source, "prompt": prompt, "before": old, "after": new}
        for group, prompt, old, new in zip(
            prompts, prompt_texts(folder, prompts), before, after, strict=True
        )
    ]
    runlog.append_samples(run, samples)
    at, evaluations = course.progress, runlog.eval_rows(run)
    last = runlog.training_rows(run)[-1]
    summary = {
        "command": command,
        "model": config.model,
        "data": config.data,
        "steps": at.step,
        "skipped": at.skipped,
        "prompts": at.groups,
        "completions": at.groups * config.group_size,
        "tokens": at.tokens,
        "seconds": at.seconds,
        "seconds_in_all": time.perf_counter() - began,
        "tokens_per_second": at.tokens / max(at.seconds, 1e-9),
        "peak_memory_bytes": last["peak_memory_bytes"],
        "trained_parameters": sum(array.size for _, array in tree_flatten(policy.start)),
        "prompts_shared": policy.model.shared,
        "shapes": [list(shape) for shape in workplace.shapes],
        "stopped_early": at.step < course.total,
        "best_step": watched.best_step,
        "train": last,
        "eval_before": next(iter(evaluations), {}),
        "eval": evaluations[-1] if evaluations else {},
        "kl": watched.last_kl,
        "learner": learner.state(),
        "data_facts": prepared.facts,
        "talk": how_to_talk(folder, run),
        "versions": runlog.versions(),
        "seed": config.seed,
    }
    runlog.write_json(run / runlog.SUMMARY_FILE, summary)
    publication.finish()
    return {**summary, "samples": samples}


def _kept(
    course: Course,
    run: Path,
    place: Workplace,
    watched: HeldOut,
    learner: Learner,
    display: Display,
) -> Tree:
    """The policy that a run ends with: the last, or the best one of a run that was stopped."""
    step, best = course.progress.step, watched.best_step
    if step == course.total or best is None or best == step:
        return learner.trees["policy"]
    display.note(
        f"! stopped after rollout batch {step} of {course.total}; what is kept is the policy after "
        f"{best}, the best on held-out prompts"
    )
    if best == 0:
        return place.policy.start
    weights = read_tensors(checkpoint_folder(run, best) / ADAPTER_WEIGHTS)
    tree: Tree = tree_unflatten(list(weights.items()))
    return tree
