"""How the core `C_s` of a site is built: one structure a file, all under one contract."""

from __future__ import annotations

from ._core import Core, Index, Numbers, Region, Shapes
from ._cp import CPCore
from ._free import FreeCore
from ._identity import IdentityCore
from ._tt import TTCore
from ._tucker import TuckerCore

CORES: dict[str, type[Core]] = {
    "free": FreeCore,
    "identity": IdentityCore,
    "tucker": TuckerCore,
    "cp": CPCore,
    "tt": TTCore,
}

__all__ = [
    "CORES",
    "CPCore",
    "Core",
    "FreeCore",
    "IdentityCore",
    "Index",
    "Numbers",
    "Region",
    "Shapes",
    "TTCore",
    "TuckerCore",
]
