"""What a task of a bank is for: told by who saved it, and asked for with others of its kind alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import saved_models
from lotr import CoreBank, LotrConfig
from lotr.errors import ConfigError
from lotr.training.predict import predict

CLASSES = {"two": 3, "number": 1}


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of adapters that PEFT saved: a language model, a classifier and a regression."""
    folder = tmp_path_factory.mktemp("kinds")
    base = saved_models.save_llama(folder / "llama")
    fields = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LotrConfig(**fields, task_type="CAUSAL_LM")
    ).save_pretrained(folder / "writer")
    bank = CoreBank.create(folder / "bank", folder / "writer", dtype="float32")
    bank.add_adapter("writer", folder / "writer")
    for name, outputs in CLASSES.items():
        torch.manual_seed(outputs)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs)
        config = LotrConfig(basis=str(folder / "bank"), task_type="SEQ_CLS")
        get_peft_model(model, config).save_pretrained(folder / name)
        bank.add_adapter(name, folder / name)
    bank.close()
    (folder / "rows.csv").write_text("text,to\na red,writer\nthe blue,two\n")
    return folder / "bank"


def test_an_adapter_that_peft_saved_answers_from_a_bank_as_it_does_alone(bank: Path) -> None:
    data = str(bank.parent / "rows.csv")
    for name in ("writer", *CLASSES):
        alone, kept = predict(bank.parent / name, data), predict(bank, data, task=name)
        for one, two in zip(alone, kept, strict=True):
            assert one["prediction"] == (
                pytest.approx(two["prediction"], abs=1e-5) if name == "number" else two["prediction"]
            )


def test_tasks_of_two_kinds_are_not_answered_by_one_model(bank: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"Task 'two' is classification, and the base model is loaded for causal-lm"
    ):
        predict(bank, str(bank.parent / "rows.csv"), task_column="to")
