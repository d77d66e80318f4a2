"""Where the models and recorded numbers of the tests are."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = ROOT / "scripts"
STARTER = ROOT / "data" / "starter"
STARTER_MODEL = STARTER / "model"
ORACLE = ROOT / "tests" / "oracle"
# A random llama with a chat template, two blocks of width 64, in float32.
TINY_MODEL = ORACLE / "models" / "policy"
# Random classifiers with transformers' scores of some rows.
CLASSIFIERS = ORACLE / "classifiers"
