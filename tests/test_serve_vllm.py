"""Tasks as vLLM takes them: the folders, and with vLLM's own Python (`make test-vllm`) its side of the contract."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from banks import decoder_bank, decoder_task, expert_bank
from loras import dense
from lotr import CoreBank
from lotr.serving import vllm as plugin
from moe_models import EXPERTS

PROMPT = torch.tensor([[5, 9, 4, 11, 7]])


@pytest.fixture
def bank(tmp_path: Path) -> Iterator[CoreBank]:
    with decoder_bank(tmp_path, tasks=3) as bank:
        bank.add(decoder_task(bank, "../x", 7))
        yield bank


def folders(bank: CoreBank, most: int = 1 << 30) -> plugin.LoraFolders:
    return plugin.LoraFolders(bank, bank.path.parent / "cache", most)


def test_the_update_is_that_of_the_task_to_rounding(bank: CoreBank) -> None:
    path = folders(bank).make("task-1")
    tensors = load_file(path / "adapter_model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8 and not config["rank_pattern"]  # 4, padded
    import transformers as tf
    from peft import PeftModel

    base = tf.AutoModelForCausalLM.from_pretrained(bank.base_model).eval()
    lora = PeftModel.from_pretrained(base, str(path)).eval()
    assert {len(t) for key, t in tensors.items() if "lora_A" in key} == {8}
    with torch.no_grad():
        expected = lora(PROMPT).logits
        own = bank.wrap(tf.AutoModelForCausalLM.from_pretrained(bank.base_model))(
            PROMPT, task_ids=["task-1"]
        ).logits
    assert (own - expected).norm() < 1e-6 * expected.norm()


def test_a_folder_is_made_once_and_anew_when_the_task_changes(bank: CoreBank) -> None:
    own = folders(bank)
    path = own.make("../x")
    written = path.stat().st_ino
    assert path.parent == own.root and own.make("../x").stat().st_ino == written
    assert folders(bank).make("../x") == path  # as another process does
    bank.add(decoder_task(bank, "../x", 8), replace=True)
    assert own.make("../x") != path


def test_folders_that_were_not_used_for_long_are_removed(bank: CoreBank) -> None:
    own = folders(bank)
    first = own.make("task-0")
    size = sum(file.stat().st_size for file in first.iterdir())
    own.most = 2 * size
    old = time.time() - 1000
    os.utime(first, (old, old))
    second = own.make("task-1")
    os.utime(second, (old + 1, old + 1))
    assert first.is_dir()
    own.make("task-2")
    assert not first.exists() and second.is_dir()
    own.most = 1
    own.make("task-0")
    assert not second.exists() and len(list(own.root.iterdir())) == 2  # what is in use stays


def test_several_servers_share_folders_that_are_removed_all_the_while(
    bank: CoreBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin, "_IN_USE", 0.0)

    def serve(seed: int) -> int:
        """Make folders as a process of its own does; returns how many of them it could read whole."""
        draw, whole = random.Random(seed), 0
        with CoreBank.open(bank.path) as own:
            for _ in range(40):
                path = folders(own, most=10_000).make(f"task-{draw.randrange(3)}")  # of which two fit
                try:
                    whole += len(load_file(path / "adapter_model.safetensors")) == 8
                except (FileNotFoundError, RuntimeError) as error:  # by where in opening it is gone
                    assert "No such file" in str(error)
        return whole

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(serve, range(4))) > 40
    left = list(folders(bank).root.iterdir())
    assert left and all((path / "adapter_model.safetensors").is_file() for path in left)


def test_experts_come_in_the_form_that_vllm_is_told_of_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    request = ModuleType("vllm.lora.request")
    request.LoRARequest = lambda *args, **form: form  # type: ignore[attr-defined]
    for name in ("vllm", "vllm.lora"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    for parameters, form in ((EXPERTS, {"is_3d_lora_weight": True}), (["experts.down_proj"], None)):
        with expert_bank(tmp_path / str(len(parameters)), 1, parameters) as bank:
            resolver = plugin.BankResolver(folders(bank))
            assert asyncio.run(resolver.resolve_lora(str(bank.base_model), "task-0")) == form
    assert "changes down_proj of 'model.layers.0.mlp.experts', and vLLM takes" in caplog.text


def test_what_is_no_task_of_the_bank_is_left_to_the_next_resolver(bank: CoreBank) -> None:
    resolver = plugin.BankResolver(folders(bank))
    for base, name in ((str(bank.base_model), "nothing"), ("other/model", "task-1")):
        assert asyncio.run(resolver.resolve_lora(base, name)) is None
    assert not resolver.folders.root.exists()


def test_the_entry_point_is_declared_and_silent_without_a_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"lotr": "lotr.serving.vllm:register"}
    monkeypatch.delenv("LOTR_BANK", raising=False)
    before = set(sys.modules)
    plugin.register()
    assert not {name for name in set(sys.modules) - before if name.startswith("vllm")}


@pytest.fixture
def theirs(bank: CoreBank, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """vLLM's LoRA manager, with the plugin registered on the bank."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM's Python is not here; `make test-vllm` unpacks its released wheel")
    import vllm.lora.worker_manager as manager

    monkeypatch.setattr("vllm.lora.lora_model.PIN_MEMORY", False)  # there may be no accelerator here
    monkeypatch.setenv("LOTR_BANK", str(bank.path))
    monkeypatch.setenv("LOTR_VLLM_CACHE", str(tmp_path / "vllm-cache"))
    monkeypatch.setattr(manager.WorkerLoRAManager, "_load_adapter", manager.WorkerLoRAManager._load_adapter)
    plugin.register()
    return manager


