"""Every row of the table on three architectures: what training, files, merging and export make of it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import lotr
from conftest import ARCHITECTURES
from dense_truth import adapt, site_updates, updates, weight_of
from lotr import METHODS, CheckpointError, LotrConfig, Plan
from lotr.adapters.export import export
from lotr.adapters.inspection import inspect
from lotr.files.adapter_folder import AdapterFolder, read_adapter
from lotr.math.norms import column_energy, row_energy, update_energy
from lotr.sharing.keys import file_shapes
from lotr.tuner.group import LotrGroup
from lotr.tuner.layer import LotrLinear
from lotr.tuner.saved_adapter import read_saved
from tuner_contract import linears, outputs, weights

TARGETS = {
    "bert": ["query", "key", "value", "dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "c_proj"],
}
PLAIN = {name: ARCHITECTURES[name].make() for name in TARGETS}  # copied, which is faster than made anew
SCALING, STEPS = 1.5, 20
RESCALED = ("dora", "bora", "map")


@dataclass
class Row:
    """A row on an architecture: the plain model's outputs, those at step 0, and the model as trained."""

    name: str
    architecture: str
    config: LotrConfig
    model: PeftModel
    base: Tensor
    start: Tensor
    losses: list[float]
    folder: Path

    @property
    def inputs(self) -> dict[str, Tensor]:
        return ARCHITECTURES[self.architecture].inputs()

    @property
    def saved(self) -> AdapterFolder:
        return read_adapter(self.folder)

    @cached_property
    def plan(self) -> Plan:
        with torch.device("meta"):
            return lotr.plan(self.plain(), self.config)

    def plain(self) -> nn.Module:
        return copy.deepcopy(PLAIN[self.architecture])

    def layers(self) -> Iterator[tuple[str, LotrLinear]]:
        for path, module in self.model.get_base_model().named_modules():
            if isinstance(module, LotrLinear):
                yield path, module


def train(model: nn.Module, inputs: dict[str, Tensor], steps: int) -> list[float]:
    """Losses of every step, and after the last; in evaluation mode, so that the base drops nothing."""
    labels = (
        inputs["input_ids"] if "CausalLM" in repr(model) or "LMHead" in repr(model) else torch.arange(4) % 3
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        return [*losses, float(model(**inputs, labels=labels).loss)]


CASES = list(itertools.product(METHODS, TARGETS))


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def row(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Row:
    name, architecture = request.param
    made = ARCHITECTURES[architecture]
    config = LotrConfig(method=name, r=4, scaling=SCALING, seed=0, target_modules=TARGETS[architecture])
    base = outputs(PLAIN[architecture], made.inputs())
    model = get_peft_model(copy.deepcopy(PLAIN[architecture]), copy.deepcopy(config)).eval()
    start = outputs(model, made.inputs())
    losses = train(model, made.inputs(), STEPS)
    folder = tmp_path_factory.mktemp("row")
    model.save_pretrained(folder)
    return Row(name, architecture, config, model, base, start, losses, folder)


def test_step_0_equals_the_base_bit_for_bit(row: Row) -> None:
    assert torch.equal(row.start, row.base)


def test_training_lowers_the_loss(row: Row) -> None:
    assert row.losses[-1] < 0.99 * row.losses[0]
    assert (outputs(row.model, row.inputs) - row.base).abs().max() > 1e-2


def test_the_plan_foretells_what_trains(row: Row) -> None:
    assert row.model.get_nb_trainable_parameters()[0] == row.plan.n_parameters


def test_the_file_holds_exactly_the_planned_tensors(row: Row) -> None:
    assert row.saved.shapes() == file_shapes(row.plan)


def test_the_plan_in_the_file_is_that_of_the_model(row: Row) -> None:
    assert read_saved(row.folder).plan == row.plan


def test_the_order_of_more_than_ten_layers_is_kept_in_the_file(tmp_path: Path) -> None:
    """As text, layer 10 comes before layer 2."""
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 12}
    base = tf.BertModel(tf.BertConfig(vocab_size=8, **sizes))
    model = get_peft_model(base, LotrConfig(method="lorta", r=2, seed=0, target_modules=["value", "query"]))
    (group,) = (module for module in model.modules() if isinstance(module, LotrGroup))
    torch.nn.init.normal_(group.lotr_core["default"].factor_0)
    model.save_pretrained(tmp_path)
    export(tmp_path, tmp_path / "lora")
    exported = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path / "lora").get_base_model()
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LotrLinear):
            expected = layer.get_delta_weight("default")
            torch.testing.assert_close(
                exported.get_submodule(path).get_delta_weight("default"), expected, atol=1e-6, rtol=1e-5
            )


