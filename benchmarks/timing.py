"""Times of runs beside each other: interleaved rounds in one process, ratios pair by pair, medians with spread."""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

Run = Callable[[], object]

SHORTEST = 0.1  # seconds: quicker runs are repeated within one measurement
QUIET = 0.05  # of the machine's time may go to other programs in a measurement that counts as undisturbed


@dataclass(frozen=True)
class Spread:
    """The middle of some measurements, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) < 2:
            return cls(*values * 3)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass
class Samples:
    """Seconds of every run, round by round.

    Args:
        seconds: Of each run, one number a round.
        disturbed: Measurements in which other programs had more than `QUIET` of the machine, also when repeated.
    """

    seconds: dict[str, list[float]]
    disturbed: int = 0

    def spread(self, name: str) -> Spread:
        return Spread.of(self.seconds[name])

    def ratio(self, name: str, reference: str) -> Spread | None:
        """Return the ratio of two runs, taken round by round; None where the reference was not run."""
        if reference not in self.seconds:
            return None
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return Spread.of([mine / theirs for mine, theirs in pairs])


def interleaved(
    runs: Mapping[str, Run],
    rounds: int,
    device: torch.device | None = None,
    warm_up: int = 1,
    patience: float = 60,
    tick: Callable[[], object] = lambda: None,
    before: Mapping[str, Run] | None = None,
) -> Samples:
    """Time every run once a round, in an order that is drawn anew each round.

    What else the machine does then falls on all runs alike, and no run always follows the same other one.

    Args:
        runs: What to time, by name.
        rounds: Measurements of each.
        device: Where the runs compute; an accelerator is timed with its own events.
        warm_up: Rounds before, which are not counted.
        patience: Seconds that may be spent, altogether, on waiting for other programs and on repeating what they
            disturbed.
        tick: Called after each measurement, for a progress bar.
        before: What has to happen before a run, every time, and is not timed. Such a run is never repeated within a
            measurement.
    """
    before = before or {}
    seconds = _cuda_seconds if device is not None and device.type == "cuda" else _wall_seconds
    order, draw, watch = list(runs), random.Random(0), _Watch(patience)
    samples, repeats = Samples({name: [] for name in runs}), dict.fromkeys(runs, 1)
    for number in range(-warm_up, rounds):
        draw.shuffle(order)
        for name in order:
            before.get(name, _nothing)()
            if number < 0:
                taken = seconds(runs[name], 1)
                repeats[name] = 1 if name in before else max(1, math.ceil(SHORTEST / taken))
            else:
                taken, quiet = watch.measure(
                    lambda name=name: seconds(runs[name], repeats[name]), before.get(name, _nothing)
                )
                samples.seconds[name].append(taken / repeats[name])
                samples.disturbed += not quiet
            tick()
    return samples


def _nothing() -> None:
    pass


def _wall_seconds(run: Run, repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    return time.perf_counter() - started


def _cuda_seconds(run: Run, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


@dataclass
class _Watch:
    """Repeats what other programs disturb, as long as there is patience left."""

    patience: float  # seconds

    def measure(self, timed: Callable[[], float], before: Run) -> tuple[float, bool]:
        """Return the least disturbed measurement, and whether it was quiet; `before` goes before a repetition."""
        tries = []
        while True:
            started = time.perf_counter()
            with _share_of_others() as share:
                taken = timed()
            tries.append((share[0], taken))
            if share[0] <= QUIET or self.patience <= 0:
                least, taken = min(tries)
                return taken, least <= QUIET
            self._wait()
            before()
            self.patience -= time.perf_counter() - started

    def _wait(self) -> None:
        until = time.perf_counter() + self.patience
        while time.perf_counter() < until:
            with _share_of_others() as share:
                time.sleep(0.5)
            if share[0] <= QUIET:
                return


@contextmanager
def _share_of_others() -> Iterator[list[float]]:
    """Yield a list that receives the share of the machine's time that other programs had in the block."""
    share: list[float] = []
    before, started = _others(), time.perf_counter()
    yield share
    there = (time.perf_counter() - started) * (os.cpu_count() or 1)
    share.append((_others() - before) / there)


def _others() -> float:
    """Return the processor seconds that went to other programs since the machine started; zero where unknown."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    mine = os.times()
    return busy - mine.user - mine.system
