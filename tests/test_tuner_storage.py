"""Every saved tensor has a storage of its own, so that no tool that saves a state dict takes two for one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from conftest import bert, tokens
from lotr import LotrConfig, truncate
from lotr.math.cores import CORES
from lotr.math.magnitude import MAGNITUDES
from tuner_contract import outputs

INPUTS = {"input_ids": tokens()}


def adapted(core: str = "free", magnitude: str = "none", **fields: object) -> PeftModel:
    modes = () if core == "identity" else ("layer", "projection")
    # a random update, where the magnitude leaves the choice
    start = None if MAGNITUDES[magnitude].divides_by_update else False
    config = LotrConfig(
        r=4, modes=modes, core=core, magnitude=magnitude, init_weights=start,
        target_modules=["query", "value", "intermediate.dense"], **fields,
    )  # fmt: skip
    return get_peft_model(bert(), config).eval()


def assert_own_storages(model: nn.Module) -> None:
    own = {name: p for name, p in model.state_dict(keep_vars=True).items() if "lotr_" in name}
    assert own
    assert len({p.untyped_storage().data_ptr() for p in own.values()}) == len(own)
    for name, p in own.items():
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size(), name


@pytest.mark.parametrize(
    "core, magnitude", [(core, "none") for core in CORES] + [("free", m) for m in MAGNITUDES]
)
def test_every_tensor_has_its_own_storage_fresh_copied_cast_and_loaded(
    core: str, magnitude: str, tmp_path: Path
) -> None:
    model = adapted(core, magnitude)
    model.save_pretrained(tmp_path)
    assert_own_storages(model)
    assert_own_storages(copy.deepcopy(model))
    for low in (False, True):
        assert_own_storages(PeftModel.from_pretrained(bert(), tmp_path, low_cpu_mem_usage=low))
    assert_own_storages(model.to(torch.float64))
    assert_own_storages(model.half())


@pytest.mark.parametrize("init", ["weight", "gaussian", "kaiming"])
def test_however_the_factors_start_they_have_their_own_storage(init: str) -> None:
    assert_own_storages(adapted(init=init))


def test_a_truncated_and_a_combined_adapter_have_their_own_storages() -> None:
    model = adapted()
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    truncate(model, 3, adapter="sum")
    assert_own_storages(model)


def test_accelerate_saves_and_loads_every_number(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(adapted(magnitude="per_output"))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    accelerator.save_state(tmp_path / "state")
    accelerator.save_model(model, tmp_path / "model")
    assert load_file(tmp_path / "state" / "model.safetensors").keys() == expected.keys()
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == expected.keys()
    before = outputs(model, INPUTS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    accelerator.load_state(tmp_path / "state")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(outputs(model, INPUTS), before)
