"""Reading and tokenising prompts."""

import json

import pytest
from helpers.tokenizers import (
    CHATML,
    DOUBLE_BOS,
    LLAMA2,
    LLAMA3,
    OPENS_THINKING,
    PHI3,
    REFUSES_SYSTEM,
    THINKS,
    tiny_tokenizer,
)

from mlx_align.data.formats import read_prompts
from mlx_align.data.tokenization import tokenize_group, tokenize_prompts
from mlx_align.errors import ConfigError, DataError
from mlx_align.types import Message, PromptGroup

USER, YES = Message("user", "what is it?"), Message("assistant", "four")
SYSTEM = Message("system", "be brief")


def turn(role, content):
    return {"role": role, "content": content}


def read(tmp_path, *rows, **options):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_prompts(tmp_path, **options)


ASKED = (Message("user", "1+1?"),)


@pytest.mark.parametrize(
    ("row", "prompt", "columns", "title"),
    [
        ({"prompt": "1+1?", "n": 2}, "1+1?", {"n": 2}, "prompts"),
        ({"prompt": [turn("user", "1+1?")]}, ASKED, {}, "prompts"),
        ({"question": "1+1?", "answer": "#### 2"}, ASKED, {"answer": "#### 2"}, "prompts"),
        (
            {"messages": [turn("user", "1+1?")], "answer": 2},
            ASKED,
            {"answer": 2},
            "conversations up to the last user turn",
        ),
        (
            {"messages": [turn("user", "1+1?"), turn("assistant", "2")]},
            ASKED,
            {},
            "conversations up to the last user turn",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                    {"from": "human", "value": "1+1?"},
                    {"from": "gpt", "value": "2"},
                ],
                "system": "be brief",
            },
            (SYSTEM, Message("user", "Hi"), Message("assistant", "Hello"), *ASKED),
            {},
            "conversations up to the last user turn",
        ),
        (
            {"prompt": [turn("user", "1+1?")], "messages": [turn("user", "x")]},
            ASKED,
            {"messages": [turn("user", "x")]},
            "prompts",
        ),
        (
            {"prompt": "1+1?", "chosen": " 2", "rejected": " 3", "topic": "sums"},
            "1+1?",
            {"topic": "sums"},
            "the prompts of pairs (prompt, chosen, rejected)",
        ),
        (
            {"prompt": "1+1?", "completion": " 2", "label": True},
            "1+1?",
            {"completion": " 2", "label": True},
            "prompts",
        ),
    ],
)
def test_prompts_are_read_from_many_kinds_of_rows(tmp_path, row, prompt, columns, title):
    (group,), report = read(tmp_path, row)
    assert (group.prompt, group.completions) == (prompt, ())
    assert (dict(group.columns), group.source) == (columns, "train.jsonl:1")
    assert report.title == title
    assert (group.scores, group.label, group.soft_label, group.margin) == (None,) * 4


def test_margins_and_votes_of_pairs_are_left_out(tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.5}
    assert read(tmp_path, row)[0][0].margin is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"prompt": "a"'], "train.jsonl:1: not JSON"),
        ([{"prompt": "a"}, {"prompt": 5}], "train.jsonl:2: 'prompt' is int 5; expected text"),
        ([{"prompt": "a"}, {"answer": "2"}], "train.jsonl:2: no 'prompt'; found 'answer'"),
        ([{"prompt": " "}], r"train.jsonl: none of the 1 rows can be used \(1 empty prompt\)"),
        ([{"messages": []}], "train.jsonl:1: 'messages' is list; expected a list of"),
        ([{"messages": [turn("assistant", "2")]}], "train.jsonl:1: 'messages' has no user turn"),
        (
            [{"messages": [turn("system", "2")]}],
            "train.jsonl:1: the prompt ends with role 'system'",
        ),
        (
            [{"prompt": [turn("user", "a"), turn("assistant", "b")]}],
            "train.jsonl:1: the prompt ends with role 'assistant'",
        ),
        (
            [{"messages": [turn("user", "a")], "tools": [1]}],
            "train.jsonl:1: 'tools' is list; expected a list of function descriptions",
        ),
        (
            [{"text": "a"}],
            "train.jsonl:1: not recognised as prompts data; found 'text', expected p",
        ),
    ],
)
def test_errors_name_the_row(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, *rows)


