"""Add the policy-gradient cases to `tests/oracle`: GRPO and its family, RLOO, advantages, PPO.

    python scripts/make_oracle_policy.py --out tests/oracle [--only REGEX] [--grads REGEX]

These share the models and folders of `make_oracle.py`. Losses and advantages are computed by TRL on
fixed completions. PPO follows the formulas of TRL 1.12, the last version that had it.
"""

from __future__ import annotations

from typing import Any

import torch
from make_oracle import TEXT, Oracle, parse_arguments, plain, run
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

PROMPTS = {"prompt": TEXT["prompt"]}
# One group has equal rewards.
REWARDS = [1.0, 0.0, 0.3, 0.3, 2.0, -1.0, 0.5, 0.25]
ADVANTAGES = [0.7, -0.7, 1.1, -0.4, 0.0, 0.5, -1.2, 0.9]


def reward_fixed(completions: list[Any], **_: Any) -> list[float]:
    return REWARDS[: len(completions)]


def reward_len(completions: list[Any], **_: Any) -> list[float]:
    return [len(completion) / 10 for completion in completions]


class PolicyOracle:
    """The cases, on the models and folders of an `Oracle`."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        encode = oracle.tokenizer
        self.prompts = [encode(text)["input_ids"] for text in TEXT["prompt"] for _ in range(2)]
        # One completion is truncated: it has no end token.
        texts = [
            TEXT[side][i] + ("" if (side, i) == ("rejected", 1) else "<|eos|>")
            for i in range(4)
            for side in ("chosen", "rejected")
        ]
        self.completions = [encode(text, add_special_tokens=False)["input_ids"] for text in texts]
        self.options = {k: v for k, v in oracle.common.items() if k != "max_length"} | {
            "per_device_train_batch_size": 8,
            "num_generations": 2,
            "max_completion_length": 32,
            "temperature": 1.0,
        }
        self.rollout = self.make_rollout()
        oracle.batches["grpo"] = plain(self.rollout)

    def make_rollout(self) -> dict[str, Any]:
        """4 prompts × 2 completions: prompts padded left, completions right, and log-probs."""
        width, length = max(map(len, self.prompts)), max(map(len, self.completions))
        left = [[0] * (width - len(row)) for row in self.prompts]
        right = [[0] * (length - len(row)) for row in self.completions]
        prompts = zip(left, self.prompts, strict=True)
        completions = zip(self.completions, right, strict=True)
        prompt_ids, prompt_mask = zip(*((p + r, p + [1] * len(r)) for p, r in prompts), strict=True)
        ids, mask = zip(*((r + p, [1] * len(r) + p) for r, p in completions), strict=True)
        rollout = {
            "prompt_ids": torch.tensor(prompt_ids),
            "prompt_mask": torch.tensor(prompt_mask),
            "completion_ids": torch.tensor(ids),
            "completion_mask": torch.tensor(mask),
        }
        # Near the policy, so that ratios are about 1 and some of them are clipped.
        old, noise = self.oracle.model(), torch.Generator().manual_seed(11)
        for parameter in old.parameters():
            parameter.data.add_(0.003 * torch.randn(parameter.shape, generator=noise))
        return rollout | {
            "old_per_token_logps": token_logps(old, rollout),
            "ref_per_token_logps": token_logps(self.oracle.model("reference"), rollout),
            "advantages": torch.tensor(ADVANTAGES),
            "num_items_in_batch": rollout["completion_mask"].sum(),
        }

    def trainer(self, kind: Any, config_kind: Any, functions: Any, config: Any) -> Any:
        """One of TRL's on-policy trainers."""
        trainer = self.oracle.trainer(
            kind,
            config_kind,
            {**self.options, **config},
            PROMPTS,
            model=self.oracle.model(),
            reward_funcs=list(functions),
        )
        trainer.current_gradient_accumulation_steps = 1  # the training loop sets it otherwise
        return trainer

    def grpo(self, name: str, onpolicy: bool = False, **config: Any) -> None:
        """A GRPO-style loss on the rollout."""
        name = f"grpo_{name}"
        if not self.oracle.wants(name):
            return
        trainer = self.trainer(GRPOTrainer, GRPOConfig, (reward_fixed,), config)
        absent = {"old_per_token_logps"} if onpolicy else set()
        absent |= {"ref_per_token_logps"} if trainer.beta == 0 else set()
        inputs = {k: v for k, v in self.rollout.items() if k not in absent}
        loss = trainer.compute_loss(trainer.model, inputs)
        self.oracle.record(name, {**config, "onpolicy": onpolicy}, loss, trainer)

    def advantages(
        self,
        name: str,
        kind: Any,
        config_kind: Any,
        functions: Any = (reward_fixed,),
        **config: Any,
    ) -> None:
        """TRL's advantages; for RLOO, its loss too."""
        if not self.oracle.wants(name):
            return
        trainer = self.trainer(kind, config_kind, functions, config)
        if getattr(trainer, "ref_model", None) is not None:
            trainer.ref_model.load_state_dict(self.oracle.model("reference").state_dict())
        decode = self.oracle.tokenizer.decode
        texts = [decode(row, skip_special_tokens=True) for row in self.completions]
        if kind is GRPOTrainer:
            generated: Any = (self.prompts, self.completions, None, texts, None, {}, None, None)
        else:
            generated = (self.prompts, self.completions, texts)
        trainer._generate = lambda *_, **__: generated
        rows = [{"prompt": prompt} for prompt in TEXT["prompt"] for _ in range(2)]
        outputs = trainer._generate_and_score_completions(rows)
        config |= {"funcs": [function.__name__ for function in functions]}
        advantages = outputs["advantages"].tolist()
        if kind is RLOOTrainer:
            more = {"advantages": advantages, "old_logps": outputs["old_logps"].tolist()}
            loss = trainer.compute_loss(trainer.model, outputs)
            self.oracle.record(name, config, loss, trainer, **more)
        else:
            metrics = {key: values[-1] for key, values in trainer._metrics["train"].items()}
            record = {"config": config, "rewards_fixed": REWARDS, "advantages": advantages}
            self.oracle.write(name, {**record, "metrics": metrics})

    def ppo(self, name: str, kl: str = "k1", whiten_rewards: bool = False) -> None:
        """A PPO update on random log-probs, values and scores."""
        if not self.oracle.wants(name):
            return
        config = {
            "kl": kl,
            "kl_coef": 0.05,
            "gamma": 1.0,
            "lam": 0.95,
            "cliprange": 0.2,
            "cliprange_value": 0.2,
            "vf_coef": 0.1,
            "whiten_rewards": whiten_rewards,
        }
        noise, rows, width = torch.Generator().manual_seed(5), 3, 6
        lengths = torch.tensor([6, 4, 2])  # with the end token
        new, old, ref = (-torch.randn(rows, width, generator=noise).abs() for _ in range(3))
        value, value_new = (torch.randn(rows, width, generator=noise) for _ in range(2))
        score = torch.randn(rows, generator=noise)
        inputs = {"lengths": lengths, "new_logps": new, "old_logps": old, "ref_logps": ref}
        inputs |= {"values": value, "vpred": value_new, "scores": score}
        record = {"config": config, "inputs": plain({k: v.clone() for k, v in inputs.items()})}
        self.oracle.write(name, record | plain(ppo_numbers(config, inputs)))

    def run(self) -> None:
        """Write all cases."""
        for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "vespo"):
            self.grpo(loss, loss_type=loss)
        self.grpo("cispo", loss_type="cispo", epsilon_high=5.0)
        self.grpo("luspo", loss_type="luspo", importance_sampling_level="sequence")
        gspo = {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
        self.grpo("gspo", loss_type="grpo", **gspo)
        self.grpo("onpolicy", loss_type="grpo", onpolicy=True)
        self.grpo("beta0.04", loss_type="grpo", beta=0.04)
        self.grpo("beta0.04_nobias", loss_type="grpo", beta=0.04, use_bias_correction_kl=False)
        self.grpo("dapo_cliphigher", loss_type="dapo", epsilon=0.02, epsilon_high=0.028)
        self.grpo("delta", loss_type="grpo", delta=1.05, epsilon=0.02)
        self.grpo("entropy_quantile0.2", loss_type="dapo", top_entropy_quantile=0.2)
        self.grpo("entropy_coef0.01", loss_type="dapo", entropy_coef=0.01)
        self.grpo("temperature0.7", loss_type="grpo", temperature=0.7)
        self.grpo("offpolicy_mask", loss_type="grpo", off_policy_mask_threshold=0.001)

        grpo, rloo = (GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)
        both = (reward_fixed, reward_len)
        for scale in ("group", "batch", "none"):
            self.advantages(f"adv_grpo_{scale}", *grpo, scale_rewards=scale)
        weights = {"reward_weights": [1.0, 0.5]}
        each = {"multi_objective_aggregation": "normalize_then_sum"}
        self.advantages("adv_gdpo_2rewards", *grpo, both, **each, **weights)
        self.advantages("adv_sum_2rewards", *grpo, both, **weights)
        self.advantages("adv_mask_truncated", *grpo, mask_truncated_completions=True)
        self.advantages("rloo_beta0.05", *rloo)
        self.advantages("rloo_beta0_norm", *rloo, beta=0.0, normalize_advantages=True)

        self.ppo("ppo_k1")
        self.ppo("ppo_k3", kl="k3")
        self.ppo("ppo_whiten", whiten_rewards=True)


@torch.no_grad()
def token_logps(model: Any, rollout: dict[str, Any]) -> Any:
    """(8, C) log-probs of the completions' tokens, 0 where padded."""
    ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], 1)
    mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1)
    logps = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits[:, :-1], -1)
    selected = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
    completion_mask = rollout["completion_mask"]
    return selected[:, -completion_mask.shape[1] :] * completion_mask


