"""Make `tests/oracle/peft` again: adapters as PEFT saves them, and transformers' log-probs.

    pip install torch transformers peft
    python scripts/make_peft_oracle.py [--check FOLDER]

Each case is an adapter of `tests/oracle/models/policy` with random weights, saved by PEFT, and the
log-probs of a fixed row of tokens by transformers with PEFT, float32 on the CPU. With --check, the
log-probs of another adapter folder (an export) are printed instead.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent / "tests" / "oracle"
BASE = ROOT / "models" / "policy"
TOKENS = [1, 17, 230, 45, 3, 99, 310, 7, 58, 201, 144, 12]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": LINEAR},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"self_attn.v_proj": 3, "down_proj": 20},
    },
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "one-block": {"r": 4, "lora_alpha": 16, "target_modules": LINEAR, "layers_to_transform": [0]},
    "head": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]},
}


def base() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def logps(model: torch.nn.Module) -> list[float]:
    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        found = model(tokens).logits.double().log_softmax(-1)[0, :-1]
    return found.gather(1, tokens[0, 1:, None])[:, 0].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", type=Path)
    given = parser.parse_args()
    if given.check:
        print(json.dumps(logps(PeftModel.from_pretrained(base(), given.check).eval())))
        return
    out = ROOT / "peft"
    shutil.rmtree(out, ignore_errors=True)
    numbers = {"tokens": TOKENS, "base": logps(base())}
    for seed, (name, options) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        for key, weight in model.named_parameters():
            if "lora_B" in key:
                weight.data = torch.randn_like(weight) * 0.05
            elif "lora_magnitude" in key:
                weight.data = weight.data * (1 + 0.2 * torch.randn_like(weight))
        model.save_pretrained(out / name)
        (out / name / "README.md").unlink(missing_ok=True)
        config = out / name / "adapter_config.json"
        content = {**json.loads(config.read_text()), "base_model_name_or_path": BASE.name}
        config.write_text(json.dumps(content, indent=2) + "\n")
        numbers[name] = logps(model)
    (out / "logps.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
