"""The commands that a run prints at its end."""

import json

import pytest

from mlx_align.cli.train import DPO, REWARD, SFT, _next_commands


@pytest.mark.parametrize("entry", [DPO, SFT])
def test_a_broken_run_is_not_for_use(tmp_path, entry):
    run = tmp_path / "my run"
    run.mkdir()
    (run / "config.yaml").write_text(json.dumps({"learning_rate": 0.003}))
    summary = {"talk": "mlx_lm.chat --model m", "verdict": {"kind": "better"}}
    said = [command for _, command in _next_commands(entry, run, summary)]
    assert "mlx_lm.chat --model m" in said
    broken = [
        command
        for _, command in _next_commands(entry, run, {**summary, "verdict": {"kind": "broken"}})
    ]
    assert broken == [
        f"mlx-align chat '{run}' --compare",
        f"mlx-align {entry.name} --config '{run}/config.yaml' --learning-rate 0.0003 "
        f"--output '{run}-again'",
    ]


def test_a_reward_model_is_for_scoring(tmp_path):
    summary = {"talk": "mlx-align score r", "verdict": {"kind": "better"}}
    assert [c for _, c in _next_commands(REWARD, tmp_path, summary)] == ["mlx-align score r"]
