"""Mixed batches: each row uses its own task, and is what it would be alone."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conftest import ARCHITECTURES, tokens
from lotr import CoreBank, LotrConfig, Task
from lotr.bank.task import check_name
from lotr.bank.wrap import BankModel
from lotr.errors import ConfigError, UnknownTaskError

CORES = {
    "free": {},
    "tucker": {"method": "lotr_joint", "core": "tucker", "core_ranks": 2},
    "cp": {"core": "cp", "modes": ("layer", "projection"), "r": 4},
    "tt": {"core": "tt", "modes": ("layer", "projection"), "r": 4},
    "heads": {"blocks": "head", "modes": ("layer", "head"), "r": 4},
    "square": {"blocks": "square", "r": 4},
}
NAMES = ["a", "b", "c", "d"]


def numbers_of(bank: CoreBank, seed: int) -> Tensor:
    return 2 * torch.randn(bank.layout.size, generator=torch.Generator().manual_seed(seed))


def make_bank(
    folder: Path, model: str, names: list[str] = NAMES, head: bool = False, **config: Any
) -> CoreBank:
    """A bank in float32 whose basis belongs to a pico model, with tasks of random numbers."""
    architecture = ARCHITECTURES[model]
    targets = config.pop("target_modules", architecture.targets)
    settings = {"r": (3, 4), "target_modules": targets, **config}
    adapted = get_peft_model(architecture.make(), LotrConfig(**settings))
    adapted.save_pretrained(folder / "basis")
    bank = CoreBank.create(folder / "bank", basis=folder / "basis", dtype="float32")
    bank.add_many(Task(name, numbers_of(bank, n)) for n, name in enumerate(names))
    return bank


def alone(bank: CoreBank, base: nn.Module, name: str) -> PeftModel:
    """The base model with one task as an ordinary adapter."""
    model = get_peft_model(base, bank.config)
    tensors = bank.layout.unflatten(bank.get(name).numbers)
    for path, parameter in model.named_parameters():
        key = path.replace(".default", "")
        if key in tensors:
            parameter.data = tensors.pop(key).clone()
    assert not tensors
    return model.eval()


def logits(model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    output: Tensor = model(**inputs, **kwargs).logits
    return output


@pytest.fixture(params=list(CORES))
def core(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(CORES[request.param])


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "vit"])
def test_a_mixed_batch_equals_each_row_alone_with_its_task(name: str, tmp_path: Path) -> None:
    bank = make_bank(tmp_path, name)
    architecture = ARCHITECTURES[name]
    inputs = architecture.inputs()
    model = bank.wrap(architecture.make())
    truth = {task: logits(alone(bank, architecture.make(), task), inputs) for task in NAMES}
    truth |= {None: logits(architecture.make(), inputs)}
    for ids in (["a", "b", "c", "d"], ["d", None, "a", "d"], ["b"] * 4, [None, "c", None, "a"]):
        mixed = logits(model, inputs, task_ids=ids)
        for row, task in enumerate(ids):
            assert torch.allclose(mixed[row], truth[task][row], atol=1e-5)
        assert all(
            (mixed[a] - mixed[b]).abs().max() > 1e-4 for a, b in itertools.combinations(range(4), 2)
        ), "tasks and texts that differ must be seen to differ"


def test_every_core_with_numbers_has_rows_of_its_own(core: dict[str, Any], tmp_path: Path) -> None:
    targets = ["query", "value", "intermediate.dense"] if "blocks" not in core else ["query", "value"]
    bank = make_bank(tmp_path, "bert", target_modules=targets, **core)
    inputs = ARCHITECTURES["bert"].inputs()
    mixed = logits(bank.wrap(ARCHITECTURES["bert"].make()), inputs, task_ids=["b", None, "a", "b"])
    base = logits(ARCHITECTURES["bert"].make(), inputs)
    assert torch.allclose(mixed[1], base[1], atol=1e-6)
    for row, task in ((0, "b"), (2, "a"), (3, "b")):
        assert torch.allclose(
            mixed[row], logits(alone(bank, ARCHITECTURES["bert"].make(), task), inputs)[row], atol=1e-5
        )
        assert (mixed[row] - base[row]).abs().max() > 1e-4


@pytest.mark.parametrize("blocks", ["none", "head"])
def test_fused_projections_have_rows_of_their_own(blocks: str, tmp_path: Path) -> None:
    bank = make_bank(
        tmp_path, "gpt2", target_modules=["c_attn"], blocks=blocks, r=4, modes=("layer", "projection")
    )
    inputs = ARCHITECTURES["gpt2"].inputs()
    mixed = logits(bank.wrap(ARCHITECTURES["gpt2"].make()), inputs, task_ids=["b", "d", "a", None])
    for row, task in enumerate(("b", "d", "a")):
        expected = logits(alone(bank, ARCHITECTURES["gpt2"].make(), task), inputs)[row]
        assert torch.allclose(mixed[row], expected, atol=1e-5)


def test_without_a_selection_and_with_none_the_model_is_the_base_model_bit_for_bit(tmp_path: Path) -> None:
    bank, inputs = make_bank(tmp_path, "bert"), ARCHITECTURES["bert"].inputs()
    model, base = bank.wrap(ARCHITECTURES["bert"].make()), ARCHITECTURES["bert"].make()
    assert torch.equal(logits(model, inputs), logits(base, inputs))
    assert torch.equal(logits(model, inputs, task_ids=[None] * 4), logits(base, inputs))
    assert torch.equal(logits(model, inputs, task_ids=["__base__"] * 4), logits(base, inputs))


def test_pefts_adapter_names_and_select_choose_tasks_too(tmp_path: Path) -> None:
    bank, inputs = make_bank(tmp_path, "bert"), ARCHITECTURES["bert"].inputs()
    model = bank.wrap(ARCHITECTURES["bert"].make())
    ids = ["c", None, "a", "c"]
    wanted = logits(model, inputs, task_ids=ids)
    assert torch.equal(logits(model, inputs, adapter_names=["c", "__base__", "a", "c"]), wanted)
    with model.select(ids):
        assert torch.equal(logits(model, inputs), wanted)
        with model.select(["b"] * 4):
            assert not torch.equal(logits(model, inputs), wanted)
        assert torch.equal(logits(model, inputs), wanted)
    assert torch.equal(logits(model, inputs), logits(ARCHITECTURES["bert"].make(), inputs))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_row(side: str, tmp_path: Path) -> None:
    bank = make_bank(tmp_path, "llama")
    model = bank.wrap(ARCHITECTURES["llama"].make())
    short, ids = tokens(rows=4, length=5), ["a", None, "c", "a"]
    padding = torch.zeros(4, 3, dtype=torch.long)
    parts = (padding, short) if side == "left" else (short, padding)
    padded = {"input_ids": torch.cat(parts, 1), "attention_mask": (torch.cat(parts, 1) != 0).long()}
    real = slice(3, None) if side == "left" else slice(0, 5)
    with_padding = logits(model, padded, task_ids=ids)[:, real]
    assert torch.allclose(with_padding, logits(model, {"input_ids": short}, task_ids=ids), atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generation_gives_each_row_the_text_of_its_task(name: str, beams: int, tmp_path: Path) -> None:
    bank, make = make_bank(tmp_path, name), ARCHITECTURES[name].make
    model, ids = bank.wrap(make()), ["d", None, "a", "d"]
    settings = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(4, 7, dtype=torch.long)}
    with model.select(ids):
        selected = model.generate(**inputs, **settings)
    named = model.generate(**inputs, **settings, adapter_names=[name or "__base__" for name in ids])
    assert torch.equal(selected, named)
    assert torch.equal(selected, model.generate(**inputs, **settings, task_ids=ids))
    expected = [
        (make() if task is None else alone(bank, make(), task)).generate(
            **{key: value[row : row + 1] for key, value in inputs.items()}, **settings
        )[0]
        for row, task in enumerate(ids)
    ]
    for row, wanted in enumerate(expected):
        assert torch.equal(selected[row, : len(wanted)], wanted)
    assert not torch.equal(expected[0], make().generate(**inputs, **settings)[0, : len(expected[0])])


def test_a_half_precision_base_keeps_its_tasks_apart_too(tmp_path: Path) -> None:
    bank, inputs = make_bank(tmp_path, "bert"), ARCHITECTURES["bert"].inputs()
    model = bank.wrap(ARCHITECTURES["bert"].make().bfloat16())
    assert model.tasks.load(bank.get("a")).numbers.dtype == torch.float32
    mixed = logits(model, inputs, task_ids=["b", "a", None, "d"])
    for row, task in ((0, "b"), (1, "a"), (3, "d")):
        single = alone(bank, ARCHITECTURES["bert"].make().bfloat16(), task)
        assert torch.allclose(mixed[row], logits(single, inputs)[row].float(), atol=2e-3)


def test_a_merged_or_inactive_bank_refuses_to_choose_tasks(tmp_path: Path) -> None:
    bank, inputs = make_bank(tmp_path, "bert"), ARCHITECTURES["bert"].inputs()
    model = bank.wrap(ARCHITECTURES["bert"].make())
    model.merge_adapter()
    with pytest.raises(ConfigError, match="merged"):
        logits(model, inputs, task_ids=["a"] * 4)
    model.unmerge_adapter()
    model.add_adapter("other", LotrConfig(r=2, target_modules=["query"]))
    model.set_adapter("other")
    with pytest.raises(ConfigError, match="set_adapter"):
        logits(model, inputs, task_ids=["a"] * 4)
    model.set_adapter("bank")
    assert not torch.equal(logits(model, inputs, task_ids=["a"] * 4), logits(model, inputs))
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), logits(ARCHITECTURES["bert"].make(), inputs))


# ---------------------------------------------------------------------- no row influences another


@pytest.fixture
def trained(tmp_path: Path) -> tuple[CoreBank, BankModel]:
    """A model on which the numbers of all tasks train."""
    bank = make_bank(tmp_path, "bert")
    model = bank.wrap(ARCHITECTURES["bert"].make())
    for name in NAMES:
        model.tasks.cache.training[name] = model.tasks.load(bank.get(name))
        model.tasks.cache.training[name].numbers.requires_grad_()
    return bank, model


def gradient(model: BankModel, name: str) -> Tensor | None:
    return model.tasks.cache.training[name].numbers.grad


def test_each_rows_gradient_is_that_of_its_task_alone(trained: tuple[CoreBank, BankModel]) -> None:
    bank, model = trained
    inputs, ids = ARCHITECTURES["bert"].inputs(), ["c", "a", None, "c"]
    logits(model, inputs, task_ids=ids).mul(30).square().sum().backward()
    for task in ("a", "c"):
        rows = torch.tensor([row for row, name in enumerate(ids) if name == task])
        single = alone(bank, ARCHITECTURES["bert"].make(), task)
        logits(single, {key: value[rows] for key, value in inputs.items()}).mul(30).square().sum().backward()
        grads = {
            n.replace(".default", ""): p.grad for n, p in single.named_parameters() if p.grad is not None
        }
        expected = bank.layout.flatten(grads)
        assert torch.allclose(gradient(model, task), expected, atol=1e-5 * float(expected.abs().max()))
        assert expected.abs().max() > 1e-4


def test_the_loss_of_one_task_has_no_gradient_in_another(trained: tuple[CoreBank, BankModel]) -> None:
    _, model = trained
    out = logits(model, ARCHITECTURES["bert"].inputs(), task_ids=["a", "b", "b", None])
    out[0].square().sum().backward()
    assert gradient(model, "a").any() and not gradient(model, "b").any()
    assert gradient(model, "c") is None  # which had no row


def test_nan_in_one_task_leaves_the_other_rows_as_they_are(trained: tuple[CoreBank, BankModel]) -> None:
    _, model = trained
    inputs = ARCHITECTURES["bert"].inputs()
    good = logits(model, inputs, task_ids=["a", "d", "b", None])
    with torch.no_grad():
        model.tasks.cache.training["d"].numbers.fill_(torch.nan)
    bad = logits(model, inputs, task_ids=["a", "d", "b", None])
    assert torch.isnan(bad[1]).all()
    for row in (0, 2, 3):
        assert torch.equal(bad[row], good[row])
    bad[[0, 2, 3]].square().sum().backward()
    assert all(torch.isfinite(gradient(model, task)).all() for task in ("a", "b"))


# ---------------------------------------------------------------------- memory


def test_the_least_recently_used_task_makes_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make_bank(tmp_path, "bert")
    model = bank.wrap(ARCHITECTURES["bert"].make(), capacity=3)
    inputs, read = {"input_ids": tokens(rows=2)}, []
    load = model.tasks.load
    monkeypatch.setattr(model.tasks, "load", lambda task: read.append(task.name) or load(task))
    first = logits(model, inputs, task_ids=["a", "b"])
    for ids, new in ((["c", "a"], ["c"]), (["d", "c"], ["d"]), (["a", "c"], []), (["a", "b"], ["b"])):
        read.clear()
        last = logits(model, inputs, task_ids=ids)
        assert read == new
    assert torch.equal(last, first)


def test_capacity_in_bytes_bounds_the_numbers_in_memory(tmp_path: Path) -> None:
    bank = make_bank(tmp_path, "llama")
    width = 4 * bank.layout.size
    model = bank.wrap(ARCHITECTURES["llama"].make(), capacity=f"{2 * width + 1}B")
    for ids in (["a", "b", "a", "b"], ["c", "d", "c", "d"]):
        logits(model, ARCHITECTURES["llama"].inputs(), task_ids=ids)
        assert model.tasks.cache.used == 2 * width
    with pytest.raises(ConfigError, match="3 tasks does not fit"):
        logits(model, ARCHITECTURES["llama"].inputs(), task_ids=["a", "b", "c", None])
    for capacity, says in (("1B", "holds no task"), (0, "holds no task"), ("much", "not understood")):
        with pytest.raises(ConfigError, match=says):
            bank.wrap(ARCHITECTURES["llama"].make(), capacity=capacity)


def test_a_batch_with_more_tasks_than_the_capacity_says_so(tmp_path: Path) -> None:
    model = make_bank(tmp_path, "bert").wrap(ARCHITECTURES["bert"].make(), capacity=2)
    with pytest.raises(ConfigError, match="3 tasks does not fit: capacity=2"):
        logits(model, ARCHITECTURES["bert"].inputs(), task_ids=["a", "b", "c", "a"])


def test_unknown_tasks_and_wrong_counts_change_nothing(tmp_path: Path) -> None:
    model, inputs = (
        make_bank(tmp_path, "bert").wrap(ARCHITECTURES["bert"].make()),
        ARCHITECTURES["bert"].inputs(),
    )
    with pytest.raises(UnknownTaskError, match="'e'"):
        logits(model, inputs, task_ids=["a", "e", "b", "c"])
    with pytest.raises(ConfigError, match="named for a batch of 4 rows"):
        logits(model, inputs, task_ids=["a", "b", "c"])
    assert torch.equal(logits(model, inputs), logits(ARCHITECTURES["bert"].make(), inputs))


# ---------------------------------------------------------------------- a choice belongs to its call


def in_another_thread(run: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


@pytest.mark.parametrize("way", ["named", "selected", "generated"])
def test_threads_that_choose_at_once_get_what_each_gets_alone(way: str, tmp_path: Path) -> None:
    name = "gpt2" if way == "generated" else "bert"
    bank, inputs = make_bank(tmp_path, name), ARCHITECTURES[name].inputs()
    model = bank.wrap(
        ARCHITECTURES[name].make(), capacity=3
    )  # so that tasks push each other out of memory, too

    def answer(ids: list[str | None]) -> Tensor:
        if way == "named":
            return logits(model, inputs, task_ids=ids)
        if way == "generated":
            options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
            return model.generate(**inputs, **options, task_ids=ids)
        with model.select(ids):
            return logits(model, inputs)

    choices = [["a", "b", "a", None], ["c", "d", "d", "c"], [None] * 4]
    expected = [answer(ids) for ids in choices]
    assert not torch.equal(expected[0], expected[1])
    start = threading.Barrier(len(choices))

    def rounds(n: int) -> bool:
        start.wait()
        return all(torch.equal(answer(choices[n]), expected[n]) for _ in range(25))

    with torch.no_grad(), ThreadPoolExecutor(len(choices)) as pool:
        assert all(pool.map(rounds, range(len(choices))))


def test_a_choice_of_one_thread_or_model_is_none_of_another(tmp_path: Path) -> None:
    bank, inputs = make_bank(tmp_path, "bert"), ARCHITECTURES["bert"].inputs()
    model, other = (bank.wrap(ARCHITECTURES["bert"].make()) for _ in range(2))
    copied = copy.deepcopy(model)
    base = logits(model, inputs)
    with model.select(["a", "b", "c", "d"]):
        assert not torch.equal(logits(model, inputs), base)
        assert torch.equal(in_another_thread(lambda: logits(model, inputs)), base)
        assert torch.equal(logits(other, inputs), base) and torch.equal(logits(copied, inputs), base)
    assert torch.equal(logits(copied, inputs, task_ids=["a"] * 4), logits(model, inputs, task_ids=["a"] * 4))


def checkpointed(model: PeftModel, reentrant: bool) -> None:
    """Every layer runs again in the backward pass; nothing is dropped."""
    model.train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.get_base_model().enable_input_require_grads()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def test_a_layer_that_runs_again_in_the_backward_pass_has_the_tasks_of_its_call(
    trained: tuple[CoreBank, BankModel],
) -> None:
    _, model = trained
    inputs, ids, tasks = ARCHITECTURES["bert"].inputs(), ["a", "b", None, "a"], ("a", "b")
    logits(model, inputs, task_ids=ids).square().sum().backward()
    expected = {task: gradient(model, task) for task in tasks}
    checkpointed(model, reentrant=False)
    for _ in range(2):  # the second time the functions that checkpoint remember already
        for task in tasks:
            model.tasks.cache.training[task].numbers.grad = None
        loss = logits(model, inputs, task_ids=ids).square().sum()
        with model.select(["d", "c", "d", "c"]):  # what is chosen meanwhile is another call's
            in_another_thread(loss.backward)  # as on an accelerator, where torch has a thread a device
        for task in tasks:
            largest = float(expected[task].abs().max())
            assert torch.allclose(gradient(model, task), expected[task], atol=1e-5 * largest)


def test_a_checkpoint_that_forgets_the_tasks_of_its_call_is_refused(
    trained: tuple[CoreBank, BankModel],
) -> None:
    _, model = trained
    inputs = ARCHITECTURES["bert"].inputs()
    with model.select(["a"] * 4):
        loss = checkpoint(lambda: logits(model, inputs), use_reentrant=False).square().sum()
    with pytest.raises(ConfigError, match="tasks of its call are not known"):
        loss.backward()


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model_has_the_tasks_of_each_call(whole: bool, tmp_path: Path) -> None:
    bank, inputs = make_bank(tmp_path, "bert"), ARCHITECTURES["bert"].inputs()
    model = bank.wrap(ARCHITECTURES["bert"].make())
    torch.compiler.reset()
    graphs: list[object] = []
    part = model if whole else model.get_base_model()
    compiled = torch.compile(part, backend=lambda graph, _: graphs.append(graph) or graph)
    for ids in (["a", "b", None, "d"], ["c", "c", "a", "b"], ["d", "a", "b", "c"]):
        with torch.no_grad(), nullcontext() if whole else model.select(ids):
            named = {"task_ids": ids} if whole else {}
            expected = logits(model, inputs, task_ids=ids)
            assert torch.allclose(logits(compiled, inputs, **named), expected, atol=1e-6)
    assert len(graphs) == 1 if whole else graphs  # other tasks compile nothing anew


@pytest.mark.parametrize("names", [["a"], ["a", "b", "a", "b", "a"], [None], "abcd"])
def test_a_call_names_one_task_a_row(trained: tuple[CoreBank, BankModel], names: object) -> None:
    """Rows in a run are for beams inside `select`; a call that names too few is a mistake."""
    _, model = trained
    with pytest.raises(ConfigError, match=r"one (task|name) a row"):
        model(input_ids=torch.ones(4, 6, dtype=torch.long), task_ids=names)


def test_no_task_has_the_name_of_rows_without_one() -> None:
    with pytest.raises(ConfigError, match="without a task"):
        check_name("__base__")


def test_a_bank_goes_onto_a_bare_model(trained: tuple[CoreBank, BankModel]) -> None:
    bank, model = trained
    before = [name for name, _ in model.named_parameters()]
    for dressed in (model, model.base_model.model):
        with pytest.raises(ConfigError, match="bare base model"):
            bank.wrap(dressed)
    assert [name for name, _ in model.named_parameters()] == before
