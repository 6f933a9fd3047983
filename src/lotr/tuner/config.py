"""`LotrConfig`: what a user says about an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig
from peft.utils import PeftType

from ..errors import ConfigError, near
from ..files.card import add_usage
from ..math.cores import CORES
from ..math.init import DATA_INITS, INITS, WEIGHT_INITS
from ..math.magnitude import MAGNITUDES
from ..methods import method
from ..sharing.blocks import BLOCKS, Target
from ..sharing.plan import check_modes
from .meaning import check_meaning, checked_rank, pair

#: Default of a field that is filled in afterwards: from the basis, or with what its help tells.
_UNSAID: Any = None


def _help(text: str) -> Any:
    return {"help": text}


@dataclass
class LotrConfig(PeftConfig):
    """Configuration of a LoTR adapter: `ΔW_s = σ · U · C_s · Vᵀ`.

    Names follow PEFT where PEFT has one. Fields left at `None` are filled from the row of `method`, or from the `basis`
    where one is named; then a field that says otherwise is refused. `LotrConfig(r=16)` alone is a good LoTR.

    Raises:
        ConfigError: A field has no meaning, or contradicts the basis; the message names it.
        CheckpointError: The basis cannot be read.

    Source: https://arxiv.org/abs/2402.01376

    Example:
        >>> config = LotrConfig(r=16, target_modules=["q_proj", "v_proj"])
        >>> config.modes, config.rank
        (('layer',), (16, 16))
    """

    r: int | tuple[int, int] = field(
        default=_UNSAID,
        metadata=_help(
            "Rank of the shared factors: one number, or (k, r) for output and input. Default: 16."
        ),
    )
    method: str = field(
        default=_UNSAID,
        metadata=_help("Row of the table of methods; fields set explicitly override it. Default: lotr."),
    )
    modes: tuple[str, ...] | None = field(
        default=None,
        metadata=_help(
            "Coordinates along which sites share factors: layer, projection, head; or site, all in one."
        ),
    )
    core: str | None = field(
        default=None, metadata=_help("Structure of the cores: free, identity, tucker, cp, tt.")
    )
    core_ranks: int | dict[str, int] | None = field(
        default=None,
        metadata=_help(
            "Tucker cores: rank of every mode, or of each by name. Default: r, at most the mode's extent."
        ),
    )
    blocks: str | None = field(
        default=None,
        metadata=_help("How weights are cut into sites: none, head (attention heads), square."),
    )
    magnitude: str | None = field(
        default=None,
        metadata=_help("Rule on the whole weight: none, per_output, per_output_and_input, base_and_update."),
    )
    norm_gradient: bool = field(
        default=False,
        metadata=_help(
            "Send gradients through the norms of a magnitude too, instead of treating them as constants."
        ),
    )
    scaling: float = field(
        default=_UNSAID,
        metadata=_help("σ: multiplies the update. It is not divided by the rank. Default: 1."),
    )
    init: str | None = field(
        default=None,
        metadata=_help(
            "How the shared factors start: orthonormal, gaussian, kaiming, weight (singular directions); gradient and "
            "lora begin orthonormal until lotr.init_from_data(model, batches) or lotr.init_from_lora(model, folder) "
            "turns them. The name is saved either way."
        ),
    )
    trainable: str | None = field(
        default=None, metadata=_help("What trains: all, or cores (the factors stay as they start).")
    )
    seed: int | None = field(
        default=None,
        metadata=_help("Seed of the factors. Default: torch's own seed, so torch.manual_seed decides."),
    )
    dropout: float = field(default=0.0, metadata=_help("Probability of dropping an input of the update."))
    target_modules: list[str] | str | None = field(
        default=None,
        metadata=_help("Modules to adapt: list of names, regex, or 'all-linear'. Default: by architecture."),
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata=_help("Modules to leave out: list of names or regex.")
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata=_help("Indices of the layers to adapt. Default: all.")
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata=_help("Name of the module list whose number is the layer, e.g. 'layers' or 'h'."),
    )
    rank_pattern: dict[str, int | tuple[int, int]] = field(
        default_factory=dict,
        metadata=_help("Ranks of single modules, by name or regex; all sites of a group need the same one."),
    )
    bias: Literal["none", "all", "lotr_only"] = field(
        default="none", metadata=_help("Which biases of the base model to train too.")
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata=_help("Modules trained in full and saved with the adapter, e.g. a new head.")
    )
    basis: str | None = field(
        default=None,
        metadata=_help(
            "Path or hub id of an adapter whose factors are kept, and whose structure is taken; only cores (and "
            "magnitudes, and a head) then train, and the file refers to the basis."
        ),
    )
    basis_copy: bool = field(
        default=False, metadata=_help("Save the factors of the basis too, so that the file stands alone.")
    )
    basis_hash: str | None = field(
        default=None,
        metadata=_help(
            "Filled in when the adapter is made: which factors the cores belong to. Checked when read."
        ),
    )
    targets: list[dict[str, Any]] | None = field(
        default=None,
        metadata=_help(
            "Filled in when the adapter is made: every adapted module in model order, with its shape, rank and cuts. "
            "The plan follows from it, so a file speaks for itself."
        ),
    )
    init_weights: bool | None = field(
        default=None,
        metadata=_help(
            "Whether the update starts at zero; False starts it at random. Default: zero, except where the magnitude "
            "divides by the update's norm."
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("LOTR")
        if (
            self.basis is not None and self.basis_hash is None
        ):  # what is read from a file has its structure already
            from .basis import take_structure  # there configurations are read

            take_structure(self)
        self.r = 16 if self.r is None else self.r
        self.method = self.method or "lotr"
        self.scaling = 1.0 if self.scaling is None else self.scaling
        row = method(self.method)
        self.modes = check_modes(row.modes if self.modes is None else self.modes)
        self.core = _one_of("core", self.core or row.core, CORES)
        self.blocks = _one_of("blocks", self.blocks or row.blocks, BLOCKS)
        self.magnitude = _one_of("magnitude", self.magnitude or row.magnitude, MAGNITUDES)
        self._init_is_open = self.init is None
        self.init = _one_of("init", self.init or row.init, (*INITS, *WEIGHT_INITS, *DATA_INITS))
        default = "cores" if self.basis is not None else row.trainable
        self.trainable = _one_of("trainable", self.trainable or default, ("all", "cores"))
        if self.basis is not None and Path(self.basis).is_dir():
            self.basis = str(
                Path(self.basis).resolve()
            )  # it is read again from wherever the adapter is loaded
        self.bias = _one_of("bias", self.bias, ("none", "all", "lotr_only"))  # type: ignore[assignment]
        self.r = checked_rank("r", self.r)
        self.rank_pattern = {
            name: checked_rank(f"rank_pattern[{name!r}]", r) for name, r in (self.rank_pattern or {}).items()
        }
        check_meaning(self)
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout={self.dropout} is not a probability below one. Use 0 <= dropout < 1.")
        if not self.scaling > 0:
            raise ConfigError(f"scaling={self.scaling} leaves nothing to train. Use a positive number.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("layers_pattern is set but layers_to_transform is not. Name the layers too.")
        if (
            isinstance(self.target_modules, str)
            and self.layers_to_transform is not None
            and (self.target_modules != "all-linear")
        ):
            raise ConfigError(
                "layers_to_transform cannot be combined with a regex in target_modules. Put the layers into "
                "the regex, or name the modules as a list."
            )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; sets become sorted lists, because a set has another order in every process."""
        said = {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in super().to_dict().items()
        }
        return said if self.refers_to_basis else said | {"basis": None}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration, and add how to use it to the model card beside it."""
        super().save_pretrained(save_directory, **kwargs)
        additive = MAGNITUDES[str(self.magnitude)].additive
        add_usage(Path(save_directory), self.task_type, additive, basis=self.reference)

    @property
    def starts_at_zero(self) -> bool:
        """Whether the update is zero when training starts."""
        if self.init_weights is not None:
            return self.init_weights
        return not MAGNITUDES[str(self.magnitude)].divides_by_update

    def warn_of_random_factors(self) -> None:
        """Warn where factors will stay as random as they start, and nobody asked for that."""
        stay = self._init_is_open and self.trainable == "cores" and self.basis is None
        if stay and self.init == "orthonormal" and self.targets is None:
            warnings.warn(
                "trainable='cores' keeps the factors as they start, and they start random. "
                "lotr.init_from_data(model, batches) turns them towards your data (init='gradient' says that you will "
                "call it); init='orthonormal' keeps them random.",
                stacklevel=2,
            )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> LotrConfig:
        """Read the configuration of an adapter; a basis that moved along is found beside the adapter."""
        config: LotrConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        config.look_for_basis(Path(pretrained_model_name_or_path))
        return config

    def look_for_basis(self, folder: Path) -> None:
        """Take the folder of the basis's name beside an adapter's folder where the recorded one does not exist."""
        if self.basis is not None and not Path(self.basis).is_dir():
            beside = folder.resolve().parent / Path(self.basis).name
            self.basis = str(beside) if beside.is_dir() else self.basis

    @property
    def refers_to_basis(self) -> bool:
        """Whether the adapter's file holds no factors, because they are those of a basis."""
        return self.basis is not None and self.trainable == "cores" and not self.basis_copy

    @property
    def reference(self) -> tuple[str, str | None] | None:
        """Path or hub id of the basis that the adapter's file refers to, and its hash."""
        return (str(self.basis), self.basis_hash) if self.refers_to_basis else None

    @property
    def made_for(self) -> list[Target]:
        """The modules that the adapter was made for, as its file tells."""
        return [Target.from_dict(said) for said in self.targets or ()]

    @property
    def rank(self) -> tuple[int, int]:
        """Ranks `(k, r)` where `rank_pattern` says nothing else."""
        return pair(self.r)

    # PEFT's hot-swapping computes a scaling from LoRA's names: lora_alpha / r
    use_rslora = False

    @property
    def lora_alpha(self) -> float:
        """The number that gives `σ` when divided by `r`, for PEFT's hot-swapping."""
        if not isinstance(self.r, int) or self.rank_pattern:
            raise ConfigError("Hot-swapping needs one rank: r must be one number and rank_pattern empty.")
        if self.trainable == "cores" and not MAGNITUDES[str(self.magnitude)].additive:
            raise ConfigError(
                f"Hot-swapping goes behind the back of what magnitude={self.magnitude!r} keeps of frozen factors. Load "
                "the adapter beside the first and use set_adapter."
            )
        return self.scaling * self.r

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """Always empty: one scaling an adapter."""
        return {}


def _one_of(name: str, value: str, known: Iterable[str]) -> str:
    if value not in known:
        raise ConfigError(f"{name}={value!r} is not known. {near(str(value), known)}")
    return value
