"""Settings that are damaged or hostile, and a stdout that takes nothing, end in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lotr import ConfigError
from lotr.training.base_model import load_model
from lotr.training.settings import read_options
from lotr.training.tasks.task_list import read_tasks

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
        *("epochs: 2020-01-01", "batch_size: 2020-01-01", "epochs: 2020-13-45", "seed: [1, 2]", "seed: .inf"),
        *(f"seed: {'9' * 5000}", "resume: 3", "- 1", "5: 5"),
    ],
    ids=lambda text: text[:30],
)
def test_settings_that_mean_nothing_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError) as refusal:
        read_options({}, tmp_path / "s.yaml")
    assert "\n" not in str(refusal.value)
    (tmp_path / "s.yaml").write_text(f"a: {{train: a.csv, text: 2020-01-01}}\n# {text[:20]}")
    with pytest.raises(ConfigError, match=r"which is no text|not valid YAML"):
        read_tasks(tmp_path / "s.yaml")


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


def test_code_that_a_base_model_brings_is_refused_and_not_asked_for(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "its-own", "auto_map": auto_map}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError, match=r"brings code of its own \(auto_map\), and none of it was run"):
        load_model(str(tmp_path), "causal-lm")
    assert not (tmp_path / "ran").exists()
