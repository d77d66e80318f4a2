"""Mutated data, configurations, models, adapters, run folders and command lines.

hypothesis mutates what is good: bytes cut, flipped, doubled, invalid UTF-8; values of a wrong type,
huge, NaN, nested without end; tensors of wrong shapes and names; aliases that grow without bound.
Every example goes through a real command. It has to end with 0, or with 1 and one line on standard
error, within 20 seconds; it must print no control characters and no NaN, leave no half-written
file, and need less than a gigabyte more memory than the examples before.

    python scripts/fuzz.py --examples 2000
    python scripts/fuzz.py --examples 500 --targets data,config --seed 3

The tokenizer and the weights of the tiny model are loaded once, so that an example takes as long as
what it tests.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# The command itself comes first: it tells mlx how to order evaluation, which mlx reads once.
from mlx_align.cli import main as command_line

# isort: split
import mlx.core as mx
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from mlx_align.cli.group import cli
from mlx_align.config import GRPOConfig, PPOConfig
from mlx_align.config.schema import to_yaml
from mlx_align.errors import ModelError
from mlx_align.models import loading, templates
from mlx_align.system.terminal import escape_controls
from mlx_align.training import checkpoint

LIMIT_SECONDS = 20
LIMIT_BYTES = 1 << 30
TINY = ROOT / "tests" / "oracle" / "models" / "policy"
# JSON as it stands in a file; the last few are no JSON at all.
ODD = (
    *("null", "true", "0", "-1", "0.5", "1e-320", "1e308", "2147483648", "-9223372036854775809"),
    *('""', '" "', '"x"', '"../../../etc/passwd"', '"\\u0000"', '"\\ud800"', '"%s"', "[]", "{}"),
    *("[[1]]", "[null]", '{"role": "user"}', '[{"role": "user", "content": 3}]', '{"": {}}'),
    '"' + "long " * 4000 + '"',
    "9" * 5000,
    "[" * 400 + "]" * 400,
    "[" * 20_000 + "]" * 20_000,
    '{"a":' * 400 + "1" + "}" * 400,
    *("NaN", "-Infinity", "1e999", "nul", "'x'", "{", "1 2", ""),
)
# Each line doubles the one before: read without bound, the last has 2 to the 40 leaves.
LAUGHS = "loss_option:\n  a: &x0 [a, a]\n" + "".join(
    f"  a{i}: &x{i} [*x{i - 1}, *x{i - 1}]\n" for i in range(1, 40)
)
ODD_YAML = (
    *("!!python/object/apply:os.system [echo]", "!!binary x", "*x39", "[*x39]", "{a: *x39}"),
    *("2001-01-01", "0x10", "1_000", "1e-5", ".nan", "-.inf", "~", "yes", "? [a]", "&a [*a]"),
    "0x" + "f" * 5000,
    *("[a, [b]]", "{a: {b: c}}", "- x", "|\n  text", "'", '"', "\t", "\x07", "%", "@x", "`"),
)


def one_of(values: Sequence[Any]) -> st.SearchStrategy[Any]:
    """One of the values; hypothesis' own would print all of them with its errors."""
    return st.integers(0, len(values) - 1).map(lambda i: values[i])


