"""The table of methods: a published method is one row, never a class."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ConfigError, near


@dataclass(frozen=True)
class Method:
    """One row: where the method comes from and the fields of the configuration that it sets.

    Args:
        name: Name of the row, as in `LotrConfig(method=...)`.
        title: Title of the paper.
        year: Year of the paper.
        url: Where to read it.
        purpose: One sentence on what it is for.
        modes: Coordinates along which sites share factors.
        core: Structure of the core.
        magnitude: Rule on the whole module.
        start: How the factors start.
    """

    name: str
    title: str
    year: int
    url: str
    purpose: str
    modes: tuple[str, ...]
    core: str = "free"
    magnitude: str = "none"
    start: str = "orthonormal"


_LOTR = ("LoTR: Low Tensor Rank Weight Adaptation", 2024, "https://arxiv.org/abs/2402.01376")

_ROWS = (
    Method(
        "lotr",
        *_LOTR,
        "The default: layers share factors, one pair for each projection.",
        modes=("layer",),
    ),
    Method(
        "lotr_joint",
        *_LOTR,
        "The smallest: all projections of equal shape share one pair, as the authors' code does.",
        modes=("layer", "projection"),
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}


def method(name: str) -> Method:
    """Return the row called `name`.

    Args:
        name: A key of `METHODS`.

    Returns:
        The row.

    Raises:
        ConfigError: There is no such row.

    Example:
        >>> method("lotr").modes
        ('layer',)
    """
    try:
        return METHODS[name]
    except KeyError:
        raise ConfigError(
            f"method={name!r} is not in the table of methods. {near(name, METHODS)} "
            "`lotr methods` describes them."
        ) from None