def test_empty_prompts_are_counted(tmp_path):
    groups, report = read(tmp_path, {"prompt": "a"}, {"prompt": ""}, {"prompt": "b"})
    assert [group.source for group in groups] == ["train.jsonl:1", "train.jsonl:3"]
    assert "1 of 3 rows dropped: 1 empty prompt" in str(report)


@pytest.mark.parametrize("template", [CHATML, LLAMA2, LLAMA3, DOUBLE_BOS, PHI3, REFUSES_SYSTEM])
@pytest.mark.parametrize("prompt", [(USER,), (SYSTEM, USER), (USER, YES, USER)])
def test_prompts_have_the_same_ids_as_in_training(template, prompt):
    tokenizer = tiny_tokenizer(template, bos=template != CHATML)
    asked = PromptGroup(prompt, (), "train.jsonl:1")
    answered = PromptGroup(prompt, ((YES,),), "train.jsonl:1")
    (ready,), report = tokenize_prompts([asked], tokenizer, 500)
    assert ready.completions == ()
    pair = tokenize_group(answered, tokenizer, max_seq_length=500)
    assert ready.prompt.tolist() == pair.prompt.tolist()
    assert ready.prompt.tolist().count(tokenizer.bos_token_id) == ("bos_token" in template)
    assert report.system_folded == (template == REFUSES_SYSTEM and SYSTEM in prompt)
    # Completions are ignored.
    assert tokenize_prompts([answered], tokenizer, 500)[0][0].prompt.tolist() == (
        ready.prompt.tolist()
    )


@pytest.mark.parametrize("template", [THINKS, OPENS_THINKING])
def test_thinking_templates_render_as_in_generation(template):
    tokenizer = tiny_tokenizer(template, thinking=True)
    (ready,), _ = tokenize_prompts([PromptGroup((USER,), (), "x:1")], tokenizer, 500)
    generated = tokenizer.apply_chat_template(
        [turn("user", USER.content)], add_generation_prompt=True
    )
    assert ready.prompt.tolist() == list(generated)


def test_strings_are_tokenised_unchanged_with_one_bos():
    tokenizer = tiny_tokenizer(CHATML)
    (ready,), _ = tokenize_prompts([PromptGroup("hello there", (), "x:1")], tokenizer, 500)
    answered = PromptGroup("hello there", (" four",), "x:1")
    assert ready.prompt.tolist() == (
        tokenize_group(answered, tokenizer, max_seq_length=500).prompt.tolist()
    )
    assert ready.prompt[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ready.prompt[1:].tolist()


def test_long_prompts_are_dropped_unless_they_are_more_than_10_percent():
    tokenizer = tiny_tokenizer(CHATML)
    short = [PromptGroup("hello", (), f"x:{i}") for i in range(19)]
    long = PromptGroup("hello " * 50, (), "x:long")
    groups = [*short[:7], long, *short[7:]]
    length = len(tokenize_prompts([long], tokenizer, 500)[0][0].prompt)
    ready, report = tokenize_prompts(groups, tokenizer, length - 1)
    assert report.dropped == {"too long": 1}
    assert (report.rows, len(ready)) == (20, 19)
    assert [group.source for group in ready] == [groups[i].source for i in report.indices]
    assert len(tokenize_prompts(groups, tokenizer, length)[0]) == 20
    message = rf"2 of 12 rows are longer than --max-prompt-length {length - 1} .*longest {length}"
    with pytest.raises(DataError, match=message):
        tokenize_prompts([*short[:10], long, long], tokenizer, length - 1)
    with pytest.raises(DataError, match="no rows"):
        tokenize_prompts([], tokenizer, 5)
    with pytest.raises(ConfigError, match="--max-prompt-length 0"):
        tokenize_prompts(short, tokenizer, 0)
