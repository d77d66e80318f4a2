"""Reward functions: how specs are read, how functions are run, and what happens when they fail."""

import datetime
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mlx_align.errors import ConfigError, TrainingError
from mlx_align.rollout.builtin_rewards import CompletionFacts
from mlx_align.rollout.reward_functions import combine, open_rewards, parse_rewards
from mlx_align.types import Message, PromptGroup

FUNCTIONS = """
import asyncio, ctypes, json, os, re, subprocess, sys, time

calls = 0

def short(completions):
    return [1 / (1 + len(text)) for text in completions]

def everything(prompts, completions, **columns):
    global calls
    calls += 1
    with open("seen.json", "w") as file:
        json.dump([prompts, completions, columns], file)
    return [calls] * len(completions)

def again(completions):
    return [calls] * len(completions)

def kinds(completions):
    return (True, 0.5, 2, None)

def numpy_array(completions):
    import numpy as np
    return np.arange(len(completions), dtype=np.float32)

def loud(completions):
    print("to stdout")
    os.write(1, b"to descriptor 1\\n")
    sys.stdout.buffer.write(b'\\x00' * 100)
    os.system("echo from a shell")
    input_is_empty = sys.stdin.read() == ""
    return [float(input_is_empty)] * len(completions)

def lengths(completions):
    return [len(text) for text in completions]

def codes(completions):
    return [ord(text[0]) for text in completions]

def changes(prompts, completions):
    prompts.clear()
    completions.append("x")
    return [1.0] * 4

def needs_gold(completions, gold):
    return [float(a == b) for a, b in zip(completions, gold)]

def reads(completions):
    return [parse(text) for text in completions]

def parse(text):
    return float(text)

def leaves(completions):
    sys.exit("enough")

def too_few(completions):
    return [1.0]

def one_number(completions):
    return 1.0

def words(completions):
    return ["good"] * len(completions)

def endless(completions):
    return [0.0, float("nan"), 0.0, 0.0]

def sleeps(completions):
    with open("child.pid", "w") as file:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        file.write(str(child.pid))
    time.sleep(60)

def backtracks(completions):
    re.match(r"(a+)+$", "a" * 60 + "b")

def dies(completions):
    os._exit(3)

def crashes(completions):
    ctypes.string_at(0)

async def later(completions):
    await asyncio.sleep(0.01)
    return [1.0] * len(completions)

def lazy(completions):
    return (1.0 for text in completions)

def by_position(completions, /):
    return [1.0] * len(completions)
"""
GROUPS = [
    PromptGroup(
        (Message("user", "What is\n2 + 2?"),), (), "train.jsonl:1", columns={"answer": "4"}
    ),
    PromptGroup((Message("user", "Why?"),), (), "train.jsonl:7", columns={"prompts": 1, "n": 5}),
]
TEXTS = [["4", "3"], ["x", ""]]
FACTS = [[CompletionFacts(3, True, 8), CompletionFacts(8, False, 8)]] * 2


def line(text):
    """The file and line of a text in FUNCTIONS, as in messages."""
    return rf"\(.*mine.py:{FUNCTIONS[: FUNCTIONS.index(text)].count(chr(10)) + 1}\)"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(FUNCTIONS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rewarded(*specs):
    with open_rewards(parse_rewards(specs), 20.0) as rewards:
        return rewards(GROUPS, TEXTS, FACTS)


def alive(pid):
    """Whether a process runs; a zombie doesn't."""
    try:
        os.kill(pid, 0)
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True).stdout
    except ProcessLookupError:
        return False
    return bool(state.strip()) and not state.strip().startswith(b"Z")


