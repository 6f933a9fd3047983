"""How the core `C_s` of a site is built: one structure a file, all under one contract."""

from __future__ import annotations

from ._core import Core, Index
from ._free import FreeCore

CORES: dict[str, type[Core]] = {"free": FreeCore}

__all__ = ["CORES", "Core", "FreeCore", "Index"]
