"""How the core `C_s` of a site is built: one structure a file, all under one contract."""

from __future__ import annotations

from .base import Core, Index, Numbers, Region, Shapes
from .cp import CPCore
from .free import FreeCore
from .identity import IdentityCore
from .scaled_cp import ScaledCPCore
from .tt import TTCore
from .tucker import TuckerCore

CORES: dict[str, type[Core]] = {
    "free": FreeCore,
    "identity": IdentityCore,
    "tucker": TuckerCore,
    "cp": CPCore,
    "scaled_cp": ScaledCPCore,
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
    "ScaledCPCore",
    "Shapes",
    "TTCore",
    "TuckerCore",
]
