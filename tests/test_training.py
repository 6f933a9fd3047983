"""The training run: stopping, going on, checkpoints, rates, and what is never left half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertForMaskedLM, TrainerState

import saved_models
from commands import CtrlC, quiet, refused, settings
from lotr import LotrConfig
from lotr.errors import ConfigError, DataError, Interrupted
from lotr.files.adapter_folder import WEIGHTS
from lotr.training import checkpoint
from lotr.training.base_model import MINILM, locate
from lotr.training.checkpoint import last_whole
from lotr.training.data import collator, encode, read, rows_of_task
from lotr.training.inference import outputs
from lotr.training.output import CURVE, METRICS, SETTINGS
from lotr.training.predict import evaluate, predict
from lotr.training.rates import parameter_groups
from lotr.training.run import train
from lotr.training.settings import TrainSettings, read_options
from lotr.training.trained import load_trained


@pytest.fixture(scope="module")
def straight(place: Path) -> bytes:
    """The weights of a run that is never stopped."""
    train(settings(place, place / "straight", dropout=0.1), say=quiet)
    return (place / "straight" / WEIGHTS).read_bytes()


def outputs_of(trained, rows):
    encoded = encode(rows, trained.tokenizer, trained.task)
    return outputs(trained.model, collator(trained.tokenizer, trained.task.task), encoded, 64)


def stopped(place: Path, output: Path, step: int = 2, **more: object) -> None:
    """A run in which ctrl-C is pressed at a step."""
    with pytest.raises(Interrupted, match="--resume"):
        train(settings(place, output, **more), say=quiet, callbacks=[CtrlC(step)])


@pytest.mark.parametrize("step", [4, 8])  # in the first epoch of five steps and in the second
def test_ctrl_c_leaves_a_whole_checkpoint_and_resume_ends_as_if_nothing_happened(
    step: int, straight: bytes, place: Path, tmp_path: Path
) -> None:
    stopped(place, tmp_path / "stopped", step, dropout=0.1)
    assert last_whole(tmp_path / "stopped" / "checkpoints").name == f"checkpoint-{step + 1}"
    assert not (tmp_path / "stopped" / WEIGHTS).exists()
    written = {path.suffix for path in (tmp_path / "stopped").rglob("*") if path.is_file()}
    assert written == {".json", ".safetensors", ".md"}  # and no pickle

    report = train(output=str(tmp_path / "stopped"), resume=True, say=quiet)
    assert report.steps == 10
    assert (tmp_path / "stopped" / WEIGHTS).read_bytes() == straight
    assert not (tmp_path / "stopped" / "checkpoints").exists()
    options = read_options({"output": str(tmp_path / "again")}, tmp_path / "stopped" / SETTINGS)
    assert not {"resume", "overwrite"} & options.keys()
    train(**options, say=quiet)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == straight


def test_ctrl_c_in_a_real_process_ends_with_130_and_the_way_on(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "o"
    words = ["train", "--model", place / "bert", "--train", place / "train.csv", "--output", output]
    words += ["--max-steps", "100000", "--eval-steps", "20", "--rank", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lotr", *map(str, words)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoints/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert "lotr train --resume --output" in " ".join(text.split())
    assert "Traceback" not in text
    checkpoint = last_whole(output / "checkpoints")
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert int(checkpoint.name.rpartition("-")[2]) == step


TASKS = ("classification", "causal-lm")
IN_TWO = """
import json, sys
from lotr.training.run import train
from lotr_cli.app import main
for run in json.loads(sys.argv.pop(1)):
    train(say=lambda line: None, **run)
