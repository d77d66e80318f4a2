"""Tokenisation: the boundary of prompt and completion, end tokens, templates, and limits."""

import numpy as np
import pytest
from helpers.tokenizers import (
    ALWAYS_OPEN,
    CHATML,
    DOUBLE_BOS,
    FORGETS_SYSTEM,
    LLAMA2,
    LLAMA3,
    NO_END,
    OPENS_THINKING,
    PHI3,
    REFUSES_SYSTEM,
    RETURNS,
    THINKS,
    hf_tokenizer,
    tiny_tokenizer,
)

from mlx_align.data.chat_template import inspect_chat_template
from mlx_align.data.tokenization import (
    TOO_LONG,
    percentiles,
    tokenize_conversation,
    tokenize_group,
    tokenize_groups,
    try_tokenize_group,
)
from mlx_align.errors import ConfigError, DataError
from mlx_align.types import Message, PromptGroup, ToolCall

USER = Message("user", "what is it?")
YES, NO = Message("assistant", "four, hello"), Message("assistant", "no")


def chat(*answers, prompt=(USER,)):
    return PromptGroup(prompt, tuple((answer,) for answer in answers), "train.jsonl:1")


def shown(tokenizer, group):
    return [tokenizer.decode(ids.tolist()) for ids in (group.prompt, *group.completions)]


def tokenized(tokenizer, group, **options):
    return shown(tokenizer, tokenize_group(group, tokenizer, max_seq_length=500, **options))


@pytest.mark.parametrize("stops", [(), ("<|im_end|>",)])
def test_chatml_loses_the_newline_after_the_end_token(stops):
    tokenizer = tiny_tokenizer(CHATML, stops=stops)
    assert tokenized(tokenizer, chat(YES, NO)) == [
        "<|im_start|>user\nwhat is it?<|im_end|>\n<|im_start|>assistant\n",
        "four, hello<|im_end|>",
        "no<|im_end|>",
    ]


def test_a_note_warns_if_generation_does_not_stop_at_the_end_token():
    assert "<|im_end|>" in inspect_chat_template(tiny_tokenizer(CHATML)).chat_notes[0]
    assert inspect_chat_template(tiny_tokenizer(CHATML, stops=("<|im_end|>",))).chat_notes == ()


def test_template_bos_is_not_doubled():
    for template in (LLAMA3, DOUBLE_BOS):
        tokenizer = tiny_tokenizer(template, stops=("<|eot|>",))
        prompt, yes, no = tokenized(tokenizer, chat(YES, NO))
        assert prompt.count("<bos>") == 1
        assert prompt.startswith("<bos><|im_start|>user")
        assert (yes, no) == ("four, hello<|eot|>", "no<|eot|>")


def test_template_without_bos_gets_none_as_in_generation():
    tokenizer = tiny_tokenizer(CHATML, bos=True)
    prompt = tokenize_group(chat(YES, NO), tokenizer, max_seq_length=99).prompt.tolist()
    generated = tokenizer.apply_chat_template(
        [{"role": "user", "content": USER.content}], add_generation_prompt=True
    )
    assert prompt == generated


def test_llama2_keeps_the_space_before_eos():
    assert tokenized(tiny_tokenizer(LLAMA2), chat(YES, NO)) == [
        "<bos>[INST] what is it? [/INST]",
        " four, hello <eos>",
        " no <eos>",
    ]


def test_pad_equal_to_eos_changes_nothing():
    tokenizer = tiny_tokenizer(LLAMA2, pad="<eos>")
    assert tokenized(tokenizer, chat(YES, NO))[1:] == [" four, hello <eos>", " no <eos>"]


def test_ends_at_the_first_token_that_stops_generation():
    stops = tiny_tokenizer(PHI3, stops=("<|end|>",))
    assert tokenized(stops, chat(YES, NO))[1:] == ["four, hello<|end|>", "no<|end|>"]
    runs_on = tiny_tokenizer(PHI3)
    assert tokenized(runs_on, chat(YES, NO))[2] == "no<|end|>\n<eos>"


def test_no_generation_prompt_after_the_answer():
    tokenizer = tiny_tokenizer(ALWAYS_OPEN)
    assert tokenized(tokenizer, chat(YES, NO))[1:] == ["four, hello<|im_end|>", "no<|im_end|>"]