def test_vllm_finds_and_reads_the_tasks(bank: CoreBank, theirs: Any) -> None:
    from vllm.lora.resolver import LoRAResolverRegistry

    resolver = LoRAResolverRegistry.get_resolver("lotr")

    request: Any = asyncio.run(resolver.resolve_lora(str(bank.base_model), "../x"))
    assert request.lora_name == "../x" and request.lora_int_id > 0
    adapters = SimpleNamespace(
        supported_lora_modules=["q_proj", "v_proj"],
        packed_modules_mapping={},
        model=torch.nn.Module(),
        moe_ep_load_spec=None,
        _validate_moe_lora_format=lambda lora: None,
        _validate_classification_head_lora=lambda lora: None,
    )
    worker = SimpleNamespace(
        _adapter_manager=adapters,
        max_position_embeddings=64,
        lora_config=SimpleNamespace(max_lora_rank=8, lora_dtype=torch.float32),
        _lora_model_cls=theirs.LoRAModel,
        vocab_size=None,
    )
    for removed in (False, True):
        if removed:  # as eviction does; vLLM asks its worker for the path that it knows
            for file in Path(request.lora_path).iterdir():
                file.unlink()
            Path(request.lora_path).rmdir()
        lora = theirs.WorkerLoRAManager._load_adapter(worker, request)
        tensors = load_file(Path(request.lora_path) / "adapter_model.safetensors")
        assert lora.rank == 8 and len(lora.loras) == 4
        for name, layer in lora.loras.items():
            own = [tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB"]
            torch.testing.assert_close(layer.lora_b @ layer.lora_a * layer.scaling, own[1] @ own[0])


def test_vllm_takes_the_updates_of_experts_apart_as_they_are(theirs: Any, tmp_path: Path) -> None:
    """Every expert's own matrices, as vLLM's wrapper with a LoRA an expert takes them."""
    import transformers as tf
    from peft import PeftModel
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.peft_helper import PEFTHelper

    with expert_bank(tmp_path / "experts", tasks=1) as bank:
        path = str(folders(bank).make("task-0"))
        base = tf.AutoModelForCausalLM.from_pretrained(bank.base_model)
    expected = dense(PeftModel.from_pretrained(base, path))
    helper = PEFTHelper.from_local_dir(path, 64)
    lora = theirs.LoRAModel.from_local_checkpoint(path, {"q_proj", "experts"}, helper, device="cpu")
    experts = SimpleNamespace(local_num_experts=4, global_num_experts=4, ep_rank=0)
    manager = SimpleNamespace(
        _get_lora_layer_weights=lambda lora, name: lora.loras.get(name),
        _pop_lora_weights=lambda lora, names: [lora.loras.pop(name) for name in names],
        model=SimpleNamespace(config=SimpleNamespace(architectures=["MixtralForCausalLM"])),
    )
    for layer in range(2):
        module = f"model.layers.{layer}.mlp.experts"
        LoRAModelManager._convert_3d_to_2d_moe_lora(manager, lora, experts, module)
        own = lora.loras[module]
        gate, down, up = (B @ A * own.scaling for A, B in zip(own.lora_a, own.lora_b, strict=True))
        gate_up = expected[f"{module}.base_layer"]
        torch.testing.assert_close(torch.cat([gate, up], 1), gate_up, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(down, expected[module], atol=1e-5, rtol=1e-4)
