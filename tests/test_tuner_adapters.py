"""Several adapters on one model: merging, mixed batches, sums, swapping, transformers' own functions."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

from conftest import bert, gpt2, llama, t5, tokens
from lotr import ConfigError, LotrConfig
from lotr.tuner.group import LotrLayer
from tuner_contract import linears, outputs, weights

INPUTS = {"input_ids": tokens()}


def config(seed: int = 0, **kwargs: Any) -> LotrConfig:
    defaults = {"r": 4, "target_modules": ["query", "value"], "init_weights": False, "seed": seed}
    return LotrConfig(**(defaults | kwargs))


@pytest.fixture
def model() -> PeftModel:
    model = get_peft_model(bert(), config(0), adapter_name="a")
    model.add_adapter("b", config(1, scaling=0.5))
    return model.eval()


def deltas(model: nn.Module, adapter: str) -> Tensor:
    return torch.stack([layer.get_delta_weight(adapter) for layer in linears(model)])


# ---- merging


def test_adapters_can_be_merged_one_after_the_other(model: PeftModel) -> None:
    before = weights(model)
    model.merge_adapter(["a"])
    with pytest.warns(UserWarning, match="additionally merging b"):
        model.merge_adapter(["a", "b"])
    both = torch.stack(weights(model))
    torch.testing.assert_close(both, torch.stack(before) + deltas(model, "a") + deltas(model, "b"))
    model.unmerge_adapter()
    assert all(torch.equal(x, y) for x, y in zip(before, weights(model), strict=True))


def test_merging_leaves_the_names_of_the_state_dict_and_both_parameters(model: PeftModel) -> None:
    """Of a base with biases: a state dict from before loads while merged and afterwards."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    assert model.state_dict().keys() == before.keys()
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not [name for name, _ in model.named_parameters() if "unmerged" in name]


def test_weights_move_with_the_model_while_they_are_merged(model: PeftModel) -> None:
    before = weights(model)
    model.merge_adapter()
    model.double()
    assert all(layer.base_weight.read().dtype == torch.float64 for layer in linears(model))
    model.unmerge_adapter()
    assert all(torch.equal(W, W0.double()) for W, W0 in zip(weights(model), before, strict=True))


def test_what_was_merged_in_inference_mode_trains(model: PeftModel) -> None:
    with torch.inference_mode():
        plain = model.merge_and_unload()
    again = get_peft_model(plain.requires_grad_(True), config(2))
    again(**INPUTS).logits.square().sum().backward()


def test_merging_twice_is_merging_once(model: PeftModel) -> None:
    model.merge_adapter()
    once = weights(model)
    model.merge_adapter()
    assert all(torch.equal(x, y) for x, y in zip(once, weights(model), strict=True))


def test_unmerging_what_is_not_merged_warns(model: PeftModel) -> None:
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_disabling_a_merged_adapter_unmerges_it(model: PeftModel) -> None:
    plain = outputs(bert(), INPUTS)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(outputs(model, INPUTS), plain)


def test_a_safe_merge_refuses_nan_and_leaves_the_weight(model: PeftModel) -> None:
    layer = next(linears(model))
    layer.lotr_C["a"].weight.data[0, 0] = float("nan")
    before = layer.get_base_layer().weight.clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before) and layer.merged_adapters == []
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(safe_merge=True)


def test_a_merged_half_precision_weight_is_the_rounded_sum() -> None:
    model = get_peft_model(bert().half(), config(scaling=0.01), autocast_adapter_dtype=True)
    layer = next(linears(model))
    exact = layer.get_base_layer().weight.float() + layer.get_delta_weight("default").float()
    layer.merge()
    assert torch.equal(layer.get_base_layer().weight, exact.half())


# ---- mixed batches


def test_names_may_repeat_and_come_in_any_order(model: PeftModel) -> None:
    names = ["b", "b", "__base__", "a"]
    mixed = outputs(model, INPUTS, adapter_names=names)
    for row, name in enumerate(names):
        single = {"input_ids": INPUTS["input_ids"][row : row + 1]}
        alone = outputs(model, single, adapter_names=[name])
        torch.testing.assert_close(mixed[row : row + 1], alone)
    assert torch.equal(mixed[2], outputs(bert(), INPUTS)[2])


