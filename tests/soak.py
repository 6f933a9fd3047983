"""Two servers under every kind of request for minutes: does their memory stay? `python tests/soak.py 600`.

One has a bank of an encoder, one of a language model, both tiny, so that what a request leaves behind is not hidden by
the time that models take. Tasks are added, replaced and removed all the while, under names that never come again, and
only eight fit into memory.
"""

from __future__ import annotations

import itertools
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

import banks
from banks import decoder_bank, decoder_task, encoder_bank
from lotr import CoreBank
from servers import ZIP, Client, archive

CLIENTS, EVERY, ADMIN = 4, 10.0, "admin"
WORDS = ["the", "a", "red", "old", "blue", "thing", "is", "very", "green", "here", "colour", "what"]

#: Name of a request → the status that it must get, its path, and its body; one without a body is a GET.
Requests = dict[str, tuple[int, str, Any]]
COMMON: Requests = {
    "models": (200, "/v1/models?limit=5", None),
    "one model": (200, "/v1/models/task-1", None),
    "metrics": (200, "/metrics", None),
    "page": (200, "/", None),
    "no such path": (404, "/nothing", None),
}


def to_encoder(draw: random.Random) -> Requests:
    text, path = " ".join(draw.choices(WORDS, k=draw.randint(1, 30))), f"/v1/tasks/task-{draw.randrange(20)}"
    return COMMON | {
        "text": (200, f"{path}/predict", {"text": text}),
        "texts": (200, f"{path}/predict", {"texts": [text, "a", "old old old is blue"]}),
        "long text, cut": (200, f"{path}/predict", {"text": "the red " * 60, "truncate": True}),
        "long text": (422, f"{path}/predict", {"text": "the red " * 60}),
        "wrong field": (422, f"{path}/predict", {"txt": "a"}),
        "client leaves": (499, f"{path}/predict", {"texts": [text] * 16}),
    }


def to_decoder(draw: random.Random) -> Requests:
    text = " ".join(draw.choices(WORDS, k=draw.randint(1, 20)))
    asked = {"model": f"task-{draw.randrange(20)}", "max_tokens": draw.randint(1, 16)}
    prompt, turns = asked | {"prompt": text}, asked | {"messages": [{"role": "user", "content": text}]}
    stops = {"stream": True, "stop": ["red", "thing"]}
    return COMMON | {
        "completion": (200, "/v1/completions", prompt | {"temperature": 0.8, "seed": 3}),
        "completion, streamed": (200, "/v1/completions", prompt | stops),
        "chat": (200, "/v1/chat/completions", turns),
        "chat, streamed": (200, "/v1/chat/completions", turns | {"stream": True}),
        "too many tokens": (422, "/v1/completions", prompt | {"max_tokens": 10**6}),
        "client leaves": (499, "/v1/chat/completions", turns),
    }


def change(client: Client, task: bytes, draw: random.Random) -> None:
    """Add a task of a new name, replace one, and remove the new one again."""
    admin, new, old = Client(client.port, ADMIN), f"new-{draw.random()}", f"task-{draw.randrange(20)}"
    for name in (new, f"{old}?replace=true"):
        assert admin.send("POST", f"/v1/tasks/{name}", task, **ZIP)[0] == 201
    assert admin.send("DELETE", f"/v1/tasks/{new}")[0] == 200


@contextmanager
def served(bank: CoreBank) -> Iterator[tuple[Client, psutil.Process]]:
    """Run `lotr serve`; give a client of it and its process."""
    words = ["--port", "0", "--admin-token", ADMIN, "--capacity", "8", "--max-batch", "8"]
    log = bank.path.parent / "log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "lotr", "serve", str(bank.path), *words]
        process = subprocess.Popen(command, stderr=file)
    try:
        while not (told := re.search(r'"listening", "url": "http://[^:]+:(\d+)"', log.read_text())):
            if process.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.1)
        yield Client(int(told[1])), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def soak(name: str, bank: CoreBank, make: Any, requests: Any, seconds: float) -> Counter[str]:
    """Ask for some seconds; print the memory of the server, and return what was answered."""
    bank.export("task-1", bank.path.parent / "exported")
    task, answered = archive(bank.path.parent / "exported"), Counter[str]()

    def ask(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            known = requests(draw)
            kind = draw.choice([*known, "tasks"])
            status, path, body = known.get(kind, (200, "", None))
            answer: Any = status, None
            if kind == "tasks":
                change(client, task, draw)
            elif status == 499:
                client.leave(path, body, wait=lambda: time.sleep(0.01 * draw.random()))
            else:
                answer = client.send("GET" if body is None else "POST", path, body)[:2]
            answered[kind if answer[0] == status else f"{kind}: {answer}"] += 1

    memory: list[int] = []
    with served(bank) as (client, process), ThreadPoolExecutor(CLIENTS) as pool:
        end = time.monotonic() + seconds
        asking = [pool.submit(ask, seed) for seed in range(CLIENTS)]
        for n in itertools.count():
            bank.add(make(bank, f"other process {n}", n))  # with nothing but the folder in common
            left = end - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(EVERY, left))
            memory.append(process.memory_info().rss)
            print(f"{seconds - left:6.0f} s  {name:15} {memory[-1] / 1e6:8.1f} MB", flush=True)
        for one in asking:
            one.result()
    quarter = max(1, len(memory) // 4)
    second, last = map(statistics.mean, (memory[quarter : 2 * quarter], memory[-quarter:]))
    print(f"{name}: {second / 1e6:.1f} MB in the second quarter, {last / 1e6:.1f} MB in the last", flush=True)
    return answered


def main() -> None:
    """Print the samples, the growth from the second to the last quarter of the time, and what was answered."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        encoder, decoder = encoder_bank(Path(folder) / "one", 20), decoder_bank(Path(folder) / "two", 20)
        both = [
            pool.submit(soak, *own, float(sys.argv[1]))
            for own in (
                ("encoder", encoder, banks.task, to_encoder),
                ("language model", decoder, decoder_task, to_decoder),
            )
        ]
        answered = sum((one.result() for one in both), Counter[str]())
    for kind, count in sorted(answered.items()):
        print(f"{count:8,}  {kind}")
    print(f"{answered.total():8,}  in all")


if __name__ == "__main__":
    main()