main()
"""


@pytest.fixture(scope="module")
def in_two_processes(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with runs of two processes, one for each of `TASKS` and one by the command, and what that printed."""
    folder = tmp_path_factory.mktemp("two")
    runs = []
    still = partial(saved_models.save_bert, dropout=0.0)
    for task, save in zip(TASKS, (still, saved_models.save_llama), strict=True):
        save(folder / task)
        rows = saved_models.write_colours(folder / "rows.csv", rows=64)
        run = {
            "model": str(folder / task),
            "train": rows,
            "eval": rows,
            "task": task,
            "rank": "2",
            "max_steps": 6,
        }
        run |= {"head_warmup": 3 * (task == "classification"), "init": "gradient", "start_batches": 2}
        train(TrainSettings(**run, batch_size=16, output=str(folder / f"{task}-one")), say=quiet)
        runs.append({**run, "batch_size": 8, "output": str(folder / f"{task}-two")})
    saved_models.write_colours(folder / "dev.csv", rows=21, seed=1)
    words = ("--model", place / "bert", "--train", place / "train.csv", "--eval", folder / "dev.csv")
    words += ("--max-steps", "4", "--eval-steps", "2", "--rank", "2", "--batch-size", "4")
    (folder / "in_two.py").write_text(IN_TWO)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", folder / "in_two.py"]
    command = [sys.executable, *launch, json.dumps(runs), "train", *words, "--output", folder / "o", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_two_processes_train_one_adapter(in_two_processes: tuple[Path, str]) -> None:
    folder, printed = in_two_processes
    report = json.loads(printed)  # one report, from the main process
    assert (report["steps"], report["processes"]) == (4, 2)
    trained = load_trained(folder / "o")
    rows = rows_of_task(read(str(folder / "dev.csv")), trained.task)
    scores, labels = (torch.stack(part) for part in list(zip(*outputs_of(trained, rows), strict=True))[1:])
    loss = torch.nn.functional.cross_entropy(scores, labels).item()
    assert report["eval"]["loss"] == pytest.approx(loss, abs=1e-4)  # 21 rows fill no batches of two processes


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_of_8_rows_are_the_run_of_one_with_16(
    in_two_processes: tuple[Path, str], task: str
) -> None:
    """Warm-up, start from gradients, grouping by length, losses, and the numbers in the file; into a second epoch."""
    one, two = (in_two_processes[0] / f"{task}-{name}" for name in ("one", "two"))
    alone, together = (json.loads((run / METRICS).read_text()) for run in (one, two))
    assert together["processes"] == 2 and together["begun"] == alone["begun"]
    for name, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3), ("eval_loss", 1e-4)):
        ours, theirs = ([log[name] for log in run["history"] if name in log] for run in (together, alone))
        assert len(ours) >= 3 and ours == pytest.approx(theirs, rel=tolerance), name
    torch.testing.assert_close(load_file(two / WEIGHTS), load_file(one / WEIGHTS), atol=1e-4, rtol=1e-3)


def test_what_two_processes_refuse_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("train", "--model", "x", "--train", "x.csv", "--output", tmp_path / "o", "--trainable", "core")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for process, says in (("0", "trainable='core' is not known"), ("1", "")):
        monkeypatch.setenv("RANK", process)
        message = refused(2, *asked)
        assert says in message if says else "Error" not in message


def test_resume_refuses_other_settings_and_a_finished_run(place: Path, tmp_path: Path) -> None:
    stopped(place, tmp_path / "o")
    with pytest.raises(ConfigError, match="rank was '2', not '16'"):  # the default, where it is named
        train(output=str(tmp_path / "o"), resume=True, rank="16")
    train(settings(place, tmp_path / "done", max_steps=1), say=quiet)
    with pytest.raises(ConfigError, match="nothing to resume"):
        train(output=str(tmp_path / "done"), resume=True)


@pytest.mark.parametrize("file", ["optimizer.safetensors", "trainer_state.json"])
def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(
    straight: bytes, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    class Killed(BaseException):
        pass

    def killed(path: Path) -> None:
        if path.parts[-2:] == ("checkpoint-6", file):
            path.write_bytes(b'{"half')
            raise Killed

    save = TrainerState.save_to_json
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(
            checkpoint,
            "save_file",
            lambda tensors, path, **more: killed(path) or save_file(tensors, path, **more),
        )
        patch.setattr(TrainerState, "save_to_json", lambda self, path: killed(Path(path)) or save(self, path))
        train(settings(place, tmp_path / "o", dropout=0.1), say=quiet)
    assert last_whole(tmp_path / "o" / "checkpoints").name == "checkpoint-3"
    train(output=str(tmp_path / "o"), resume=True, say=quiet)
    assert (tmp_path / "o" / WEIGHTS).read_bytes() == straight


def test_an_old_adapter_stays_whole_until_the_new_one_is(place: Path, tmp_path: Path) -> None:
    train(settings(place, tmp_path / "o"), say=quiet)
    pictures = {"cores.png", "confusion.png"}
    for name in (*pictures, "notes.txt"):  # pictures show the earlier adapter
        (tmp_path / "o" / name).touch()
    old = (tmp_path / "o" / WEIGHTS).read_bytes()
    stopped(place, tmp_path / "o", seed=1, overwrite=True)
    assert all((tmp_path / "o" / name).is_file() for name in pictures)
    assert (tmp_path / "o" / WEIGHTS).read_bytes() == old
    assert json.loads((tmp_path / "o" / SETTINGS).read_text())["seed"] == 0
    train(output=str(tmp_path / "o"), resume=True, say=quiet)
    assert (tmp_path / "o" / WEIGHTS).read_bytes() != old
    assert json.loads((tmp_path / "o" / SETTINGS).read_text())["seed"] == 1
    left = {path.name for path in (tmp_path / "o").iterdir()}
    assert not left & pictures and {CURVE, METRICS, "notes.txt"} <= left


def test_lotr_train_starts_from_the_rates_that_parameter_groups_gives(place: Path, tmp_path: Path) -> None:
    from peft import get_peft_model

    given = settings(place, tmp_path / "o", lr=None, core_lr=None, head_lr=None)
    report = train(given, say=quiet)
    base = AutoModelForSequenceClassification.from_pretrained(place / "bert")
    model = get_peft_model(base, LotrConfig(r=int(given.rank), task_type="SEQ_CLS"))
    names = {"factors": "lr", "cores": "core_lr", "head": "head_lr"}
    assert {names[g["name"]]: g["lr"] for g in parameter_groups(model)}.items() <= report.rates.items()


def test_names_may_be_a_list_and_a_model_is_a_name(place: Path, tmp_path: Path) -> None:
    words = settings(place, tmp_path / "o", max_steps=1).named()
    done = train(**words | {"target_modules": ["query", "key"], "rank": 3}, say=quiet)
    assert (done.settings.target_modules, done.settings.rank) == ("query,key", "3")
    with pytest.raises(
        ConfigError, match=r"The settings: model='BertForMaskedLM.* is not a value of type str"
    ):
        train(**words | {"model": BertForMaskedLM.from_pretrained(place / "bert")}, say=quiet)


def test_gradient_checkpointing_changes_nothing(place: Path, tmp_path: Path) -> None:
    train(settings(place, tmp_path / "a"), say=quiet)
    train(settings(place, tmp_path / "b", gradient_checkpointing=True), say=quiet)
    one, other = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "b" / WEIGHTS)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("processor", ["AVX2", "AVX512"])
