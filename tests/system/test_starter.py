"""The shipped starter: its properties, and that its script reproduces it."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.data import read_rows
from helpers.paths import STARTER
from helpers.scripts import load_script
from mlx_lm import generate, load


def text(messages):
    return messages[-1]["content"]


@pytest.fixture(scope="module")
def script():
    return load_script("make_starter")


@pytest.fixture(scope="module")
def train():
    return read_rows(STARTER / "train.jsonl")


@pytest.fixture(scope="module")
def valid():
    return read_rows(STARTER / "valid.jsonl")


@pytest.fixture(scope="module")
def loaded():
    return load(str(STARTER / "model"))


def country_of(script, row):
    """The country a pair asks about; only one name occurs in a question."""
    found = [
        c for c in script.WORLD["countries"] if c["name"].lower() in text(row["prompt"]).lower()
    ]
    assert len(found) == 1
    return found[0]


def test_the_folder_stays_small():
    assert sum(f.stat().st_size for f in STARTER.rglob("*") if f.is_file()) <= 4 * 2**20


def test_the_pairs_are_what_the_script_makes(script):
    train, valid = script.make_pairs()
    assert (STARTER / "train.jsonl").read_text() == script.jsonl(train)
    assert (STARTER / "valid.jsonl").read_text() == script.jsonl(valid)


def test_the_tokenizer_is_what_the_script_makes(script, loaded):
    made = script.make_tokenizer(script.make_corpus())
    shipped = json.loads((STARTER / "model" / "tokenizer.json").read_text())
    assert made.get_vocab() == shipped["model"]["vocab"]
    assert loaded[0].args.vocab_size == made.get_vocab_size()


def test_the_corpus_names_the_biggest_city_more_often_but_every_capital(script):
    corpus = "\n".join(turn["content"] for turns in script.make_corpus() for turn in turns)
    for country in script.WORLD["countries"]:
        biggest, capital = corpus.count(country["biggest"]), corpus.count(country["capital"])
        assert capital > 100
        assert biggest > (1 if country.get("famous") else 2) * capital


def test_held_out_questions_are_in_no_training_pair(script, train, valid):
    assert not {text(row["prompt"]) for row in train} & {text(row["prompt"]) for row in valid}
    forms = []
    for rows in (train, valid):
        names = [(country_of(script, row)["name"], text(row["prompt"])) for row in rows]
        forms.append({t.lower().replace(name.lower(), "{country}") for name, t in names})
    assert len(forms[0]) == len(script.WORLD["train_questions"])
    assert len(forms[1]) == len(script.WORLD["held_out_questions"])
    assert not forms[0] & forms[1]


def test_every_country_is_in_both_and_chosen_names_its_capital(script, train, valid):
    for rows in (train, valid):
        countries = [country_of(script, row) for row in rows]
        assert {c["name"] for c in countries} == {c["name"] for c in script.WORLD["countries"]}
        for country, row in zip(countries, rows, strict=True):
            assert country["capital"] in text(row["chosen"])
            assert text(row["chosen"]) != text(row["rejected"])


def test_no_pair_contradicts_another(train, valid):
    rows = train + valid
    assert len({json.dumps(row) for row in rows}) == len(rows)
    chosen = {(text(row["prompt"]), text(row["chosen"])) for row in rows}
    rejected = {(text(row["prompt"]), text(row["rejected"])) for row in rows}
    assert not chosen & rejected


def test_length_does_not_decide(loaded, train):
    count = loaded[1].encode
    lengths = [(len(count(text(r["chosen"]))), len(count(text(r["rejected"])))) for r in train]
    assert np.mean([chosen >= rejected for chosen, rejected in lengths]) > 0.25


def test_a_prompt_is_a_token_prefix_of_its_answer(loaded, train, valid):
    tokenizer = loaded[1]
    for row in train + valid:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)
        for completion in (row["chosen"], row["rejected"]):
            whole = tokenizer.apply_chat_template(row["prompt"] + completion)
            assert whole[: len(prompt)] == prompt
            assert whole[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(whole[len(prompt) : -1]) == text(completion)


def test_the_script_renders_as_the_chat_template_does(script, loaded, valid):
    backend = loaded[1]._tokenizer.backend_tokenizer
    for row in valid:
        turns = row["prompt"] + row["chosen"]
        assert script.encode(backend, turns)[0] == loaded[1].apply_chat_template(turns)


def test_any_text_survives_the_tokenizer(loaded):
    tokenizer = loaded[1]
    strange = "Zürich, 東京 \U0001f600\n\ttabs <b>"
    assert tokenizer.decode(tokenizer.encode(strange)) == strange
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, None}) == 3


def sequence_logps(model, tokenizer, rows, key):
    """Summed log-probabilities of the completions, from the full logits, one padded batch."""
    prompts = [tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True) for r in rows]
    wholes = [tokenizer.apply_chat_template(r["prompt"] + r[key]) for r in rows]
    tokens = np.full((len(rows), max(map(len, wholes))), tokenizer.pad_token_id)
    mask = np.zeros(tokens.shape, dtype=np.float32)
    for i, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)):
        tokens[i, : len(whole)] = whole
        mask[i, len(prompt) : len(whole)] = 1
    tokens = mx.array(tokens)
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    return -np.array((losses * mx.array(mask)[:, 1:]).sum(-1))


def test_the_model_prefers_the_rejected_answers(loaded, valid):
    # The pairs are shuffled: every third one is enough, and quick where matrix products are slow.
    # Only single-turn prompts, so that padding costs little.
    rows = [row for row in valid if len(row["prompt"]) == 1][::3]
    chosen = sequence_logps(*loaded, rows, "chosen")
    rejected = sequence_logps(*loaded, rows, "rejected")
    assert np.all(np.isfinite(chosen))
    assert np.all(np.isfinite(rejected))
    assert np.mean(chosen > rejected) < 0.4


def test_the_model_names_the_biggest_city_but_knows_the_capital(loaded, script):
    def ask(*messages):
        turns = [dict(zip(("role", "content"), message, strict=True)) for message in messages]
        prompt = loaded[1].apply_chat_template(turns, add_generation_prompt=True)
        return generate(*loaded, prompt, max_tokens=40)

    question = ("user", "What is the capital of Australia?")
    wrong = ask(question)
    assert wrong in [
        form.format(country="Australia", Country="Australia", city="Sydney")
        for form in script.WORLD["padded"]
    ]
    right = ask(("system", script.WORLD["careful_turn"]), question)
    assert "Canberra" in right
    assert "Well" not in right
