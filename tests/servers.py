"""Servers in a thread of this process, and a client for them."""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from lotr.serving.app import create_app
from lotr.serving.settings import ServeSettings
from lotr.training.tasks.served import Served, load_served

ZIP = {"Content-Type": "application/zip"}


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

    def metric(self, name: str) -> float:
        """Return a number of /metrics; `name` has its labels. What has not been counted yet is 0."""
        lines = self.send("GET", "/metrics")[1].splitlines()
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(f"{name} "))

    def leave(self, path: str, body: Any, wait: Callable[[], object]) -> None:
        """Send a request and hang up when `wait` has returned."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", self.port)) as one:
            one.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            wait()


def until(condition: Callable[[], bool]) -> None:
    """Wait for what other threads do."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.01)


class Counted:
    """A model whose calls are noted by how many rows they have, wait for `go_on`, and take `pause` seconds more."""

    def __init__(self, served: Served) -> None:
        self.served, self.pause, self.rows = served, 0.0, list[int]()
        self.go_on = threading.Event()
        self.go_on.set()
        forward = served.model.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.rows.append(len(kwargs["input_ids"]))
            self.go_on.wait(30)
            time.sleep(self.pause)
            return forward(*args, **kwargs)

        served.model.forward = counted  # type: ignore[method-assign]


def archive(folder: Path, packed: int = zipfile.ZIP_STORED) -> bytes:
    """Return an exported task as clients send it, whose names are no paths to be believed."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", packed) as file:
        for path in folder.iterdir():
            file.write(path, f"../../{path.name}")
    return content.getvalue()


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
