"""The base model of the adapters, and the plan of a bank on it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from pathlib import PurePath

from torch import nn

from ..bank.basis import structure_of
from ..bank.task import DTYPES
from ..errors import CheckpointError, ConfigError
from ..files.adapter_folder import CONFIG
from ..sharing.plan import Plan
from ..training.base_model import load_model, load_part, locate
from ..tuner.config import LotrConfig
from ..tuner.experts import is_plain_stack, stacked_weights
from ..tuner.factors import set_ranks
from ..tuner.names import linear_paths
from ..tuner.targets import plan_adapter
from .sources import Source

#: Of a mode, `task` alone says that nothing else is shared.
MODES = ("task", "layer", "projection", "expert")
CORES = ("free", "diagonal")
WEIGHTS = ("relative", "absolute")


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
    for source in sources:  # before a model is loaded that is none of most
        check_same_base(source, told)
    if isinstance(base, nn.Module):
        return told, base, told
    name, kind = base or told, sources[0].kind
    if name is None:
        raise ConfigError("No adapter tells its base model. Name it with --base.")
    if kind is None:
        return locate(name)[1], load_part(AutoModel, name, "model", dtype=DTYPES[dtype]), told
    classes = tuple(map(str, range(labels))) if kind == "classification" else ()
    return locate(name)[1], load_model(name, kind, classes, dtype), told


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return path and shape `(out, in)` of every linear module, and `(experts, out, in)` of every stack of experts."""
    stacks = {
        path for path, (parent, stack) in stacked_weights(model).items() if parent and is_plain_stack(stack)
    }
    plan = _with_targets(LotrConfig(r=1, modes=()), model, set(linear_paths(model)), stacks)
    return {target.path: target.weight_shape for target in plan.targets}


def check_sharing(
    modes: Sequence[str], core: str, weights: str | Mapping[str, float], clusters: int | str
) -> None:
    """Refuse words that a fit does not know."""
    if clusters != "auto" and not (str(clusters).isdecimal() and int(clusters) > 0):
        raise ConfigError(f"clusters={clusters!r} is no number of clusters. Use 1, 2, …, or auto.")
    odd = [mode for mode in modes if mode not in MODES]
    if odd:
        raise ConfigError(f"modes: {odd[0]!r} is none. Name some of: {', '.join(MODES)}; as in task,layer.")
    for name, word, known in (("core", core, CORES), ("weights", weights, WEIGHTS)):
        if isinstance(word, str) and word not in known:
            raise ConfigError(f"{name}={word!r} is none. Use one of: {', '.join(known)}.")


def bank_config(
    model: nn.Module,
    weights: Mapping[str, tuple[int, ...]],
    modes: Sequence[str],
    core: str,
    task_types: set[str | None],
) -> LotrConfig:
    """Return the configuration of a basis for some weights, at rank 1; `with_ranks` gives it its ranks."""
    shared, structure = structure_of(modes, core)
    config = LotrConfig(
        r=1,
        modes=shared,
        core=structure,
        task_type=next(iter(task_types)) if len(task_types) == 1 else None,
    )
    stacks = {path for path, shape in weights.items() if len(shape) == 3}
    plan = _with_targets(config, model, weights.keys() - stacks, stacks)
    if core == "diagonal" and any(len(group.modes) > 1 for group in plan.groups):
        raise ConfigError(
            f"core='diagonal' with modes={tuple(modes)!r} would make the diagonals of experts products of two. Use "
            "task, or task,expert; or task,layer,projection, along which every expert has a diagonal of its own."
        )
    config.targets = [target.to_dict() for target in plan.targets]
    return config


def _with_targets(config: LotrConfig, model: nn.Module, linear: Set[str], stacks: Set[str]) -> Plan:
    """Name linear modules and stacks of experts in a configuration by their paths, and return its plan."""
    config.target_modules = sorted(linear)
    config.target_parameters = sorted(stacks) or None
    return plan_adapter(model, config, linear | stacks)


def with_ranks(config: LotrConfig, ranks: Mapping[str, tuple[int, int]]) -> tuple[LotrConfig, Plan]:
    """Return a configuration whose groups have some ranks, and its plan."""
    config = copy.deepcopy(config)
    return config, set_ranks(config, ranks)
