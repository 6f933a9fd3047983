"""The passes of a fit over all adapters: groups a few at a time, as memory allows, and what is done is kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType

from ..sharing.plan import Group
from . import diagonal, fit
from .fit import GroupFit
from .stack import CACHE, Stack, Tick
from .state import State

_SUMS = 1 << 30  # bytes of the sums of the groups that are fitted at once


def chunks(groups: Sequence[Group], stack: Stack) -> Iterator[list[Group]]:
    """Yield groups: as many at once as have their sums in memory, and their updates too where that is possible."""
    chunk: list[Group] = []
    for group in groups:
        wider = [*chunk, group]
        sums = sum(8 * width * min(width, 2048) for g in wider for width in g.shape)
        fits_cache = len(stack) * stack.bytes_a_task(wider) <= CACHE
        alone = len(stack) * stack.bytes_a_task([group]) > CACHE  # it is read again in every pass anyway
        if chunk and (sums > _SUMS or not (fits_cache or alone)):
            yield chunk
            chunk = []
        chunk = [*chunk, group]
    yield chunk


def find_directions(groups: Sequence[Group], stack: Stack, state: State, tick: Tick) -> dict[str, GroupFit]:
    """Return the HOSVD of all groups."""
    fits: dict[str, GroupFit] = {}
    for chunk in chunks(groups, stack):
        names = [group.name for group in chunk]
        known = state.load(names)
        if known is None:
            batches = stack.batches(chunk, True, lambda done, of: tick("Directions", done, of))
            known = fit.directions({group.name: group.shape for group in chunk}, batches)
            state.save(known, names)
        fits |= known
    return fits


def run_sweeps(
    groups: Sequence[Group],
    fits: dict[str, GroupFit],
    stack: Stack,
    state: State,
    most: int,
    tolerance: float,
    tick: Tick,
) -> None:
    """Sweep until nothing is gained, from the HOSVD or from where an earlier run was interrupted.

    Args:
        groups: Groups with their ranks.
        fits: Their fits, which are changed.
        stack: The adapters.
        state: Where finished sweeps are kept.
        most: Most sweeps.
        tolerance: A sweep that lowers the error by a smaller share is a group's last.
        tick: Called as tasks are done.
    """
    kind: ModuleType = fit if groups[0].core.by_site else diagonal
    for chunk in chunks(groups, stack):
        names = [group.name for group in chunk]
        batches = stack.batches(chunk, True, lambda done, of: tick("Fitting", done, of))
        new = {group.name: group.core.r for group in chunk if not fits[group.name].errors}
        kind.begin({name: fits[name] for name in new}, new, batches)
        for name in new:
            fits[name].turn_back()
        while unsettled := {
            name: fits[name]
            for name in names
            if len(fits[name].errors) <= most and not fit.is_settled(fits[name], tolerance)
        }:
            kind.sweep(unsettled, batches)
            state.save(fits, names)
