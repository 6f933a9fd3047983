"""Every row of the table against the equations of its paper: step 0, training, files, merging and export."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.func import functional_call

import lotr
from conftest import ARCHITECTURES, bert, gpt2, llama, tokens, vit
from dense_truth import adapted, biases, site_updates, updates
from lotr import METHODS, CheckpointError, LotrConfig, Plan
from lotr.adapters.export import export
from lotr.adapters.inspection import inspect
from lotr.files.adapter_folder import AdapterFolder, read_adapter
from lotr.sharing.keys import file_shapes, is_factor
from lotr.tuner.group import LotrGroup
from lotr.tuner.layer import LotrLinear
from lotr.tuner.saved_adapter import read_saved
from tuner_contract import linears, outputs, weights

STEPS = 10
MERGED_ALONE = ("bora", "map")
#: Rows whose published start is not the base model.
STARTED = ("lora_xs", "lora_sb")


def grouped(heads: int, few: int) -> nn.Module:
    sizes = {"hidden_size": 4 * heads, "intermediate_size": 8 * heads, "num_hidden_layers": 2}
    return llama(**sizes, num_attention_heads=heads, num_key_value_heads=few)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
#: Name → the plain model, which is copied, and what is adapted.
MODELS: dict[str, tuple[nn.Module, list[str]]] = {
    "bert": (bert(**SMALL), ["query", "key", "value", "dense"]),
    "gpt2": (gpt2(n_embd=16, n_layer=2), ["c_attn", "c_proj"]),
    "vit": (vit(**SMALL), ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]),
    **{
        f"llama {heads}/{few}": (grouped(heads, few), ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])
        for heads, few in ((8, 8), (8, 2), (9, 3))
    },
}


@dataclass
class Row:
    """A row on a model: the plain model's outputs, those at step 0, and the model as trained in double precision."""

    name: str
    plain: nn.Module
    config: LotrConfig
    inputs: dict[str, Tensor]
    model: PeftModel
    base: Tensor
    start: Tensor
    numbers: dict[str, Tensor]  # as they start
    losses: list[float]
    folder: Path

    @property
    def saved(self) -> AdapterFolder:
        return read_adapter(self.folder)

    @cached_property
    def plan(self) -> Plan:
        return lotr.plan(self.plain, self.config)

    def outputs_of_paper(self, numbers: dict[str, Tensor]) -> Tensor:
        weights = adapted(self.name, self.plain, self.plan, numbers, self.config.scaling)
        return functional_call(self.plain, weights, kwargs=self.inputs).logits

    def layers(self) -> Iterator[tuple[str, LotrLinear]]:
        for path, module in self.model.get_base_model().named_modules():
            if isinstance(module, LotrLinear):
                yield path, module


def _loss(logits: Tensor) -> Tensor:
    flat = logits.flatten(0, -2)
    return torch.nn.functional.cross_entropy(flat, torch.arange(len(flat)) % 3)


def _train(parameters: list[Tensor], logits: object) -> list[float]:
    """Losses of every step, and after the last."""
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2), []
    for _ in range(STEPS):
        loss = _loss(logits())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        return [*losses, float(_loss(logits()))]


