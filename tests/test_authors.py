"""Rows against fixed numbers that the code of their papers' authors computed once, in double precision.

`authors.json` names repository, commit and functions. Every number of an adapter, and every input, is `numbers(shape,
seed)`: the n-th tensor of the adapter, by name, has the seed n; the n-th module, by name, the input with seed 100 + n,
and the weight of its output in the loss with seed 200 + n. The loss is the sum of all outputs of updates, so weighted.
Of a gradient the file has the first number, the last, and the norm.

No code of their authors could be had for MetaTT (arXiv 2506.09105), BoRA and MAP: test_rows.py has the equations of
their papers. LoRA and DoRA are compared with PEFT's in test_parity.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import Tensor, nn

import lotr
from lotr import LotrConfig
from lotr.tuner.layer import LotrLinear

RECORDS = json.loads(Path(__file__).with_name("authors.json").read_text(encoding="utf-8"))
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT = tf.ViTConfig(image_size=16, patch_size=8, num_labels=3, **SIZES)


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    places = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return torch.sin(0.37 * places.square() + seed).reshape(shape)


def record(method: str) -> dict[str, Any]:
    (of_method,) = (record for record in RECORDS if record["method"] == method)
    return of_method


def adapted(record: dict[str, Any], model: nn.Module) -> nn.Module:
    config = LotrConfig(
        method=record["method"],
        r=record["r"],
        alpha=record.get("alpha"),
        target_modules=record.get("targets"),
    )
    return get_peft_model(model.double(), config).get_base_model()


def assert_reproduces(record: dict[str, Any], model: nn.Module, rtol: float = 1e-10) -> None:
    total: Any = 0.0
    paths = sorted(path for path, module in model.named_modules() if isinstance(module, LotrLinear))
    for n, path in enumerate(paths):
        layer = model.get_submodule(path)
        update = layer.update("default", numbers((2, layer.in_features), 100 + n))
        output = (update * numbers(tuple(update.shape), 200 + n)).sum()
        assert float(output.detach()) == pytest.approx(record["output"][path], rel=rtol)
        total = total + output
    total.backward()
    for name, expected in record["gradients"].items():
        gradient = model.get_parameter(name).grad
        ours = [gradient.flatten()[0], gradient.flatten()[-1], gradient.norm()]
        assert [float(number) for number in ours] == pytest.approx(expected, rel=rtol), name


@pytest.mark.parametrize(
    "method", [r["method"] for r in RECORDS if r["method"] not in ("lora_xs", "lora_sb")]
)
def test_updates_and_gradients_are_those_of_the_authors_code(method: str) -> None:
    expected = record(method)
    model = adapted(expected, tf.ViTForImageClassification(VIT))
    ours = sorted((name, number) for name, number in model.named_parameters() if ".lotr_" in name)
    assert [name for name, _ in ours] == list(expected["gradients"])
    for seed, (_, number) in enumerate(ours):
        number.data = numbers(tuple(number.shape), seed)
    assert_reproduces(expected, model)


def test_lora_xs_starts_where_the_authors_code_does() -> None:
    expected, base = record("lora_xs"), tf.ViTForImageClassification(VIT).double()
    for layer in range(2):
        base.vit.layers[layer].attention.q_proj.weight.data = numbers((8, 8), 50 + layer)
    model = adapted(expected, base)
    for seed, name in enumerate(expected["gradients"]):
        layer = model.vit.layers[seed].attention.q_proj
        ((_, group),) = layer.adapters["default"].parts
        U, V = group.lotr_U["default"].weight, group.lotr_V["default"].weight
        # singular vectors are free in their signs: pairs become those of one decomposition
        V.data *= (U.T @ layer.get_base_layer().weight @ V.T).diagonal().sign()[:, None]
        model.get_parameter(name).data = numbers((3,), seed).diag()
    assert_reproduces(expected, model, rtol=1e-7)


def test_lora_sb_takes_the_step_of_the_authors_code() -> None:
    expected = record("lora_sb")
    base = nn.Sequential(nn.Linear(8, 8, bias=False)).double()
    model = get_peft_model(base, LotrConfig(method="lora_sb", r=2, target_modules=["0"]))
    x, weights = numbers((5, 8), 100), numbers((5, 8), 200)
    lotr.init_from_data(
        model, [x], lambda m, x: (m(x) * weights).sum(), learning_rate=expected["learning_rate"]
    )
    (layer,) = (module for module in model.modules() if isinstance(module, LotrLinear))
    loss = (layer.update("default", x) * weights).sum()
    loss.backward()
    core = layer.lotr_C["default"].weight
    assert torch.linalg.svdvals(core.detach()).tolist() == pytest.approx(expected["core"], rel=1e-6)
    assert float(loss.detach()) == pytest.approx(expected["output"]["0"], rel=1e-6)
    assert float(core.grad.norm()) == pytest.approx(
        expected["gradients"]["0.lotr_C.default.weight"][2], rel=1e-6
    )
