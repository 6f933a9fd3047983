"""Settings that are damaged or hostile, and a stdout that takes nothing, end in one line."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

import loras
from commands import refused, report, training
from lotr import ConfigError
from lotr.training.settings import read_options

DEEP = "[" * 3000 + "]" * 3000
METHODS = (sys.executable, "-c", "from lotr_cli.app import main; main()", "methods")


@pytest.mark.parametrize(
    "text",
    [
        *(
            "!!python/object/apply:os.system [ls]",
            "rank: !!python/name:os.system x",
            DEEP,
            f"rank: {DEEP}",
            "\0",
        ),
        *("epochs: 2020-01-01", "epochs: 2020-13-45", "seed: [1, 2]", "seed: .inf", f"seed: {'9' * 5000}"),
        *("batch_size: 1.9", "max_steps: 2.7", "resume: 3", "label: yes", "- 1", "5: 5", "label:"),
    ],
    ids=lambda text: text[:30],
)
def test_settings_that_mean_nothing_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError) as refusal:
        read_options({}, tmp_path / "s.yaml")
    assert "\n" not in str(refusal.value)


def test_a_folder_is_no_file_of_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory\. Name a file"):
        read_options({}, tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_or_closed_stdout_is_no_traceback() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(METHODS, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith(
        "Error: The report cannot be written"
    )
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr
    closed = subprocess.run(
        METHODS, stderr=subprocess.PIPE, text=True, check=False, preexec_fn=lambda: os.close(1)
    )
    assert closed.returncode == 0 and not closed.stderr


@pytest.mark.parametrize("command", ["train", "export", "merge", "bank create", "bank train", "compress"])
def test_a_full_disk_is_told_in_a_sentence_and_nothing_is_left(
    place: Path, tmp_path: Path, command: str
) -> None:
    adapter, out = place / "on a full disk", tmp_path / "out"
    if not adapter.exists():
        report(*training(place), "--max-steps", 3, "--output", adapter)
    train = (*training(place)[1:], "--max-steps", 1)
    tasks = ("--basis", adapter, "--tasks", place / "tasks.yaml", "--max-steps", 1)
    (place / "tasks.yaml").write_text("one: dev.csv\n")
    shutil.copytree(adapter, place / "other", dirs_exist_ok=True)
    words = {
        "train": (*train, "--output", out),
        "bank create": (out, "--basis", adapter),
        "bank train": (*tasks, "--output", out),
        "compress": (adapter, place / "other", "--output", out, "--rank", 2),
    }
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))  # of any file
    try:
        told = refused(1, *command.split(), *words.get(command, (adapter, "--output", out)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "The disk is full" in told and "make room" in told
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


OWN = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification, BertModel
Path({ran!r}).touch()
class Config(BertConfig):
    model_type = "its-own"
class Model(BertModel):
    config_class = Config
class Classifier(BertForSequenceClassification):
    config_class = Config
"""


def test_code_that_a_base_model_brings_runs_on_the_users_word_alone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    own, adapter, bank, ran = (tmp_path / name for name in ("own", "adapter", "bank", "ran"))
    shutil.copytree(place / "bert", own)
    auto = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForSequenceClassification": "Classifier"}
    changed = {"model_type": "its-own", "auto_map": {name: f"code.{cls}" for name, cls in auto.items()}}
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | changed))
    (own / "code.py").write_text(OWN.format(ran=str(ran)))
    train = (*training(place), "--max-steps", 2, "--target-modules", "query,value")
    report(*train, "--output", adapter)
    report("bank", "create", bank, "--basis", adapter)
    whole = partial(AutoModelForSequenceClassification.from_pretrained, place / "bert", num_labels=3)
    for n in range(2):
        loras.lora(tmp_path / "loras" / str(n), n, whole, place / "bert", task_type="SEQ_CLS")
    of_bank, data = ("--train", place / "dev.csv", "--max-steps", 1), ("--data", place / "dev.csv")
    commands = {
        "train": ("--train", place / "dev.csv", *train[-4:], "--model", own, "--output", tmp_path / "new"),
        "evaluate": (adapter, *data, "--model", own),
        "predict": (adapter, *data, "--model", own, "--output", tmp_path / "rows.csv"),
        "merge": (adapter, "--model", own, "--output", tmp_path / "merged"),
        "plan": (own, "--target-modules", "query,value"),
        "compress": (tmp_path / "loras" / "*", "--base", own, "--output", tmp_path / "fit"),
        "bank train": ("--tasks", tmp_path / "tasks.yaml", "--output", bank, *of_bank[2:], "--model", own),
    }
    (tmp_path / "tasks.yaml").write_text(f"one: {place / 'dev.csv'}\n")

    def refuses(*words: object) -> None:
        assert "code of its own (auto_map), and none of it was run" in (told := refused(2, *words))
        assert "--trust-remote-code" in told and not ran.exists()

    for name, words in commands.items():
        refuses(*name.split(), *words)
    refuses("serve", bank, "--model", own, "--port", 0)
    known = report("evaluate", adapter, *data)
    for name, words in commands.items():
        told = report(*name.split(), *words, "--trust-remote-code")
        assert ran.exists() and (name != "evaluate" or told == known)
    ran.unlink()
    refuses("evaluate", *commands["evaluate"])  # the word was for those calls
