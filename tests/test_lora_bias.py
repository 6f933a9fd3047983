"""Biases that train with an adapter: what is added to them, who shares it, and where it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.func import functional_call

import lotr
from conftest import bert, gpt2, llama, tokens
from lotr import CheckpointError, ConfigError, CoreBank, LotrConfig
from lotr.serving.vllm import LoraFolders
from tuner_contract import linears, outputs

INPUTS = {"input_ids": tokens()}
EVERY = ["query", "key", "value", "dense"]
#: Model, its modules, and a configuration: pairs, parts of fused weights, layouts turned, heads, squares side by side.
CASES: dict[str, tuple[Any, list[str], dict[str, Any]]] = {
    "lora": (bert, EVERY, {"method": "lora"}),
    "lotr": (bert, EVERY, {}),
    "fused": (gpt2, ["c_attn", "c_proj"], {"method": "lotr_joint"}),
    "squares": (bert, EVERY, {"blocks": "square"}),
    "cara": (bert, EVERY, {"method": "cara"}),
}


def adapted(case: str, seed: int = 0, **fields: Any) -> PeftModel:
    """A model whose adapter does something; the numbers of its biases are as large as biases are."""
    model = get_peft_model(CASES[case][0](), config(case, seed, **fields), adapter_name="a").eval()
    randomise(model, "a", seed)
    return model


def config(case: str, seed: int = 0, **fields: Any) -> LotrConfig:
    _, targets, own = CASES[case]
    settings = {"r": 4, "target_modules": targets, "scaling": 2.0, "seed": seed, "lora_bias": True}
    return LotrConfig(**{**settings, **own, "init_weights": False, **fields})


def randomise(model: nn.Module, adapter: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".lotr_core.{adapter}.b-" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def own_biases(model: nn.Module) -> list[Tensor]:
    return [layer.get_base_layer().bias.detach().clone() for layer in linears(model)]


def vectors(model: nn.Module) -> dict[str, Tensor]:
    state = get_peft_model_state_dict(model, adapter_name="a")
    return {key.rpartition(".")[2]: tensor for key, tensor in state.items() if ".b-" in key}


# ---- who shares what


def test_layers_share_a_vector_for_each_projection() -> None:
    widths = {"query": 32, "key": 32, "value": 32, "attention-output-dense": 32}
    widths |= {"intermediate-dense": 64, "output-dense": 32, "bert-pooler-dense": 32}
    model = adapted("lotr")
    assert {name: len(b) for name, b in vectors(model).items()} == {f"b-{n}": w for n, w in widths.items()}
    plan = lotr.plan(bert(), config("lotr"))
    assert plan.n_parameters == lotr.plan(bert(), config("lotr", lora_bias=False)).n_parameters + 32 * 8
    assert "in cores and biases" in str(plan)


def test_pairs_of_their_own_have_vectors_of_their_own() -> None:
    assert lotr.plan(bert(), config("lora")).n_cores == sum(len(b) for b in own_biases(adapted("lora")))


def test_weights_cut_by_heads_and_modules_without_a_bias_have_none() -> None:
    assert not lotr.plan(bert(), config("cara", target_modules=["query", "key", "value"])).has_biases
    assert not lotr.plan(llama(), config("lotr", target_modules=["q_proj", "o_proj", "down_proj"])).has_biases


# ---- what it computes


#: Module of GPT-2 → what is added to its bias, piece by piece.
PIECES = {
    "attn.c_attn": ["c_attn-query", "c_attn-key", "c_attn-value"],
    "attn.c_proj": ["attn-c_proj"],
    "mlp.c_proj": ["mlp-c_proj"],
}


def test_the_bias_of_a_fused_weight_moves_by_the_scaled_vectors_of_its_projections() -> None:
    model, plain = adapted("fused"), gpt2()
    state, added = dict(plain.named_parameters()), vectors(model)
    for path, layer in model.get_base_model().named_modules():
        if names := PIECES.get(".".join(path.split(".")[3:])):
            state[f"{path}.weight"] = state[f"{path}.weight"] + layer.get_delta_weight("a")
            b = torch.cat([added[f"b-{name}"] for name in names])
            state[f"{path}.bias"] = state[f"{path}.bias"] + 2.0 * b
    expected = functional_call(plain, state, kwargs=INPUTS).logits
    torch.testing.assert_close(outputs(model, INPUTS), expected.detach(), atol=2e-6, rtol=1e-5)


def test_of_pairs_it_is_pefts_lora_bias() -> None:
    ours = adapted("lora", scaling=0.5).train()
    theirs = get_peft_model(
        bert(), LoraConfig(r=4, lora_alpha=2, target_modules=EVERY, lora_bias=True)
    ).train()
    of_lora = dict(theirs.get_base_model().named_modules())
    layers = [(p, m) for p, m in ours.get_base_model().named_modules() if m in list(linears(ours))]
    for path, layer in layers:
        ((_, group),) = layer.adapters["a"].parts
        of_lora[path].lora_A["default"].weight.data = group.lotr_V["a"].weight.data.clone()
        of_lora[path].lora_B["default"].weight.data = group.lotr_U["a"].weight.data.clone()
        (b,) = group.lotr_core["a"].parameters()
        of_lora[path].lora_B["default"].bias.data = b.data.clone()
    for model in (ours, theirs):
        model.eval()(**INPUTS).logits.square().sum().backward()
    torch.testing.assert_close(outputs(ours, INPUTS), outputs(theirs, INPUTS), atol=1e-6, rtol=1e-5)
    for path, layer in layers:
        (b,) = layer.adapters["a"].parts[0][1].lotr_core["a"].parameters()
        torch.testing.assert_close(b.grad, of_lora[path].lora_B["default"].bias.grad, atol=1e-4, rtol=1e-4)


def test_dropout_of_numbers_of_the_update_leaves_the_bias() -> None:
    model = adapted("cara", dropout=0.5, init_weights=True).train()
    layer = next(m for p, m in model.named_modules() if p.endswith("layer.1.intermediate.dense"))
    once = layer.update("a", torch.randn(5, 32))
    assert once.any() and torch.equal(once, layer.bias_update("a").expand(5, -1))


# ---- adapters and files


@pytest.mark.parametrize("case", CASES)
def test_it_is_saved_loaded_and_exported(case: str, tmp_path: Path) -> None:
    model, make = adapted(case), CASES[case][0]
    expected = outputs(model, INPUTS)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path / "a")
    assert torch.equal(outputs(loaded, INPUTS), expected)
    report = lotr.export(tmp_path / "a", tmp_path / "lora")
    assert any(key.endswith("lora_B.bias") for key in report["peft_only"])
    lora = PeftModel.from_pretrained(make(), tmp_path / "lora")
    torch.testing.assert_close(outputs(lora, INPUTS), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(outputs(lora.merge_and_unload(), INPUTS), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_it_is_merged_and_unmerging_restores_the_bias_bit_for_bit(case: str) -> None:
    model = adapted(case)
    before, expected = own_biases(model), outputs(model, INPUTS)
    model.merge_adapter()
    assert not all(torch.equal(a, b) for a, b in zip(before, own_biases(model), strict=True))
    torch.testing.assert_close(outputs(model, INPUTS), expected, atol=2e-6, rtol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(before, own_biases(model), strict=True))
    assert torch.equal(outputs(model, INPUTS), expected)
    torch.testing.assert_close(outputs(model.merge_and_unload(), INPUTS), expected, atol=2e-6, rtol=1e-5)


def test_a_safe_merge_refuses_a_bias_that_is_not_finite() -> None:
    model = adapted("lotr")
    layer = next(linears(model))
    next(p for n, p in model.named_parameters() if "b-query" in n).data[0] = float("nan")
    before = layer.get_base_layer().bias.clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().bias, before)


@pytest.mark.parametrize("case", ["lotr", "cara"])
def test_several_adapters_add_up_and_rows_of_a_batch_keep_theirs(case: str) -> None:
    model = adapted(case)
    model.add_adapter("b", config(case, 1))
    randomise(model, "b", 1)
    model.base_model.add_weighted_adapter(["a", "b"], [0.5, -2.0], "sum")
    for layer in linears(model.eval()):
        if (expected := layer.bias_update("a")) is not None:
            expected = 0.5 * expected - 2.0 * layer.bias_update("b")
            torch.testing.assert_close(layer.bias_update("sum"), expected)
    names = ["a", "b", "__base__", "sum"]
    mixed = outputs(model, INPUTS, adapter_names=names)
    for n, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
        alone = outputs(bert() if name == "__base__" else model, INPUTS)[n]
        torch.testing.assert_close(mixed[n], alone, atol=2e-6, rtol=1e-5)
    model.base_model.set_adapter(["a", "b"])
    together = outputs(model, INPUTS)
    model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both")
    model.set_adapter("both")
    torch.testing.assert_close(outputs(model, INPUTS), together, atol=5e-6, rtol=1e-5)


def test_a_sum_needs_biases_in_all_adapters_or_in_none() -> None:
    model = adapted("lotr")
    model.add_adapter("b", config("lotr", lora_bias=False))
    with pytest.raises(ConfigError, match="do not adapt the same modules"):
        model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")


def test_cutting_the_rank_leaves_it() -> None:
    model = adapted("lotr")
    before = vectors(model)
    lotr.truncate(model, rank=2)
    assert all(torch.equal(before[name], b) for name, b in vectors(model).items())


def test_on_a_basis_it_trains_with_the_cores_and_is_as_in_the_basis(tmp_path: Path) -> None:
    adapted("cara").save_pretrained(tmp_path)
    basis = str(tmp_path / "a")
    model = get_peft_model(bert(), LotrConfig(basis=basis))
    trained = {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"weights", "factor_0", "factor_1", *vectors(adapted("cara"))}
    assert torch.equal(outputs(model.eval(), INPUTS), outputs(bert(), INPUTS))
    with pytest.raises(ConfigError, match="lora_bias=False contradicts basis"):
        get_peft_model(bert(), LotrConfig(basis=basis, lora_bias=False))


# ---- what cannot hold it


def test_a_magnitude_beside_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora_bias=True .*magnitude='per_output'"):
        LotrConfig(method="dora", lora_bias=True)


def test_forms_without_a_bias_refuse_it(tmp_path: Path) -> None:
    adapted("lotr").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="lora_bias=True"):
        lotr.compress([tmp_path / "a"], tmp_path / "compressed", bert(), rank=2)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(adapted("lotr"), rank=4, adapter_name="a")
    bank = CoreBank.create(tmp_path / "bank", basis=tmp_path / "a")
    bank.add_adapter("task", tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"'task' has lora_bias=True, and vLLM"):
        LoraFolders(bank, tmp_path / "cache", 1 << 30).make("task")
    assert not list((tmp_path / "cache").iterdir())
