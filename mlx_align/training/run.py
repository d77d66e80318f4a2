"""A training run from options to run folder: the one function behind all training commands."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_align.algorithms.base import Algorithm, MakeOnPolicyAlgorithm, chat_command
from mlx_align.algorithms.dpo import DPO
from mlx_align.algorithms.grpo import GRPO, check_grpo_options
from mlx_align.algorithms.kto import KTO
from mlx_align.algorithms.online_dpo import OnlineDPO, check_online_dpo_options
from mlx_align.algorithms.ppo import PPO, check_ppo_options
from mlx_align.algorithms.reward_modeling import RewardModeling
from mlx_align.algorithms.sft import SFT
from mlx_align.algorithms.update import make_optimizer, make_schedule
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
from mlx_align.data.batching import epoch_order, microbatch_stream, padding_fraction
from mlx_align.data.buckets import AnyShape, batch_limit, plan_shapes
from mlx_align.data.readers import Data
from mlx_align.errors import ConfigError
from mlx_align.models.adapters import ADAPTER_WEIGHTS, save_adapter
from mlx_align.models.loading import open_model
from mlx_align.models.policy import make_policy
from mlx_align.models.weights import AdapterWeights, read_tensors
from mlx_align.planning.duration import rate_key, save_rate
from mlx_align.planning.machine import this_machine
from mlx_align.rollout.reward_functions import RewardSource
from mlx_align.system.progress import Console
from mlx_align.tracking.diagnostics import HealthMonitor, mean_completion_tokens
from mlx_align.tracking.run_dir import (
    SUMMARY_FILE,
    append_samples,
    package_versions,
    read_eval_metrics,
    read_run_record,
    read_training_metrics,
    write_json,
    write_samples,
)
from mlx_align.tracking.verdict import verdict
from mlx_align.training.callbacks import Callback, Callbacks, RunPage, Trackers, check_trackers
from mlx_align.training.checkpoint import checkpoint_folder
from mlx_align.training.evaluation import (
    Evaluation,
    answers,
    kl_from_reference,
    prompt_texts,
)
from mlx_align.training.loop import TrainingLoop
from mlx_align.training.reference import References, reference_logprobs
from mlx_align.training.resume import open_run_folder
from mlx_align.training.setup import (
    OfflineSetup,
    OnPolicySetup,
    check_on_policy_options,
    describe_policy,
    load_collector,
    prepare_offline,
    prepare_on_policy,
)
from mlx_align.training.trainers import OfflineTrainer, OnPolicyTrainer
from mlx_align.types import TokenizedGroup


@dataclass(frozen=True)
class OnPolicyMethod:
    """An on-policy method before its policy is loaded: its command, and how to make it."""

    command: str
    make: MakeOnPolicyAlgorithm


def make_algorithm(
    config: TrainConfig,
    *,
    loss: Callable[..., mx.array] | None = None,
    rewards: Sequence[RewardSource] = (),
) -> Algorithm | OnPolicyMethod:
    """The algorithm that a configuration stands for.

    Everything that can be checked from the options alone is checked here.

    Args:
        config: The resolved options; their class says which command it is.
        loss: A loss of preference pairs in place of `config.loss`, for `DPOConfig`.
        rewards: Reward functions in addition to `config.reward`, for `GRPOConfig`.

    Raises:
        ConfigError: An option is wrong or has no effect.
    """
    if loss is not None and not isinstance(config, DPOConfig):
        raise ConfigError("loss: a function can be given for preference pairs (dpo) only")
    match config:
        case DPOConfig():
            return DPO(config, loss=loss)
        case KTOConfig():
            return KTO(config)
        case SFTConfig():
            return SFT(config)
        case RewardConfig():
            return RewardModeling(config)
        case PPOConfig():
            check_on_policy_options(config)
            check_ppo_options(config)
            return OnPolicyMethod("ppo", PPO)
        case GRPOConfig():
            check_on_policy_options(config)
            if config.loss == ONLINE_DPO:
                check_online_dpo_options(config)
                return OnPolicyMethod("grpo", OnlineDPO)
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
    data: Data | None = None,
    rewards: Sequence[RewardSource] = (),
    eval_rewards: Sequence[RewardSource] = (),
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Train and write the run folder.

    Errors in options, data and tokenizer are found before the weights are loaded.

    Args:
        algorithm: What `make_algorithm` returned for `config`.
        config: The resolved options; `model` is set, and `data` unless it is given here.
        run: The run folder; created once options and data are checked.
        console: Shows messages and progress.
        resume: Continue from the folder's last checkpoint.
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
    setup: OfflineSetup | OnPolicySetup
    if isinstance(algorithm, OnPolicyMethod):
        assert isinstance(config, OnPolicyConfig)
        setup = prepare_on_policy(algorithm.command, config, folder, data, rewards, eval_rewards)
    else:
        setup = prepare_offline(algorithm, config, folder, data)
    for line in setup.lines:
        console.note(line)
    with ExitStack() as stack:
        stack.enter_context(
            open_run_folder(run, config, setup.made_of, console.note, resume=resume)
        )
        health = HealthMonitor(algorithm.command, mean_completion_tokens(setup.facts))
        examples = len(setup.held_out if isinstance(setup, OfflineSetup) else setup.valid)
        page = RunPage(run, algorithm.command, setup.facts, examples, health, console)
        everyone = Callbacks([Trackers(config, run, console), page, *callbacks])
        job: _OfflineJob | _OnPolicyJob
        if isinstance(algorithm, OnPolicyMethod):
            assert isinstance(config, OnPolicyConfig)
            assert isinstance(setup, OnPolicySetup)
            job = _OnPolicyJob(algorithm, config, setup, run, console, stack)
        else:
            assert isinstance(setup, OfflineSetup)
            job = _OfflineJob(algorithm, config, setup, run, console)
        trainer, policy = job.trainer, job.policy
        schedule = make_schedule(
            config.lr_schedule, config.learning_rate, trainer.total_steps, config.warmup
        )
        loop = TrainingLoop(trainer, policy, config, schedule, run, console, everyone, health)
        loop.begin(resume=resume)
        prompts = job.prompts
        before = answers(policy, policy.start, prompts, config).texts
        loop.run()
        progress = loop.progress
        weights = job.final_weights(progress.step)
        save_adapter(run, weights, policy.layout, str(folder.path))
        if (rate := trainer.rate()) is not None:
            key = rate_key(
                algorithm.command, folder.path, config, policy.layout, this_machine().name
            )
            save_rate(key, rate)
        after = answers(policy, weights, prompts, config).texts
        texts = prompt_texts(folder, prompts)
        samples: list[dict[str, Any]] = [
            {"source": group.source, "prompt": prompt, "before": old, "after": new}
            for group, prompt, old, new in zip(prompts, texts, before, after, strict=True)
        ]
        samples, results = job.finish(weights, samples)
    evaluations, last = read_eval_metrics(run), (read_training_metrics(run) or [{}])[-1]
    counts = {"steps": progress.step, "skipped": progress.skipped, **job.counts(progress.groups)}
    summary = {
        "command": algorithm.command,
        "model": config.model,
        "data": config.data,
        **counts,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "seconds_in_all": time.perf_counter() - began,
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "peak_memory_bytes": last.get("peak_memory_bytes"),
        "trained_parameters": sum(array.size for _, array in tree_flatten(policy.start)),
        "prompts_shared": policy.model.shared,
        "train": last,
        "eval_before": next(iter(evaluations), {}),
        "eval": evaluations[-1] if evaluations else {},
        **results,
        "eval_examples": examples,
        "data_facts": setup.facts,
        "talk": job.next_command,
        "versions": package_versions(),
        "seed": config.seed,
    }
    # The summary is given, because read_run_record ignores it until status.json says "finished".
    found = verdict(replace(read_run_record(run), summary=summary))
    summary["verdict"] = {"kind": found.kind, "sentence": found.sentence}
    write_json(run / SUMMARY_FILE, summary)
    everyone.on_run_end(summary)
    return {**summary, "samples": samples}


class _OfflineJob:
    """The parts of `train` that are particular to training on given completions."""

    def __init__(
        self,
        algorithm: Algorithm,
        config: TrainConfig,
        setup: OfflineSetup,
        run: Path,
        console: Console,
    ) -> None:
        self._algorithm, self._config, self._setup = algorithm, config, setup
        self._run, self._console = run, console
        self.policy = make_policy(config, setup.folder, setup.layout)
        console.note(describe_policy(self.policy))
        self._scorer = algorithm.make_scorer(self.policy.model)
        self._limit = batch_limit(config, packs=self.policy.model.packs and algorithm.packs)
        self._shapes = plan_shapes(setup.train, self._limit)
        accumulation = config.grad_accumulation_steps
        microbatches = _total_microbatches(config, setup.train, self._shapes)
        references = References(None, [])
        if algorithm.has_reference:
            references = reference_logprobs(
                self.policy,
                self._scorer,
                config,
                run,
                (setup.train, self._shapes),
                setup.held_out,
                self._limit,
                microbatches if algorithm.needs_reference else 0,
                console,
            )
        self.trainer = OfflineTrainer(
            self.policy.model,
            algorithm.objective(self.policy, setup.train, references.train, self._scorer),
            self._microbatches,
            self.policy.start,
            make_optimizer(self.policy.start, config.weight_decay),
            accumulation=accumulation,
            max_grad_norm=config.max_grad_norm,
            skip_non_finite=config.on_non_finite == "skip",
            total_microbatches=microbatches,
            title=algorithm.title,
            evaluation=Evaluation(
                algorithm, setup.held_out, self._scorer, references.valid, self._limit
            ),
            report=algorithm.report,
        )
        self.prompts = setup.held_out[: config.samples] if algorithm.samples_answers else []
        self.next_command = algorithm.next_command(setup.folder, run)
        self._last_step = 0

    def _microbatches(self, start: int) -> Any:
        return microbatch_stream(
            self._setup.train, self._shapes, seed=self._config.seed, start=start
        )

    def final_weights(self, step: int) -> AdapterWeights:
        """The last weights, after update `step`."""
        self._last_step = step
        return self.trainer.weights["policy"]

    def finish(
        self, weights: AdapterWeights, samples: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Report on held-out data and write the samples; them, and entries of the summary."""
        algorithm, config, setup = self._algorithm, self._config, self._setup
        held_out: dict[str, Any] = {}
        if setup.valid:
            report = algorithm.report_held_out(
                self._scorer, weights, setup.folder, setup.valid, self._limit, self._console
            )
            if report is not None:
                held_out, samples = {"held_out": report.facts}, report.samples
                self._console.note(report.text)
        write_samples(self._run, samples)
        kl = None
        if algorithm.has_reference:
            kl = kl_from_reference(
                self._scorer, self.policy, weights, self.prompts, config, self._limit
            )
        order = epoch_order(setup.train, self._shapes, seed=config.seed)
        evaluation = self.trainer.evaluation
        best = None if evaluation is None else evaluation.best
        if best is not None and best["step"] < self._last_step:
            step, loss = int(best["step"]), best["loss"]
            where = checkpoint_folder(self._run, step)
            self._console.note(
                f"! Held-out loss was lowest after update {step} ({loss:.4f}): {where}."
            )
        return samples, {
            "shapes": [list(shape) for shape in self._shapes],
            "padding_share": padding_fraction(order, setup.train),
            "best": best,
            "kl": kl,
            **held_out,
        }

    def counts(self, groups: int) -> dict[str, int]:
        """What was trained on, for the summary."""
        return {self._algorithm.unit: groups}