def changed_bytes(content: bytes) -> st.SearchStrategy[bytes]:
    """`content` with a few cuts, flips, insertions and repetitions."""
    at = st.integers(0, len(content))
    odd = st.sampled_from(
        (b"\xff", b"\x00", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\n", b'"', b"[", b"{", b"\\")
    )
    change = st.one_of(
        st.builds(lambda i: lambda c: c[:i], at),
        st.builds(lambda i: lambda c: c[i:], at),
        st.builds(lambda i, o: lambda c: c[:i] + o + c[i + 1 :], at, odd),
        st.builds(lambda i, o: lambda c: c[:i] + o + c[i:], at, odd | st.binary(max_size=9)),
        st.builds(lambda i, j: lambda c: c[: max(i, j)] + c[min(i, j) :], at, at),
        st.builds(lambda i, j: lambda c: c[: min(i, j)] + c[max(i, j) :], at, at),
    )

    def apply(changes: list[Callable[[bytes], bytes]]) -> bytes:
        changed = content
        for one in changes:
            changed = one(changed)
        return changed

    return st.lists(change, min_size=1, max_size=3).map(apply)


def changed_json(value: Any) -> st.SearchStrategy[str]:
    """The JSON of `value` with one node (or key) replaced by something odd, or left out."""
    paths = list(_paths(value))

    def apply(path: tuple[Any, ...], odd: str, how: str) -> str:
        copy = json.loads(json.dumps({"": value}))
        parent = copy
        for key in path[:-1]:
            parent = parent[key]
        if how == "drop" and len(path) > 1:
            del parent[path[-1]]
        elif how == "rename" and isinstance(parent, dict) and len(path) > 1:
            parent["odd"] = parent.pop(path[-1])
        else:
            parent[path[-1]] = "@@"
        return json.dumps(copy[""]).replace('"@@"', odd)

    hows = st.sampled_from(("odd", "odd", "odd", "drop", "rename"))
    return st.builds(apply, one_of(paths), one_of(ODD), hows)


def _paths(value: Any, here: tuple[Any, ...] = ("",)) -> Any:
    yield here
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _paths(item, (*here, key))


def changed_tensors(file: Path) -> st.SearchStrategy[bytes]:
    """A safetensors file with one tensor or the header changed, or any bytes."""
    tensors = mx.load(str(file))
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])

    def with_header(text: str) -> bytes:
        new = text.encode("utf-8", "surrogatepass")
        return len(new).to_bytes(8, "little") + new + content[8 + length :]

    changes: dict[str, Callable[[mx.array], mx.array]] = {
        "flat": lambda a: a.reshape(-1),
        "wide": lambda a: mx.concatenate([a, a], axis=0) if a.ndim else a,
        "half": lambda a: a[: max(1, a.shape[0] // 2)] if a.ndim else a,
        "deep": lambda a: a[None],
        "int": lambda a: a.astype(mx.int32),
        "bf16": lambda a: a.astype(mx.bfloat16),
        "nan": lambda a: a * mx.nan,
        "inf": lambda a: a.astype(mx.float32) + mx.inf,
        "none": lambda a: a.reshape(-1)[:0],
    }

    def with_tensor(name: str, how: str) -> bytes:
        new = dict(tensors)
        array = new.pop(name)
        if how == "rename":
            new[name + ".odd"] = array
        elif how != "drop":
            new[name] = changes[how](array)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "x.safetensors")
            mx.save_safetensors(str(out), new)
            return out.read_bytes()

    return st.one_of(
        changed_bytes(content),
        changed_json(header).map(with_header),
        st.builds(
            with_tensor,
            one_of(sorted(tensors)),
            st.sampled_from((*changes, "drop", "rename")),
        ),
    )


class Broken(Exception):
    """An example did not end as it has to."""


def ends_well(arguments: list[str]) -> int:
    """The exit code of a command that said what was wrong in one line, if anything."""

    class Slow(BaseException):
        pass

    too_long = []

    def slow(_signum: int, _frame: FrameType | None) -> None:
        too_long.append(True)
        raise Slow

    out, err = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, slow)
    signal.alarm(LIMIT_SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command_line.run(arguments)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if too_long:
        raise Broken(f"{arguments}: more than {LIMIT_SECONDS} s")
    said = err.getvalue()
    if escape_controls(printed := out.getvalue() + said) != printed:
        raise Broken(f"{arguments}: printed control characters: {printed[:500]!r}")
    if code == 0 and "--json" in arguments and "--help" not in arguments:
        json.loads(out.getvalue(), parse_constant=_refuse_constant)
    if code == 70 or "this is a bug" in said:
        raise Broken(f"{arguments}: {said[:1000]}")
    # With --json, notes go to standard error too.
    last = said.splitlines(keepends=True)[-1:] if "--json" in arguments else [said]
    if code == 1 and not ("".join(last).startswith("error: ") and "".join(last).count("\n") == 1):
        raise Broken(f"{arguments}: said {said[:500]!r}")
    if code not in (0, 1) or len(said) > 2000:
        raise Broken(f"{arguments}: ended with {code}, said {said[:500]!r}")
    return code


def _refuse_constant(name: str) -> None:
    raise Broken(f"printed {name}, which is no JSON")


def peak_memory() -> int:
    """The most memory that this process has used, bytes."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


class Bench:
    """A folder in which examples are tried, with everything good in it that they are made of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.good = folder / "good"
        self.good.mkdir()
        words = ("yes", "no", "well")
        self.pairs = [
            {
                "prompt": [{"role": "user", "content": f"{i}: good?"}],
                "chosen": [{"role": "assistant", "content": words[i % 3]}],
                "rejected": [{"role": "assistant", "content": "never"}],
            }
            for i in range(8)
        ]
        self.rows = [
            *self.pairs[:2],
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"prompt": "a", "completion": "b", "label": True},
            {"prompt": "a", "completions": ["b", "c", "d"], "scores": [1, 2, 3.5]},
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        ]
        self.write("good/train.jsonl", "".join(json.dumps(row) + "\n" for row in self.pairs))
        self.write("good/valid.jsonl", json.dumps(self.pairs[0]) + "\n")
        run = ["dpo", *self.where(self.good), "--output", str(folder / "run")]
        if ends_well([*run, "--iters", "2", "--save-every", "1", "--samples", "0"]):
            raise Broken("what the examples are made of can't be trained")
        self.tried = 0

    def where(self, data: Path) -> list[str]:
        """Model, data and cache of a command."""
        small = ["--grad-accumulation-steps", "1", "--lora-rank", "2"]
        cache = ["--reference-cache", str(self.folder / "cache")]
        return ["--model", str(TINY), "--data", str(data), *small, *cache]

    def write(self, name: str, content: str | bytes) -> Path:
        """A file in the folder."""
        file = self.folder / name
        raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        file.write_bytes(raw)
        return file

    def fresh(self) -> Path:
        """A name for an output folder that is not there."""
        self.tried += 1
        return self.folder / f"out-{self.tried}"

    def leaves_nothing_torn(self, *folders: Path) -> None:
        """Refuse hidden partial files, and results that can't be read."""
        for folder in folders:
            if torn := list(folder.rglob("*.partial*")):
                raise Broken(f"left {torn}")
            for file in folder.glob("*.json"):
                json.loads(file.read_text())

    def try_data(self, name: str, content: str | bytes, command: str) -> None:
        """Data, as read before training."""
        file = self.write(name, content)
        if command == "data check":
            ends_well(["data", "check", "--model", str(TINY), "--data", str(file)])
            return
        out = self.fresh()
        arguments = [command, *_only(command, self.where(file)), "--output", str(out)]
        with mock.patch.object(loading, "load_module", _refuse):
            if ends_well(arguments) == 0:
                raise Broken("trained without a model")
        self.leaves_nothing_torn(out)
        shutil.rmtree(out, ignore_errors=True)

    def try_config(self, content: str | bytes, command: str) -> None:
        """A configuration file; there is no data, so nothing is ever trained."""
        file = self.write("config.yaml", content)
        data = ["--data", str(self.folder / "nowhere.jsonl"), "--model", str(TINY)]
        if ends_well([command, "-c", str(file), *data]) == 0:
            raise Broken("trained on nothing")

    def try_adapter(self, name: str, content: str | bytes) -> None:
        """An adapter folder with one file changed, as the start of a run of one update."""
        adapter = self.folder / "adapter"
        shutil.rmtree(adapter, ignore_errors=True)
        adapter.mkdir()
        for file in ("adapters.safetensors", "adapter_config.json"):
            shutil.copy(self.folder / "run" / file, adapter)
        self.write(f"adapter/{name}", content)
        out = self.fresh()
        where = [arg for arg in self.where(self.good) if arg not in ("--lora-rank", "2")]
        short = ["--iters", "1", "--samples", "0", "--val-batches", "0"]
        start = ["--init-adapter", str(adapter), "--output", str(out)]
        code = ends_well(["dpo", *where, *start, *short])
        self.leaves_nothing_torn(out)
        if code and (out / "adapters.safetensors").exists():
            raise Broken(f"{out}: a result in spite of an error")
        shutil.rmtree(out, ignore_errors=True)

    def try_run(self, name: str, content: str | bytes, sealed: bool) -> None:
        """A run folder with one file changed (and, if sealed, its checksum right), resumed."""
        run = self.folder / "resumed"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.folder / "run", run)
        shutil.rmtree(run / "checkpoints" / "0000002")
        self.write(f"resumed/{name}", content)
        folder = run / "checkpoints" / "0000001"
        if sealed and name.startswith("checkpoints/") and not name.endswith("manifest.json"):
            manifest = json.loads((folder / "manifest.json").read_text())
            file = self.folder / "resumed" / name
            manifest["files"][file.name] = {
                "bytes": file.stat().st_size,
                "blake2b": checkpoint._checksum(file),
            }
            (folder / "manifest.json").write_text(json.dumps(manifest))
        ends_well(["dpo", "--resume", str(run)])
        if torn := list(run.rglob("*.partial*")):
            raise Broken(f"left {torn}")

    def try_model(self, name: str, content: str | bytes, command: str) -> None:
        """A model folder with one file changed: its data is tokenised, or its weights loaded."""
        self.tried += 1
        model = self.folder / f"model-{self.tried}"
        shutil.copytree(TINY, model)
        (model / name).write_bytes(_encoded(content))
        data, out = str(self.good), self.fresh()
        arguments = [command, "--model", str(model), "--data", data]
        if command == "score":
            arguments += ["--logps", "--output", str(out), "--split", "valid"]
        ends_well(["data", "check", *arguments[1:]] if command == "check" else arguments)
        shutil.rmtree(model)
        out.unlink(missing_ok=True)

    def try_tool(self, name: str, content: str | bytes, command: str) -> None:
        """A run folder with one file changed, read by a command that uses runs."""
        run = self.folder / "used"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.folder / "run", run)
        self.write(f"used/{name}", content)
        out = self.fresh()
        model = ["--model", str(TINY), "--adapter-path", str(run)]
        rows = str(self.good / "valid.jsonl")
        arguments = {
            "report": ["report", str(run), "--output", str(out)],
            "compare": ["report", str(run), str(self.folder / "run"), "--output", str(out)],
            "score": ["score", *model, "--data", rows, "--output", str(out), "--json"],
            "rerank": ["rerank", *model, "--prompt", "a", "-n", "2", "--max-tokens", "3", "--json"],
            "eval": ["eval", *model, "--data", rows, "--sample-tokens", "3", "--json"],
            "fuse": ["fuse", *model, "--output", str(out), "--json"],
            "export": ["export", *model, "--output", str(out), "--json"],
            "plan": ["plan", "--command", "dpo", *model[:2], "--run", str(run), "--json"],
        }[command]
        ends_well(arguments)
        if out.exists():
            shutil.rmtree(out) if out.is_dir() else out.unlink()
        if torn := list(self.folder.glob(".*partial*")):
            raise Broken(f"{arguments}: left {torn}")

    def try_command_line(self, arguments: list[str]) -> None:
        """A command line with options of the command and values of other kinds."""
        with mock.patch.object(loading, "load_module", _refuse):
            ends_well(arguments)


