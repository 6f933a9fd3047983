"""One run of `quality.py`: a fresh adapter on the packaged model, trained for a few steps, measured on dev and test.

The same for every method: head warm-up, batches in an order that depends on the seed alone, AdamW, a rate that rises
for 6 % of the steps and falls to zero, clipping of the gradient's norm to one, dropout of the base model. Texts are
encoded and the model is loaded once a process.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import eva, loraga
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import set_seed

import lotr
from lotr.math.init import DATA_INITS
from lotr.training.adapter import add_adapter
from lotr.training.base_model import load_model
from lotr.training.rates import parameter_groups
from lotr.training.warmup import warm_head
from quality_task import Batch, Task


class Bench:
    """Trains and measures; keeps what runs have in common.

    Args:
        grid: The grid.
        data: Folder with the tasks' files.
        folder: Where adapters that a transfer starts from are kept.
    """

    def __init__(self, grid: dict[str, Any], data: Path, folder: Path) -> None:
        self.grid, self.folder = grid, folder
        self.task = functools.cache(lambda name: Task(grid["tasks"][name], grid["model"], data))
        self._base = functools.cache(self._load_base)
        self._warmed = functools.cache(self._warm)
        self._sources = functools.cache(self._train_source)
        self._started: tuple[Any, dict[str, Tensor], float] | None = None

    def measure(self, run: dict[str, Any], adapter: Path | None = None) -> dict[str, Any]:
        """Return a run with its scores on dev and test.

        Args:
            run: `task`, `target`, `method`, `seed`, `rates`.
            adapter: Where the trained adapter is kept, if it is.
        """
        started = time.perf_counter()
        task, method, seed = self.task(run["task"]), self.grid["methods"][run["method"]], run["seed"]
        settings = self.grid["settings"] | method.get("settings", {})
        model, kept = self.started(run, method, settings)
        begun = time.perf_counter() - started
        steps = settings.get("steps", task.steps)
        groups = parameter_groups(model, **{"lr": 1e-3, "head_lr": settings["head_lr"]} | run["rates"])
        traced = run["method"] in self.grid["steps"]["methods"] and seed not in self.grid["sweep"]["seeds"]
        every = steps // self.grid["tasks"][run["task"]].get("evaluations", 1) if traced else steps
        history: list[tuple[int, float]] = []

        def look(step: int) -> None:
            if step == steps or step % every == 0:
                history.append((step, task.accuracy(model, task.dev)))

        diverged = train(model, groups, task, seed, settings["warmup"], look, steps)
        if diverged:  # a rate that is far too high: a score of zero
            return {**run, "numbers": _numbers(model), "dev": 0.0, "test": 0.0, "diverged": diverged}
        if adapter is not None:
            model.save_pretrained(str(adapter))
        return {
            **run,
            "numbers": _numbers(model),
            "dev": history[-1][1],
            "test": task.accuracy(model, task.test),
            "history": history,
            "kept": kept,
            "seconds": round(time.perf_counter() - started, 1),
            "start_seconds": round(begun, 1),
        }

    def _load_base(self, labels: tuple[str, ...], kind: str) -> nn.Module:
        return load_model(self.grid["model"], kind, labels)

    def _fresh_base(self, task: Task) -> nn.Module:
        """Return a copy of the base model; numbers are float32, and autocast takes products as the grid says."""
        base = copy.deepcopy(self._base(task.labels, task.kind))
        forward, products = base.forward, getattr(torch, self.grid["settings"].get("products", "float32"))

        def cast(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast("cpu", products, enabled=products != torch.float32):
                return forward(*args, **kwargs)

        base.forward = cast
        return base

    def _warm(self, name: str, seed: int, steps: int, lr: float) -> dict[str, Tensor]:
        """Return the head of a task after its warm-up, which is the same for all methods."""
        task = self.task(name)
        set_seed(seed)
        base = self._fresh_base(task)
        nn.init.normal_(base.classifier.weight, std=0.02)
        nn.init.zeros_(base.classifier.bias)
        model = peft.get_peft_model(base, lotr.LotrConfig(task_type="SEQ_CLS", target_modules=["query"], r=1))
        warm_head(model, task.batches(seed), steps, lr)
        head: nn.Module = model.base_model.model.classifier.modules_to_save["default"]
        return copy.deepcopy(head.state_dict())

    def fresh(self, run: dict[str, Any], settings: dict[str, Any]) -> nn.Module:
        """Return the base model with a warmed-up head."""
        base = self._fresh_base(self.task(run["task"]))
        head = self._warmed(run["task"], run["seed"], settings["head_warmup"], settings["head_lr"])
        base.classifier.load_state_dict(head)
        return base

    def started(
        self, run: dict[str, Any], method: dict[str, Any], settings: dict[str, Any]
    ) -> tuple[nn.Module, float | None]:
        """Return the base model with a fresh adapter, and the share of the gradients that its start keeps."""
        task = self.task(run["task"])
        base = self.fresh(run, settings)
        set_seed(run["seed"])
        modules = self.grid["targets"][run["target"]]
        fields = {"task_type": "SEQ_CLS", "target_modules": list(modules), **method["fields"]}
        source = None
        if "source" in method:
            source = self._sources(json.dumps(method["source"]), run["target"], run["seed"])
            if "peft" not in method:
                fields["basis"] = str(source)
        # the steps of a trial go through the rows in an order of their own, as in `lotr train`
        batches = task.batches(run["seed"] + (1000 if fields.get("start") == "update" else 0))
        seen = [next(batches) for _ in range(settings["start_batches"])]
        if "peft" not in method:
            model = add_adapter(base, lotr.LotrConfig(seed=run["seed"], **fields))
            if method.get("continues"):
                _go_on_from(model, source)
            if fields.get("start") not in DATA_INITS:
                return model, None
            return model, self._start(model, fields, seen, run)
        config = getattr(peft, method["peft"])(**fields)
        if fields.get("init_lora_weights") == "lora_ga":
            config.lora_ga_config = peft.LoraGAConfig()
            loraga.preprocess_loraga(base, config, lambda: [base(**batch).loss.backward() for batch in seen])
        if fields.get("init_lora_weights") == "eva":
            config.eva_config = peft.EvaConfig(rho=1.0)  # ranks stay as they are, so sizes are equal
        model = add_adapter(base, config)
        if method.get("continues"):
            _go_on_from(model, source)
        if fields.get("init_lora_weights") == "eva":
            texts = [{name: t for name, t in batch.items() if name != "labels"} for batch in seen]
            eva.initialize_lora_eva_weights(model, texts, show_progress_bar=False)
        return model, None

    def _train_source(self, source: str, target: str, seed: int) -> Path:
        """Train the adapter that a transfer starts from; return its folder."""
        folder = self.folder / str(len(list(self.folder.iterdir())))
        self.measure({**json.loads(source), "target": target, "seed": seed}, folder)
        return folder

    def _start(
        self, model: nn.Module, fields: dict[str, Any], seen: list[Batch], run: dict[str, Any]
    ) -> float:
        """Start from data; other rates of the same run start from the same factors, which are found once."""
        key = (run["task"], run["seed"], json.dumps(fields, sort_keys=True))
        factors = {n: p for n, p in model.named_parameters() if ".lotr_U." in n or ".lotr_V." in n}
        if self._started is None or self._started[0] != key:
            rounds = None if fields["start"] == "update" else self.grid["settings"]["start_rounds"]
            sites = lotr.init_from_data(model, seen, kind=fields["start"], rounds=rounds, seed=run["seed"])
            kept = sum(site.kept for site in sites) / len(sites)
            self._started = key, {n: p.detach().clone() for n, p in factors.items()}, kept
        _, found, kept = self._started
        with torch.no_grad():
            for name, parameter in factors.items():
                parameter.copy_(found[name])
        return kept


def train(
    model: nn.Module,
    groups: list[dict[str, Any]],
    task: Task,
    seed: int,
    warmup: float,
    look: Callable[[int], None] = lambda step: None,
    steps: int | None = None,
) -> int:
    """Train for some steps.

    Args:
        model: In any mode; it is in training mode afterwards.
        groups: Parameter groups with their rates.
        task: Gives the batches.
        seed: Decides their order, and dropout.
        warmup: Share of the steps in which the rates rise.
        look: Called after every step.
        steps: Default: as many as the task has.

    Returns:
        The step at which the loss was no longer finite, where training stopped; else 0.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    steps = steps or task.steps
    rise = math.ceil(warmup * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (rise + 1), (steps - step) / max(1, steps - rise))
    )
    set_seed(seed)
    batches = task.batches(seed)
    model.train()
    for step in range(1, steps + 1):
        loss = model(**next(batches)).loss
        if not math.isfinite(float(loss.detach())):
            return step
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        look(step)
    return 0


def _go_on_from(model: nn.Module, folder: Path) -> None:
    """Copy the numbers of a saved adapter, its head left out."""
    saved = load_file(folder / "adapter_model.safetensors")
    head = {name: t for name, t in peft.get_peft_model_state_dict(model).items() if ".classifier." in name}
    peft.set_peft_model_state_dict(model, saved | head)


def _numbers(model: nn.Module) -> int:
    """Return how many numbers of the adapter are trained, the head left out: it is the same for all."""
    return sum(
        p.numel() for n, p in model.named_parameters() if p.requires_grad and ".modules_to_save." not in n
    )
