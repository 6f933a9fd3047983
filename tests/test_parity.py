"""The rows `lora` and `dora` are PEFT's own LoRA and DoRA: outputs, gradients and training with the same numbers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from conftest import ARCHITECTURES, tokens
from lotr import LotrConfig
from lotr.training.base_model import MINILM, load_model, locate
from lotr.tuner.layer import LotrLinear

RANK, STEPS = 4, 10
TARGETS = {
    "bert": ["query", "value", "dense"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
}


@dataclass
class Twins:
    """One base model with our row, and with PEFT's method; every number of both is equal."""

    ours: PeftModel
    theirs: PeftModel
    inputs: dict[str, Tensor]

    def numbers(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Name → the same number here and there."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for path, mine in self.ours.get_base_model().named_modules():
            if not isinstance(mine, LotrLinear):
                continue
            theirs = self.theirs.get_base_model().get_submodule(path)
            ((_, group),) = mine.adapters["default"].parts
            found[f"{path} A"] = group.lotr_V["default"].weight, theirs.lora_A["default"].weight
            found[f"{path} B"] = group.lotr_U["default"].weight, theirs.lora_B["default"].weight
            if "default" in mine.lotr_magnitude:
                vector = theirs.lora_magnitude_vector["default"].weight
                found[f"{path} m"] = mine.lotr_magnitude["default"].m, vector
        return found

    def losses(self) -> tuple[Tensor, Tensor]:
        return tuple(model(**self.inputs).logits.square().sum() for model in (self.ours, self.theirs))


def twins(base: nn.Module, inputs: dict[str, Tensor], targets: list[str], row: str, scaling: float) -> Twins:
    both = {"target_modules": targets, "r": RANK}
    conv: dict[str, Any] = {"fan_in_fan_out": True} if "Conv1D" in repr(base) else {}
    lora = LoraConfig(lora_alpha=scaling * RANK, use_dora=row == "dora", **both, **conv)
    ours = get_peft_model(copy.deepcopy(base), LotrConfig(method=row, scaling=scaling, **both))
    dtype = next(base.parameters()).dtype
    made = Twins(ours.to(dtype).eval(), get_peft_model(copy.deepcopy(base), lora).to(dtype).eval(), inputs)
    with torch.no_grad():
        for name, (mine, theirs) in made.numbers().items():
            if name.endswith(" m"):  # both start at the row norms
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0.0)
                theirs *= 1 + 0.1 * torch.rand_like(theirs)
            else:
                theirs.normal_(std=theirs.shape[1] ** -0.5)
            mine.copy_(theirs)
    return made


def check(made: Twins, rtol: float, atol: float, trained_atol: float) -> None:
    """Outputs, gradients of every number, and every number after ten steps."""
    with torch.no_grad():
        mine, theirs = (model(**made.inputs).logits for model in (made.ours, made.theirs))
    torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)

    names = made.numbers()
    trained = [sum(p.requires_grad for p in model.parameters()) for model in (made.ours, made.theirs)]
    assert trained == [len(names), len(names)]
    start = {name: number.detach().clone() for name, (number, _) in names.items()}
    models = (made.ours, made.theirs)
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3, eps=1e-6) for m in models
    ]
    for step in range(STEPS):
        for loss, optimizer in zip(made.losses(), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        if step == 0:
            for name, (mine, theirs) in names.items():
                assert mine.grad is not None and mine.grad.any(), name
                size = float(theirs.grad.abs().max())
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=rtol, atol=size * rtol, msg=name)
        for optimizer in optimizers:
            optimizer.step()
    for name, (mine, theirs) in names.items():
        assert (mine - start[name]).abs().max() > 1e-4, name
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=trained_atol, msg=name)


@pytest.mark.parametrize(
    "row, architecture, scaling",
    [
        (row, name, (1.0, 2.0)[(n + m) % 2])
        for m, row in enumerate(("lora", "dora"))
        for n, name in enumerate(TARGETS)
    ],
)
def test_a_row_is_pefts_method_to_rounding_in_float64(architecture: str, row: str, scaling: float) -> None:
    made = ARCHITECTURES[architecture]
    check(
        twins(made.make().double(), made.inputs(), TARGETS[architecture], row, scaling),
        rtol=1e-9,
        atol=1e-12,
        trained_atol=1e-11,
    )


@pytest.mark.parametrize("row", ["lora", "dora"])
def test_a_row_is_pefts_method_to_rounding_on_a_pretrained_model(
    row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert locate("minilm")[0] != MINILM, "the packaged weights are installed"
    base = load_model("minilm", "classification", ("no", "yes"))
    inputs = {"input_ids": tokens(rows=2, length=12) + 2000}
    check(twins(base, inputs, ["query", "value"], row, 2.0), rtol=1e-4, atol=1e-5, trained_atol=1e-5)
