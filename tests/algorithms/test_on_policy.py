"""`mlx-align ppo` and `mlx-align grpo` from options to run folder, on a tiny chat model."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.data import assistant, read_rows, user, write_rows
from helpers.paths import TINY_MODEL
from helpers.runs import (
    adapter_of,
    before_call,
    change_results,
    interrupt,
    metric_rows,
    mlx_align,
    outcome,
    summary_of,
)
from mlx.utils import tree_flatten
from mlx_lm import load as mlx_lm_load

from mlx_align.algorithms.ppo import PPO
from mlx_align.algorithms.update import Updater
from mlx_align.errors import TrainingError
from mlx_align.inference.reward_model import RewardModel
from mlx_align.models.adapters import ADAPTER_FILE
from mlx_align.rollout.collector import RolloutCollector
from mlx_align.rollout.reward_functions import combine
from mlx_align.training import on_policy
from mlx_align.training.on_policy_trainer import RolloutEvaluation
from mlx_align.types import Message, PromptGroup

SMALL = {
    "--batch-size": 2,
    "--grad-accumulation-steps": 2,
    "--group-size": 4,
    "--max-completion-length": 8,
    "--max-seq-length": 96,
    "--samples": 2,
    "--sample-tokens": 4,
    "--lora-rank": 4,
}
PPO_OPTIONS = {"--reward-rollouts": 16, "--critic-warmup": 1}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Preference pairs, whose prompts are used, and reward functions."""
    folder = tmp_path_factory.mktemp("on-policy-data")
    random = np.random.default_rng(0)
    for split, n in (("train", 12), ("valid", 4)):
        rows = [
            {
                "prompt": user(f"{split} {i}: " + "is it? " * (i % 4)),
                "chosen": assistant("yes " * int(random.integers(1, 4))),
                "rejected": assistant("no " * int(random.integers(1, 4))),
                "number": i,
            }
            for i in range(n)
        ]
        write_rows(folder / f"{split}.jsonl", rows)
    (folder / "rewards.py").write_text(
        "def letters(completions, **columns):\n"
        "    return [sum(c.isalpha() for c in text) / 8 for text in completions]\n"
        "def same(completions, **columns):\n"
        "    return [1.0 for _ in completions]\n"
        "def none(completions, **columns):\n"
        "    return [None for _ in completions]\n"
        "def some(completions, number, **columns):\n"
        "    return [None if n % 2 else float(len(c)) for c, n in zip(completions, number)]\n"
    )
    return folder


@pytest.fixture(scope="session")
def reward_run(tmp_path_factory, data):
    """A reward model with other layers and another rank than the policy's."""
    folder = tmp_path_factory.mktemp("reward") / "run"
    where = ("--model", TINY_MODEL, "--data", data, "--output", folder)
    options = ("--lora-rank", 3, "--lora-alpha", 5, "--num-layers", 1, "--learning-rate", "1e-2")
    options += ("--iters", 4, "--grad-accumulation-steps", 1, "--batch-size", 4, "--samples", 0)
    assert mlx_align("reward", *where, *options) == 0
    return folder


@pytest.fixture
def train(train, data):
    """Runs `mlx-align ppo` or `grpo` on the data; the exit code and the run folder."""

    def call(command, options=None, *, reward="letters", **where):
        given = {
            **SMALL,
            "--iters": 2,
            **(PPO_OPTIONS if command == "ppo" else {}),
            **(options or {}),
        }
        arguments = []
        for name in [] if reward is None else reward.split(","):
            arguments += ["--reward", f"{data / 'rewards.py'}:{name}"]
        for name, value in given.items():
            if value is not False:
                arguments += [name] if value is None else [name, value]
        return train(command, *arguments, **{"data": data, **where})

    return call


def changed(folder):
    """Whether the run's adapter has left its start."""
    return any(np.any(w) for name, w in adapter_of(folder).items() if name.endswith("lora_b"))


