"""The table of methods: a published method is one row, never a class."""

from __future__ import annotations

from collections.abc import Iterable
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
        blocks: How weights are cut into sites.
        magnitude: Rule on the whole module.
        init: How the factors start.
        trainable: What trains: `"all"`, or `"cores"` alone.
    """

    name: str
    title: str
    year: int
    url: str
    purpose: str
    modes: tuple[str, ...]
    core: str = "free"
    blocks: str = "none"
    magnitude: str = "none"
    init: str = "orthonormal"
    trainable: str = "all"


def _arxiv(title: str, year: int, number: str) -> tuple[str, int, str]:
    return title, year, f"https://arxiv.org/abs/{number}"


_LOTR = _arxiv("LoTR: Low Tensor Rank Weight Adaptation", 2024, "2402.01376")
_LORA = _arxiv("LoRA: Low-Rank Adaptation of Large Language Models", 2021, "2106.09685")
_DORA = _arxiv("DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, "2402.09353")
_BORA = _arxiv("BoRA: Bi-dimensional Weight-Decomposed Low-Rank Adaptation", 2024, "2412.06441")
_MAP = _arxiv("MAP: Revisiting Weight Decomposition for Low-Rank Adaptation", 2025, "2505.23094")
_TENSLORA = _arxiv("TensLoRA: Tensor Alternatives for Low-Rank Adaptation", 2025, "2509.19391")
_FACT = _arxiv("FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer", 2022, "2212.03145")
_LORTA = _arxiv("LoRTA: Low Rank Tensor Adaptation of Large Language Models", 2024, "2410.04060")
_METATT = _arxiv(
    "MetaTT: A Global Tensor-Train Adapter for Parameter-Efficient Fine-Tuning", 2025, "2506.09105"
)
_CARA = (
    "Canonical Rank Adaptation: An Efficient Fine-Tuning Strategy for Vision Transformers",
    2025,
    "https://openreview.net/forum?id=vexHifrbJg",
)
_LORA_XS = _arxiv(
    "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", 2024, "2405.17604"
)


def _tenslora() -> Iterable[Method]:
    """The seven constructions of TensLoRA, each with both cores."""
    names = {"att": "head", "qkv": "projection", "depth": "layer"}
    for name in ("att", "qkv", "depth", "att_qkv", "att_depth", "qkv_depth", "att_qkv_depth"):
        along = [mode for part, mode in names.items() if part in name]
        modes = tuple(mode for mode in ("layer", "projection", "head") if mode in along)
        shared = f"{', '.join(along[:-1])} and {along[-1]}" if along[1:] else along[0]
        others = [part for part in ("layer", "projection") if part not in along]
        each = f" for each {' and '.join(others)}" if others else ""
        for core, suffix in (("tucker", ""), ("cp", "_cp")):
            yield Method(
                f"tenslora_{name}{suffix}",
                *_TENSLORA,
                f"A {'Tucker' if core == 'tucker' else 'CP'} tensor along {shared}{each}.",
                modes=modes,
                core=core,
                blocks="head" if "head" in modes else "none",
            )


_ROWS = (
    Method(
        "lotr", *_LOTR, "The default: layers share factors, one pair for each projection.", modes=("layer",)
    ),
    Method(
        "lotr_joint",
        *_LOTR,
        "The smallest LoTR: all projections of equal shape share one pair, as the authors' code does.",
        modes=("layer", "projection"),
    ),
    Method(
        "lora",
        *_LORA,
        "The common reference: every module has two factors of its own.",
        modes=(),
        core="identity",
        init="kaiming",
    ),
    Method(
        "dora",
        *_DORA,
        "LoRA, and a trained norm for every output feature.",
        modes=(),
        core="identity",
        magnitude="per_output",
        init="kaiming",
    ),
    Method(
        "bora",
        *_BORA,
        "LoRA, and trained norms for every output and every input feature.",
        modes=(),
        core="identity",
        magnitude="per_output_and_input",
        init="kaiming",
    ),
    Method(
        "map",
        *_MAP,
        "LoRA as a direction, with two trained sizes a module: of the weight and of the update.",
        modes=(),
        core="identity",
        magnitude="base_and_update",
    ),
    *_tenslora(),
    Method(
        "fact_tt",
        *_FACT,
        "All weights cut into squares share one pair; a matrix each in between.",
        modes=("site",),
        blocks="square",
    ),
    Method(
        "fact_tk",
        *_FACT,
        "All weights cut into squares in one Tucker tensor.",
        modes=("site",),
        core="tucker",
        blocks="square",
    ),
    Method(
        "lorta",
        *_LORTA,
        "One CP tensor over all layers, projections and heads: the fewest numbers a rank.",
        modes=("layer", "projection", "head"),
        core="cp",
        blocks="head",
    ),
    Method(
        "metatt_4d",
        *_METATT,
        "One tensor train over layers and projections.",
        modes=("layer", "projection"),
        core="tt",
    ),
    Method(
        "metatt_5d",
        *_METATT,
        "One tensor train over layers, projections and heads.",
        modes=("layer", "projection", "head"),
        core="tt",
        blocks="head",
    ),
    Method(
        "cara",
        *_CARA,
        "One CP tensor over modules and heads.",
        modes=("site", "head"),
        core="cp",
        blocks="head",
    ),
    Method(
        "lora_xs",
        *_LORA_XS,
        "Only a core a module trains, between fixed singular directions of its own weight.",
        modes=(),
        init="weight",
        trainable="cores",
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
