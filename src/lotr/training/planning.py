"""The plan of a model that is not loaded: only its configuration is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, near
from ..files.atomic import file_bytes
from ..methods import METHODS
from ..tuner.basis import check_basis, read_basis
from ..tuner.state_dict import file_shapes
from ..tuner.targets import plan
from .adapter import adapter_config, check_targets
from .base_model import DTYPES, check_dtype, skeleton
from .budget import AUTO, fit

if TYPE_CHECKING:
    from lotr_cli.settings import TrainSettings


def plan_model(settings: TrainSettings, dtype: str = "float32") -> dict[str, Any]:
    """Plan an adapter for a model on the meta device, so that a 70B model needs no memory.

    Args:
        settings: Its `model` and the settings of the adapter are read.
        dtype: Type in which the numbers would be saved.

    Returns:
        Groups with shapes and counts, totals, the LoRA rank of equal cost, bytes on disk.

    Raises:
        ConfigError: A setting has no meaning.
        PlanError: Sites cannot share what was asked for, or the basis lacks a group.
        CheckpointError: The basis cannot be read.
    """
    check_dtype(dtype)
    if settings.method not in METHODS:
        raise ConfigError(
            f"method={settings.method!r} shares nothing that could be planned: only rows of the table of methods do. "
            f"{near(settings.method, METHODS)}"
        )
    model, task = skeleton(str(settings.model))
    config: Any = adapter_config(settings, task)
    check_targets(model, config)
    chosen = {}
    if settings.budget is not None:
        chosen = {"budget": settings.budget, "said": fit(settings, config, model)}
    made = plan(model, config)
    if config.basis is not None:
        check_basis(made, read_basis(config), config.basis)
    groups = [
        {
            "group": group.name,
            "projections": ", ".join(group.projections),
            "modes": list(group.modes),
            "core": "×".join(map(str, (*group.core.sizes, *group.rank))),
            "sites": len(group.sites),
            "block": "×".join(map(str, group.shape)),
            "factors": group.n_factors,
            "cores": group.n_cores,
            "total": group.n_parameters,
        }
        for group in made.groups
    ]
    return {
        "method": settings.method,
        "rank": str(config.r) if settings.rank == AUTO else settings.rank,
        **chosen,
        "groups": groups,
        "sites": made.n_sites,
        "trained_numbers": made.n_parameters,
        "core_numbers": made.n_cores,
        "factor_numbers": made.n_factors,
        "magnitude_numbers": made.n_magnitudes,
        "modules": len(made.targets),
        "trains": made.trainable,
        "equal_lora_rank": made.equal_lora_rank,
        "lora_same_rank": made.lora_per_rank * max(config.rank),
        "bytes": file_bytes(
            file_shapes(made, factors=not config.refers_to_basis),
            DTYPES[dtype].itemsize,
        ),
    }
