"""`lotr.compress`: many LoRAs become one bank that answers as they do."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import RobertaConfig, RobertaForSequenceClassification

import banks
import lotr
from conftest import bert, gpt2, llama, tokens
from loras import assert_answers, dense, edit, lora, on_one_basis
from lotr import ConfigError, LotrConfig
from lotr.compression.add import add


def test_a_bank_answers_as_the_adapters_on_one_basis_did(tmp_path: Path) -> None:
    """Each with its own head; in one batch."""
    folders = on_one_basis(tmp_path, tasks=5, rank=4, task_type="SEQ_CLS")
    report = lotr.compress(folders, tmp_path / "bank", bert(), rank=4, dtype="float32")
    assert report.error < 1e-5
    bank = lotr.CoreBank.open(tmp_path / "bank")
    assert list(bank.names()) == [folder.name for folder in folders]
    model = bank.wrap(bert())
    with torch.no_grad():
        logits = model(input_ids=tokens(5), task_ids=list(bank.names())).logits
        for n, folder in enumerate(folders):
            own = PeftModel.from_pretrained(bert(), str(folder)).eval()(input_ids=tokens(5)).logits
            torch.testing.assert_close(logits[n], own[n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"as_lora": True}, {"refer": True}])
def test_a_head_of_several_modules_goes_out_as_one(how: dict[str, bool], tmp_path: Path) -> None:
    """RoBERTa's has two linear layers."""
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 37, "max_position_embeddings": 66}
    config = RobertaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, num_labels=3)

    def roberta() -> RobertaForSequenceClassification:
        torch.manual_seed(0)
        return RobertaForSequenceClassification(config).eval()

    lora(tmp_path / "a", 0, roberta, task_type="SEQ_CLS")
    lotr.compress([tmp_path / "a"], tmp_path / "bank", roberta(), rank=3, dtype="float32")
    lotr.CoreBank.open(tmp_path / "bank").export("a", tmp_path / "out", **how)
    with torch.no_grad():
        before, after = (
            PeftModel.from_pretrained(roberta(), str(tmp_path / name)).eval()(input_ids=tokens(2)).logits
            for name in ("a", "out")
        )
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("modes", [("task",), ("task", "layer"), ("task", "layer", "projection")])
def test_the_reported_error_is_that_of_the_dense_updates(modes: tuple[str, ...], tmp_path: Path) -> None:
    """Also where factors are shared along layers; ranks are mixed, and one adapter lacks a module."""
    originals = [
        lora(tmp_path / "a", 0, r=3),
        lora(tmp_path / "b", 1, r=5, use_rslora=True),
        lora(tmp_path / "c", 2, r=2, target_modules=["query"], rank_pattern={"layer.1.*query": 4}),
    ]
    report = lotr.compress(
        [tmp_path / name for name in "abc"], tmp_path / "bank", bert(), rank=4, modes=modes, dtype="float32"
    )
    bank = lotr.CoreBank.open(tmp_path / "bank")
    rows = sorted(report.by_task, key=lambda row: row["task"])
    for original, row in zip(originals, rows, strict=True):
        bank.export(row["task"], tmp_path / f"{row['task']}-out", as_lora=True)
        exported = PeftModel.from_pretrained(bert(), str(tmp_path / f"{row['task']}-out"))
        before, after = dense(original), dense(exported)
        assert before.keys() <= after.keys()
        lost = sum(((before.get(path, 0) - after[path]) ** 2).sum() for path in after)
        error = float((lost / sum((dW**2).sum() for dW in before.values())) ** 0.5)
        assert row["error"] == pytest.approx(error, rel=1e-4)
        assert row["missing"] == len(after) - len(before)


