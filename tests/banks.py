"""Small banks and adapters on their bases, for the tests of banks."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from conftest import bert
from lotr import CoreBank, LotrConfig, Task
from moe_models import EXPERTS
from saved_models import save_bert, save_llama, save_mixtral

HEAD = "base_model.model.classifier"
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


def task(
    of: CoreBank, name: str, seed: int = 0, labels: tuple[str, ...] = ("a", "b", "c"), **metadata: Any
) -> Task:
    """A task of random numbers with a head; without labels it is a regression."""
    draw, outputs = torch.Generator().manual_seed(seed), len(labels) or 1
    shapes = {f"{HEAD}.weight": (outputs, 32), f"{HEAD}.bias": (outputs,)}
    head = {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()}
    numbers = torch.randn(of.layout.size, generator=draw)
    kind = "classification" if labels else "regression"
    return Task(name, numbers, head, labels, kind, {"seed": seed, **metadata})


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


# ---- banks on saved models, for what serves them


def encoder_bank(folder: Path, tasks: int = 0) -> CoreBank:
    """A bank in `folder/bank` on a saved encoder."""
    base = tf.AutoModelForSequenceClassification.from_pretrained(save_bert(folder / "model"))
    bank = on(folder, base, target_modules=["query", "value"])
    bank.add_many(task(bank, f"task-{n}", seed=n) for n in range(tasks))
    return bank


def bare_encoder_bank(folder: Path, tasks: int) -> CoreBank:
    """The same on an encoder without a head, as embedding models are trained."""
    base = tf.AutoModel.from_pretrained(save_bert(folder / "model"))
    return on(folder, base, [f"task-{n}" for n in range(tasks)], target_modules=["query", "value"])


def decoder_bank(folder: Path, tasks: int = 0) -> CoreBank:
    """A bank in `folder/bank` on a saved language model."""
    base = tf.AutoModelForCausalLM.from_pretrained(save_llama(folder / "model"))
    bank = on(folder, base, target_modules=["q_proj", "v_proj"])
    bank.add_many(decoder_task(bank, f"task-{n}", seed=n) for n in range(tasks))
    return bank


def expert_bank(folder: Path, tasks: int = 0, parameters: list[str] = EXPERTS) -> CoreBank:
    """A bank in `folder/bank` on a saved language model with experts."""
    base = tf.AutoModelForCausalLM.from_pretrained(save_mixtral(folder / "model"))
    names = [f"task-{n}" for n in range(tasks)]
    return on(folder, base, names, target_modules=["q_proj"], target_parameters=parameters)


def decoder_task(bank: CoreBank, name: str, seed: int = 0) -> Task:
    """A task of random numbers of a language model."""
    generator = torch.Generator().manual_seed(seed)
    return Task(name, torch.randn(bank.layout.size, generator=generator), task="causal-lm")


# ---- what a model holds


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
