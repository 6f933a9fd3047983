"""Ranks under a budget: the largest uniform one, and ranks that a start shares out among the groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import lotr
from conftest import bert, gpt2, tokens
from lotr import ConfigError, LotrConfig
from lotr.adapters.inspection import inspect
from lotr.tuner.group import LotrGroup
from lotr.tuner.ranks import tied
from tuner_contract import outputs

TARGETS = {bert: ["query", "value", "dense"], gpt2: ["c_attn", "c_proj"]}
IDS = tokens(8, 9)


def _batches(make: Any) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": IDS, "labels": torch.arange(8) % 3 if make is bert else IDS}]


def _config(make: Any = bert, **fields: Any) -> LotrConfig:
    return LotrConfig(**{"target_modules": TARGETS[make], "seed": 0, **fields})


def _wide(make: Any = bert, **fields: Any) -> PeftModel:
    return get_peft_model(make(), _config(make, **{"r": 8, **fields})).eval()


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- one rank for all


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"trainable": "cores"},
        {"method": "lora"},
        {"method": "dora"},
        {"method": "tenslora_depth"},
        {"method": "metatt_4d", "target_modules": ["query", "value"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("budget", [2500, 4000, 10**6])
def test_the_largest_rank_is_the_last_that_the_budget_allows(fields: dict[str, Any], budget: int) -> None:
    counts = {r: lotr.plan(bert(), _config(r=r, **fields)).n_parameters for r in range(1, 33)}
    within = [r for r, count in counts.items() if count <= budget]
    assert within
    assert lotr.largest_rank(bert(), _config(**fields), budget) == max(within)


def test_a_budget_below_rank_one_tells_the_smallest_that_is_possible() -> None:
    least = lotr.plan(bert(), _config(r=1)).n_parameters
    assert lotr.largest_rank(bert(), _config(), least) == 1
    with pytest.raises(ConfigError, match=f"less than rank 1 trains: {least:,} numbers"):
        lotr.largest_rank(bert(), _config(), least - 1)
    with pytest.raises(ConfigError, match="sets ranks of single modules"):
        lotr.largest_rank(bert(), _config(rank_pattern={"query": 4}), 10**6)


# ---- ranks of the groups' own


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize("fields", [{}, {"trainable": "cores"}, {"magnitude": "per_output"}], ids=str)
def test_a_start_with_a_budget_cuts_the_groups_to_it(
    make: Any, fields: dict[str, Any], tmp_path: Path
) -> None:
    rank = lotr.largest_rank(make(), _config(make, **fields), budget := 3500)
    model = _wide(make, **{"r": 2 * rank, **fields})
    head = _trained(model) - lotr.plan(make(), _config(make, r=2 * rank, **fields)).n_parameters
    before, batches = outputs(model, {"input_ids": IDS}), _batches(make)
    sites = lotr.init_from_data(model, batches, budget=budget)
    assert torch.equal(outputs(model, {"input_ids": IDS}), before)
    assert 0.9 * budget < _trained(model) - head <= budget
    uniform = get_peft_model(make(), _config(make, r=rank, **fields)).eval()
    plainly = lotr.init_from_data(uniform, batches)
    assert sum(site.kept for site in sites) >= sum(site.kept for site in plainly)

    with torch.no_grad():  # and it is an adapter like any other
        for name, parameter in model.named_parameters():
            if "lotr_C" in name:
                parameter += 0.1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(outputs(loaded, {"input_ids": IDS}), outputs(model, {"input_ids": IDS}))
    assert inspect(tmp_path).config.rank_pattern == model.peft_config["default"].rank_pattern


def test_what_the_report_says_is_kept_is_what_the_cut_factors_keep() -> None:
    model, (batch,) = _wide(), _batches(bert)
    sites = {site.module: site.kept for site in lotr.init_from_data(model, [batch], budget=3000)}
    bare = bert()
    bare(**batch).loss.backward()
    for path, kept in sites.items():
        G = bare.get_submodule(path).weight.grad
        group = model.get_base_model().get_submodule(path).lotr_site["default"].members[0].group
        U, Vt = (getattr(group, f"lotr_{side}")["default"].weight.detach() for side in "UV")
        assert kept == pytest.approx(float((U.T @ G @ Vt.T).square().sum() / G.square().sum()), rel=1e-3)


class _OneFeatureAndAll(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.all = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.one(x * (torch.arange(16) == 3)) + self.all(x)


def test_groups_whose_gradients_lie_in_few_directions_get_few() -> None:
    config = _config(r=8, modes=(), target_modules=["one", "all"])
    model = get_peft_model(_OneFeatureAndAll(), config)
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    lotr.init_from_data(
        model, [x], budget=600, loss=lambda model, x: (model(x) - x.roll(1, 1)).square().mean()
    )
    (_, of_one), (_, of_all) = (
        model.get_submodule(f"base_model.model.{name}").lotr_site["default"].members[0].part.group.rank
        for name in ("one", "all")
    )
    assert of_one == 1 and of_all > 5


def test_groups_that_meet_in_a_module_get_one_rank() -> None:
    model = _wide(gpt2)
    plan = lotr.plan(gpt2(), _config(gpt2, r=8))
    assert any(len(names) == 3 for names in tied(plan))  # query, key and value of a fused weight
    lotr.init_from_data(model, _batches(gpt2), budget=4000)
    ranks = {
        member.part.group.name: member.part.group.rank
        for layer in model.modules()
        if hasattr(layer, "lotr_site")
        for member in layer.lotr_site["default"].members
    }
    assert all(len({ranks[name] for name in names}) == 1 for names in tied(plan))


def test_training_goes_on_after_a_cut() -> None:
    model, (batch,) = _wide(), _batches(bert)
    lotr.init_from_data(model, [batch], budget=3000)
    optimizer = torch.optim.AdamW(lotr.parameter_groups(model, lr=1e-2))
    losses = []
    for _ in range(10):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(
        m.lotr_U["default"].weight.isfinite().all() for m in model.modules() if isinstance(m, LotrGroup)
    )


@pytest.mark.parametrize(
    "fields, budget, says",
    [
        ({"method": "tenslora_depth"}, 10**6, "core='tucker', which has no cut"),
        ({"method": "lora"}, 10**6, "core='identity', which has no cut"),
        ({}, 10, "less than rank 1 trains"),
    ],
    ids=str,
)
def test_a_budget_that_cannot_be_shared_out_is_refused_before_anything_turns(
    fields: dict[str, Any], budget: int, says: str
) -> None:
    model = _wide(**fields)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ConfigError, match=says):
        lotr.init_from_data(model, _batches(bert), budget=budget)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_factors_of_a_basis_do_not_turn(tmp_path: Path) -> None:
    _wide().save_pretrained(tmp_path / "basis")
    model = _wide(basis=str(tmp_path / "basis"))
    with pytest.raises(ConfigError, match="to which the cores will refer"):
        lotr.init_from_data(model, _batches(bert))