@pytest.fixture
def collectors(monkeypatch):
    """The collectors of the runs that follow."""
    seen = []

    def keep(loaded):
        seen.append(loaded[0])
        return loaded

    change_results(monkeypatch, on_policy, "load_collector", keep)
    return seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "4-bit"])
@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_run_folder_loads_in_mlx_lm(train, tiny_models, command, dtype):
    options = {"--temperature": 0.8, "--learning-rate": 1e-3}
    code, folder = train(command, options, model=tiny_models[dtype])
    assert code == 0
    rows = metric_rows(folder, "loss")
    assert [row["step"] for row in rows] == [1, 2]
    # The policy that samples is the one that learns, at its temperature.
    assert rows[0]["sampler/gap"] < (1e-4 if dtype == "float32" else 0.02)
    assert abs(rows[0]["objective/kl"]) < 1e-6
    assert {"reward", "completions/ended", "objective/entropy"} <= rows[0].keys()
    held_out = metric_rows(folder, "eval/reward")
    assert [row["step"] for row in held_out] == [0, 2]
    sampled = [row for row in read_rows(folder / "samples.jsonl") if "reward" in row]
    assert len(sampled) == 2 * 4 * 4
    assert {"prompt", "completion", "rewards", "ended", "kl", "step"} <= sampled[0].keys()
    assert sum("before" in row for row in read_rows(folder / "samples.jsonl")) == 2
    summary = summary_of(folder)
    assert (summary["steps"], summary["command"]) == (2, command)
    mlx_lm_load(str(tiny_models[dtype]), adapter_path=str(folder))
    assert changed(folder)


@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_only_policy_and_critic_are_trained(train, collectors, reward_run, command):
    options = {"--reward-model": reward_run, "--learning-rate": 1e-2}
    if command == "grpo":
        options |= {"--kl-coef": 0.1}
    code, folder = train(command, options, reward=None)
    assert code == 0
    (collector,) = collectors
    start = dict(tree_flatten(collector.policy.start))
    assert not any(np.any(np.array(w)) for name, w in start.items() if name.endswith("lora_b"))
    head = mx.load(str(reward_run / "reward_head.safetensors"))["reward_head.weight"]
    reward = dict(tree_flatten(collector.reward_adapter))
    assert np.array_equal(np.array(reward["reward_head.weight"]), np.array(head))
    stored = mx.load(str(reward_run / ADAPTER_FILE))
    for name, weight in stored.items():
        fold = 5 / 3 / 2 if name.endswith("lora_b") else 1.0  # scales of both
        np.testing.assert_allclose(np.array(reward[name]), fold * np.array(weight), rtol=1e-6)
    base = mx.load(str(TINY_MODEL / "model.safetensors"))
    now = dict(tree_flatten(collector.policy.model.module.parameters()))
    for name, weight in base.items():
        own = now.get(name, now.get(name.replace(".weight", ".linear.weight")))
        assert np.array_equal(np.array(own), np.array(weight)), name
    trained = adapter_of(folder)
    assert trained.keys() == start.keys()
    checkpoint = folder / "checkpoints" / "0000002"
    assert (checkpoint / "critic.safetensors").exists() == (command == "ppo")


