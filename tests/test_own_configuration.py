"""`lotr.train(config=…)`: a configuration of one's own, LoTR's or PEFT's, in place of the settings of an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
from peft import PeftConfig

from commands import CtrlC, quiet, settings
from lotr import LotrConfig
from lotr.errors import ConfigError, Interrupted
from lotr.files.adapter_folder import CONFIG, read_adapter
from lotr.training.predict import evaluate
from lotr.training.run import train


@pytest.mark.parametrize(
    ("config", "method", "rank"),
    [
        (LotrConfig(r=3, target_modules=["query"]), "lotr", "3"),
        (peft.LoraConfig(r=3), "peft_lora", "3"),
        (peft.LoraConfig(r=3, use_dora=True), "peft_dora", "3"),
        (peft.VeraConfig(r=3), "peft_vera", "3"),
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
    words = settings(place, tmp_path, rank=None, max_steps=1, start_batches=2)
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
        (peft.PromptTuningConfig(num_virtual_tokens=2), {"rank": None}, "PromptTuningConfig trains prompts"),
        (peft.TrainableTokensConfig(token_indices=[0]), {"rank": None}, "keeps no head"),
    ]
    for config, more, says in refusals:
        with pytest.raises(ConfigError, match=says):
            train(settings(place, tmp_path / "o", **more), say=quiet, config=config)
    assert not (tmp_path / "o").exists()


def test_a_stopped_run_goes_on_with_the_same_alone(place: Path, tmp_path: Path) -> None:
    own = LotrConfig(r=4, target_modules=["query"])
    with pytest.raises(Interrupted):
        train(settings(place, tmp_path, rank=None), say=quiet, callbacks=[CtrlC(2)], config=own)
    with pytest.raises(ConfigError, match=r"r=2 contradicts .*checkpoint-3, which has r=4.*config="):
        train(output=str(tmp_path), resume=True, say=quiet, config=LotrConfig(r=2, target_modules=["query"]))
    with pytest.raises(ConfigError, match=r"contradicts .*config="):
        train(output=str(tmp_path), resume=True, say=quiet)
    assert train(output=str(tmp_path), resume=True, say=quiet, config=own).steps == 10


def test_its_basis_brings_the_base_model_and_the_structure(place: Path, tmp_path: Path) -> None:
    words = settings(place, tmp_path / "o", rank=None, max_steps=1).named()
    del words["model"]
    basis = tmp_path / "basis"
    train(settings(place, basis, max_steps=1), say=quiet)
    result = train(**words, say=quiet, config=LotrConfig(basis=str(basis)))
    assert (
        read_adapter(tmp_path / "o").config["r"]
        == read_adapter(basis).config["r"]
        == int(result.settings.rank)
    )
