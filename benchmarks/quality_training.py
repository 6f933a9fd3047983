"""One run of `quality.py`: a fresh adapter on the packaged model, trained for some steps, measured on dev and test.

The same for every method: a head that trains alone first, batches in an order that depends on the seed alone, AdamW, a
rate that rises for 6 % of the steps and falls to zero, gradients clipped to a norm of one, dropout of the base model.
"""

from __future__ import annotations

import copy
import csv
import functools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from datasets import Dataset
from peft.tuners.lora import eva, loraga
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

import lotr
from lotr.training.data.docstrings import load_docstrings
from quality_runs import Definition, Key, Rates
from shapes import minilm

Batch = dict[str, Tensor]
Rows = list[dict[str, Any]]


class Task:
    """A task of the grid, encoded.

    Args:
        task: Its entry in the grid.
        model: Name of the model whose tokenizer encodes it.
        data: Folder with the tasks' files.
    """

    def __init__(self, task: Definition, model: str, data: Path) -> None:
        self.batch_size, self.steps = task["batch_size"], task["steps"]
        self.tokenizer = AutoTokenizer.from_pretrained(_folder(model))
        parts = _read(data / task["folder"]) if "folder" in task else _built_in()
        self.labels = sorted({row["label"] for row in parts["train"]})
        self.train, self.dev, self.test = (
            self._encoded(parts[name], task.get(f"{name}_rows"), task["max_length"])
            for name in ("train", "dev", "test")
        )

    def _encoded(self, rows: Rows, most: int | None, max_length: int) -> Rows:
        shuffled = Dataset.from_list(rows).shuffle(seed=0)
        rows = shuffled.select(range(min(len(rows), most or len(rows)))).to_list()
        texts = [[row[name] for row in rows] for name in ("text", "text2") if name in rows[0]]
        encoded = self.tokenizer(*texts, truncation=True, max_length=max_length)
        labels = {name: number for number, name in enumerate(self.labels)}
        return [
            {name: encoded[name][at] for name in encoded} | {"labels": labels[row["label"]]}
            for at, row in enumerate(rows)
        ]

    def collate(self, rows: Rows) -> Batch:
        """Return rows as one padded batch."""
        return dict(self.tokenizer.pad(rows, return_tensors="pt"))

    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield batches of rows of like length without end, in an order that depends on the seed alone."""
        draw = random.Random(seed)
        while True:
            rows = draw.sample(self.train, len(self.train))
            many, chunks = 16 * self.batch_size, []
            for at in range(0, len(rows), many):
                alike = sorted(rows[at : at + many], key=_length)
                chunks += [alike[i : i + self.batch_size] for i in range(0, len(alike), self.batch_size)]
            draw.shuffle(chunks)
            yield from map(self.collate, chunks)

    def accuracy(self, model: nn.Module, rows: Rows) -> float:
        """Return the share of rows whose class is predicted."""
        model.eval()
        correct, rows = 0, sorted(rows, key=_length)
        with torch.inference_mode():
            for at in range(0, len(rows), 64):
                batch = self.collate(rows[at : at + 64])
                labels = batch.pop("labels")
                correct += int((model(**batch).logits.argmax(-1) == labels).sum())
        model.train()
        return correct / len(rows)


def _folder(model: str) -> str:
    return minilm() if model == "minilm" else model


def _length(row: dict[str, Any]) -> int:
    return len(row["input_ids"])


def _read(folder: Path) -> dict[str, Rows]:
    parts = {}
    for name in ("train", "dev", "test"):
        with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            parts[name] = list(csv.DictReader(file))
    return parts


def _built_in() -> dict[str, Rows]:
    """Return the docstrings: a fifth of the training rows is dev, the evaluation rows are test."""
    splits = load_docstrings()
    halves = Dataset.from_list(splits["train"]).train_test_split(test_size=0.2, seed=0)
    return {"train": halves["train"].to_list(), "dev": halves["test"].to_list(), "test": splits["test"]}


class Bench:
    """Trains and measures; keeps what runs have in common.

    Args:
        grid: The definition.
        data: Folder with the tasks' files.
        folder: Where adapters that another run starts from are kept.
    """

    def __init__(self, grid: Definition, data: Path, folder: Path) -> None:
        self.grid, self.folder = grid, folder
        self.task = functools.cache(lambda name: Task(grid["tasks"][name], grid["model"], data))
        self._base = functools.cache(self._load_base)
        self._head = functools.cache(self._warm_head)
        self._source = functools.cache(self._train_source)

    def measure(self, key: Key, rates: Rates) -> dict[str, Any]:
        """Return a run with its scores on dev and test, as a line of the file."""
        task, method = self.task(key.task), self.grid["methods"][key.name]
        model, steps = self.trained(key, rates, method)
        fields = method["fields"]
        data_init = "from_lora" if "from_lora" in method else "basis" if "source" in method else ""
        rank = fields.get("r", "")
        numbers = sum(
            p.numel() for n, p in model.named_parameters() if p.requires_grad and ".modules_to_save." not in n
        )
        return {
            **key._asdict(),
            "method": key.name.split()[0],
            "init": data_init or fields.get("init", ""),
            "rank": "x".join(map(str, rank)) if isinstance(rank, list) else rank,
            "numbers": numbers,
            "steps": steps,
            "dev": round(task.accuracy(model, task.dev), 6),
            "test": round(task.accuracy(model, task.test), 6),
        }

    def trained(self, key: Key, rates: Rates, method: Definition) -> tuple[nn.Module, int]:
        """Return a trained model, and in how many steps."""
        task, settings = self.task(key.task), self.grid["settings"] | method.get("settings", {})
        steps: int = settings.get("steps", task.steps)
        model = self._adapted(key, method, settings)
        groups = lotr.parameter_groups(model, **{"lr": 1e-3, "head_lr": settings["head_lr"]} | rates)
        train(model, groups, task, key.seed, settings["warmup"], steps)
        return model, steps

    def fresh(self, task: str, seed: int, settings: Definition) -> nn.Module:
        """Return the base model with a head that has trained alone; autocast takes products as the grid says."""
        base = self._fresh_base(task, settings)
        head = self._head(task, seed, settings["head_warmup"], settings["head_lr"])
        base.classifier.load_state_dict(head)
        return base

    def _load_base(self, task: str) -> nn.Module:
        source, n_labels = _folder(self.grid["model"]), len(self.task(task).labels)
        return AutoModelForSequenceClassification.from_pretrained(source, num_labels=n_labels)

    def _fresh_base(self, task: str, settings: Definition) -> nn.Module:
        base = copy.deepcopy(self._base(task))
        forward, products = base.forward, getattr(torch, settings.get("products", "float32"))

        def cast(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast("cpu", products, enabled=products != torch.float32):
                return forward(*args, **kwargs)

        base.forward = cast
        return base

    def _warm_head(self, name: str, seed: int, steps: int, lr: float) -> dict[str, Tensor]:
        """Return the head of a task after its warm-up, which is the same for all methods."""
        set_seed(seed)
        base = self._fresh_base(name, self.grid["settings"]).requires_grad_(False).train()
        head = base.classifier.requires_grad_(True)
        nn.init.normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.0)
        batches = self.task(name).batches(seed)
        for _ in range(steps):
            base(**next(batches)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return copy.deepcopy(head.state_dict())

    def _adapted(self, key: Key, method: Definition, settings: Definition) -> nn.Module:
        """Return the base model with a fresh adapter that has started as the method says."""
        task, base = self.task(key.task), self.fresh(key.task, key.seed, settings)
        set_seed(key.seed)
        modules = list(self.grid["modules"][key.modules])
        fields = {"task_type": "SEQ_CLS", "target_modules": modules, **method["fields"]}
        batches = task.batches(key.seed)
        seen = [next(batches) for _ in range(settings["start_batches"])]
        source = None
        if "source" in method:
            source = self._source(json.dumps(method["source"]), key.modules, key.seed)
        if "peft" in method:
            model = _with_peers_adapter(base, method["peft"], fields, seen)
        else:
            if source is not None:
                fields["basis"] = str(source)
            from_gradients = fields.get("init") == "gradient" and fields.pop("init")
            model = peft.get_peft_model(base, lotr.LotrConfig(seed=key.seed, **fields))
            if from_gradients:
                lotr.init_from_data(model, seen, seed=key.seed)
        if method.get("continues"):
            _continue_from(model, source)
        if "from_lora" in method:
            start = {"task": key.task, "method": "peft_lora", **method["from_lora"]}
            lotr.init_from_lora(model, self._source(json.dumps(start), key.modules, key.seed + 1000))
        return model

    def _train_source(self, source: str, modules: str, seed: int) -> Path:
        """Train the adapter that another run starts from; return its folder."""
        wish = json.loads(source)
        method = self.grid["methods"].get(wish["method"])
        if method is None:  # a short LoRA, of which the factors of a LoTR come
            fields = {"r": wish["rank"], "lora_alpha": wish["rank"]}
            method = {"peft": "LoraConfig", "fields": fields, "settings": {"steps": wish["steps"]}}
        key = Key(modules, wish["method"], wish["task"], seed, "")
        model, _ = self.trained(key, wish["rates"], method)
        folder = self.folder / str(len(list(self.folder.iterdir())))
        model.save_pretrained(str(folder))
        return folder


def _with_peers_adapter(base: nn.Module, kind: str, fields: Definition, seen: list[Batch]) -> nn.Module:
    """Return the base model with one of PEFT's own adapters; two of its LoRAs start from data."""
    config, start = getattr(peft, kind)(**fields), fields.get("init_lora_weights")
    if start == "lora_ga":
        config.lora_ga_config = peft.LoraGAConfig()
        loraga.preprocess_loraga(base, config, lambda: [base(**batch).loss.backward() for batch in seen])
    if start == "eva":
        config.eva_config = peft.EvaConfig(rho=1.0)  # ranks stay as they are, so sizes are equal
    model = peft.get_peft_model(base, config)
    if start == "eva":
        texts = [{name: t for name, t in batch.items() if name != "labels"} for batch in seen]
        eva.initialize_lora_eva_weights(model, texts, show_progress_bar=False)
    return model


def _continue_from(model: nn.Module, folder: Path) -> None:
    """Copy the numbers of a saved adapter, its head left out."""
    saved = load_file(folder / "adapter_model.safetensors")
    head = {name: t for name, t in peft.get_peft_model_state_dict(model).items() if ".classifier." in name}
    peft.set_peft_model_state_dict(model, saved | head)


def train(
    model: nn.Module, groups: list[dict[str, Any]], task: Task, seed: int, warmup: float, steps: int
) -> None:
    """Train for some steps, or until the loss is no longer finite.

    Args:
        model: In any mode; it is in training mode afterwards.
        groups: Parameter groups with their rates.
        task: Gives the batches.
        seed: Decides their order, and dropout.
        warmup: Share of the steps in which the rates rise.
        steps: How many.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    rise = math.ceil(warmup * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (rise + 1), (steps - step) / max(1, steps - rise))
    )
    set_seed(seed)
    batches = task.batches(seed)
    model.train()
    for _ in range(steps):
        loss = model(**next(batches)).loss
        if not math.isfinite(float(loss.detach())):
            return
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