def _encoded(content: str | bytes) -> bytes:
    return content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content


def _refuse(_: Path) -> Any:
    """Good data ends here: there is nothing more to read."""
    raise ModelError("this far and no further")


def _only(command: str, where: list[str]) -> list[str]:
    """Without the cache where the command has none; with a reward where it needs one."""
    if command in ("dpo", "kto"):
        return where
    return [*where[:-2], *(("--reward", "length") if command in ("ppo", "grpo") else ())]


def data_examples(bench: Bench) -> st.SearchStrategy[Any]:
    """Data files: JSON lines, an array, bytes."""
    lines = "".join(json.dumps(row) + "\n" for row in bench.pairs)
    rows = one_of(bench.rows).flatmap(changed_json)
    # Among good rows of the same kind, an odd one is found in the middle.
    text = st.builds(lambda row, n: lines * n + row + "\n", rows, st.integers(0, 2))
    array = rows.map(lambda row: f"[{json.dumps(bench.rows[0])}, {row}]")
    content = st.one_of(text, rows, array, changed_bytes(lines.encode()))
    names = st.sampled_from(("odd.jsonl", "odd.json"))
    raw = changed_bytes(b"PAR1" + bytes(40) + b"PAR1").map(lambda c: ("odd.parquet", c))
    commands = st.sampled_from(("data check", "dpo", "kto", "sft", "reward", "ppo", "grpo"))
    return st.tuples(st.one_of(st.tuples(names, content), raw), commands)


