"""The words of PEFT's LoRA that have other names here, or no counterpart: each is answered by a sentence.

PEFT's optimisers that go by LoRA's names refuse here too.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from functools import wraps
from typing import Any

from peft import LoraConfig, optimizers

from ..errors import ConfigError
from .checks import checked_rank
from .group import LotrLayer

_LORA_INITS = {
    True: "leave it out",
    False: "use init_weights=False",
    "gaussian": 'use init="gaussian"',
    "orthogonal": 'use init="orthonormal"',
    "pissa": 'use init="weight"',
    "lora_ga": 'use init="gradient" and lotr.init_from_data(model, batches)',
}
_FROM_DATA = 'use init="gradient" and lotr.init_from_data(model, batches)'
#: Fields of LoraConfig whose counterpart does not depend on their value.
_COUNTERPARTS = {
    "fan_in_fan_out": "leave it out, the layout is read from the module",
    "alpha_pattern": "an adapter has one scaling; put modules with another one into a second adapter",
    "ensure_weight_tying": "tied weights are adapted one by one here, and merging unties them; leave it out",
    "eva_config": _FROM_DATA,
    "corda_config": _FROM_DATA,
    "lora_ga_config": _FROM_DATA,
    "loftq_config": 'a quantised base is not corrected; use init="weight" or leave it out',
    "layer_replication": "layers are not copied; replicate them in the base model first",
}
#: Arguments of PEFT's `add_weighted_adapter`, which approximates where sums here are exact.
_APPROXIMATIONS = (
    "svd_rank",
    "svd_clamp",
    "svd_full_matrices",
    "svd_driver",
    "density",
    "majority_sign_method",
)


def check_lora_words(fields: Mapping[str, Any], known: Container[str]) -> None:
    """Refuse keywords of PEFT's LoRA that are called otherwise here, with what to write instead; `known` are our own.

    Raises:
        ConfigError: The message has a sentence for every word.
    """
    rank, alpha = checked_rank("r", fields.get("r") or 16), fields.get("lora_alpha", 8)
    r = rank if isinstance(rank, int) else rank[1]
    is_rslora, start = bool(fields.get("use_rslora")), fields.get("init_lora_weights")
    scaling = f"scaling={alpha / (r**0.5 if is_rslora else r):g}"
    has_counterpart = isinstance(start, bool | str) and start in _LORA_INITS
    counterparts = {
        "lora_alpha": f"use {scaling}, LoRA's alpha / {'√r' if is_rslora else 'r'}",
        "lora_dropout": f"use dropout={fields.get('lora_dropout')}",
        "use_dora": 'use method="dora"' if fields.get("use_dora") else "leave it out",
        "use_rslora": f"use {scaling}, LoRA's alpha / √r" if is_rslora else "leave it out",
        "init_lora_weights": _LORA_INITS[start] if has_counterpart else 'use init, for example init="weight"',
    }
    for word in (*_COUNTERPARTS, *LoraConfig.__dataclass_fields__):
        if word not in counterparts and word not in known:
            counterpart = _COUNTERPARTS.get(word, "it has no counterpart here; use it with LoraConfig")
            counterparts[word] = counterpart if fields.get(word) else "leave it out"
    instead = [
        f"{word}={fields[word]!r}: {counterpart}"
        for word, counterpart in counterparts.items()
        if word in fields
    ]
    if instead:
        raise ConfigError(f"These are fields of LoraConfig with other names here. {'; '.join(instead)}.")


def check_combination_words(words: Mapping[str, Any]) -> None:
    """Refuse arguments of PEFT's `add_weighted_adapter` that approximate a sum.

    Raises:
        ConfigError: The message names what to use.
        TypeError: PEFT has no such argument either.
    """
    unknown = sorted(words.keys() - set(_APPROXIMATIONS))
    if unknown:
        raise TypeError(f"add_weighted_adapter() got an unexpected keyword argument {unknown[0]!r}")
    if words:
        shown = ", ".join(f"{word}={value!r}" for word, value in words.items())
        raise ConfigError(
            f"{shown}: sums of adapters are exact here, so nothing is cut or sampled. Leave it out; "
            "lotr.truncate(model, rank) makes the sum smaller."
        )


def refuse_adapters() -> None:
    """Make PEFT's optimisers for LoRA refuse adapters of this library, whose parameters they would pass over."""
    for name, file in (("create_loraplus_optimizer", "loraplus"), ("create_lorafa_optimizer", "lorafa")):
        checked = _checked(getattr(optimizers, name))
        for module in (optimizers, getattr(optimizers, file)):
            setattr(module, name, checked)


def _checked(create: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(create)
    def checked(model: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(module, LotrLayer) for module in model.modules()):
            raise ConfigError(
                f"{create.__name__} finds what it treats apart by LoRA's names (lora_A, lora_B), and would train every "
                "number of this adapter as plain AdamW does. Rates by part: torch.optim.AdamW(lotr.parameter_groups("
                'model)). Cores alone, as LoRA-FA trains B: LotrConfig(trainable="cores").'
            )
        return create(model, *args, **kwargs)

    return checked
