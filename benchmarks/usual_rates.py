"""What LoRA's usual rate does to LoTR: MiniLM on docstrings, 100 steps; the table of docs/from_lora.md.

python benchmarks/usual_rates.py    # 8 runs, one line each; about half a minute a run on one core
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, set_seed

import lotr
from quality_training import Task, minilm
from records import calm

STEPS, HEAD_RATE, SEED = 100, 1e-2, 0
LAYERS = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "r": 16}


def train(task: Task, config: PeftConfig | None, rate: float) -> tuple[float, float]:
    """Train with one rate for the adapter and a linear fall; return the loss of the last 20 steps and dev accuracy."""
    set_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=16)
    if config is None:
        model.requires_grad_(False).classifier.requires_grad_(True)
    else:
        model = get_peft_model(model, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if "classifier" in name]
    rest = [p for name, p in trained.items() if "classifier" not in name]
    groups = [{"params": head, "lr": HEAD_RATE}, *([{"params": rest, "lr": rate}] if rest else [])]
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (STEPS - step) / STEPS)
    losses = []
    model.train()
    set_seed(SEED)
    for batch in itertools.islice(task.batches(SEED), STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss))
    with torch.autocast("cpu", torch.bfloat16):
        return sum(losses[-20:]) / 20, task.accuracy(model, task.dev[:400])


def main() -> None:
    """Print a line a run."""
    calm()
    grid = yaml.safe_load((Path(__file__).parent / "quality.yaml").read_text())
    task = Task(grid["tasks"]["docstrings"], "minilm", Path("x"))
    runs: list[tuple[str, PeftConfig | None, float]] = [("head alone", None, 2e-4)]
    runs += [
        (f"LoRA, lora_alpha={alpha}", LoraConfig(lora_alpha=alpha, **LAYERS), 2e-4) for alpha in (16, 32)
    ]
    runs += [(f"LoTR, scaling={s}", lotr.LotrConfig(scaling=s, **LAYERS), 2e-4) for s in (1, 8, 16, 32)]
    runs += [("LoTR, scaling=1, at 3e-3", lotr.LotrConfig(**LAYERS), 3e-3)]
    for name, config, rate in runs:
        loss, accuracy = train(task, config, rate)
        print(f"{name}: loss {loss:.3f}, accuracy {accuracy:.3f}", flush=True)


if __name__ == "__main__":
    main()