#: Every row on a plain model, and on fused and transposed weights or on grouped queries; within a kind they take turns.
#: Every core, and every construction of TensLoRA, meets all kinds.
KINDS = ((("bert", "vit", "llama 8/8"), 1), (("gpt2", "llama 8/2", "gpt2", "llama 9/3"), 2))
CASES = [
    (name, models[n // every % len(models)]) for n, name in enumerate(METHODS) for models, every in KINDS
]
CASES.append(("metatt_5d", "llama 8/2"))


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def row(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Row:
    name, architecture = request.param
    plain, targets = copy.deepcopy(MODELS[architecture][0]).double(), MODELS[architecture][1]
    inputs = ARCHITECTURES["vit"].inputs() if architecture == "vit" else {"input_ids": tokens()}
    inputs = {key: x.double() if x.is_floating_point() else x for key, x in inputs.items()}
    alpha = None if name == "map" else 6.0
    config = LotrConfig(method=name, r=4, alpha=alpha, seed=0, target_modules=targets)
    base = outputs(plain, inputs)
    model = get_peft_model(copy.deepcopy(plain), copy.deepcopy(config)).eval()
    if config.init == "first_step":
        lotr.init_from_data(model, [inputs], lambda model, batch: _loss(model(**batch).logits))
    start, numbers = outputs(model, inputs), get_peft_model_state_dict(model)
    numbers = {key: number.detach().clone() for key, number in numbers.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    losses = _train(trained, lambda: model(**inputs).logits)
    folder = tmp_path_factory.mktemp("row")
    model.save_pretrained(folder)
    return Row(name, plain, config, inputs, model, base, start, numbers, losses, folder)


# ---- against the paper


def test_step_0_is_the_base_or_the_published_start(row: Row) -> None:
    expected = row.outputs_of_paper(row.numbers) if row.name in STARTED else row.base
    torch.testing.assert_close(row.start, expected, rtol=1e-12, atol=1e-12)
    assert (row.name in STARTED) == (not torch.allclose(row.start, row.base, rtol=0, atol=1e-14))
    assert row.name not in STARTED or METHODS[row.name].differs


@pytest.mark.parametrize("name, architecture", CASES)
def test_step_0_of_single_precision_is_the_base_bit_for_bit(name: str, architecture: str) -> None:
    plain, targets = MODELS[architecture]
    inputs = ARCHITECTURES["vit"].inputs() if architecture == "vit" else {"input_ids": tokens()}
    model = get_peft_model(copy.deepcopy(plain), LotrConfig(method=name, r=4, target_modules=targets)).eval()
    assert torch.equal(outputs(model, inputs), outputs(plain, inputs)) == (name != "lora_xs")


def test_training_takes_the_steps_of_the_papers_equations(row: Row) -> None:
    frozen = METHODS[row.name].trainable == "cores"
    numbers = {key: number.clone() for key, number in row.numbers.items()}
    trained = [t.requires_grad_() for key, t in numbers.items() if not (frozen and is_factor(key))]
    losses = _train(trained, lambda: row.outputs_of_paper(numbers))
    assert losses == pytest.approx(row.losses, rel=1e-9)
    assert row.losses[-1] < row.losses[0]
    ours = get_peft_model_state_dict(row.model)
    for key, number in numbers.items():
        torch.testing.assert_close(ours[key], number.detach(), rtol=1e-6, atol=1e-8)
    assert sum(t.numel() for t in trained) == row.model.get_nb_trainable_parameters()[0]


def test_the_change_of_the_weight_is_that_of_the_equations(row: Row) -> None:
    weights_of_paper = adapted(row.name, row.plain, row.plan, row.saved.tensors(), row.config.scaling)
    for path, layer in row.layers():
        change = weights_of_paper[f"{path}.weight"] - row.plain.get_submodule(path).weight
        torch.testing.assert_close(layer.get_delta_weight("default"), change, atol=1e-12, rtol=1e-9)


def test_the_modules_called_one_by_one_compute_the_same_update(row: Row) -> None:
    adapter = row.name, row.plan, row.saved.tensors(), row.config.scaling
    dense, of_biases = updates(*adapter), biases(*adapter)
    with torch.no_grad():
        for path, layer in row.layers():
            x = torch.randn(3, 2, layer.in_features, dtype=torch.float64)
            expected = x @ dense[path].T + of_biases.get(path, 0.0)
            torch.testing.assert_close(layer.update("default", x), expected, atol=1e-12, rtol=1e-9)


# ---- files, merging, export


def test_the_plan_is_the_files_and_foretells_what_it_holds(row: Row) -> None:
    assert row.saved.shapes() == file_shapes(row.plan)
    assert read_saved(row.folder).plan == row.plan
    assert row.model.get_nb_trainable_parameters()[0] == row.plan.n_parameters


def test_a_loaded_adapter_equals_the_saved_one(row: Row) -> None:
    loaded = PeftModel.from_pretrained(copy.deepcopy(row.plain), row.folder)
    torch.testing.assert_close(outputs(loaded, row.inputs), outputs(row.model, row.inputs))


def test_merged_equals_unmerged_and_unmerging_restores_the_weights(row: Row) -> None:
    before, unmerged = weights(row.model), outputs(row.model, row.inputs)
    row.model.merge_adapter()
    merged, during = outputs(row.model, row.inputs), weights(row.model)
    row.model.unmerge_adapter()
    assert not any(torch.equal(a, b) for a, b in zip(before, during, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(row.model), strict=True))
    torch.testing.assert_close(merged, unmerged)


def test_inspecting_finds_the_norm_of_every_sites_update(row: Row) -> None:
    report = inspect(row.folder)
    dense = {
        (site.module, site.projection, site.head): float(dW.norm())
        for site, dW in site_updates(row.name, row.plan, row.saved.tensors(), row.config.scaling)
    }
    assert {(s.module, s.projection, s.head): s.norm for s in report.sites} == pytest.approx(dense, rel=1e-6)
    numbers = sum(tensor.numel() for tensor in row.saved.tensors().values())
    assert report.numbers == numbers and report.head == 0


def test_a_row_leaves_as_a_lora_or_a_dora_and_the_others_are_told_to_merge(row: Row, tmp_path: Path) -> None:
    if row.name in MERGED_ALONE:
        with pytest.raises(CheckpointError, match="lotr merge"):
            export(row.folder, tmp_path / "lora")
        return
    export(row.folder, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(copy.deepcopy(row.plain), tmp_path / "lora")
    assert not list(linears(loaded))
    torch.testing.assert_close(outputs(loaded, row.inputs), outputs(row.model, row.inputs))


@pytest.mark.parametrize("name", METHODS)
def test_a_row_works_where_double_precision_is_torchs_default(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        base = grouped(8, 2)
        config = LotrConfig(method=name, r=4, target_modules=MODELS["llama 8/2"][1], seed=0)
        model = get_peft_model(copy.deepcopy(base), config).eval()
        logits = model(tokens()).logits
        logits.square().mean().backward()
        close = torch.allclose(logits, base(tokens()).logits, rtol=0, atol=1e-3)
        assert close and all(p.dtype == torch.float64 for p in model.parameters())
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_order_of_more_than_ten_layers_is_kept_in_the_file(tmp_path: Path) -> None:
    """As text, layer 10 comes before layer 2."""
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 12}
    base = tf.BertModel(tf.BertConfig(vocab_size=8, **sizes))
    model = get_peft_model(base, LotrConfig(method="lorta", r=2, seed=0, target_modules=["value", "query"]))
    (group,) = (module for module in model.modules() if isinstance(module, LotrGroup))
    torch.nn.init.normal_(group.lotr_U["default"].weight)
    model.save_pretrained(tmp_path)
    export(tmp_path, tmp_path / "lora")
    exported = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path / "lora").get_base_model()
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, LotrLinear):
            expected = layer.get_delta_weight("default")
            torch.testing.assert_close(
                exported.get_submodule(path).get_delta_weight("default"), expected, atol=1e-6, rtol=1e-5
            )
