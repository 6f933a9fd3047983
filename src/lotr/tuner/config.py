"""`LotrConfig`: the configuration of an adapter."""

# `_field` returns the field of a dataclass, with its help
# ruff: noqa: RUF009
from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig
from peft.utils import PeftType, TaskType
from peft.utils.other import get_pattern_key

from ..errors import CheckpointError, ConfigError
from ..files.adapter_folder import CONFIG, is_bank, write_config
from ..files.atomic import CHECKSUM, check_sealed, read_json
from ..files.card import Card, update_card
from ..math.cores import CORES
from ..math.dropout import PLACES
from ..math.init import CORE_INITS, DATA_INITS, INITS, WEIGHT_INITS, ZEROS
from ..math.magnitude import MAGNITUDES
from ..methods import Method, method
from ..sharing.blocks import BLOCKS, Target
from ..sharing.make_plan import UNEQUAL, check_modes, make_plan
from ..sharing.plan import Plan
from .checks import FORMAT, check_fields, check_format, check_kinds, check_meaning, checked_rank, one_of
from .lora_words import check_lora_words

_TARGETS = ("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern")

#: Fields that an adapter on a basis has as its basis. The factors are kept, so how they start is one of them.
STRUCTURE = (
    "method",
    "r",
    "modes",
    "core",
    "core_ranks",
    "core_init",
    "blocks",
    "unequal",
    "layers_per_group",
    "scaling",
    "rank_pattern",
    "init",
    "lora_bias",
)
#: Fields that an adapter on a basis takes from it where they are open, and may have otherwise.
_FROM_BASIS = ("magnitude", "dropout_place")


def _field(help: str, default: Any = None) -> Any:
    """Return a field of the configuration; one that the constructor fills in defaults to None whatever its type."""
    return field(default=default, metadata={"help": help})


