"""`lotr.truncate`: the ranks of a trained adapter cut down, with as little loss as they allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tensorly as tl
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn

import lotr
from conftest import bert, gpt2, tokens
from lotr import ConfigError, LotrConfig
from lotr.adapters.inspection import inspect
from lotr.tuner.group import LotrGroup
from lotr.tuner.layer import LotrLinear
from tuner_contract import linears, outputs

INPUTS = {"input_ids": tokens()}


def _model(make: Any = bert, **fields: Any) -> PeftModel:
    targets = ["query", "value"] if make is bert else ["c_attn"]
    options = {"r": 8, "target_modules": targets, "init_weights": False, "seed": 0, **fields}
    return get_peft_model(make(), LotrConfig(**options)).eval()


def _deltas(model: PeftModel) -> Tensor:
    return torch.stack([layer.get_delta_weight("default") for layer in linears(model)])


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize("method", ["lotr", "lotr_joint"])
@pytest.mark.parametrize("start", ["orthonormal", "gaussian"])
def test_the_full_rank_changes_nothing_and_makes_the_factors_orthonormal(make, method, start) -> None:
    model = _model(make, method=method, init=start)
    before = outputs(model, INPUTS)
    report = lotr.truncate(model, rank=8)
    assert all(group.before == group.after == (8, 8) and group.kept == pytest.approx(1) for group in report)
    torch.testing.assert_close(outputs(model, INPUTS), before, atol=2e-5, rtol=1e-4)
    for group in (m for m in model.modules() if isinstance(m, LotrGroup)):
        U = group.lotr_U["default"].weight
        torch.testing.assert_close(U.T @ U, torch.eye(8), atol=1e-5, rtol=0)


def test_a_truncated_update_is_as_near_as_tensorlys_tucker() -> None:
    model = _model(method="lotr_joint", init="gaussian")
    before = _deltas(model)
    (group,) = lotr.truncate(model, rank=3)
    after = _deltas(model)
    with tl.backend_context("pytorch"):
        core, factors = partial_tucker(before.double(), rank=(3, 3), modes=[1, 2], n_iter_max=50)[0]
        best = tl.tenalg.multi_mode_dot(core, factors, modes=[1, 2])
    error, least = (float((x.double() - before.double()).norm()) for x in (after, best))
    assert error == pytest.approx(least, rel=1e-4)
    assert group.kept == pytest.approx(float(after.square().sum() / before.square().sum()), rel=1e-3)


def _grouped_query(**fields: Any) -> PeftModel:
    """Return a Llama whose keys and values use the first quarter of the rows of the factor of the queries."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 16}
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=2)).double()
    targets = ["q_proj", "k_proj", "v_proj"]
    config = LotrConfig(
        method="lotr_joint", r=6, seed=0, init_weights=False, target_modules=targets, **fields
    )
    model = get_peft_model(base, config)
    (group,) = (m for m in model.modules() if isinstance(m, LotrGroup))
    with torch.no_grad():  # the first rows carry little of the first columns, and much of the last
        group.lotr_U["default"].weight[:8] *= torch.tensor([0.1, 0.1, 0.3, 1, 2, 3])
    return model


def _squares(model: PeftModel) -> list[Tensor]:
    return [layer.get_delta_weight("default").detach().clone() for layer in linears(model)]


def _energy(updates: list[Tensor]) -> float:
    return sum(float(update.square().sum()) for update in updates)


def test_the_full_rank_changes_nothing_where_sites_use_the_first_rows_of_a_factor() -> None:
    model = _grouped_query()
    before = _squares(model)
    assert len({update.shape for update in before}) == 2
    (group,) = lotr.truncate(model, rank=6)
    assert group.kept == pytest.approx(1)
    for update, expected in zip(_squares(model), before, strict=True):
        torch.testing.assert_close(update, expected, atol=1e-10, rtol=1e-8)


def test_a_module_whose_path_ends_like_another_keeps_its_own_rank(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))

    config = LotrConfig(r=4, modes=(), target_modules=r"0|1\..", seed=0, init_weights=False)
    model = get_peft_model(make(), config)
    with torch.no_grad():
        for path, layer in model.named_modules():
            if isinstance(layer, LotrLinear) and ".1." in path:
                layer.lotr_C["default"].weight[:, 2:] = 0
    ranks = [group.after for group in lotr.truncate(model, energy=1 - 1e-9)]
    assert len(set(ranks)) == 2
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 8)
    torch.testing.assert_close(PeftModel.from_pretrained(make(), tmp_path)(x), model(x))


@pytest.mark.parametrize("rank", [2, 4])
def test_what_is_left_is_that_of_the_dense_updates_and_near_the_best_that_factors_can_do(rank: int) -> None:
    model = _grouped_query()
    before = _squares(model)
    U, V = (factor["default"].weight.detach() for factor in _factors(model))
    (group,) = lotr.truncate(model, rank=rank)
    error = _energy([a - b for a, b in zip(_squares(model), before, strict=True)])
    assert group.kept == pytest.approx(_energy(_squares(model)) / _energy(before))
    assert error == pytest.approx((1 - group.kept) * _energy(before), rel=1e-6)
    least = _least_error(before, U, V.T, rank)
    assert least <= error * (1 + 1e-6) and error < 1.1 * least


def _factors(model: PeftModel) -> tuple[Any, Any]:
    (group,) = (m for m in model.modules() if isinstance(m, LotrGroup))
    return group.lotr_U, group.lotr_V


