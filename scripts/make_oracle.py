"""Make `tests/oracle` again: TRL's own loss, metrics and gradients on one fixed tiny batch.

    pip install "mlx-align[oracle]"
    python scripts/make_oracle.py --out tests/oracle [--only REGEX] [--grads REGEX]

Writes a tiny random llama (policy, a perturbed reference, a sequence classifier) and for each case
what TRL's own trainers compute for it, in float32 on the CPU: no loss is restated here. These are
the offline families; `make_oracle_policy.py` adds those of policy gradients.

    models/{policy,reference,reward}   for mlx-lm (`reward` is a llama with a `score` head)
    batches.json                       every batch of token ids that was fed
    cases/<case>.json                  configuration, loss, metrics, norm of each gradient
    grads/<case>.safetensors           whole gradients, of the cases that --grads matches
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
warnings.filterwarnings("ignore")

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? "
    "Paris is the capital of France.",
    "Explain preference optimization: the policy should prefer the chosen answer over the "
    "rejected answer.",
    "I think the sky is blue because of Rayleigh scattering. I cannot help with that request.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))  # 5",
    "user assistant system hello world 0123456789",
]
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEXT = {
    "prompt": [
        "The quick brown",
        "What is the capital of France?",
        "def add(a, b):",
        "Explain preference",
    ],
    "chosen": [
        " fox jumps over the lazy dog.",
        " Paris is the capital.",
        "\n    return a + b",
        " the policy should prefer the chosen answer.",
    ],
    "rejected": [
        " dog.",
        " I cannot help with that request, sorry.",
        "\n    return b",
        " no",
    ],
}
CHAT = {
    "prompt": [[{"role": "user", "content": text}] for text in TEXT["prompt"]],
    **{
        side: [[{"role": "assistant", "content": text.strip()}] for text in TEXT[side]]
        for side in ("chosen", "rejected")
    },
}
IMPLICIT = {
    side: [p + c for p, c in zip(TEXT["prompt"], TEXT[side], strict=True)]
    for side in ("chosen", "rejected")
}
UNPAIRED = {
    "prompt": TEXT["prompt"],
    "completion": [TEXT[("chosen", "rejected")[i % 2]][i] for i in range(4)],
    "label": [True, False, True, False],
}
PLAIN_DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "sigmoid_norm", "nca_pair", "bco_pair", "sppo_hard", "sft"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop"),
)

# Eager attention adds up in the textbook order, which sdpa does not.
LOAD: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}


# ---------------------------------------------------------------- models


def make_models(folder: Path) -> None:
    """Write the three tiny models with their tokenizer."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS * 20,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    common: dict[str, Any] = {
        "vocab_size": len(fast),
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.12,
    }

    def save(model: Any, name: str) -> None:
        model.to(torch.float32).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
        (folder / name / "generation_config.json").unlink(missing_ok=True)
        # Readers older than transformers 5 look for these keys.
        rewrite(folder / name / "config.json", rope_theta=10000.0, torch_dtype="float32")
        rewrite(folder / name / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")

    torch.manual_seed(0)
    policy = LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=False))
    save(policy, "policy")
    # The reference is near the policy, so that log-ratios are moderate and not 0.
    reference, noise = LlamaForCausalLM(policy.config), torch.Generator().manual_seed(7)
    reference.load_state_dict(
        {
            name: value + 0.02 * torch.randn(value.shape, generator=noise)
            for name, value in policy.state_dict().items()
        }
    )
    save(reference, "reference")
    torch.manual_seed(1)
    save(LlamaForSequenceClassification(LlamaConfig(**common, num_labels=1)), "reward")


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=1))


