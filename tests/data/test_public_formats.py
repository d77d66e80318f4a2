"""Rows with the columns and nesting of public data sets are read as their makers meant them."""

import json

import pytest
from helpers.tokenizers import tiny_tokenizer

from mlx_align.data.columns import ConfiguredSource, LabelRules
from mlx_align.data.convert import plain_row, read_any, unique_groups
from mlx_align.data.formats import (
    read_preferences,
    read_prompts,
    read_scorable,
    read_supervised,
    read_unpaired,
)
from mlx_align.data.readers import open_data
from mlx_align.data.tokenization import tokenize_groups
from mlx_align.errors import DataError
from mlx_align.types import Message, ToolCall

Q, GOOD, BAD = "Name a colour.", "Red.", "Dunno."
USER = [{"role": "user", "content": Q}]


def talk(*answers):
    roles = ("assistant", "user")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(answers)]
    return [*USER, *turns]


ORCA = {
    "system": "Be brief.",
    "input": Q,
    "chosen": GOOD,
    "rejected": BAD,
    "generations": [GOOD, BAD],
    "order": ["chosen", "rejected"],
    "rating": [8.0, 3.0],
    "chosen_score": 8.0,
}
HELPSTEER3 = {
    "domain": "general",
    "context": USER,
    "response1": BAD,
    "response2": GOOD,
    "overall_preference": 2,
    "individual_preference": [{"score": 2, "reasoning": "x", "feedback1": "a"}],
}
NECTAR = {
    "prompt": f"\n\nHuman: {Q}\n\nAssistant: ",
    "answers": [
        {"answer": BAD, "model": "m", "rank": 2.0},
        {"answer": GOOD, "model": "n", "rank": 1.0},
        {"answer": "Eh.", "model": "o", "rank": 3.0},
    ],
    "turns": 1,
    "num_responses": 3,
}
PKU = {
    "prompt": Q,
    "response_0": BAD,
    "response_1": GOOD,
    "is_response_0_safe": True,
    "is_response_1_safe": True,
    "better_response_id": 1,
    "safer_response_id": 0,
}
WEBGPT = {
    "question": {"dataset": "eli5", "id": "1", "full_text": Q},
    "quotes_0": {"title": [], "extract": []},
    "answer_0": BAD,
    "score_0": -0.5,
    "answer_1": GOOD,
    "score_1": 0.5,
}
SUMMARIZE = {
    "info": {"post": "Long post.", "title": "T", "subreddit": "s", "article": None},
    "summaries": [{"text": BAD, "policy": "sup"}, {"text": GOOD, "policy": "ref"}],
    "choice": 1,
    "worker": "w",
}
ORPO_MIX = {"source": "s", "chosen": talk(GOOD), "rejected": talk(BAD), "prompt": Q, "question": Q}
RATERS = {"prompt": Q, "responses": [BAD, GOOD], "ratings": [[1, 2, 2], [5, 4, 5]]}
ARENA = {"conversation_a": talk(BAD), "conversation_b": talk(GOOD), "winner": "model_b", "turn": 1}
ARENA_55K = {
    "prompt": json.dumps([Q]),
    "response_a": json.dumps([BAD]),
    "response_b": json.dumps([GOOD]),
    "winner_model_a": 0,
    "winner_model_b": 1,
    "winner_tie": 0,
}
SHP = {"history": Q, "human_ref_A": BAD, "human_ref_B": GOOD, "labels": 0, "score_A": 2}
FARM = {"instruction": Q, "input": "", "output_1": BAD, "output_2": GOOD, "preference": 2}
PROMETHEUS = {
    "orig_instruction": Q,
    "orig_response_A": BAD,
    "orig_response_B": GOOD,
    "orig_preference": "B",
}
PROMETHEUS_WHOLE = {**PROMETHEUS, "instruction": "###Task: judge.", "output": "B"}
TRAJECTORY = {"trajectory": [{"from": "user", "value": Q}], "chosen": GOOD, "rejected": BAD}
NEXT_TURN = {"messages": USER, "chosen": talk(GOOD)[1], "rejected": talk(BAD)[1]}
JUDGEBENCH = {"question": Q, "response_A": BAD, "response_B": GOOD, "label": "B>A"}
VOTE_COUNTS = {"prompt": Q, "response_1": BAD, "response_2": GOOD, "votes_1": 1, "votes_2": 3}
PART = {"type": "text", "text": Q, "image": None}
PARTS = {
    side: [{"role": "user", "content": [PART]}, *talk(answer)[1:]]
    for side, answer in (("conversation_a", BAD), ("conversation_b", GOOD))
}
PAIRED = {"qid": 1, "question": Q, "response_j": GOOD, "response_k": BAD}
TREE = {
    "message_tree_id": "1",
    "prompt": {
        "role": "prompter",
        "text": Q,
        "replies": [
            {"role": "assistant", "text": BAD, "rank": 1, "replies": []},
            {"role": "assistant", "text": GOOD, "rank": 0, "replies": []},
            {"role": "assistant", "text": "spam", "rank": 2, "deleted": True},
        ],
    },
}

