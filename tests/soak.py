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
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from lotr import CoreBank
from served_banks import decoder_bank, decoder_task, encoder_bank, encoder_task
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


def change(client: Client, task: bytes, draw: random.Random) -> int:
    """Add a task of a new name, replace one, and remove the new one again."""
    admin, new, old = Client(client.port, ADMIN), f"new-{draw.random()}", f"task-{draw.randrange(20)}"
    for name in (new, f"{old}?replace=true"):
        assert admin.send("POST", f"/v1/tasks/{name}", task, **ZIP)[0] == 201
    return admin.send("DELETE", f"/v1/tasks/{new}")[0]


class Soaked:
    """A bank, the process that serves it, and what it is asked."""

    def __init__(
        self, bank: CoreBank, make: Callable[..., Any], requests: Callable[[random.Random], Requests]
    ) -> None:
        self.bank, self.make, self.requests = bank, make, requests
        bank.export("task-1", bank.path.parent / "exported")
        self.task = archive(bank.path.parent / "exported")
        self.memory: list[int] = []

    @contextmanager
    def served(self) -> Iterator[None]:
        """Run `lotr serve`."""
        words = ["--port", "0", "--admin-token", ADMIN, "--capacity", "8", "--max-batch", "8"]
        log = self.bank.path.parent / "log"
        with log.open("w") as file:
            command = [sys.executable, "-m", "lotr", "serve", str(self.bank.path), *words]
            process = subprocess.Popen(command, stderr=file)
        try:
            while not (told := re.search(r'"listening", "url": "http://[^:]+:(\d+)"', log.read_text())):
                if process.poll() is not None:
                    raise RuntimeError(log.read_text())
                time.sleep(0.1)
            self.client, self.process = Client(int(told[1])), psutil.Process(process.pid)
            yield
        finally:
            process.terminate()
            process.wait()

    def ask(self, seed: int, end: float, answered: Counter[str]) -> None:
        """Ask until `end`."""
        draw = random.Random(seed)
        while time.monotonic() < end:
            kind, (expected, path, body) = draw.choice(
                [*self.requests(draw).items(), ("tasks", (200, "", None))]
            )
            answer: Any = None
            if kind == "tasks":
                status = change(self.client, self.task, draw)
            elif expected == 499:
                self.client.leave(path, body, after=0.01 * draw.random())
                status = expected
            else:
                status, answer, _ = self.client.send("GET" if body is None else "POST", path, body)
            answered[kind if status == expected else f"{kind}: {status} {answer}"] += 1


def main() -> None:
    """Print the samples, what was answered, and the growth from the second to the last quarter of the time."""
    seconds, answered = float(sys.argv[1]), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        both = {
            "encoder": Soaked(encoder_bank(Path(folder) / "encoder", 20), encoder_task, to_encoder),
            "language model": Soaked(decoder_bank(Path(folder) / "decoder", 20), decoder_task, to_decoder),
        }
        with both["encoder"].served(), both["language model"].served():
            end = time.monotonic() + seconds
            threads = [
                threading.Thread(target=one.ask, args=(seed, end, answered))
                for one in both.values()
                for seed in range(CLIENTS)
            ]
            for thread in threads:
                thread.start()
            for n in itertools.count():
                for one in both.values():  # with nothing but the folder in common
                    one.bank.add(one.make(one.bank, f"other process {n}", n))
                left = end - time.monotonic()
                if left <= 0:
                    break
                time.sleep(min(EVERY, left))
                for name, one in both.items():
                    one.memory.append(one.process.memory_info().rss)
                    at = time.monotonic() - end + seconds
                    print(f"{at:6.0f} s  {name:15} {one.memory[-1] / 1e6:8.1f} MB", flush=True)
            for thread in threads:
                thread.join()
    for kind, count in sorted(answered.items()):
        print(f"{count:8,}  {kind}")
    print(f"{answered.total():8,}  in all")
    for name, one in both.items():
        quarter = len(one.memory) // 4
        second, last = map(statistics.mean, (one.memory[quarter : 2 * quarter], one.memory[-quarter:]))
        print(f"{name}: {second / 1e6:.1f} MB in the second quarter, {last / 1e6:.1f} MB in the last")


if __name__ == "__main__":
    main()
