"""Servers on small banks in a thread of this process, and a client for them."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers as tf
import uvicorn
from peft import get_peft_model

from lotr import CoreBank, LotrConfig, Task
from lotr.serving.app import create_app
from lotr.serving.settings import ServeSettings
from lotr.training.tasks.served import Served, load_served
from saved_models import save_bert, save_llama

HEAD = "base_model.model.classifier"


def encoder_bank(folder: Path, tasks: int = 0) -> CoreBank:
    """A bank in `folder/bank` on a saved encoder."""
    name = save_bert(folder / "model")
    base = tf.AutoModelForSequenceClassification.from_pretrained(name)
    return _bank(folder, base, ["query", "value"], [encoder_task, tasks])


def decoder_bank(folder: Path, tasks: int = 0) -> CoreBank:
    """A bank in `folder/bank` on a saved language model."""
    base = tf.AutoModelForCausalLM.from_pretrained(save_llama(folder / "model"))
    return _bank(folder, base, ["q_proj", "v_proj"], [decoder_task, tasks])


def _bank(folder: Path, base: Any, targets: list[str], tasks: list[Any]) -> CoreBank:
    config = LotrConfig(r=4, target_modules=targets)
    get_peft_model(base, config).save_pretrained(folder / "basis")
    bank = CoreBank.create(folder / "bank", folder / "basis", dtype="float32")
    make, count = tasks
    bank.add_many(make(bank, f"task-{n}", seed=n) for n in range(count))
    return bank


def encoder_task(
    bank: CoreBank, name: str, seed: int = 0, labels: tuple[str, ...] = ("a", "b", "c"), **metadata: Any
) -> Task:
    """A task of random numbers with a head; without labels it is a regression."""
    generator = torch.Generator().manual_seed(seed)
    outputs = len(labels) or 1
    head = {
        f"{HEAD}.weight": torch.randn(outputs, 32, generator=generator),
        f"{HEAD}.bias": torch.randn(outputs, generator=generator),
    }
    numbers = torch.randn(bank.layout.size, generator=generator)
    return Task(name, numbers, head, labels, "classification" if labels else "regression", metadata)


def decoder_task(bank: CoreBank, name: str, seed: int = 0) -> Task:
    """A task of random numbers of a language model."""
    generator = torch.Generator().manual_seed(seed)
    return Task(name, torch.randn(bank.layout.size, generator=generator), task="causal-lm")


class Client:
    """Talks to a server, one connection a request."""

    def __init__(self, port: int, token: str | None = None) -> None:
        self.port = port
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
        """Return status, body (JSON where it is some) and headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        own = dict(self.headers)
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            own["Content-Type"] = "application/json"
        connection.request(method, path, body, {**own, **headers})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        is_json = answer.headers.get("Content-Type", "").startswith("application/json")
        return answer.status, json.loads(content) if is_json else content.decode(), answer.headers

    def predict(self, task: str, text: str) -> dict[str, Any]:
        """Return the prediction for one text."""
        status, answer, _ = self.send("POST", f"/v1/tasks/{task}/predict", {"text": text})
        assert status == 200, answer
        return answer["predictions"][0]


@contextmanager
def serving(folder: Path, served: Served | None = None, **limits: Any) -> Iterator[Client]:
    """Serve `folder/bank` while the block runs."""
    app = create_app(served or load_served(folder / "bank"), ServeSettings(**limits))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=20))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.01)
        yield Client(server.servers[0].sockets[0].getsockname()[1], limits.get("token"))
    finally:
        server.should_exit = True
        thread.join()
