"""The base model of the adapters, and the plan of a bank on it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from torch import nn

from ..bank.task import DTYPES
from ..errors import CheckpointError, ConfigError
from ..files.adapter_folder import CONFIG
from ..sharing.plan import Plan
from ..training.base_model import load_model, load_part, locate
from ..tuner.config import LotrConfig
from ..tuner.factors import set_ranks
from ..tuner.names import linear_paths
from ..tuner.targets import plan_adapter
from .sources import Source

#: Of a mode, `task` alone says that nothing else is shared.
MODES = ("task", "layer", "projection")
CORES = ("free", "diagonal")


def is_same_base(one: str, other: str) -> bool:
    """Whether two names or folders end alike: where a model lies may differ."""
    return PurePath(one).name == PurePath(other).name


def check_same_base(source: Source, told: str | None) -> None:
    """Refuse an adapter that tells another base model than most."""
    own, path = source.base_model, source.folder.path
    if own and told and not is_same_base(own, told):
        raise CheckpointError(
            f"{path} was trained on {own!r}, and the others on {told!r}. A bank has one base model: compress them "
            f"apart. If both are the same weights, correct base_model_name_or_path in {path / CONFIG}."
        )


def load_base(
    base: str | nn.Module | None, sources: Sequence[Source], labels: int = 2, dtype: str = "bfloat16"
) -> tuple[str | None, nn.Module, str | None]:
    """Return name and model of the base, with the head that its adapters have, and the name that most of these tell."""
    from transformers import AutoModel

    names = Counter(source.base_model for source in sources if source.base_model)
    told = names.most_common(1)[0][0] if names else None
    if isinstance(base, nn.Module):
        return told, base, told
    name, kind = base or told, sources[0].kind
    if name is None:
        raise ConfigError("No adapter tells its base model. Name it with --base.")
    if kind is None:
        return locate(name)[1], load_part(AutoModel, name, "model", dtype=DTYPES[dtype]), told
    classes = tuple(map(str, range(labels))) if kind == "classification" else ()
    return locate(name)[1], load_model(name, kind, classes, dtype), told


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return path and shape `(out, in)` of every linear module."""
    paths = linear_paths(model)
    return plan_adapter(model, LotrConfig(r=1, modes=(), target_modules=paths), set(paths)).shape_of


def bank_config(
    model: nn.Module, modules: Sequence[str], modes: Sequence[str], core: str, task_types: set[str | None]
) -> LotrConfig:
    """Return the configuration of a basis for some modules, at rank 1; `with_ranks` gives it its ranks."""
    odd = [mode for mode in modes if mode not in MODES]
    if odd:
        raise ConfigError(f"modes={tuple(modes)!r} names {odd[0]!r}. Tasks share along: {', '.join(MODES)}.")
    if core not in CORES:
        raise ConfigError(f"core={core!r} is none. Use one of: {', '.join(CORES)}.")
    shared = tuple(mode for mode in modes if mode != "task")
    if core == "diagonal" and len(shared) == 2:
        shared = ("site",)  # one diagonal a site: along two modes it would be a product
    config = LotrConfig(
        r=1,
        modes=shared,
        core="cp" if core == "diagonal" else "free",
        target_modules=sorted(modules),
        task_type=next(iter(task_types)) if len(task_types) == 1 else None,
    )
    config.targets = [target.to_dict() for target in plan_adapter(model, config, set(modules)).targets]
    return config


def with_ranks(config: LotrConfig, ranks: Mapping[str, int]) -> tuple[LotrConfig, Plan]:
    """Return a configuration whose groups have some ranks, and its plan."""
    config = copy.deepcopy(config)
    return config, set_ranks(config, {name: (rank, rank) for name, rank in ranks.items()})
