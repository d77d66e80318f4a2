"""TRL's quick-start scripts with the import changed, and every argument of its configs."""

import ast
import dataclasses
import json
import types
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

import mlx_align as ma
from mlx_align.models.loading import open_model
from mlx_align.trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from mlx_align.trl.arguments import rules
from mlx_align.trl.options import (
    grpo_options,
    lora_options,
    pairs_options,
    rollout_sizes,
    supervised_options,
    training_options,
)
from mlx_align.trl.rewards import (
    accuracy_reward,
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)

CONFIGS = (SFTConfig, DPOConfig, KTOConfig, RewardConfig, GRPOConfig, RLOOConfig)
LAYERS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
    "mlp.up_proj",
]
SHORT = {"max_steps": 2, "disable_tqdm": True, "per_device_train_batch_size": 4}


def message(role, content):
    return [{"role": role, "content": content}]


def adapter(run):
    return (run.path / "adapters.safetensors").read_bytes()


@pytest.fixture
def preferences(pairs):
    """Pairs with the prompt in both conversations, as in trl-lib/ultrafeedback_binarized."""
    return Dataset.from_list(
        [
            {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}
            for row in pairs
        ]
    )


@pytest.fixture
def problems(prompts):
    """Problems with a column `solution`, as in trl-lib/DeepMath-103K."""
    rows = [{"prompt": row["prompt"], "solution": f"${row['answer']}$"} for row in prompts]
    return Dataset.from_list(rows)


# --- the quick start ---


def test_sft_quick_start(tiny, pairs):
    rows = [{"messages": row["prompt"] + row["chosen"]} for row in pairs]
    trainer = SFTTrainer(model=tiny, args=SFTConfig(**SHORT), train_dataset=Dataset.from_list(rows))
    output = trainer.train()
    assert output.global_step == 2
    assert output.training_loss > 0
    assert trainer.run.config.loss_on == "assistant"


def test_grpo_quick_start(tiny, problems):
    trainer = GRPOTrainer(
        model=tiny,
        args=GRPOConfig(max_completion_length=6, **{**SHORT, "per_device_train_batch_size": 8}),
        train_dataset=problems,
        reward_funcs=accuracy_reward,
    )
    assert trainer.train().global_step == 2
    assert "rewards/accuracy_reward/mean" in trainer.run.metrics


def test_dpo_quick_start_without_a_config(tiny, preferences, monkeypatch):
    monkeypatch.setattr(DPOTrainer, "_own_options", lambda self: {**pairs_options(self.args)})
    trainer = DPOTrainer(model=tiny, train_dataset=preferences)
    assert trainer.args.output_dir == "policy-DPO"
    trainer.args.max_steps, trainer.args.disable_tqdm = 1, True
    trainer.train()
    assert trainer.run.config.beta == 0.1
    assert trainer.run.config.valid_fraction == 0


def test_reward_quick_start(tiny, preferences):
    trainer = RewardTrainer(model=tiny, args=RewardConfig(**SHORT), train_dataset=preferences)
    trainer.train()
    assert trainer.run.reward_model.score("q", ["a", "b"])


def test_kto_quick_start_with_a_loaded_model_and_tokenizer(tiny, pairs):
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}
        for i, row in enumerate(pairs)
    ]
    loaded = types.SimpleNamespace(name_or_path=tiny, config=object())
    tokenizer = open_model(tiny).tokenizer._tokenizer
    trainer = KTOTrainer(
        model=loaded,
        args=KTOConfig(output_dir="kto", **SHORT),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
    )
    assert trainer.train().global_step == 2
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ma.ConfigError, match="processing_class: its chat template is not that of"):
        trainer.train()


