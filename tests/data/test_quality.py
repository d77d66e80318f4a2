"""What `data check` finds in the text of a dataset."""

import random

import pytest

from mlx_align.data.quality import check_quality, language_of, render_quality
from mlx_align.types import PromptGroup

WORDS = ["river", "stone", "window", "garden", "music", "bread", "cloud", "winter", "market"]


def sentence(seed, length=30):
    chance = random.Random(seed)
    return " ".join(chance.choice(WORDS) + str(chance.randrange(50)) for _ in range(length))


def pair(prompt, chosen, rejected, source="data[0]"):
    return PromptGroup(prompt, (chosen, rejected), source)


def plain(count):
    return [
        pair(sentence(3 * i), sentence(3 * i + 1), sentence(3 * i + 2), f"data[{i}]")
        for i in range(count)
    ]


def found(groups, valid=()):
    quality = check_quality(groups, valid)
    return {finding.what: (finding.count, finding.rows) for finding in quality.findings}


def one(findings, word):
    (match,) = (value for what, value in findings.items() if word in what)
    return match


def test_nothing_is_found_in_clean_data():
    assert found(plain(40), plain(60)[50:]) == {}


def test_near_duplicates_differ_in_a_few_words():
    groups = plain(20)
    groups.append(
        pair(
            groups[4].prompt,
            groups[4].completions[0].replace(" ", "  ", 3),
            groups[4].completions[1] + " indeed",
            "data[20]",
        )
    )
    assert one(found(groups), "near duplicates") == (1, ("data[20]",))


def test_prompts_of_valid_that_are_nearly_in_train():
    groups = plain(20)
    valid = [pair(groups[3].prompt + "!", "a b c", "d e f", "valid[0]"), plain(30)[29]]
    assert one(found(groups, valid), "nearly equal") == (1, ("valid[0]",))


def test_conflicting_labels_of_pairs_and_of_labelled_completions():
    a, b, c, prompt = (sentence(i) for i in range(900, 904))
    groups = [*plain(10), pair(prompt, a, b, "x"), pair(prompt, c, a, "y")]
    assert one(found(groups), "chosen in one row and rejected") == (1, ("x",))
    labelled = [
        PromptGroup(prompt, (a,), "g", label=True),
        PromptGroup(prompt, (a,), "b", label=False),
    ]
    assert one(found(labelled), "chosen in one row and rejected") == (1, ("g",))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Yes<br>No", "HTML"),
        ('<a href="x">y</a>', "HTML"),
        ("a &amp; b", "HTML"),
        ("stop<|im_end|>", "template"),
        ("[INST] hi", "template"),
        ("<｜Assistant｜>", "template"),
        ("### Response: x", "template"),
    ],
)
def test_marks_that_do_not_belong_in_the_text(text, word):
    groups = [*plain(10), pair(sentence(70), sentence(71) + "\n" + text, sentence(72), "data[10]")]
    assert one(found(groups), word) == (1, ("data[10]",))


@pytest.mark.parametrize("text", ["if a < b and c > d", "List<String> x", "AT&T", "a <- b"])
def test_code_and_signs_are_not_html(text):
    assert check_quality([pair(sentence(1), text, sentence(2))]).findings == () or not any(
        "HTML" in finding.what for finding in check_quality([pair("p", text, "q")]).findings
    )


def test_languages_and_their_outliers():
    english = "This is the answer to the question that you are asking, and it is not short."
    german = "Das ist die Antwort auf die Frage, und sie ist nicht kurz, denn der Weg ist weit."
    chinese = "这是对你的问题的回答，它并不短，因为路很长。"
    assert [language_of(t) for t in (english, german, chinese)] == ["English", "German", "Chinese"]
    assert language_of("Red.") == ""
    assert language_of("Это ответ на твой вопрос.") == "Cyrillic"
    groups = [pair(f"{i}?", english + str(i), english + "x", str(i)) for i in range(30)]
    quality = check_quality([*groups, pair("?", german, german + "!", "german")])
    (finding,) = (f for f in quality.findings if "language" in f.what)
    assert (finding.count, finding.rows) == (1, ("german",))
    assert "languages: English 97%, German 3%" in render_quality(quality)


def test_length_outliers():
    groups = [*plain(10), pair(sentence(50), sentence(51, 2000), "no", "long")]
    assert one(found(groups), "as long as the median") == (1, ("long",))


def test_rules_without_understanding_that_explain_the_labels():
    groups = [
        pair(f"{i}?", f"**Yes** {i}\n- a\n- b", f"{'No' * (i % 2 * 20)} {i}") for i in range(10)
    ]
    quality = check_quality(groups)
    assert (quality.longer_right, quality.formatted_right) == (0.5, 1.0)
    assert quality.formatted_differs == 1.0
    text = render_quality(quality)
    assert "picking the longer completion agrees with 50% of the labels" in text
    assert "! picking the more formatted one agrees with 100%" in text
    plain_text = render_quality(check_quality([pair("a?", "Yes it is", "No it is not")]))
    assert "the two completions of a pair never differ in Markdown" in plain_text
    assert "formatted one agrees" not in plain_text
