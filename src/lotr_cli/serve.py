"""`lotr serve`: a bank over HTTP."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Option

from lotr.errors import ConfigError
from lotr.serving.settings import ServeSettings

from . import console
from .bank import Bank
from .console import Report

Token = Annotated[
    str | None, Option(envvar="LOTR_TOKEN", help="What clients must send.", show_default="none")
]
AdminToken = Annotated[
    str | None,
    Option(envvar="LOTR_ADMIN_TOKEN", help="What allows to add and remove tasks.", show_default="nobody may"),
]


def serve(
    bank: Bank,
    host: Annotated[
        str, Option(help="Address to listen at; 0.0.0.0 is all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    model: Annotated[
        str | None, Option(help="Base model.", show_default="the one recorded in the bank")
    ] = None,
    dtype: Annotated[str, Option(help="Type of the base model.")] = "float32",
    capacity: Annotated[str, Option(help="Tasks in memory: a number, or bytes such as 256MB.")] = "1024",
    token: Token = None,
    admin_token: AdminToken = None,
    **limits: Any,
) -> Report:
    """Answer over HTTP with the tasks of a bank, in batches mixed from all of them."""
    try:
        from lotr.serving.run import run
    except ModuleNotFoundError as error:
        raise ConfigError(f"This needs {error.name}: pip install 'lotr[serve]'.") from None
    given = {name: value for name, value in limits.items() if value is not None}
    settings = ServeSettings(**given, token=token, admin_token=admin_token)
    size = int(capacity) if capacity.isdigit() else capacity
    answered = run(bank, settings, host, port, model, dtype, size, console.calm)
    return Report({"requests": answered}, [f"{answered:,} requests were answered."])
