"""`lotr serve`: a bank over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import console
from .console import reported


def serve(
    bank: Annotated[Path, typer.Argument(help="Folder of the bank.", show_default=False)],
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 is all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    model: Annotated[
        str | None, typer.Option(help="Base model.", show_default="the one recorded in the bank")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Type of the base model.")] = "float32",
    capacity: Annotated[
        str, typer.Option(help="Tasks in memory: a number, or bytes such as 256MB.")
    ] = "1024",
    max_batch: Annotated[int, typer.Option(help="Rows that run at once.")] = 32,
    max_wait: Annotated[float, typer.Option(help="Milliseconds that a row waits for others.")] = 5.0,
    max_queue: Annotated[int, typer.Option(help="Rows that wait at most; more get the answer 429.")] = 1024,
    max_texts: Annotated[int, typer.Option(help="Texts of one request.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="Longest answer of a language model.")] = 512,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 30.0,
    token: Annotated[
        str | None, typer.Option(envvar="LOTR_TOKEN", help="What clients must send.", show_default=False)
    ] = None,
    admin_token: Annotated[
        str | None,
        typer.Option(
            envvar="LOTR_ADMIN_TOKEN", help="What allows to add and remove tasks.", show_default=False
        ),
    ] = None,
) -> None:
    """Answer over HTTP with the tasks of a bank, in batches mixed from all of them."""
    with reported(), console.stopwatch("Loading"):
        try:
            from lotr.serving.run import run
        except ModuleNotFoundError as error:
            raise console.usage_error(f"This needs {error.name}: pip install 'lotr[serve]'.") from None
        from lotr.serving.settings import ServeSettings

        settings = ServeSettings(
            max_batch=max_batch,
            max_wait=max_wait,
            max_queue=max_queue,
            max_texts=max_texts,
            max_tokens=max_tokens,
            timeout=timeout,
            token=token,
            admin_token=admin_token,
        )
        size = int(capacity) if capacity.isdigit() else capacity
        run(bank, settings, host, port, model, dtype, size, console.calm)
