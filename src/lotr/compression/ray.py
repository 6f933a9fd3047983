"""The passes of a fit on a Ray cluster: shards of the adapters are added up by its workers, and then here.

Workers read the adapters themselves, so these lie where all of them can. A worker that dies has its shard added up by
another; sums come together in the order of the adapters, whoever made them.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from ..errors import ConfigError
from ..sharing.groups import Group
from .fit import Batch, Sums, Total, merged
from .stack import Spread, Stack, Tick

_RETRIES = 4  # workers that may die over one shard
_SHARDS = 4  # for each processor, so that none waits long for the slowest


@contextmanager
def cluster(address: str | None) -> Iterator[Spread | None]:
    """Connect to a Ray cluster as `ray.init` does, and give what runs passes there; `None`: this process does."""
    if address is None:
        yield None
        return
    try:
        import ray
    except ImportError:
        raise ConfigError("Ray is not installed: pip install 'lotr[ray]'. Or leave out --ray.") from None
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal():  # Ray itself asks for minutes, and then ends the process
            socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=10).close()
        ray.init(address, include_dashboard=False, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--ray {address} does not answer: {error}. Name `local`, or host:port of a running cluster."
        ) from error
    try:
        yield _spread
    finally:
        ray.shutdown()


def _spread(stack: Stack, groups: Sequence[Group], what: str, tick: Tick) -> Total:
    import ray

    count = max(1, min(len(stack), _SHARDS * int(ray.cluster_resources().get("CPU", 1))))
    edges = [len(stack) * n // count for n in range(count + 1)]
    shards = [
        ray.put((Stack(stack.entries[at:end], stack.weights[at:end]), groups)) for at, end in pairwise(edges)
    ]
    task: Any = ray.remote(max_retries=_RETRIES)(_added_up)

    def total(add_up: Callable[[Iterable[Batch]], Sums]) -> Sums:
        shared = ray.put(add_up)  # with the factors; every node fetches it once
        sums = None
        for n, reference in enumerate([task.remote(shared, shard) for shard in shards]):
            own: Sums = ray.get(reference)
            sums = own if sums is None else merged(sums, own)
            tick(what, edges[n + 1], len(stack))
        assert sums is not None
        return sums

    return total


def _added_up(add_up: Callable[[Iterable[Batch]], Sums], shard: tuple[Stack, Sequence[Group]]) -> Sums:
    stack, groups = shard
    return add_up(stack.batches(groups, "", lambda what, done, of: None)())