def test_rloo_with_a_reward_model_from_an_sft_run(tiny, pairs, preferences, problems):
    start = SFTTrainer(
        model=tiny,
        args=SFTConfig("sft", **SHORT),
        train_dataset=Dataset.from_list(
            [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
        ),
    )
    start.train()
    start.save_model("copied")
    rm = RewardTrainer(model=tiny, args=RewardConfig("rm", **SHORT), train_dataset=preferences)
    rm.train()

    def brief(completions, log_extra, trainer_state, **columns):
        assert columns.keys() == {"solution", "prompts", "completion_ids", "log_metric"}
        log_extra("length", [len(one[0]["content"]) for one in completions])
        return [-float(trainer_state.global_step) for _ in completions]

    trainer = RLOOTrainer(
        model="copied",
        reward_funcs=["rm", brief],
        args=RLOOConfig("rloo", max_completion_length=6, reward_weights=[2.0, 0.5], **SHORT),
        train_dataset=problems,
    )
    trainer.train()
    config = trainer.run.config
    assert (config.model, config.init_adapter) == (tiny, "copied")
    assert (config.loss, config.group_size, config.kl_coef) == ("rloo", 2, 0.05)
    assert (config.reward_model, config.reward_model_weight) == ("rm", 2.0)
    assert "rewards/brief/mean" in trainer.run.metrics


# --- the same run as mlx_align.dpo ---


class Recorder:
    """A callback of transformers, by its methods."""

    def __init__(self, stop_at=None):
        self.events, self.stop_at = [], stop_at

    def on_train_begin(self, args, state, control, **kwargs):
        assert kwargs["model"] is not None
        self.events.append(("begin", args.output_dir, state.max_steps))

    def on_step_end(self, args, state, control, **kwargs):
        self.events.append(("step", state.global_step))
        control.should_training_stop = state.global_step == self.stop_at

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events.append(("log", state.global_step, "eval_loss" in logs))

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.events.append(("evaluate", state.global_step, metrics["eval_loss"] > 0))

    def on_save(self, args, state, control, **kwargs):
        self.events.append(("save", state.global_step))

    def on_epoch_end(self, args, state, control, **kwargs):
        self.events.append(("epoch", round(state.epoch, 3)))

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append(("end", state.global_step))


def test_a_trainer_is_a_thin_layer(tiny, pairs):
    train, valid = pairs[:16], pairs[16:]
    recorder, own = Recorder(), Recorder
    config = DPOConfig(
        output_dir="trl",
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        warmup_ratio=0.5,
        lr_scheduler_type="cosine",
        logging_steps=1,
        eval_strategy="steps",
        save_strategy="epoch",
        beta=0.2,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.5],
        seed=3,
        bf16=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        tiny,
        args=config,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(valid),
        callbacks=[recorder, own],
        peft_config={"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]},
    )
    output = trainer.train()
    run = ma.dpo(
        model=tiny,
        data={"train": train, "valid": valid},
        output="own",
        epochs=1,
        batch_size=4,
        grad_accumulation_steps=2,
        learning_rate=1e-3,
        warmup=0.5,
        lr_schedule="cosine",
        beta=0.2,
        loss="sigmoid=1.0,sft=0.5",
        seed=3,
        lora_rank=4,
        lora_alpha=8,
        lora_keys="self_attn.q_proj,mlp.up_proj",
        val_batches=-1,
        progress=False,
    )
    assert adapter(trainer.run) == adapter(run)
    assert recorder.events == [
        ("begin", "trl", 2),
        ("step", 1),
        ("log", 1, False),
        ("log", 1, True),
        ("evaluate", 1, True),
        ("save", 1),
        ("step", 2),
        ("epoch", 1.0),
        ("log", 2, False),
        ("log", 2, True),
        ("evaluate", 2, True),
        ("save", 2),
        ("end", 2),
    ]
    assert output.global_step == trainer.state.global_step == 2
    assert output.metrics["train_loss"] == output.training_loss
    rows = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert output.training_loss == pytest.approx(sum(rows) / 2)
    assert trainer.evaluate()["eval_loss"] == run.metrics["eval/loss"]
    assert trainer.evaluate()["epoch"] == 1


def test_callbacks_stop_and_a_run_is_resumed(tiny, preferences):
    arguments = {**SHORT, "max_steps": 4, "save_steps": 1}
    whole = DPOTrainer(tiny, args=DPOConfig("whole", **arguments), train_dataset=preferences)
    whole.train()

    class Interrupts:
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise RuntimeError("power cut")

    broken = DPOTrainer(
        tiny,
        args=DPOConfig("run", **arguments),
        train_dataset=preferences,
        callbacks=[Interrupts()],
    )
    with pytest.raises(RuntimeError, match="power cut"):
        broken.train()
    resumed = DPOTrainer(tiny, args=DPOConfig("run", **arguments), train_dataset=preferences)
    with pytest.raises(ma.ConfigError, match=r"output_dir='run': already contains another run"):
        resumed.train()
    with pytest.raises(ma.ConfigError, match="not in output_dir"):
        resumed.train(resume_from_checkpoint="elsewhere")
    resumed.train(resume_from_checkpoint="run/checkpoints/000001")
    assert adapter(resumed.run) == adapter(whole.run)
    stopped = DPOTrainer(
        tiny,
        args=DPOConfig("stopped", **arguments),
        train_dataset=preferences,
        callbacks=[Recorder(stop_at=2)],
    )
    assert stopped.train().global_step == 2
    with pytest.warns(UserWarning, match=r"control\.should_save, which has no effect"):
        DPOTrainer(
            tiny,
            args=DPOConfig("saving", **arguments),
            train_dataset=preferences,
            callbacks=[AsksToSave],
        ).train()


class AsksToSave:
    def on_train_begin(self, args, state, control, **kwargs):
        control.should_save = True
        return control


# --- arguments ---


def test_every_argument_is_used_ignored_or_fixed():
    for config in CONFIGS:
        for name, (_, rule) in rules(config).items():
            assert rule.kind in ("used", "ignored", "fixed"), name
            assert rule.text, name
        made = config("out")
        assert made.output_dir == "out"
        assert dataclasses.is_dataclass(made)
        assert json.dumps(made.to_dict(), default=str)


def _trl_arguments(name):
    """The fields of one of TRL's config classes, from the recorded list."""
    recorded = json.loads((Path(__file__).parent / "trl_arguments.json").read_text())
    return {**recorded["TrainingArguments"], **recorded["_BaseConfig"], **recorded[name]}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_defaults_are_those_of_trl(config):
    ours = rules(config)
    for name, default in _trl_arguments(config.__name__).items():
        assert name in ours, name
        if name == "learning_rate":
            continue  # for LoRA
        try:
            expected = ast.literal_eval(default)
        except ValueError:
            continue  # made by a function
        expected = None if expected == "" and name == "debug" else expected
        own = ours[name][0] or None
        assert own == (expected or None), name


@pytest.mark.parametrize(
    ("config", "arguments", "said"),
    [
        (DPOConfig, {"push_to_hub": True}, r"DPOConfig\(push_to_hub=True\): uploading"),
        (DPOConfig, {"fp16": True}, r"DPOConfig\(fp16=True\): the model computes in the dtype"),
        (DPOConfig, {"optim": "adafactor"}, "AdamW is the only optimizer"),
        (DPOConfig, {"truncation_mode": "keep_end"}, "rows longer than max_length are dropped"),
        (DPOConfig, {"max_prompt_length": 512}, "not an argument; prompts are not truncated"),
        (DPOConfig, {"learning_rat": 1}, "unknown argument; did you mean learning_rate?"),
        (DPOConfig, {"deepspeed": "zero3.json"}, "one process trains on one device"),
        (SFTConfig, {"use_liger_kernel": True}, "a CUDA kernel"),
        (GRPOConfig, {"use_vllm": True}, "the policy samples with mlx"),
        (GRPOConfig, {"top_p": 0.9}, "without truncating its distribution"),
        (RLOOConfig, {"num_iterations": 2}, "each rollout batch is used for one update"),
    ],
)
def test_what_has_no_meaning_is_an_error_by_name(config, arguments, said):
    with pytest.raises(ma.ConfigError, match=said):
        config(output_dir="out", **arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"lr_scheduler_type": "polynomial"}, "choose from linear, cosine"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "use constant_with_warmup"),
        ({"logging_steps": 0.1}, "expected a whole number of updates"),
        ({"eval_strategy": "steps"}, "there is no eval_dataset"),
        ({"save_strategy": "best"}, "choose from no, steps, epoch"),
        ({"report_to": "tensorboard"}, "choose from none, wandb, swanlab"),
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, "dtype can't be set"),
        ({"loss_type": "ipoo"}, "choose from sigmoid"),
        ({"loss_type": ["sft"], "beta": 0.3}, "has no effect on loss_type sft"),
        ({"loss_weights": [1.0, 2.0]}, "expected 1 weights"),
        ({"f_divergence_type": "tv"}, "choose from reverse_kl"),
    ],
)
def test_values_that_are_not_possible(arguments, said, tiny, preferences):
    with pytest.raises(ma.ConfigError, match=rf"DPOConfig\(.*{said}"):
        DPOTrainer(tiny, args=DPOConfig("out", **arguments), train_dataset=preferences)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"data_collator": object()}, "batches are made from the data's columns"),
        ({"compute_metrics": len}, "compute others in a callback"),
        ({"optimizers": (1, 2)}, "the only optimizer"),
        ({"quantization_config": object()}, "pass a quantised model"),
        ({"ref_model": "other"}, "another model than `model`"),
        ({"train_dataset": None}, "train_dataset is missing"),
        ({"train_dataset": DatasetDict()}, "has several splits"),
        ({"train_dataset": "pairs.jsonl"}, "expected a datasets.Dataset or a list"),
        ({"model": object()}, "has no name_or_path"),
        ({"args": SFTConfig("out")}, "expected mlx_align.trl.DPOConfig"),
    ],
)
def test_objects_that_are_not_possible(arguments, said, tiny, preferences):
    with pytest.raises(ma.ConfigError, match=f"^DPOTrainer.*{said}"):
        DPOTrainer(**{"model": tiny, "train_dataset": preferences, **arguments})


def test_errors_of_the_engine_have_trls_names(tiny, preferences):
    def train(**arguments):
        config = DPOConfig("out", **{**SHORT, **arguments})
        DPOTrainer(tiny, args=config, train_dataset=preferences).train()

    with pytest.raises(ma.ConfigError, match=r"^per_device_train_batch_size=0: out of range"):
        train(per_device_train_batch_size=0)
    with pytest.raises(ma.DataError, match="max_length"):
        train(max_length=2)
    with pytest.raises(ma.ConfigError, match=r"push_to_hub\(\): upload the run folder"):
        DPOTrainer(tiny, train_dataset=preferences).push_to_hub()
    with pytest.raises(ma.ConfigError, match="there is no eval_dataset"):
        DPOTrainer(tiny, train_dataset=preferences).evaluate()
    with pytest.raises(ma.ConfigError, match="call train"):
        DPOTrainer(tiny, train_dataset=preferences, eval_dataset=preferences).evaluate()


# --- from arguments to options ---


def test_options_of_training():
    config = DPOConfig(
        "out",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_grad_norm=0,
        logging_strategy="no",
        eval_strategy="epoch",
        save_strategy="no",
        warmup_steps=10,
        report_to=["wandb"],
        project="mine",
    )
    found = training_options(config, 80, has_eval=True)
    assert found["epochs"] == 3
    assert "iters" not in found
    assert (found["steps_per_eval"], found["save_every"], found["warmup"]) == (10, 0, 10)
    assert found["max_grad_norm"] == 1e9
    assert found["steps_per_report"] > 1e6
    assert (found["report_to"], found["project_name"]) == (["wandb"], "mine")


def test_options_of_losses():
    found = pairs_options(
        DPOConfig("out", f_divergence_type="alpha_divergence", ld_alpha=1.0, use_weighting=True)
    )
    assert found == {
        "loss": "sigmoid",
        "beta": 0.1,
        "label_smoothing": 0.0,
        "loss_option": {"f_divergence": "alpha", "f_alpha": 0.5},
        "wpo": True,
        "ld_alpha": None,
        "max_seq_length": 1024,
    }
    assert pairs_options(DPOConfig("out", loss_type="discopop"))["loss_option"] == {"tau": 0.05}
    assert "label_smoothing" not in pairs_options(DPOConfig("out", loss_type="exo_pair"))
    packed = supervised_options(SFTConfig("out", packing=True, max_length=64), ["text"])
    assert (packed["batch_tokens"], packed["batch_size"]) == (512, None)
    with pytest.raises(ma.ConfigError, match="prompts never have a loss"):
        supervised_options(SFTConfig("out", completion_only_loss=False), ["prompt", "completion"])


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        # 8 completions per update are one prompt of 8
        ({}, (1, 1, 1, 1)),
        ({"num_generations": 4, "gradient_accumulation_steps": 4}, (2, 4, 1, 1)),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}, (1, 2, 1, 1)),
        ({"per_device_train_batch_size": 16, "num_iterations": 3}, (2, 1, 1, 3)),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 8}, (1, 2, 4, 1)),
        ({"generation_batch_size": 32}, (1, 1, 4, 1)),
    ],
)
def test_sizes_of_rollout_batches(arguments, sizes):
    found = rollout_sizes(GRPOConfig("out", **arguments))
    assert dataclasses.astuple(found) == sizes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_generations": 3}, "expected a multiple of num_generations, 3"),
        ({"generation_batch_size": 12}, "expected a multiple of the batch size"),
        (
            {"gradient_accumulation_steps": 4, "steps_per_generation": 6},
            "expected a multiple of gradient_accumulation_steps",
        ),
    ],
)
def test_sizes_that_split_a_prompts_completions(arguments, said):
    with pytest.raises(ma.ConfigError, match=said):
        rollout_sizes(GRPOConfig("out", **arguments))


