"""Which fields of a configuration have no meaning beside each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..math.cores import CORES
from ..math.init import DATA_INITS
from ..math.magnitude import MAGNITUDES

if TYPE_CHECKING:
    from .config import LotrConfig


def check_meaning(config: LotrConfig) -> None:
    """Refuse fields that have no meaning beside each other.

    Raises:
        ConfigError: The message names the field.
    """
    assert config.core is not None and config.modes is not None and config.magnitude is not None
    ranks = {config.rank, *(pair(r) for r in config.rank_pattern.values())}
    for k, r in ranks:
        CORES[config.core].check(k, r, config.modes)
    if "head" in config.modes and config.blocks != "head":
        raise ConfigError(
            f'modes={config.modes!r} names "head", but blocks={config.blocks!r} cuts no weight into heads. Use '
            'blocks="head".'
        )
    if config.core_ranks is not None:
        _check_core_ranks(config)
    if config.trainable == "cores" and CORES[config.core].is_identity:
        raise ConfigError(
            f"trainable='cores' with core={config.core!r} leaves nothing to train. Use trainable='all', or "
            "another core."
        )
    never_zero = MAGNITUDES[config.magnitude].divides_by_update
    if never_zero and config.init_weights:
        raise ConfigError(
            f"init_weights=True starts the update at zero, and magnitude={config.magnitude!r} divides by its norm. "
            "Leave init_weights out; step 0 is the base model all the same."
        )
    fresh = config.basis is None and config.targets is None  # factors that were kept, or read, need no start
    if never_zero and config.init in DATA_INITS and fresh:
        raise ConfigError(
            f"init={config.init!r} looks at gradients where the update is zero, and magnitude={config.magnitude!r} "
            'divides by its norm, so it never is. Use init="orthonormal" or "weight", or another magnitude.'
        )
    if config.norm_gradient and MAGNITUDES[config.magnitude].additive:
        raise ConfigError(
            f"norm_gradient=True has no meaning with magnitude={config.magnitude!r}, which has no norms. Leave it "
            "out."
        )


def _check_core_ranks(config: LotrConfig) -> None:
    asked = config.core_ranks
    if not CORES[str(config.core)].has_ranks:
        raise ConfigError(f"core_ranks={asked!r} has no meaning with core={config.core!r}. Leave it out.")
    unknown = sorted(set(asked) - set(config.modes or ())) if isinstance(asked, dict) else []
    if unknown:
        raise ConfigError(
            f"core_ranks names {unknown[0]!r}, which is not among modes={config.modes!r}. Name those."
        )
    numbers = list(asked.values()) if isinstance(asked, dict) else [asked]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers):
        raise ConfigError(f"core_ranks={asked!r} holds no ranks. Use positive integers.")


def pair(r: int | tuple[int, int]) -> tuple[int, int]:
    """Return `(k, r)`.

    Example:
        >>> pair(8), pair((4, 8))
        ((8, 8), (4, 8))
    """
    return (r, r) if isinstance(r, int) else (r[0], r[1])


def plain(rank: tuple[int, int]) -> int | tuple[int, int]:
    """Return `(k, r)` as a configuration says it.

    Example:
        >>> plain((8, 8)), plain((4, 8))
        (8, (4, 8))
    """
    return rank[0] if rank[0] == rank[1] else rank


def checked_rank(name: str, r: Any) -> int | tuple[int, int]:
    """Return a rank as a configuration says it.

    Args:
        name: Field that the rank is of.
        r: What was given: a number, or a pair of them.

    Raises:
        ConfigError: It is no rank.
    """
    numbers = [r] if isinstance(r, int) else list(r) if isinstance(r, list | tuple) else []
    good = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers)
    if not good or len(numbers) not in (1, 2):
        raise ConfigError(f"{name}={r!r} is not a rank. Use a positive integer, or a pair (k, r) of them.")
    return plain((numbers[0], numbers[-1]))