def test_a_loaded_adapter_equals_the_saved_one(row: Row) -> None:
    loaded = PeftModel.from_pretrained(row.plain(), row.folder)
    torch.testing.assert_close(
        outputs(loaded, row.inputs), outputs(row.model, row.inputs), atol=1e-6, rtol=1e-6
    )


def test_merged_equals_unmerged_and_unmerging_restores_the_weights(row: Row) -> None:
    before, unmerged = weights(row.model), outputs(row.model, row.inputs)
    row.model.merge_adapter()
    merged, during = outputs(row.model, row.inputs), weights(row.model)
    row.model.unmerge_adapter()
    assert not any(torch.equal(a, b) for a, b in zip(before, during, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(row.model), strict=True))
    torch.testing.assert_close(merged, unmerged, atol=2e-6, rtol=1e-5)


def test_the_output_is_that_of_the_dense_weights_of_the_equations(row: Row) -> None:
    plain = adapt(row.plain(), row.plan, row.saved.tensors(), SCALING)
    torch.testing.assert_close(
        outputs(row.model, row.inputs), outputs(plain, row.inputs), atol=4e-6, rtol=1e-5
    )


def test_the_change_of_the_weight_is_that_of_the_dense_equations(row: Row) -> None:
    plain, adapted = row.plain(), adapt(row.plain(), row.plan, row.saved.tensors(), SCALING)
    for path, layer in row.layers():
        change = adapted.get_submodule(path).weight - plain.get_submodule(path).weight
        torch.testing.assert_close(layer.get_delta_weight("default"), change, atol=1e-6, rtol=1e-5)


def test_factored_norms_equal_dense_norms(row: Row) -> None:
    dense, plain = updates(row.plan, row.saved.tensors(), SCALING), row.plain()
    for path, layer in row.layers():
        updates_of_layer = layer.factored("default")
        W, dW = weight_of(plain.get_submodule(path)), dense[path]
        gains = torch.linspace(0.5, 2.0, len(W))
        found = (
            row_energy(layer.base_weight, updates_of_layer).sqrt(),
            column_energy(layer.base_weight, updates_of_layer, gains).sqrt(),
            update_energy(updates_of_layer).sqrt(),
        )
        columns = (gains[:, None] * (W + dW)).norm(dim=0)
        torch.testing.assert_close(
            found, ((W + dW).norm(dim=1), columns, dW.norm()[None]), rtol=1e-5, atol=0.0
        )


def test_inspecting_finds_the_norm_of_every_sites_update(row: Row) -> None:
    found = inspect(row.folder)
    dense = {
        (site.module, site.projection, site.head): float(dW.norm())
        for site, dW in site_updates(row.plan, row.saved.tensors(), SCALING)
    }
    assert {(s.module, s.projection, s.head): s.norm for s in found.sites} == pytest.approx(dense, rel=1e-4)
    assert found.numbers == sum(tensor.numel() for tensor in row.saved.tensors().values()) and found.head == 0


def test_an_additive_row_leaves_as_a_lora_and_others_are_told_to_merge(row: Row, tmp_path: Path) -> None:
    if row.name in RESCALED:
        with pytest.raises(CheckpointError, match="lotr merge"):
            export(row.folder, tmp_path / "lora")
        return
    export(row.folder, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(row.plain(), tmp_path / "lora")
    assert not list(linears(loaded))
    torch.testing.assert_close(
        outputs(loaded, row.inputs), outputs(row.model, row.inputs), atol=2e-6, rtol=1e-5
    )