@pytest.mark.parametrize(
    "names, message",
    [(["a", "c", "d", "a"], r"non-existing adapter\(s\): c, d"), (["a"], "same as the number of inputs")],
)
def test_names_that_do_not_fit_are_refused(model: PeftModel, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**INPUTS, adapter_names=names)


def test_names_are_refused_in_training_and_when_merged(model: PeftModel) -> None:
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(**INPUTS, adapter_names=["a"] * 4)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(**INPUTS, adapter_names=["a"] * 4)


def test_each_row_uses_its_own_head() -> None:
    heads = config(modules_to_save=["classifier"])
    model = get_peft_model(bert(), heads, adapter_name="a")
    model.add_adapter("b", config(1, modules_to_save=["classifier"]))
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["b"].weight.mul_(-3)
    model.eval()
    mixed = outputs(model, INPUTS, adapter_names=["a", "b", "a", "b"])
    for name, rows in (("a", [0, 2]), ("b", [1, 3])):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[rows], outputs(model, INPUTS)[rows])


@pytest.mark.parametrize("make, targets", [(llama, ["q_proj", "v_proj"]), (t5, ["q", "v"])])
@pytest.mark.parametrize("beams", [1, 3])
def test_each_row_is_generated_by_its_own_adapter(make: Any, targets: list[str], beams: int) -> None:
    model = get_peft_model(make(), config(target_modules=targets, scaling=30.0), adapter_name="a")
    model.add_adapter("b", config(1, target_modules=targets, scaling=30.0))
    model.eval()
    names = ["a", "b", "__base__", "a"]
    settings = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "num_beams": beams,
        "do_sample": False,
        "attention_mask": torch.ones_like(INPUTS["input_ids"]),
    }
    mixed = model.generate(**INPUTS, **settings, adapter_names=names)
    alone = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        alone[name] = model.generate(**INPUTS, **settings)
    with model.disable_adapter():
        alone["__base__"] = model.generate(**INPUTS, **settings)
    assert not torch.equal(alone["a"], alone["b"])
    for row, name in enumerate(names):
        assert torch.equal(mixed[row], alone[name][row])


@pytest.mark.parametrize("make, target", [(llama, "q_proj"), (gpt2, "c_attn")])
def test_generating_with_a_cache_gives_the_same_tokens(make: Any, target: str) -> None:
    model = get_peft_model(make(), config(target_modules=[target], scaling=3.0)).eval()
    settings = {
        "max_new_tokens": 8,
        "do_sample": False,
        "attention_mask": torch.ones_like(INPUTS["input_ids"]),
    }
    cached = model.generate(**INPUTS, **settings, use_cache=True)
    assert torch.equal(cached, model.generate(**INPUTS, **settings, use_cache=False))


# ---- sums


def test_adapters_with_the_same_factors_are_added_without_growing(model: PeftModel) -> None:
    model.add_adapter("c", config(0))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LotrLayer) and hasattr(module, "lotr_U"):
                module.lotr_U["c"].weight.copy_(module.lotr_U["a"].weight)
                module.lotr_V["c"].weight.copy_(module.lotr_V["a"].weight)
    model.add_weighted_adapter(["a", "c"], [0.7, 2.0], "sum", combination_type="linear")
    torch.testing.assert_close(deltas(model, "sum"), 0.7 * deltas(model, "a") + 2.0 * deltas(model, "c"))
    assert next(linears(model)).lotr_C["sum"].weight.shape == (4, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["a", "b"], [1.0, 1.0], "new", "linear"), "different factors"),
        ((["a", "b"], [1.0, 1.0], "new", "svd"), "combination_type='svd' is not exact"),
        ((["a", "x"], [1.0, 1.0], "new", "cat"), "'x' does not exist"),
        ((["a", "b"], [1.0], "new", "cat"), "2 adapters and 1 weights"),
        (([], [], "new", "cat"), "0 adapters"),
        ((["a", "b"], [1.0, 1.0], "b", "cat"), "'b' exists already"),
    ],
)
def test_a_sum_that_is_not_exact_is_refused(model: PeftModel, arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"a", "b"}


