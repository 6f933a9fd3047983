"""The plan of a model that is not loaded: only its configuration is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..bank.basis import structure_of
from ..bank.task import DTYPES
from ..errors import ConfigError, near
from ..files.atomic import file_bytes
from ..methods import METHODS
from ..sharing.keys import file_shapes
from ..sharing.plan import Plan
from ..tuner.basis import check_basis
from ..tuner.saved_adapter import read_basis
from ..tuner.targets import plan
from .adapter import adapter_config, fit_rank
from .base_model import check_dtype, skeleton
from .given_config import rank_text
from .settings import TrainSettings, read_names, with_usual


def plan_model(
    settings: TrainSettings, dtype: str = "float32", tasks: int | None = None
) -> tuple[Plan, dict[str, Any]]:
    """Plan an adapter for a model on the meta device, so that a 70B model needs no memory.

    Args:
        settings: The adapter's.
        dtype: Type of the numbers.
        tasks: How many LoRAs `lotr compress` shall make one bank of; then only the tasks share, unless modes are given.

    Returns:
        The plan; and as plain values its groups with shapes and counts, totals, the LoRA rank of equal cost, bytes on
        disk in the type.
    """
    if tasks is not None:
        if settings.layers_per_group is not None:
            raise ConfigError(
                "A bank of compressed LoRAs has no layers_per_group. Leave it out, or --compress."
            )
        modes, structure = structure_of(read_names(settings.modes) or ("task",), settings.core or "free")
        settings = replace(settings, modes=",".join(modes) or "none", core=structure)
    check_dtype(dtype)
    if settings.basis is None:
        settings = with_usual(settings)
    if settings.method is not None and settings.method not in METHODS:
        raise ConfigError(
            f"method={settings.method!r} shares nothing that could be planned: only rows of the table of methods do. "
            f"{near(settings.method, METHODS)}"
        )
    model, task = skeleton(str(settings.model))
    config: Any = adapter_config(settings, task)
    chosen = {}
    if settings.budget is not None:
        chosen = {"budget": settings.budget, "rank_choice": fit_rank(settings, config, model)}
    planned = plan(model, config)
    if config.basis is not None:
        check_basis(planned, read_basis(config), config.basis)
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
        for group in planned.groups
    ]
    report: dict[str, Any] = {
        "method": config.method,
        "rank": rank_text(config),
        **chosen,
        "groups": groups,
        "sites": planned.n_sites,
        "trained_numbers": planned.n_parameters,
        "core_numbers": planned.n_cores,
        "factor_numbers": planned.n_factors,
        "magnitude_numbers": planned.n_magnitudes,
        "modules": len(planned.targets),
        "cut_ranks": planned.cut_ranks,
        "trains": planned.trainable,
        "equal_lora_rank": planned.equal_lora_rank,
        "lora_same_rank": planned.lora_per_rank * max(config.rank),
        "bytes": file_bytes(file_shapes(planned, factors=not config.refers_to_basis), DTYPES[dtype].itemsize),
    }
    if tasks is not None:
        core = 2 * planned.n_cores  # bytes, in bfloat16, as `lotr compress` keeps factors and cores
        report["bank"] = {
            "tasks": tasks,
            "bytes_a_task": core,
            "bytes": 2 * planned.n_factors + tasks * core,
            "bytes_of_loras_a_rank": 2 * tasks * planned.lora_per_rank,
        }
    return planned, report