@dataclass
class LotrConfig(PeftConfig):
    """Configuration of a LoTR adapter: `ΔW_s = σ · U · C_s · Vᵀ`.

    Names follow PEFT where PEFT has one. Fields left at `None` are filled from the row of `method`, or from the `basis`
    where one is named; then a field that says otherwise is refused. `LotrConfig(r=16)` alone is a good LoTR.

    The constructor reads no file: a basis is read when the plan is made.

    Raises:
        ConfigError: A field has no meaning; the message names it, or its counterpart for the words of LoRA.

    Source: https://arxiv.org/abs/2402.01376

    Example:
        >>> config = LotrConfig(r=16, target_modules=["q_proj", "v_proj"])
        >>> config.modes, config.rank
        (('layer',), (16, 16))
    """

    r: int | tuple[int, int] = _field(
        "Rank of the shared factors: one number, or (k, r) for output and input. Default: 16."
    )
    method: str = _field("Row of the table of methods; fields set explicitly override it. Default: lotr.")
    modes: tuple[str, ...] = _field(
        "Coordinates along which sites share factors: layer, projection, head, expert; or site, all in one; task, of a "
        "train in a bank. In a tensor train from the output to the input."
    )
    core: str = _field("Structure of the cores: free, identity, tucker, cp, scaled_cp, tt.")
    core_ranks: int | dict[str, int] | None = _field(
        "Tucker cores: rank of every mode, or of each by name. Default: r, at most the mode's extent."
    )
    blocks: str = _field(
        "How weights are cut into sites: none, head (attention heads), head_rows (the output projection by rows too), "
        "square, head_or_square (query, key and value by heads, others into squares)."
    )
    unequal: str = _field(
        "What sites of unequal shape do that would share: grouped_query (query, key and value share, narrower ones use "
        "the first rows of the factor), slice (all share so), separate, error. Default: grouped_query.",
    )
    layers_per_group: int | None = _field(
        "How many layers in order share factors, where layers do, by the first number of a path. Default: all."
    )
    magnitude: str = _field(
        "Rule on the whole weight: none, per_output, per_output_and_input, base_and_update."
    )
    norm_gradient: bool = _field(
        "Send gradients through the norms of a magnitude too, instead of treating them as constants.",
        False,
    )
    scaling: float = _field(
        "σ: multiplies the update. It is not divided by the rank. Default: by method, mostly 1."
    )
    alpha: float | None = _field(
        "Instead of scaling: σ = alpha / r, as many papers have it. Saved as scaling."
    )
    init: str = _field(
        "How the shared factors start: orthonormal, gaussian, kaiming (±1/√width), uniform (±1/√rank), identity, "
        "weight (singular directions), weight_values (those of V times their singular values); "
        "gradient, first_step and lora begin orthonormal until lotr.init_from_data(model, batches) or "
        "lotr.init_from_lora(model, folder) turns them. The name is saved either way."
    )
    core_init: str | None = _field(
        "How the numbers of the cores start: uniform (±1/√rank), kaiming (of free cores: the cores of a weight "
        "as one linear layer), xavier, tiny, identity. Default: as the structure says."
    )
    zero: str = _field(
        "What starts at zero, so that the update does: core, output (the factor U), input (the factor V), or none. "
        "Default: by method; core where the cores train alone or the factors are turned to data."
    )
    trainable: str = _field("What trains: all, or cores (the factors stay as they start).")
    seed: int | None = _field("Seed of the factors. Default: torch's own seed, so torch.manual_seed decides.")
    dropout: float = _field("Probability of dropping a number of the update while it trains.", 0.0)
    dropout_place: str = _field(
        "What dropout drops: input, core_output (what the factor U multiplies), components (of Tucker and CP cores), "
        "update (numbers of ΔW, which is then built). Default: by method, mostly input."
    )
    target_modules: list[str] | str | None = _field(
        "Modules to adapt: list of names, regex, or 'all-linear'. Default: by architecture."
    )
    target_parameters: list[str] | None = _field(
        "Parameters that hold the experts of a layer, such as 'mlp.experts.down_proj'; alone, no module is adapted."
    )
    exclude_modules: list[str] | str | None = _field("Modules to leave out: list of names or regex.")
    layers_to_transform: list[int] | int | None = _field("Indices of the layers to adapt. Default: all.")
    layers_pattern: list[str] | str | None = _field(
        "Name of the module list whose number is the layer, e.g. 'layers' or 'h'."
    )
    rank_pattern: dict[str, int | tuple[int, int]] = _field(
        "Ranks of single modules, by name or regex; all sites of a group need the same one."
    )
    bias: Literal["none", "all", "lotr_only"] = _field("Which biases of the base model to train too.", "none")
    lora_bias: bool = _field(
        "Add to the bias of every module that has one and is not cut by heads: σ times a trained vector, one a "
        "projection, which the layers of a group share. Default: by method, mostly False."
    )
    modules_to_save: list[str] | None = _field(
        "Modules trained in full and saved with the adapter, e.g. a new head."
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = _field(
        "Rows of the embedding that are trained and saved with the adapter, for new tokens; or by name of an embedding."
    )
    basis: str | None = _field(
        "Path or hub id of an adapter whose factors are kept, and whose structure is taken; only cores (and "
        "magnitudes, and a head) then train, and the file refers to the basis."
    )
    basis_copy: bool = _field("Save the factors of the basis too, so that the file stands alone.", False)
    basis_hash: str | None = _field(
        "Filled in when the adapter is made: which factors the cores belong to. Checked when read."
    )
    targets: list[dict[str, Any]] | None = _field(
        "Filled in when the adapter is made: every adapted module in model order, with its shape, rank and "
        "cuts. The plan follows from it, so a file speaks for itself."
    )
    format: int = _field("Version of the adapter's folder; others are refused when read.", FORMAT)
    checksum: str | None = _field("Filled in when saved: of all other fields. Checked when read.")
    init_weights: bool | None = _field(
        "Whether the update starts at zero; False starts it at random. Default: zero, except where the "
        "magnitude divides by the update's norm."
    )

    def __new__(cls, *args: Any, **fields: Any) -> LotrConfig:
        """Refuse folders of other formats and the words of LoRA before the constructor refuses unknown fields."""
        check_format(fields)
        check_lora_words(fields, cls.__dataclass_fields__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("LOTR")
        self.task_type = self.task_type and TaskType(self.task_type).value  # text, however it was given
        self.format, self.checksum = FORMAT, None
        on_basis = self.basis is not None and self.basis_hash is None
        # what is left open beside a basis is filled in from it when the plan is made
        self._open = tuple(
            name for name in (*STRUCTURE, *_FROM_BASIS) if on_basis and getattr(self, name) in (None, {})
        )
        self._fill()
        if not self._open:
            check_meaning(self)

    def _fill(self) -> None:
        """Fill in what was left open from the row of the method, and check every field alone."""
        check_kinds(self)
        row = method(self.method or "lotr")
        self.method = row.name
        self.r = checked_rank("r", 16 if self.r is None else self.r)
        self.modes = check_modes(row.modes if self.modes is None else self.modes)
        self.core = one_of("core", self.core or row.core, CORES)
        self.blocks = one_of("blocks", self.blocks or row.blocks, BLOCKS)
        self.magnitude = one_of("magnitude", self.magnitude or row.magnitude, MAGNITUDES)
        self._init_is_open = self.init is None
        self.init = one_of("init", self.init or row.init, (*INITS, *WEIGHT_INITS, *DATA_INITS))
        trainable = self.trainable or ("cores" if self.basis is not None else row.trainable)
        self.trainable = one_of("trainable", trainable, ("all", "cores"))
        self.core_init = row.core_init if self.core_init is None and self.core == row.core else self.core_init
        if self.core_init is not None:
            one_of("core_init", self.core_init, CORE_INITS)
        self.zero = one_of("zero", self.zero or self._default_zero(row), ZEROS)
        self._fill_scaling(row)
        self.lora_bias = row.lora_bias if self.lora_bias is None else bool(self.lora_bias)
        one_of("bias", self.bias, ("none", "all", "lotr_only"))
        self.unequal = one_of("unequal", self.unequal or "grouped_query", UNEQUAL)
        self.rank_pattern = {
            name: checked_rank(f"rank_pattern[{name!r}]", r) for name, r in (self.rank_pattern or {}).items()
        }
        for name in ("target_modules", "exclude_modules"):
            names = getattr(self, name)
            if isinstance(names, list | tuple | set):
                if odd := [entry for entry in names if not isinstance(entry, str)]:
                    raise ConfigError(f"{name} has {odd[0]!r}, which is no name. Name modules by text.")
                setattr(self, name, set(names))
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]
        for name in ("layers_to_transform", "layers_pattern", "target_parameters", "trainable_token_indices"):
            if isinstance(several := getattr(self, name), tuple | set | range):
                setattr(self, name, list(several))  # as a file has them
        place = row.dropout_place if self.core == row.core else "input"
        self.dropout_place = one_of("dropout_place", self.dropout_place or place, PLACES)
        check_fields(self)
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            self.target_modules = "all-linear"  # PEFT takes any case
        regex = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if regex and self.layers_to_transform is not None:
            raise ConfigError(
                "layers_to_transform cannot be combined with a regex in target_modules. Put the layers into "
                "the regex, or name the modules as a list."
            )

    def _default_zero(self, row: Method) -> str:
        """Return what starts at zero where nothing was said: as in the row, where that can train."""
        if CORES[self.core].is_identity:
            return "output"
        factors_stay = self.trainable == "cores" and row.zero != "none"
        return "core" if factors_stay or self.init in DATA_INITS or self.init_weights else row.zero

    def _fill_scaling(self, row: Method) -> None:
        """Fill in `σ`: as given, or `alpha / r`; what was left open is as in the row."""
        if self.scaling is not None and self.alpha is not None:
            raise ConfigError(
                f"scaling={self.scaling} and alpha={self.alpha} say one number twice, σ = alpha / r. Leave one out."
            )
        if self._open and self.alpha is not None:
            raise ConfigError(
                f"alpha={self.alpha} contradicts basis={self.basis!r}, whose scaling is kept. Leave it out."
            )
        self._alpha = row.alpha if self.alpha is None and self.scaling is None else self.alpha
        self.alpha = None
        self.scaling = 1.0 if self.scaling is None else self.scaling
        self.set_rank(self.r)

    def set_rank(self, r: int | tuple[int, int]) -> None:
        """Set the rank, and `σ` with it where it is `alpha / r`."""
        self.r = r
        if self._alpha is not None:
            self.scaling = self._alpha / self.rank[1]

    def take_structure(self, basis: LotrConfig) -> None:
        """Fill in from the configuration of the basis what was left open.

        Raises:
            ConfigError: A field contradicts the basis.
        """
        if self.basis is not None and Path(self.basis).is_dir():
            self.basis = str(Path(self.basis).resolve())  # read again from wherever the adapter is loaded
        for name in STRUCTURE:
            own, theirs = getattr(self, name), getattr(basis, name)
            if name not in self._open and own != theirs:
                raise ConfigError(
                    f"{name}={own!r} contradicts basis={self.basis!r}, which has {name}={theirs!r}. An adapter has "
                    "the structure of its basis; leave it out."
                )
            setattr(self, name, theirs)
        for name in _FROM_BASIS:
            if name in self._open:
                setattr(self, name, getattr(basis, name))
        if all(getattr(self, name) is None for name in _TARGETS):
            for name in _TARGETS:
                setattr(self, name, getattr(basis, name))
        self._open = ()
        check_meaning(self)

    def warn_of_random_factors(self) -> None:
        """Warn where factors will stay as random as they start, and nobody asked for that."""
        if self.would_stay_random:
            warnings.warn(
                "trainable='cores' keeps the factors as they start, and they start random. "
                "lotr.init_from_data(model, batches) turns them towards your data (init='gradient' says that you will "
                "call it); init='orthonormal' keeps them random.",
                stacklevel=2,
            )

    def plan_for(self, targets: Sequence[Target]) -> Plan:
        """Return the plan of an adapter on some modules.

        Raises:
            PlanError: Sites cannot share as the configuration asks.
        """
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        return make_plan(
            targets,
            modes=self.modes,
            core=self.core,
            blocks=self.blocks,
            unequal=self.unequal,
            core_ranks=self.core_ranks,
            magnitude=self.magnitude,
            trainable=self.trainable,
            layers_pattern=patterns or (),
            layers_per_group=self.layers_per_group,
        )

    def recorded_plan(self) -> Plan:
        """Return the plan of the adapter that was made, from the modules that are recorded in `targets`."""
        return self.plan_for([Target.from_dict(fields) for fields in self.targets or ()])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; sets become sorted lists, because a set has another order in every process."""
        fields = {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in super().to_dict().items()
        }
        stands_alone = self.targets is not None and not self.refers_to_basis
        return fields | dict.fromkeys(self._open) | ({"basis": None} if stands_alone else {})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the configuration, and make the model card beside it say how to use the adapter."""
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        write_config(folder, read_json(folder / CONFIG, "an adapter's configuration"))
        update_card(folder, self.card())

    def card(self, n_labels: int = 0) -> Card:
        """Return what a model card tells of the adapter."""
        targets = [Target.from_dict(fields) for fields in self.targets or ()]
        return Card(
            self.method,
            self.base_model_name_or_path,
            self.task_type,
            MAGNITUDES[self.magnitude].has_lora_form,
            n_labels,
            (str(self.basis), str(self.basis_hash)) if self.refers_to_basis else None,
            ranks=sorted({target.rank for target in targets}),
            targets=sorted({target.path.rpartition(".")[2] for target in targets}),
        )

    @property
    def would_stay_random(self) -> bool:
        """Whether factors stay as random as they start, and nobody asked for that."""
        is_random = self._init_is_open and self.init == "orthonormal" and self.basis is None
        return is_random and self.trainable == "cores"

    @property
    def starts_at_zero(self) -> bool:
        """Whether the update is zero when training starts."""
        if self.init_weights is not None:
            return self.init_weights
        return self.zero != "none" and not MAGNITUDES[self.magnitude].divides_by_update

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> LotrConfig:
        """Read the configuration of an adapter; a basis that moved along is found beside the adapter.

        Raises:
            CheckpointError: There is a bank, of which `CoreBank.open` makes a model.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if is_bank(folder):
            raise CheckpointError(
                f"{folder} is a bank of tasks, not an adapter. Put it on its base model with "
                "CoreBank.open(folder).wrap(base), or write one task as an adapter with `lotr bank export`."
            )
        return cls.read(pretrained_model_name_or_path, subfolder, **kwargs)

    @classmethod
    def read(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> LotrConfig:
        """Read the configuration of an adapter, or of the basis of a bank."""
        config: LotrConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if config.basis is not None and not Path(config.basis).is_dir():
            beside = Path(pretrained_model_name_or_path).resolve().parent / Path(config.basis).name
            config.basis = str(beside) if beside.is_dir() else config.basis
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read the fields of a configuration, whoever loads the adapter, and check them against their checksum."""
        path = Path(path_json_file)
        fields = read_json(path, "an adapter's configuration")
        check_format(fields)
        check_sealed(path, fields)
        return {key: value for key, value in fields.items() if key != CHECKSUM}

    @property
    def refers_to_basis(self) -> bool:
        """Whether the adapter's file holds no factors, because they are those of a basis."""
        return self.basis is not None and self.trainable == "cores" and not self.basis_copy

    @property
    def rank(self) -> tuple[int, int]:
        """Ranks `(k, r)` where `rank_pattern` says nothing else."""
        return pair(self.r)

    @property
    def ranks(self) -> set[tuple[int, int]]:
        """All ranks that a module may have."""
        return {self.rank, *map(pair, self.rank_pattern.values())}

    def rank_of(self, path: str) -> tuple[int, int]:
        """Return the ranks `(k, r)` of a module."""
        return pair(self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), path), self.r))

    # PEFT's hot-swapping computes a scaling from LoRA's names: lora_alpha / r
    use_rslora = False

    @property
    def lora_alpha(self) -> float:
        """The number that gives `σ` when divided by `r`, for PEFT's hot-swapping."""
        if not isinstance(self.r, int) or self.rank_pattern:
            raise ConfigError("Hot-swapping needs one rank: r must be one number and rank_pattern empty.")
        if self.trainable == "cores" and not MAGNITUDES[self.magnitude].additive:
            raise ConfigError(
                f"Hot-swapping goes behind the back of what magnitude={self.magnitude!r} keeps of frozen factors. Load "
                "the adapter beside the first and use set_adapter."
            )
        return self.scaling * self.r

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """Always empty: one scaling an adapter."""
        return {}


def pair(r: int | tuple[int, int]) -> tuple[int, int]:
    """Return `(k, r)`."""
    return (r, r) if isinstance(r, int) else (r[0], r[1])
