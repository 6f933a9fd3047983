"""The plan of an adapter: which sites share what, before anything exists.

It is computed once by `make_plan`; the tuner executes it, `lotr plan` prints it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

from ..math.magnitude import MAGNITUDES
from .blocks import Shape, Site, Target
from .groups import Group, Part, parts_of

_WIDTH = 4  # bytes of a number in float32


@dataclass(frozen=True)
class Plan:
    """Groups of an adapter, before anything exists; `print(plan)` shows a table.

    Args:
        groups: Who shares what.
        targets: The modules that are adapted.
        magnitude: Rule on every module, a key of `MAGNITUDES`.
        trainable: `"all"`, or `"cores"` when the factors stay as they start.

    Example:
        >>> from lotr.sharing.make_plan import make_plan
        >>> paths = [f"encoder.layer.{l}.attention.{p}" for l in range(12) for p in ("query", "value")]
        >>> plan = make_plan([Target(path, (768, 768), (8, 8)) for path in paths], modes=("layer",))
        >>> [group.name for group in plan.groups], plan.n_parameters
        (['query_768x768', 'value_768x768'], 26112)
    """

    groups: tuple[Group, ...]
    targets: tuple[Target, ...] = ()
    magnitude: str = "none"
    trainable: str = "all"

    @cached_property
    def parts(self) -> dict[str, tuple[Part, ...]]:
        """Path of a module → its parts, each of one group."""
        sites: dict[str, dict[str, list[Site]]] = defaultdict(lambda: defaultdict(list))
        for group in self.groups:
            for site in group.sites:
                sites[site.module][group.name].append(site)
        groups = {group.name: group for group in self.groups}
        return {
            target.path: parts_of([(groups[name], own) for name, own in sites[target.path].items()])
            for target in self.targets
        }

    @cached_property
    def shape_of(self) -> dict[str, Shape]:
        """Path of a module → its `(out, in)` features."""
        return {target.path: target.shape for target in self.targets}

    @property
    def n_sites(self) -> int:
        """Blocks that receive an update."""
        return sum(len(group.sites) for group in self.groups)

    @property
    def n_parameters(self) -> int:
        """Trained numbers in total, without a head."""
        factors = self.n_factors if self.trainable == "all" else 0
        return factors + self.n_cores + self.n_magnitudes

    @property
    def n_factors(self) -> int:
        """Numbers in the shared factors, trained or not."""
        return sum(group.n_factors for group in self.groups)

    @property
    def n_cores(self) -> int:
        """Numbers in the cores, and biases: what one more task costs when the factors are kept."""
        return sum(group.n_cores for group in self.groups)

    @property
    def has_biases(self) -> bool:
        """Whether biases train too."""
        return any(group.biases for group in self.groups)

    @property
    def n_magnitudes(self) -> int:
        """Numbers in the magnitudes."""
        rule = MAGNITUDES[self.magnitude]
        return sum(sum(shape[0] for shape in rule.shapes(*target.shape).values()) for target in self.targets)

    @property
    def lora_per_rank(self) -> int:
        """Numbers that plain LoRA has at rank 1 on the same modules: `Σ (in + out)`."""
        return sum(target.lora_per_rank for target in self.targets)

    @property
    def equal_lora_rank(self) -> float:
        """Rank at which plain LoRA on the same modules has as many numbers; below 1 no LoRA is as small."""
        return self.n_parameters / self.lora_per_rank if self.groups else 0.0

    @property
    def cut_ranks(self) -> str:
        """A sentence on the groups whose blocks are smaller than the rank; empty when every rank fits."""
        cut = [group for group in self.groups if group.rank != group.asked_rank]
        if not cut:
            return ""
        shown = ", ".join(f"{group.name} has {_ranks(group.rank)}" for group in cut[:3])
        more = f", and {len(cut) - 3} more" if len(cut) > 3 else ""
        asked = " and ".join(dict.fromkeys(_ranks(group.asked_rank) for group in cut))
        return f"Rank {asked} is cut to the size of the block where that is smaller: {shown}{more}."

    def __str__(self) -> str:
        header = ("group", "shares", "sites", "block", "rank", "numbers", "bytes")
        rows = [
            (
                group.name,
                ", ".join(group.modes) or "nothing",
                f"{len(group.sites):,}",
                "×".join(map(str, group.shape)),
                _ranks(group.rank) + ("" if group.rank == group.asked_rank else " (cut)"),
                f"{group.n_parameters:,}",
                f"{group.n_parameters * _WIDTH:,}",
            )
            for group in self.groups
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (header, *rows)]
        frozen = "" if self.trainable == "all" else "not trained, "
        trained, and_biases = self.n_parameters, " and biases" if self.has_biases else ""
        return "\n".join(
            [
                *lines,
                f"{trained:,} trained numbers, {trained * _WIDTH:,} bytes in float32, for {self.n_sites:,} sites in "
                f"{len(self.targets):,} modules:",
                f"{self.n_factors:,} in factors ({frozen}shared), {self.n_cores:,} in cores{and_biases}, "
                f"{self.n_magnitudes:,} in magnitudes. LoRA has as many at rank {self.equal_lora_rank:.2f}.",
                *([self.cut_ranks] if self.cut_ranks else []),
            ]
        )


def _ranks(rank: Shape) -> str:
    return str(rank[0] if rank[0] == rank[1] else rank)
