"""Times of runs beside each other: interleaved rounds in one process, ratios pair by pair, medians with spread."""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
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
        disturbed: Measurements in which other programs had more than `QUIET` of the machine.
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
    tick: Callable[[], object] = lambda: None,
    before: Mapping[str, Run] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Time every run once a round, in an order that is drawn anew each round; a first round is not counted.

    What else the machine does then falls on all runs alike, and no run always follows the same other one.

    Args:
        runs: What to time, by name.
        rounds: Measurements of each.
        device: Where the runs compute; an accelerator is timed with its own events.
        tick: Called after each measurement, for a progress bar.
        before: What has to happen before a run, every time, and is not timed. Such a run is never repeated within a
            measurement.
        clock: What tells the time on a processor; `time.process_time` leaves out what other programs take.
    """
    before = before or {}
    on_cuda = device is not None and device.type == "cuda"
    seconds = _cuda_seconds if on_cuda else partial(_seconds, clock)
    order, draw = list(runs), random.Random(0)
    samples, repeats = Samples({name: [] for name in runs}), dict.fromkeys(runs, 1)
    for number in range(-1, rounds):
        draw.shuffle(order)
        for name in order:
            before.get(name, lambda: None)()
            others, started = _others(), time.perf_counter()
            taken = seconds(runs[name], repeats[name])
            share = (_others() - others) / (time.perf_counter() - started) / (os.cpu_count() or 1)
            if number < 0:
                repeats[name] = 1 if name in before else max(1, math.ceil(SHORTEST / taken))
            else:
                samples.seconds[name].append(taken / repeats[name])
                samples.disturbed += share > QUIET
            tick()
    return samples


def _seconds(clock: Callable[[], float], run: Run, repeats: int) -> float:
    started = clock()
    for _ in range(repeats):
        run()
    return clock() - started


def _cuda_seconds(run: Run, repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _others() -> float:
    """Return the processor seconds that went to other programs since the machine started; zero where unknown."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    mine = os.times()
    return busy - mine.user - mine.system
