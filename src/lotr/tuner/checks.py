"""What a configuration may say: values, and what has no meaning beside what."""

from __future__ import annotations

import math
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


def check_is_lotr(config: Any) -> None:
    """Refuse a configuration of another method, which shares nothing (ConfigError)."""
    if getattr(config, "peft_type", None) != "LOTR":
        raise ConfigError(
            f"{type(config).__name__} is no LotrConfig, so there are no shared factors to plan."
        )


def one_of(name: str, value: str, known: Iterable[str]) -> str:
    """Return a value; refuse one that is not among those known."""
    if value not in known:
        raise ConfigError(f"{name}={value!r} is not known. {near(str(value), known)}")
    return value


def check_kinds(c: Any) -> None:  # a LotrConfig, whose file imports this one
    """Refuse fields of another type (ConfigError, which names the field)."""
    for name in ("dropout", "scaling", "alpha", "seed"):
        value, kinds = getattr(c, name), (int,) if name == "seed" else (int, float)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
            raise ConfigError(
                f"{name}={value!r} is not a number{' without a fraction' if name == 'seed' else ''}."
            )
    if c.init_weights not in (None, True, False):
        raise ConfigError(
            f"init_weights={c.init_weights!r} is neither True, for an update of zero, nor False. A start has a name in "
            'init, for example init="gaussian".'
        )
    if c.target_modules is not None and not c.target_modules and not c.target_parameters:
        raise ConfigError(
            f"target_modules={c.target_modules!r} names no module. Leave it out for the usual ones of the architecture."
        )
    if isinstance(c.layers_to_transform, str):
        raise ConfigError(
            f"layers_to_transform={c.layers_to_transform!r} is no list of numbers. Leave it out for all layers."
        )


def check_fields(c: Any) -> None:
    """Refuse fields out of their range (ConfigError, which names the field)."""
    if not 0.0 <= c.dropout < 1.0:
        raise ConfigError(f"dropout={c.dropout} is not a probability below one. Use 0 <= dropout < 1.")
    if not 0 < c.scaling < math.inf:
        raise ConfigError(f"scaling={c.scaling} leaves nothing to train. Use a positive number.")
    if (n := c.layers_per_group) is not None:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ConfigError(f"layers_per_group={n!r} is no number of layers. Use 1 or more.")
        if not {"layer", "site"} & set(c.modes):
            raise ConfigError(
                f"layers_per_group={n} groups layers, and modes={c.modes} share along none. Drop it."
            )
    if c.layers_pattern and c.layers_to_transform is None:
        raise ConfigError("layers_pattern is set but layers_to_transform is not. Name the layers too.")