def test_diagonal_cores_recover_adapters_with_diagonals_on_common_factors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    U, V = torch.randn(32, 3, generator=generator), torch.randn(3, 32, generator=generator)
    for n in range(6):
        lora(tmp_path / f"task-{n}", n)

        def set_factors(tensors: dict[str, torch.Tensor]) -> None:
            for key, tensor in tensors.items():
                tensor.copy_(V if "lora_A" in key else U * torch.randn(3, generator=generator))

        edit(tmp_path / f"task-{n}", set_factors)
    for modes in (["task"], ["task", "layer"], ["task", "layer", "projection"]):
        bank = tmp_path / f"along-{len(modes)}"
        report = lotr.compress(
            [tmp_path / "task-*"],
            bank,
            bert(),
            rank=3,
            core="diagonal",
            modes=modes,
            dtype="float32",
            sweeps=400,
        )
        assert report.error < 1e-4
        assert lotr.CoreBank.open(bank).layout.size == 6 * 3
    assert_answers(bank, "task-2", tmp_path / "task-2", tol=1e-3)


def test_adapters_with_one_A_cost_its_rank_on_the_input_side(tmp_path: Path) -> None:
    """`A` kept fixed while `B` trains: exact with small cores; later adapters too."""
    for n in range(6):
        lora(tmp_path / f"task-{n}", n, r=2)

    def set_A(tensors: dict[str, torch.Tensor]) -> None:
        for key in sorted(key for key in tensors if "lora_A" in key):
            tensors[key].copy_(torch.randn(2, 32, generator=torch.Generator().manual_seed(len(key))))

    for n in range(6):
        edit(tmp_path / f"task-{n}", set_A)
    places = [tmp_path / f"task-{n}" for n in range(5)]
    report = lotr.compress(places, tmp_path / "bank", bert(), max_error=1e-4, dtype="float32")
    assert report.error < 1e-5
    assert {tuple(group["ranks"]) for group in report.groups} == {(10, 2)}
    assert_answers(tmp_path / "bank", "task-3", places[3])
    with lotr.CoreBank.open(tmp_path / "bank") as bank:
        bank.export("task-3", tmp_path / "out", as_lora=True)
    (exported, own) = (
        dense(PeftModel.from_pretrained(bert(), str(f))) for f in (tmp_path / "out", places[3])
    )
    for path, dW in own.items():
        torch.testing.assert_close(exported[path], dW, rtol=1e-4, atol=1e-5)
    added = add(tmp_path / "bank", [tmp_path / "task-5"])
    assert 0.1 < added["added"]["task-5"] < 1


def test_order_and_places_of_adapters_do_not_change_the_bank(tmp_path: Path) -> None:
    for n in range(4):
        lora(tmp_path / "here" / f"task-{n}", n)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    places = sorted((tmp_path / "here").iterdir())
    torch.manual_seed(1)
    lotr.compress(places, tmp_path / "one", bert(), rank=4)
    torch.manual_seed(2)
    (tmp_path / "list.txt").write_text("\n".join(f"there/{path.name}" for path in reversed(places)))
    lotr.compress([tmp_path / "list.txt"], tmp_path / "other", bert(), rank=4)
    one, other = (lotr.CoreBank.open(tmp_path / name) for name in ("one", "other"))
    assert one.description.basis_hash == other.description.basis_hash
    assert torch.equal(one.read(list(one.names()))[0], other.read(list(other.names()))[0])


def test_weights_decide_between_adapters(tmp_path: Path) -> None:
    for n in range(3):
        lora(tmp_path / f"task-{n}", n, r=4)

    def errors(name: str, **options: Any) -> dict[str, float]:
        report = lotr.compress([tmp_path / "task-*"], tmp_path / name, bert(), rank=4, **options)
        return {row["task"]: row["error"] for row in report.by_task}

    even, heavy = errors("even"), errors("heavy", weights={"task-1": 10.0})
    assert heavy["task-1"] < 0.3 * even["task-1"]
    assert heavy["task-0"] > even["task-0"]


