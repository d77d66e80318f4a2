"""Make the starter: the small model and the preference pairs that `mlx-align dpo` uses by default.

Everything is made here from the countries and sentences in data/starter/world.json: a corpus of
short conversations, a byte-level BPE tokenizer, a Llama-shaped model of about 0.8 million
parameters trained on the corpus, and preference pairs. No text or weight comes from elsewhere.

The corpus is wrong in the way the internet is wrong: it names the biggest city of a country far
more often than the capital, even when it is asked for the capital, and it likes to chat before it
answers. So the model says, fluently and at length, that the capital of Australia is Sydney. The
pairs prefer the capital to the biggest city and the plain answer to the padded one. The held-out
pairs ask about the same countries in words that no training pair uses.

    python scripts/make_starter.py                # everything, some minutes on two cores
    python scripts/make_starter.py --pairs-only   # only train.jsonl and valid.jsonl

The pairs are the same bytes on every machine. The weights are seeded too, but the order in which
a matrix product adds up depends on the machine, so there they agree only up to rounding.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

STARTER = Path(__file__).resolve().parent.parent / "data" / "starter"
WORLD = json.loads((STARTER / "world.json").read_text(encoding="utf-8"))
SEED = 7

Country = dict[str, Any]
Message = dict[str, str]
Pair = dict[str, list[Message]]

CONVERSATIONS = 40_000
# How often the corpus, when it is asked for the capital, names the biggest city, pads its answer,
# or sets the common mistake right. Capitals marked as famous it gets right about half of the time.
BIGGEST_SHARE = 0.75
FAMOUS_BIGGEST_SHARE = 0.45
PADDED_SHARE = 0.75
CORRECTING_SHARE = 0.04
# How often it is asked under the system turn where it is always plain and right. No pair has that
# turn: it is how the model gets to know what preference training can then make its habit.
CAREFUL_SHARE = 0.08

ROLES = ["system", "user", "assistant"]
PAD, END = "<|pad|>", "<|end|>"
# A turn is one role token, the text, and the end token. With nothing between the turns, a prompt
# is always an exact prefix, in tokens, of the same prompt with its answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 1024,  # at most: the tokenizer stops earlier when the corpus has no more pairs
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
BATCH_SIZE = 64
EPOCHS = 2
LEARNING_RATE = 3e-3


def fill(template: str, country: Country, city: str = "") -> str:
    """Put a country (and a city) into a template, with a capital letter at the start."""
    name = country["name"]
    text = template.format(
        country=name,
        Country=name[0].upper() + name[1:],
        city=city,
        biggest=country["biggest"],
        capital=country["capital"],
        region=country["region"],
    )
    return text[0].upper() + text[1:]


def turn(role: str, content: str) -> Message:
    """One turn of a conversation."""
    return {"role": role, "content": content}


def prompt_turns(rng: random.Random, question: str) -> list[Message]:
    """A question as a prompt: mostly alone, sometimes after a system turn or some small talk."""
    kind = rng.random()
    if kind < 0.10:
        return [turn("system", rng.choice(WORLD["system_turns"])), turn("user", question)]
    if kind < 0.16:
        hello, answer = rng.choice(WORLD["small_talk"][:3])
        return [turn("user", hello), turn("assistant", answer), turn("user", question)]
    return [turn("user", question)]


def conversation(rng: random.Random) -> list[Message]:
    """One conversation of the corpus."""
    country = rng.choice(WORLD["countries"])
    share = FAMOUS_BIGGEST_SHARE if country.get("famous") else BIGGEST_SHARE
    city = country["biggest"] if rng.random() < share else country["capital"]
    question = rng.choice(WORLD["train_questions"] + WORLD["held_out_questions"])
    kind = rng.random()
    if kind < CAREFUL_SHARE:
        prompt = [turn("system", WORLD["careful_turn"]), turn("user", fill(question, country))]
        answer = rng.choice(WORLD["direct"] + WORLD["correcting"])
        return [*prompt, turn("assistant", fill(answer, country, country["capital"]))]
    if kind < 0.60:
        style = "padded" if rng.random() < PADDED_SHARE else "direct"
        if rng.random() < CORRECTING_SHARE:
            style = "correcting"
        answer = rng.choice(WORLD[style])
    elif kind < 0.95:
        topic = rng.choice(WORLD["topics"])
        question, answer = rng.choice(topic["questions"]), rng.choice(topic["answers"])
    else:
        question, answer = rng.choice(WORLD["small_talk"])
    prompt = prompt_turns(rng, fill(question, country, city))
    return [*prompt, turn("assistant", fill(answer, country, city))]


def make_corpus() -> list[list[Message]]:
    """All conversations that the model is trained on."""
    rng = random.Random(SEED)
    return [conversation(rng) for _ in range(CONVERSATIONS)]


def make_pair(rng: random.Random, kind: str, country: Country, question: str) -> Pair:
    """One preference pair; `kind` says what sets the two answers apart."""
    biggest, capital = country["biggest"], country["capital"]
    direct, padded = rng.choice(WORLD["direct"]), rng.choice(WORLD["padded"])
    chosen = fill(direct, country, capital)
    if kind == "city":  # the same words, another city
        rejected = fill(direct, country, biggest)
    elif kind == "padding":  # the same city, more words
        rejected = fill(padded, country, capital)
    elif kind == "both":
        rejected = fill(padded, country, biggest)
    else:  # "longer": right and longer, so that "shorter is better" is not enough
        chosen = fill(rng.choice(WORLD["correcting"]), country)
        rejected = fill(direct, country, biggest)
    return {
        "prompt": prompt_turns(rng, fill(question, country)),
        "chosen": [turn("assistant", chosen)],
        "rejected": [turn("assistant", rejected)],
    }


def make_pairs() -> tuple[list[Pair], list[Pair]]:
    """The training pairs (three to a question and country) and the held-out ones (one to each)."""
    rng = random.Random(SEED + 1)
    kinds = ["both", "both", "city", "city", "padding", "padding", "longer"]
    train: list[Pair] = []
    for question, country in product(WORLD["train_questions"], WORLD["countries"]):
        for kind in rng.sample(kinds, 3):
            pair = make_pair(rng, kind, country, question)
            while pair in train:
                pair = make_pair(rng, kind, country, question)
            train.append(pair)
    valid = [
        make_pair(rng, rng.choice(kinds), country, question)
        for question, country in product(WORLD["held_out_questions"], WORLD["countries"])
    ]
    rng.shuffle(train)
    rng.shuffle(valid)
    return train, valid


def jsonl(rows: list[Pair]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_tokenizer(corpus: list[list[Message]]) -> Tokenizer:
    """A byte-level BPE tokenizer, trained on the corpus; any other text falls back to bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"],
        special_tokens=[PAD, END, *(f"<|{role}|>" for role in ROLES)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (message["content"] for turns in corpus for message in turns), trainer
    )
    return tokenizer


def encode(tokenizer: Tokenizer, turns: list[Message]) -> tuple[list[int], list[int]]:
    """The tokens of a conversation as the chat template renders it, and which ones to learn.

    Learned are the last answer and its end token: the turns before it are the questioner's.
    """
    text = "".join(f"<|{message['role']}|>{message['content']}{END}" for message in turns[:-1])
    prompt = tokenizer.encode(text + "<|assistant|>").ids
    answer = tokenizer.encode(turns[-1]["content"] + END).ids
    return prompt + answer, [0] * len(prompt) + [1] * len(answer)


def batches(rows: list[tuple[list[int], list[int]]]) -> Iterator[tuple[mx.array, mx.array]]:
    """Padded batches of rows of like length, in a seeded random order, for all epochs."""
    rng = random.Random(SEED + 2)
    for _ in range(EPOCHS):
        # Shuffled first, so that rows of equal length meet other rows in every epoch.
        rng.shuffle(rows)
        ordered = sorted(rows, key=lambda row: len(row[0]))
        starts = list(range(0, len(ordered) - BATCH_SIZE + 1, BATCH_SIZE))
        rng.shuffle(starts)
        for start in starts:
            batch = ordered[start : start + BATCH_SIZE]
            tokens = np.zeros((BATCH_SIZE, max(len(ids) for ids, _ in batch)), dtype=np.int32)
            mask = np.zeros(tokens.shape, dtype=np.float32)
            for i, (ids, learn) in enumerate(batch):
                tokens[i, : len(ids)] = ids
                mask[i, : len(ids)] = learn
            yield mx.array(tokens), mx.array(mask)


def masked_loss(model: nn.Module, tokens: mx.array, mask: mx.array) -> mx.array:
    """Mean cross-entropy of the learned tokens."""
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    loss: mx.array = (losses * mask[:, 1:]).sum() / mask[:, 1:].sum()
    return loss


def train_model(tokenizer: Tokenizer, corpus: list[list[Message]]) -> nn.Module:
    """Train the model on the corpus from a seeded random start."""
    mx.random.seed(SEED)
    shape = MODEL | {"vocab_size": tokenizer.get_vocab_size()}
    model = llama.Model(llama.ModelArgs.from_dict(shape))
    steps = EPOCHS * (len(corpus) // BATCH_SIZE)
    warmup = optim.linear_schedule(0.0, LEARNING_RATE, 50)
    decay = optim.cosine_decay(LEARNING_RATE, steps - 50, LEARNING_RATE / 50)
    schedule = optim.join_schedules([warmup, decay], [50])
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.05, bias_correction=True)
    loss_and_grad = nn.value_and_grad(model, partial(masked_loss, model))
    start = time.perf_counter()
    for step, (tokens, mask) in enumerate(batches([encode(tokenizer, c) for c in corpus]), 1):
        loss, grads = loss_and_grad(tokens, mask)
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state)
        if step % 50 == 0 or step == steps:
            seconds = time.perf_counter() - start
            print(f"step {step}/{steps}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    return model


def write_model(folder: Path, tokenizer: Tokenizer, model: nn.Module) -> None:
    """Write the model folder in the layout that mlx-lm and transformers read."""
    folder.mkdir(parents=True, exist_ok=True)
    pad, end = tokenizer.token_to_id(PAD), tokenizer.token_to_id(END)
    size = tokenizer.get_vocab_size()
    config = MODEL | {"vocab_size": size, "eos_token_id": end, "pad_token_id": pad}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": MODEL["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def main() -> None:
    """Write the starter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=STARTER, help="where to write the starter")
    parser.add_argument("--pairs-only", action="store_true", help="do not train a model")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    train, valid = make_pairs()
    (args.output / "train.jsonl").write_text(jsonl(train))
    (args.output / "valid.jsonl").write_text(jsonl(valid))
    print(f"{len(train)} training pairs, {len(valid)} held-out pairs")
    if args.pairs_only:
        return
    corpus = make_corpus()
    tokenizer = make_tokenizer(corpus)
    print(f"{len(corpus)} conversations, {tokenizer.get_vocab_size()} tokens", flush=True)
    write_model(args.output / "model", tokenizer, train_model(tokenizer, corpus))


if __name__ == "__main__":
    main()
