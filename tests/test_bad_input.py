"""What a user can get wrong: one readable message, the right exit code, nothing lost."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import banks
import saved_models
from commands import lotr, refused, report, training
from lotr.files.adapter_folder import CONFIG, TASK, WEIGHTS, write_config, write_task

USUAL = "train --model bert --train train.csv --output o"
#: Words behind the usual ones (the last of an option counts), the exit code, and what the message holds.
TRAIN = [
    # names
    ("--model ./brt", 2, "brt does not exist", "Near matches: bert"),
    ("--model /no/such/folder", 2, "does not exist"),
    ("--model no-such-model", 2, "'no-such-model' cannot be loaded", "`minilm`"),
    ("--model no/such", 2, "'no/such'", "it is no local folder, and the hub cannot be reached."),
    ("--train trian.csv", 1, "trian.csv", "train.csv"),
    ("--train train.cvs", 1, "There is no file train.cvs. Near matches: train.csv"),
    ("--method lort", 2, "'lort'", "lotr"),
    ("--target-modules querry", 2, "'querry'", "query"),
    ("--target-modules [query", 2, "'[query'", "regex"),
    ("--target-modules x.*y", 2, "'x.*y'", "encoder.layer.0"),
    ("--modes layers", 2, "'layers'", "layer"),
    ("--trainable core", 2, "trainable='core' is not known. Near matches: cores"),
    ("--dtype floatt32", 2, "'floatt32'", "float32"),
    ("--task clasification", 2, "'clasification'", "classification"),
    ("--report-to tensorbord", 2, "'tensorbord'", "tensorboard."),
    ("--basis nowhere/at/all", 1, "basis='nowhere/at/all' cannot be read: Adapter folder nowhere/at/all"),
    # numbers
    ("--max-length 65", 2, "max_length=65", "64 tokens"),
    *((f"--rank={rank}", 2, f"rank='{rank}' is not a rank") for rank in ("0", "-4", "four", "4,4,4")),
    ("--max-steps -5", 2, "max_steps=-5"),
    ("--epochs 0", 2, "epochs=0.0"),
    ("--epochs inf", 2, "epochs=inf is out of range. Use a number of at most 1,000,000."),
    ("--epochs nan", 2, "epochs=nan trains nothing"),
    ("--weight-decay inf", 2, "weight_decay=inf is out of range. Use a number from 0 to 1,000,000."),
    ("--adam-beta2 1", 2, "adam_beta2=1.0 is out of range. Use a number from 0 to 0.999999."),
    ("--scaling inf", 2, "scaling=inf"),
    ("--warmup 2", 2, "warmup=2.0"),
    # what has no meaning beside something else
    ("--method peft_lora --init gradient", 2, "init='gradient' has no meaning with method='peft_lora'"),
    ("--method peft_lora --start-batches 4", 2, "start_batches=4 has no meaning with method='peft_lora'"),
    ("--method peft_lora --rank 2,4", 2, "LoRA has one rank"),
    ("--core tucker --core-ranks layer=x", 2, "core_ranks='layer=x' holds no ranks"),
    ("--init lora", 2, "lotr.init_from_lora(model, folder)"),
    ("--alpha 4 --scaling 2", 2, "say one number twice"),
    ("--method peft_lora --alpha 4", 2, "alpha=4.0 has no meaning with method='peft_lora'"),
    ("--method head --target-parameters experts.w", 2, "target_parameters='experts.w' has no meaning"),
    ("--rank auto", 2, "rank='auto' with budget=None", "go together", "--budget"),
    ("--budget 700", 2, "rank='16' with budget=700", "go together", "--rank auto"),
    ("--rank auto --budget 0", 2, "budget=0 trains nothing"),
    ("--rank auto --budget 100", 2, "less than rank 1 trains: 132 numbers"),
    ("--rank auto --budget 700 --method peft_lora", 2, "has no meaning with method='peft_lora'"),
    ("--rank auto --budget 700 --basis adapter", 2, "those of basis='adapter' are kept"),
    ("--basis adapter --method dora", 2, "method='dora' contradicts basis"),
    ("--basis adapter --rank 8", 2, "r=8 contradicts basis"),
    ("--basis adapter --rank 16", 2, "r=16 contradicts basis"),  # a default that is named is no default
    ("--basis adapter --init gradient", 2, "init='gradient' contradicts basis"),
    ("--basis adapter --trainable all", 2, "trainable='all' contradicts basis"),
    ("--basis adapter --target-modules key", 2, "no factors for group 'key"),
    ("--basis lora", 2, "it cannot be a basis"),
    ("--basis second", 1, "adapter'. Name that one"),
    # data
    ("--train empty.csv", 1, "empty.csv"),
    ("--train header.csv", 1, "header.csv"),
    ("--text sentence", 1, '"sentence"', "text, label", "--text"),
    ("--eval purple.csv", 1, "purple"),
    # an encoder is not trained to write text
    ("--task causal-lm", 2, "no causal language model", "--label"),
    ("--train other.csv --text sentence", 2, "no causal language model", "--label"),
    # the output
    ("--output notes.txt/o", 1, "notes.txt"),
    ("--output notes", 2, "--overwrite"),
]
#: Other calls, the exit code, and what the message holds.
OTHERS = [
    ("train --train train.csv --output o", 2, "--model"),
    ("train --config typo.yaml", 2, "rank"),
    ("train --config many.yaml", 2, "epochs"),
    ("train --config none.yaml", 2, "none.yaml cannot be read: No such file"),
    ("train --resume", 2, "--output"),
    ("train --resume --output nowhere", 2, "no unfinished run in nowhere"),
    ("plan bert --basis adapter --target-modules query,value,key", 2, "has no factors for group"),
    ("plan bert --start-batches 0", 2, "start_batches=0 trains nothing"),
    (
        "plan llama --modes layer,projection --target-modules q_proj,down_proj",
        2,
        "q_proj|down_proj",
        "(32, 32) and (32, 64)",
        'drop "projection"',
    ),
    ("evaluate adaptr --data train.csv", 1, "Near matches: adapter"),
    ("evaluate adapter --data purple.csv", 1, "purple"),
    ("evaluate adapter --data train.csv --batch-size 1000000000", 2, "--batch-size", "1000000"),
    ("evaluate adapter --data other.csv", 1, "--text"),
    ("evaluate adapter --data train.csv --model other", 1, "fingerprint", "bert"),
    ("evaluate adapter --data train.csv --model deeper", 1, "fingerprint"),
    ("evaluate bank --data train.csv", 1, "is a bank", "lotr predict", "lotr bank export"),
    ("inspect bank", 1, "is a bank", "lotr bank export"),
    ("export bank --output out", 1, "is a bank", "lotr bank export"),
    ("bank add bank bank", 1, "is a bank", "lotr bank export"),
    ("evaluate stopped --data train.csv", 1, "lotr train --resume --output"),
    ("export head --output o", 1, "head alone"),
    ("export adapter --output adapter --overwrite", 2, "would be overwritten"),
    ("predict adapter --data other.csv --output other.csv --overwrite", 2, "is the data"),
    ("predict adapter --data train.csv --output purple.csv", 2, "--overwrite"),
    ("predict adapter --data answered.csv --output o.csv", 1, '"prediction"'),
]


@pytest.fixture(scope="module")
def home(place: Path) -> Path:
    """The folder in which all the names above lie."""
    small = ("--max-steps", "1", "--rank", "2", "--output")
    lotr(*training(place), *small, place / "adapter")
    lotr(*training(place), *small, place / "head", "--method", "head")
    lotr(*training(place), *small, place / "lora", "--method", "lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        report(*training(Path()), "--max-steps", "1", "--basis", "adapter", "--output", "second")
        report("export", "adapter", "--output", "exported")
    saved_models.save_bert(place / "other", seed=1)
    saved_models.save_bert(place / "deeper", layers=3)
    saved_models.save_llama(place / "llama")
    saved_models.write_colours(place / "purple.csv", rows=12, labels=("red", "purple"))
    banks.bank(place, tasks=1).close()
    (place / "stopped" / "checkpoints").mkdir(parents=True)
    _, _, rows = (place / "dev.csv").read_text().partition("\n")
    (place / "notes").mkdir()
    for name, content in {
        "other.csv": f"sentence,colour\n{rows}",
        "empty.csv": "",
        "header.csv": "text,label\n",
        "answered.csv": "text,prediction\nred thing,mine\n",
        "typo.yaml": "rnak: 3\n",
        "many.yaml": "epochs: many\n",
        "notes.txt": "mine",
        "notes/mine.txt": "mine",
    }.items():
        (place / name).write_text(content)
    return place


def _everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def untouched(home: Path) -> dict[Path, bytes]:
    return _everything(home)


@pytest.mark.parametrize("case", [*((f"{USUAL} {more}", *rest) for more, *rest in TRAIN), *OTHERS])
def test_what_cannot_be_is_refused_in_one_message_and_leaves_all_as_it_was(
    home: Path, untouched: dict[Path, bytes], monkeypatch: pytest.MonkeyPatch, case: tuple[Any, ...]
) -> None:
    line, code, *says = case
    monkeypatch.chdir(home)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = refused(code, *line.split())
    assert all(part in text for part in says), text
    assert _everything(home) == untouched


def test_usage_errors_exit_with_two() -> None:
    assert lotr("train", "--no-such-option").exit_code == lotr("no-such-command").exit_code == 2


def test_overwriting_keeps_other_files(home: Path, tmp_path: Path) -> None:
    commands = (*training(home), "--max-steps", "1", "--rank", "2"), ("export", home / "adapter")
    for command in commands:
        (tmp_path / "notes.txt").write_text("mine")
        report(*command, "--output", tmp_path, "--overwrite")
        assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / WEIGHTS).is_file()


def test_nan_stops_the_run_says_where_and_keeps_the_last_good_checkpoint(place: Path, tmp_path: Path) -> None:
    rates = [word for name in ("--lr", "--core-lr", "--head-lr") for word in (name, "1e30")]
    words = (*rates, "--warmup", "0.9", "--head-warmup", "0", "--max-steps", "20", "--eval-steps", "1")
    text = refused(1, *training(place), *words, "--rank", "2", "--output", tmp_path / "o")
    assert "at step" in text and not (tmp_path / "o" / WEIGHTS).exists()
    checkpoints = sorted((tmp_path / "o" / "checkpoints").glob("checkpoint-*"))
    assert checkpoints[-1].name in text
    assert all(t.isfinite().all() for path in checkpoints for t in load_file(path / WEIGHTS).values())


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def _fields(**change: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        write_config(folder, {**json.loads((folder / CONFIG).read_text()), **change})
        write_task(folder, json.loads((folder / TASK).read_text()))  # with the checksum of what it is now

    return edit


def _lose_a_core(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    core = next(key for key in tensors if "lotr_C" in key and "query" in key)
    save_file({key: value for key, value in tensors.items() if key != core}, folder / WEIGHTS)
    write_task(folder, json.loads((folder / TASK).read_text()))


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def _flip(name: str) -> Callable[[Path], object]:
    """Another digit in a file of JSON that stays readable."""
    return lambda folder: (folder / name).write_text(
        re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), (folder / name).read_text(), count=1)
    )


TRUNCATED = [(_bytes(lambda content, n=n: content[:n]), "truncated or damaged") for n in (0, 7, 100, -1)]
DAMAGED = [
    *TRUNCATED,
    (_bytes(lambda c: c[:8] + b"\xff" * 32 + c[40:]), "truncated or damaged"),
    (_bytes(lambda c: c[:-5] + bytes([c[-5] ^ 1]) + c[-4:]), "checksum"),
    *((_flip(name), "checksum") for name in (CONFIG, TASK)),
    (_lose_a_core, "missing|not whole"),
    (_pickle, "never read"),
    (_fields(r=0), "r=0"),
    (_fields(method="lort"), "lort"),
    (_fields(modes=["depth"]), "depth"),
    (_fields(peft_type="NONE"), "NONE"),
    (lambda folder: (folder / CONFIG).write_text("{"), "damaged"),
]


@pytest.mark.parametrize(
    "command, damage, says",
    [
        (
            "evaluate",
            _fields(r=3),
            "does not fit.*size mismatch.*is not the one that was saved with it.*name that one",
        ),
        *((command, damage, says) for damage, says in DAMAGED for command in ("evaluate", "export")),
    ],
)
def test_a_damaged_adapter_is_refused(
    home: Path, tmp_path: Path, damage: Any, says: str, command: str
) -> None:
    adapter = Path(shutil.copytree(home / "adapter", tmp_path / "adapter"))
    damage(adapter)
    more = ("--data", home / "train.csv") if command == "evaluate" else ("--output", tmp_path / "lora")
    result = lotr(command, adapter, *more)
    assert result.exit_code in (1, 2) and "Unexpected" not in result.stderr
    assert re.search(says, " ".join(result.stderr.split())), result.stderr


def test_debug_shows_the_traceback(place: Path) -> None:
    result = lotr("--debug", "evaluate", place / "nowhere", "--data", place / "train.csv")
    assert result.exit_code == 1 and "Traceback" in result.stderr


def test_predictions_change_nothing_in_the_rows(home: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text,id,price\nred thing,1234567890123456789,1.50\n")
    report("predict", home / "adapter", "--data", tmp_path / "in.csv", "--output", tmp_path / "out.csv")
    assert "red thing,1234567890123456789,1.50," in (tmp_path / "out.csv").read_text()


def test_columns_may_be_called_otherwise_than_in_training(home: Path, tmp_path: Path) -> None:
    named = ("--data", home / "other.csv", "--text", "sentence")
    other = report("evaluate", home / "adapter", *named, "--label", "colour")
    plain = report("evaluate", home / "adapter", "--data", home / "dev.csv")
    assert other["confusion"] == plain["confusion"]
    assert report("predict", home / "adapter", *named, "--output", tmp_path / "p.jsonl")["rows"] == 48


def test_a_length_left_open_is_what_the_model_takes(home: Path) -> None:
    assert json.loads((home / "adapter" / TASK).read_text())["max_length"] == 64  # and not 128
