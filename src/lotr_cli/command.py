"""A command: its options, the sign that it works, its errors, and its report as tables or as JSON."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer

from . import console
from .examples import EXAMPLES

_TYPES = {"int": int, "float": float, "str": str, "bool": bool}
_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _parameter(name: str, kind: Any, default: Any, off: bool = False, **options: Any) -> inspect.Parameter:
    word = name.replace("_", "-")
    option = typer.Option(f"--{word}/--no-{word}" if off else f"--{word}", **options)
    return inspect.Parameter(name, _KEYWORD, default=default, annotation=Annotated[kind, option])


_JSON = _parameter("json", bool, False, help="Print the report as JSON on stdout.")
_TRUST = _parameter(
    "trust_remote_code", bool, False, help="Run the code that the base model brings, if it does."
)


def command(
    app: typer.Typer,
    path: str,
    waiting: str,
    settings: type | None = None,
    panels: Sequence[str] = (),
    loads_base: bool = False,
) -> Callable[[Callable[..., console.Report | None]], Callable[..., None]]:
    """Make a command of a function that returns a report.

    Args:
        app: Where the command is registered.
        path: Words of the command after `lotr`; they name its examples too.
        waiting: What the user reads until the first bar or the report.
        settings: Dataclass whose fields become options; each is optional, because a config file may hold it, and comes
            as `None` where it was not given.
        panels: Those of its panels that the command takes; default: all.
        loads_base: Whether it loads a base model, which may bring code of its own.
    """

    def register(function: Callable[..., console.Report | None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = [
            p.replace(kind=_KEYWORD, annotation=hints[p.name])
            for p in inspect.signature(function).parameters.values()
            if p.kind is not p.VAR_KEYWORD
        ]
        described = [f for f in fields(settings) if f.metadata["panel"]] if settings else []
        options = [_option(f) for f in described if not panels or f.metadata["panel"] in panels]
        parameters = (*options, *own, *((_TRUST,) if loads_base else ()), _JSON)

        def run(json: bool, trust_remote_code: bool = False, **values: Any) -> None:
            with console.working(waiting), ExitStack() as stack:
                if trust_remote_code:
                    from lotr.training.base_model import trusted_code

                    stack.enter_context(trusted_code())
                report = function(**values)
                if report is not None:
                    report.show(json)

        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        examples = "\n\n".join(f"`{line}`" for line in EXAMPLES[path])
        app.command(path.split()[-1], epilog=f"**Examples**\n\n{examples}")(run)
        return run

    return register


def _option(f: Any) -> inspect.Parameter:
    """Return the option of a setting."""
    kind = _TYPES[str(f.type).partition(" ")[0]]
    shown = f.metadata["shown"] or (None if kind is bool else f"default: {f.default}")
    note = f" [{shown}]".replace("[", "\\[") if shown else ""
    about = {"help": f.metadata["help"] + note, "rich_help_panel": f.metadata["panel"]}
    off = kind is bool and f.default is None  # what the method decides can be turned off
    # no real default: a value that was given has to be told from one that was not
    return _parameter(f.name, kind | None, None, off, **about, show_default=False)
