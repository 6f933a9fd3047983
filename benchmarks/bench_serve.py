"""Requests over HTTP: 64 tasks of a bank beside one task, beside PEFT's adapters, and a bank of 100,000.

    python benchmarks/bench_serve.py --json out/bench/serve.json

Every server is a process of its own on loopback, on the packaged MiniLM with heads of three classes; this process asks.
PEFT stands behind the same batcher: with `adapter_names` a batch, and with `set_adapter` a request, one row at a time.
Closed loop: so many clients ask again as soon as they are answered; servers take turns whose order is drawn anew each
round, and a ratio is the median over rounds of the ratio within a round. Open loop: requests come at random moments at
a part of that rate, whether the ones before are answered or not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import records
from lotr import CoreBank, LotrConfig, Task
from lotr.serving.predictor import Predictor, Text
from lotr.serving.run import run
from lotr.serving.settings import ServeSettings
from lotr.training.data.docstrings import load_docstrings
from shapes import minilm
from timing import Samples

SERVERS = ("bank", "PEFT, adapter_names a batch", "PEFT, set_adapter a request")
RUNS = {  # who answers, and how many tasks are asked
    "bank, one task": ("bank", 1),
    "bank, 64 tasks": ("bank", 64),
    "PEFT, 64 adapters in a batch": (SERVERS[1], 64),
    "PEFT, 64 adapters one by one": (SERVERS[2], 64),
}
RATIOS = {
    "64 tasks / one task": ("bank, 64 tasks", "bank, one task"),
    "64 tasks / PEFT in a batch": ("bank, 64 tasks", "PEFT, 64 adapters in a batch"),
    "64 tasks / PEFT one by one": ("bank, 64 tasks", "PEFT, 64 adapters one by one"),
}
LABELS = ("a", "b", "c")


def base() -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=len(LABELS)).eval()


def make_bank(folder: Path, tasks: int) -> None:
    """Make a bank with tasks of random numbers and heads."""
    get_peft_model(base(), LotrConfig(r=16)).save_pretrained(folder / "basis")
    bank = CoreBank.create(folder / "bank", folder / "basis")
    draw = torch.Generator().manual_seed(0)

    def made() -> Iterator[Task]:
        for n in range(tasks):
            head = {
                "base_model.model.classifier.weight": torch.randn(3, 384, generator=draw) / 16,
                "base_model.model.classifier.bias": torch.zeros(3),
            }
            yield Task(
                f"task-{n}",
                torch.randn(bank.layout.size, generator=draw) / 16,
                head,
                LABELS,
                "classification",
            )

    bank.add_many(made())
    bank.close()


def with_adapters(names: Sequence[str], one_by_one: bool) -> Callable[[Predictor, Sequence[Text]], Tensor]:
    """Return what answers with PEFT's LoRA adapters in the place of a bank's tasks, for `Predictor.logits`.

    Args:
        names: Of the adapters.
        one_by_one: Whether every row is run by itself, after `set_adapter`.
    """
    config = LoraConfig(r=16, task_type="SEQ_CLS", init_lora_weights=False)
    model = get_peft_model(base(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()

    def logits(predictor: Predictor, texts: Sequence[Text]) -> Tensor:
        inputs = predictor.collate([text.inputs for text in texts])
        with torch.inference_mode():
            if not one_by_one:
                return model(**inputs, adapter_names=[text.name for text in texts]).logits
            (text,) = texts
            model.set_adapter(text.name)
            return model(**inputs).logits

    return logits


def serve(what: str, folder: Path, batch: int) -> None:
    """Be a server; the first line of the log tells where."""
    one_by_one = what == SERVERS[2]
    settings = ServeSettings(max_batch=1 if one_by_one else batch, max_queue=4096, timeout=300)
    if what != "bank":
        Predictor.logits = with_adapters([f"task-{n}" for n in range(64)], one_by_one)  # type: ignore[method-assign]
    run(folder / "bank", settings, port=0, model="minilm")


@contextmanager
def started(what: str, folder: Path, options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Start a server and give its port, and its number as a process."""
    words = ["--role", what, "--folder", str(folder)]
    words += ["--batch", str(options.batch), "--threads", str(options.threads)]
    log = folder / f"{what}.log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, __file__, *words], stderr=file)
    try:
        while not (told := re.search(r'"listening", "url": "http://[^:]+:(\d+)"', log.read_text())):
            if process.poll() is not None:
                raise RuntimeError(f"{what} did not start: {log.read_text()}")
            time.sleep(0.1)
        yield int(told[1]), process.pid
    finally:
        process.terminate()
        process.wait()


class Connection:
    """A connection to a server that stays open."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def predict(self, task: str, text: str) -> float:
        """Ask once; returns how long it took."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self._streams
        body = json.dumps({"text": text, "truncate": True}).encode()
        head = f"POST /v1/tasks/{task}/predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        began = time.perf_counter()
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        size = re.search(rb"content-length: (\d+)", answer)
        content = await reader.readexactly(int(size[1])) if size else b""
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"{answer.decode()}{content.decode()}")
        return time.perf_counter() - began


async def closed_loop(
    port: int, tasks: Sequence[str], texts: Sequence[str], clients: int, seconds: float
) -> tuple[float, list[float]]:
    """Return requests a second and the times of all, of clients that ask again once they are answered."""
    end = time.perf_counter() + seconds
    draw = random.Random(0)

    async def client() -> list[float]:
        connection, times = Connection(port), []
        while time.perf_counter() < end:
            times.append(await connection.predict(draw.choice(tasks), draw.choice(texts)))
        return times

    began = time.perf_counter()
    times = [one for of in await asyncio.gather(*(client() for _ in range(clients))) for one in of]
    return len(times) / (time.perf_counter() - began), times


