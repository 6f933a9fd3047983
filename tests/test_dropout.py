"""Dropout falls where the paper of a row places it: against dense equations under the same mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor

import lotr
from conftest import ARCHITECTURES, vit
from dense_truth import FREE, ROOT, core_of, of_group, updates
from lotr import METHODS, ConfigError, LotrConfig, Plan
from lotr.math.dropout import PLACES
from test_bank_rows import logits, make_bank
from tuner_contract import linears

RATE = 0.4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


def kept(*shape: int) -> Tensor:
    """What dropout multiplies by, the same at every call."""
    places = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    return (torch.sin(3 * places + 1) > -0.5) / (1 - RATE)


@pytest.fixture(autouse=True)
def one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * kept(*x.shape).to(x) if training and p == RATE else x

    monkeypatch.setattr("torch.nn.functional.dropout", dropout)


def without_components(numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Slices of a Tucker core along every rank above four, terms of a CP core."""
    thinner = dict(numbers)
    for key, number in numbers.items():
        name = key.rpartition(".")[2] if ".lotr_core." in key else ""
        axes = {"core": range(number.ndim), "factor_0": [1]}.get(name, [])
        is_cp = key.replace("factor_0", "core") not in numbers
        for axis in axes if name == "core" or is_cp else []:
            size = number.shape[axis]
            if size > 4:
                number = torch.tensor_split(number, size, axis)
                number = torch.cat([part * keep for part, keep in zip(number, kept(size), strict=True)], axis)
        thinner[key] = number
    return thinner


def through_cores(row: str, plan: Plan, numbers: dict[str, Tensor], path: str, x: Tensor) -> Tensor:
    """`σ U drop(C Vᵀ x)`, a row of blocks after the other."""
    ((part, *more),) = [plan.parts[path]]
    assert not more
    group, width, first = part.group, part.block[1], part.sites[0]
    of_core = numbers if row in FREE else of_group(group, numbers)
    U, V = (numbers[f"{ROOT}lotrbasis.{group.name}.{name}.weight"] for name in ("lotr_U", "lotr_V"))
    heights = sorted({site.row for site in part.sites})
    h = {row: torch.zeros(len(x), group.rank[0], dtype=x.dtype) for row in heights}
    for site in part.sites:
        C = core_of(row, path, part.name, first, site, group, of_core)
        h[site.row] = h[site.row] + x[:, site.column : site.column + width] @ V.T @ C.T
    rest = torch.cat([h[row] for row in heights], 1) * kept(len(x), len(heights) * group.rank[0])
    return torch.cat([block @ U.T for block in rest.split(group.rank[0], 1)], 1)


def of_paper(
    row: str, plan: Plan, numbers: dict[str, Tensor], scaling: float
) -> Callable[[str, Tensor], Tensor]:
    """Return what a module adds, from its path and its input."""
    place = METHODS[row].dropout_place
    if place == "core_output":
        return lambda path, x: scaling * through_cores(row, plan, numbers, path, x)
    thinner = without_components(numbers) if place == "components" else numbers
    dense = updates(row, plan, thinner, scaling)

    def added(path: str, x: Tensor) -> Tensor:
        if place == "input":
            return (x * kept(*x.shape)) @ dense[path].T
        return x @ (dense[path] * kept(*dense[path].shape) if place == "update" else dense[path]).T

    return added


@pytest.mark.parametrize("row", METHODS)
def test_numbers_are_dropped_where_the_paper_says(row: str) -> None:
    base = vit(hidden_size=16, num_hidden_layers=6, num_attention_heads=2).double()
    config = LotrConfig(
        method=row, r=6, dropout=RATE, init_weights=False, seed=0, target_modules=TARGETS, trainable="all"
    )
    plan, model = lotr.plan(base, config), get_peft_model(base, config).train()
    numbers = {
        key: number.detach().clone().requires_grad_()
        for key, number in get_peft_model_state_dict(model).items()
    }
    ours: Any = 0.0
    theirs: Any = 0.0
    added, layers = of_paper(row, plan, numbers, config.scaling), list(linears(model))
    for n, layer in enumerate(layers):
        path = plan.targets[n].path
        assert base.get_submodule(path) is layer
        x = torch.randn(3, layer.in_features, dtype=torch.float64)
        y = layer.update("default", x)
        expected = added(path, x)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            assert (y - layer.eval().update("default", x)).norm() > 1e-2 * y.norm()
        ours, theirs = ours + (n + 1) * y.sin().sum(), theirs + (n + 1) * expected.sin().sum()
    ours.backward()
    theirs.backward()
    for name, parameter in model.named_parameters():
        number = numbers.get(name.replace(".default", ""))
        if number is not None and number.grad is not None:
            torch.testing.assert_close(parameter.grad, number.grad, rtol=1e-9, atol=1e-11)


def test_every_place_is_that_of_a_row() -> None:
    assert {row.dropout_place for row in METHODS.values()} == set(PLACES)


def test_the_rate_is_no_part_of_a_row_and_another_core_takes_inputs() -> None:
    assert {LotrConfig(method=row).dropout for row in METHODS} == {0.0}
    assert LotrConfig(method="tenslora_qkv", core="free").dropout_place == "input"
    assert LotrConfig(method="lora", dropout_place="core_output").dropout_place == "core_output"


@pytest.mark.parametrize("core", ["cp", "tucker"])
def test_the_rows_of_a_batch_of_tasks_lose_the_same_components(core: str, tmp_path: Path) -> None:
    alike = {"core": core, "blocks": "none", "r": 6, "modes": ("layer", "projection")}
    bank = make_bank(tmp_path, "vit", dropout=RATE, dropout_place="components", **alike)
    base, inputs = ARCHITECTURES["vit"].make, ARCHITECTURES["vit"].inputs()
    truth = {}
    for task in ("a", "b"):
        bank.export(task, tmp_path / task)
        truth[task] = logits(PeftModel.from_pretrained(base(), tmp_path / task).train(), inputs)
    model = bank.wrap(base()).train()
    mixed = logits(model, inputs, task_ids=["a", "b", "a", "b"])
    for n, task in enumerate(["a", "b", "a", "b"]):
        torch.testing.assert_close(mixed[n], truth[task][n], rtol=1e-4, atol=1e-5)
    assert (mixed - logits(model.eval(), inputs, task_ids=["a", "b", "a", "b"])).abs().max() > 1e-4


def test_numbers_of_the_update_cannot_be_dropped_for_the_rows_of_a_bank(tmp_path: Path) -> None:
    model = make_bank(tmp_path, "bert", dropout=RATE, dropout_place="update").wrap(
        ARCHITECTURES["bert"].make()
    )
    logits(model, task_ids=["a", None, "b", "c"])
    with pytest.raises(ConfigError, match=r"dropout_place='update' .*another place"):
        logits(model.train(), task_ids=["a", None, "b", "c"])
