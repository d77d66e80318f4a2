"""A training run from options to run folder: the one function behind all training commands.

What differs between training on given completions and on the policy's own is in `offline.py` and
`on_policy.py`. A run imports only one of them, and only its own algorithm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_align.algorithms.base import Algorithm, OnPolicyMethod
from mlx_align.config import (
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    OnPolicyConfig,
    PPOConfig,
    RewardConfig,
    SFTConfig,
    TrainConfig,
)
from mlx_align.config.on_policy import ONLINE_DPO
from mlx_align.data.readers import Data
from mlx_align.errors import ConfigError
from mlx_align.models.adapters import save_adapter
from mlx_align.models.loading import open_model
from mlx_align.planning.duration import rate_key, save_rate
from mlx_align.planning.machine import this_machine
from mlx_align.system.intervals import metric_interval
from mlx_align.system.progress import Console
from mlx_align.tracking.diagnostics import (
    HealthMonitor,
    answer_metrics,
    diagnose,
    mean_completion_tokens,
)
from mlx_align.tracking.run_dir import (
    REFERENCE_FILE,
    SUMMARY_FILE,
    package_versions,
    read_eval_metrics,
    read_resumes,
    read_run_record,
    read_training_metrics,
    write_json,
)
from mlx_align.tracking.verdict import verdict
from mlx_align.training.callbacks import Callback, Callbacks, RunPage, Trackers, check_trackers
from mlx_align.training.evaluation import answers, prompt_fields
from mlx_align.training.loop import Changes, TrainingLoop
from mlx_align.training.resume import open_run_folder
from mlx_align.training.setup import Setup

if TYPE_CHECKING:
    from mlx_align.rollout.reward_functions import RewardSource


def make_algorithm(
    config: TrainConfig,
    *,
    loss: Callable[..., mx.array] | None = None,
    rewards: Sequence[RewardSource] = (),
) -> Algorithm | OnPolicyMethod:
    """Make the algorithm of a configuration.

    Checks everything that can be checked from the options alone.

    Args:
        config: The resolved options; their class determines the command.
        loss: A loss of preference pairs in place of `config.loss`, for `DPOConfig`.
        rewards: Reward functions in addition to `config.reward`, for `GRPOConfig`.

    Raises:
        ConfigError: An option is wrong or has no effect.
    """
    if loss is not None and not isinstance(config, DPOConfig):
        raise ConfigError("loss: a function can only be given for preference pairs (dpo)")
    match config:
        case DPOConfig():
            from mlx_align.algorithms.dpo import DPO

            return DPO(config, loss=loss)
        case KTOConfig():
            from mlx_align.algorithms.kto import KTO

            return KTO(config)
        case SFTConfig():
            from mlx_align.algorithms.sft import SFT

            return SFT(config)
        case RewardConfig():
            from mlx_align.algorithms.reward_modeling import RewardModeling

            return RewardModeling(config)
        case OnPolicyConfig():
            return _on_policy_method(config, rewards)
    raise TypeError(f"{type(config).__name__} is not the configuration of a training command")


def _on_policy_method(config: OnPolicyConfig, rewards: Sequence[RewardSource]) -> OnPolicyMethod:
    from mlx_align.training.on_policy import check_on_policy_options

    check_on_policy_options(config)
    match config:
        case PPOConfig():
            from mlx_align.algorithms.ppo import PPO, check_ppo_options

            check_ppo_options(config)
            return OnPolicyMethod("ppo", PPO)
        case GRPOConfig() if config.loss == ONLINE_DPO:
            from mlx_align.algorithms.online_dpo import OnlineDPO, check_online_dpo_options

            check_online_dpo_options(config)
            return OnPolicyMethod("grpo", OnlineDPO)
        case GRPOConfig():
            from mlx_align.algorithms.grpo import GRPO, check_grpo_options

            check_grpo_options(config, rewards)
            return OnPolicyMethod("grpo", GRPO)
    raise TypeError(f"{type(config).__name__} is not the configuration of a training command")


def train(
    algorithm: Algorithm | OnPolicyMethod,
    config: TrainConfig,
    run: Path,
    console: Console,
    *,
    resume: bool = False,
    accept: Sequence[str] = (),
    data: Data | None = None,
    rewards: Sequence[RewardSource] = (),
    eval_rewards: Sequence[RewardSource] = (),
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Train and write the run folder.

    Errors in options, data and tokenizer are found before the weights are loaded.

    Args:
        algorithm: The algorithm, from `make_algorithm`.
        config: The resolved options; `model` is set, and `data` unless it is given here.
        run: The run folder; created once options and data are checked.
        console: Shows messages and progress.
        resume: Continue from the folder's last checkpoint.
        accept: "rewards", "data" or both: what may have changed since the run began.
        data: The data, if it is not `config.data`.
        rewards: Reward functions in addition to `config.reward`, for ppo and grpo.
        eval_rewards: Reward functions in addition to `config.eval_reward`.
        callbacks: Called during training, after the run page and the trackers.

    Returns:
        The content of summary.json, and `samples`.

    Raises:
        MlxAlignError: An option, the data or a model can't be used, or training failed.
        Interrupted: A signal ended the run, after a checkpoint.
    """
    assert config.model is not None
    began = time.perf_counter()
    check_trackers(config)
    folder = open_model(config.model)
    setup: Setup
    with ExitStack() as stack:
        if isinstance(algorithm, OnPolicyMethod):
            from mlx_align.training.on_policy import prepare_on_policy

            assert isinstance(config, OnPolicyConfig)
            setup = prepare_on_policy(
                algorithm, config, folder, stack, data, rewards, eval_rewards, resume=resume
            )
        else:
            from mlx_align.training.offline import prepare_offline

            setup = prepare_offline(algorithm, config, folder, data, resume=resume)
        config = setup.config
        for line in setup.lines:
            console.note(line)
        resumption = stack.enter_context(
            open_run_folder(run, config, setup.made_of, console.note, resume=resume, accept=accept)
        )
        if resumption is not None and resumption.inputs:
            (run / REFERENCE_FILE).unlink(missing_ok=True)
        health = HealthMonitor(algorithm.command, mean_completion_tokens(setup.facts))
        page = RunPage(run, algorithm.command, setup.facts, setup.eval_examples, health, console)
        everyone = Callbacks([Trackers(config, run, console), page, *callbacks])
        job = setup.load(run, console)
        trainer, policy = job.trainer, job.policy
        loop = TrainingLoop(trainer, policy, config, run, console, everyone, health)
        if resumption is None:
            loop.begin(resume=False)
        else:
            changes = Changes(
                length=resumption.length_changed,
                held_out=resumption.held_out_changed,
                rewards=resumption.rewards_changed,
            )
            loop.begin(resume=True, changes=changes)
            resumption.record(loop.progress.step, trainer.total_steps)
        trained_before = loop.progress.seconds  # before it was resumed
        prompts = job.prompts
        before = answers(policy, policy.start, prompts, config)
        loop.run()
        stack.enter_context(page.reporting())
        progress = loop.progress
        kept, weights = loop.kept_adapter()
        save_adapter(run, weights, policy.layout, str(folder.path))
        if (rate := trainer.rate()) is not None:
            key = rate_key(
                algorithm.command, folder.path, config, policy.layout, this_machine().name
            )
            save_rate(key, rate)
        after = answers(policy, weights, prompts, config)
        samples: list[dict[str, Any]] = [
            {
                "source": group.source,
                **prompt_fields(folder, group),
                "before": old,
                "after": new,
            }
            for group, old, new in zip(prompts, before, after, strict=True)
        ]
        samples, results = job.finish(weights, kept, samples)
    evaluations, last = read_eval_metrics(run), (read_training_metrics(run) or [{}])[-1]
    evaluation = evaluations.get(kept, {})
    counts = {"steps": progress.step, "skipped": progress.skipped, **job.counts(progress.groups)}
    summary = {
        "command": algorithm.command,
        "model": config.model,
        "data": config.data,
        **counts,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "seconds_in_all": trained_before + time.perf_counter() - began,
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "peak_memory_bytes": last.get("peak_memory_bytes"),
        "trained_parameters": sum(array.size for _, array in tree_flatten(policy.start)),
        "prompts_shared": policy.model.shared,
        "train": last,
        "eval_before": evaluations.get(0, {}),
        "eval": evaluation,
        "eval_intervals": _intervals(evaluation, setup.eval_examples),
        "kept_step": kept,
        "stopped_early": progress.step < trainer.total_steps,
        **results,
        **_answer_metrics(folder.tokenizer, before, after),
        "eval_examples": setup.eval_examples,
        "data_facts": setup.facts,
        "talk": job.next_command,
        "versions": package_versions(),
        "resumes": read_resumes(run),
        "seed": config.seed,
    }
    # The summary is passed, because read_run_record ignores it until status.json says "finished".
    for finding in health.observe_summary(summary):
        console.note(f"! {finding.text}")
    record = replace(read_run_record(run), summary=summary, samples=samples)
    summary["findings"] = [finding.to_json(record.step) for finding in diagnose(record)]
    summary["verdict"] = verdict(record).to_json()
    write_json(run / SUMMARY_FILE, summary)
    everyone.on_run_end(summary)
    return {**summary, "samples": samples}


def _answer_metrics(tokenizer: Any, before: list[str], after: list[str]) -> dict[str, Any]:
    """Metrics of the answers for the summary, if there are any."""
    if not after:
        return {}

    def metrics(texts: list[str]) -> dict[str, float]:
        return answer_metrics([tokenizer.encode(text, add_special_tokens=False) for text in texts])

    return {"answers": {"before": metrics(before), "after": metrics(after)}}


def _intervals(evaluation: Mapping[str, float], examples: int) -> dict[str, dict[str, float]]:
    """The 95% intervals of held-out metrics, and their number of examples."""
    found = {name: metric_interval(evaluation, name, examples) for name in evaluation}
    return {
        name: {"low": one.low, "high": one.high, "n": examples}
        for name, one in found.items()
        if one is not None
    }
