"""`lotr compress` beside tensorly's `partial_tucker` on the dense stack, and at 100 to 10,000 adapters.

    python benchmarks/bench_compress.py --json out/bench_compress.json

*Dense*: query and value of BERT-base, 32 LoRAs of rank 8, one stack a module. Every run is a process of its own; memory
is its peak beyond what it had before the first stack. tensorly has the stack written out, as it needs it; ours has
`B` and `A`. Errors of both are computed by one function, in double.

*Many*: LoRAs of rank 8 on query and value of a model of MiniLM's shape (6 layers, 384 wide), from folders to a bank.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from records import peak_mb, show, write

Row = dict[str, Any]
TASKS, WIDTH, RANK = 32, 768, 8
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


def stack(
    module: int, first: int = 0, tasks: int = TASKS, width: int = WIDTH
) -> tuple[Tensor, Tensor]:  # (n, d, q), (n, q, d)
    """LoRAs of some tasks for one module: they share 24 directions a side, and have noise of their own."""
    of_module = torch.Generator().manual_seed(module)
    generator = torch.Generator().manual_seed(1000 * (1 + module) + first)

    def side() -> Tensor:
        common = torch.linalg.qr(torch.randn(width, 24, generator=of_module)).Q
        mixed = common @ torch.randn(tasks, 24, RANK, generator=generator) / RANK
        return mixed + 0.6 * torch.randn(tasks, width, RANK, generator=generator) / width**0.5

    return side(), side().mT.contiguous()


def error_of(B: Tensor, A: Tensor, U: Tensor, V: Tensor) -> float:
    from lotr.compression.fit import project

    B, A = B.double(), A.double()
    Q_U, Q_V = (torch.linalg.qr(factor.double()).Q for factor in (U, V))
    lost = project(B, A, Q_U, Q_V)[1].sum()
    return float((lost / ((B.mT @ B) * (A @ A.mT)).sum()) ** 0.5)


def added_up(B: Tensor, A: Tensor, add_up: Callable[[Iterator[Any]], Any]) -> Any:
    """Run a pass of the fit over one module's updates, eight tasks at a time."""
    pairs = zip(B.split(8), A.split(8), strict=True)
    return add_up({"module": [(own_B.double(), own_A.double())]} for own_B, own_A in pairs)


def dense_run(which: str, rank: int, modules: int) -> Row:
    """Fit some modules, one after the other, and report time, memory and error."""
    import tensorly as tl
    from tensorly.decomposition import partial_tucker

    from lotr.compression import fit

    tl.set_backend("pytorch")
    for decompose in (torch.linalg.eigh, torch.linalg.qr, torch.linalg.svd):  # loads the library
        decompose(torch.eye(8).double()[None])
    fitted, seconds, before = [], 0.0, peak_mb()
    for module in range(modules):
        B, A = stack(module)
        begun = time.perf_counter()
        if which == "lotr":
            total = partial(added_up, B, A)
            fits = fit.directions({"module": (WIDTH, WIDTH)}, total)
            fit.begin(fits, {"module": (rank, rank)}, total)
            while not fit.is_settled(fits["module"], 1e-4):
                fit.sweep(fits, total)
            U, V = fits["module"].factors((rank, rank))
            del fits, total  # of one module, as tensorly holds one
        else:
            (_, (U, V)), _ = partial_tucker(B @ A, [rank, rank], modes=[1, 2], n_iter_max=100, tol=1e-4)
        seconds += time.perf_counter() - begun
        fitted.append((U, V))
    memory = peak_mb() - before
    errors = [error_of(*stack(module), U, V) for module, (U, V) in enumerate(fitted)]
    mean = (sum(error**2 for error in errors) / len(errors)) ** 0.5
    return {"rank": rank, "which": which, "seconds": seconds, "memory_mb": memory, "error": mean}


def save_loras(folder: Path, n: int) -> None:
    """Save LoRAs as PEFT does, without making a model for each."""
    from peft import LoraConfig

    paths = [f"encoder.layer.{i}.attention.self.{p}" for i in range(6) for p in ("query", "value")]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["query", "value"]).to_dict()
    config = json.dumps({**config, "base_model_name_or_path": "minilm-shape"}, default=sorted)
    width = MINILM["hidden_size"]
    for at in range(0, n, 50):
        sides = {path: stack(m, at, 50, width) for m, path in enumerate(paths)}
        for t in range(min(50, n - at)):
            own = folder / f"task-{at + t:05d}"
            own.mkdir(parents=True)
            tensors = {}
            for path, (B, A) in sides.items():
                tensors[f"base_model.model.{path}.lora_A.weight"] = A[t].clone()
                tensors[f"base_model.model.{path}.lora_B.weight"] = B[t].clone()
            save_file(tensors, own / "adapter_model.safetensors", metadata={"format": "pt"})
            (own / "adapter_config.json").write_text(config)


def many_run(folder: Path, n: int, rank: int) -> Row:
    """Compress the first adapters of a folder into a bank."""
    from transformers import BertConfig, BertModel

    import lotr

    model = BertModel(BertConfig(**MINILM, vocab_size=1000))
    paths = sorted(folder.iterdir())[:n]
    with tempfile.TemporaryDirectory() as place:
        lotr.compress(paths[:2], Path(place) / "first", model, rank=2)  # loads every library
        before, begun, worked = peak_mb(), time.perf_counter(), time.process_time()
        report = lotr.compress(paths, Path(place) / "bank", model, rank=rank)
    seconds = time.perf_counter() - begun
    return {
        "adapters": n,
        "seconds": seconds,
        "ms_an_adapter": 1000 * seconds / n,
        "cpu_ms_an_adapter": 1000 * (time.process_time() - worked) / n,
        "memory_mb": peak_mb() - before,
        "sweeps": max(len(group["errors"]) - 1 for group in report.groups),
        "error": report.error,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
    }


def table(title: str, rows: list[Row]) -> None:
    header = list(rows[0])
    show(
        title,
        header,
        [[f"{v:,.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows],
    )


def in_a_process(*words: object) -> Row:
    call = [sys.executable, __file__, "--one", *map(str, words)]
    lines = subprocess.run(call, check=True, capture_output=True, text=True).stdout.splitlines()
    row: Row = json.loads(lines[-1])
    return row


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--modules", type=int, default=2, help="modules of the dense stack that are fitted (of 24)"
    )
    options.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64])
    options.add_argument("--adapters", type=int, nargs="+", default=[100, 1000, 10000])
    options.add_argument(
        "--folder", type=Path, help="where the adapters of `many` are kept; default: a temporary one"
    )
    options.add_argument("--json", type=Path)
    options.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.one:
        kind, *words = given.one
        row = (
            dense_run(words[0], *map(int, words[1:]))
            if kind == "dense"
            else many_run(Path(words[0]), *map(int, words[1:]))
        )
        print(json.dumps(row))
        return
    dense = [
        in_a_process("dense", which, rank, given.modules)
        for rank in given.ranks
        for which in ("lotr", "tensorly")
    ]
    table("Query and value of BERT-base, 32 LoRAs of rank 8", dense)
    folder = given.folder or Path(tempfile.mkdtemp())
    have = len(list(folder.iterdir())) if folder.is_dir() else 0
    if have < max(given.adapters, default=0):
        shutil.rmtree(folder, ignore_errors=True)
        save_loras(folder, max(given.adapters))
    many = [in_a_process("many", folder, n, 16) for n in given.adapters]
    table("MiniLM's shape, rank 16", many)
    if given.json is not None:
        write(given.json, many, dense=dense)


if __name__ == "__main__":
    main()