def test_ranks_reach_an_error_and_stay_within_bytes(tmp_path: Path) -> None:
    """The rank goes to where it keeps most: modules whose updates agree have less of it."""
    folders = on_one_basis(tmp_path, tasks=6, rank=2, noise=0.1, target_modules=["query"])
    for folder in folders:
        lora(folder / "wild", int(folder.name[-1]), r=6, target_modules=["value"])
    places = [*folders, *(folder / "wild" for folder in folders)]
    report = lotr.compress(places, tmp_path / "by-error", bert(), max_error=0.3)
    assert 0.2 < report.error <= 0.3
    ranks = {group["group"]: group["ranks"] for group in report.groups}
    assert max(max(pair) for name, pair in ranks.items() if "query" in name) < min(
        min(pair) for name, pair in ranks.items() if "value" in name
    )
    size = report.bytes_of_numbers
    again = lotr.compress(places, tmp_path / "by-bytes", bert(), max_bytes=size)
    assert size * 0.9 <= again.bytes_of_numbers <= size
    assert again.error < 1.02 * report.error


def test_a_bank_takes_adapters_that_were_not_in_the_fit(tmp_path: Path) -> None:
    folders = on_one_basis(tmp_path, tasks=6, rank=4, task_type="SEQ_CLS")
    lotr.compress(folders[:4], tmp_path / "bank", bert(), rank=4, dtype="float32")
    report = add(tmp_path / "bank", folders[4:])
    assert max(report["added"].values()) < 1e-5
    assert "No new fit is needed" in report["advice"][0]
    with lotr.CoreBank.open(tmp_path / "bank") as bank, torch.no_grad():  # with its own head
        logits = bank.wrap(bert())(input_ids=tokens(), task_ids=["task-5"] * 4).logits
        own = PeftModel.from_pretrained(bert(), str(folders[5])).eval()(input_ids=tokens()).logits
    torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-5)
    lora(tmp_path / "stranger", 9)
    report = add(tmp_path / "bank", [tmp_path / "stranger"])
    assert report["added"]["stranger"] > 0.5
    assert "A new fit with all adapters pays" in report["advice"][0]


def test_adapters_of_this_library_are_projected_onto_a_trained_bank(tmp_path: Path) -> None:
    """The factors of a trained basis are not orthonormal; an adapter on it comes back as it was."""
    bank = banks.bank(tmp_path, scaling=2.0, modes=("layer", "projection"), init_weights=False)
    banks.stirred(bank.config, seed=3).save_pretrained(str(tmp_path / "own"), save_embedding_layers=False)
    own = bank.from_adapter("own", tmp_path / "own")
    assert add(tmp_path / "bank", [tmp_path / "own"])["added"]["own"] < 1e-6
    torch.testing.assert_close(bank.get("own").numbers, own.numbers, rtol=1e-4, atol=1e-5)
    assert bank.get("own").head.keys() == own.head.keys()


def test_adapters_of_this_library_with_other_factors_become_tasks(tmp_path: Path) -> None:
    for n in range(3):
        config = LotrConfig(r=2, target_modules=["query", "value"], seed=n, init_weights=False, scaling=3.0)
        banks.stirred(config, n).save_pretrained(str(tmp_path / f"task-{n}"), save_embedding_layers=False)
    lora(tmp_path / "task-3", 3, r=2)
    report = lotr.compress([tmp_path / "task-*"], tmp_path / "bank", bert(), rank=8, dtype="float32")
    assert report.error < 1e-5
    assert_answers(tmp_path / "bank", "task-1", tmp_path / "task-1")


@pytest.mark.parametrize(
    "make, targets", [(gpt2, ["c_attn", "c_fc"]), (llama, ["q_proj", "k_proj", "down_proj"])]
)
@pytest.mark.parametrize("modes", [("task",), ("task", "layer")])
def test_fused_and_unequal_projections_are_compressed_exactly(
    make: Any, targets: list[str], modes: tuple[str, ...], tmp_path: Path
) -> None:
    for n in range(2):
        fan = {"fan_in_fan_out": make is gpt2}
        lora(tmp_path / f"task-{n}", n, make, r=2, target_modules=targets, task_type="CAUSAL_LM", **fan)
    report = lotr.compress(
        [tmp_path / "task-*"], tmp_path / "bank", make(), rank=16, modes=modes, dtype="float32"
    )
    assert report.error < 1e-5
    assert_answers(tmp_path / "bank", "task-1", tmp_path / "task-1", make)