def test_reward_adapter_scores_like_the_standalone_reward_model(train, collectors, reward_run):
    assert train("grpo", {"--reward-model": reward_run}, reward=None)[0] == 0
    (collector,) = collectors
    rollouts = collector.sample(collector.policy.start, collector.prompts[:4], (9,))
    ours = collector.rewards(rollouts).total
    alone = RewardModel.load(str(TINY_MODEL), reward_run)
    # A reward model is read at the end token; truncated completions get one, as text does.
    assert not rollouts.finished.all()
    (end,) = alone.style.ending[:1] or (alone.style.eos,)
    size = rollouts.group_size
    ended = [
        replace(
            group,
            completions=tuple(
                ids if rollouts.finished[b * size + k] else np.append(ids, np.int32(end))
                for k, ids in enumerate(group.completions)
            ),
        )
        for b, group in enumerate(rollouts.groups)
    ]
    theirs = np.concatenate([s[:, 0] for s in alone.score_tokens(ended)])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    # What `score` and `rerank` say of the same text, where it is tokenised as it was sampled.
    texts = [PromptGroup(p.text.prompt, ("",), "row") for p in rollouts.prompts]
    same = 0
    for b, (group, tokens) in enumerate(zip(texts, ended, strict=True)):
        mine = rollouts.texts[b * size : (b + 1) * size]
        answers = tuple(mine)
        if not isinstance(group.prompt, str):
            answers = tuple((Message("assistant", text),) for text in mine)
        (scored,) = alone.score_groups([replace(group, completions=answers)])
        if scored.scores is None:
            continue
        for k, ids in enumerate(scored.tokens.completions):
            if np.array_equal(ids, tokens.completions[k]):
                same += 1
                assert scored.scores[k] == pytest.approx(ours[b * size + k], abs=1e-5)
    assert same


def test_critic_starts_as_the_reward_model_scaled_to_the_returns(train, reward_run, monkeypatch):
    """Least squares of the returns on the scores that prefixes have on their own."""
    seen = []
    prepare = PPO.prepare

    def keep(ppo, console):
        line = prepare(ppo, console)
        seen.append(
            (ppo, {name: np.array(w) for name, w in ppo.weights["critic"]["value_head"].items()})
        )
        return line

    monkeypatch.setattr(PPO, "prepare", keep)
    given = {"--reward-model": reward_run, "--reward-clip": 1.0, "--iters": 1}
    assert train("ppo", given, reward=None)[0] == 0
    ((ppo, head),) = seen
    alone = RewardModel.load(str(TINY_MODEL), reward_run)
    rollouts = list(ppo._collector.reference_rollouts(16))
    rewards = np.concatenate([totals for _, totals in rollouts])
    scores, returns = [], []
    for completions, totals in rollouts:
        standard = np.clip((totals - rewards.mean()) / rewards.std(ddof=1), -1, 1)
        standard -= ~completions.finished
        size = completions.group_size
        for b, group in enumerate(completions.groups):
            for k, ids in enumerate(group.completions):
                whole = np.concatenate([group.prompt[-1:], ids[:-1]])
                prefixes = tuple(whole[:end] for end in range(1, len(whole) + 1))
                part = replace(group, prompt=group.prompt[:-1], completions=prefixes)
                scores += alone.score_tokens([part])[0][:, 0].tolist()
                returns += [standard[b * size + k]] * len(prefixes)
    slope, intercept = np.polyfit(scores, returns, 1)
    reward_head = mx.load(str(reward_run / "reward_head.safetensors"))["reward_head.weight"]
    np.testing.assert_allclose(head["weight"], slope * np.array(reward_head), rtol=1e-3)
    np.testing.assert_allclose(head["bias"], [intercept], rtol=1e-3)
    assert abs(slope * np.std(rewards, ddof=1) - 1) > 0.1  # what it was before the fit


def test_reward_model_on_another_base_is_a_second_model(train, tiny_models, reward_run, capsys):
    code, folder = train(
        "grpo", {"--reward-model": reward_run}, model=tiny_models["bfloat16"], reward="letters=0.5"
    )
    assert code == 0
    assert "a second model in memory" in capsys.readouterr().out
    assert {"rewards/letters/mean", "rewards/reward_model/mean"} <= metric_rows(folder, "loss")[
        0
    ].keys()