SHAPES = {
    "distilabel Orca": (ORCA, None),
    "HelpSteer3": (HELPSTEER3, 0.75),
    "PKU-SafeRLHF": (PKU, None),
    "WebGPT": (WEBGPT, None),
    "orpo-dpo-mix": (ORPO_MIX, None),
    "Arena": (ARENA, None),
    "Arena 55k": (ARENA_55K, None),
    "SHP": (SHP, None),
    "AlpacaFarm": (FARM, None),
    "Preference Collection": (PROMETHEUS, None),
    "Preference Collection, whole": (PROMETHEUS_WHOLE, None),
    "UltraInteract": (TRAJECTORY, None),
    "axolotl": (NEXT_TURN, None),
    "JudgeBench": (JUDGEBENCH, None),
    "counts of votes": (VOTE_COUNTS, 0.7),
    "Arena 140k": ({**PARTS, "winner": "model_b"}, None),
    "Stack Exchange paired": (PAIRED, None),
    "message tree": (TREE, None),
}


def read(rows, reader=read_preferences, columns=None, **rules):
    source = ConfiguredSource(open_data(rows), columns or {}, LabelRules(**rules))
    return reader(source)


def text_of(text):
    return text if isinstance(text, str) else [(turn.role, turn.content) for turn in text]


@pytest.mark.parametrize("name", SHAPES)
def test_public_pairs_are_read(name):
    row, soft_label = SHAPES[name]
    ((group,), _) = read([row])
    prompt = text_of(group.prompt)
    assert prompt[-1] == ("user", Q)
    assert ("system", "Be brief.") in prompt or len(prompt) == 1
    assert [text_of(text) for text in group.completions] == [
        [("assistant", GOOD)],
        [("assistant", BAD)],
    ]
    assert group.soft_label == soft_label


def test_ranked_answers_with_a_transcript_as_prompt():
    ((group,), _) = read([NECTAR])
    assert text_of(group.prompt) == [("user", Q)]
    assert [text[0].content for text in group.completions] == [GOOD, BAD, "Eh."]
    assert group.scores == (-1, -2, -3)


def test_lists_of_chosen_and_of_rejected_answers():
    row = {"prompt": Q, "chosen": [GOOD], "rejected": [BAD, "Eh."], "num_correct": 1}
    ((group,), _) = read([row])
    assert (group.completions, group.scores) == ((GOOD, BAD, "Eh."), (1.0, 0.0, 0.0))


def test_ratings_of_annotations_are_averaged():
    def answer(text, *ratings):
        return {"response": text, "annotations": {str(i): {"Rating": r} for i, r in ratings}}

    answers = [answer(BAD, (0, "2"), (1, "N/A")), answer(GOOD, (0, "4"), (1, "5"))]
    ((group,), _) = read([{"instruction": Q, "completions": answers}])
    assert group.scores == (4.5, 2.0)


def test_pairs_of_the_next_turn_are_demonstrations_too():
    ((group,), _) = read([NEXT_TURN], read_supervised)
    assert text_of(group.completions[0]) == [("assistant", GOOD)]


def test_a_text_that_may_be_the_prompt_is_not_left_out():
    row = {"query": Q, "chosen": f"Well, {GOOD}", "rejected": f"Well, {BAD}", "user_id": "u"}
    with pytest.raises(
        DataError, match=r"'query' may be the prompt.*--columns prompt=query chosen"
    ):
        read([row])
    columns = {"chosen": "chosen", "rejected": "rejected"}
    assert read([row], columns=columns)[0][0].prompt == "Well,"
    with pytest.raises(DataError, match="no 'chosen'; try --columns prompt=instruction chosen=acc"):
        read([{"instruction": Q, "accepted": GOOD, "rejected": BAD}])


def test_labelled_completions_that_begin_with_the_prompt():
    row = {"prompt": Q, "completion": talk(GOOD), "label": True}
    ((group,), _) = read([row], read_unpaired)
    assert text_of(group.prompt) == [("user", Q)]
    assert text_of(group.completions[0]) == [("assistant", GOOD)]


