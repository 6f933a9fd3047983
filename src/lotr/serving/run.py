"""A server process: loads the bank, listens, and finishes what has begun when it is told to end."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from pathlib import Path

import uvicorn

from ..errors import ConfigError
from ..training.tasks.served import load_served
from .app import create_app
from .metrics import log, log_to_stderr
from .settings import ServeSettings


def run(
    bank: str | Path,
    settings: ServeSettings,
    host: str = "127.0.0.1",
    port: int = 8000,
    model: str | None = None,
    dtype: str = "float32",
    capacity: int | str = 1024,
    loaded: Callable[[], None] = lambda: None,
) -> int:
    """Serve a bank until the process is told to end; returns how many requests were answered.

    Port 0 takes a free one, which the first line of the log tells. `loaded` is called once the model is there.
    """
    with _listen(host, port) as listener:
        served = load_served(bank, model, capacity=capacity, dtype=dtype)
        app = create_app(served, settings)
        loaded()
        log_to_stderr()
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=round(settings.timeout) + 5,
        )
        server = uvicorn.Server(config)
        for number in (
            signal.SIGTERM,
            signal.SIGINT,
        ):  # until it has its own; it raises them again at the end
            signal.signal(number, lambda number, frame: setattr(server, "should_exit", True))
        # so that who reads the next line can ask, and waits for the first answer
        listener.listen(config.backlog)
        address, taken = listener.getsockname()[:2]
        log("listening", url=f"http://{address}:{taken}", bank=str(bank))
        server.run(sockets=[listener])
        log("ended", requests=app.metrics.answered)
        return app.metrics.answered


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"{host}:{port} cannot be listened at: {error.strerror or error}. Choose another --port."
        ) from None
    return listener
