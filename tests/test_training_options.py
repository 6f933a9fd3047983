"""What the options of a training run change, against a run that gets there another way."""

from __future__ import annotations

import importlib.util
import math
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import saved_models
from commands import quiet, settings
from lotr.errors import CheckpointError, ConfigError
from lotr.files.adapter_folder import WEIGHTS
from lotr.training.base_model import load_model
from lotr.training.predict import evaluate
from lotr.training.run import train
from lotr.training.settings import TrainSettings
from lotr.training.trained import load_trained


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder and a language model without dropout, and rows of many lengths for them."""
    folder = tmp_path_factory.mktemp("models")
    saved_models.save_bert(folder / "bert", dropout=0.0)
    saved_models.save_llama(folder / "llama")
    saved_models.write_colours(folder / "rows.csv", rows=64)
    return folder


def run(models: Path, model: str, output: Path, **more: Any) -> Any:
    """Six steps of sixteen rows, evaluated once."""
    asked: dict[str, Any] = {"batch_size": 16, "max_steps": 6, "eval_steps": 6, "rank": "2", "max_length": 32}
    asked["task"] = "causal-lm" if model == "llama" else "classification"
    data = str(models / "rows.csv")
    sources: Any = {"model": str(models / model), "train": data, "eval": data, "output": str(output)}
    return train(TrainSettings(**sources, **{**asked, **more}), say=quiet)


def assert_same(one: Path, two: Path, tolerance: float) -> None:
    """Check the numbers of two adapters, and that they moved."""
    first, second = load_file(one / WEIGHTS), load_file(two / WEIGHTS)
    assert first.keys() == second.keys() and any(".lotr_C." in key and t.any() for key, t in first.items())
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=0, atol=tolerance, msg=key)


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_two_passes_of_eight_rows_are_one_of_sixteen(models: Path, tmp_path: Path, model: str) -> None:
    """A start from gradients and the warm-up of a head take the rows of a step too."""
    begins: dict[str, Any] = {"init": "gradient", "start_batches": 2}
    whole = run(models, model, tmp_path / "whole", **begins)
    parts = run(models, model, tmp_path / "parts", batch_size=8, gradient_accumulation_steps=2, **begins)
    assert whole.steps == parts.steps == 6
    logs = [[log for log in report.history if "grad_norm" in log] for report in (whole, parts)]
    assert logs[0][0]["grad_norm"] == pytest.approx(logs[1][0]["grad_norm"], rel=1e-4)
    for one, two in zip(*logs, strict=True):  # AdamW makes much of the rounding of gradients near zero
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
    assert_same(tmp_path / "whole", tmp_path / "parts", 5e-3)


def test_epochs_count_steps_of_all_passes(models: Path, tmp_path: Path) -> None:
    passes = {"batch_size": 8, "gradient_accumulation_steps": 4, "epochs": 2.0, "max_steps": None}
    assert run(models, "bert", tmp_path / "o", **passes).steps == 4  # 64 rows, twice, 32 a step


def test_the_scheduler_sets_the_rates(models: Path, tmp_path: Path) -> None:
    report = run(models, "bert", tmp_path / "o", scheduler="cosine", warmup=0.0, lr=1e-3)
    rates = [log["learning_rate"] for log in report.history if "learning_rate" in log]
    expected = [1e-3 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert rates == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ConfigError, match=r"scheduler='cosin' .*not a valid SchedulerType.*cosine"):
        run(models, "bert", tmp_path / "p", scheduler="cosin")
    with pytest.raises(ConfigError, match=r"from its name alone: .*argument"):
        run(models, "bert", tmp_path / "p", scheduler="warmup_stable_decay")


def test_the_second_moments_of_adamw_decay_as_asked(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.optim.Optimizer] = []
    adamw = torch.optim.AdamW

    def spy(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        made.append(adamw(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    run(models, "bert", tmp_path / "o", adam_beta2=0.9, head_warmup=0)
    assert [group["betas"] for optimizer in made for group in optimizer.param_groups] == [(0.9, 0.9)] * 3


def test_packed_texts_train_as_padded_ones(models: Path, tmp_path: Path) -> None:
    padded = run(models, "llama", tmp_path / "padded")
    packed = run(models, "llama", tmp_path / "packed", packing=True)
    losses = [[log["loss"] for log in report.history if "loss" in log] for report in (padded, packed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert_same(tmp_path / "padded", tmp_path / "packed", 2e-4)


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"packing": True}])
def test_the_loss_of_a_run_is_that_of_the_tokens_whatever_the_batches(
    models: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    report = run(models, "llama", tmp_path / "o", **options)
    scores = evaluate(str(tmp_path / "o"), str(models / "rows.csv"))
    assert report.score == pytest.approx(scores["loss"], rel=1e-5)


def test_packing_is_refused_where_a_text_would_see_another(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="the task is classification"):
        run(models, "bert", tmp_path / "o", packing=True)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    with pytest.raises(ConfigError, match="packing changes what LlamaForCausalLM computes"):
        run(models, "llama", tmp_path / "o", packing=True)
    assert not (tmp_path / "o").exists()


def test_a_finished_run_is_uploaded(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: calls.append((name, kwargs)) or "https://hub/me/first"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    lines: list[str] = []
    asked = settings(models, tmp_path / "o", max_steps=1, push_to_hub="me/first")
    train(asked, train=str(models / "rows.csv"), say=lines.append)
    assert [name for name, _ in calls] == ["repo_exists", "whoami", "create_repo", "upload_folder"]
    assert calls[-1][1]["folder_path"] == tmp_path / "o" and lines[-1] == "Uploaded: https://hub/me/first"


def test_an_upload_that_would_fail_is_refused_before_training(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"hf auth login.*hf upload me/first OUTPUT"):
        run(models, "bert", tmp_path / "o", push_to_hub="me/first")
    assert not (tmp_path / "o").exists()


def test_an_upload_that_fails_leaves_the_run_whole(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lotr.training.prepare.check_hub", lambda repository: None)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="upload failed"):
        run(models, "bert", tmp_path / "o", push_to_hub="me/first", max_steps=1)
    assert (tmp_path / "o" / WEIGHTS).is_file()


def test_quantising_without_its_package_is_refused_with_the_command(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        run(models, "llama", tmp_path / "o", load_in="4bit")
    with pytest.raises(ConfigError, match="load_in='4bits' is not known"):
        run(models, "llama", tmp_path / "o", load_in="4bits")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_a_quantised_base_trains_and_is_loaded_so_again(models: Path, tmp_path: Path, load_in: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    kind = {"4bit": bnb.nn.Linear4bit, "8bit": bnb.nn.Linear8bitLt}[load_in]
    wide = LlamaConfig.from_pretrained(models / "llama", hidden_size=256, intermediate_size=256, head_dim=64)
    shutil.copytree(models / "llama", models / f"wide-{load_in}")  # bitsandbytes quantises blocks of 64
    LlamaForCausalLM(wide).save_pretrained(models / f"wide-{load_in}")
    base = load_model(str(models / f"wide-{load_in}"), "causal-lm", load_in=load_in)
    assert isinstance(base.model.layers[0].self_attn.q_proj, kind)
    asked = {"load_in": load_in, "max_steps": 2, "task": "causal-lm", "head_warmup": 0}
    run(models, f"wide-{load_in}", tmp_path / "o", **asked)
    assert any(".lotr_C." in key and t.any() for key, t in load_file(tmp_path / "o" / WEIGHTS).items())
    loaded = load_trained(tmp_path / "o")
    layer: Any = loaded.model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.base_layer, kind)