def test_instructions_with_a_response_a_context_and_a_system_prompt():
    row = {"question": Q, "context": "Of flags.", "response": GOOD, "system_prompt": "Be brief."}
    ((group,), _) = read([row], read_supervised)
    assert text_of(group.prompt) == [("system", "Be brief."), ("user", f"{Q}\nOf flags.")]
    with pytest.raises(DataError, match="not recognised as supervised data"):
        read([{**row, "is_safe": False}], read_supervised)


def test_tool_calls_as_sharegpt_and_xlam_have_them():
    call = {"name": "colour", "arguments": {"of": "sky"}}
    tools = json.dumps([{"name": "colour", "parameters": {}}])
    turns = [
        {"from": "human", "value": Q, "weight": 0},
        {"from": "function_call", "value": json.dumps(call)},
    ]
    rows = (
        {"conversations": turns, "tools": tools},
        {"query": Q, "answers": json.dumps([call]), "tools": tools},
    )
    for row in rows:
        ((group,), _) = read([row], read_supervised)
        ((message,),) = group.completions
        assert (message.content, message.tool_calls) == ("", (ToolCall("colour", '{"of": "sky"}'),))
        assert group.tools[0]["name"] == "colour"


def test_a_summary_prompt_holds_the_post_or_the_article():
    ((group,), _) = read([SUMMARIZE])
    assert group.prompt[0].content == "SUBREDDIT: r/s\n\nTITLE: T\n\nPOST: Long post.\n\nTL;DR:"
    assert [text[0].content for text in group.completions] == [GOOD, BAD]
    ((group,), _) = read([{**SUMMARIZE, "info": {"article": "News."}}])
    assert group.prompt[0].content == "ARTICLE: News.\n\nTL;DR:"


def test_several_raters_become_a_soft_label_and_their_agreement():
    ((group,), _) = read([RATERS])
    assert group.completions == (GOOD, BAD)
    assert group.scores == pytest.approx((14 / 3, 5 / 3))
    assert (group.soft_label, group.columns["agreement"]) == (3.5 / 4, 1.0)
    split = {**RATERS, "ratings": [[5, 2, 2], [4, 4, 5]]}
    ((group,), _) = read([split])
    assert group.soft_label == 2.5 / 4
    assert group.columns["agreement"] == pytest.approx(2 / 3)


def test_messages_of_a_tree_one_by_one():
    rows = [
        {"message_id": "1", "text": Q, "role": "prompter", "lang": "en"},
        {"message_id": "2", "parent_id": "1", "text": BAD, "role": "assistant", "rank": 1},
        {"message_id": "3", "parent_id": "1", "text": GOOD, "role": "assistant", "rank": 0},
        {"message_id": "4", "parent_id": "3", "text": "Another?", "role": "prompter"},
        {"message_id": "5", "parent_id": "4", "text": "Blue.", "role": "assistant", "rank": 0},
        {"message_id": "6", "parent_id": "4", "text": "No.", "role": "assistant", "rank": 1},
    ]
    groups, _ = read(rows)
    assert [group.source for group in groups] == ["data[0]", "data[3]"] or len(groups) == 2
    assert [text[0].content for text in groups[0].completions] == [GOOD, BAD]
    assert text_of(groups[1].prompt) == [("user", Q), ("assistant", GOOD), ("user", "Another?")]
    assert [text[0].content for text in groups[1].completions] == ["Blue.", "No."]


def test_scored_completions_of_a_prompt_are_joined():
    rows = [
        {"prompt": Q, "response": text, "helpfulness": score, "verbosity": 1}
        for text, score in ((BAD, 1), (GOOD, 4), ("Eh.", 0))
    ]
    ((group,), _) = read([*rows, {"prompt": "Other?", "response": "Yes.", "helpfulness": 3}])
    assert group.completions == (GOOD, BAD, "Eh.")
    with pytest.raises(DataError, match="each prompt has one scored completion"):
        read(rows[:1])


