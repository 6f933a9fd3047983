"""The command line. A package of its own, because `lotr --help` answers before torch is imported.

Importing any `lotr.x` runs `lotr/__init__`, which imports torch and peft: four seconds. So the modules of the library
that need the standard library alone are imported here, in a package `lotr` that was found and not run, and that goes
again. The rest of the command line imports them as usual, and the library finds the same classes later.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec

if "lotr" not in sys.modules:
    spec = find_spec("lotr")
    assert spec is not None
    sys.modules["lotr"] = module_from_spec(spec)
    for name in ("errors", "methods", "training.settings", "training.tasks.settings", "serving.settings"):
        import_module(f"lotr.{name}")
    del sys.modules["lotr"]
