"""LoRAs on experts that one parameter holds become banks, whoever wrote them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import lotr
from loras import WEIGHTS, assert_answers, dense, edit, lora
from lotr import CheckpointError, ConfigError, CoreBank, LotrConfig
from lotr.compression.add import add
from lotr.compression.base import bank_config, weight_shapes
from lotr.compression.stack import Stack, read_entry
from lotr.files import peft_lora
from moe_models import EXPERTS, gpt_oss, mixtral, qwen
from test_bank_rows import MASK, logits
from test_bank_rows import MASKED as INPUTS


def two_loras(folder: Path, make: Callable[[], nn.Module], **fields: Any) -> list[Path]:
    asked: Any = {
        "r": 1,
        "target_modules": ["q_proj"],
        "target_parameters": EXPERTS,
        "task_type": "CAUSAL_LM",
    }
    for n in range(2):
        lora(folder / f"task-{n}", n, make, **(asked | fields))
    return [folder / f"task-{n}" for n in range(2)]


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # which do match
@pytest.mark.parametrize("core", ["free", "diagonal"])
@pytest.mark.parametrize("modes", [("task",), ("task", "expert")], ids=str)
@pytest.mark.parametrize("make", [mixtral, qwen, gpt_oss], ids=lambda make: make.__name__)
def test_loras_on_experts_become_a_bank_and_loras_again(make, modes, core, tmp_path: Path) -> None:
    folders = two_loras(tmp_path, make, rank_pattern={"experts.down_proj": 2}, use_rslora=True)
    if modes == ("task", "expert"):  # 8 updates of rank 1 in a block 12 wide
        folders = two_loras(tmp_path, make)
    report = lotr.compress(
        folders, tmp_path / "bank", make(), rank=12, modes=modes, core=core, dtype="float32"
    )
    assert report.error < 1e-5
    groups = {
        group["group"].partition("_")[0]: group["sites"]
        for group in report.groups
        if "16x12" in group["group"]
    }
    assert set(groups.values()) == ({4} if "expert" in modes else {1})
    assert_answers(tmp_path / "bank", "task-1", folders[1], make)
    with CoreBank.open(tmp_path / "bank") as made:
        made.export("task-0", tmp_path / "out", as_lora=True)
    again = PeftModel.from_pretrained(make(), tmp_path / "out").eval()
    expected = logits(PeftModel.from_pretrained(make(), folders[0]).eval(), INPUTS)
    torch.testing.assert_close(
        logits(again, INPUTS)[MASK.bool()], expected[MASK.bool()], atol=1e-4, rtol=1e-4
    )


def test_an_adapter_of_this_library_and_a_later_lora_join_a_bank_on_experts(tmp_path: Path) -> None:
    folders = two_loras(tmp_path, qwen)
    config = LotrConfig(r=2, modes=("expert",), target_parameters=EXPERTS, init_weights=False)
    get_peft_model(qwen(), config).save_pretrained(tmp_path / "own")
    modes = ("task", "expert")
    lotr.compress(
        [*folders, tmp_path / "own"], tmp_path / "bank", qwen(), rank=12, modes=modes, dtype="float32"
    )
    assert_answers(tmp_path / "bank", "own", tmp_path / "own", qwen)
    lotr.compress([folders[0], tmp_path / "own"], tmp_path / "later", qwen(), rank=12, dtype="float32")
    report = add(tmp_path / "later", [folders[0].rename(tmp_path / "same"), folders[1]])
    assert report["added"]["same"] < 1e-5 < 0.1 < report["added"]["task-1"]


def test_a_bank_on_experts_keeps_to_its_bytes(tmp_path: Path) -> None:
    folders = two_loras(tmp_path, qwen, r=3)
    for most in (6_000, 9_000, 12_000):
        report = lotr.compress(folders, tmp_path / "bank", qwen(), max_bytes=most, overwrite=True)
        assert 0.8 * most < report.bytes_of_numbers <= most


def test_the_norms_that_inspect_tells_are_those_of_peft(tmp_path: Path) -> None:
    for make in (qwen, gpt_oss):
        parameters = EXPERTS if make is qwen else ["gate_up_proj", "down_proj"]
        [folder, _] = two_loras(tmp_path / make.__name__, make, target_parameters=parameters)
        inspection = lotr.inspect(folder)
        updates = dense(PeftModel.from_pretrained(make(), folder))
        told = {(s.module, s.expert): s.norm for s in inspection.sites}
        path = "model.layers.1.mlp.experts"
        for wrapped, name in ((path, "down_proj"), (f"{path}.base_layer", "gate_up_proj")):
            for expert, dW in enumerate(updates[wrapped]):
                assert told[f"{path}.{name}", expert] == pytest.approx(float(dW.norm()), rel=1e-5)
        assert len(inspection.sites) == 2 * (1 + 2 * 4)


def test_experts_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    fields = {"target_modules": ["q_proj"], "target_parameters": parameters}
    lora(tmp_path / "other", 0, partial(qwen, num_experts=8), r=2, **fields)
    lora(tmp_path / "rank", 0, qwen, r=2, **fields)
    config = tmp_path / "rank" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": 3'))
    lora(tmp_path / "diagonal", 0, qwen, r=2, **fields)
    for name, more, error, message in (
        ("other", {}, CheckpointError, r"shape \(8, 24, 16\) at .*gate_up_proj.* has \(4, 24, 16\)"),
        ("rank", {}, CheckpointError, "holds 8 rows for the experts .*tells rank 3"),
        (
            "diagonal",
            {"core": "diagonal", "modes": ["task", "layer"]},
            ConfigError,
            "products of two.*task,expert",
        ),
    ):
        with pytest.raises(error, match=message):
            lotr.compress([tmp_path / name], tmp_path / "bank", qwen(), **more)
        assert not (tmp_path / "bank").exists()


# ---- as they are written


def as_older_peft(folder: Path, version: str = "0.18.1") -> dict[str, Tensor]:
    """Put `A` and `B` of experts in each other's place; returns the updates, by the formula of PEFT 0.17 and 0.18."""
    updates = {}

    def exchange(tensors: dict[str, Tensor]) -> None:
        for key_A in [key for key in tensors if "experts" in key and "lora_A" in key]:
            key_B = key_A.replace("lora_A", "lora_B")
            A, B = tensors[key_A].unflatten(0, (4, -1)), tensors[key_B].unflatten(1, (-1, 4))
            tensors[key_A] = B.permute(2, 1, 0).flatten(0, 1).contiguous()
            tensors[key_B] = A.permute(2, 1, 0).flatten(1).contiguous()
            A, B = tensors[key_A].reshape(4, -1, tensors[key_A].shape[1]), tensors[key_B]
            updates[key_A] = torch.einsum("o r e, e r i -> e i o", B.reshape(len(B), -1, 4), A)

    edit(folder, exchange)
    config(folder, peft_version=version)
    return updates


