"""Loading is reading: no pickle, no code from data or models, nothing but safe loaders."""

import ast
import json
import shutil

import pytest
from helpers.data import write_rows
from helpers.paths import ROOT, TINY_MODEL
from helpers.runs import mlx_align

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "runpy", "code"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
# Called with arguments that make them safe, or not at all.
YAML_LOADERS = {"load", "load_all", "full_load", "unsafe_load", "unsafe_load_all"}


@pytest.mark.parametrize(
    "file", sorted((ROOT / "mlx_align").rglob("*.py")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_the_package_calls_nothing_that_executes_data(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {a.name.split(".")[0] for a in node.names} & FORBIDDEN_MODULES, file
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in FORBIDDEN_MODULES, file
        elif isinstance(node, ast.Call):
            _check_call(node, file)


def _check_call(node, file):
    where = f"{file}:{node.lineno}"
    if isinstance(node.func, ast.Name):
        assert node.func.id not in FORBIDDEN_CALLS, where
    if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        module, name = node.func.value.id, node.func.attr
        assert not (module == "yaml" and name in YAML_LOADERS), where
        assert not (module in ("np", "numpy") and name == "load"), where
        assert module != "torch", where
        assert not (module == "os" and name in ("system", "popen")), where
    for keyword in node.keywords:
        if keyword.arg in ("trust_remote_code", "allow_pickle"):
            assert isinstance(keyword.value, ast.Constant), where
            assert keyword.value.value is False, where


@pytest.mark.parametrize("kind", ["tokenizer", "model", "template"])
def test_code_in_a_model_folder_is_not_executed(tmp_path, capsys, kind):
    """Code in a model folder would leave a file; none is left."""
    model, trace = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(TINY_MODEL, model)
    (model / "own.py").write_text(
        f"open({str(trace)!r}, 'w').write('yes')\n"
        "class Own: pass\nclass Model: pass\nclass ModelArgs: pass\n"
    )
    config_file, tokenizer_file = model / "config.json", model / "tokenizer_config.json"
    config = json.loads(config_file.read_text())
    tokenizer = json.loads(tokenizer_file.read_text()) if tokenizer_file.exists() else {}
    if kind == "tokenizer":
        tokenizer |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
        config["auto_map"] = {"AutoConfig": "own.Own", "AutoTokenizer": "own.Own"}
    elif kind == "model":
        config |= {"model_file": "own.py", "auto_map": {"AutoModelForCausalLM": "own.Own"}}
    else:
        tokenizer |= {"chat_template_type": "..models.own", "tool_parser_type": "os.system"}
    config_file.write_text(json.dumps(config))
    tokenizer_file.write_text(json.dumps(tokenizer))
    rows = [{"prompt": f"{i}?", "chosen": " yes", "rejected": " no"} for i in range(4)]
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    where = ("--model", model, "--data", data, "--output", tmp_path / "run")
    assert mlx_align("dpo", *where, "--iters", 1, "--samples", 0) in (0, 1)
    error = capsys.readouterr().err
    assert error.count("\n") <= 1
    assert not trace.exists()


def test_files_outside_of_the_model_folder_are_not_read(tmp_path, capsys):
    """A manifest or index that names files elsewhere: they are not read, nor written."""
    model = tmp_path / "model"
    shutil.copytree(TINY_MODEL, model)
    weights = next(model.glob("*.safetensors"))
    outside = tmp_path / "outside.safetensors"
    shutil.move(weights, outside)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4
    data = write_rows(tmp_path / "pairs.jsonl", rows)
    assert mlx_align("dpo", "--model", model, "--data", data, "--output", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
