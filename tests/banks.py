"""Small banks and adapters on their bases, for the tests of banks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from conftest import bert
from lotr import CoreBank, LotrConfig, Task

_FOLDER = tempfile.TemporaryDirectory()
_saved: dict[str, Path] = {}  # by what was asked


def stirred(config: LotrConfig, seed: int = 0) -> PeftModel:
    """An adapter on the pico encoder whose trained numbers are not where they started."""
    model = get_peft_model(bert(), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def basis(folder: Path, **fields: Any) -> Path:
    """A saved adapter with a head, of rank 4 on query and value unless said otherwise; made once and copied."""
    asked = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", **fields}
    made = _saved.setdefault(repr(asked), Path(_FOLDER.name) / str(len(_saved)))
    if not made.exists():
        stirred(LotrConfig(**asked)).save_pretrained(made)
    return shutil.copytree(made, folder, dirs_exist_ok=True)


def bank(folder: Path, dtype: str = "float32", tasks: int = 0, **fields: Any) -> CoreBank:
    """A bank in `folder/bank`, beside its basis, with tasks named `task-0` and so on; made once and copied."""
    made = _saved.setdefault(repr((dtype, tasks, fields)), Path(_FOLDER.name) / str(len(_saved)))
    if not made.exists():
        with CoreBank.create(made / "bank", basis(made / "basis", **fields), dtype=dtype) as new:
            new.add_many(task(new, f"task-{n}", seed=n) for n in range(tasks))
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return CoreBank.open(folder / "bank", writable=True)


def task(of: CoreBank, name: str, seed: int = 0, **fields: Any) -> Task:
    """A task with numbers of its own and a head of three classes."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(of.layout.size, generator=generator)
    shapes = {"weight": (3, 32), "bias": (3,)}
    root = "base_model.model.classifier"
    head = {f"{root}.{key}": torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return Task(name, numbers, head, ("a", "b", "c"), "classification", {"seed": seed, **fields})


class Tiny(nn.Module):
    """Two projections and a head: a call of it takes a fraction of a transformer's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.classifier = nn.Embedding(61, 16), nn.Linear(16, 3)
        self.query, self.value = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embed(input_ids).mean(1)
        return SimpleNamespace(logits=self.classifier(self.query(x).tanh() * self.value(x)))


def on(folder: Path, base: nn.Module, names: Iterable[str] = (), **config: Any) -> CoreBank:
    """A bank in float32 in `folder/bank`, whose basis is an adapter on a model, with tasks of random numbers."""
    get_peft_model(base, LotrConfig(**{"r": 4, **config})).save_pretrained(folder / "basis")
    made = CoreBank.create(folder / "bank", folder / "basis", dtype="float32")
    made.add_many(Task(name, numbers(made, n)) for n, name in enumerate(names))
    return made


def numbers(of: CoreBank, seed: int) -> Tensor:
    return 2 * torch.randn(of.layout.size, generator=torch.Generator().manual_seed(seed))


def alone(of: CoreBank, base: nn.Module, name: str | None) -> nn.Module:
    """A plain model with one task in its weights: as a LoRA that PEFT merged."""
    if name is None:
        return base
    with tempfile.TemporaryDirectory() as folder:
        of.export(name, Path(folder) / "lora", as_lora=True)
        return PeftModel.from_pretrained(base, Path(folder) / "lora").merge_and_unload().eval()


def contents(model: nn.Module) -> dict[tuple[object, ...], object]:
    """All that the modules of a model hold, to compare by identity: submodules, parameters, hooks, attributes."""
    held: dict[tuple[object, ...], object] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            own = value.items() if isinstance(value, dict) else [(None, value)]
            held |= {(path, name, key): inner for key, inner in own}
    # the list of transformers whose hooks are removed one by one
    return {at: value for at, value in held.items() if not str(at[1]).startswith("_require_grads_hook")}


def assert_same_contents(before: dict[tuple[object, ...], object], model: nn.Module) -> None:
    after = contents(model)
    assert after.keys() == before.keys()
    assert [at for at in before if after[at] is not before[at]] == []
