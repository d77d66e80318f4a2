"""Short runs of every command, and what is recorded of each.

Only the command line is used, never the package's modules, so that the package can be rebuilt
behind it. `test_recorded_runs.py` compares with `recorded_runs.json`, which
`scripts/record_runs.py` writes.

A case is a command line. It runs in a work folder that holds the models and the data of
`make_inputs`, so all paths are relative. Its run folder is `runs/NAME`; a case that names another
case's folder is run after it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlx_align.cli.main import run as command_line

# isort: split
import mlx.core as mx
import numpy as np
from mlx_lm.convert import convert

ORACLE = Path(__file__).resolve().parent.parent / "oracle"
RECORDED = Path(__file__).with_suffix(".json")
# Run folders of the cases named *-resumed as Ctrl-C left them, written by version 0.1.0.
INTERRUPTED = Path(__file__).with_name("interrupted_runs")
DIGITS = 9
# Fields that differ from run to run or from machine to machine, and sentences.
IGNORED = re.compile(
    r"second|peak_memory|^(time|software|system|here|basis|remarks|advice|moment|reference|data)$"
    # Deviations of held-out metrics, which were not recorded.
    r"|^eval/(loss|perplexity|((logps|rewards)/(chosen|rejected|margins|accuracies)))_std$"
    r"|^eval/prompts$"
    # The messages of held-out prompts in samples.jsonl.
    r"|^messages$"
)
# Weights whose fingerprints are recorded: in a run folder or a fused model, in its checkpoint, and
# in the checkpoints of two cases.
WEIGHTS = ("adapters.safetensors", "reward_head.safetensors", "model.safetensors")
CHECKPOINTED = ("critic.safetensors",)
OPTIMIZERS = {
    "dpo": ("policy.optimizer.safetensors",),
    "ppo": ("policy.optimizer.safetensors", "critic.optimizer.safetensors"),
}

# ---------------------------------------------------------------- cases

OFFLINE = (
    "--model model --output runs/{name} --keep last --iters 3 --batch-size 2 --grad-checkpoint "
    "--grad-accumulation-steps 2 --lora-rank 4 --learning-rate 1e-3 --warmup 0 "
    "--max-seq-length 64 --steps-per-report 1 --samples 0 --val-batches 25 --steps-per-eval 100"
)
DPO = f"dpo --data pairs --reference-cache caches/{{name}} {OFFLINE}"
KTO = f"kto --data labelled.jsonl --valid-fraction 0.25 --reference-cache caches/{{name}} {OFFLINE}"
SFT = f"sft --data demonstrations.jsonl --valid-fraction 0.25 {OFFLINE.replace('64', '96')}"
REWARD = f"reward --data pairs {OFFLINE}"
ON_POLICY = (
    "--model model --data pairs --output runs/{name} --iters 2 --batch-size 2 "
    "--grad-accumulation-steps 2 --group-size 4 --max-completion-length 8 --max-seq-length 64 "
    "--lora-rank 4 --learning-rate 1e-3 --samples 0 --no-guard --keep last --grad-checkpoint "
    "--val-batches 25"
)
# For folders of runs that are kept in the repository.
FEW = "--lora-keys self_attn.q_proj,mlp.down_proj"
LENGTH = "--reward length(target=4)"
GRPO = f"grpo {ON_POLICY} {LENGTH}"
PPO = f"ppo {ON_POLICY} --reward-rollouts 8 --critic-warmup 1"

PLAN = (
    "--model model --data pairs --machine '16 GB M2' --json --grad-accumulation-steps 8 "
    "--grad-checkpoint"
)

PAIRWISE_LOSSES = {
    "sigmoid": "--label-smoothing 0.1",
    "ipo": "",
    "hinge": "--beta 2",
    "robust": "--label-smoothing 0.1",
    "exo_pair": "--label-smoothing 0.1",
    "nca_pair": "",
    "bco_pair": "",
    "sppo_hard": "",
    "aot": "",
    "aot_unpaired": "",
    "apo_zero": "",
    "apo_down": "",
    "discopop": "",
    "dpop": "",
    "sigmoid_norm": "",
    "simpo": "",
    "orpo": "",
    "cpo": "",
    "alphapo": "",
    "sft": "",
}

CASES: dict[str, str] = {
    "dpo": f"{DPO} --samples 2 --sample-tokens 6",
    **{f"dpo-{loss}": f"{DPO} --loss {loss} {more}" for loss, more in PAIRWISE_LOSSES.items()},
    "dpo-weighted-sum": f"{DPO} --loss sigmoid=1,sft=0.2",
    "dpo-wpo": f"{DPO} --wpo",
    "dpo-ld-alpha": f"{DPO} --ld-alpha 0.5",
    "dpo-forward-kl": f"{DPO} --loss-option f_divergence=forward_kl",
    "dpo-js": f"{DPO} --loss-option f_divergence=js",
    "dpo-alpha-divergence": f"{DPO} --loss-option f_divergence=alpha --loss-option f_alpha=0.5",
    "dpo-dora": f"{DPO} --fine-tune-type dora",
    "dpo-full": f"{DPO.replace('--lora-rank 4 ', '')} --fine-tune-type full --num-layers 1",
    "dpo-dropout": f"{DPO} --lora-dropout 0.2",
    "dpo-keys": f"{DPO} --lora-keys self_attn.q_proj,mlp.down_proj --lora-alpha 3",
    "dpo-bfloat16": f"{DPO} --model bfloat16",
    "dpo-bfloat16-adapters": f"{DPO} --model bfloat16 --adapter-dtype bfloat16",
    "dpo-4-bit": f"{DPO} --model 4-bit",
    "dpo-packed": f"{DPO.replace('--batch-size 2 ', '')} --batch-tokens 160",
    "dpo-one-by-one": f"{DPO} --batch-size 1 --grad-accumulation-steps 4",
    "dpo-no-checkpointing": f"{DPO} --no-grad-checkpoint",
    "dpo-init-adapter": f"{DPO.replace('--lora-rank 4 ', '')} --init-adapter runs/sft",
    "dpo-max-completion-length": f"{DPO} --max-completion-length 3",
    "dpo-num-layers": f"{DPO} --num-layers 1",
    "dpo-constant": f"{DPO} --lr-schedule constant --warmup 1 --weight-decay 0.1",
    "dpo-cosine": f"{DPO} --lr-schedule cosine --max-grad-norm 0.1",
    "dpo-ranked": f"{DPO} --data ranked.jsonl --valid-fraction 0.25",
    "dpo-resumed": f"{DPO} {FEW} --iters 5 --save-every 1 --lora-dropout 0.2 --steps-per-eval 2",
    "sft": SFT,
    "sft-dft": f"{SFT} --loss dft",
    "sft-assistant": f"{SFT} --data conversations.jsonl --loss-on assistant",
    "sft-packed": f"{SFT.replace('--batch-size 2 ', '')} --batch-tokens 96",
    "kto": f"{KTO} --desirable-weight 1.5",
    "kto-apo_zero_unpaired": f"{KTO} --loss apo_zero_unpaired",
    "kto-pairs": KTO.replace("--data labelled.jsonl --valid-fraction 0.25", "--data pairs"),
    "reward": REWARD,
    "reward-two-members": f"{REWARD} --members 2 --label-smoothing 0.1",
    "reward-center": f"{REWARD} --center-rewards-coefficient 0.1",
    "reward-margins": f"{REWARD} --data margins.jsonl --valid-fraction 0.25",
    "reward-ranked": (
        f"{REWARD} --data ranked.jsonl --valid-fraction 0.25 --rating-margin 0.1 --ties half"
    ),
    "ppo": f"{PPO} {LENGTH}",
    "ppo-shared-critic": f"{PPO} {LENGTH} --critic shared --critic-warmup 0 --value-coef 0.2",
    "ppo-reward-model": f"{PPO} --reward-model runs/reward --target-kl 1 --kl-horizon 100",
    "ppo-ptx": f"{PPO} {LENGTH} --ptx-data demonstrations.jsonl --ptx-coef 0.2 --minibatches 2",
    "ppo-resumed": f"{PPO} {LENGTH} {FEW} --iters 4 --save-every 1",
    "grpo": f"{GRPO} --samples 2 --sample-tokens 6 --guard",
    "grpo-file": f"grpo {ON_POLICY} --reward rewards.py:letters",
    "grpo-epochs": f"{GRPO} --minibatches 2 --update-epochs 2 --learning-rate 3e-3",
    **{
        f"grpo-{loss}": f"{GRPO} --loss {loss}"
        for loss in ("dr_grpo", "dapo", "gspo", "rloo", "cispo", "sapo", "vespo", "luspo")
    },
    "grpo-reinforce++": f"{GRPO} --loss reinforce++ --kl-coef 0.05",
    "grpo-reinforce++-baseline": f"{GRPO} --loss reinforce++-baseline",
    "grpo-online_dpo": f"{GRPO} --loss online_dpo --beta 0.2",
    "grpo-k1": f"{GRPO} --kl k1 --kl-coef 0.1 --update-epochs 2",
    "grpo-k2": f"{GRPO} --kl k2 --kl-coef 0.1 --update-epochs 2",
    "grpo-k3": f"{GRPO} --kl k3 --kl-coef 0.1 --update-epochs 2",
    "grpo-dynamic-sampling": f"grpo {ON_POLICY} --reward \"regex(pattern='a')\" --dynamic-sampling",
    "grpo-two-rewards": f"{GRPO} --reward repetition(n=2)=0.5 --entropy-coef 0.01",
    "grpo-normalize_then_sum": (
        f"{GRPO} --reward \"regex(pattern='[a-f]')=0.5\" "
        "--multi-objective-aggregation normalize_then_sum"
    ),
    "grpo-mask": f"{GRPO} --overlong mask",
    "grpo-reward-model": f"{GRPO} --reward-model runs/reward-two-members --reward-model-weight 0.5",
    "grpo-4-bit": f"{GRPO} --model 4-bit",
    "grpo-resumed": f"{GRPO} {FEW} --iters 4 --save-every 1",
    # What is done with runs.
    "score-reward": "score --model model --adapter-path runs/reward --data pairs --output {out}",
    "score-members": (
        "score --model model --adapter-path runs/reward-two-members --data ranked.jsonl "
        "--combine mean-variance --variance-penalty 2 --output {out}"
    ),
    "score-implicit": "score --model model --adapter-path runs/dpo --data pairs --output {out}",
    "score-init-adapter": (
        "score --model model --adapter-path runs/dpo-init-adapter --data pairs --output {out}"
    ),
    "score-logps": "score --model model --logps --data pairs --output {out} --per-token",
    "score-classifier": "score --model classifier --data pairs --output {out}",
    "rerank-given": "rerank --model model --adapter-path runs/dpo --input ranked.jsonl "
    "--output {out}",
    "rerank-sampled": (
        "rerank --model model --adapter-path runs/dpo --input prompts.jsonl -n 4 --max-tokens 8 "
        "--seed 3 --output {out}"
    ),
    "rerank-reward-model": (
        "rerank --model model --adapter-path runs/dpo --reward-model runs/reward --prompt 'is it?' "
        "-n 4 --max-tokens 8 --json"
    ),
    "eval": (
        "eval --model model --adapter-path runs/dpo --samples 4 -n 2 --sample-tokens 8 "
        "--reward-model runs/reward --perplexity-data text.jsonl --output runs/{name}"
    ),
    "eval-grpo": (
        "eval --model model --adapter-path runs/grpo --samples 4 -n 2 --sample-tokens 8 "
        "--output runs/{name}"
    ),
    "sample": (
        "data sample --model model --adapter-path runs/dpo --data pairs --reward length(target=4) "
        "-n 4 --keep 2 --threshold 0 --max-tokens 8 --output {out}"
    ),
    "sample-pairs": (
        "data sample --model model --adapter-path runs/dpo --data pairs "
        "--reward-model runs/reward -n 4 --pairs --max-tokens 8 --output {out}"
    ),
    "fuse": "fuse --model model --adapter-path runs/dpo --output runs/{name}",
    "fuse-4-bit": "fuse --model 4-bit --adapter-path runs/dpo-4-bit --output runs/{name}",
    "fuse-dora": "fuse --model model --adapter-path runs/dpo-dora --output runs/{name}",
    "reward-export": (
        "reward export --model model --adapter-path runs/reward --output runs/{name}"
    ),
    "plan": f"plan {PLAN}",
    "plan-packed": (
        f"plan {PLAN.replace('--model model', '--model 4-bit')} --batch-tokens 160 "
        "--no-grad-checkpoint"
    ),
    "plan-reward": f"plan --command reward {PLAN}",
    "plan-ppo": (
        f"plan --command ppo {PLAN.replace('steps 8', 'steps 16')} --reward length(target=4)"
    ),
    "plan-grpo": (f"plan --command grpo {PLAN} --reward length(target=4)"),
}

# ---------------------------------------------------------------- inputs


def make_inputs(folder: Path) -> None:
    """The models, data and reward function that the cases name."""
    _make_model(folder / "model")
    # mlx-lm says how large a quantised model is.
    with contextlib.redirect_stdout(io.StringIO()):
        convert(str(folder / "model"), str(folder / "bfloat16"), dtype="bfloat16")
        convert(
            str(folder / "model"), str(folder / "4-bit"), quantize=True, q_bits=4, q_group_size=32
        )
    shutil.copytree(ORACLE / "classifiers" / "qwen2", folder / "classifier")
    (folder / "pairs").mkdir()
    pairs = {name: [_pair(name, i) for i in range(n)] for name, n in (("train", 12), ("valid", 4))}
    for name, rows in pairs.items():
        _write(folder / "pairs" / f"{name}.jsonl", rows)
    every = pairs["train"] + pairs["valid"]
    _write(
        folder / "margins.jsonl", [row | {"margin": 0.25 * (i % 3)} for i, row in enumerate(every)]
    )
    _write(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in every[:3]])
    _write(folder / "text.jsonl", [{"text": f"{i} times it is " * 3} for i in range(4)])
    _write(
        folder / "demonstrations.jsonl",
        [{"prompt": row["prompt"], "completion": row["chosen"]} for row in every],
    )
    _write(
        folder / "labelled.jsonl",
        [
            {"prompt": row["prompt"], "completion": row[answer], "label": answer == "chosen"}
            for i, row in enumerate(every)
            for answer in (["chosen"] if i % 2 else ["rejected", "chosen"])
        ],
    )
    _write(
        folder / "conversations.jsonl",
        [
            {
                "messages": [
                    *row["prompt"],
                    *row["chosen"],
                    *_message("user", "and?" * (i % 2 + 1)),
                    *row["rejected"],
                ]
            }
            for i, row in enumerate(every)
        ],
    )
    _write(
        folder / "ranked.jsonl",
        [
            {
                "prompt": row["prompt"],
                "completions": [row["rejected"], row["chosen"], _message("assistant", "it is")],
                "scores": [1, 4, 2 + 2 * (i % 2)],
            }
            for i, row in enumerate(every)
        ],
    )
    (folder / "rewards.py").write_text(
        "def letters(completions, **columns):\n"
        "    return [sum(c.isalpha() for c in text) / 8 for text in completions]\n"
    )


def _make_model(folder: Path) -> None:
    """A random model of 2 layers and width 32, many of whose tokens end an answer."""
    source = ORACLE / "models" / "policy"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder / name)
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    (folder / "config.json").write_text(json.dumps(config))
    # A twentieth of the tokens, so that some of the sampled completions are finished.
    ends = [config["eos_token_id"], *range(264, config["vocab_size"], 8)]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    shapes = {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (64, 32),
        "mlp.up_proj": (64, 32),
        "mlp.down_proj": (32, 64),
    }
    random = np.random.default_rng(7)

    def draw(*shape: int) -> mx.array:
        return mx.array((0.2 * random.standard_normal(shape)).astype(np.float32))

    weights = {
        "model.embed_tokens.weight": draw(config["vocab_size"], 32),
        "lm_head.weight": draw(config["vocab_size"], 32),
        "model.norm.weight": mx.ones(32),
    }
    for i in range(2):
        block = f"model.layers.{i}"
        weights |= {f"{block}.{key}.weight": draw(*shape) for key, shape in shapes.items()}
        weights[f"{block}.input_layernorm.weight"] = mx.ones(32)
        weights[f"{block}.post_attention_layernorm.weight"] = mx.ones(32)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})


def _message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def _pair(split: str, i: int) -> dict[str, Any]:
    return {
        "prompt": _message("user", f"{split} {i}: " + "is it? " * (i % 3)),
        "chosen": _message("assistant", "yes " * (i % 4 + 1) + "a" * (i % 3)),
        "rejected": _message("assistant", "no " * (i % 3 + 1) + "never" * (i % 2)),
    }


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------- running


class Recorder:
    """Runs cases in a work folder, each once, and says what is to be recorded of them."""

    def __init__(self, folder: Path, interrupted_runs: Path | None = None) -> None:
        """An empty folder, filled with the inputs now; runs to resume, instead of new ones."""
        self.folder = folder
        self.interrupted_runs = interrupted_runs
        self.printed: dict[str, str] = {}
        (folder / "runs").mkdir(parents=True)
        (folder / "outputs").mkdir()
        (folder / "caches").mkdir()
        make_inputs(folder)

    def record(self, name: str) -> dict[str, Any]:
        """What case `name` ends with: rows of metrics, fingerprints of weights, what it wrote."""
        with contextlib.chdir(self.folder):
            self._run(name)
            return self._results(name)

    def interrupt(self, name: str, kept: Path) -> None:
        """Interrupt a case named *-resumed, and keep its run folder as that left it."""
        with contextlib.chdir(self.folder):
            self._interrupt(name, self._words(name))
            ignored = shutil.ignore_patterns("*.html", ".*")
            shutil.copytree(Path("runs", name), kept / name, ignore=ignored)

    def _words(self, name: str) -> list[str]:
        words = shlex.split(CASES[name])
        return [word.format(name=name, out=f"outputs/{name}.jsonl") for word in words]

    def _run(self, name: str) -> None:
        if name in self.printed:
            return
        words = self._words(name)
        for word in words:
            other = word.removeprefix("runs/")
            if word.startswith("runs/") and other != name:
                self._run(other)
        if name.endswith("-resumed"):
            self._interrupt(name, words)
            # These runs began before there was a choice.
            words = [words[0], "--resume", f"runs/{name}", "--keep", "last"]
        self.printed[name] = self._call(name, words, expected=0)

    def _interrupt(self, name: str, words: list[str]) -> None:
        run = Path("runs", name)
        if self.interrupted_runs is not None:
            shutil.copytree(self.interrupted_runs / name, run)
            return
        with interrupted_at(run / "checkpoints", step=2):
            self._call(name, words, expected=128 + signal.SIGINT)

    def _call(self, name: str, words: list[str], expected: int) -> str:
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = command_line(words)
        assert code == expected, f"{name}: exit code {code}\n{out.getvalue()}{errors.getvalue()}"
        return out.getvalue()

    def _results(self, name: str) -> dict[str, Any]:
        run, output = Path("runs", name), Path("outputs", f"{name}.jsonl")
        results: dict[str, Any] = {}
        if (run / "metrics.jsonl").is_file():
            results["metrics.jsonl"] = _rows(run / "metrics.jsonl")
        if (run / "samples.jsonl").is_file():
            results["samples.jsonl"] = _columns(_rows(run / "samples.jsonl"))
        if output.is_file():
            results["output"] = _rows(output)
        checkpoint = max((run / "checkpoints").glob("*"), default=run)
        weights = [run / file for file in WEIGHTS]
        weights += [checkpoint / file for file in (*CHECKPOINTED, *OPTIMIZERS.get(name, ()))]
        for path in weights:
            if path.is_file():
                results[path.name] = fingerprints(path)
        assert not set(OPTIMIZERS.get(name, ())) - results.keys()
        if (run / "evaluation.json").is_file():
            results["evaluation"] = _comparable(json.loads((run / "evaluation.json").read_text()))
        if "--json" in CASES[name].split():
            results["printed"] = _comparable(json.loads(self.printed[name]))
        assert any(results.values()), f"{name}: nothing to record"
        return results


@contextlib.contextmanager
def interrupted_at(checkpoints: Path, step: int) -> Iterator[None]:
    """Ctrl-C at the moment the checkpoint of `step` has got its name."""
    wanted = checkpoints / f"{step:07}"
    sent = False

    def sending(rename: Any) -> Any:
        def renamed(*arguments: Any, **options: Any) -> Any:
            nonlocal sent
            result = rename(*arguments, **options)
            if not sent and wanted.exists():
                sent = True
                signal.raise_signal(signal.SIGINT)
            return result

        return renamed

    names = {name: getattr(os, name) for name in ("rename", "replace")}
    try:
        for name, function in names.items():
            setattr(os, name, sending(function))
        yield
    finally:
        for name, function in names.items():
            setattr(os, name, function)
    assert sent, f"{wanted} was never renamed to"


def fingerprints(path: Path) -> dict[str, Any]:
    """Per tensor: shape, type, L2 norm, and dot product with a fixed random vector."""
    found = {}
    for key, array in sorted(mx.load(str(path)).items()):
        flat = np.array(array.astype(mx.float32)).ravel().astype(np.float64)
        random = np.random.default_rng(flat.size).standard_normal(flat.size)
        found[key] = {
            "shape": [*array.shape, str(array.dtype).removeprefix("mlx.core.")],
            "norm": _rounded(float(np.linalg.norm(flat))),
            "dot": _rounded(float(flat @ random)),
        }
    return found


def environment() -> dict[str, str]:
    """What the numbers depend on besides this package."""
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "device": str(mx.default_device()),
        "mlx": version("mlx"),
        "mlx-lm": version("mlx-lm"),
        "numpy": version("numpy"),
    }


def rounding() -> str:
    """A hash of a small product and softmax, to the last bit: the same for the same BLAS."""
    left = mx.sin(mx.arange(48 * 160, dtype=mx.float32)).reshape(48, 160)
    right = mx.cos(mx.arange(160 * 32, dtype=mx.float32)).reshape(160, 32)
    return sha256(np.array(mx.softmax(left @ right, axis=-1)).tobytes()).hexdigest()[:16]


def _rows(path: Path) -> list[Any]:
    # Not splitlines: sampled text holds all sorts of line ends.
    return [_comparable(json.loads(line)) for line in path.read_text().split("\n") if line]


def _columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of samples by field: the numbers of each, and a hash of all text."""
    columns: dict[str, Any] = {}
    for row in rows:
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    for key, values in columns.items():
        if any(isinstance(value, str) for value in values):
            text = json.dumps(values, ensure_ascii=False)
            columns[key] = f"{len(values)} texts, sha256 {sha256(text.encode()).hexdigest()[:16]}"
    return columns


def _comparable(value: Any) -> Any:
    """A JSON value without what is ignored, numbers rounded, messages as their text."""
    if isinstance(value, list) and value and all(_is_message(item) for item in value):
        return " | ".join(item["content"] for item in value)
    if isinstance(value, dict):
        return {key: _comparable(v) for key, v in value.items() if not IGNORED.search(key)}
    if isinstance(value, list):
        return [_comparable(v) for v in value]
    return _rounded(value) if isinstance(value, float) else value


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"role", "content"}


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