def _least_error(updates: list[Tensor], U: Tensor, V: Tensor, rank: int) -> float:
    """Least squared error of all updates with factors `U P` and `V Q`, by descent from random ones."""
    generator = torch.Generator().manual_seed(0)

    def start(columns: int) -> Tensor:
        return torch.randn(columns, rank, generator=generator, dtype=torch.float64).requires_grad_()

    def error(P: Tensor, Q: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for update in updates:
            left = torch.linalg.qr(U[: len(update)] @ P).Q
            right = torch.linalg.qr(V[: update.shape[1]] @ Q).Q
            total = total + (update - left @ (left.T @ update @ right) @ right.T).square().sum()
        return total

    best = float("inf")
    for _ in range(4):
        P, Q = start(U.shape[1]), start(V.shape[1])
        descent = torch.optim.LBFGS([P, Q], max_iter=300, line_search_fn="strong_wolfe")

        def closure(descent: Any = descent, P: Tensor = P, Q: Tensor = Q) -> Tensor:
            descent.zero_grad()
            loss = error(P, Q)
            loss.backward()
            return loss

        descent.step(closure)
        best = min(best, float(error(P, Q).detach()))
    return best


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize("how", [{"rank": 3}, {"rank": (2, 5)}, {"energy": 0.8}], ids=str)
def test_a_truncated_adapter_saves_loads_trains_and_merges(make, how: dict[str, Any], tmp_path: Path) -> None:
    model = _model(make)
    before = model.get_nb_trainable_parameters()[0]
    lotr.truncate(model, **how)
    expected = outputs(model, INPUTS)
    assert model.get_nb_trainable_parameters()[0] < before
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path, is_trainable=True)
    torch.testing.assert_close(outputs(loaded, INPUTS), expected, atol=1e-6, rtol=1e-5)
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    assert inspect(tmp_path).numbers == model.get_nb_trainable_parameters()[0]
    model(**INPUTS).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(outputs(model.merge_and_unload(), INPUTS), expected, atol=2e-6, rtol=1e-5)


def test_an_energy_keeps_that_share_on_each_side_with_the_fewest_directions() -> None:
    model = _model(method="lotr_joint")
    for group in (m for m in model.modules() if isinstance(m, LotrGroup)):
        with torch.no_grad():  # a spectrum that falls
            group.lotr_U["default"].weight *= 0.5 ** torch.arange(8)
    (group,) = lotr.truncate(model, energy=0.99)
    assert group.after[0] <= 5 and group.kept > 0.98


@pytest.mark.parametrize(
    "fields, how, says",
    [
        ({}, {}, "give one of the two"),
        ({}, {"rank": 2.5}, r"rank=2\.5 is not a rank"),
        ({}, {"rank": "4"}, "rank='4' is not a rank"),
        ({}, {"rank": 0}, "rank=0 is not a rank"),
        ({}, {"rank": True}, "rank=True is not a rank"),
        ({}, {"rank": (2, 3, 4)}, r"rank=\(2, 3, 4\) is not a rank"),
        ({}, {"energy": 1.5}, r"energy=1\.5 is not a share"),
        ({}, {"energy": "0.9"}, "energy='0.9' is not a share"),
        ({}, {"energy": True}, "energy=True is not a share"),
        ({}, {"energy": float("nan")}, "energy=nan is not a share"),
        ({}, {"rank": 2, "adapter": "other"}, "'other' does not exist"),
        ({"method": "metatt_4d"}, {"rank": 2}, "core='tt'"),
    ],
    ids=str,
)
def test_what_cannot_be_truncated_is_refused_by_name(
    fields: dict[str, Any], how: dict[str, Any], says: str
) -> None:
    model = _model(**fields)
    before = _deltas(model)
    with pytest.raises(ConfigError, match=says):
        lotr.truncate(model, **how)
    assert torch.equal(_deltas(model), before)


def test_a_model_without_one_adapter_to_cut_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"\(BertForSequenceClassification\) has no adapter.*get_peft_model"
    ):
        lotr.truncate(bert(), rank=2)
    with pytest.raises(ConfigError, match="Give the PEFT model"):
        lotr.truncate(get_peft_model(bert(), LoraConfig(target_modules=["query"])), rank=2)
    model = _model()
    model.add_adapter("other", LotrConfig(r=4, target_modules=["query", "value"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match=r"\['default', 'other'\] are active"):
        lotr.truncate(model, rank=2)
    assert {g.after for g in lotr.truncate(model, rank=2, adapter="other")} == {(2, 2)}


def test_an_adapter_that_transformers_added_is_truncated_too() -> None:
    model = bert()
    model.add_adapter(LotrConfig(r=4, target_modules=["query", "value"], init_weights=False), "a")
    assert {group.after for group in lotr.truncate(model, rank=2)} == {(2, 2)}


def test_one_object_for_two_adapters_describes_the_other_as_before(tmp_path: Path) -> None:
    config = LotrConfig(r=8, target_modules=["query"], init_weights=False)
    model = get_peft_model(bert(), config)
    model.add_adapter("other", config)
    model.set_adapter("other")
    expected = outputs(model.eval(), INPUTS)
    lotr.truncate(model, rank=2, adapter="default")
    assert model.peft_config["default"].r == 2 and model.peft_config["other"].r == config.r == 8
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "other").eval()
    torch.testing.assert_close(outputs(loaded, INPUTS), expected)


def test_what_was_truncated_in_inference_mode_trains() -> None:
    model = _model()
    with torch.inference_mode():
        lotr.truncate(model, rank=2)
    model(**INPUTS).logits.square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lotr_" in name)