def masked_mean(x: Any, mask: Any) -> Any:
    return (x * mask).sum() / mask.sum()


def whiten(x: Any, mask: Any, shift_mean: bool) -> Any:
    """Scale to unit (unbiased) variance inside the mask, and shift to mean 0 if `shift_mean`."""
    mean, count = masked_mean(x, mask), mask.sum()
    variance = masked_mean((x - mean) ** 2, mask) * count / (count - 1)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else whitened + mean


def ppo_numbers(config: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """One PPO update: per-token rewards, generalised advantages, clipped losses, gradients."""
    new, value_new = (inputs[k].clone().requires_grad_() for k in ("new_logps", "vpred"))
    lengths, width = inputs["lengths"], new.shape[1]
    last = (lengths - 1)[:, None]
    position = torch.arange(width).expand_as(new)
    padding = position > last
    value_padding = position > last + 1  # values have one position more
    old = inputs["old_logps"].masked_fill(padding, 1.0)
    ref = inputs["ref_logps"].masked_fill(padding, 1.0)
    value = inputs["values"].masked_fill(value_padding, 0)

    logratio = ref - old
    kl = -logratio if config["kl"] == "k1" else logratio.exp() - 1 - logratio
    rewards = -config["kl_coef"] * kl
    end = torch.where(lengths < width, lengths, lengths - 1)
    rewards[torch.arange(len(lengths)), end] += inputs["scores"]
    if config["whiten_rewards"]:
        rewards = whiten(rewards, ~value_padding, False).masked_fill(value_padding, 0)

    gae, following = torch.zeros_like(value), torch.zeros(len(lengths))
    for t in reversed(range(width)):
        next_value = value[:, t + 1] if t < width - 1 else 0.0
        delta = rewards[:, t] + config["gamma"] * next_value - value[:, t]
        following = delta + config["gamma"] * config["lam"] * following
        gae[:, t] = following
    returns = gae + value
    advantages = whiten(gae, ~padding, True).masked_fill(padding, 0)

    predicted = value_new.masked_fill(value_padding, 0)
    reach, clip = config["cliprange_value"], config["cliprange"]
    clipped = predicted.clamp(value - reach, value + reach)
    errors = torch.max((predicted - returns) ** 2, (clipped - returns) ** 2)
    value_loss = 0.5 * masked_mean(errors, ~value_padding)
    ratio = (new.masked_fill(padding, 1.0) - old).exp()
    surrogate = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    policy_loss = masked_mean(surrogate, ~padding)
    loss = policy_loss + config["vf_coef"] * value_loss
    loss.backward()
    gradient = torch.cat([new.grad.flatten(), value_new.grad.flatten()])
    return {
        "rewards": rewards,
        "gae_raw": gae,
        "advantages": advantages,
        "returns": returns,
        "pg_loss": policy_loss.detach(),
        "vf_loss": value_loss.detach(),
        "loss": loss.detach(),
        "d_new_logps": new.grad,
        "d_vpred": value_new.grad,
        "grad_norm": gradient.norm(),
    }


if __name__ == "__main__":
    run(
        lambda oracle: PolicyOracle(oracle).run(),
        parse_arguments(r"^(grpo_dapo|grpo_dr_grpo|grpo_gspo|rloo_beta0\.05)$"),
    )
