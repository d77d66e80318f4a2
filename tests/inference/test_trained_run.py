"""What a run folder says about how to use its policy."""

import json
import shutil

import pytest
from helpers.paths import STARTER_MODEL
from helpers.runs import mlx_align, summary_of

from mlx_align.data.statistics import trained_thinking
from mlx_align.inference.reward_model import RewardModel
from mlx_align.inference.trained_run import read_trained_run

# The starter's template as Qwen3's: a last answer without reasoning has an empty thinking block,
# which is in the prompt with thinking off.
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)


@pytest.fixture
def thinking_model(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(STARTER_MODEL, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    # mlx-lm takes a tokenizer for one that thinks if it has these tokens. They replace the two
    # merged last, so that the vocabulary keeps its size.
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    model = tokenizer["model"]
    for token in ("<think>", "</think>"):
        merge = model["merges"].pop()
        pieces = merge if isinstance(merge, list) else merge.split(" ")
        model["vocab"][token] = model["vocab"].pop("".join(pieces))
        tokenizer["added_tokens"].append(
            {**tokenizer["added_tokens"][0], "id": model["vocab"][token], "content": token}
        )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize(
    ("thinking", "command", "expected"),
    [("auto", "mlx_lm.generate", "off"), ("on", "mlx_lm.chat", "on")],
)
def test_a_run_is_tried_out_with_thinking_as_in_training(
    thinking_model, pairs, tmp_path, thinking, command, expected
):
    options = f"--iters 1 --batch-size 1 --samples 0 --thinking {thinking}".split()
    where = ["--model", thinking_model, "--data", pairs, "--output", tmp_path / "run"]
    assert mlx_align("dpo", *where, *options) == 0
    talk = summary_of(tmp_path / "run")["talk"]
    assert talk.startswith(command)
    assert ("""--chat-template-config '{"enable_thinking": false}'""" in talk) == (
        expected == "off"
    )
    run = read_trained_run(tmp_path / "run")
    assert run.sampling_thinking == expected
    assert run.thinking == thinking  # given completions may have reasoning, or none


@pytest.mark.parametrize(
    ("option", "off", "expected"),
    [("auto", 6, "off"), ("auto", 5, "auto"), ("auto", None, "auto"), ("on", 10, "on")],
)
def test_most_rows_decide_about_thinking(option, off, expected):
    assert trained_thinking(option, {"groups": 10, "thinking_off": off}) == expected


def test_a_reward_model_scores_with_thinking_as_in_training(thinking_model, pairs, tmp_path):
    options = ["--iters", "1", "--batch-size", "1", "--samples", "0", "--thinking", "on"]
    where = ["--model", thinking_model, "--data", pairs, "--output", tmp_path / "run"]
    assert mlx_align("reward", *where, *options) == 0
    assert RewardModel.load(str(thinking_model), tmp_path / "run").style.thinking == "on"
