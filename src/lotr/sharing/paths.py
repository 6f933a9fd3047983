"""What a module's path says: its layer and its projection."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

# wrappers that put a component of their own into a module's path
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def normalise(path: str) -> str:
    """Return a module's path without the components that wrappers put in.

    Example:
        >>> normalise("_orig_mod.layers.0._fsdp_wrapped_module.q_proj")
        'layers.0.q_proj'
    """
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def exactly(path: str) -> str:
    r"""Return a key of a pattern of ranks that no module whose name merely ends alike matches.

    Example:
        >>> exactly("h.0.q")
        '^h\\.0\\.q'
    """
    return f"^{re.escape(path)}"


def run_of(path: str, layers: int) -> str:
    """Return the run of so many layers in order that a module is in, by the first number of its path.

    No other module has a say, so an adapter on a few layers has the groups of one on all.

    Example:
        >>> run_of("decoder.block.7.layer.0.q", 4), run_of("lm_head", 4)
        ('layers4to7', 'outside')
    """
    number = next((int(part) for part in normalise(path).split(".") if part.isdigit()), None)
    if number is None:
        return "outside"
    first = number // layers * layers
    return f"layers{first}to{first + layers - 1}"


def coordinates(paths: Sequence[str], layers_pattern: Sequence[str] = ()) -> dict[str, tuple[str, str]]:
    """Read layer and projection of every module from its path.

    The layer is the path up to its first number that varies; a module without a number is its own layer. The
    projection is the module's own name, or its path below the layer where one layer holds several modules of
    that name.

    Args:
        paths: All adapted modules: what varies, and which names are ambiguous, shows only side by side.
        layers_pattern: Names of the module lists whose number is the layer; default: found from the paths.

    Returns:
        Path → (layer, projection).

    Example:
        >>> coordinates(["h.0.attn.q", "h.0.attn.v", "h.1.attn.q"])["h.1.attn.q"]
        ('h.1', 'q')
    """
    parts = {path: normalise(path).split(".") for path in paths}
    numbers: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for split in parts.values():
        for at, part in enumerate(split):
            if part.isdigit():
                numbers[tuple(split[:at])].add(part)

    def layer_end(split: list[str]) -> int:
        places = [at for at, part in enumerate(split) if part.isdigit()]
        if layers_pattern:
            places = [at for at in places if at and split[at - 1] in layers_pattern]
        varying = (at for at in places if len(numbers[tuple(split[:at])]) > 1)
        return next(varying, places[0] if places else -1) + 1

    found: dict[str, tuple[str, str, str]] = {}  # layer, own name, path below the layer
    for path, split in parts.items():
        end = layer_end(split)
        below = split[end:] or [next((p for p in reversed(split[:end]) if not p.isdigit()), "module")]
        found[path] = (".".join(split[:end] or split), below[-1], ".".join(below))

    times = Counter((layer, name) for layer, name, _ in found.values())
    ambiguous = {name for (_, name), n in times.items() if n > 1}
    return {
        path: (layer, below if name in ambiguous else name) for path, (layer, name, below) in found.items()
    }
