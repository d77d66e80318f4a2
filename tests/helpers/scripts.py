"""The scripts of the repository as modules."""

import importlib.util
import sys
from functools import cache
from types import ModuleType

from helpers.paths import SCRIPTS


@cache
def load_script(name: str) -> ModuleType:
    """scripts/NAME.py, imported once; the search path for modules is as before."""
    path = list(sys.path)
    file = SCRIPTS / f"{name}.py"
    sys.path.insert(0, str(file.parent))  # as when it is run
    spec = importlib.util.spec_from_file_location(f"script_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module
