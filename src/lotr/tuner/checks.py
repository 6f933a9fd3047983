"""What a configuration may say: values, and what has no meaning beside what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import CheckpointError, ConfigError, near
from ..math.cores import CORES
from ..math.init import DATA_INITS
from ..math.magnitude import MAGNITUDES

#: Version of the adapter folders that this code writes and reads: 2 has the keys of `sharing.keys`.
FORMAT = 2


def check_format(fields: Mapping[str, Any]) -> None:
    """Refuse the configuration of an adapter that another version of the library saved (CheckpointError)."""
    if fields.get("targets") is not None and fields.get("format") != FORMAT:
        raise CheckpointError(
            f"The adapter was saved in format {fields.get('format') or 1}, and this version of lotr reads format "
            f"{FORMAT} alone. Train it again, or export it as a LoRA with the version that saved it."
        )


def one_of(name: str, value: str, known: Iterable[str]) -> str:
    """Return a value; refuse one that is not among those known."""
    if value not in known:
        raise ConfigError(f"{name}={value!r} is not known. {near(str(value), known)}")
    return value


def check_core(
    core: str,
    modes: tuple[str, ...],
    blocks: str,
    ranks: Iterable[tuple[int, int]],
    core_ranks: int | dict[str, int] | None,
    trainable: str,
) -> None:
    """Refuse a structure of the cores that has no meaning beside the other fields."""
    for k, r in ranks:
        CORES[core].check(k, r, modes)
    if "head" in modes and not blocks.startswith("head"):
        raise ConfigError(
            f'modes={modes!r} names "head", but blocks={blocks!r} cuts no weight into heads. Use blocks="head".'
        )
    if "task" in modes and core != "tt":
        raise ConfigError(
            f'modes={modes!r} names "task", which is a core of a tensor train, and core={core!r} is none. Use '
            'core="tt", or leave it out: every adapter on a basis is a task of a bank.'
        )
    if trainable == "cores" and CORES[core].is_identity:
        raise ConfigError(
            f"trainable='cores' with core={core!r} leaves nothing to train. Use trainable='all', or another core."
        )
    if core_ranks is None:
        return
    if not CORES[core].has_ranks:
        raise ConfigError(f"core_ranks={core_ranks!r} has no meaning with core={core!r}. Leave it out.")
    unknown = sorted(set(core_ranks) - set(modes)) if isinstance(core_ranks, dict) else []
    if unknown:
        raise ConfigError(f"core_ranks names {unknown[0]!r}, which is not among modes={modes!r}. Name those.")
    if not _are_sizes(core_ranks.values() if isinstance(core_ranks, dict) else [core_ranks]):
        raise ConfigError(f"core_ranks={core_ranks!r} holds no ranks. Use positive integers.")


def check_zero(
    zero: str, core: str, init: str, trainable: str, init_weights: bool | None, is_new: bool
) -> None:
    """Refuse a zero that leaves nothing to train, or that other fields exclude.

    Raises:
        ConfigError: The message names the field.
    """
    if zero == "core" and CORES[core].is_identity:
        raise ConfigError(f"zero='core' with core={core!r}, which has no numbers. Use zero='output'.")
    if init == "first_step" and core != "free":
        raise ConfigError(
            f"init='first_step' sets a core a site, and core={core!r} has others. Use core='free'."
        )
    if zero == "none" and init_weights:
        raise ConfigError(
            "init_weights=True starts the update at zero, and zero='none' nothing. Leave one out."
        )
    if zero not in ("output", "input") or not is_new:
        return
    if trainable == "cores":
        raise ConfigError(
            f"zero={zero!r} with trainable='cores' keeps a factor at zero, so nothing would train. Use zero='core'."
        )
    if init in DATA_INITS and not CORES[core].is_identity:
        raise ConfigError(
            f"zero={zero!r} starts a factor at zero, and init={init!r} turns it. Use zero='core'."
        )


def check_magnitude(
    magnitude: str,
    init: str,
    scaling: float,
    init_weights: bool | None,
    norm_gradient: bool,
    is_new: bool,
) -> None:
    """Refuse fields that have no meaning beside the magnitude; `is_new` where the factors have still to start."""
    rule = MAGNITUDES[magnitude]
    if rule.divides_by_update and scaling != 1:
        raise ConfigError(
            f"scaling={scaling} has no effect with magnitude={magnitude!r}, which divides the update by its norm. "
            "Leave scaling and alpha out; the trained size of the update starts at zero."
        )
    if rule.divides_by_update and init_weights:
        raise ConfigError(
            f"init_weights=True starts the update at zero, and magnitude={magnitude!r} divides by its norm. "
            "Leave init_weights out; step 0 is the base model all the same."
        )
    if rule.divides_by_update and init in DATA_INITS and is_new:
        raise ConfigError(
            f"init={init!r} looks at gradients where the update is zero, and magnitude={magnitude!r} divides by its "
            'norm, so it never is. Use init="orthonormal" or "weight", or another magnitude.'
        )
    if norm_gradient and rule.additive:
        raise ConfigError(
            f"norm_gradient=True has no meaning with magnitude={magnitude!r}, which has no norms. Leave it out."
        )


def checked_rank(name: str, r: Any) -> int | tuple[int, int]:
    """Return the rank of the field `name` as a configuration has it: one number, or `(k, r)` where they differ."""
    numbers = [r] if isinstance(r, int) else list(r) if isinstance(r, list | tuple) else []
    if not _are_sizes(numbers) or len(numbers) not in (1, 2):
        raise ConfigError(f"{name}={r!r} is not a rank. Use a positive integer, or a pair (k, r) of them.")
    return numbers[0] if numbers[0] == numbers[-1] else (numbers[0], numbers[-1])


def _are_sizes(numbers: Iterable[Any]) -> bool:
    return all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers)
