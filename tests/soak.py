"""Two servers under every kind of request for minutes: does their memory stay? `python tests/soak.py 600`.

One has a bank of an encoder, one of a language model, both tiny, so that what a request leaves behind is not hidden by
the time that models take. Tasks are added, replaced and removed all the while, under names that never come again, and
only eight fit into memory.
"""

from __future__ import annotations

import io
import itertools
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from lotr import CoreBank
from served_banks import decoder_bank, decoder_task, encoder_bank, encoder_task
from servers import Client

CLIENTS, EVERY, ADMIN = 4, 10.0, "admin"
WORDS = ["the", "a", "red", "old", "blue", "thing", "is", "very", "green", "here", "colour", "what"]

Ask = Callable[[Client, random.Random], tuple[int, Any, Any]]


def predict(**body: Any) -> Ask:
    def ask(client: Client, draw: random.Random) -> tuple[int, Any, Any]:
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 30)))
        return client.send("POST", f"/v1/tasks/task-{draw.randrange(20)}/predict", body or {"text": text})

    return ask


def write(path: str, **options: Any) -> Ask:
    def ask(client: Client, draw: random.Random) -> tuple[int, Any, Any]:
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 20)))
        body = {"model": f"task-{draw.randrange(20)}", "max_tokens": draw.randint(1, 16), **options}
        own = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
        return client.send("POST", path, body | own)

    return ask


def leave(path: str, body: Mapping[str, Any]) -> Ask:
    """Send a request and hang up."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )

    def ask(client: Client, draw: random.Random) -> tuple[int, Any, Any]:
        with socket.create_connection(("127.0.0.1", client.port)) as one:
            one.sendall(head.encode() + b"\r\n\r\n" + content)
            time.sleep(0.01 * draw.random())
        return 499, None, None

    return ask


def get(path: str) -> Ask:
    return lambda client, draw: client.send("GET", path)


def change(archive: bytes) -> Ask:
    """Add a task of a new name, replace one, or remove the new one again."""

    def ask(client: Client, draw: random.Random) -> tuple[int, Any, Any]:
        admin, new = Client(client.port, ADMIN), f"/v1/tasks/new-{draw.random()}"
        as_zip = {"Content-Type": "application/zip"}
        assert admin.send("POST", new, archive, **as_zip)[0] == 201
        assert (
            admin.send("POST", f"/v1/tasks/task-{draw.randrange(20)}?replace=true", archive, **as_zip)[0]
            == 201
        )
        return admin.send("DELETE", new)

    return ask


#: Name → how to ask, and what must be answered.
Kinds = Mapping[str, tuple[Ask, int]]
COMMON: Kinds = {
    "models": (get("/v1/models?limit=5"), 200),
    "one model": (get("/v1/models/task-1"), 200),
    "metrics": (get("/metrics"), 200),
    "page": (get("/"), 200),
    "no such path": (get("/nothing"), 404),
}
ENCODER: Kinds = COMMON | {
    "text": (predict(), 200),
    "texts": (predict(texts=["the red thing", "a", "old old old is blue"]), 200),
    "long text, cut": (predict(text="the red " * 60, truncate=True), 200),
    "long text": (predict(text="the red " * 60), 422),
    "wrong field": (predict(txt="a"), 422),
    "client leaves": (leave("/v1/tasks/task-3/predict", {"texts": ["the red thing"] * 16}), 499),
}
DECODER: Kinds = COMMON | {
    "completion": (write("/v1/completions", temperature=0.8, seed=3), 200),
    "completion, streamed": (write("/v1/completions", stream=True, stop=["red", "thing"]), 200),
    "chat": (write("/v1/chat/completions"), 200),
    "chat, streamed": (write("/v1/chat/completions", stream=True), 200),
    "too many tokens": (write("/v1/completions", max_tokens=10**6), 422),
    "client leaves": (
        leave("/v1/chat/completions", {"model": "task-2", "messages": [{"role": "user", "content": "a"}]}),
        499,
    ),
}


@contextmanager
def started(bank: Path) -> Iterator[tuple[Client, psutil.Process]]:
    """Run `lotr serve`; give a client of it and its process."""
    words = ["serve", str(bank), "--port", "0", "--admin-token", ADMIN, "--capacity", "8", "--max-batch", "8"]
    log = bank.parent / "log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "lotr", *words], stderr=file)
    try:
        while not (told := re.search(r'"listening", "url": "http://[^:]+:(\d+)"', log.read_text())):
            if process.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.1)
        yield Client(int(told[1])), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def zipped(bank: CoreBank, folder: Path) -> bytes:
    """Return an exported task as clients send it."""
    bank.export("task-1", folder)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for path in folder.iterdir():
            file.write(path, path.name)
    return content.getvalue()


def soak(root: Path, seconds: float) -> tuple[dict[str, list[int]], Counter[str]]:
    """Ask for some seconds; returns bytes of each server's memory, sample by sample, and what was answered."""
    answered: Counter[str] = Counter()

    def ask(client: Client, kinds: Kinds, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            kind = draw.choice(list(kinds))
            call, expected = kinds[kind]
            status, answer, _ = call(client, draw)
            answered[kind if status == expected else f"{kind}: {status} {answer}"] += 1

    with (
        encoder_bank(root / "encoder", 20) as encoder,
        decoder_bank(root / "decoder", 20) as decoder,
        started(encoder.path) as one,
        started(decoder.path) as two,
    ):
        servers: dict[str, tuple[tuple[Client, psutil.Process], Kinds]] = {
            "encoder": (one, ENCODER | {"tasks": (change(zipped(encoder, root / "one")), 200)}),
            "language model": (two, DECODER | {"tasks": (change(zipped(decoder, root / "two")), 200)}),
        }
        threads = [
            threading.Thread(target=ask, args=(client, kinds, seed))
            for (client, _), kinds in servers.values()
            for seed in range(CLIENTS)
        ]
        memory: dict[str, list[int]] = {name: [] for name in servers}
        end = time.monotonic() + seconds
        for thread in threads:
            thread.start()
        for n in itertools.count():
            encoder.add(
                encoder_task(encoder, f"other process {n}", n)
            )  # with nothing but the folder in common
            decoder.add(decoder_task(decoder, f"other process {n}", n))
            left = end - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(EVERY, left))
            for name, ((_, process), _) in servers.items():
                memory[name].append(process.memory_info().rss)
                at = time.monotonic() - end + seconds
                print(f"{at:6.0f} s  {name:15} {memory[name][-1] / 1e6:8.1f} MB", flush=True)
        for thread in threads:
            thread.join()
    return memory, answered


def main() -> None:
    """Print the samples, what was answered, and the growth from the second to the last quarter of the time."""
    with tempfile.TemporaryDirectory() as folder:
        memory, answered = soak(Path(folder), float(sys.argv[1]))
    for kind, count in sorted(answered.items()):
        print(f"{count:8,}  {kind}")
    print(f"{answered.total():8,}  in all")
    for name, samples in memory.items():
        quarter = len(samples) // 4
        second, last = statistics.mean(samples[quarter : 2 * quarter]), statistics.mean(samples[-quarter:])
        print(f"{name}: {second / 1e6:.1f} MB in the second quarter, {last / 1e6:.1f} MB in the last")


if __name__ == "__main__":
    main()