class _OnPolicyJob:
    """The parts of `train` that are particular to training on the policy's own completions."""

    def __init__(
        self,
        method: OnPolicyMethod,
        config: OnPolicyConfig,
        setup: OnPolicySetup,
        run: Path,
        console: Console,
        stack: ExitStack,
    ) -> None:
        self._config, self._run, self._console = config, run, console
        collector, evaluation = load_collector(config, setup, stack, console)
        self.policy = collector.policy
        algorithm = method.make(config, collector)
        self.trainer = OnPolicyTrainer(algorithm, collector, evaluation, config, run)
        self.prompts = evaluation.groups[: config.samples]
        self.next_command = chat_command(setup.folder, run)
        self._stopped_early = False

    def final_weights(self, step: int) -> AdapterWeights:
        """The last weights, or those of the best evaluation if the run was stopped early."""
        total, best = self.trainer.total_steps, self.trainer.best_step
        self._stopped_early = step < total
        if step == total or best is None or best == step:
            return self.trainer.weights["policy"]
        self._console.note(
            f"! stopped after rollout batch {step} of {total}; keeping the policy after {best}, "
            "the best on held-out prompts"
        )
        if best == 0:
            return self.policy.start
        tensors = read_tensors(checkpoint_folder(self._run, best) / ADAPTER_WEIGHTS)
        weights: AdapterWeights = tree_unflatten(list(tensors.items()))
        return weights

    def finish(
        self, weights: AdapterWeights, samples: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Add the samples to those of training; them, and entries of the summary."""
        append_samples(self._run, samples)
        trainer = self.trainer
        return samples, {
            "shapes": [list(shape) for shape in trainer.collector.shapes],
            "stopped_early": self._stopped_early,
            "best_step": trainer.best_step,
            "kl": trainer.evaluation.last_kl,
            "learner": trainer.algorithm.state(),
        }

    def counts(self, groups: int) -> dict[str, int]:
        """What was trained on, for the summary."""
        return {"prompts": groups, "completions": groups * self._config.group_size}


def _total_microbatches(
    config: TrainConfig, groups: Sequence[TokenizedGroup], shapes: Sequence[AnyShape]
) -> int:
    """Microbatches of the whole run: `iters` full updates, or every row once per epoch."""
    if config.iters is not None:
        return config.iters * config.grad_accumulation_steps
    per_epoch = len(epoch_order(groups, shapes, seed=config.seed))
    return max(1, round((config.epochs or 1.0) * per_epoch))