def config(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("make", [qwen, gpt_oss], ids=lambda make: make.__name__)
def test_files_of_older_peft_hold_the_same_updates(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    one, other = two_loras(tmp_path, make, r=2, lora_alpha=2)
    lora(other, 0, make, r=2, lora_alpha=2, target_modules=["q_proj"], target_parameters=EXPERTS)
    updates = as_older_peft(other)
    entry, source = read_entry("old", other, weight_shapes(make()), None)
    assert entry.exchanged and source.shapes == read_entry("new", one, weight_shapes(make()), None)[1].shapes
    with entry.open().reader() as read:
        for key, dW in updates.items():
            name = "gate_up_proj" if "base_layer" in key else "down_proj"
            A, B = read(f"{key.partition('.experts')[0].removeprefix('base_model.model.')}.experts.{name}")
            torch.testing.assert_close(B @ A, dW)
    lotr.compress([one, other], tmp_path / "bank", make(), rank=12, dtype="float32")
    with CoreBank.open(tmp_path / "bank") as bank:
        new, old = bank.read(list(bank.names()))[1]
        torch.testing.assert_close(old.numbers, new.numbers, atol=1e-5, rtol=1e-4)


def test_square_experts_of_older_peft_are_refused_because_nothing_tells_a_from_b(tmp_path: Path) -> None:
    make = partial(qwen, moe_intermediate_size=16)
    folders = two_loras(tmp_path, make, target_parameters=EXPERTS[1:])
    lotr.compress(folders, tmp_path / "bank", make(), rank=2)
    for version in ("0.18.1", None):
        config(folders[0], peft_version=version)
        with pytest.raises(CheckpointError, match=r"task-0.*blocks are square.*peft_version.*0\.19\.1"):
            lotr.compress(folders, tmp_path / "other", make(), rank=2)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")  # which do match
def test_loras_on_experts_that_were_modules_are_told_the_way_into_one_parameter(tmp_path: Path) -> None:
    """Such as transformers 4 had; PEFT brings them into the new form when it loads them."""
    folders = two_loras(tmp_path, mixtral)
    fields = {"target_modules": ["w1", "w2", "w3"], "target_parameters": None, "r": 2, "lora_alpha": 2}
    config(folders[1], **fields)

    def apart(tensors: dict[str, Tensor]) -> None:
        tensors.clear()
        generator = torch.Generator().manual_seed(0)
        for layer in range(2):
            for expert in range(4):
                for name, (out, width) in {"w1": (12, 16), "w2": (16, 12), "w3": (12, 16)}.items():
                    path = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                    tensors[f"{path}.lora_A.weight"] = torch.randn(2, width, generator=generator)
                    tensors[f"{path}.lora_B.weight"] = torch.randn(out, 2, generator=generator)

    edit(folders[1], apart)
    with pytest.raises(CheckpointError, match=r"task-1.*experts\.0\.w1.*transformers 4.*save_pretrained"):
        lotr.compress(folders, tmp_path / "bank", mixtral(), rank=12)
    model = PeftModel.from_pretrained(mixtral(), folders[1])
    model.save_pretrained(tmp_path / "new")
    report = lotr.compress(
        [folders[0], tmp_path / "new"], tmp_path / "bank", mixtral(), rank=16, dtype="float32"
    )
    assert report.error < 1e-5
    assert_answers(tmp_path / "bank", "new", folders[1], mixtral)


def test_a_pass_reads_every_number_of_a_file_once_however_few_experts_it_works_on_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = partial(qwen, num_experts=8)
    folders = two_loras(tmp_path, make, r=3)
    known = weight_shapes(make())
    entries = tuple(read_entry(folder.name, folder, known, None)[0] for folder in folders)
    adapted = {module: known[module] for module in entries[0].energies}
    groups = bank_config(make(), adapted, ("task",), "free", set()).recorded_plan().groups
    numbers: list[int] = []

    class Counted:
        """A tensor in a file that counts what is read of it."""

        def __init__(self, inner: Any) -> None:
            self.get_shape, self.inner = inner.get_shape, inner

        def __getitem__(self, at: Any) -> Tensor:
            part: Tensor = self.inner[at]
            numbers.append(part.numel())
            return part

    opened = peft_lora.opened

    class File:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def get_slice(self, key: str) -> Counted:
            return Counted(self.inner.get_slice(key))

    @contextmanager
    def counting(path: Path) -> Iterator[File]:
        with opened(path) as file:
            yield File(file)

    monkeypatch.setattr(peft_lora, "opened", counting)
    stack = Stack(entries, (1.0, 1.0))
    for at in range(0, len(groups), 3):
        for batch in stack.batches(groups[at : at + 3], "", lambda what, done, of: None)():
            assert len(batch) <= 3
    assert len(groups) == 2 * (1 + 2 * 8)
    assert sum(numbers) == sum(t.numel() for folder in folders for t in load_file(folder / WEIGHTS).values())
    assert max(numbers) <= 3 * 3 * 16  # and no more than it works on