def check_meaning(c: Any) -> None:
    """Refuse fields that have no meaning beside each other (ConfigError, which names the field)."""
    core, rule = CORES[c.core], MAGNITUDES[c.magnitude]
    for k, r in c.ranks:
        core.check(k, r, c.modes)
    if "head" in c.modes and not c.blocks.startswith("head"):
        raise ConfigError(
            f'modes={c.modes!r} names "head", but blocks={c.blocks!r} cuts no weight into heads. Use blocks="head".'
        )
    if "task" in c.modes and c.core != "tt":
        raise ConfigError(
            f'modes={c.modes!r} names "task", which is a core of a tensor train, and core={c.core!r} is none. Use '
            'core="tt", or leave it out: every adapter on a basis is a task of a bank.'
        )
    if core.is_identity and c.trainable == "cores":
        raise ConfigError(
            f"trainable='cores' with core={c.core!r} leaves nothing to train. Use trainable='all', or another core."
        )
    if core.is_identity and c.zero == "core":
        raise ConfigError(f"zero='core' with core={c.core!r}, which has no numbers. Use zero='output'.")
    if c.core_init == "kaiming" and not core.by_site:
        raise ConfigError(
            f"core_init='kaiming' starts the matrices of sites, and core={c.core!r} has none. Use core='free', or "
            "core_init='uniform'."
        )
    if c.init == "first_step" and c.core != "free":
        raise ConfigError(
            f"init='first_step' sets a core a site, and core={c.core!r} has others. Use core='free'."
        )
    if c.dropout_place == "components" and core.component_axes is None:
        raise ConfigError(
            f"dropout_place='components' with core={c.core!r}, which is no sum of components. Use a Tucker or CP core, "
            "or dropout_place='core_output'."
        )
    if c.zero == "none" and c.init_weights:
        raise ConfigError(
            "init_weights=True starts the update at zero, and zero='none' nothing. Leave one out."
        )
    if rule.divides_by_update and c.scaling != 1:
        raise ConfigError(
            f"scaling={c.scaling} has no effect with magnitude={c.magnitude!r}, which divides the update by its norm. "
            "Leave scaling and alpha out; the trained size of the update starts at zero."
        )
    if rule.divides_by_update and c.init_weights:
        raise ConfigError(
            f"init_weights=True starts the update at zero, and magnitude={c.magnitude!r} divides by its norm. "
            "Leave init_weights out; step 0 is the base model all the same."
        )
    if rule.additive and c.norm_gradient:
        raise ConfigError(
            f"norm_gradient=True has no meaning with magnitude={c.magnitude!r}, which has no norms. Leave it out."
        )
    if not rule.additive and c.lora_bias:
        raise ConfigError(
            f"lora_bias=True adds to biases, and magnitude={c.magnitude!r} rescales what is added. Leave one out: "
            "lora_bias=False, or magnitude='none'."
        )
    _check_core_ranks(c)
    if c.basis is None and c.targets is None:
        _check_start(c)


def _check_core_ranks(c: Any) -> None:
    if c.core_ranks is None:
        return
    if not CORES[c.core].has_ranks:
        raise ConfigError(f"core_ranks={c.core_ranks!r} has no meaning with core={c.core!r}. Leave it out.")
    unknown = sorted(set(c.core_ranks) - set(c.modes)) if isinstance(c.core_ranks, dict) else []
    if unknown:
        raise ConfigError(
            f"core_ranks names {unknown[0]!r}, which is not among modes={c.modes!r}. Name those."
        )
    if not _are_sizes(c.core_ranks.values() if isinstance(c.core_ranks, dict) else [c.core_ranks]):
        raise ConfigError(f"core_ranks={c.core_ranks!r} holds no ranks. Use positive integers.")


def _check_start(c: Any) -> None:
    """Refuse a start that the adapter, whose factors are not there yet, could not train from."""
    turned, at_zero = c.init in DATA_INITS, c.zero in ("output", "input")
    if at_zero and c.trainable == "cores":
        raise ConfigError(
            f"zero={c.zero!r} with trainable='cores' keeps a factor at zero, so nothing would train. Use zero='core'."
        )
    if at_zero and turned and not CORES[c.core].is_identity:
        raise ConfigError(
            f"zero={c.zero!r} starts a factor at zero, and init={c.init!r} turns it. Use zero='core'."
        )
    if turned and MAGNITUDES[c.magnitude].divides_by_update:
        raise ConfigError(
            f"init={c.init!r} looks at gradients where the update is zero, and magnitude={c.magnitude!r} divides by "
            'its norm, so it never is. Use init="orthonormal" or "weight", or another magnitude.'
        )


def checked_rank(name: str, r: Any) -> int | tuple[int, int]:
    """Return the rank of the field `name` as a configuration has it: one number, or `(k, r)` where they differ."""
    numbers = [r] if isinstance(r, int) else list(r) if isinstance(r, list | tuple) else []
    if not _are_sizes(numbers) or len(numbers) not in (1, 2):
        raise ConfigError(f"{name}={r!r} is not a rank. Use a positive integer, or a pair (k, r) of them.")
    return numbers[0] if numbers[0] == numbers[-1] else (numbers[0], numbers[-1])


def _are_sizes(numbers: Iterable[Any]) -> bool:
    return all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in numbers)
