"""What holds on a processor holds on a GPU, in bfloat16 too; `make test-gpu` where there is one."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

import bench_bank
import bench_memory
import bench_train_step
from conftest import llama, tokens
from lotr import CoreBank, LotrConfig, Task
from records import KEEP_MEMORY
from tuner_contract import outputs

NO_GPU = not torch.cuda.is_available()
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(NO_GPU, reason="needs a GPU")])
CASES = {
    "lotr": {},
    "tucker": {"method": "lotr_joint", "core": "tucker"},
    "metatt_4d": {"method": "metatt_4d"},
    "dora": {"method": "dora"},
    "cores": {"trainable": "cores", "init": "orthonormal"},
}
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CASES[request.param]


def adapted(fields: dict[str, Any], device: str, dtype: torch.dtype, **more: Any) -> PeftModel:
    config = LotrConfig(**({"r": 4, "target_modules": TARGETS, "seed": 0} | fields | more))
    return get_peft_model(llama().to(device, dtype), config).eval()


def step(model: PeftModel, device: str) -> dict[str, Tensor]:
    """One step of a model, compiled or not; its gradients on the processor."""
    batch = tokens().to(device)
    model(input_ids=batch, labels=batch).loss.backward()
    named = {name.removeprefix("_orig_mod."): p for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.grad.float().cpu() for name, p in named.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_0_is_the_base_bit_for_bit(case, dtype, device) -> None:
    inputs = {"input_ids": tokens().to(device)}
    base = llama().to(device, dtype)
    assert torch.equal(outputs(adapted(case, device, dtype), inputs), outputs(base, inputs))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str)
def test_gradients_are_those_of_float32_on_the_processor(case, dtype, tolerance, device) -> None:
    expected = step(adapted(case, "cpu", torch.float32, init_weights=False), "cpu")
    found = step(adapted(case, device, dtype, init_weights=False), device)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= tolerance * expected[name].norm(), name


@pytest.mark.parametrize("device", [GPU])  # the compiler for processors has tests of its own
def test_a_compiled_step_has_the_same_gradients(case, device) -> None:
    model = adapted(case, device, torch.float32, init_weights=False)
    expected = step(copy.deepcopy(model), device)
    torch.testing.assert_close(step(torch.compile(model), device), expected, atol=1e-4, rtol=1e-3)


def test_each_row_of_a_mixed_batch_is_as_alone(device, tmp_path: Path) -> None:
    adapted({}, device, torch.float32, init_weights=False).save_pretrained(tmp_path / "basis")
    bank = CoreBank.create(tmp_path / "bank", tmp_path / "basis", dtype="float32")
    for name in ("a", "b"):
        bank.add(Task(name, torch.randn(bank.layout.size) / 4))
    names = ["a", "b", None]
    model, rows = bank.wrap(llama().to(device)), tokens(3).to(device)
    mixed = model(input_ids=rows, task_ids=names).logits
    for n, name in enumerate(names):
        alone = model(input_ids=rows[n : n + 1], task_ids=[name]).logits
        torch.testing.assert_close(mixed[n], alone[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(mixed[0], model(input_ids=rows, task_ids=[None] * 3).logits[0])


def test_merged_weights_answer_the_same(case, device) -> None:
    inputs = {"input_ids": tokens().to(device)}
    model = adapted(case, device, torch.float32, init_weights=False)
    expected = outputs(model, inputs)
    torch.testing.assert_close(outputs(model.merge_and_unload(), inputs), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("script", [bench_train_step, bench_bank], ids=lambda module: module.__name__)
def test_what_a_gpu_is_measured_with_runs(
    script: ModuleType, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = ["--methods", "peft_lora", "peft_dora", "lotr", "lotr_cores", "lotr_per_output"]
    own = {
        bench_train_step: ["--shapes", "tiny", *methods],
        bench_bank: ["--shape", "tiny", "--large", "0", "--rows", "3", "--length", "4"],
    }
    words = ["--device", device, "--rounds", "1", "--threads", "1", "--rank", "2"]
    record = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", [script.__name__, *own[script], *words, "--json", str(record)])
    for name, value in {**KEEP_MEMORY, "CUDA_VISIBLE_DEVICES": "0"}.items():
        monkeypatch.setenv(name, value)  # else the program starts itself again; and put back what it sets
    script.main()
    assert json.loads(record.read_text())["machine"]


def test_the_memory_of_a_step_is_measured() -> None:
    frozen, lora = (
        bench_memory.measure_one("tiny", 2, 8, method, rank=2, threads=1)
        for method in ("frozen", "peft_lora")
    )
    assert 0 < frozen["saved"] < lora["saved"] and 0 < frozen["allocated"] < lora["allocated"]