def test_adapters_on_different_modules_are_not_added(model: PeftModel) -> None:
    model.add_adapter("c", config(target_modules=["query"]))
    with pytest.raises(ConfigError, match="do not adapt the same modules"):
        model.add_weighted_adapter(["a", "c"], [1.0, 1.0], "new", "cat")


def test_ranks_of_single_modules_add_up_too() -> None:
    model = get_peft_model(bert(), config(rank_pattern={"value": 2}), adapter_name="a")
    model.add_adapter("b", config(1, rank_pattern={"value": 6}))
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    torch.testing.assert_close(deltas(model, "sum"), deltas(model, "a") + deltas(model, "b"))


def test_trained_heads_have_no_sum() -> None:
    model = get_peft_model(bert(), config(0, task_type="SEQ_CLS"), adapter_name="a")
    model.add_adapter("b", config(1, task_type="SEQ_CLS"))
    with pytest.raises(ConfigError, match=r"'classifier' was trained .* no sum"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c")
    assert set(model.peft_config) == {"a", "b"}


# ---- swapping


def test_hot_swapping_another_rank_is_refused(tmp_path: Path) -> None:
    get_peft_model(bert(), config(r=2)).save_pretrained(tmp_path)
    model = get_peft_model(bert(), config()).eval()
    before = outputs(model, INPUTS)
    with pytest.raises(ValueError, match=r"\br\b.*4.*2|\br\b.*2.*4"):
        hotswap_adapter(model, str(tmp_path), adapter_name="default", torch_device="cpu")
    assert torch.equal(outputs(model, INPUTS), before)


# ---- life cycle


def test_deleting_the_active_adapter_activates_another(model: PeftModel) -> None:
    with pytest.warns(UserWarning, match="Setting active adapter"):
        model.delete_adapter("a")
    assert model.active_adapters == ["b"] and set(model.peft_config) == {"b"}


def test_an_adapter_added_later_shares_no_number_with_the_first(model: PeftModel) -> None:
    before = deltas(model, "a").clone()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".b." in name:
                parameter.zero_()
    assert torch.equal(deltas(model, "a"), before)


def test_an_adapter_may_take_other_modules_than_the_first(model: PeftModel) -> None:
    model.add_adapter("c", config(2, target_modules=["dense", "query"], r=2))
    model.set_adapter("c")
    with_c = outputs(model, INPUTS)
    alone = get_peft_model(bert(), config(2, target_modules=["dense", "query"], r=2), adapter_name="c").eval()
    torch.testing.assert_close(with_c, outputs(alone, INPUTS))


def test_the_functions_of_transformers_work(tmp_path: Path) -> None:
    model = bert()
    model.add_adapter(config(), adapter_name="a")
    adapted = outputs(model, INPUTS)
    assert not torch.equal(adapted, outputs(bert(), INPUTS))
    assert any("lotr_C" in key for key in model.get_adapter_state_dict("a"))
    model.save_pretrained(tmp_path)

    other = bert()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        other.load_adapter(str(tmp_path), adapter_name="a")
    assert torch.equal(outputs(other.eval(), INPUTS), adapted)
    other.disable_adapters()
    assert torch.equal(outputs(other, INPUTS), outputs(bert(), INPUTS))
    other.enable_adapters()
    assert torch.equal(outputs(other, INPUTS), adapted)
    other.delete_adapter("a")
    assert torch.equal(outputs(other, INPUTS), outputs(bert(), INPUTS))
    assert not [name for name, _ in other.named_parameters() if "lotr_" in name]


def test_peft_can_leave_the_type_of_inputs_as_it_is(model: PeftModel) -> None:
    before = outputs(model, INPUTS)
    with disable_input_dtype_casting(model):
        assert torch.equal(outputs(model, INPUTS), before)
    assert all(m.cast_input_dtype_enabled for m in model.modules() if isinstance(m, LotrLayer))