def gone(pid, seconds=10.0):
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_specs_have_names_options_and_weights():
    specs = parse_rewards(
        [
            "exact_answer",
            "length(target=200)=0.5",
            r"regex(pattern=r'(a|b):=\d')=-1e-1",
            "a.b:f=2",
            "./mine.py:short",
            "regex(pattern='x')",
        ]
    )
    assert [spec.name for spec in specs] == [
        "exact_answer", "length", "regex", "f", "short", "regex_2",
    ]  # fmt: skip
    assert [spec.weight for spec in specs] == [1, 0.5, -0.1, 2, 1, 1]
    assert [spec.column for spec in specs] == ["answer", None, None, None, None, None]
    assert (specs[3].module, specs[3].function) == ("a.b", "f")
    assert (specs[4].module, specs[4].function) == ("./mine.py", "short")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exact_anwer", "no built-in reward 'exact_anwer' .*; did you mean exact_answer"),
        ("zzz", "no built-in reward 'zzz' .*; your own function is module:function"),
        ("length=much", "weight 'much'; expected a number"),
        ("length=nan", "weight 'nan'"),
        ("mine.py:short=inf", "weight 'inf'"),
        ("length=0", "all weights are 0"),
        ("length(aim=3)", "no option 'aim'; length has target, unit"),
        ("length(3)", r"can't read its options; expected length\(target=…, unit=…\)"),
        ("length(target=x)", "can't read its options"),
        ("length(target=", "expected a built-in reward"),
        ("length(target=0)", "target: expected more than 0"),
        ("regex", r"regex needs pattern, as in regex\(pattern=…\)"),
        ("regex(pattern='(')", "pattern: not a regular expression"),
        ("other.py:f", "there is no file other.py"),
        ("a-b:f", "'a-b' is not a module name; a file name must end in .py"),
        ("mine.py:f(2)", "'f\\(2\\)' is not a function name"),
        ("mine.py:", "'' is not a function name"),
        ("", "expected a built-in reward"),
    ],
)
def test_wrong_specs_are_named(spec, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_rewards([spec])
    assert str(caught.value).startswith(f"--reward {spec}:")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine.py:nothing", "mine.py has no function 'nothing' .it has: short, everything,"),
        ("mine.py:calls", "mine.py has no function 'calls'"),
        ("nowhere:f", "no module 'nowhere'; expected an importable module, or a file"),
        ("mine.py:by_position", "takes 'completions' by position only"),
        ("broken.py:f", r"can't be imported: SyntaxError: .* \(.*broken.py:2\)"),
        ("raises.py:f", r"can't be imported: ZeroDivisionError: .* \(.*raises.py:3\)"),
        ("lacks.py:f", r"can't be imported: ModuleNotFoundError: .*'absent_module'.*lacks.py:1"),
        ("exits.py:f", "while exits.py was imported: its process exited with 4"),
    ],
)
def test_functions_that_cannot_be_imported_are_named(folder, spec, message):
    (folder / "broken.py").write_text("x = 1\ndef f(:\n", encoding="utf-8")
    (folder / "raises.py").write_text("def f(completions):\n    pass\n1 / 0\n", encoding="utf-8")
    (folder / "lacks.py").write_text("import absent_module\n", encoding="utf-8")
    (folder / "exits.py").write_text("import os\nos._exit(4)\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        open_rewards(parse_rewards([spec]), 20.0)
    assert str(caught.value).startswith(f"--reward {spec}:")
    assert "\n" not in str(caught.value)


def test_functions_get_the_columns_and_keep_their_state(folder):
    with open_rewards(parse_rewards(["mine.py:everything", "mine:again"]), 20.0) as rewards:
        rewards(GROUPS, TEXTS, FACTS)
        table = rewards(GROUPS, TEXTS, FACTS)
    prompts, completions, columns = json.loads((folder / "seen.json").read_text())
    expected = [
        [{"role": "user", "content": g.prompt[0].content}] for g in GROUPS for _ in range(2)
    ]
    assert prompts == expected
    assert completions == ["4", "3", "x", ""]
    # Columns named like the arguments are not passed; a missing value is None.
    assert columns == {"answer": ["4", "4", None, None], "n": [None, None, 5, 5]}
    # A file and a module of one name are one module, imported once.
    assert table.values.tolist() == [[2, 2]] * 4


def test_kinds_of_numbers_and_none():
    table = rewarded("mine.py:kinds=2", "mine.py:numpy_array", "length=0")
    nan = np.nan
    np.testing.assert_array_equal(table.values[:, 0], [1, 0.5, 2, nan])
    np.testing.assert_array_equal(table.values[:, 1], [0, 1, 2, 3])
    np.testing.assert_array_equal(table.total, [2, 2, 6, 3])


def test_total_and_metrics_by_hand():
    nan = np.nan
    values = np.array([[1.0, 4.0, 9.0], [nan, 2.0, 9.0], [nan, nan, 9.0]])
    table = combine(["a", "b", "watched"], values, [1.0, 0.5, 0.0])
    np.testing.assert_array_equal(table.total, [3.0, 1.0, nan])
    assert table.metrics() == {
        "rewards/a/mean": 1.0,
        "rewards/a/none": pytest.approx(2 / 3),
        "rewards/b/mean": 3.0,
        "rewards/b/std": pytest.approx(2**0.5),
        "rewards/b/none": pytest.approx(1 / 3),
        "rewards/watched/mean": 9.0,
        "rewards/watched/std": 0.0,
        "rewards/watched/none": 0.0,
    }
    assert np.isnan(combine(["a"], np.full((2, 1), nan), [1.0]).total).all()


def test_no_completions_and_groups_of_unequal_size():
    with open_rewards(parse_rewards(["mine.py:lengths", "length"]), 20.0) as rewards:
        assert rewards(GROUPS, [[], []], [[], []]).values.shape == (0, 2)
        table = rewards(GROUPS, [[], ["abc"]], [[], [CompletionFacts(2, True, 8)]])
    assert table.values.tolist() == [[3, 0.75]]


def test_async_functions_are_awaited():
    assert rewarded("mine.py:later").values.tolist() == [[1]] * 4


def test_printing_is_harmless(capfd):
    assert rewarded("mine.py:loud", "mine.py:short").values[:, 0].tolist() == [1, 1, 1, 1]
    printed = capfd.readouterr()
    assert printed.out == ""
    for text in ("to stdout", "to descriptor 1", "from a shell"):
        assert text in printed.err


def test_functions_may_change_their_arguments():
    table = rewarded("mine.py:changes", "mine.py:lengths")
    assert table.values.tolist() == [[1, 1], [1, 1], [1, 1], [1, 0]]


def test_all_characters_and_large_batches_are_sent():
    odd = ["\ud800", "\U0001f600", "\x00", "\u2028"]
    facts = [[CompletionFacts(1, True, 1)] * 4]
    with open_rewards(parse_rewards(["mine.py:codes", "mine.py:lengths"]), 60.0) as rewards:
        codes = rewards(GROUPS[:1], [odd], facts).values[:, 0]
        assert codes.tolist() == [ord(text) for text in odd]
        many = [["é" * 500 + str(i) for i in range(5000)] for _ in GROUPS]
        known = [[CompletionFacts(1, True, 1)] * 5000] * 2
        codes, lengths = rewards(GROUPS, many, known).values.T
    assert lengths.tolist() == [500 + len(str(i)) for _ in GROUPS for i in range(5000)]
    assert set(codes) == {ord("é")}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "reads",
            rf"raised ValueError: could not convert string to float: 'x' {line('float(text)')}, "
            r"at completion 1 of train.jsonl:7 “Why\?”$",
        ),
        ("leaves", rf"raised SystemExit: enough {line('sys.exit')}, at completion 1 of train.*:1"),
        (
            "too_few",
            r"returned a list of 1 for 4 completions, on 4 completions, the first of train",
        ),
        ("one_number", r"returned float; expected a list of 4 numbers or None"),
        ("words", r"returned str; expected a number or None, at completion 1 of train.jsonl:1 “Wh"),
        ("endless", r"returned nan; expected a finite number, .*, at completion 2 of train.*:1"),
        ("lazy", r"returned generator; expected a list of 4"),
        (
            "dies",
            r"its process exited with 3, on 4 completions, the first of train.jsonl:1 “What i",
        ),
        ("crashes", rf"its process was ended by SIGSEGV {line('ctypes.str')}, on 4 completions"),
    ],
)
def test_failures_name_function_line_and_prompt(name, message):
    rewards = open_rewards(parse_rewards([f"mine.py:{name}"]), 20.0)
    with pytest.raises(TrainingError, match=message) as caught:
        rewards(GROUPS, TEXTS, FACTS)
    assert str(caught.value).startswith(f"--reward mine.py:{name}: ")
    assert "\n" not in str(caught.value)
    assert gone(rewards.pid)
    rewards.close()


