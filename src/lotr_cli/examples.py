"""The examples that end each command's help; run from top to bottom they all work."""

from __future__ import annotations

EXAMPLES = {
    "train": (
        "lotr train --model minilm --train docstrings --output runs/first",
        "lotr train --model minilm --train docstrings --rank 8 --target all-linear --epochs 1 --output runs/second",
        "lotr train --model minilm --train docstrings --method metatt_5d --output runs/tensor-train",
        "lotr train --model minilm --train docstrings --magnitude per_output --output runs/scaled",
        "lotr train --model minilm --train docstrings --start gradient --head-warmup 20 --output runs/turned",
        "lotr train --train other.csv --basis runs/first --output runs/other-task  # cores alone",
        "lotr train --config runs/first/settings.json --seed 1 --output runs/again",
        "lotr train --resume --output runs/first  # after ctrl-C",
    ),
    "evaluate": (
        "lotr evaluate runs/first --data docstrings",
        "lotr evaluate runs/first --data docstrings --json",
    ),
    "predict": (
        "lotr predict runs/first --data docstrings --output predictions.csv",
        "lotr predict runs/first --data docstrings --output predictions.jsonl --batch-size 128",
    ),
    "plan": (
        "lotr plan minilm",
        "lotr plan minilm --rank 32 --target all-linear --method lotr_joint",
        "lotr plan minilm --method tenslora_att_qkv_depth --core-ranks 4 --target query,key,value",
        "lotr plan minilm --target all-linear --explain --tokens 4096",
        "lotr plan minilm --rank 64 --json",
    ),
    "inspect": ("lotr inspect runs/first", "lotr inspect runs/first --json"),
    "merge": ("lotr merge runs/first --output plain-model",),
    "export": ("lotr export runs/first --output plain-lora",),
    "methods": ("lotr methods", "lotr methods --json"),
}


def epilog(command: str) -> str:
    """Return the examples of a command as its help shows them."""
    return "**Examples**\n\n" + "\n\n".join(f"`{line}`" for line in EXAMPLES[command])
