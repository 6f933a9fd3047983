"""The examples that end each command's help; run from top to bottom they all work."""

from __future__ import annotations

EXAMPLES = {
    "train": (
        "lotr train --model minilm --train docstrings --output runs/first",
        "lotr train --model minilm --train docstrings --target-modules all-linear --epochs 1 --output runs/second",
        "lotr train --model minilm --train docstrings --method metatt_5d --output runs/tensor-train",
        "lotr train --model minilm --train docstrings --init gradient --head-warmup 20 --output runs/turned",
        "lotr train --model minilm --train docstrings --init gradient --rank auto --budget 9216 --output runs/9k",
        "lotr train --train other.csv --basis runs/first --output runs/other-task  # cores alone",
        "lotr train --config runs/first/settings.json --seed 1 --output runs/again",
        "lotr train --resume --output runs/first  # after ctrl-C",
    ),
    "evaluate": ("lotr evaluate runs/first --data docstrings",),
    "predict": (
        "lotr predict runs/first --data docstrings --output predictions.csv",
        "lotr predict runs/bank --data tickets.csv --output answers.csv --task tickets",
        "lotr predict runs/bank --data mixed.csv --output mixed-answers.csv --task-column queue",
    ),
    "serve": (
        "lotr serve runs/bank",
        "lotr serve runs/bank --port 9000 --max-batch 64 --token secret --admin-token more-secret",
    ),
    "plan": (
        "lotr plan minilm",
        "lotr plan minilm --rank 32 --target-modules all-linear --method lotr_joint",
        "lotr plan minilm --method tenslora_att_qkv_depth --core-ranks 4 --target-modules query,key,value",
        "lotr plan minilm --rank auto --budget 9216",
        "lotr plan minilm --compress 100 --rank 16",
    ),
    "inspect": ("lotr inspect runs/first --json",),
    "merge": ("lotr merge runs/first --output plain-model",),
    "export": ("lotr export runs/first --output plain-lora",),
    "compress": (
        "lotr compress plain-lora runs/first --output runs/compressed --rank 16",
        "lotr compress 'runs/*' --output runs/small --max-error 0.2 --json",
        "lotr compress adapters.txt --base minilm --output runs/from-list --max-bytes 20MB --modes task,layer",
        "lotr compress runs/compressed --add runs/second runs/turned",
        "lotr compress runs/first --output runs/first-rank-8 --rank 8",
    ),
    "methods": ("lotr methods",),
    "bank create": ("lotr bank create runs/bank --basis runs/first --dtype float32",),
    "bank add": (
        "lotr bank add runs/bank runs/first runs/other-task",
        "lotr bank add runs/bank runs/other-task --task reviews",
        "lotr bank add runs/bank --task tickets --train tickets.csv --epochs 5",
    ),
    "bank train": (
        "lotr bank train --basis runs/first --tasks tasks.yaml --output runs/bank",
        "lotr bank train --tasks more-tasks.yaml --output runs/bank --sampling temperature --temperature 3",
        "lotr bank train --resume --output runs/bank  # after ctrl-C",
    ),
    "bank list": ("lotr bank list runs/bank", "lotr bank list runs/bank --after other --limit 10 --json"),
    "bank show": ("lotr bank show runs/bank reviews",),
    "bank rename": ("lotr bank rename runs/bank reviews film-reviews",),
    "bank verify": ("lotr bank verify runs/bank",),
    "bank recover": ("lotr bank recover runs/bank --output runs/new-bank",),
    "bank export": (
        "lotr bank export runs/bank film-reviews --output film-reviews",
        "lotr bank export runs/bank film-reviews --output film-reviews-lora --lora",
    ),
    "bank stats": ("lotr bank stats runs/bank",),
    "bank remove": ("lotr bank remove runs/bank film-reviews",),
}