def test_eos_is_appended_if_the_template_writes_no_end_token():
    tokenizer = tiny_tokenizer(NO_END)
    groups, report = tokenize_groups([chat(YES, NO)], tokenizer, max_seq_length=500)
    assert report.end_appended == 1
    assert all(ids.tolist().count(tokenizer.eos_token_id) == 1 for ids in groups[0].completions)
    assert all(ids[-1] == tokenizer.eos_token_id for ids in groups[0].completions)


def test_an_end_token_in_the_data_is_not_scored_twice():
    tokenizer = tiny_tokenizer(CHATML)
    twice = Message("assistant", "no<|im_end|>")
    assert tokenized(tokenizer, chat(YES, twice))[2] == "no<|im_end|>"
    strings = PromptGroup("abc", (" hello<eos>", " there<eos><eos>"), "x:1")
    assert tokenized(tokenizer, strings) == ["<bos>abc", " hello<eos>", " there<eos>"]


def test_hugging_face_tokenizers_are_wrapped():
    wrapped, bare = tiny_tokenizer(CHATML), hf_tokenizer(CHATML)
    assert tokenized(wrapped, chat(YES, NO)) == tokenized(bare, chat(YES, NO))


def test_thinking_template_puts_the_empty_block_of_a_bare_answer_into_the_prompt():
    tokenizer = tiny_tokenizer(THINKS, thinking=True)
    groups, report = tokenize_groups([chat(YES, NO)], tokenizer, max_seq_length=500)
    prompt, yes, _ = shown(tokenizer, groups[0])
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert yes == "four, hello<|im_end|>"
    assert (report.boundary_moved, report.thinking_off) == (0, 1)


def test_thinking_on_scores_the_empty_block_of_a_bare_answer():
    tokenizer = tiny_tokenizer(THINKS, thinking=True)
    prompt, yes, _ = tokenized(tokenizer, chat(YES, NO), thinking="on")
    assert prompt.endswith("<|im_start|>assistant\n")
    assert yes == "<think>\n\n</think>\n\nfour, hello<|im_end|>"


THOUGHTS = [
    (Message("assistant", "<think>\nabc\n</think>\n\nfour"),),
    (Message("assistant", "<think>\nhello\n</think>\n\nno"),),
]


@pytest.mark.parametrize("template", [THINKS, OPENS_THINKING])
def test_thinking_off_removes_the_reasoning_and_counts_it(template):
    tokenizer = tiny_tokenizer(template, thinking=True)
    group = PromptGroup((USER,), tuple(THOUGHTS), "x:1")
    groups, report = tokenize_groups([group], tokenizer, max_seq_length=500, thinking="off")
    prompt, four, _ = shown(tokenizer, groups[0])
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert four == "four<|im_end|>"
    assert (report.reasoning_removed, report.reasoning_dropped, report.thinking_off) == (1, 0, 1)


def test_the_empty_block_before_the_last_of_several_answers_is_masked():
    tokenizer = tiny_tokenizer(THINKS, thinking=True)
    turns = (Message("assistant", "abc"), USER, Message("assistant", "four"))
    group = tokenize_group(PromptGroup((USER,), (turns,), "x:1"), tokenizer, max_seq_length=500)
    mask, ids = group.loss_masks[0], group.completions[0]
    assert tokenizer.decode(ids[mask].tolist()) == "abc<|im_end|>four<|im_end|>"


# As DeepSeek-R1: every assistant turn loses what is before </think>.
LOSES_REASONING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<|im_end|>{{ m.content.split('</think>')[-1] }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|><think>\n{% endif %}"
)


@pytest.mark.parametrize(
    "answers",
    [THOUGHTS, [(Message("assistant", "four", reasoning="abc"),), (Message("assistant", "no"),)]],
)
def test_reasoning_that_the_template_removes_is_kept_after_the_open_thinking_block(answers):
    tokenizer = tiny_tokenizer(LOSES_REASONING, thinking=True)
    group = PromptGroup((USER,), tuple(answers[:1]), "x:1")
    groups, report = tokenize_groups([group], tokenizer, max_seq_length=500)
    prompt, four = shown(tokenizer, groups[0])
    assert prompt == "<bos><|im_start|>what is it?<|im_end|><think>\n"
    assert four == "abc\n</think>\n\nfour<eos>"
    assert (report.boundary_moved, report.reasoning_dropped) == (0, 0)


