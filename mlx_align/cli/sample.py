"""`mlx-align data sample`: training rows from the best of a model's own completions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_align.cli.options import (
    Command,
    config_options,
    echo_json,
    given_options,
    json_option,
    new_file,
)
from mlx_align.config import SampleConfig, make_config
from mlx_align.config.schema import fingerprint_options
from mlx_align.errors import ConfigError, DataError
from mlx_align.system.json_text import to_json
from mlx_align.system.row_file import hash_rows, open_rows
from mlx_align.system.starter import resolve_starter

if TYPE_CHECKING:
    from mlx_align.models.loading import ModelFolder
    from mlx_align.rollout.rewards import RewardSettings
    from mlx_align.rollout.sampler import Prompt


@click.command(
    cls=Command, short_help="Keep the best of sampled completions, as data for sft or dpo."
)
@config_options(SampleConfig)
@json_option("Print a summary as JSON; all else goes to stderr.")
def sample(json: bool, **options: Any) -> None:
    """Sample N completions per prompt, score them, and write the best as rows for sft.

    Without --reward and --reward-model, all of them are written, a line per prompt, for `mlx-align
    label` and `mlx-align judge`: at several --temperatures, or by --arms, which name models,
    adapters and system prompts.

    Rows have prompt, completion, score and n, and the other fields of the prompt's row, in the
    order of the prompts. A prompt without a completion that scores (at least --threshold) gets no
    row; with --pairs, neither does one whose completions all score the same. Without --threshold,
    a completion that scored 0, the least of its prompt, is not kept.

    After an interruption, --resume continues, with the same rows as if there had been none. With a
    reward, the file has the finished rows until then; answers without one are written at the end.
    """
    from mlx_align.data.columns import configure_data
    from mlx_align.data.formats import read_prompts
    from mlx_align.data.tokenization import tokenize_prompts
    from mlx_align.models.loading import open_model
    from mlx_align.models.row_limits import check_rows
    from mlx_align.rollout.rejection_sampling import (
        RejectionSamplingConfig,
        load_sampler,
        sample_rows,
    )
    from mlx_align.rollout.rewards import Rewards, require_rewards, reward_settings
    from mlx_align.rollout.sampler import Prompt
    from mlx_align.system.console import Console

    config = make_config(SampleConfig, given_options(options), None, "command line")
    _check_config(config)
    if config.reward is None and config.reward_model is None:
        _sample_answers(config, json)
        return
    weight = 1.0 if config.reward_model_weight is None else config.reward_model_weight
    settings = require_rewards(
        reward_settings(config.reward, config.reward_model, weight, config.reward_timeout)
    )
    console = Console(json)
    target = new_file(config.output, resume=config.resume)
    data = configure_data(resolve_starter(config.data, "data"), config)
    groups, reading = read_prompts(data, "train", config.format)
    console.note(str(reading))
    folder = open_model(resolve_starter(config.model, "model"))
    tokens, report = tokenize_prompts(
        groups, folder.tokenizer, config.max_prompt_length, config.thinking
    )
    prompts = [Prompt(groups[i], one) for i, one in zip(report.indices, tokens, strict=True)]
    dropped = sum(report.dropped.values())
    if dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        console.note(f"! {dropped:,} prompts dropped: {reasons}")
    remarks = check_rows(
        folder,
        tokens,
        config.max_completion_length,
        source="the longest prompt with --max-completion-length",
    )
    for note in (*report.notes, *remarks):
        console.note(f"! {note}")
    sampling = RejectionSamplingConfig(
        config.n,
        config.keep or 1,
        config.threshold,
        config.pairs,
        config.max_completion_length,
        config.temperature,
        config.seed,
    )
    key = "score_chosen" if config.pairs else "score"
    inputs = fingerprint_options(config, _hashes(config, settings, folder, prompts))
    output = open_rows(target, inputs, resume=config.resume, total=len(prompts), note=console.note)
    # The rewards are opened before the model is loaded, so that an error in one is found at once.
    with output as written, Rewards(settings, note=console.note) as rewards:
        rewards.check([prompt.text for prompt in prompts])
        loaded, policy, score = load_sampler(folder, config.adapter_path, config.reward_model)
        rewards.score_model = score
        earlier = list(written.read())
        scores = [float(row[key]) for row in earlier]
        kept = {to_json(row["prompt"]) for row in earlier}
        with console.bar("Sampling", len(prompts), written.done) as bar:

            def count(finished: int) -> None:
                written.commit(written.done + finished)
                bar.advance(finished)

            for row in sample_rows(loaded, policy, rewards, prompts, sampling, count, written.done):
                written.write(row)
                scores.append(row[key])
                kept.add(to_json(row["prompt"]))
    if not scores:
        target.unlink()
        above = "" if config.threshold is None else f" of at least --threshold {config.threshold:g}"
        same = ", or all completions of each prompt score the same" if config.pairs else ""
        zero = ", or the best score is 0" if config.threshold is None else ""
        raise DataError(
            f"nothing to write: no completion has a score{above}{zero}{same}; raise -n, or choose "
            "another model, prompts or reward"
        )
    mean = sum(scores) / len(scores)
    if json:
        summary = {
            "output": str(target),
            "prompts": len(prompts),
            "dropped": dict(report.dropped),
            "rows": len(scores),
            "n": config.n,
            "score": mean,
            "seed": config.seed,
        }
        echo_json(summary)
        return
    different = len({prompt.text.prompt for prompt in prompts})
    if left_out := different - len(kept):
        why = "its completions score the same" if config.pairs else "no completion scores"
        console.note(f"! {left_out:,} of {different:,} prompts have no row, because {why}")
    console.note(
        f"Wrote {len(scores):,} rows from {len(prompts):,} prompts to {target}, mean score "
        f"{mean:+.4f}. Train on them:\n"
        f"  mlx-align {'dpo' if config.pairs else 'sft'} --model {config.model} --data {target}"
    )


def _sample_answers(config: SampleConfig, json: bool) -> None:
    """Write all answers, a line per prompt."""
    from mlx_align.preferences.run_label import read_prompt_groups, sample_to_file
    from mlx_align.system.console import Console

    console = Console(json)
    if config.resume and Path(config.output).expanduser().is_file():
        raise ConfigError(f"--resume: {config.output} is complete; name another --output")
    target = new_file(config.output)
    groups = read_prompt_groups(config.data, config, console)
    found = sample_to_file(groups, config, target, console)
    if json:
        click.echo(to_json({"output": str(target), **dataclasses.asdict(found)}))
        return
    left_out = ", ".join(
        f"{count:,} {what}"
        for what, count in (("empty", found.empty), ("duplicates", found.duplicates))
        if count
    )
    console.note(
        f"Wrote {found.answers:,} answers to {found.lines:,} prompts to {target}"
        f"{f' ({left_out} left out)' if left_out else ''}. Compare them:\n"
        f"  mlx-align label {target} --output labels.jsonl"
    )


def _hashes(
    config: SampleConfig, settings: RewardSettings, folder: ModelFolder, prompts: list[Prompt]
) -> dict[str, str]:
    """Hashes of what the rows depend on, by the option that names it."""
    from mlx_align.inference.reward_model import find_reward_model
    from mlx_align.models.adapters import fingerprint_adapters, fingerprint_folder
    from mlx_align.rollout.rewards import fingerprint_rewards

    model = None
    if config.reward_model is not None:
        model = find_reward_model(config.reward_model, folder)
    rewards = fingerprint_rewards(settings, model, "reward model", folder)
    hashes = {
        **fingerprint_adapters(config),
        "model": fingerprint_folder(folder.path),
        "data": hash_rows([one.tokens.prompt.tolist(), dict(one.text.columns)] for one in prompts),
        "reward": f"{config.reward!r} {rewards}",
    }
    if "reward model" in rewards:
        hashes["reward_model"] = rewards["reward model"]
    return hashes


def _check_config(config: SampleConfig) -> None:
    if config.reward is None and config.reward_model is None:
        for name in ("keep", "threshold", "pairs"):
            value = getattr(config, name)
            if value not in (None, False):
                shown = "" if value is True else f" {value:g}"
                raise ConfigError(f"--{name}{shown} needs --reward or --reward-model")
    elif config.arms is not None or config.temperatures is not None:
        given = "arms" if config.arms is not None else "temperatures"
        raise ConfigError(
            f"--{given} is for all answers, without --reward and --reward-model; drop one"
        )
    if config.pairs and config.keep is not None:
        raise ConfigError(f"--keep {config.keep} has no effect with --pairs; drop one")
    if config.pairs and config.n < 2:
        raise ConfigError(f"-n {config.n}: --pairs needs at least 2 completions per prompt")
    if config.keep is not None and config.keep > config.n:
        raise ConfigError(f"--keep {config.keep} exceeds the -n {config.n} sampled completions")
    if config.reward_model_weight is not None and config.reward_model is None:
        raise ConfigError(
            f"--reward-model-weight {config.reward_model_weight:g} needs --reward-model"
        )
