"""Mixed batches: each row uses its own task, and is what it would be alone."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import banks
from banks import Tiny, alone
from conftest import ARCHITECTURES, Architecture, bert, llama, tokens
from lotr import CoreBank, LotrConfig
from lotr.bank.wrap import BankModel
from lotr.errors import ConfigError
from lotr.sharing.keys import without_adapter
from moe_models import EXPERTS, deepseek, gpt_oss, mixtral, qwen

INPUTS = ARCHITECTURES["bert"].inputs()
NAMES = ["a", "b", "c", "d"]
MASK = torch.ones(4, 7, dtype=torch.long)
MASK[0, :3] = MASK[2, :1] = 0  # rows of unequal length
MASKED = {"input_ids": tokens(), "attention_mask": MASK}
MODELS = ARCHITECTURES | {
    make.__name__: Architecture(make, lambda: MASKED, [], 0) for make in (mixtral, qwen, gpt_oss, deepseek)
}
#: Experts in one parameter share factors, or have factors of their own beside those of linear modules.
SHARED = {"target_modules": None, "target_parameters": EXPERTS, "scaling": 2.0}
APART = {"modes": (), "target_modules": "all-linear"}
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
ALIKE = {"blocks": "none", "r": 4, "modes": ("layer", "projection")}
#: MetaTT with a task in its train; what else is in the train belongs to the basis.
TRAIN = {"modes": ("projection", "task", "layer"), "zero": "core", "core_init": "uniform", "init": "gaussian"}
#: Model and configuration: every architecture, every core that has numbers, and projections that are fused.
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("bert", "llama", "gpt2", "t5", "vit")},
    "tucker": ("bert", {"method": "lotr_joint", "core": "tucker", "core_ranks": 2}),
    "cp": ("bert", {**ALIKE, "core": "cp", "target_modules": ["query", "value", "intermediate.dense"]}),
    "tt": ("bert", {**ALIKE, "core": "tt", "target_modules": ["query", "value", "intermediate.dense"]}),
    "slices": ("llama", ALIKE),  # values are narrower than queries
    "task of a train": ("bert", {"method": "metatt_4d", "r": 4, **TRAIN}),
    "heads": ("bert", {"blocks": "head", "modes": ("layer", "head"), "r": 4}),
    "square": ("bert", {"blocks": "square", "r": 4}),
    "biases": ("bert", {"lora_bias": True}),
    "cara": ("bert", {"method": "cara", "r": 4, "zero": "core", "target_modules": ["query", "dense"]}),
    "fused": ("gpt2", {**ALIKE, "target_modules": ["c_attn"]}),
    "fused heads": ("gpt2", {**ALIKE, "target_modules": ["c_attn"], "blocks": "head"}),
    **{name: (name, SHARED) for name in ("mixtral", "qwen", "gpt_oss", "deepseek")},
    "experts apart": ("deepseek", APART),
    "transposed experts apart": ("gpt_oss", APART),
}


def make_bank(folder: Path, model: str = "bert", **config: Any) -> CoreBank:
    """A bank on a small model, with tasks of random numbers."""
    fields = {"r": (3, 4), "target_modules": MODELS[model].targets, **config}
    return banks.on(folder, MODELS[model].make(), NAMES, **fields)


def logits(model: nn.Module, inputs: dict[str, Tensor] = INPUTS, **kwargs: Any) -> Tensor:
    output: Tensor = model(**inputs, **kwargs).logits
    return output


@pytest.fixture
def bank(tmp_path: Path) -> CoreBank:
    return make_bank(tmp_path)


@pytest.mark.parametrize("name", BASES)
def test_a_mixed_batch_equals_each_row_alone_with_its_task(name: str, tmp_path: Path) -> None:
    kind, config = BASES[name]
    bank, make, inputs = make_bank(tmp_path, kind, **config), MODELS[kind].make, MODELS[kind].inputs()
    truth = {task: logits(alone(bank, make(), task), inputs) for task in (*NAMES, None)}
    seen = MASK.bool() if inputs is MASKED else torch.ones(4, 1, dtype=torch.bool)
    for implementation in IMPLEMENTATIONS if inputs is MASKED else (None,):
        base = make()
        if implementation:
            base.set_experts_implementation(implementation)
        model = bank.wrap(base)
        for ids in (["a", "b", "c", "d"], ["d", None, "a", "d"], ["b"] * 4, [None, "c", None, "a"]):
            mixed = logits(model, inputs, task_ids=ids)
            for row, task in enumerate(ids):
                at = (row, seen[row]) if inputs is MASKED else row
                torch.testing.assert_close(mixed[at], truth[task][at], atol=1e-5, rtol=1e-5)
                assert task is None or (mixed[at] - truth[None][at]).abs().max() > 1e-4
            pairs = itertools.combinations(mixed, 2)
            assert all((a - b).abs().max() > 1e-4 for a, b in pairs), "tasks and texts must be seen to differ"


def test_a_half_precision_base_keeps_its_tasks_apart_too(bank: CoreBank) -> None:
    model = bank.wrap(bert().bfloat16())
    assert model.tasks.load(bank.get("a")).numbers.dtype == torch.float32
    mixed = logits(model, task_ids=["b", "a", None, "d"])
    for row, task in ((0, "b"), (1, "a"), (3, "d")):
        expected = logits(alone(bank, bert().bfloat16(), task))[row].float()
        assert torch.allclose(mixed[row], expected, atol=2e-3)


def test_tasks_are_named_in_three_ways_and_rows_without_one_are_the_base_model_bit_for_bit(
    bank: CoreBank,
) -> None:
    model, base = bank.wrap(bert()), logits(bert())
    for nothing in ({}, {"task_ids": [None] * 4}, {"task_ids": ["__base__"] * 4}):
        assert torch.equal(logits(model, **nothing), base)
    ids = ["c", None, "a", "c"]
    wanted = logits(model, task_ids=ids)
    assert torch.equal(logits(model, adapter_names=["c", "__base__", "a", "c"]), wanted)
    with model.select(ids):
        assert torch.equal(logits(model), wanted)
        with model.select(["b"] * 4):
            assert not torch.equal(logits(model), wanted)
        assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_row(side: str, tmp_path: Path) -> None:
    model = make_bank(tmp_path, "llama").wrap(llama())
    short, ids = tokens(rows=4, length=5), ["a", None, "c", "a"]
    padding = torch.zeros(4, 3, dtype=torch.long)
    both = torch.cat((padding, short) if side == "left" else (short, padding), 1)
    real = slice(3, None) if side == "left" else slice(0, 5)
    padded = logits(model, {"input_ids": both, "attention_mask": (both != 0).long()}, task_ids=ids)
    assert torch.allclose(padded[:, real], logits(model, {"input_ids": short}, task_ids=ids), atol=1e-5)


@pytest.mark.parametrize("name, beams", [("gpt2", 1), ("llama", 3), ("t5", 3), ("mixtral", 2)])
def test_generation_gives_each_row_the_text_of_its_task(name: str, beams: int, tmp_path: Path) -> None:
    bank, make = make_bank(tmp_path, name, **(SHARED if name == "mixtral" else {})), MODELS[name].make
    model, ids = bank.wrap(make()), ["d", None, "a", "d"]
    settings = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    with model.select(ids):
        texts = model.generate(**MASKED, **settings)
    for way in ({"task_ids": ids}, {"adapter_names": [name or "__base__" for name in ids]}):
        assert torch.equal(texts, model.generate(**MASKED, **settings, **way))
    for row, task in enumerate(ids):
        own = {key: value[row : row + 1] for key, value in MASKED.items()}
        wanted = alone(bank, make(), task).generate(**own, **settings)[0]
        assert torch.equal(texts[row, : len(wanted)], wanted)
    assert not torch.equal(texts, model.generate(**MASKED, **settings))


def test_a_merged_or_inactive_bank_refuses_to_choose_tasks(bank: CoreBank) -> None:
    model, ids = bank.wrap(bert()), ["a"] * 4
    model.merge_adapter()
    with pytest.raises(ConfigError, match="merged"):
        logits(model, task_ids=ids)
    model.unmerge_adapter()
    model.add_adapter("other", LotrConfig(r=2, target_modules=["query"]))
    model.set_adapter("other")
    with pytest.raises(ConfigError, match="set_adapter"):
        logits(model, task_ids=ids)
    model.set_adapter("bank")
    assert not torch.equal(logits(model, task_ids=ids), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(bert()))


def test_a_bank_goes_onto_a_bare_model(bank: CoreBank) -> None:
    model = bank.wrap(bert())
    before = [name for name, _ in model.named_parameters()]
    for dressed in (model, model.base_model.model):
        with pytest.raises(ConfigError, match="bare base model"):
            bank.wrap(dressed)
    assert [name for name, _ in model.named_parameters()] == before


# ---------------------------------------------------------------------- no row influences another


def in_training(bank: CoreBank, base: nn.Module) -> BankModel:
    """A model on which the numbers of all tasks train."""
    model = bank.wrap(base)
    for name in NAMES:
        model.tasks.cache.training[name] = model.tasks.load(bank.get(name))
        model.tasks.cache.training[name].numbers.requires_grad_()
    return model


@pytest.fixture
def trained(bank: CoreBank) -> BankModel:
    return in_training(bank, bert())


def gradient(model: BankModel, name: str) -> Tensor | None:
    return model.tasks.cache.training[name].numbers.grad


def loss(output: Tensor, rows: Any = slice(None)) -> Tensor:
    """Of labels, or of the tokens of a batch of experts that are seen."""
    return (30 * (output if output.ndim == 2 else output[MASK[rows].bool()])).square().sum()


@pytest.mark.parametrize(
    "name, checkpoints", [("bert", False), ("mixtral", False), ("mixtral", True), ("gpt_oss", True)]
)
def test_each_rows_gradient_is_that_of_its_task_alone(name: str, checkpoints: bool, tmp_path: Path) -> None:
    bank = make_bank(tmp_path, name, **({} if name == "bert" else SHARED))
    model, inputs = in_training(bank, MODELS[name].make()), MODELS[name].inputs()
    if checkpoints:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    ids = ["c", "a", None, "c"]
    loss(logits(model, inputs, task_ids=ids)).backward()
    for task in ("a", "c"):
        bank.export(task, tmp_path / task)
        single = PeftModel.from_pretrained(MODELS[name].make(), tmp_path / task, is_trainable=True).eval()
        rows = [row for row, own in enumerate(ids) if own == task]
        loss(logits(single, {key: value[rows] for key, value in inputs.items()}), rows).backward()
        named = {without_adapter(n, "default"): p.grad for n, p in single.named_parameters()}
        expected = bank.layout.flatten({n: grad for n, grad in named.items() if grad is not None})
        largest = float(expected.abs().max())
        torch.testing.assert_close(gradient(model, task), expected, atol=1e-5 * largest, rtol=1e-4)
        assert largest > 1e-4


def test_the_loss_of_one_task_has_no_gradient_in_another(trained: BankModel) -> None:
    logits(trained, task_ids=["a", "b", "b", None])[0].square().sum().backward()
    assert gradient(trained, "a").any() and not gradient(trained, "b").any()
    assert gradient(trained, "c") is None  # which had no row


@pytest.mark.parametrize("experts", [None, *IMPLEMENTATIONS])
def test_nan_in_one_task_leaves_the_other_rows_as_they_are(experts: str | None, tmp_path: Path) -> None:
    name, config, close = ("qwen", SHARED, 1e-6) if experts else ("bert", {}, 0)
    base, inputs = MODELS[name].make(), MODELS[name].inputs()
    if experts:
        base.set_experts_implementation(experts)
    model = in_training(make_bank(tmp_path, name, **config), base)
    ids, others = ["a", "d", "b", None], [0, 2, 3]
    good = logits(model, inputs, task_ids=ids)
    with torch.no_grad():
        model.tasks.cache.training["d"].numbers.fill_(torch.nan)
    bad = logits(model, inputs, task_ids=ids)
    assert torch.isnan(bad[1]).all()
    torch.testing.assert_close(bad[others], good[others], atol=close, rtol=close)
    bad[others].square().sum().backward()
    assert all(torch.isfinite(gradient(model, task)).all() for task in ("a", "b"))


# ---------------------------------------------------------------------- memory


def test_the_least_recently_used_task_makes_place(bank: CoreBank, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bank.wrap(bert(), capacity=3)
    inputs, read, load = {"input_ids": tokens(rows=2)}, [], model.tasks.load
    monkeypatch.setattr(model.tasks, "load", lambda task: read.append(task.name) or load(task))
    first = logits(model, inputs, task_ids=["a", "b"])
    for ids, new in ((["c", "a"], ["c"]), (["d", "c"], ["d"]), (["a", "c"], []), (["a", "b"], ["b"])):
        read.clear()
        last = logits(model, inputs, task_ids=ids)
        assert read == new
    assert torch.equal(last, first)


def test_capacity_bounds_the_tasks_or_their_bytes_in_memory(tmp_path: Path) -> None:
    bank, make = make_bank(tmp_path, "llama"), llama
    width = 4 * bank.layout.size
    for capacity, two in ((2, 2), (f"{2 * width + 1}B", 2 * width)):
        model = bank.wrap(make(), capacity=capacity)
        for ids in (["a", "b", "a", "b"], ["c", "d", "c", "d"]):
            logits(model, task_ids=ids)
            assert model.tasks.cache.used == two
        with pytest.raises(ConfigError, match=f"3 tasks does not fit: capacity={capacity!r}"):
            logits(model, task_ids=["a", "b", "c", None])
    for refused, says in (("1B", "holds no task"), (0, "holds no task"), ("much", "not understood")):
        with pytest.raises(ConfigError, match=says):
            bank.wrap(make(), capacity=refused)


# ---------------------------------------------------------------------- a choice belongs to its call


def in_threads(runs: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(len(runs)) as pool:
        return [future.result() for future in [pool.submit(run) for run in runs]]


def test_texts_that_threads_generate_at_once_are_those_that_each_gets_alone(tmp_path: Path) -> None:
    model = make_bank(tmp_path, "mixtral", **SHARED).wrap(mixtral(), capacity=3)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    choices = [["a", "b", "a", None], ["c", "d", "d", "c"], [None] * 4]
    start = threading.Barrier(len(choices))

    def answer(ids: list[str | None]) -> Tensor:
        return model.generate(**MASKED, **options, task_ids=ids)

    def rounds(ids: list[str | None], expected: Tensor) -> bool:
        start.wait(60)
        return all(torch.equal(answer(ids), expected) for _ in range(15))

    expected = [answer(ids) for ids in choices]
    assert not torch.equal(expected[0], expected[1])
    assert all(in_threads([lambda n=n: rounds(choices[n], expected[n]) for n in range(3)]))


def test_a_choice_of_one_thread_or_model_is_none_of_another(bank: CoreBank) -> None:
    model, other = bank.wrap(bert()), bank.wrap(bert())
    copied, base = copy.deepcopy(model), logits(model)
    with model.select(NAMES):
        assert not torch.equal(logits(model), base)
        assert torch.equal(in_threads([lambda: logits(model)])[0], base)
        assert torch.equal(logits(other), base) and torch.equal(logits(copied), base)
    assert torch.equal(logits(copied, task_ids=NAMES), logits(model, task_ids=NAMES))


def test_a_checkpoint_that_forgets_the_tasks_of_its_call_is_refused(trained: BankModel) -> None:
    with trained.select(["a"] * 4):
        loss = checkpoint(lambda: logits(trained), use_reentrant=False).square().sum()
    with pytest.raises(ConfigError, match="tasks of its call are not known"):
        loss.backward()


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model_has_the_tasks_of_each_call(whole: bool, tmp_path: Path) -> None:
    model = banks.on(tmp_path, Tiny(), NAMES, target_modules=["query", "value"]).wrap(Tiny())
    torch.compiler.reset()
    graphs: list[object] = []
    part = model if whole else model.get_base_model()
    compiled = torch.compile(part, backend=lambda graph, _: graphs.append(graph) or graph)
    for ids in (["a", "b", None, "d"], ["c", "c", "a", "b"], ["d", "a", "b", "c"]):
        with torch.no_grad(), nullcontext() if whole else model.select(ids):
            answer = logits(compiled, **({"task_ids": ids} if whole else {}))
            assert torch.allclose(answer, logits(model, task_ids=ids), atol=1e-6)
    assert len(graphs) == 1 if whole else graphs  # other tasks compile nothing anew