def test_reference_is_the_initial_policy(train):
    assert train("grpo", {"--learning-rate": 1e-2}, output="first")[0] == 0
    code, folder = train("grpo", {"--init-adapter": "first", "--kl-coef": 0.1}, output="second")
    assert code == 0
    first = metric_rows(folder, "loss")[0]
    assert abs(first["objective/kl"]) < 1e-6
    assert abs(first["policy/ratio"] - 1) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"--loss": "rloo", "--kl-coef": 0.05},
        {"--loss": "dr_grpo"},
        {"--loss": "dapo", "--update-epochs": 2, "--minibatches": 2},
        {"--loss": "gspo"},
        {"--loss": "reinforce++", "--kl-coef": 0.05},
        {"--loss": "reinforce++-baseline"},
        {"--loss": "cispo", "--clip-eps-high": 4},
        {"--loss": "grpo", "--kl": "k3", "--kl-coef": 0.05, "--entropy-coef": 0.01},
        {"--loss": "online_dpo", "--beta": 0.2},
    ],
    ids=lambda options: options["--loss"],
)
def test_every_method_runs(train, options):
    code, folder = train("grpo", {"--learning-rate": 1e-3, "--iters": 1, **options})
    assert code == 0
    assert changed(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"--loss": "rloo"}, ["--loss rloo", "gspo"]),
        ({"--kl": "k1", "--kl-coef": 0.1}, ["--kl k1", "--kl k2"]),
        ({"--loss": "online_dpo"}, ["--multi-objective-aggregation", "online_dpo"]),
    ],
)
def test_normalize_then_sum_needs_a_group_deviation_and_no_kl_in_the_reward(
    train, capsys, options, words
):
    given = {"--multi-objective-aggregation": "normalize_then_sum", **options}
    assert train("grpo", given, reward="letters,some")[0] == 1
    refused(capsys, *words)