def config_examples(bench: Bench) -> st.SearchStrategy[Any]:
    """Configuration files of all training commands: a value, a key, bytes."""
    offline = (bench.folder / "run" / "config.yaml").read_text()
    rewards = {"reward": ("length", "regex(pattern='x')=0.5"), "ptx_data": "x", "ptx_coef": 0.1}
    configs = [(offline, command) for command in ("dpo", "kto", "sft", "reward")]
    configs += [(to_yaml(PPOConfig(**rewards)), "ppo")]
    configs += [(to_yaml(GRPOConfig(reward=rewards["reward"])), "grpo")]
    return st.one_of([changed_config(text, command) for text, command in configs])


def changed_config(text: str, command: str) -> st.SearchStrategy[Any]:
    """A command's configuration with one value replaced, or with its bytes changed."""
    lines = [line for line in text.splitlines() if not line.startswith(("-", " "))]
    names = [line.split(":")[0] for line in lines]

    def with_value(index: int, odd: str, laughs: bool) -> str:
        new = list(lines)
        new[index] = f"{names[index]}: {odd}"
        return (LAUGHS if laughs else "") + "\n".join(new) + "\n"

    values = st.builds(
        with_value,
        st.integers(0, len(lines) - 1),
        one_of((*ODD, *ODD_YAML)),
        st.booleans(),
    )
    whole = one_of((*ODD, *ODD_YAML, LAUGHS, LAUGHS + "beta: *x39\n"))
    content = st.one_of(values, whole, changed_bytes(text.encode()))
    return st.tuples(content, st.just(command))


