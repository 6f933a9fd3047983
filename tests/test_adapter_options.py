"""Frozen factors, dropout, seeds, sums of adapters, and what a configuration refuses: for every structure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lotr
from conftest import bert, gpt2, llama, tokens
from lotr import METHODS, ConfigError, LotrConfig
from lotr.tuner.layer import LotrLinear
from tuner_contract import linears, outputs

INPUTS = {"input_ids": tokens()}
LLAMA, BERT = ["q_proj", "v_proj"], ["query", "value", "dense"]


def config(row: str = "lotr", targets: list[str] = LLAMA, seed: int = 0, **kwargs: Any) -> LotrConfig:
    return LotrConfig(method=row, target_modules=targets, seed=seed, **({"r": 4} | kwargs))


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lotr_" in name}


# ---- trainable="cores"

FROZEN = [("lora_xs", {}), ("lotr", {}), ("lorta", {}), ("lotr", {"magnitude": "per_output"})]


def trained(model: nn.Module) -> set[str]:
    return {n.split("lotr_")[1].partition(".")[0] for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("row, kwargs", FROZEN)
def test_frozen_factors_stay_frozen_whatever_is_switched(
    row: str, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    frozen = config(row, trainable="cores", init="orthonormal", **kwargs)
    expected = {"core" if row == "lorta" else "C", *(["magnitude"] if "magnitude" in kwargs else [])}
    model = get_peft_model(llama(), frozen)
    assert trained(model) == expected
    model.train()
    assert trained(model) == expected
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    graded = {
        n.split("lotr_")[1].partition(".")[0] for n, p in model.named_parameters() if p.grad is not None
    }
    assert graded == expected

    model.add_adapter("other", config("lotr", seed=1))
    model.set_adapter("other")
    assert trained(model) == {"U", "V", "C"}
    model.set_adapter("default")
    assert trained(model) == expected
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert trained(model) == expected
    with model.disable_adapter():
        pass
    assert trained(model) == expected

    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low)
        assert trained(loaded) == expected
        assert torch.equal(outputs(loaded.eval(), INPUTS), outputs(model.eval(), INPUTS))


def test_lora_xs_starts_at_the_leading_singular_directions_of_each_weight() -> None:
    model = get_peft_model(llama(), config("lora_xs"))
    for layer in linears(model):
        _, group = layer.adapters["default"].parts[0]
        U, V = group.lotr_U["default"].weight, group.lotr_V["default"].weight.T
        left, sizes, right = torch.linalg.svd(layer.base_layer.weight)
        for found, exact in ((U, left[:, :4]), (V, right[:4].T)):
            assert torch.linalg.svdvals((found / found.norm(dim=0)).T @ exact).min() > 0.99
        torch.testing.assert_close(V.norm(dim=0), sizes[:4], rtol=2e-2, atol=0.0)


# ---- dropout


@pytest.mark.parametrize("row", ["lotr", "dora", "bora", "map"])  # every magnitude
def test_dropout_drops_while_training_and_never_else(row: str) -> None:
    def passes(dropout: float, training: bool) -> tuple[Tensor, Tensor]:
        model = get_peft_model(llama(), config(row, dropout=dropout, init_weights=False))
        for name, number in model.named_parameters():
            if "lotr_magnitude.default.beta" in name:
                nn.init.ones_(number)
        model.train(training)
        return outputs(model, INPUTS), outputs(model, INPUTS)

    once, again = passes(0.5, training=True)
    assert (once - again).abs().max() > 1e-3
    assert torch.equal(*passes(0.5, training=False)) and torch.equal(*passes(0.0, training=True))
    assert torch.equal(passes(0.5, training=False)[0], passes(0.0, training=True)[0])


# ---- seeds


@pytest.mark.parametrize("row", METHODS)
def test_a_seed_decides_every_number_and_leaves_the_global_random_state(row: str) -> None:
    bert(num_hidden_layers=2)  # made once
    state = torch.get_rng_state()
    one, same, other = (
        numbers(get_peft_model(bert(num_hidden_layers=2), config(row, BERT, seed=seed))) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    if row == "lora_xs":  # whose factors are those of the weight
        return
    differ = {
        name.split("lotr_")[1].partition(".")[0] for name in one if not torch.equal(one[name], other[name])
    }
    expected = {"output": {"V"}, "input": {"U"}, "core": {"U", "V"}}[METHODS[row].zero]
    assert expected <= differ or METHODS[row].init == "identity"


def test_without_a_seed_torchs_own_decides() -> None:
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(outputs(get_peft_model(llama(), config(seed=None, init_weights=False)), INPUTS))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


# ---- refusals


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"norm_gradient": True}, r"norm_gradient=True has no meaning with magnitude='none'"),
        ({"core": "tucker", "modes": ()}, r"core='tucker' with modes=\(\) .* use core='free'"),
        ({"core": "tt", "modes": ()}, r"core='tt' with modes=\(\) .* use core='free'"),
        (
            {"core": "identity", "modes": ("layer",)},
            r"core='identity' with modes=\('layer',\) .* Use modes=\(\)",
        ),
        ({"core": "cp", "r": (2, 4)}, r"core='cp' or 'scaled_cp' needs one rank, and r=\(2, 4\) is a pair"),
        (
            {"core": "identity", "modes": (), "r": (2, 4)},
            r"core='identity' needs one rank, and r=\(2, 4\) is a pair",
        ),
        ({"core": "cp", "rank_pattern": {"q_proj": (2, 4)}}, r"core='cp' .*\(2, 4\)"),
        ({"core_ranks": 2}, r"core_ranks=2 .*core='free'"),
        ({"core": "tucker", "core_ranks": {"head": 2}}, r"core_ranks names 'head'"),
        ({"core": "tucker", "core_ranks": 0}, r"core_ranks=0"),
        ({"core": "tucker", "core_ranks": {"layer": True}}, r"core_ranks="),
        ({"modes": ("layer", "head")}, r"modes=.*\"head\", but blocks='none'"),
        ({"method": "lora", "trainable": "cores"}, r"trainable='cores' with core='identity'"),
        ({"magnitude": "base_and_update", "init_weights": True}, r"init_weights=True .*base_and_update"),
        (
            {"init": "gradient", "magnitude": "base_and_update"},
            r"init='gradient' .*base_and_update.*orthonormal",
        ),
        ({"init": "lora", "method": "map"}, r"init='lora' .*base_and_update"),
        ({"method": "map", "scaling": 2.0}, r"scaling=2.0 has no effect .*base_and_update"),
        ({"method": "map", "alpha": 32}, r"scaling=2.0 has no effect .*base_and_update"),
        ({"scaling": 2.0, "alpha": 32}, "scaling=2.0 and alpha=32"),
        ({"zero": "core", "method": "lora"}, "zero='core' with core='identity'"),
        ({"zero": "input", "trainable": "cores"}, "zero='input' with trainable='cores'"),
        ({"zero": "none", "init_weights": True}, "init_weights=True .*zero='none'"),
        ({"init": "first_step", "core": "tt", "modes": ("layer",)}, "init='first_step' .*core='tt'"),
        ({"core_init": "kaiming", "core": "tucker"}, "core_init='kaiming' .*core='tucker'"),
        ({"core_init": "huge"}, "core_init='huge'"),
        ({"unequal": "padded"}, "unequal='padded'"),
        (
            {"modes": ("site", "layer")},
            r'modes=.*"site", which is layer and projection in one.* Drop "site"',
        ),
        ({"modes": ("layers",)}, r"modes=.*names 'layers', which is not a coordinate"),
        ({"method": "lotr_join"}, r"method='lotr_join' .*Near matches: .*lotr_joint"),
        ({"bias": "lora_only"}, "bias='lora_only' .*Near matches: lotr_only"),
        ({"r": 0}, "r=0"),
        ({"r": (2, -1)}, r"r=\(2, -1\)"),
        ({"r": True}, "r=True"),
        ({"r": 1.5}, r"r=1\.5"),
        ({"rank_pattern": {"query": 0}}, "rank_pattern\\['query'\\]=0"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"dropout_place": "rank"}, "dropout_place='rank'"),
        ({"dropout_place": "components"}, "dropout_place='components' with core='free'"),
        ({"scaling": 0.0}, r"scaling=0\.0"),
        ({"scaling": float("nan")}, "scaling=nan"),
        ({"layers_pattern": "layers"}, "layers_pattern is set"),
        ({"target_modules": ".*query", "layers_to_transform": [0]}, "layers_to_transform cannot"),
        ({"core": "tuker"}, r"core='tuker' .*tucker"),
        ({"blocks": "heads"}, r"blocks='heads' .*head"),
        ({"magnitude": "per_out"}, r"magnitude='per_out' .*per_output"),
        ({"init": "svd"}, r"init='svd'"),
        ({"trainable": "core"}, r"trainable='core' .*cores"),
        ({"init_weights": "gaussian"}, r"init_weights='gaussian' .*init=\"gaussian\""),
        ({"dropout": "0.1"}, "dropout='0.1' is not a number"),
        ({"scaling": "1"}, "scaling='1' is not a number"),
        ({"seed": "a"}, "seed='a' is not a number without a fraction"),
        ({"target_modules": []}, r"target_modules=\[\] names no module. Leave it out"),
        ({"target_modules": ["query"], "layers_to_transform": "all"}, "layers_to_transform='all' is no list"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LotrConfig(**fields)


@pytest.mark.parametrize("use", [lotr.plan, lambda model, c: lotr.largest_rank(model, c, 100)])
def test_a_plan_is_that_of_a_model_and_of_this_method(use: Any) -> None:
    with pytest.raises(ConfigError, match=r"LoraConfig is no LotrConfig"):
        use(bert(), LoraConfig())
    with pytest.raises(ConfigError, match=r"model='bert' is no model. Load it first, or use `lotr plan`"):
        use("bert", LotrConfig())


@pytest.mark.parametrize("use", [lotr.inspect, lambda model: lotr.export(model, "out")])
def test_what_reads_a_folder_says_so_to_a_model(use: Any) -> None:
    with pytest.raises(ConfigError, match=r"this is a PeftModel. Save it first: model.save_pretrained"):
        use(get_peft_model(bert(), config("lotr", BERT)))


def test_one_name_of_a_module_to_save_is_one_name() -> None:
    assert LotrConfig(modules_to_save="pooler").modules_to_save == ["pooler"]


# ---- sums


#: Every kind of core, the usual ones on plain and on fused weights.
SUMS = [(bert, row) for row in ("lotr", "tenslora_depth_cp", "metatt_5d", "lora_xs", "fact_tk", "cara")]
SUMS += [(gpt2, row) for row in ("lotr", "tenslora_qkv_depth", "lorta", "metatt_5d", "lora")]


@pytest.mark.parametrize("make, row", SUMS)
def test_a_weighted_sum_is_exact_whatever_the_cores(make: Any, row: str, tmp_path: Path) -> None:
    targets = BERT if make is bert else ["c_attn", "c_proj"]
    model = get_peft_model(make(), config(row, targets, init_weights=False), adapter_name="a")
    model.add_adapter("b", config(row, targets, seed=1, r=3, scaling=0.5, init_weights=False))
    model.base_model.add_weighted_adapter(["a", "b"], [0.7, -2.0], "sum")
    for layer in linears(model):
        expected = 0.7 * layer.get_delta_weight("a") - 2.0 * layer.get_delta_weight("b")
        assert expected.any()
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected, atol=1e-6, rtol=1e-5)
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(make(), tmp_path / "sum")
    assert torch.equal(outputs(loaded, INPUTS), outputs(model.eval(), INPUTS))


def test_a_sum_of_trains_with_a_core_for_the_task_is_one_without(tmp_path: Path) -> None:
    fields = {"modes": ("task", "layer"), "init_weights": False}
    model = get_peft_model(bert(), config("metatt_4d", BERT, **fields), adapter_name="a")
    model.add_adapter("b", config("metatt_4d", BERT, seed=1, **fields))
    model.base_model.add_weighted_adapter(["a", "b"], [0.7, -2.0], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "sum")
    assert torch.equal(outputs(loaded, INPUTS), outputs(model.eval(), INPUTS))


@pytest.mark.parametrize("row", ["dora", "bora", "map"])
def test_a_sum_with_a_magnitude_is_refused_and_nothing_is_left(row: str) -> None:
    model = get_peft_model(llama(), config("lora"), adapter_name="a")
    model.add_adapter("b", config(row, seed=1))
    with pytest.raises(ConfigError, match=r"'b' has magnitude=.*[Mm]erge"):
        model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    assert set(model.peft_config) == {"a", "b"}
    assert not any("sum" in m.adapters for m in model.modules() if isinstance(m, LotrLinear))


# ---- names of adapters


def test_a_fused_modules_cores_load_under_any_name(tmp_path: Path) -> None:
    model = get_peft_model(gpt2(), config("lotr", ["c_attn"], init_weights=False), adapter_name="a")
    model.save_pretrained(tmp_path)
    for name in ("a", "b", "default"):
        loaded = PeftModel.from_pretrained(gpt2(), tmp_path / "a", adapter_name=name)
        assert torch.equal(outputs(loaded, INPUTS), outputs(model.eval(), INPUTS))


@pytest.mark.parametrize(
    "row, make, targets, name",
    [
        ("lotr", gpt2, ["c_attn"], "query"),
        ("lotr", bert, BERT, "weight"),
        ("metatt_4d", bert, BERT, "core_1"),
        ("tenslora_qkv", bert, BERT, "core"),
        ("lorta", bert, BERT, "factor_0"),
        ("dora", bert, BERT, "m"),
        ("map", bert, BERT, "alpha"),
    ],
)
def test_an_adapter_cannot_be_called_like_a_number_inside_another(
    row: str, make: Any, targets: list[str], name: str
) -> None:
    """PEFT would leave the number out of the other's file; the configuration stays as it was."""
    refused = config(row, targets)
    with pytest.raises(ConfigError, match=f"adapter cannot be called '{name}'"):
        get_peft_model(make(), refused, adapter_name=name)
    assert refused.targets is None
    model = get_peft_model(make(), config(row, targets))
    with pytest.raises(ConfigError, match=f"adapter cannot be called '{name}'"):
        model.add_adapter(name, config("lora", targets))
    assert set(model.peft_config) == {"default"}
