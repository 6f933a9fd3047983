"""What a saved adapter says about itself, and the status of a merged one."""

from __future__ import annotations

from pathlib import Path

from peft import get_peft_model

from conftest import bert, tokens
from lotr import LotrConfig
from lotr.files.card import Card, results


def test_the_card_that_peft_writes_says_how_to_load(tmp_path: Path) -> None:
    model = get_peft_model(bert(), LotrConfig(r=2, target_modules=["query"]))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import lotr") == 1
    assert "lotr export" in card


def test_the_card_has_tags_base_model_ranks_targets_and_rates(tmp_path: Path) -> None:
    config = LotrConfig(method="dora", r=2, target_modules=["query", "value"], rank_pattern={"value": 3})
    model = get_peft_model(bert(), config)
    config.base_model_name_or_path = "some/base"
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "tags: [lotr, dora, peft]" in card and "base_model: some/base" in card
    assert "Rank 2, 3, on `query`, `value`." in card
    assert (
        "tags: [lotr, peft]" in Card("lotr").text() and "[lora, peft]" in Card("lora", is_lotr=False).text()
    )
    report = {"settings": {"train": ""}, "task": {"task": "", "labels": []}, "rows": {"train": 1, "eval": 1}}
    report |= {"eval": {}, "trained_numbers": {"adapter": 1, "head": 1}}
    report |= dict.fromkeys(("steps", "seed", "adapter_bytes"), 1)
    text = results(report, {"factors": 3e-3, "cores": 1e-2})
    assert "- learning rates: factors 0.003, cores 0.01\n" in text


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
