"""How settings that are written as text are read, and numbers checked."""

from __future__ import annotations

import re

from ..errors import ConfigError, near

_REGEX = r"[*+?()\[\]|\\^$]"  # a character that no module's name has


def read_modes(text: str | None) -> tuple[str, ...] | None:
    """Read coordinates with commas; `none` shares nothing.

    Example:
        >>> read_modes("layer, projection"), read_modes("none"), read_modes(None)
        (('layer', 'projection'), (), None)
    """
    if text is None:
        return None
    return tuple(mode for mode in re.split(r"[,\s]+", text) if mode and mode != "none")


def read_core_ranks(text: str | None) -> int | dict[str, int] | None:
    """Read `4`, or `layer=8,head=4`.

    Example:
        >>> read_core_ranks("4"), read_core_ranks("layer=8,head=4")
        (4, {'layer': 8, 'head': 4})
    """
    if text is None:
        return None
    try:
        if "=" not in text:
            return int(text)
        return {name.strip(): int(n) for name, n in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ConfigError(
            f"core_ranks={text!r} holds no ranks. Use a number, or `mode=number` with commas between."
        ) from None


def read_rank(text: str) -> tuple[int, int]:
    """Read `16` or `8,16`.

    Example:
        >>> read_rank("8,16")
        (8, 16)
    """
    parts = str(text).split(",")
    if len(parts) > 2 or not all(re.fullmatch(r"\s*[1-9]\d*\s*", part) for part in parts):
        raise ConfigError(
            f"rank={text!r} is not a rank. Use a positive integer, a pair `k,r` of them, or `auto`."
        )
    numbers = [int(part) for part in parts]
    return numbers[0], numbers[-1]


def target_modules(text: str | None) -> list[str] | str | None:
    """Read names with commas, a regex, or `all-linear`.

    Example:
        >>> target_modules("query,value"), target_modules("all-linear"), target_modules(r".*layer.[01].*query")
        (['query', 'value'], 'all-linear', '.*layer.[01].*query')
    """
    if text is not None and re.search(_REGEX, text):
        try:
            re.compile(text)
        except re.error as error:
            raise ConfigError(
                f"target_modules={text!r} is not a regex: {error}. Name modules with commas instead."
            ) from None
        return text
    if text is None or text == "all-linear":
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def check_positive(settings: object, *names: str) -> None:
    """Refuse numbers that are not positive.

    Raises:
        ConfigError: The message names the first of them.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name}={value} trains nothing. Use a positive number.")


def check_logger(report_to: str) -> None:
    """Refuse a place to log to that transformers does not know, or whose package is missing.

    Raises:
        ConfigError: The message names those that there are.
    """
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    known = ["none", "all", *get_available_reporting_integrations()]
    if report_to not in known:
        raise ConfigError(f"report_to={report_to!r} is not known, or not installed. {near(report_to, known)}")