def test_reasoning_that_the_template_removes_is_counted_where_it_can_not_be_kept():
    closed = LOSES_REASONING.replace("<think>\n{% endif %}", "{% endif %}")
    tokenizer = tiny_tokenizer(closed, thinking=True)
    group = PromptGroup((USER,), tuple(THOUGHTS), "x:1")
    groups, report = tokenize_groups([group], tokenizer, max_seq_length=500)
    assert shown(tokenizer, groups[0])[1] == "\n\nfour<eos>"
    assert (report.reasoning_dropped, report.text_dropped) == (1, 0)


def test_text_that_the_template_leaves_out_is_counted():
    tokenizer = tiny_tokenizer(CHATML.replace("{{ m.content }}", "{{ m.content[:7] }}"))
    _, report = tokenize_groups([chat(YES, NO)], tokenizer, max_seq_length=500)
    assert report.text_dropped == 1


READS_REASONING = CHATML.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}",
)


def test_reasoning_goes_into_the_field_that_the_template_reads():
    tokenizer = tiny_tokenizer(READS_REASONING, thinking=True)
    answer = Message("assistant", "four", reasoning="abc")
    assert tokenized(tokenizer, chat(answer, NO))[1] == "<think>abc</think>four<|im_end|>"


def test_reasoning_goes_into_the_content_if_the_template_reads_no_field():
    tokenizer = tiny_tokenizer(CHATML, thinking=True)
    answer = Message("assistant", "four", reasoning="abc")
    assert tokenized(tokenizer, chat(answer, NO))[1] == ("<think>\nabc\n</think>\n\nfour<|im_end|>")
    _, report = tokenize_groups([chat(answer, NO)], tiny_tokenizer(CHATML), max_seq_length=500)
    assert report.reasoning_dropped == 1


TAKES_TOOLS = (
    "{% for tool in tools or [] %}<|im_start|>{{ tool | tojson }}<|im_end|>{% endfor %}"
    + CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "({{ c.function.arguments | tojson }}){% endfor %}",
    )
)
CALL = Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "Bern"}'),))
TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {}}},)


def test_tools_and_tool_calls_go_through_the_template():
    tokenizer = tiny_tokenizer(TAKES_TOOLS)
    prompt = (USER, CALL, Message("tool", "12 C", name="weather"))
    group = PromptGroup(prompt, ((CALL,), (NO,)), "x:1", tools=TOOLS)
    text, call, _ = tokenized(tokenizer, group)
    assert text.startswith('<|im_start|>{"type": "function", "function": {"name": "weather"')
    assert '<|im_start|>assistant\nweather({"city": "Bern"})<|im_end|>\n<|im_start|>tool' in text
    assert call == 'weather({"city": "Bern"})<|im_end|>'


@pytest.mark.parametrize(
    "group",
    [
        PromptGroup((USER,), ((YES,), (NO,)), "x:1", tools=TOOLS),
        PromptGroup((USER,), ((CALL,), (NO,)), "x:1"),
        PromptGroup((USER, CALL, Message("tool", "12 C")), (), "x:1"),
    ],
)
def test_tools_that_the_template_leaves_out_are_refused(group):
    with pytest.raises(DataError, match="with tools or tool calls, which the chat template leaves"):
        tokenize_groups([group], tiny_tokenizer(CHATML), max_seq_length=500)


# As GLM-4: no end token; the role token of the next turn ends an answer.
GLM = (
    "{% for m in messages %}{{ {'user': '<|im_start|>', 'assistant': '<|im_end|>'}[m.role] }}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|im_end|>{% endif %}"
)


def test_the_role_token_that_ends_an_answer_is_scored():
    tokenizer = tiny_tokenizer(GLM, stops=("<|im_start|>", "<eos>"))
    turns = (Message("assistant", "abc"), USER, Message("assistant", "four"))
    group = tokenize_group(PromptGroup((USER,), (turns,), "x:1"), tokenizer, max_seq_length=500)
    scored = tokenizer.decode(group.completions[0][group.loss_masks[0]].tolist())
    assert scored == "abc<|im_start|>four<eos>"


def test_thinking_template_that_opens_the_block_turns_thinking_off_for_bare_answers():
    tokenizer = tiny_tokenizer(OPENS_THINKING, thinking=True)
    reasoned = chat(
        Message("assistant", "<think>\nabc\n</think>\n\nfour"),
        Message("assistant", "<think>\nhello\n</think>\n\nno"),
    )
    groups, report = tokenize_groups([chat(YES, NO), reasoned], tokenizer, max_seq_length=500)
    bare = shown(tokenizer, groups[0])
    assert bare[0].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert bare[1:] == ["four, hello<|im_end|>", "no<|im_end|>"]
    thought = shown(tokenizer, groups[1])
    assert thought[0].endswith("<|im_start|>assistant\n<think>\n")
    assert thought[1] == "abc\n</think>\n\nfour<|im_end|>"
    assert (report.boundary_moved, report.thinking_off) == (0, 1)


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, FORGETS_SYSTEM])
def test_system_turn_is_folded_if_the_template_does_not_support_it(template):
    tokenizer = tiny_tokenizer(template)
    group = chat(YES, NO, prompt=(Message("system", "hello there"), USER))
    groups, report = tokenize_groups([group, chat(YES, NO)], tokenizer, max_seq_length=500)
    assert "user\nhello there\n\nwhat is it?<|im_end|>" in shown(tokenizer, groups[0])[0]
    assert report.system_folded == 1


def test_rows_that_the_template_refuses_are_counted():
    tokenizer = tiny_tokenizer(REFUSES_SYSTEM)
    twice = chat(YES, NO, prompt=(USER, USER))
    _, report = tokenize_groups([twice] + [chat(YES, NO)] * 19, tokenizer, max_seq_length=500)
    assert report.dropped == {"refused by the chat template": 1}
    with pytest.raises(DataError, match=r"2 of 4 rows .*\(Roles must alternate"):
        tokenize_groups([twice, twice, chat(YES, NO), chat(NO, YES)], tokenizer, max_seq_length=99)


def test_without_a_template_turns_are_plain_text():
    tokenizer = tiny_tokenizer(None)
    group = chat(YES, NO, prompt=(Message("system", "hello"), USER, YES, USER))
    assert tokenized(tokenizer, group) == [
        "<bos>hello\n\nHuman: what is it?\n\nAssistant: four, hello"
        "\n\nHuman: what is it?\n\nAssistant:",
        " four, hello<eos>",
        " no<eos>",
    ]
    assert "no chat template" in inspect_chat_template(tokenizer).chat_notes[0]


def test_strings_are_tokenised_unchanged():
    tokenizer = tiny_tokenizer(CHATML)
    group = PromptGroup("the answer is", (" four", " hello there"), "x:1")
    assert tokenized(tokenizer, group) == ["<bos>the answer is", " four<eos>", " hello there<eos>"]


def test_a_merge_across_the_boundary_moves_it_for_the_whole_group():
    tokenizer = tiny_tokenizer(None)
    whole = tokenizer.encode("hello ab" + "c", add_special_tokens=False)
    group = PromptGroup("hello ab", ("c", " four"), "x:1")
    groups, report = tokenize_groups([group], tokenizer, max_seq_length=500)
    assert report.boundary_moved == 1
    assert shown(tokenizer, groups[0]) == ["<bos>hello", " abc<eos>", " ab four<eos>"]
    assert groups[0].prompt.tolist()[1:] + groups[0].completions[0].tolist()[:-1] == whole


def test_prompt_and_completion_join_to_the_rendering_of_both():
    for template in (CHATML, LLAMA3, LLAMA2, PHI3, NO_END, THINKS, OPENS_THINKING, None):
        tokenizer = tiny_tokenizer(template, thinking=True)
        group = tokenize_group(chat(YES, NO), tokenizer, max_seq_length=500)
        for ids in group.completions:
            text = tokenizer.decode([*group.prompt.tolist(), *ids.tolist()])
            assert text.count("what is it?") == 1
            assert len(group.prompt) >= 1
            assert len(ids) >= 1
            assert ids.dtype == np.int32


def test_the_prompt_of_plain_text_without_bos_is_its_first_token():
    text = PromptGroup("", ("hello there",), "x:1")
    for bos in (True, False):
        tokenizer = tiny_tokenizer(None, bos=bos)
        group = tokenize_group(text, tokenizer, max_seq_length=99)
        assert len(group.prompt) == 1
        assert "".join(shown(tokenizer, group)) == "<bos>" * bos + "hello there<eos>"