def test_diagonals_lose_no_more_than_the_same_number_of_each_adapter_s_own_directions(tmp_path: Path) -> None:
    """Adapters that share nothing; the bank has as many directions a module as all of them together."""
    originals = [dense(lora(tmp_path / f"task-{n}", n, r=4)) for n in range(3)]
    report = lotr.compress(
        [tmp_path / "task-*"], tmp_path / "bank", bert(), rank=6, core="diagonal", dtype="float32"
    )
    lost = 0.0
    for updates in originals:
        norm = sum(float(dW.square().sum()) for dW in updates.values())
        lost += sum(float(torch.linalg.svdvals(dW)[2:].square().sum()) for dW in updates.values()) / norm
    assert report.error <= (lost / 3) ** 0.5 + 1e-6
    free = lotr.compress(
        [tmp_path / "task-*"], tmp_path / "free", bert(), max_bytes=report.bytes_of_numbers, dtype="float32"
    )
    assert any("In as many bytes --core diagonal loses at most" in line for line in free.advice)


@pytest.mark.parametrize("max_error", [0.1, 0.4])
def test_diagonals_reach_an_error_and_no_rank_below_does(max_error: float, tmp_path: Path) -> None:
    for n in range(4):
        lora(tmp_path / f"task-{n}", n, r=3)
    compress = partial(lotr.compress, [tmp_path / "task-*"], base=bert(), core="diagonal")
    report = compress(output=tmp_path / "bank", max_error=max_error)
    assert 0.8 * max_error < report.error <= max_error
    smaller = compress(output=tmp_path / "smaller", max_bytes=int(0.9 * report.bytes_of_numbers))
    assert smaller.error > max_error


@pytest.mark.parametrize("core", ["free", "diagonal"])
def test_factors_kept_in_bfloat16_take_later_adapters_and_answer_as_exported(
    core: str, tmp_path: Path
) -> None:
    for n in range(2):
        lora(tmp_path / f"task-{n}", n)
    lotr.compress([tmp_path / "task-*"], tmp_path / "bank", bert(), rank=6, core=core)
    with lotr.CoreBank.open(tmp_path / "bank", writable=True) as bank:
        assert {tensor.dtype for tensor in bank.basis.factors().values()} == {torch.bfloat16}
        banks.stirred(bank.config, seed=3).save_pretrained(str(tmp_path / "own"), save_embedding_layers=False)
        bank.add_adapter("own", tmp_path / "own")
        for name, as_lora in (("own", False), ("own", True), ("task-1", True)):
            bank.export(name, tmp_path / f"{name}-{as_lora}", as_lora=as_lora)
            with torch.no_grad():
                mixed = bank.wrap(bert())(input_ids=tokens(), task_ids=[name] * 4).logits
                alone = PeftModel.from_pretrained(bert(), str(tmp_path / f"{name}-{as_lora}")).eval()
                torch.testing.assert_close(alone(input_ids=tokens()).logits, mixed, rtol=1e-5, atol=1e-5)


def test_one_place_and_modes_may_be_one_text(tmp_path: Path) -> None:
    for n in range(2):
        lora(tmp_path / f"task-{n}", n)
    one = lotr.compress(str(tmp_path / "task-*"), tmp_path / "one", bert(), rank=2, modes="task, layer")
    other = lotr.compress([tmp_path / "task-*"], tmp_path / "other", bert(), rank=2, modes=["task", "layer"])
    assert one.by_task == other.by_task
    with pytest.raises(ConfigError, match="rank='2' is not a number"):
        lotr.compress([tmp_path / "task-*"], tmp_path / "third", bert(), rank="2")
    assert not (tmp_path / "third").exists()