def test_methods_of_grpo():
    assert grpo_options(GRPOConfig("out"), 1) == {
        "loss": "dapo",
        "dynamic_sampling": False,
        "clip_eps": 0.2,
        "clip_eps_high": None,
    }
    dr_grpo = GRPOConfig("out", loss_type="dr_grpo", scale_rewards=False, beta=0.01)
    assert grpo_options(dr_grpo, 2) == {
        "loss": "dr_grpo",
        "dynamic_sampling": False,
        "clip_eps": 0.2,
        "clip_eps_high": None,
        "kl": "k3",
        "multi_objective_aggregation": "sum_then_normalize",
    }
    gspo = GRPOConfig("out", loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4)
    assert grpo_options(gspo, 1)["loss"] == "gspo"
    cispo = GRPOConfig("out", loss_type="cispo", epsilon_high=5.0)
    assert grpo_options(cispo, 1)["clip_eps_high"] == 5.0
    with pytest.raises(ma.ConfigError, match="not available together; choose from grpo, group"):
        grpo_options(GRPOConfig("out", loss_type="dr_grpo"), 1)


@dataclasses.dataclass
class LoraConfig:
    """The fields of peft's class that matter."""

    r: int = 8
    lora_alpha: int = 8
    lora_dropout: float = 0.0
    target_modules: object = None
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    task_type: str = "CAUSAL_LM"
    modules_to_save: object = None
    some_new_feature: bool = False


def test_options_of_lora():
    assert lora_options(None, LAYERS) == {}
    assert lora_options(LoraConfig(), LAYERS) == {
        "fine_tune_type": "lora",
        "lora_rank": 8,
        "lora_alpha": 8.0,
        "lora_dropout": 0.0,
        "lora_keys": ["self_attn.q_proj", "self_attn.v_proj"],
    }
    found = lora_options(
        LoraConfig(16, 32, 0.1, "all-linear", use_rslora=True, use_dora=True), LAYERS
    )
    assert found == {
        "fine_tune_type": "dora",
        "lora_rank": 16,
        "lora_alpha": 128.0,
        "lora_dropout": 0.1,
    }
    targets = lora_options({"target_modules": {"up_proj", "self_attn.o_proj"}}, LAYERS)
    assert targets["lora_keys"] == ["self_attn.o_proj", "mlp.up_proj"]


@pytest.mark.parametrize(
    ("peft_config", "said"),
    [
        (LoraConfig(bias="all"), r"peft_config\(bias='all'\): not available here"),
        (LoraConfig(some_new_feature=True), "some_new_feature=True"),
        ({"rank": 8}, r"peft_config\(rank=8\): not an argument of LoraConfig"),
        ({"target_modules": ["c_attn"]}, "the model has no layer c_attn; it has self_attn.q_proj"),
        ({"target_modules": ".*_proj"}, "expected a list of names"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        (3, "expected a peft.LoraConfig"),
    ],
)
def test_lora_settings_that_are_not_possible(peft_config, said):
    with pytest.raises(ma.ConfigError, match=said):
        lora_options(peft_config, LAYERS)


# --- rewards ---


def test_rewards_of_trl():
    right, wrong = message("assistant", r"It is \boxed{\frac{1}{2}}"), message("assistant", "no 7")
    assert accuracy_reward([right, wrong, right], ["$0.5$", "0.5", None]) == [1, 0, None]
    assert think_format_reward([message("assistant", "<think>a\nb</think>c"), "c"]) == [1, 0]
    assert think_format_reward(["<think>a<think>b</think>"]) == [0]
    texts = ["<think>7</think> 5", "5"]
    assert reasoning_accuracy_reward(texts, ["5", "5"]) == [1, 0]
    overlong = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    assert overlong(completion_ids=[[1] * 80, [1] * 90, [1] * 101]) == [0, -0.5, -1]
    repeated = get_repetition_penalty_reward(ngram_size=2)
    assert repeated(completion_ids=[[1, 2, 3, 4], [5, 5, 5, 5, 5], [1]]) == [0, -0.75, 0]
    cosine = get_cosine_scaled_reward(max_len=100)
    found = cosine(
        completions=[right, wrong], solution=["1/2", "1/2"], completion_ids=[[1] * 50] * 2
    )
    assert found == pytest.approx([0.75, -0.75])