def test_prompts_alone():
    tokenizer = tiny_tokenizer(CHATML)
    group = tokenize_group(PromptGroup((USER,), (), "x:1"), tokenizer, max_seq_length=99)
    assert shown(tokenizer, group) == [
        "<|im_start|>user\nwhat is it?<|im_end|>\n<|im_start|>assistant\n"
    ]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, LLAMA2, THINKS, RETURNS, NO_END, None])
def test_the_loss_mask_covers_exactly_the_assistant_turns(template):
    tokenizer = tiny_tokenizer(template, thinking=True)
    turns = [USER, YES, Message("user", "hello?"), Message("assistant", "the answer"), USER, NO]
    group = tokenize_conversation(turns, tokenizer, max_seq_length=500)
    (mask,), (ids,) = group.loss_masks, group.completions
    assert mask.shape == ids.shape
    scored = tokenizer.decode(ids[mask].tolist())
    for answer in (YES.content, "the answer", NO.content):
        assert scored.count(answer) == 1
    for other in ("hello?", "user:", "user\n", "Human", "INST", USER.content):
        assert other not in scored
    assert mask[-1]
    if template is CHATML:
        assert scored == "four, hello<|im_end|>the answer<|im_end|>no<|im_end|>"


def test_conversation_without_an_answer_is_refused():
    with pytest.raises(DataError, match="no assistant turn after a user turn"):
        tokenize_conversation([YES, USER], tiny_tokenizer(CHATML), max_seq_length=99)


def test_too_long_rows_are_dropped_and_counted():
    tokenizer = tiny_tokenizer(CHATML)
    long = chat(Message("assistant", "xyz " * 50), NO)
    groups, report = tokenize_groups([chat(YES, NO)] * 9 + [long], tokenizer, max_seq_length=60)
    assert (len(groups), report.kept, report.rows) == (9, 9, 10)
    assert report.dropped == {TOO_LONG: 1}
    assert report.lengths["100"] > 60 >= report.lengths["90"]


def test_more_than_10_percent_too_long_is_an_error_that_suggests_a_limit():
    tokenizer = tiny_tokenizer(CHATML)
    long = chat(Message("assistant", "xyz " * 50), NO)
    rows = [chat(YES, NO)] * 8 + [long] * 2
    with pytest.raises(
        DataError, match="2 of 10 rows are longer than --max-seq-length 60"
    ) as caught:
        tokenize_groups(rows, tokenizer, max_seq_length=60)
    suggested = int(str(caught.value).split("--max-seq-length ")[2].split()[0])
    kept, _ = tokenize_groups(rows, tokenizer, max_seq_length=suggested)
    assert len(kept) >= 9


def test_all_rows_too_long():
    with pytest.raises(DataError, match="all of 2 rows are longer"):
        tokenize_groups([chat(YES, NO)] * 2, tiny_tokenizer(CHATML), max_seq_length=5)
    with pytest.raises(DataError, match=r"too long: .* tokens, limit 5"):
        tokenize_group(chat(YES, NO), tiny_tokenizer(CHATML), max_seq_length=5)


def test_truncated_completions_lose_their_end_token():
    tokenizer = tiny_tokenizer(CHATML)
    group = chat(Message("assistant", "xyz " * 50), NO)
    groups, report = tokenize_groups(
        [group], tokenizer, max_seq_length=60, max_completion_length=10
    )
    long, short = groups[0].completions
    assert report.cut_completions == 1
    assert len(long) == 10
    assert not shown(tokenizer, groups[0])[1].endswith("<|im_end|>")
    assert short[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_limits_below_one_are_refused():
    for options in ({"max_seq_length": 0}, {"max_seq_length": 9, "max_completion_length": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            tokenize_groups([chat(YES, NO)], tiny_tokenizer(CHATML), **options)


def test_pairs_that_become_equal_are_dropped():
    tokenizer = tiny_tokenizer(LLAMA3)
    padded = chat(NO, Message("assistant", "no  "))
    result = try_tokenize_group(padded, inspect_chat_template(tokenizer), max_seq_length=99)
    assert result.dropped == "identical completions"


def test_percentiles():
    lengths = list(range(1, 101))
    assert percentiles(lengths) == {"50": 50, "90": 90, "99": 99, "100": 100}
    assert percentiles([7]) == {"50": 7, "90": 7, "99": 7, "100": 7}
    assert percentiles([]) == {}
