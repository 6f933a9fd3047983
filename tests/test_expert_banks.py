"""Banks on experts that one parameter holds: the tokens of every row meet the cores of its own task."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from banks import assert_same_contents, contents
from conftest import tokens
from lotr import ConfigError, CoreBank, LotrConfig, Task
from lotr.sharing.keys import without_adapter
from lotr.tuner.experts import LotrExperts
from moe_models import EXPERTS, deepseek, gpt_oss, mixtral, qwen

MODELS = [mixtral, qwen, gpt_oss, deepseek]
MASK = torch.ones(4, 7, dtype=torch.long)
MASK[0, :3] = MASK[2, :1] = 0  # rows of unequal length
INPUTS = {"input_ids": tokens(4, 7), "attention_mask": MASK}


def bank(folder: Path, make: Callable[[], nn.Module], tasks: int = 3, **fields: Any) -> CoreBank:
    config = LotrConfig(**{"r": 3, "scaling": 2.0, "target_parameters": EXPERTS, **fields})
    get_peft_model(make(), config).save_pretrained(folder / "basis")
    made = CoreBank.create(folder / "bank", folder / "basis", dtype="float32")
    for n in range(tasks):
        numbers = torch.randn(made.layout.size, generator=torch.Generator().manual_seed(n))
        made.add(Task(f"t{n}", numbers))
        made.export(f"t{n}", folder / f"t{n}", as_lora=True)
    return made


def alone(folder: Path, make: Callable[[], nn.Module], task: str | None) -> nn.Module:
    """Return a plain model whose weights PEFT has merged a task's LoRA into."""
    return (
        make() if task is None else PeftModel.from_pretrained(make(), folder / task).merge_and_unload().eval()
    )


def logits(model: nn.Module, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**inputs, **more).logits
    return output


@pytest.mark.parametrize("fields", [{}, {"modes": (), "target_modules": "all-linear", "target_parameters": None}],
                         ids=["shared factors", "factors of each expert"])  # fmt: skip
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_every_row_of_a_mixed_batch_is_the_task_alone_merged_by_peft(make, fields, tmp_path: Path) -> None:
    names = ["t1", None, "t0", "t1"]
    with bank(tmp_path, make, **fields) as made:
        for implementation in ("eager", "grouped_mm", "batched_mm"):
            base = make()
            base.set_experts_implementation(implementation)
            mixed = logits(made.wrap(base), INPUTS, task_ids=names)
            for n, name in enumerate(names):
                row = {key: value[n : n + 1] for key, value in INPUTS.items()}
                own, seen = logits(alone(tmp_path, make, name), row), MASK[n].bool()
                torch.testing.assert_close(mixed[n, seen], own[0, seen], atol=1e-5, rtol=1e-5)
                moved = (own - logits(make(), row))[0, seen].abs().max()
                assert (moved > 1e-2) == (name is not None)


def test_numbers_of_experts_stay_exact_where_float32_would_not_count_them(tmp_path: Path) -> None:
    """64 experts for 64 rows: transformers counts tokens by a histogram in float32."""

    def make() -> nn.Module:
        return qwen(num_experts=64, num_hidden_layers=1)

    names = [None if n % 4 == 3 else f"t{n % 4}" for n in range(64)]
    inputs = {"input_ids": tokens(64, 3)}
    with bank(tmp_path, make) as made:
        results = []
        for implementation in ("eager", "grouped_mm"):
            base = make()
            base.set_experts_implementation(implementation)
            results.append(logits(made.wrap(base), inputs, task_ids=names))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    expected = logits(alone(tmp_path, make, "t2"), inputs)[2::4]
    torch.testing.assert_close(results[1][2::4], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 2])
def test_generated_text_is_that_of_each_task_alone(beams: int, tmp_path: Path) -> None:
    names = ["t1", None, "t0", "t2"]
    how = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    with bank(tmp_path, mixtral) as made:
        mixed = made.wrap(mixtral()).generate(**INPUTS, task_ids=names, **how)
    for n, name in enumerate(names):
        row = {key: value[n : n + 1] for key, value in INPUTS.items()}
        own = alone(tmp_path, mixtral, name).generate(**row, **how)
        assert torch.equal(mixed[n, : own.shape[1]], own[0])