@pytest.mark.parametrize(
    ("names", "value", "side"),
    [
        (("answer_a", "answer_b"), "a", 1),
        (("answer_a", "answer_b"), "answer_b", -1),
        (("answer_a", "answer_b"), "B", -1),
        (("answer_a", "answer_b"), "tie", 0),
        (("answer_a", "answer_b"), "tie (bothbad)", 0),
        (("answer_a", "answer_b"), "both_bad", 0),
        (("answer_a", "answer_b"), "[[A]]", 1),
        (("answer_a", "answer_b"), 0, 1),
        (("answer_0", "answer_1"), 1, -1),
        (("answer_0", "answer_1"), 0.5, 0),
        (("response_1", "response_2"), 1, 1),
        (("response_1", "response_2"), "2", -1),
        (("response_1", "response_2"), 0, 0),
        (("response_1", "response_2"), "response 2", -1),
        (("response_a", "response_b"), "A>>B", 1),
        (("response_a", "response_b"), "[[B>A]]", -1),
        (("response_a", "response_b"), "A<B", -1),
        (("response_a", "response_b"), "A=B", 0),
        (("response_a", "response_b"), "Response B is slightly better.", -1),
        (("response_a", "response_b"), "A is much better than B", 1),
        (("response_a", "response_b"), "About the same", 0),
    ],
)
def test_verdicts(names, value, side):
    row = {"prompt": Q, names[0]: "first", names[1]: "second", "winner": value}
    groups, _ = read([row], ties="half")
    assert groups[0].completions[0][0].content == ("second" if side < 0 else "first")
    assert groups[0].soft_label == (0.5 if side == 0 else None)


def test_a_verdict_that_means_nothing_is_an_error():
    row = {"prompt": Q, "response_a": "x", "response_b": "y", "winner": "perhaps"}
    with pytest.raises(DataError, match=r"'winner' is text 'perhaps'; expected a, b, tie, 0 or 1"):
        read([row])


TIED = [{**HELPSTEER3, "overall_preference": 0, "individual_preference": None}, HELPSTEER3]


def test_ties_are_skipped_or_count_half():
    groups, report = read(TIED)
    assert (len(groups), report.dropped) == (1, {"tied": 1})
    groups, report = read(TIED, ties="half")
    assert [group.soft_label for group in groups] == [0.5, 0.75]
    assert report.dropped == {}
    assert len(read(TIED, read_prompts)[0]) == 2
    assert len(read(TIED, read_unpaired)[0]) == 2
    assert len(read(TIED, read_supervised)[0]) == 1
    equal = [{"prompt": Q, "responses": ["x", "y"], "scores": [2, 2]}]
    assert read(equal, ties="half")[0][0].soft_label == 0.5
    scored = list(read_scorable(ConfiguredSource(open_data(TIED), {})))
    assert (scored[0].group, scored[0].reason) == (None, "tied")


def test_strength_becomes_margin_or_soft_label():
    assert read([HELPSTEER3])[0][0].margin is None
    assert read([HELPSTEER3], strength="margin")[0][0].margin == 2
    (group,) = read([HELPSTEER3], strength="soft-label")[0]
    assert group.soft_label == pytest.approx(0.880797)
    (group,) = read([WEBGPT], strength="margin")[0]
    assert group.margin == 1
    rated = {"prompt": Q, "chosen": GOOD, "rejected": BAD, "score_chosen": 5, "score_rejected": 2}
    assert read([rated], strength="margin")[0][0].margin == 3


def test_votes_are_soft_labels_or_left_out():
    votes = {**HELPSTEER3, "individual_preference": [{"score": 2}, {"score": -1}, {"score": 3}]}
    assert read([votes])[0][0].soft_label == 2.5 / 4
    assert read([votes], votes="ignore")[0][0].soft_label is None
    counted = {"prompt": Q, "chosen": GOOD, "rejected": BAD, "votes_chosen": 3, "votes_rejected": 0}
    assert read([counted])[0][0].soft_label == 3.5 / 4
    assert read([counted], votes="ignore")[0][0].soft_label is None


# --- tools and reasoning ---

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}, "extra": None}}]
ASK = {"role": "user", "content": "Weather in Bern?"}


def test_tools_and_tool_calls_are_kept():
    row = {
        "prompt": [
            ASK,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": "12 C"},
        ],
        "chosen": [{"role": "assistant", "content": "12 C."}],
        "rejected": [{"role": "assistant", "content": "No idea."}],
        "tools": TOOLS,
    }
    ((group,), _) = read([row])
    assert group.prompt[1].tool_calls == (ToolCall("weather", '{"city": "Bern"}'),)
    assert group.prompt[2] == Message("tool", "12 C", name="weather", tool_call_id="c1")
    assert group.tools == ({"type": "function", "function": {"name": "weather", "parameters": {}}},)
    assert "tools" not in group.columns
    as_text = {**row, "tools": json.dumps(TOOLS)}
    assert read([as_text])[0][0].tools == group.tools


