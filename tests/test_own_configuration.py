"""`lotr.train(config=…)`: a configuration of one's own, LoTR's or PEFT's, in place of the settings of an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
from peft import PeftConfig

from commands import CtrlC, quiet, refused, settings
from lotr import LotrConfig
from lotr.errors import ConfigError, Interrupted
from lotr.files.adapter_folder import CONFIG, WEIGHTS, read_adapter
from lotr.training.output import SETTINGS
from lotr.training.predict import evaluate
from lotr.training.run import train
from lotr.training.settings import read_options


@pytest.mark.parametrize(
    ("config", "method", "rank"),
    [
        (LotrConfig(r=3, target_modules=["query"]), "lotr", "3"),
        (peft.LoraConfig(r=3), "peft_lora", "3"),
        (peft.LoraConfig(r=3, use_dora=True), "peft_dora", "3"),
        (peft.VeraConfig(r=3), "peft_vera", None),
        (peft.IA3Config(), "peft_ia3", None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PeftConfig) else str(value),
)
def test_it_trains_with_its_head_and_is_told_as_what_it_is(
    config: PeftConfig, method: str, rank: str | None, place: Path, tmp_path: Path
) -> None:
    result = train(settings(place, tmp_path, rank=None), say=quiet, config=config)
    assert (result.settings.method, result.settings.rank) == (method, rank)
    assert result.trained_numbers["head"] > 0 and config.task_type is None  # that of the run is a copy
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] == "SEQ_CLS"
    assert method in (tmp_path / "README.md").read_text()
    again = evaluate(tmp_path, place / "dev.csv")
    assert again["accuracy"] == evaluate(tmp_path, place / "dev.csv")["accuracy"]  # the head is saved, too


@pytest.mark.parametrize(
    ("config", "start"),
    [
        (LotrConfig(r=2, method="lora_sb"), "first_step"),
        (LotrConfig(r=2, init="gradient"), "gradient"),
        (LotrConfig(r=2, trainable="cores"), "gradient"),
        (LotrConfig(r=2, trainable="cores", init="orthonormal"), None),
    ],
    ids=lambda value: "" if isinstance(value, LotrConfig) else str(value),
)
def test_its_factors_start_from_data_where_it_says_so(
    config: LotrConfig, start: str | None, place: Path, tmp_path: Path
) -> None:
    words = settings(place, tmp_path, rank=None, max_steps=1, start_batches=start and 2)
    begun = train(words, say=quiet, config=config).begun
    assert (begun.get("init"), begun.get("start_batches")) == (start, start and 2)


def test_what_it_cannot_stand_beside_is_refused_before_anything_is_written(
    place: Path, tmp_path: Path
) -> None:
    own = LotrConfig(r=2)
    refusals = [
        (own, {"rank": "2"}, "rank='2' describes an adapter, and so does config"),
        (own, {"rank": "auto", "budget": 700}, "budget=700 describes an adapter"),
        (own, {"rank": None, "basis": "adapter"}, "basis='adapter' describes an adapter"),
        (
            LotrConfig(task_type="CAUSAL_LM"),
            {"rank": None},
            "CAUSAL_LM' contradicts the task, classification",
        ),
        (LotrConfig(init="lora"), {"rank": None}, "needs the LoRA"),
        (
            peft.PromptTuningConfig(num_virtual_tokens=2),
            {"rank": None},
            "PromptTuningConfig needs more than a run",
        ),
        (peft.AdaLoraConfig(total_step=9), {"rank": None}, "AdaLoraConfig needs more than a run"),
        (
            peft.LoraConfig(init_lora_weights="pissa_niter_1"),
            {"rank": None},
            "pissa_niter_1' needs more than a run",
        ),
        (LotrConfig, {"rank": None}, "is no configuration"),
        (own, {"rank": None, "start_batches": 3}, "start_batches=3 has no meaning where"),
        (peft.LoraConfig(), {"rank": None, "start_batches": 3}, "start_batches=3 describes an adapter"),
    ]
    for config, more, says in refusals:
        with pytest.raises(ConfigError, match=says):
            train(settings(place, tmp_path / "o", **more), say=quiet, config=config)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "config",
    [
        LotrConfig(r=(2, 3), target_modules="all-linear", init="gradient", dropout=0.1),
        LotrConfig(basis="basis"),
        peft.LoraConfig(r=3, target_modules=("query",), layer_replication=[(0, 2), (1, 2)]),
        peft.VeraConfig(r=3),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_stopped_run_goes_on_with_the_configuration_it_began_with(
    config: PeftConfig, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(settings(place, Path("basis"), max_steps=1), say=quiet)
    train(settings(place, Path("straight"), rank=None), say=quiet, config=config)
    with pytest.raises(Interrupted, match="lotr train --resume --output stopped"):
        train(settings(place, Path("stopped"), rank=None), say=quiet, callbacks=[CtrlC(4)], config=config)
    with pytest.raises(ConfigError, match="Leave config out"):
        train(output="stopped", resume=True, say=quiet, config=config)
    assert train(output="stopped", resume=True, say=quiet).steps == 10
    assert Path("stopped", WEIGHTS).read_bytes() == Path("straight", WEIGHTS).read_bytes()


def test_its_settings_say_that_they_do_not_describe_it_and_a_saved_one_trains_again(
    place: Path, tmp_path: Path
) -> None:
    config = LotrConfig(r=3, target_modules=["key"], dropout=0.1)
    train(settings(place, tmp_path / "first", rank=None), say=quiet, config=config)
    words = read_options({}, tmp_path / "first" / SETTINGS)
    assert (
        not {"dropout", "target_modules", "basis"}
        & json.loads((tmp_path / "first" / SETTINGS).read_text()).keys()
    )
    with pytest.raises(ConfigError, match=r"given a LotrConfig.*from_pretrained"):
        train(**words, say=quiet)
    saved = PeftConfig.from_pretrained(str(tmp_path / "first"))
    train(settings(place, tmp_path / "again", rank=None), say=quiet, config=saved)
    first, again = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("first", "again"))
    assert first == again


def test_its_basis_brings_the_base_model_and_the_structure(place: Path, tmp_path: Path) -> None:
    words = settings(place, tmp_path / "o", rank=None, max_steps=1).named()
    del words["model"]
    basis = tmp_path / "basis"
    train(settings(place, basis, max_steps=1), say=quiet)
    result = train(**words, say=quiet, config=LotrConfig(basis=str(basis)))
    ranks = {read_adapter(folder).config["r"] for folder in (tmp_path / "o", basis)}
    assert ranks == {int(result.settings.rank)}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (peft.LNTuningConfig(target_modules=["LayerNorm"]), "leaves its trained head apart"),
        (peft.LilyConfig(r=2, target_modules=["query"]), "cannot be merged: This method is not supported"),
        (
            peft.LoraConfig(r=2, target_modules=["query"], layer_replication=[[0, 1], [0, 1]]),
            "copies of a layer (layer_replication) share one weight",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PeftConfig) else "",
)
def test_what_peft_cannot_merge_is_refused(
    config: PeftConfig, says: str, place: Path, tmp_path: Path
) -> None:
    train(settings(place, tmp_path / "own", rank=None, max_steps=1), say=quiet, config=config)
    assert says in refused(1, "merge", tmp_path / "own", "--output", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