def adapter_examples(bench: Bench) -> st.SearchStrategy[Any]:
    """Adapter folders: configuration or tensors."""
    run = bench.folder / "run"
    config = (run / "adapter_config.json").read_text()
    configs = st.one_of(changed_json(json.loads(config)), changed_bytes(config.encode()))
    return st.one_of(
        configs.map(lambda c: ("adapter_config.json", c)),
        changed_tensors(run / "adapters.safetensors").map(lambda c: ("adapters.safetensors", c)),
    )


def run_examples(bench: Bench) -> st.SearchStrategy[Any]:
    """Run folders: what a resumed run reads."""
    run = bench.folder / "run"
    folder = "checkpoints/0000001/"
    tensors = [folder + name for name in ("adapters.safetensors", "policy.optimizer.safetensors")]
    objects = [folder + "state.json", folder + "manifest.json", "fingerprints.json"]
    objects += ["reference.json"]
    texts = ["metrics.jsonl", "config.yaml", *objects]
    files = [
        *(changed_tensors(run / n).map(lambda c, n=n: (n, c)) for n in tensors),
        *(
            changed_json(json.loads((run / n).read_text())).map(lambda c, n=n: (n, c))
            for n in objects
        ),
        *(changed_bytes((run / n).read_bytes()).map(lambda c, n=n: (n, c)) for n in texts),
        *(
            changed_json(json.loads(line)).map(lambda c: ("metrics.jsonl", c + "\n"))
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ),
    ]
    return st.tuples(st.one_of(files), st.booleans())