def test_a_tool_call_as_completion_has_no_content():
    for call in (
        {"tool_calls": [CALL]},
        {
            "tool_calls": [
                {"id": "c1", "function": {**CALL["function"], "arguments": '{"city": 1}'}}
            ]
        },
        {"function_call": CALL["function"]},
    ):
        row = {
            "prompt": [ASK],
            "chosen": [{"role": "assistant", "content": None, **call}],
            "rejected": [{"role": "assistant", "content": "No idea."}],
        }
        (chosen, _) = read([row])[0][0].completions
        assert chosen[0].content == ""
        assert chosen[0].tool_calls[0].name == "weather"


STEP = {
    "prompt": "What is 2 + 2 + 2?",
    "initial_reason_steps": "Let's think step by step.\nStep 1:",
    "chosen": " 2 + 2 = 4.",
    "rejected": " 2 + 2 = 5.",
    "full_chosen": "",
    "full_rejected": "",
    "answer": "6",
}


def test_the_steps_before_a_step_are_in_its_prompt():
    ((group,), _) = read([STEP])
    assert group.prompt == "What is 2 + 2 + 2?\nLet's think step by step.\nStep 1:"
    assert group.completions == (" 2 + 2 = 4.", " 2 + 2 = 5.")
    ((first,), _) = read([{**STEP, "initial_reason_steps": ""}])
    assert first.prompt == "What is 2 + 2 + 2?"
    with pytest.raises(DataError, match=r"'initial_reason_steps' begins the answer.*make"):
        read([{**STEP, "prompt": USER}])


@pytest.mark.parametrize(
    "reader", [read_preferences, read_unpaired, read_supervised, read_prompts, read_scorable]
)
def test_labels_of_steps_are_refused(reader):
    rated = {"completions": [{"text": "4", "rating": 1}], "chosen_completion": 0}
    row = {
        "is_quality_control_question": False,
        "question": {"problem": "2 + 2?", "ground_truth_answer": "4"},
        "label": {"steps": [rated], "finish_reason": "solution"},
    }
    with pytest.raises(DataError, match=r"labels of single reasoning steps.*write pairs"):
        read([row], reader)


def test_tools_next_to_text_are_refused():
    row = {"prompt": Q, "chosen": GOOD, "rejected": BAD, "tools": TOOLS}
    with pytest.raises(DataError, match="has 'tools', which go through the chat template"):
        read([row])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_next_to_the_content_is_kept(key):
    answers = [{"role": "assistant", key: "add", "content": text} for text in ("4", "5")]
    row = {"prompt": [ASK], "chosen": answers[:1], "rejected": answers[1:]}
    ((group,), _) = read([row])
    assert group.completions[0] == (Message("assistant", "4", reasoning="add"),)


def test_images_and_audio_are_refused():
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {}}]
    with pytest.raises(DataError, match="expected text only"):
        read([{"prompt": [{"role": "user", "content": parts}]}], read_prompts)
    with pytest.raises(DataError, match="has 'images', and only text can be trained on"):
        read([{"prompt": Q, "chosen": GOOD, "rejected": BAD, "images": ["x.png"]}])
    assert read([{"prompt": Q, "chosen": GOOD, "rejected": BAD, "images": []}])


# --- plain rows ---

ALL = [
    *(row for row, _ in SHAPES.values()),
    NECTAR,
    SUMMARIZE,
    RATERS,
    {"prompt": USER, "completion": [{"role": "assistant", "content": GOOD}], "label": False},
    {"messages": talk(GOOD, "More?", "Blue.")},
    {"prompt": Q, "completion": " Red."},
    {"text": "Red."},
    {"question": Q, "answer": "Red."},
    {
        "prompt": [ASK],
        "chosen": [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
        "rejected": [{"role": "assistant", "content": "No.", "reasoning_content": "none"}],
        "tools": TOOLS,
    },
]


@pytest.mark.parametrize("row", ALL)
def test_plain_rows_are_read_as_the_same_group(row):
    (group,) = read_any(ConfiguredSource(open_data([row]), {}), "train", None)[0]
    plain = json.loads(json.dumps(plain_row(group)))
    (again,) = read_any(ConfiguredSource(open_data([plain]), {}), "train", None)[0]
    for name in ("prompt", "completions", "scores", "label", "soft_label", "margin", "tools"):
        assert getattr(again, name) == getattr(group, name), name


def test_unique_groups_leaves_equal_ones_out():
    groups, _ = read([PKU, PKU, WEBGPT])[0], None
    assert len(unique_groups(groups)) == 1


def test_public_rows_are_tokenised():
    groups = [read([row])[0][0] for row, _ in SHAPES.values()]
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    kept, report = tokenize_groups(groups, tiny_tokenizer(template), max_seq_length=200)
    assert (len(kept), report.text_dropped) == (len(groups), 0)