def test_normalize_then_sum(train, collectors):
    """A reward counts by its weight, independent of its spread; one of weight 0 does not count."""
    given = {"--multi-objective-aggregation": "normalize_then_sum", "--learning-rate": 1e-3}
    code, folder = train("grpo", given, reward="letters=3,some,same=0")
    assert code == 0
    assert changed(folder)

    from mlx_align.algorithms.grpo import GRPO

    (collector,) = collectors
    algorithm, weights = GRPO(collector.config, collector), collector.policy.start
    prompts = [collector.prompts[0], collector.prompts[1]]
    completions = collector.sample(weights, prompts, (0,))
    rows, size = len(completions.texts), completions.group_size
    values = np.random.default_rng(0).normal(size=(rows, 3)) * [1.0, 1_000.0, 1.0]
    rewards = combine(["narrow", "wide", "watched"], values, [3.0, 1.0, 0.0])
    batch = collector.add_logprobs(weights, completions, rewards, len(prompts))
    batch = algorithm.with_advantages(batch)
    grouped = values.reshape(-1, size, 3)
    scaled = (grouped - grouped.mean(1, keepdims=True)) / (
        grouped.std(1, ddof=1, keepdims=True) + 1e-4
    )
    total = scaled @ [3.0, 1.0, 0.0]
    wanted = total / (total.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(batch.advantages[:, 0], wanted.reshape(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reward", ["same", "none"])
def test_equal_or_missing_rewards_change_nothing(train, reward):
    code, folder = train("grpo", reward=reward)
    assert code == 0
    assert not changed(folder)
    assert metric_rows(folder, "loss")[0]["frac_reward_zero_std"] == 1


@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_completions_of_one_token_some_without_reward(train, command):
    options = {"--max-completion-length": 1, "--learning-rate": 1e-3}
    code, folder = train(command, options, reward="some")
    assert code == 0
    assert all(np.isfinite(w).all() for w in adapter_of(folder).values())
    assert metric_rows(folder, "loss")[0]["completions/max_length"] == 1


def test_shared_critic(train):
    code, folder = train("ppo", {"--critic": "shared", "--iters": 3, "--learning-rate": 1e-3})
    assert code == 0
    rows = metric_rows(folder, "loss")
    # During the warm-up the policy does not change, although the critic on its backbone learns.
    assert rows[1]["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["value/loss"] > 0
    mlx_lm_load(str(TINY_MODEL), adapter_path=str(folder))


@pytest.mark.parametrize("command", ["ppo", "grpo"])
@pytest.mark.parametrize("moment", ["sampling", "learning"])
def test_resumed_run_ends_with_the_same_bytes(train, monkeypatch, command, moment, capsys):
    options = {"--iters": 4, "--learning-rate": 1e-2, "--kl-coef": 0.05}
    if command == "ppo":
        options |= {"--target-kl": 1.0}
    assert train(command, options, output="whole")[0] == 0
    name = "sample" if moment == "sampling" else "add_logprobs"
    # In the third batch; evaluations and reference rollouts sample too.
    n = 6 if moment == "sampling" and command == "ppo" else 4
    with monkeypatch.context() as patched:
        before_call(patched, RolloutCollector, name, n, interrupt)
        assert train(command, options, output="stopped")[0] == 130
    assert "--resume stopped" in capsys.readouterr().out
    assert mlx_align(command, "--resume", "stopped") == 0
    assert outcome("stopped") == outcome("whole")


def test_logprobs_are_at_the_sampling_temperature(train, collectors):
    assert train("grpo", {"--temperature": 0.5})[0] == 0
    (collector,) = collectors
    rollouts = collector.sample(collector.policy.start, collector.prompts[:4], (3,))
    logps = collector.token_logprobs(collector.policy.start, rollouts)
    np.testing.assert_allclose(logps, rollouts.sampler_logps, atol=1e-4)
    temperature = collector.policy.model.backbone.temperature
    assert temperature == 0.5


def refused(capsys, *words):
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("grpo", {"--loss": "grpoo"}, ["--loss grpoo", "rloo"]),
        ("grpo", {"--group-size": 1}, ["--group-size 1"]),
        ("grpo", {"--kl": "k2"}, ["--kl k2", "--kl-coef"]),
        ("grpo", {"--loss": "rloo", "--clip-eps": 0.1}, ["--clip-eps", "does not clip"]),
        ("grpo", {"--loss": "online_dpo", "--clip-eps": 0.1}, ["--clip-eps", "--beta"]),
        ("grpo", {"--beta": 0.1}, ["--beta", "online_dpo"]),
        ("grpo", {"--multi-objective-aggregation": "sum_then_normalize"}, ["no effect on one"]),
        ("grpo", {"--batch-tokens": 64, "--batch-size": False}, ["--batch-tokens"]),
        ("grpo", {"--lora-dropout": 0.1}, ["--lora-dropout"]),
        ("grpo", {"--max-completion-length": 96}, ["--max-completion-length 96"]),
        ("ppo", {"--gamma": 1.5}, ["--gamma 1.5"]),
        ("ppo", {"--target-kl": 3, "--kl-coef": 0}, ["--target-kl", "--kl-coef"]),
        ("ppo", {"--reward-model-weight": 2}, ["--reward-model-weight"]),
        ("ppo", {"--value-coef": 1}, ["--value-coef", "shared"]),
        ("ppo", {"--critic": "shared", "--critic-learning-rate": 1}, ["--critic-learning-rate"]),
        ("ppo", {"--reward-rollouts": 0, "--value-clip": 0.3}, ["--value-clip"]),
        ("ppo", {"--kl-horizon": 10}, ["--kl-horizon", "--target-kl"]),
        ("ppo", {"--ptx-coef": 1}, ["--ptx-coef", "--ptx-data"]),
    ],
)
def test_wrong_options_are_refused_in_one_line(train, capsys, command, options, words):
    assert train(command, options)[0] == 1
    refused(capsys, *words)


def test_run_without_rewards_is_refused(train, capsys):
    assert train("grpo", reward=None)[0] == 1
    refused(capsys, "--reward", "--reward-model")


def test_failing_reward_is_named_and_the_checkpoint_kept(train, data, capsys):
    (data / "broken.py").write_text(
        "seen = []\n"
        "def late(completions, **columns):\n"
        "    seen.append(1)\n"
        "    if len(seen) > 3:\n"
        "        raise ValueError('no more')\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    options = {"--reward": f"{data / 'broken.py'}:late", "--iters": 6}
    code, folder = train("grpo", options, reward=None)
    assert code == 1
    error = capsys.readouterr().err
    assert "late" in error
    assert "no more" in error
    assert any((folder / "checkpoints").iterdir())


def test_gamed_reward_stops_the_run_and_the_best_policy_is_kept(train, monkeypatch, capsys):
    looks = iter([(0.0, 0.0), (0.8, 0.5), (1.2, 0.4), (2.0, 0.1), (2.5, -0.2), (3.0, -0.5)])

    def planted(self, metrics):
        return next(looks)

    held_out = iter([0.0, 0.5, 0.4, 0.1, -0.2, -0.5])
    original = RolloutEvaluation.measure

    def measure(self, weights):
        return {**original(self, weights), "held_out": next(held_out)}

    monkeypatch.setattr(RolloutEvaluation, "deviations", planted)
    monkeypatch.setattr(RolloutEvaluation, "measure", measure)
    options = {"--iters": 8, "--steps-per-eval": 1, "--learning-rate": 1e-2, "--save-every": 3}
    code, folder = train("grpo", options)
    assert code == 0
    assert "the policy exploits the reward" in capsys.readouterr().out
    summary = summary_of(folder)
    assert (summary["stopped_early"], summary["best_step"], summary["steps"]) == (True, 1, 4)
    best = adapter_of(folder / "checkpoints" / "0000001")
    assert all(np.array_equal(w, best[name]) for name, w in adapter_of(folder).items())
    # The run has ended: there is nothing to resume, and no value left to measure.
    assert mlx_align("grpo", "--resume", folder) == 0
    again = summary_of(folder)
    assert (again["stopped_early"], again["best_step"], again["steps"]) == (True, 1, 4)


def test_truncated_completions_can_be_masked(train):
    # The tiny model never ends within eight tokens: nothing is left to learn from.
    code, folder = train("grpo", {"--overlong": "mask", "--learning-rate": 1e-2})
    assert code == 0
    assert metric_rows(folder, "loss")[0]["completions/ended"] == 0
    assert not changed(folder)


def test_ptx_learns_the_demonstrations(train):
    rows = [
        {
            "prompt": user(f"show {i}"),
            "completion": assistant("seven seven"),
        }
        for i in range(8)
    ]
    write_rows("shown.jsonl", rows)
    options = {
        "--ptx-coef": 4.0,
        "--ptx-data": "shown.jsonl",
        "--iters": 6,
        "--learning-rate": 1e-2,
        "--critic-warmup": 0,
    }
    code, folder = train("ppo", options)
    assert code == 0
    nll = [row["ptx/nll"] for row in metric_rows(folder, "loss")]
    assert nll[-1] < nll[0] - 0.5


def test_ptx_loss_is_the_coefficient_times_the_mean_log_loss(train, collectors):
    """However the demonstrations are split into microbatches."""
    from mlx_align.algorithms.ppo import (
        Demonstrations,
        PtxDenominators,
        PtxObjective,
        read_demonstrations,
    )
    from mlx_align.config import PPOConfig

    assert train("grpo", {"--iters": 1})[0] == 0
    (collector,) = collectors
    rows = [
        {
            "prompt": user("a" * (i + 1)),
            "completion": assistant("no " * (i + 1)),
        }
        for i in range(6)
    ]
    write_rows("shown.jsonl", rows)
    model, weights = collector.policy.model, collector.policy.start
    plain = None
    for size, count in ((2, 3), (1, 6)):
        config = PPOConfig(
            ptx_coef=3.0,
            ptx_data="shown.jsonl",
            batch_size=size,
            grad_accumulation_steps=count,
        )
        groups = read_demonstrations(config, model.folder.tokenizer)
        shown, scale = Demonstrations(config, groups).next_microbatches()
        objective, denominators = (
            PtxObjective(None, model, grad_checkpoint=False),
            PtxDenominators(None, scale),
        )
        found = [objective.loss(weights, one.arrays, denominators) for one in shown]
        total = sum(loss.item() for loss, _ in found)
        tokens = sum(sums["ptx/tokens"].item() for _, sums in found)
        nll = sum(sums["ptx/nll"].item() for _, sums in found)
        assert total == pytest.approx(3.0 * nll / tokens, rel=1e-6)
        plain = plain or total
        assert total == pytest.approx(plain, rel=1e-5)


def test_failed_batch_leaves_the_last_checkpoint_whole(train, monkeypatch):
    """Resuming from it gives the same bytes as a run that did not fail."""
    options = {"--iters": 3, "--learning-rate": 1e-2, "--save-every": 1}
    assert train("ppo", options, output="whole")[0] == 0

    def fail():
        raise TrainingError("the loss is not finite on rows train.jsonl:1")

    with monkeypatch.context() as patched:
        # The critic's second pass over the second batch, after updates of both.
        before_call(patched, Updater, "__call__", 5, fail)
        assert train("ppo", options, output="stopped")[0] == 1
    assert [one.name for one in Path("stopped", "checkpoints").iterdir()] == ["0000001"]
    assert mlx_align("ppo", "--resume", "stopped") == 0
    assert outcome("stopped") == outcome("whole")


@pytest.mark.parametrize("command", ["ppo", "grpo"])
def test_the_reward_rises(train, command):
    """By most of a deviation in twelve rollout batches; verify_on_policy.py has real cases."""
    options = {
        "--iters": 12,
        "--batch-size": 6,
        "--group-size": 8,
        "--learning-rate": 2e-2,
        "--lr-schedule": "constant",
        "--no-guard": None,
        "--steps-per-eval": 0,
        "--samples": 0,
        "--no-grad-checkpoint": None,
    }
    if command == "ppo":
        options |= {"--critic-learning-rate": 2e-2, "--kl-coef": 0.01}
    code, folder = train(command, options)
    assert code == 0
    rows = metric_rows(folder, "loss")
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.9 * rows[0]["reward_std"]


def test_dynamic_sampling_replaces_prompts_of_equal_rewards(train, collectors):
    """Every completion is rewarded once, and keeps its own reward."""
    assert train("grpo", {"--iters": 1})[0] == 0
    (collector,) = collectors
    rewarded = []

    def odd(rollouts):
        """Every second prompt's completions all have the same reward."""
        size = rollouts.group_size
        rewarded.append(len(rollouts.texts))
        values = np.array([sum(map(ord, text)) + n / 64 for n, text in enumerate(rollouts.texts)])
        for index in range(0, len(rollouts.groups), 2):
            values[index * size : (index + 1) * size] = 1.0
        return combine(["odd"], values[:, None], [1.0])

    collector = replace(collector, rewards=odd)
    stream = collector.stream(0)
    rollouts, rewards, taken = collector.sample_and_reward(
        collector.policy.start, stream, 0, lambda: None, dynamic_sampling=True
    )
    assert len(rollouts.groups) <= collector.prompts_per_batch < taken
    assert sum(rewarded) == taken * rollouts.group_size
    assert len(rewards.total) == len(rollouts.texts)
    by_prompt = rewards.total.reshape(len(rollouts.groups), -1)
    assert (by_prompt.max(axis=1) > by_prompt.min(axis=1)).all()
    own = [sum(map(ord, text)) for text in rollouts.texts]
    np.testing.assert_allclose(rewards.total, own, atol=1)  # each with its own text
