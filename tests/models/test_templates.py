"""Chat templates and patterns of strangers have limits, and render as transformers does."""

import json
import shutil
import time

import pytest
from helpers.data import assistant, user, write_rows
from helpers.paths import TINY_MODEL
from helpers.runs import mlx_align
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mlx_align.errors import ModelError
from mlx_align.models import templates
from mlx_align.models.loading import load_tokenizer, read_model_config
from mlx_align.models.templates import SandboxError, _LimitedEncoding, matching_names

TURNS = [{"role": "user", "content": "Grüße\n{{ x }}"}, {"role": "assistant", "content": "\ud800a"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.fixture
def tokenizer_with(tmp_path):
    def make(template):
        shutil.copytree(TINY_MODEL, tmp_path / "model", dirs_exist_ok=True)
        (tmp_path / "model" / "chat_template.jinja").write_text(template)
        return load_tokenizer(tmp_path / "model", read_model_config(tmp_path / "model"))

    return make


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}\n",
        "{{ bos_token }}{{ messages | tojson }}"
        "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}",
        "{%- set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}{% generation %}x{% endgeneration %}"
        "{{ add_generation_prompt }}{{ enable_thinking }}",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        "",
    ],
)
@pytest.mark.parametrize("options", [{}, {"enable_thinking": True, "add_generation_prompt": True}])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_texts_and_tokens_are_those_of_transformers(tokenizer_with, template, options, tools):
    wrapper = tokenizer_with(template)
    inner = wrapper._tokenizer
    for tokenize in (True, False):
        own = PreTrainedTokenizerBase.apply_chat_template(
            inner,
            TURNS[:1],
            tools=tools,
            tokenize=tokenize,
            return_dict=False,
            **{"enable_thinking": False, **options},
        )
        assert (
            wrapper.apply_chat_template(TURNS[:1], tools=tools, tokenize=tokenize, **options) == own
        )
    text = wrapper.apply_chat_template(TURNS, tools=tools, tokenize=False, **options)
    assert isinstance(text, str)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "within",
        ),
        ("{% set x = 9**(9**9) %}", "within"),
        ("{{ 'a'.center(3 * 10**9) }}", "GB of memory"),
        (
            "{% set ns = namespace(t='abcdefgh') %}"
            "{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
            "GB of memory",
        ),
        ("{{ 'ab' * 4000000 }}", "writes more than 4,194,304 characters"),
    ],
)
def test_limits(tokenizer_with, monkeypatch, template, said):
    monkeypatch.setattr(templates, "MAX_SECONDS", 1.5)
    wrapper = tokenizer_with(template)
    with pytest.raises(ModelError, match="its chat template was given up: ") as found:
        wrapper.apply_chat_template(TURNS[:1], tokenize=False)
    # Either limit may come first on a slow machine, where memory is what runs out.
    assert said in str(found.value) or ("GB" in said and "within" in str(found.value))
    assert "\n" not in str(found.value)
    monkeypatch.setattr(templates, "MAX_SECONDS", 60.0)
    assert tokenizer_with("ok").apply_chat_template(TURNS[:1], tokenize=False) == "ok"


def test_an_error_of_a_template_is_one_of_its_row(tokenizer_with):
    wrapper = tokenizer_with("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(SandboxError, match=r"^roles must alternate$"):
        wrapper.apply_chat_template(TURNS[:1])
    wrapper = tokenizer_with("{{ ''.__class__.__mro__ }}{{ open('/etc/passwd') }}")
    with pytest.raises(SandboxError, match=r"unsafe|undefined"):
        wrapper.apply_chat_template(TURNS[:1])


def test_a_command_gives_up_a_template_in_one_line(tokenizer_with, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(templates, "MAX_SECONDS", 1.0)
    tokenizer_with("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    answers = {"chosen": assistant("b"), "rejected": assistant("c")}
    data = write_rows(tmp_path / "p.jsonl", [{"prompt": user(p), **answers} for p in "abcd"])
    assert mlx_align("data", "check", "--model", tmp_path / "model", "--data", data) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "model: its chat template was given up: no answer within 1 s" in error


def test_patterns_of_strangers(monkeypatch):
    names = ["a.b", "axb", "layers.10.q_proj", "a" * 40]
    assert matching_names("a.b", names) == {"a.b", "axb"}
    assert matching_names(r"layers\.\d+\.[qk]_proj", names) == {"layers.10.q_proj"}
    with pytest.raises(SandboxError, match="unterminated"):
        matching_names("[", names)
    monkeypatch.setattr(templates, "MAX_SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(SandboxError, match="within 1 s"):
        matching_names("(a|a)*b", names)
    assert time.monotonic() - began < 60


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture
def model_with_pattern(tmp_path):
    """A copy of the tiny model whose tokenizer splits texts by a pattern."""

    def make(pattern):
        folder = tmp_path / "model"
        shutil.copytree(TINY_MODEL, folder)
        content = json.loads((folder / "tokenizer.json").read_text())
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        both = [{**split, "invert": False}, content["pre_tokenizer"]]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": both}
        (folder / "tokenizer.json").write_text(json.dumps(content))
        return folder

    return make


@pytest.mark.parametrize(("pattern", "limited"), [(LLAMA_3, False), (r"\w+|\W", True)])
def test_patterns_of_tokenizers(model_with_pattern, pattern, limited):
    folder = model_with_pattern(pattern)
    tokenizer = load_tokenizer(folder, read_model_config(folder))
    assert isinstance(tokenizer._tokenizer.encode, _LimitedEncoding) == limited
    expected = AutoTokenizer.from_pretrained(folder)
    for text in ("It's  12345 \n\ntrees. Grüße", ""):
        assert tokenizer.encode(text) == expected.encode(text)
        plain = tokenizer.encode(text, add_special_tokens=False)
        assert plain == expected.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [(r"(a|a){18}$", "no answer within 1 s"), (r"(a+)+$", "retry-limit-in-match over")],
)
def test_a_pattern_without_end(model_with_pattern, tmp_path, monkeypatch, capfd, pattern, reason):
    """Each match is ended by the tokenizers library, but there is one at every character."""
    monkeypatch.setattr(templates, "MAX_SECONDS", 1.0)
    folder = model_with_pattern(pattern)
    text = "a" * 2000 + "!"
    rows = [{"prompt": f"{i}{text}", "chosen": " yes", "rejected": " no"} for i in range(3)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    assert mlx_align("data", "check", data, "--model", folder) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"error: {folder}: its tokenizer was given up on a text of 2,0")
    assert reason in error
    assert error.count("\n") == 1
