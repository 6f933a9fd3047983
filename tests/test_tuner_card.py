"""What a saved adapter says about itself, and the status of a merged one."""

from __future__ import annotations

from pathlib import Path

from peft import get_peft_model

from conftest import bert, tokens
from lotr import LotrConfig


def test_the_card_that_peft_writes_says_how_to_load(tmp_path: Path) -> None:
    model = get_peft_model(bert(), LotrConfig(r=2, target_modules=["query"]))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import lotr") == 1
    assert "lotr export" in card


def test_disabling_a_merged_adapter_leaves_a_regular_status() -> None:
    model = get_peft_model(bert(), LotrConfig(r=2, target_modules=["query"]))
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    with model.disable_adapter():
        model(input_ids=tokens())
    assert model.get_model_status().merged_adapters == []


def test_the_card_of_cores_names_their_basis_and_no_folder_of_this_machine(tmp_path: Path) -> None:
    fields = {"r": 2, "target_modules": ["query", "value"]}
    get_peft_model(bert(), LotrConfig(**fields)).save_pretrained(tmp_path / "first")
    for copied in (False, True):
        config = LotrConfig(
            basis=str(tmp_path / "first"), basis_copy=copied, target_modules=["query", "value"]
        )
        model = get_peft_model(bert(), config)
        model.save_pretrained(tmp_path / f"copied-{copied}")
        card = (tmp_path / f"copied-{copied}" / "README.md").read_text()
        assert ("adapter `first`, hash" in card) != copied
        assert (str(model.peft_config["default"].basis_hash) in card) != copied
        assert str(tmp_path) not in card