def plain(value: Any) -> Any:
    """Tensors as lists, for JSON."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


# ---------------------------------------------------------------- cases


class Oracle:
    """Runs the cases that were asked for, and writes down what came out."""

    def __init__(self, out: Path, only: str, grads: str) -> None:
        self.out, self.only, self.grads = out, only, grads
        self.batches: dict[str, Any] = {}
        make_models(out / "models")
        for folder in ("cases", "grads"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        # transformers reads the class of the tokenizer from the folder it was saved to.
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(str(out / "models" / "policy"))
        # TRL's default is bf16 autocast, on a CPU too.
        self.common = {
            "output_dir": tempfile.mkdtemp(),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "seed": 0,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "max_length": 64,
        }

    def wants(self, name: str) -> bool:
        """Whether --only matches the case."""
        return re.search(self.only, name) is not None

    def model(self, name: str = "policy") -> Any:
        """A fresh copy of the policy or the reference."""
        return AutoModelForCausalLM.from_pretrained(self.out / "models" / name, **LOAD)

    def trainer(self, kind: Any, config: Any, options: dict[str, Any], data: Any, **kw: Any) -> Any:
        """One of TRL's trainers, ready for `compute_loss`, silently."""
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = kind(
                args=config(**options),
                train_dataset=Dataset.from_dict(data),
                processing_class=self.tokenizer,
                **kw,
            )
        trainer.model.train()
        return trainer

    def collate(self, trainer: Any, wanted: Callable[[str], bool] = lambda key: True) -> Any:
        """The trainer's own batch of its four rows, and the rows, with the wanted columns."""
        rows = [trainer.train_dataset[i] for i in range(4)]
        kept = [{key: row[key] for key in row if wanted(key)} for row in rows]
        return trainer.data_collator(kept), kept

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Write a case."""
        (self.out / "cases" / f"{name}.json").write_text(json.dumps(record, indent=1))

    def record(
        self, name: str, config: Any, loss: Any, trainer: Any, metrics: Any = None, **more: Any
    ) -> None:
        """Differentiate `loss` and write the case."""
        loss.backward()
        named = trainer.model.named_parameters()
        grads = {n: p.grad.detach().clone().contiguous() for n, p in named if p.grad is not None}
        norms = {n: float(g.double().norm()) for n, g in grads.items()}
        if metrics is None:
            metrics = {key: values[-1] for key, values in trainer._metrics["train"].items()}
        self.write(
            name,
            {
                "config": config,
                "loss": loss.item(),
                "metrics": metrics,
                "grad_norm": sum(norm**2 for norm in norms.values()) ** 0.5,
                **more,
                "grad_norms": norms,
            },
        )
        if re.search(self.grads, name):
            save_file(grads, str(self.out / "grads" / f"{name}.safetensors"))

    def dpo(
        self, name: str, data: Any = TEXT, key: str = "dpo_text", peft: Any = None, **config: Any
    ) -> None:
        """A case of preference pairs with a reference (or an adapter on its own base)."""
        if not self.wants(name):
            return
        reference = None if peft else self.model("reference")
        trainer = self.trainer(
            DPOTrainer,
            DPOConfig,
            {**self.common, **config},
            data,
            model=self.model(),
            ref_model=reference,
            peft_config=peft,
        )
        batch, rows = self.collate(trainer, lambda k: k.endswith("_ids") or k.startswith("ref_"))
        ids = ("prompt_ids", "chosen_ids", "rejected_ids")
        rows = [{k: row[k] for k in ids} for row in rows]
        self.batches.setdefault(key, {"rows": rows, "collated": plain(batch)})
        more: dict[str, Any] = {}
        if peft:
            # B is 0 at first, and so would be the log-ratio.
            noise, adapter = torch.Generator().manual_seed(3), {}
            for parameter, value in trainer.model.named_parameters():
                if "lora_B" in parameter:
                    value.data.copy_(0.05 * torch.randn(value.shape, generator=noise))
                if "lora_" in parameter:
                    adapter[parameter] = value.detach().clone()
            save_file(adapter, str(self.out / f"{name}_adapter.safetensors"))
        else:
            for model, label in ((self.model(), ""), (self.model("reference"), "ref_")):
                chosen, rejected = sequence_logps(model, batch).chunk(2)
                more |= {
                    f"{label}chosen_logps": chosen.tolist(),
                    f"{label}rejected_logps": rejected.tolist(),
                }
        trainer.model.zero_grad()
        self.record(name, config, trainer.compute_loss(trainer.model, dict(batch)), trainer, **more)

    def offline(self) -> None:
        """All cases of pairs, scores, labelled rows and supervised rows."""
        for loss in PLAIN_DPO_LOSSES:
            self.dpo(f"dpo_{loss}", loss_type=[loss])
        self.dpo("dpo_robust_ls0.1", loss_type=["robust"], label_smoothing=0.1)
        self.dpo("dpo_exo_pair_ls1e-3", loss_type=["exo_pair"], label_smoothing=1e-3)
        self.dpo("dpo_aot_ls0.1", loss_type=["aot"], label_smoothing=0.1)
        self.dpo("dpo_sigmoid_beta0.5", loss_type=["sigmoid"], beta=0.5)
        self.dpo("dpo_sigmoid_chat", CHAT, "dpo_chat")
        self.dpo("dpo_sigmoid_implicit_prompt", IMPLICIT, "dpo_implicit")
        self.dpo(
            "dpo_mpo_sigmoid+bco_pair+sft",
            loss_type=["sigmoid", "bco_pair", "sft"],
            loss_weights=[0.8, 0.2, 1.0],
        )
        self.dpo(
            "dpo_rpo_sigmoid+sft_alpha1", loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0]
        )
        self.dpo("dpo_wpo", use_weighting=True)
        self.dpo("dpo_ld0.5", ld_alpha=0.5)
        self.dpo("dpo_ld0", ld_alpha=0.0)
        for divergence in ("forward_kl", "js_divergence", "alpha_divergence"):
            self.dpo(f"dpo_f_{divergence}", f_divergence_type=divergence)
        self.dpo("dpo_truncated_len24", max_length=24)
        self.dpo("dpo_precomputed_ref", precompute_ref_log_probs=True)
        lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
        self.dpo("dpo_lora_r4_a8", peft=LoraConfig(target_modules=["q_proj", "v_proj"], **lora))

        self.reward("reward_bt")
        self.reward("reward_bt_center0.01", center_rewards_coefficient=0.01)
        self.reward("reward_bt_margin", margin=[0.1, 0.5, 0.0, 1.0])

        self.kto("kto")
        # The estimate of the KL is clamped at 0: exchanged models give it the other sign.
        self.kto("kto_swapped", roles=("reference", "policy"))
        self.kto("kto_weights", desirable_weight=1.0, undesirable_weight=1.33)
        self.kto("kto_apo_zero_unpaired", loss_type="apo_zero_unpaired")

        self.reference_free("orpo", ORPOTrainer, ORPOConfig)
        for loss in ("sigmoid", "hinge", "ipo"):
            self.reference_free(f"cpo_{loss}", CPOTrainer, CPOConfig, loss_type=loss)
        for name, more in (
            ("simpo_alpha0", {"cpo_alpha": 0.0}),
            ("simpo_alpha1", {"cpo_alpha": 1.0}),
            ("alphapo", {"cpo_alpha": 0.0, "alpha": 0.25}),
        ):
            simpo = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, **more}
            self.reference_free(f"cpo_{name}", CPOTrainer, CPOConfig, **simpo)

        rows = {"prompt": TEXT["prompt"], "completion": TEXT["chosen"]}
        turns = zip(CHAT["prompt"], CHAT["chosen"], strict=True)
        self.sft("sft_prompt_completion", rows)
        self.sft("sft_full", rows, completion_only_loss=False)
        self.sft("sft_dft", rows, loss_type="dft")
        chat = {"messages": [prompt + chosen for prompt, chosen in turns]}
        self.sft("sft_chat_assistant_only", chat, assistant_only_loss=True)

    def reward(self, name: str, margin: list[float] | None = None, **config: Any) -> None:
        """A case of Bradley–Terry on scores."""
        if not self.wants(name):
            return
        model = AutoModelForSequenceClassification.from_pretrained(
            self.out / "models" / "reward", num_labels=1, **LOAD
        )
        data = {**TEXT, **({"margin": margin} if margin else {})}
        trainer = self.trainer(
            RewardTrainer, RewardConfig, {**self.common, **config}, data, model=model
        )
        ids = ("chosen_ids", "rejected_ids")
        batch, rows = self.collate(trainer, lambda k: k in (*ids, "margin"))
        collated = plain({k: batch[k] for k in ("input_ids", "attention_mask")})
        rows = [{k: row[k] for k in ids} for row in rows]
        self.batches.setdefault("reward_text", {"rows": rows, "collated": collated})
        loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
        scores = outputs.logits.squeeze(-1).tolist()
        self.record(name, {**config, "margin": margin}, loss, trainer, rewards=scores)

    def kto(
        self, name: str, roles: tuple[str, str] = ("policy", "reference"), **config: Any
    ) -> None:
        """A case of labelled rows."""
        if not self.wants(name):
            return
        policy, reference = map(self.model, roles)
        trainer = self.trainer(
            KTOTrainer,
            KTOConfig,
            {**self.common, **config},
            UNPAIRED,
            model=policy,
            ref_model=reference,
        )
        batch, _ = self.collate(trainer, lambda k: k.endswith("_ids") or k == "label")
        self.batches.setdefault("kto_text", {"collated": plain(batch)})
        config |= {"policy": f"models/{roles[0]}", "ref": f"models/{roles[1]}"}
        self.record(name, config, trainer.compute_loss(trainer.model, dict(batch)), trainer)

    def reference_free(self, name: str, kind: Any, config_kind: Any, **config: Any) -> None:
        """A case of preference pairs without a reference."""
        if not self.wants(name):
            return
        options = {**self.common, **config}
        trainer = self.trainer(kind, config_kind, options, TEXT, model=self.model())
        batch, _ = self.collate(trainer)
        tensors = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}
        key = f"{kind.__name__.lower()}_text"
        self.batches.setdefault(key, {"collated": plain(tensors)})
        loss, metrics = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
        self.record(name, config, loss, trainer, {k: float(v) for k, v in metrics.items()})

    def sft(self, name: str, data: Any, **config: Any) -> None:
        """A case of supervised rows."""
        if not self.wants(name):
            return
        options = {**self.common, **config}
        trainer = self.trainer(SFTTrainer, SFTConfig, options, data, model=self.model())
        batch, _ = self.collate(trainer)
        self.batches.setdefault(name, {"collated": plain(batch)})
        self.record(name, config, trainer.compute_loss(trainer.model, dict(batch)), trainer)


@torch.no_grad()
def sequence_logps(model: Any, batch: dict[str, Any]) -> Any:
    """Log-probs of the completions by the textbook: all logits, double log-softmax."""
    ids = batch["input_ids"]
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
    logps = torch.log_softmax(logits.double(), -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logps * batch["completion_mask"][:, 1:]).sum(1)


def parse_arguments(grads: str) -> argparse.Namespace:
    """The command line; `grads` is the default of --grads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--only", default="", help="regular expression of case names")
    parser.add_argument("--grads", default=grads, help="cases whose whole gradients are kept")
    return parser.parse_args()


def run(cases: Callable[[Oracle], None], arguments: argparse.Namespace) -> None:
    """Make an oracle, run `cases` on it and write the batches they met."""
    disable_progress_bars()
    logging.disable(logging.WARNING)
    torch.use_deterministic_algorithms(True)
    oracle = Oracle(arguments.out, arguments.only, arguments.grads)
    cases(oracle)
    path = arguments.out / "batches.json"
    others = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**others, **oracle.batches}))


if __name__ == "__main__":
    run(
        Oracle.offline,
        parse_arguments(r"^(dpo_sigmoid|kto_swapped|reward_bt|dpo_lora_r4_a8)$"),
    )