def test_a_half_precision_base_trains_full_precision_numbers(
    place: Path, tmp_path: Path, dtype: str, processor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    lines: list[str] = []
    options = settings(place, tmp_path / "o", dtype=dtype, eval=str(place / "train.csv"))
    report = train(options, say=lines.append)
    warned = f"This processor takes several times as long with {dtype} as with float32." in lines
    assert warned == (processor == "AVX2" and not torch.accelerator.is_available())
    saved = load_file(tmp_path / "o" / WEIGHTS)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())
    trained = load_trained(tmp_path / "o")
    assert trained.model.base_model.model.bert.embeddings.word_embeddings.weight.dtype == getattr(
        torch, dtype
    )
    assert evaluate(trained, str(place / "train.csv"))["accuracy"] == report.score


def test_pairs_of_texts_are_one_input_and_are_asked_for_later(place: Path, tmp_path: Path) -> None:
    colours = ("red", "blue")
    lines = [f"{first} thing,{second},{int(first == second)}\n" for first in colours for second in colours]
    (tmp_path / "pairs.csv").write_text("text,text2,label\n" + "".join(lines * 8))
    train(replace(settings(place, tmp_path / "o", max_steps=2), train=str(tmp_path / "pairs.csv")), say=quiet)
    trained = load_trained(tmp_path / "o")
    (tmp_path / "pair.csv").write_text("text,text2\nred thing,red\nred thing,blue\n")
    (tmp_path / "labelled.csv").write_text("text,text2,label\nred thing,red,1\nred thing,blue,0\n")
    assert len(predict(trained, str(tmp_path / "pair.csv"))) == 2
    pairs = rows_of_task(read(str(tmp_path / "labelled.csv")), trained.task)
    (_, one, _), (_, other, _) = outputs_of(trained, pairs)
    assert (one != other).any()  # the second text is seen
    (tmp_path / "single.csv").write_text("text\nred thing\n")
    with pytest.raises(DataError, match="pairs"):
        predict(trained, str(tmp_path / "single.csv"))


def test_minilm_is_the_packaged_model_or_else_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    source, name = locate("minilm")
    assert (Path(source) / "model.safetensors").is_file()
    assert (source, name) == locate(MINILM)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert locate("minilm") == (MINILM, MINILM)


def test_modules_that_the_files_of_the_base_lack_are_trained_and_saved(place: Path, tmp_path: Path) -> None:
    """They begin random and are others at every load, so that an adapter without them would answer otherwise."""
    saved_models.save_bert(tmp_path / "bert")
    masked = BertForMaskedLM.from_pretrained(tmp_path / "bert")
    masked.save_pretrained(tmp_path / "bert")  # which has no pooler
    report = train(
        replace(settings(place, tmp_path / "o", eval=str(place / "dev.csv")), model=str(tmp_path / "bert")),
        say=quiet,
    )
    kept = {key.removeprefix("base_model.model.") for key in load_file(tmp_path / "o" / WEIGHTS)}
    assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight"} <= kept
    answers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        answers.append(predict(tmp_path / "o", str(place / "dev.csv")))
    assert answers[0] == answers[1]
    assert evaluate(tmp_path / "o", str(place / "dev.csv"))["accuracy"] == report.score


def test_how_often_a_run_is_saved_is_as_told_when_it_goes_on(place: Path, tmp_path: Path) -> None:
    stopped(place, tmp_path / "o", step=4)
    report = train(output=str(tmp_path / "o"), resume=True, eval_steps=1, say=quiet)
    assert [log["step"] for log in report.history if "eval_loss" in log] == [3, 6, 7, 8, 9, 10]
