"""`lotr compress` beside the packages that share factors among LoRAs: error, score, time and memory at three sizes.

    python benchmarks/compress_peers.py --data FOLDER --json out/compress_peers.json

Thirty-two LoRAs of rank 8 on MiniLM, sixteen tasks trained from two starts (`compress_loras.py`), on query and value
and on all linear modules, without heads, which one of the packages drops. Sizes are shares of the LoRAs' bytes; all
files of a result count, and everything is float32. Each package has as many components as fit into the size; `lotr`
has `max_bytes` (`lotr_diagonal`: with diagonal cores). A run is a process of its own: its time is that of reading the
adapters, fitting and writing, its memory the peak beyond what it had after its imports. Errors and scores are those of
what is read back.

The packages are looked for in build/peers, where `make bench-loras` puts them; without them theirs are left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import lotr
from real_loras import WEIGHTS, Family, Pairs, Results, Row, error_of, mean, options, pairs_of
from records import calm, fill, markdown, peak_mb, write

PEERS = Path("build/peers")
SHARES = (1 / 8, 1 / 4, 1 / 2)
COLUMNS = {"bytes": ",", "error": ".3f", "score": ".3f", "seconds": ".1f", "memory_mb": ".0f"}
OURS, PACKAGES = ("lotr", "lotr_diagonal"), ("vlora", "lorashare")


def fit(which: str, size: int, folders: list[str], output: Path) -> None:
    """Compress adapters into a folder, `size` being components or bytes."""
    if which in OURS:
        core = "diagonal" if which == "lotr_diagonal" else "free"
        lotr.compress(folders, output, "minilm", max_bytes=size, core=core, dtype="float32")
    elif which == "vlora":
        import vlora

        vlora.SharedSubspace.from_adapters(
            [vlora.load_adapter(folder) for folder in folders],
            [Path(folder).name for folder in folders],
            num_components=size,
        ).save(output)
    else:
        import lorashare

        named = {Path(folder).name: folder for folder in folders}
        lorashare.SHAREModel.from_adapters(named, num_components=size).save_pretrained(output)


def read_back(which: str, output: Path, names: list[str], place: Path) -> dict[str, Pairs]:
    """Return the LoRAs that a result holds."""
    for name in names:
        if which in OURS:
            with lotr.CoreBank.open(output) as bank:
                bank.export(name, place / name, as_lora=True)
        elif which == "vlora":
            import vlora

            vlora.save_adapter(vlora.SharedSubspace.load(output).reconstruct(name), place / name)
        else:
            import lorashare

            lorashare.SHAREModel.from_pretrained(output).reconstruct(name, place / name)
    return {name: pairs_of(place / name) for name in names}


def one(which: str, size: int, source: Path, output: Path) -> None:
    """Run once in this process, and print what it took."""
    calm()
    if which in PACKAGES:
        __import__(which)
    else:  # loads every library
        few = sorted(map(str, source.iterdir()))[:2]
        lotr.compress(few, output.with_name("first"), "minilm", rank=1, overwrite=True)
    shutil.rmtree(output, ignore_errors=True)
    before, begun = peak_mb(), time.perf_counter()
    fit(which, size, sorted(map(str, source.iterdir())), output)
    seconds = time.perf_counter() - begun
    memory = peak_mb() - before
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(json.dumps({"bytes": size, "seconds": round(seconds, 2), "memory_mb": round(memory, 1)}))


def in_a_process(which: str, size: int, source: Path, output: Path) -> Row:
    call = [sys.executable, __file__, "--one", which, str(size), str(source), str(output)]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def fitted(which: str, size: int, source: Path, output: Path) -> Row:
    """Return the run whose files take as much of a size as they can."""
    if which in OURS:
        asked = size
        while True:
            row = in_a_process(which, asked, source, output)
            if row["bytes"] <= size:
                return row | {"asked": asked}
            asked -= row["bytes"] - size
    few, more = (in_a_process(which, k, source, output)["bytes"] for k in (1, 3))
    components = 1 + int((size - few) / ((more - few) / 2))
    return in_a_process(which, components, source, output) | {"components": components}


def plain(folder: Path, place: Path, **config: Any) -> Path:
    """Write a LoRA without its head, with `alpha` in `B`, which one of the packages leaves out."""
    place.mkdir(parents=True, exist_ok=True)
    fields = json.loads((folder / "adapter_config.json").read_text())
    fields |= {"modules_to_save": None, "lora_alpha": fields["r"]}
    tensors = {}
    for module, (A, B) in pairs_of(folder).items():
        key = f"base_model.model.{module}"
        tensors |= {f"{key}.lora_A.weight": A.contiguous(), f"{key}.lora_B.weight": B.contiguous()}
    save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
    (place / "adapter_config.json").write_text(json.dumps(fields | config))
    return place


def odd_adapters(source: Path, folder: Path, place: Path) -> dict[str, Path]:
    """Write three folders of two adapters each: of mixed ranks, with missing targets, with heads."""
    names = sorted(path.name for path in source.iterdir())[:2]
    for case in ("mixed ranks", "missing targets", "heads"):
        for name in names:
            shutil.copytree(source / name, place / case / name, dirs_exist_ok=True)
    shorter, fewer = (place / case / names[0] for case in ("mixed ranks", "missing targets"))
    tensors = load_file(shorter / WEIGHTS)
    save_file(
        {k: (t[:4] if "lora_A" in k else t[:, :4]).contiguous() for k, t in tensors.items()},
        shorter / WEIGHTS,
    )
    plain(shorter, shorter, r=4, lora_alpha=4)
    save_file({k: t for k, t in tensors.items() if ".query." in k}, fewer / WEIGHTS)
    plain(fewer, fewer, target_modules=["query"])
    head = {k: t for k, t in load_file(folder / WEIGHTS).items() if ".lora_" not in k}
    save_file(tensors | head, place / "heads" / names[0] / WEIGHTS)
    return {case: place / case for case in ("mixed ranks", "missing targets", "heads")}


def answer(which: str, source: Path, place: Path) -> Row:
    """Return what becomes of adapters that differ: an error of what is read back, or a refusal."""
    shutil.rmtree(place, ignore_errors=True)
    names = sorted(path.name for path in source.iterdir())
    try:
        fit(which, 10**8 if which in OURS else 2, [str(source / name) for name in names], place / "out")
        after = read_back(which, place / "out", names, place / "back")
    except Exception as error:  # any kind is an answer
        return {"answer": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
    wrote = [key for name in names for key in _keys(place / "back" / name) if ".lora_" not in key]
    error = error_of({name: pairs_of(source / name) for name in names}, after)
    had = [key for name in names for key in _keys(source / name) if ".lora_" not in key]
    return {"answer": "taken", "error": error, "heads": f"{len(wrote)} of {len(had)} tensors"}


def _keys(folder: Path) -> list[str]:
    return list(load_file(folder / WEIGHTS))


def compare(given: argparse.Namespace, targets: str | None, packages: list[str], results: Results) -> None:
    """Measure everything that is missing for adapters of some modules."""
    families = [Family(given.work, given.data, start, targets, given.tasks) for start in ("own", "one")]
    folders = {f"{f.start}-{task}": path for f in families for task, path in f.folders.items()}
    work = given.work / "peers" / str(targets)
    for name, folder in folders.items():
        plain(folder, work / "loras" / name)
    before = {name: pairs_of(work / "loras" / name) for name in folders}
    whole = sum(4 * (A.numel() + B.numel()) for own in before.values() for A, B in own.values())

    def measured(which: str, share: float) -> Row:
        row = fitted(which, int(whole * share), work / "loras", work / which)
        shutil.rmtree(work / "back", ignore_errors=True)
        after = read_back(which, work / which, list(before), work / "back")
        scores: dict[str, float] = {}
        for family in families:
            own = {task: after[f"{family.start}-{task}"] for task in family.folders}
            scores |= {f"{family.start}-{task}": s for task, s in family.scores_with(own).items()}
        error = round(error_of(before, after), 4)
        return row | {"error": error, "score": round(mean(scores), 4), "scores": scores}

    for share in SHARES:
        for which in (*OURS, *packages):
            key = {"targets": targets or "query,value", "what": which, "share": share}
            results.get(key, partial(measured, which, share))
    if targets is None:
        odd = odd_adapters(work / "loras", next(iter(folders.values())), work / "odd")
        for case, place in odd.items():
            for which in ("lotr", *packages):
                results.get({"case": case, "what": which}, partial(answer, which, place, work / "answer"))


def main() -> None:
    parser = options(__doc__ or "", 16)
    parser.add_argument("--one", nargs=4, help="one run, in this process")
    given = parser.parse_args()
    sys.path.append(str(PEERS))
    if given.one:
        which, size, source, output = given.one
        one(which, int(size), Path(source), Path(output))
        return
    calm()
    torch.set_num_threads(1)
    packages = [name for name in PACKAGES if (PEERS / name).is_dir()]
    if len(packages) < len(PACKAGES):
        print(f"Left out, for {PEERS} has them not: {', '.join(set(PACKAGES) - set(packages))}")
    results = Results(given.work / "peers.jsonl")
    for targets in (None, "all-linear"):
        compare(given, targets, packages, results)
    lines = tables(results.rows)
    print("\n".join(lines))
    if given.json:
        write(given.json, results.rows)
    if given.page:
        fill(given.page, "peers", lines)


def tables(rows: list[Row]) -> list[str]:
    """Return a table of sizes and one of adapters that differ, in Markdown."""
    body = [
        [
            row["targets"],
            row["what"],
            f"1/{round(1 / row['share'])}",
            *(f"{row[name]:{form}}" for name, form in COLUMNS.items()),
        ]
        for row in rows
        if "targets" in row
    ]
    answers = [
        [row["case"], row["what"], row["answer"], f"{row.get('error', ''):.2}", row.get("heads", "")]
        for row in rows
        if "case" in row
    ]
    return [
        *markdown(["targets", "what", "size", *COLUMNS], body, left=2),
        "",
        *markdown(["adapters", "what", "answer", "error", "heads read back"], answers, left=3),
    ]


if __name__ == "__main__":
    main()
