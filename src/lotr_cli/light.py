"""Modules of the library that need the standard library alone, for `--help` and for tables.

Importing any `lotr.x` runs `lotr/__init__`, which imports torch and peft: four seconds. This is the one place that goes
around it: the file of such a module is run under its own name, so that the library finds the same classes later.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType


def load(name: str) -> ModuleType:
    """Return a module such as `lotr.methods`; those it imports from the library were loaded before it."""
    if name in sys.modules or "lotr" in sys.modules:
        return importlib.import_module(name)
    package = find_spec("lotr")  # does not import it
    assert package is not None and package.origin is not None
    path = Path(package.origin).parent.joinpath(*name.split(".")[1:]).with_suffix(".py")
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


load("lotr.errors")  # the others import it
