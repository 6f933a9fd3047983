"""The short examples and the code in the documents run as they stand, and do what they say."""

from __future__ import annotations

import re
import runpy
import shlex
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import lotr
from commands import lotr as command
from conftest import bert
from saved_models import save_bert

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def run(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


@pytest.mark.filterwarnings("default::UserWarning")
def test_the_classifier_learns_and_answers_alike_when_loaded_and_merged() -> None:
    names = run("classifier")
    assert names["accuracy"] > 0.85
    torch.testing.assert_close(names["merged"], names["logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("default::UserWarning")
def test_the_decoder_learns_its_sentence() -> None:
    pytest.importorskip("trl")
    names = run("sft")
    assert names["text"] == names["SENTENCE"]


def test_the_image_classifier_learns_and_its_lora_answers_alike() -> None:
    names = run("image_classifier")
    assert names["accuracy"] > 0.9
    torch.testing.assert_close(names["lora"], names["ours"], atol=1e-4, rtol=1e-4)


def test_rows_of_a_mixed_batch_answer_like_each_adapter_alone() -> None:
    names = run("bank")
    torch.testing.assert_close(names["mixed"], names["one_by_one"], atol=1e-5, rtol=1e-5)
    assert set(names["bank"].names()) == {"first", "place 1", "place 2"}


class _Hub:
    """Stands in for the hub: a pico model, and a tokenizer that gives every text four tokens."""

    @staticmethod
    def model(*_: Any, **__: Any) -> torch.nn.Module:
        return bert()

    @staticmethod
    def tokenizer(*_: Any, **__: Any) -> Any:
        return lambda texts, **_: {"input_ids": torch.arange(3, 3 + 4 * len(texts)).reshape(len(texts), 4)}


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)


def test_the_python_of_the_readme_runs_as_it_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import transformers

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", _Hub.model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", _Hub.tokenizer)
    code, *rest = blocks("README.md")
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    names["base_model"] = bert()
    for block in rest:
        exec(compile(block, "README.md", "exec"), names)


def test_every_name_in_the_reference_is_public() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    documented = re.findall(r"^::: lotr\.(\S+)$", page, re.MULTILINE)
    missing = set(lotr.__all__) - {name.partition(".")[0] for name in documented}
    assert not missing - {"__version__"}, "public, and not in docs/python.md"
    assert set(documented) <= set(lotr.__all__), "in docs/python.md, and not public"


def test_the_six_lines_for_those_who_have_loras_run_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small model and few rows in the place of the packaged ones."""
    save_bert(tmp_path / "minilm")
    (tmp_path / "rows.csv").write_text("text,label\nred thing,0\nblue thing,1\n" * 20)
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## I have LoRAs already")[2]
    lines = re.search(r"```sh\n(.*?)```", section, re.S)[1].splitlines()  # type: ignore[index]
    assert len(lines) == 6
    for line in lines:
        words = shlex.split(
            line.replace("docstrings", "rows.csv").replace("minilm", "./minilm"), comments=True
        )
        result = command(*words[1:])
        assert result.exit_code == 0, result.stderr
    assert (tmp_path / "two-again" / "adapter_model.safetensors").is_file()
    assert len(lotr.CoreBank.open(tmp_path / "bank")) == 2