def test_threads_do_not_see_each_other_s_tasks(tmp_path: Path) -> None:
    names = [None, "t0", "t1", "t2"]
    with bank(tmp_path, qwen) as made:
        model = made.wrap(qwen())
        expected = {name: logits(model, INPUTS, task_ids=[name] * 4) for name in names}
        with ThreadPoolExecutor(4) as pool:
            results = pool.map(lambda name: (name, logits(model, INPUTS, task_ids=[name] * 4)), names * 10)
            for name, result in results:
                torch.testing.assert_close(result, expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make", [mixtral, gpt_oss], ids=lambda make: make.__name__)
def test_gradients_of_a_task_in_a_mixed_batch_are_those_of_its_adapter_alone(
    make, checkpointing, tmp_path: Path
) -> None:
    with bank(tmp_path, make) as made:
        model = made.wrap(make()).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        tasks = [model.tasks.load(made.get(f"t{n}")) for n in range(3)]
        for task in tasks:
            task.numbers.requires_grad_()
        with model.tasks.use([tasks[n] for n in (0, 1, 0, 2)]):
            model(**INPUTS).logits[MASK.bool()].square().sum().backward()
        made.export("t0", tmp_path / "own")
        own = PeftModel.from_pretrained(make(), tmp_path / "own", is_trainable=True).train()
        rows = {key: value[::2] for key, value in INPUTS.items()}
        own(**rows).logits[MASK[::2].bool()].square().sum().backward()
        grads = {
            without_adapter(name, "default"): p.grad
            for name, p in own.named_parameters()
            if p.grad is not None
        }
        expected = made.layout.flatten(grads)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(tasks[0].numbers.grad, expected, atol=1e-5, rtol=1e-4)


def test_numbers_that_are_not_finite_reach_no_other_row(tmp_path: Path) -> None:
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        with bank(tmp_path / implementation, qwen) as made:
            base = qwen()
            base.set_experts_implementation(implementation)
            model = made.wrap(base)
            nan = model.tasks.load(made.get("t0"))
            nan.numbers.fill_(float("nan"))
            [fine] = model.tasks.find(["t1"])
            with model.tasks.use([fine, nan, None, nan]):
                mixed = logits(model, INPUTS)
            expected = logits(model, INPUTS, task_ids=["t1", None, None, None])
            torch.testing.assert_close(mixed[::2], expected[::2], atol=1e-6, rtol=1e-6)
            assert mixed[1].isnan().all()


def test_experts_that_see_some_of_the_tokens_are_refused_as_those_of_images_and_texts_apart(
    tmp_path: Path,
) -> None:
    with bank(tmp_path, mixtral) as made:
        model = made.wrap(mixtral())
        experts = next(module for module in model.modules() if isinstance(module, LotrExperts))
        experts.register_forward_pre_hook(lambda module, args: tuple(value[:24] for value in args))
        with pytest.raises(ConfigError, match=r"they see 24 tokens of a batch of shape \(4, 7\)"):
            logits(model, INPUTS, task_ids=["t0", "t1", None, "t0"])


def test_a_copy_answers_alike_and_an_unloaded_model_is_as_it_was(tmp_path: Path) -> None:
    names = ["t0", "t1", None, "t0"]
    with bank(tmp_path, mixtral) as made:
        base = mixtral()
        before = contents(base)
        model = made.wrap(base)
        answers = logits(model, INPUTS, task_ids=names)
        copied = copy.deepcopy(model)
        plain = model.unload()
        assert_same_contents(before, plain)
        assert torch.equal(logits(plain, INPUTS), logits(mixtral(), INPUTS))
        for again in (copied, made.wrap(plain)):
            assert torch.equal(logits(again, INPUTS, task_ids=names), answers)


def test_an_adapter_beside_the_bank_keeps_cores_of_its_own(tmp_path: Path) -> None:
    names = ["t0", "t1", None, "t0"]
    with bank(tmp_path, mixtral) as made:
        model = made.wrap(mixtral())
        config = LotrConfig(r=3, target_parameters=EXPERTS, init_weights=False, seed=5)
        model.add_adapter("other", config)
        other = logits(get_peft_model(mixtral(), config, adapter_name="other").eval(), INPUTS)
        model.base_model.set_adapter(["bank", "other"])
        mixed = logits(model, INPUTS, task_ids=names)
        torch.testing.assert_close(mixed[2], other[2], atol=1e-5, rtol=1e-5)
        assert (mixed - logits(model, INPUTS, task_ids=[None] * 4))[[0, 1, 3]].abs().amax((1, 2)).min() > 1e-2


def test_where_it_cannot_be_told_whose_a_token_is_nothing_is_answered(tmp_path: Path, monkeypatch) -> None:
    with bank(tmp_path, mixtral) as made:
        model = made.wrap(mixtral())
        for shape, names in (
            ((4, 6), ["t0", "t1", None]),
            ((1, 8), ["t0", "t1"]),
            ((2, 8), ["t0", None] * 2),
        ):
            with model.tasks.select(names), pytest.raises(ConfigError, match=rf"the batch has {shape[0]}\."):
                logits(model, {"input_ids": tokens(*shape)})
        experts = [module for module in model.modules() if isinstance(module, LotrExperts)]
        x = torch.randn(4, 2, 16)
        with model.tasks.select(["t0", "t1"]):
            for args in ((x, torch.zeros(4, 2).long(), torch.ones(4, 2)), (x[:, 0],)):
                with pytest.raises(
                    ConfigError, match=r"the experts of MixtralExperts.* or not called with tokens"
                ):
                    experts[0](*args)
        others: list[dict[str, Any]] = [{"num_experts": 3}, {"__class__": type("Own", (MixtralExperts,), {})}]
        for change in others:  # another contract, and a class of which nothing is known
            with monkeypatch.context() as patch:
                for name, value in change.items():
                    patch.setattr(experts[1].base_layer, name, value)
                with pytest.raises(ConfigError, match="cannot have tasks of their own on the experts"):
                    logits(model, INPUTS, task_ids=["t0", None, "t1", "t0"])
        logits(model, INPUTS, task_ids=["t0", None, "t1", "t0"])