# Chat templates that don't end, take all memory, or write without end; and some that are wrong.
ODD_TEMPLATES = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a'.center(3 * 10**9) }}",
    "{% set x = 9**(9**9) %}",
    "{% set n = namespace(t='a') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "{{ 'ab' * 4000000 }}",
    "{{ raise_exception('\x1b[2J') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages[0].content.format(messages) }}{{ '{0.__class__}'.format(1) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% include '/etc/passwd' %}",
    *("{{", "{% for %}", "{{ x.y.z }}", "", "\x1b[2J{{ messages }}", "{{ 1 / 0 }}"),
)


def model_examples(bench: Bench) -> st.SearchStrategy[Any]:
    """Model folders: configurations, the tokenizer, the chat template, weights."""
    objects = [name for name in ("config.json", "tokenizer_config.json") if (TINY / name).exists()]
    config = json.loads((TINY / "config.json").read_text())
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    tokenizer["model"] = {
        k: v for k, v in tokenizer["model"].items() if k not in ("vocab", "merges")
    }
    weights = next(TINY.glob("*.safetensors"))

    def whole(text: str) -> str:
        """The changed parts of a tokenizer together with its vocabulary, if they are JSON still."""
        try:
            changed = json.loads(text)
            kept = json.loads((TINY / "tokenizer.json").read_text())["model"]
            changed["model"] = {**kept, **changed["model"]}
            return json.dumps(changed)
        except (ValueError, TypeError, KeyError, RecursionError):
            return text

    files = [
        *(
            changed_json(json.loads((TINY / n).read_text())).map(lambda c, n=n: (n, c))
            for n in objects
        ),
        changed_json({**config, "rope_scaling": {"type": "linear", "factor": 2.0}}).map(
            lambda c: ("config.json", c)
        ),
        changed_json(tokenizer).map(lambda c: ("tokenizer.json", whole(c))),
        changed_bytes((TINY / "config.json").read_bytes()).map(lambda c: ("config.json", c)),
        changed_tensors(weights).map(lambda c: (weights.name, c)),
        one_of(ODD_TEMPLATES).map(lambda c: ("chat_template.jinja", c)),
        changed_bytes(b"{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}").map(
            lambda c: ("chat_template.jinja", c)
        ),
        one_of(ODD).map(lambda c: ("generation_config.json", c)),
    ]
    return st.tuples(st.one_of(files), st.sampled_from(("check", "score")))


def tool_examples(bench: Bench) -> st.SearchStrategy[Any]:
    """Run folders: what reports, scores, fusing and the others read."""
    run = bench.folder / "run"
    objects = ("adapter_config.json", "summary.json", "status.json", "fingerprints.json")
    files = [
        *(
            changed_json(json.loads((run / n).read_text())).map(lambda c, n=n: (n, c))
            for n in objects
        ),
        *(
            changed_bytes((run / n).read_bytes()).map(lambda c, n=n: (n, c))
            for n in ("metrics.jsonl", "config.yaml", "samples.jsonl", *objects)
            if (run / n).exists()
        ),
        *(
            changed_json(json.loads(line)).map(lambda c: ("metrics.jsonl", c + "\n"))
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ),
        changed_tensors(run / "adapters.safetensors").map(lambda c: ("adapters.safetensors", c)),
    ]
    commands = ("report", "compare", "score", "rerank", "eval", "fuse", "export", "plan")
    return st.tuples(st.one_of(files), st.sampled_from(commands))


ODD_VALUES = (
    *("", " ", "-1", "0", "1", "2", "1e999", "nan", "-0", "1_0", "x", "=", "a=b", "a=", ",", "--"),
    *("..", "../x", "/dev/null", "/dev/zero", "/proc/self/mem", "~nobody/x", "{}", "[1]", "a:b"),
    *("\x1b[2J", "\udcff", "é🙂", "a" * 5000, "%s", "regex(pattern='(')", "length(target=1)=nan"),
    *("run", "good", "good/train.jsonl", str(TINY), "sigmoid", "lora", "train", "8"),
)
# They open a browser, or delete what other examples need.
NOT_TRIED = ("open", "purge")