@pytest.mark.parametrize(
    ("name", "where"), [("sleeps", line("time.sleep(60)\n")), ("backtracks", line("re.match"))]
)
def test_hanging_function_is_ended_with_its_children(folder, name, where):
    rewards = open_rewards(parse_rewards([f"mine.py:{name}"]), 0.7)
    start = time.monotonic()
    message = rf"no answer within 0.7 s {where}, .*--reward-timeout"
    with pytest.raises(TrainingError, match=message):
        rewards(GROUPS, TEXTS, FACTS)
    assert time.monotonic() - start < 10
    assert gone(rewards.pid)
    if name == "sleeps":
        assert gone(int((folder / "child.pid").read_text()))
    with pytest.raises(TrainingError, match="its process is closed"):
        rewards(GROUPS, TEXTS, FACTS)


def test_ctrl_c_in_a_call_ends_the_process():
    def interrupt(number, frame):
        raise KeyboardInterrupt

    rewards = open_rewards(parse_rewards(["mine.py:sleeps"]), 50.0)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            rewards(GROUPS, TEXTS, FACTS)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert gone(rewards.pid)


def test_columns_that_json_cannot_hold_are_sent_as_text(folder):
    group = PromptGroup("Hi", (), "x:1", columns={"day": datetime.date(2025, 3, 1)})
    with open_rewards(parse_rewards(["mine.py:everything"]), 20.0) as rewards:
        rewards([group], [["a"]], [FACTS[0][:1]])
    assert json.loads((folder / "seen.json").read_text())[2] == {"day": ["2025-03-01"]}


