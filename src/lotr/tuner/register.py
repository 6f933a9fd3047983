"""The few lines that make PEFT know the method."""

from __future__ import annotations

from peft.utils import PeftType

from ..sharing.keys import PREFIX

NAME = "LOTR"


def add_peft_type() -> None:
    """Insert the member `PeftType.LOTR`, once.

    PEFT, transformers and TRL look the type up in the enum and read its `.value`; a plain string breaks
    them. The enum offers no public way to grow, so the member is made the way `enum` itself makes one.
    """
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType._member_names_)  # type: ignore[attr-defined]
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)


def register() -> None:
    """Register the method with PEFT, once.

    Raises:
        RuntimeError: Another package has already registered a method of this name.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import hotswap, register_peft_method

    from .config import LotrConfig
    from .hotswap import KEYS, keep_factors
    from .lora_words import refuse_adapters
    from .model import LotrModel
    from .to_lora import teach_conversion

    holder = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[NAME])
    if holder is not None and holder is not LotrConfig:
        raise RuntimeError(
            f"The PEFT method {NAME} is already registered by {holder.__module__}.{holder.__qualname__}. "
            "Only one package can hold it in one process; import only one of them."
        )
    if holder is None:
        register_peft_method(name=NAME.lower(), config_cls=LotrConfig, model_cls=LotrModel, prefix=PREFIX)
        hotswap.CONFIG_KEYS_TO_CHECK[PeftType[NAME]] = KEYS
        keep_factors()
        teach_conversion()
        refuse_adapters()