def command_examples(bench: Bench) -> st.SearchStrategy[Any]:
    """Command lines of all commands."""
    # The self-test takes minutes, as it says.
    commands = {k: command for k, command in cli.commands.items() if k not in ("data", "selftest")}
    for name, command in cli.commands["data"].commands.items():  # type: ignore[attr-defined]
        commands[f"data {name}"] = command

    def arguments(name: str) -> st.SearchStrategy[list[str]]:
        options = [p for p in commands[name].params if p.name not in NOT_TRIED]
        flags = sorted({flag for option in options for flag in option.opts if flag[0] == "-"})
        values = one_of(ODD_VALUES)
        option = st.tuples(st.sampled_from([*flags, "--help", "--odd"]), values).map(list)
        words = st.lists(st.one_of(option, option, values.map(lambda v: [v])), max_size=5)
        usual = ["--model", str(TINY), "--data", str(bench.good)]
        start = st.sampled_from(([], usual, usual[:2]))
        return st.builds(
            lambda first, rest: [*name.split(), *first, *(w for part in rest for w in part)],
            start,
            words,
        )

    return st.sampled_from(sorted(commands)).flatmap(arguments)


TARGETS: dict[str, tuple[float, Callable[[Bench], Any], Callable[[Bench, Any], None]]] = {
    # Share of the examples, how they are made, how one is tried.
    "data": (0.35, data_examples, lambda b, e: b.try_data(*e[0], e[1])),
    "config": (0.25, config_examples, lambda b, e: b.try_config(*e)),
    "adapter": (0.1, adapter_examples, lambda b, e: b.try_adapter(*e)),
    "run": (0.05, run_examples, lambda b, e: b.try_run(*e[0], e[1])),
    "model": (0.1, model_examples, lambda b, e: b.try_model(*e[0], e[1])),
    "tools": (0.05, tool_examples, lambda b, e: b.try_tool(*e[0], e[1])),
    "command": (0.1, command_examples, lambda b, e: b.try_command_line(e)),
}


@contextlib.contextmanager
def loaded_once() -> Any:
    """Within the block, the tiny model's tokenizer is read from disk once."""
    load, kept = loading.load_tokenizer, {}

    def cached(path: Path, config: dict[str, Any]) -> Any:
        if path != TINY:
            return load(path, config)
        if path not in kept:
            kept[path] = load(path, config)
        return kept[path]

    # Templates without end are among the examples; the real limit would make up most of the time.
    with (
        mock.patch.object(loading, "load_tokenizer", cached),
        mock.patch.object(templates, "MAX_SECONDS", 1.0),
    ):
        yield


def fuzz(bench: Bench, target: str, examples: int, number: int, *, shrink: bool = True) -> int:
    """Try so many examples of a target; how many were tried.

    What breaks is made as small as it can be, which takes a while, unless `shrink` is false.

    Raises:
        Broken: One did not end well; hypothesis says the smallest it found.
    """
    _, make, attempt = TARGETS[target]
    tried = 0

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(make(bench))
    def each(example: Any) -> None:
        nonlocal tried
        tried += 1
        before = peak_memory()
        attempt(bench, example)
        if tried > 5 and peak_memory() > before + LIMIT_BYTES:
            raise Broken(f"{example!r:.500}: needs {(peak_memory() - before) / 1e9:.1f} GB more")

    each()
    return tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=LIMIT_SECONDS, help="seconds per example")
    options = parser.parse_args()
    globals()["LIMIT_SECONDS"] = options.limit
    names = options.targets.split(",")
    shares = {name: TARGETS[name][0] for name in names}
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    cache = tempfile.mkdtemp()
    os.environ["XDG_CACHE_HOME"] = os.environ["HOME"] = cache
    with tempfile.TemporaryDirectory() as folder, loaded_once():
        # A configuration or a command line may name any output: it is written here.
        os.chdir(folder)
        bench = Bench(Path(folder))
        for name in names:
            began = time.perf_counter()
            wanted = round(options.examples * shares[name] / sum(shares.values()))
            tried = fuzz(bench, name, wanted, options.seed)
            print(f"{name}: {tried} examples, {time.perf_counter() - began:.0f} s", flush=True)
    shutil.rmtree(cache, ignore_errors=True)


if __name__ == "__main__":
    main()
