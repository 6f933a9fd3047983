"""Banks on experts that one parameter holds, beside what every bank does (`test_bank_rows.py`)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import banks
from banks import alone, assert_same_contents, contents
from conftest import tokens
from lotr import ConfigError, CoreBank, LotrConfig
from lotr.tuner.experts import LotrExperts
from moe_models import EXPERTS, mixtral, qwen
from test_bank_rows import MASKED, logits

NAMES = ["t0", "t1", None, "t0"]


@pytest.fixture
def bank(tmp_path: Path) -> CoreBank:
    return banks.on(tmp_path, mixtral(), ["t0", "t1"], r=3, target_parameters=EXPERTS)


def experts_of(model: nn.Module) -> list[LotrExperts]:
    return [module for module in model.modules() if isinstance(module, LotrExperts)]


def test_numbers_of_experts_stay_exact_where_float32_would_not_count_them(tmp_path: Path) -> None:
    """64 experts for 64 rows: transformers counts tokens by a histogram in float32."""

    def make() -> nn.Module:
        return qwen(num_experts=64, num_hidden_layers=1)

    names = [None if n % 4 == 3 else f"t{n % 4}" for n in range(64)]
    inputs = {"input_ids": tokens(64, 3)}
    bank = banks.on(tmp_path, make(), ["t0", "t1", "t2"], r=3, target_parameters=EXPERTS)
    expected = logits(alone(bank, make(), "t2"), inputs)[2::4]
    for implementation in ("eager", "grouped_mm"):
        base = make()
        base.set_experts_implementation(implementation)
        mixed = logits(bank.wrap(base), inputs, task_ids=names)
        torch.testing.assert_close(mixed[2::4], expected, atol=1e-5, rtol=1e-5)


def test_experts_that_see_some_of_the_tokens_are_refused_as_those_of_images_and_texts_apart(
    bank: CoreBank,
) -> None:
    model = bank.wrap(mixtral())
    experts = experts_of(model)[0]
    experts.register_forward_pre_hook(lambda module, args: tuple(value[:24] for value in args))
    with pytest.raises(ConfigError, match=r"they see 24 tokens of a batch of shape \(4, 7\)"):
        logits(model, MASKED, task_ids=NAMES)


def test_a_copy_answers_alike_and_an_unloaded_model_is_as_it_was(bank: CoreBank) -> None:
    base = mixtral()
    before = contents(base)
    model = bank.wrap(base)
    answers = logits(model, MASKED, task_ids=NAMES)
    copied = copy.deepcopy(model)
    plain = model.unload()
    assert_same_contents(before, plain)
    assert torch.equal(logits(plain, MASKED), logits(mixtral(), MASKED))
    for again in (copied, bank.wrap(plain)):
        assert torch.equal(logits(again, MASKED, task_ids=NAMES), answers)


def test_an_adapter_beside_the_bank_keeps_cores_of_its_own(bank: CoreBank) -> None:
    model = bank.wrap(mixtral())
    config = LotrConfig(r=3, target_parameters=EXPERTS, init_weights=False, seed=5)
    model.add_adapter("other", config)
    other = logits(get_peft_model(mixtral(), config, adapter_name="other").eval(), MASKED)
    model.base_model.set_adapter(["bank", "other"])
    mixed = logits(model, MASKED, task_ids=NAMES)
    torch.testing.assert_close(mixed[2], other[2], atol=1e-5, rtol=1e-5)
    assert (mixed - logits(model, MASKED, task_ids=[None] * 4))[[0, 1, 3]].abs().amax((1, 2)).min() > 1e-2


def test_where_it_cannot_be_told_whose_a_token_is_nothing_is_answered(bank: CoreBank, monkeypatch) -> None:
    model = bank.wrap(mixtral())
    for shape, names in (((4, 6), NAMES[:3]), ((1, 8), ["t0", "t1"]), ((2, 8), NAMES)):
        with model.tasks.select(names), pytest.raises(ConfigError, match=rf"the batch has {shape[0]}\."):
            logits(model, {"input_ids": tokens(*shape)})
    experts = experts_of(model)
    x = torch.randn(4, 2, 16)
    with model.tasks.select(["t0", "t1"]):
        for args in ((x, torch.zeros(4, 2).long(), torch.ones(4, 2)), (x[:, 0],)):
            with pytest.raises(ConfigError, match=r"of MixtralExperts.* or not called with tokens"):
                experts[0](*args)
    others: list[dict[str, Any]] = [{"num_experts": 3}, {"__class__": type("Own", (MixtralExperts,), {})}]
    for change in others:  # another contract, and a class of which nothing is known
        with monkeypatch.context() as patch:
            for name, value in change.items():
                patch.setattr(experts[1].base_layer, name, value)
            with pytest.raises(ConfigError, match="cannot have tasks of their own on the experts"):
                logits(model, MASKED, task_ids=NAMES)
    logits(model, MASKED, task_ids=NAMES)