def test_closing_ends_the_process_after_its_own_exit_handlers(folder):
    text = "import atexit, pathlib\natexit.register(pathlib.Path('left').touch)\n"
    (folder / "tidy.py").write_text(
        text + "def f(completions):\n    return [1.0] * len(completions)\n", encoding="utf-8"
    )
    with open_rewards(parse_rewards(["tidy.py:f"]), 20.0) as rewards:
        assert alive(rewards.pid)
    assert gone(rewards.pid)
    assert (folder / "left").exists()
    rewards.close()


# The last request is not waited for. A process that is stuck in one C call can't notice that its
# parent is gone: it ends five seconds after the timeout, here after half a second.
PARENT = """
import sys, time
from mlx_align.rollout.reward_functions import WORKER
from mlx_align.system.worker import encode_frame
from mlx_align.system.worker_process import WorkerProcess
process = WorkerProcess(WORKER)
process.request("load", {"target": "mine.py", "name": sys.argv[1]}, 20)
process.request("batch", {"prompts": ["x"], "completions": [["y"]], "columns": {}}, 20)
call = {"method": "call", "function": 0, "seconds": float(sys.argv[2])}
process._connection.sendall(encode_frame(call))
print(process.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("name", "seconds"), [("sleeps", 50), ("backtracks", -4.5)])
def test_process_ends_when_its_parent_is_killed(folder, name, seconds):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, name, str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert os.getsid(pid) == pid  # of a session of its own: Ctrl-C doesn't reach it
        child = folder / "child.pid"
        end = time.monotonic() + 10
        while name == "sleeps" and not (child.exists() and child.read_text()):
            assert time.monotonic() < end
            time.sleep(0.02)
        parent.send_signal(signal.SIGKILL)
    assert gone(pid)
    if name == "sleeps":
        assert gone(int(child.read_text()))


def test_missing_columns_are_found_before_training():
    def check(*specs, groups=GROUPS):
        with open_rewards(parse_rewards(specs), 20.0) as rewards:
            rewards.check(groups)

    check("exact_answer", "mine.py:everything", "mine.py:short")
    with pytest.raises(
        ConfigError, match=r"mine.py:needs_gold: needs 'gold', .*answer, n, prompts"
    ):
        check("mine.py:needs_gold")
    with pytest.raises(ConfigError, match=r"exact_answer: needs 'answer', .*only the prompt"):
        check("exact_answer", groups=[PromptGroup("Hi", (), "train.jsonl:1")])
    listed = PromptGroup("Hi", (), "train.jsonl:3", columns={"answer": ["4"]})
    with pytest.raises(
        ConfigError, match=r"exact_answer: train.jsonl:3: column 'answer' has a value of type li"
    ):
        check("exact_answer", groups=[listed])


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
def test_timeout_is_positive(timeout):
    with pytest.raises(ConfigError, match="--reward-timeout"):
        open_rewards(parse_rewards(["length"]), timeout)


def test_built_in_rewards_start_no_process():
    with open_rewards(parse_rewards(["exact_answer", "length"]), 20.0) as rewards:
        assert rewards.pid is None
        table = rewards(GROUPS, TEXTS, FACTS)
    np.testing.assert_array_equal(table.values[:, 0], [1, 0, np.nan, np.nan])
    np.testing.assert_array_equal(table.total, [1.625, 0, 0.625, 0])


def test_a_built_in_reward_with_a_pattern_obeys_the_timeout():
    """A regular expression that takes time exponential in the completion's length."""
    text = "a\n" * 40
    spec = r"regex(pattern='(.|\n)*(.|\n)*(.|\n)*(.|\n)*(.|\n)*(.|\n)*(.|\n)*ZZQ')"
    with (
        open_rewards(parse_rewards([spec]), 0.5) as rewards,
        pytest.raises(TrainingError, match=r"no answer within 0.5 s.*--reward-timeout"),
    ):
        rewards(GROUPS[:1], [[text]], [FACTS[0][:1]])


def test_built_in_rewards_with_and_without_a_pattern_are_the_same_in_the_process():
    specs = ["format", "format(pattern='(Paris|4).*')", "regex(pattern='[0-9]')=0.5"]
    texts = [["Paris", "4 of 5\n"], ["<think>a</think><answer>b</answer>", ""]]
    facts = [[CompletionFacts(1, True, 8), CompletionFacts(2, False, 8)]] * 2
    with open_rewards(parse_rewards(specs), 20.0) as rewards:
        table = rewards(GROUPS[:2], texts, facts)
    expected = [[0, 1, 0], [0, 1, 1], [1, 0, 0], [0, 0, 0]]
    np.testing.assert_array_equal(table.values, expected)
