"""Every row starts as its paper, or its authors' code, has it; where a row starts otherwise by choice, it says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from conftest import vit
from lotr import METHODS, LotrConfig
from lotr.tuner.group import LotrGroup
from tuner_contract import linears

RANK, WIDTH, HEAD = 16, 64, 32
SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": WIDTH // HEAD}
VIT = SHAPE | {"intermediate_size": 4 * WIDTH}
Claim = Callable[[Tensor], bool]


def zero(number: Tensor) -> bool:
    return not number.any()


def ones(number: Tensor) -> bool:
    return bool((number == 1).all())


def eyes(number: Tensor) -> bool:
    return torch.equal(number, torch.eye(*number.shape[-2:]).expand(number.shape))


def orthonormal(number: Tensor) -> bool:
    short = number if number.shape[0] >= number.shape[1] else number.T
    return torch.allclose(short.T @ short, torch.eye(short.shape[1]), atol=1e-5)


def orthogonal(number: Tensor) -> bool:
    return orthonormal(number / number.norm(dim=0))


def within(bound: float) -> Claim:
    def claim(number: Tensor) -> bool:
        largest = float(number.abs().max())
        spread = float(number.std()) * 3**0.5  # of uniform numbers, the bound
        return largest <= bound * 1.0001 and spread == pytest.approx(bound, rel=0.25)

    return claim


def normal(deviation: float) -> Claim:
    return lambda number: float(number.std()) == pytest.approx(deviation, rel=0.2)


def xavier(number: Tensor) -> bool:
    """Uniform, by the fans that torch counts: the first two extents times those that follow."""
    fans = sum(number.shape[:2]) * (number[0, 0].numel() if number.ndim > 2 else 1)
    return within((6 / fans) ** 0.5)(number)


def xavier_normal(number: Tensor) -> bool:
    return normal((2 / sum(number.shape)) ** 0.5)(number)


narrow, wide = within(WIDTH**-0.5), within(RANK**-0.5)
LORA = {"U": zero, "V": narrow}
CP = {"U": wide, "V": zero, "factor_0": wide, "factor_1": wide, "factor_2": wide}
TUCKER = dict.fromkeys(("U", "V", "factor_0", "factor_1", "factor_2"), orthonormal) | {"core": zero}
TRAIN = {"U": eyes, "V": zero, "core_0": eyes, "core_1": eyes, "core_2": eyes}
#: Of the row, by the name of the number. `C` are cores of single sites.
PUBLISHED: dict[str, dict[str, Claim]] = {
    "lotr": {"U": normal(1), "V": normal(1), "C": zero},
    "lotr_joint": {"U": normal(1), "V": normal(1), "C": zero},
    "lora": LORA,
    "dora": LORA,
    "bora": LORA,
    "map": {"U": orthonormal, "V": orthonormal},  # no code was published: our reading
    "moslora": LORA | {"C": wide},
    "lora_xs": {"U": orthonormal, "V": orthogonal, "C": normal(1e-5)},
    "lora_sb": {"U": orthonormal, "V": orthonormal, "C": zero},
    "lorta": CP | {"U": zero, "V": wide},
    "cara": {
        "U": orthonormal,
        "V": zero,
        "weights": ones,
        "factor_0": xavier_normal,
        "factor_1": orthonormal,
        "b": zero,
    },
    "metatt_4d": TRAIN,
    "metatt_5d": TRAIN,
    "fact_tt": LORA | {"C": wide},
    "fact_tk": LORA | {"core": xavier, "factor_0": xavier},
    **{row: CP if row.endswith("_cp") else TUCKER for row in METHODS if row.startswith("tenslora")},
}
#: What two rows have in place of that, by choice.
OURS = {"U": orthonormal, "V": orthonormal, "C": zero}
CHOSEN = ("lotr", "lotr_joint")


def numbers_of(row: str, **fields: str) -> dict[str, list[Tensor]]:
    """Name of a number → it, of every group and site."""
    targets = ["q_proj", "k_proj", "v_proj"]
    targets += ["o_proj", "fc1", "fc2"] if row in ("cara", "fact_tk") else []
    config = LotrConfig(method=row, r=RANK, seed=0, target_modules=targets, **fields)
    model = get_peft_model(vit(**VIT), config)
    numbers: dict[str, list[Tensor]] = {}
    groups = [module for module in model.modules() if isinstance(module, LotrGroup)]
    for group in groups:
        numbers.setdefault("U", []).append(group.lotr_U["default"].weight)
        numbers.setdefault("V", []).append(group.lotr_V["default"].weight.T)
        for name, number in (group.core_numbers("default") if "default" in group.lotr_core else {}).items():
            numbers.setdefault("b" if name.startswith("b-") else name, []).append(number)
    for layer in linears(model):
        numbers.setdefault("C", []).extend(module.weight for module in layer.lotr_C.values())
    return {name: [n.detach() for n in tensors] for name, tensors in numbers.items() if tensors}


def assert_starts(numbers: dict[str, list[Tensor]], claims: dict[str, Claim]) -> None:
    assert numbers
    for name in numbers:
        claim = claims[name]
        # few numbers at a time say little of a distribution
        together = claim not in (orthonormal, orthogonal, eyes, ones, xavier, xavier_normal)
        tensors = [torch.cat([t.flatten() for t in numbers[name]])] if together else numbers[name]
        assert all(claim(tensor) for tensor in tensors), name


@pytest.mark.parametrize("row", METHODS)
def test_a_row_starts_as_published_or_says_what_it_does(row: str) -> None:
    assert_starts(numbers_of(row), OURS if row in CHOSEN else PUBLISHED[row])


@pytest.mark.parametrize("row", CHOSEN)
def test_the_published_start_is_reached_by_a_field_that_the_row_names(row: str) -> None:
    assert_starts(numbers_of(row, init="gaussian"), PUBLISHED[row])
    assert "init=gaussian" in METHODS[row].differs


def test_the_cores_of_a_weight_cut_into_squares_start_as_one_linear_layer() -> None:
    """fc2 lies in squares side by side, so the cores of FacT's code, one `nn.Linear` a weight, are narrower there."""
    config = LotrConfig(method="fact_tt", r=RANK, seed=0, target_modules=["q_proj", "fc1", "fc2"])
    model = get_peft_model(vit(**VIT), config)
    cores = [layer.lotr_C["default"].weight.detach() for layer in linears(model)]
    assert {C.shape for C in cores} == {(RANK, RANK), (4 * RANK, RANK), (RANK, 4 * RANK)}
    for C in cores:
        of_torch = torch.nn.Linear(C.shape[1], C.shape[0]).weight.detach()
        assert within(C.shape[1] ** -0.5)(of_torch) and within(C.shape[1] ** -0.5)(C)
