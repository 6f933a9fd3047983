"""`lotr compress BANK --add`: later adapters on the factors of a bank that is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bank import CoreBank
from ..bank.transfer import check_fingerprint
from ..errors import ConfigError
from ..files.atomic import read_json
from .report import REPORT
from .sources import find_adapters
from .stack import Stack, Tick, read_entry
from .tasks import add_tasks

_POOR = 1.5  # times the error of the fit: from here on a new fit pays


def add(
    bank: str | Path, adapters: Sequence[str | Path], *, replace: bool = False, tick: Tick | None = None
) -> dict[str, Any]:
    """Project adapters onto the factors of a bank, and add them as tasks: all, or none.

    Returns the error of each adapter beside that of the fit, and whether a new fit pays.
    """
    tick = tick or (lambda what, done, of: None)
    places = find_adapters(adapters)
    with CoreBank.open(bank, writable=True) as opened:
        config, plan = opened.config, opened.plan
        known = {target.path: target.weight_shape for target in plan.targets}
        if config.core != "free" and (
            config.core != "cp" or any(len(group.modes) > 1 for group in plan.groups)
        ):
            raise ConfigError(
                f"The bank in {bank} has core={config.core!r}, on which an update has no closed form. Fit a new bank "
                "with `lotr compress`."
            )
        fit = read_json(opened.path / REPORT, "a report") if (opened.path / REPORT).is_file() else {}
        told, entries = fit.get("trained_on") or opened.base_model, []
        for name, path in places.items():
            entry, source = read_entry(name, path, known, opened.base_model, told, in_bank=True)
            check_fingerprint(opened.basis, path, source.folder.task)
            entries.append(entry)
            tick("Reading", len(entries), len(places))
        stack = Stack(tuple(entries), (1.0,) * len(entries))
        lost = add_tasks(opened, stack, tick, replace)
        errors = {entry.name: entry.error(lost[entry.name].modules) for entry in entries}
        return {"bank": str(bank), "added": errors, "tasks": len(opened), "advice": _advice(errors, fit)}


def _advice(errors: dict[str, float], fit: dict[str, Any]) -> list[str]:
    if not fit:
        return []
    poor = [name for name, error in errors.items() if error > _POOR * fit["error"] and error > 1e-3]
    if not poor:
        return [
            f"No new fit is needed: the adapters of the fit lose {fit['error']:.3g}, these at most as much."
        ]
    worst = max(errors, key=lambda name: errors[name])
    return [
        f"{len(poor)} of {len(errors)} lose more than {_POOR} times what those of the fit do ({fit['error']:.3g}), "
        f"{worst} most, {errors[worst]:.3g}. A new fit with all adapters pays."
    ]