async def open_loop(
    port: int, tasks: Sequence[str], texts: Sequence[str], rate: float, seconds: float
) -> list[float]:
    """Return the times of requests that come at random moments, so many a second."""
    draw, idle, running = random.Random(1), [], []

    async def ask() -> float:
        connection = idle.pop() if idle else Connection(port)
        took = await connection.predict(draw.choice(tasks), draw.choice(texts))
        idle.append(connection)
        return took

    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        running.append(asyncio.create_task(ask()))
        await asyncio.sleep(draw.expovariate(rate))
    return list(await asyncio.gather(*running))


def processor_seconds(process: int) -> float:
    """Return how long a process has computed: what other programs do meanwhile is no part of it."""
    spent = psutil.Process(process).cpu_times()
    return float(spent.user + spent.system)


def percentiles(times: Sequence[float]) -> dict[str, float]:
    """Return the median and the 99th percentile in milliseconds."""
    cuts = statistics.quantiles(times, n=100)
    return {"p50_ms": round(1e3 * cuts[49], 1), "p99_ms": round(1e3 * cuts[98], 1)}


def compare(options: argparse.Namespace, folder: Path, texts: Sequence[str]) -> list[records.Row]:
    """Measure one task, 64 tasks and PEFT in turns, closed and then open."""
    make_bank(folder, 64)
    rows: list[records.Row] = []
    with (
        started(SERVERS[0], folder, options) as bank,
        started(SERVERS[1], folder, options) as mixed,
        started(SERVERS[2], folder, options) as single,
    ):
        ports = dict(zip(SERVERS, (bank, mixed, single), strict=True))
        samples, work = Samples({name: [] for name in RUNS}), Samples({name: [] for name in RUNS})
        times: dict[str, list[float]] = {name: [] for name in RUNS}
        with records.progress("closed loop", len(RUNS) * (options.rounds + 1)) as bar:
            for turn in range(options.rounds + 1):
                for name in random.Random(turn).sample(list(RUNS), len(RUNS)):
                    server, count = RUNS[name]
                    tasks = [f"task-{n}" for n in range(count)]
                    seconds = options.seconds if turn else 1.0  # the first round is not counted
                    port, process = ports[server]
                    before = processor_seconds(process)
                    rate, own = asyncio.run(closed_loop(port, tasks, texts, options.clients, seconds))
                    if turn:
                        samples.seconds[name].append(1 / rate)
                        work.seconds[name].append((processor_seconds(process) - before) / len(own))
                        times[name] += own
                    bar.advance(bar.task_ids[0])
        load = 0.6 / samples.spread("bank, one task").median
        for name, (server, count) in RUNS.items():
            spread = samples.spread(name)
            row = {"what": name, "requests_a_second": round(1 / spread.median, 1), **percentiles(times[name])}
            row["processor_ms"] = round(1e3 * work.spread(name).median, 2)
            if 1 / spread.median > load:
                tasks = [f"task-{n}" for n in range(count)]
                own = asyncio.run(open_loop(ports[server][0], tasks, texts, load, 3 * options.seconds))
                row |= {f"open_{key}": value for key, value in percentiles(own).items()}
            rows.append(row)
        for name, (mine, theirs) in RATIOS.items():
            for what, measured in (("requests a second", samples), ("requests a second of processor", work)):
                ratio = measured.ratio(theirs, mine)  # of times, so this way round
                assert ratio is not None
                spread = {key: round(value, 3) for key, value in asdict(ratio).items()}
                rows.append({"what": f"{what}: {name}", **spread})
        rows.append({"what": "open loop, requests a second", "requests_a_second": round(load, 1)})
    return rows


def large(options: argparse.Namespace, folder: Path, texts: Sequence[str]) -> list[records.Row]:
    """Measure a large bank: 64 of its tasks, and all of them, each read from the disk."""
    make_bank(folder, options.large)
    rows = []
    with started(SERVERS[0], folder, options) as (port, _):
        for what, count in (("64 of them", 64), ("all of them", options.large)):
            tasks = [f"task-{n}" for n in range(count)]
            for seconds in (1.0, 3 * options.seconds):
                rate, times = asyncio.run(closed_loop(port, tasks, texts, options.clients, seconds))
            name = f"bank of {options.large:,}, {what}"
            rows.append({"what": name, "requests_a_second": round(rate, 1), **percentiles(times)})
    return rows


def main() -> None:
    """Print the table and write it as JSON."""
    parser = records.parser(__doc__ or "", "serve")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement")
    parser.add_argument("--large", type=int, default=100_000, help="tasks of the large bank; 0: none")
    parser.add_argument("--role", choices=SERVERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    records.begin(options)
    if options.role:
        serve(options.role, options.folder, options.batch)
        return
    texts = [" ".join(row["text"].split()[:16]) for row in load_docstrings(packages=10)["test"]][:500]
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(options, Path(folder) / "small", texts)
        if options.large:
            rows += large(options, Path(folder) / "large", texts)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    records.show("HTTP", columns, [[str(row.get(key, "")) for key in columns] for row in rows])
    records.write(options.json, rows)


if __name__ == "__main__":
    main()
