"""Options of commands, made from the fields of their settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer

from .light import load

TrainSettings = load("lotr.training.settings").TrainSettings

_TYPES = {"int": int, "float": float, "str": str, "bool": bool}


def with_train_options(
    *panels: str, of: type = TrainSettings, leave_out: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option for each setting of some panels (default: of all), without those left out.

    Every option is optional here, because a config file may hold it.
    """
    wanted = [f for f in fields(of) if f.metadata["panel"] and f.name not in leave_out]
    made = [_parameter(f) for f in wanted if not panels or f.metadata["panel"] in panels]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        own = [
            p.replace(kind=p.KEYWORD_ONLY, annotation=hints[p.name])
            for p in inspect.signature(command).parameters.values()
            if p.kind is not p.VAR_KEYWORD
        ]

        def run(**values: Any) -> None:
            command(**values)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature([*made, *own])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*made, *own)}
        return run

    return decorate


def _parameter(f: Any) -> inspect.Parameter:
    kind = _TYPES[str(f.type).partition(" ")[0]]
    shown = f.metadata["shown"] or (None if kind is bool else f"default: {f.default}")
    note = f" [{shown}]".replace("[", "\\[") if shown else ""
    # no real default: a value that was given has to be told from one that was not
    option = typer.Option(
        f"--{f.name.replace('_', '-')}",
        help=f.metadata["help"] + note,
        rich_help_panel=f.metadata["panel"],
        show_default=False,
    )
    return inspect.Parameter(
        f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )
