"""Any row swapped in place, names that adapters cannot have, configurations that serve several models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter

import banks
from conftest import bert, gpt2, llama
from lotr import ConfigError, LotrConfig
from test_tuner_adapters import INPUTS, config
from tuner_contract import outputs


@pytest.mark.parametrize("row", ["lotr", "lora", "metatt_4d", "tenslora_att_qkv_depth", "dora", "bora"])
@pytest.mark.parametrize("make", [bert, gpt2])
def test_any_row_can_be_swapped_in_place(make: Any, row: str, tmp_path: Path) -> None:
    """Also another scaling, and a fused weight whose cores stand in several groups."""
    targets = ["query", "value"] if make is bert else ["c_attn"]
    options = {"method": row, "target_modules": targets}
    other = get_peft_model(make(), config(1, scaling=3.0, **options))
    other.save_pretrained(tmp_path)
    expected = outputs(other.eval(), INPUTS)
    model = get_peft_model(make(), config(0, **options)).eval()
    parameters = dict(model.named_parameters())
    assert (outputs(model, INPUTS) - expected).abs().max() > 1e-5
    hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(outputs(model, INPUTS), expected, atol=1e-6, rtol=1e-5)
    assert all(parameters[name] is p for name, p in model.named_parameters())


def test_norms_kept_of_frozen_factors_are_not_swapped_behind_their_back(tmp_path: Path) -> None:
    options = {"trainable": "cores", "init": "orthonormal", "magnitude": "per_output"}
    get_peft_model(bert(), config(1, **options)).save_pretrained(tmp_path)
    model = get_peft_model(bert(), config(0, **options)).eval()
    before = outputs(model, INPUTS)
    with pytest.raises(ConfigError, match="Load the adapter beside the first"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    assert torch.equal(outputs(model, INPUTS), before)


def test_cores_are_swapped_on_one_basis_whose_factors_stay(tmp_path: Path) -> None:
    banks.basis(tmp_path / "basis", task_type=None)
    banks.basis(tmp_path / "other", task_type=None, seed=3)
    expected = {}
    for n, (name, basis) in enumerate({"a": "basis", "b": "basis", "c": "other"}.items()):
        own = banks.stirred(LotrConfig(basis=str(tmp_path / basis)), seed=n)
        own.save_pretrained(tmp_path / name)
        expected[name] = outputs(own, INPUTS)
    model = PeftModel.from_pretrained(bert(), tmp_path / "a").eval()
    for name in ("b", "a", "b"):
        hotswap_adapter(model, str(tmp_path / name), adapter_name="default", torch_device="cpu")
        assert torch.equal(outputs(model, INPUTS), expected[name])
    with pytest.raises(ValueError, match="basis_hash"):
        hotswap_adapter(model, str(tmp_path / "c"), adapter_name="default", torch_device="cpu")
    assert torch.equal(outputs(model, INPUTS), expected["b"])


@pytest.mark.parametrize("row", ["lotr", "lorta", "metatt_4d"])
def test_an_adapter_of_other_layers_is_not_swapped_in(row: str, tmp_path: Path) -> None:
    """Also where all numbers are the group's, so that names and shapes are the same."""
    get_peft_model(bert(), config(1, method=row, layers_to_transform=[1])).save_pretrained(tmp_path)
    model = get_peft_model(bert(), config(0, method=row, layers_to_transform=[0])).eval()
    before = outputs(model, INPUTS)
    with pytest.raises(ValueError, match="targets"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    assert torch.equal(outputs(model, INPUTS), before)


def test_one_configuration_serves_several_models() -> None:
    shared = config(0, target_modules=r".*(query|q_proj)")
    first = get_peft_model(bert(), shared)
    assert first.peft_config["default"] is shared
    recorded = list(shared.targets)
    second = get_peft_model(llama(), shared)
    assert shared.targets == recorded != second.peft_config["default"].targets


@pytest.mark.parametrize("row", ["lotr", "dora", "metatt_4d"])
def test_a_model_is_freed_when_it_is_let_go(row: str) -> None:
    """Without the garbage collector: there are no reference cycles, which would hold memory and wrappers."""
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        layers = bert().bert.encoder
        model = get_peft_model(layers, config(0, method=row))
        gone = weakref.ref(model.get_base_model().layer[0].attention.self.query)
        assert gone() is not None
        del model, layers
        assert gone() is None
    finally:
        gc.enable()
