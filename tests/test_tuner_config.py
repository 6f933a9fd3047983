"""What a configuration selects, and what it refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from conftest import bert, gpt2, llama, t5, tokens, vit
from lotr import CheckpointError, ConfigError, LotrConfig, PlanError, export, plan, truncate
from lotr.tuner.group import LotrGroup, LotrLayer
from lotr.tuner.layer import LotrLinear
from tuner_contract import outputs


def adapted(model: nn.Module) -> list[str]:
    return [
        path.removeprefix("base_model.model.")
        for path, module in model.named_modules()
        if isinstance(module, LotrLinear)
    ]


def make(model: nn.Module, **kwargs: Any) -> PeftModel:
    return get_peft_model(model, LotrConfig(**({"r": 2} | kwargs)))


# ---- which modules


@pytest.mark.parametrize(
    "fields, layers",
    [
        ({"target_modules": ["query"]}, [0, 1, 2]),  # the end of a path
        ({"target_modules": r".*layer\.[02]\..*\.query"}, [0, 2]),  # a regex: the whole path
        ({"target_modules": ["query", "value"], "exclude_modules": ["value"]}, [0, 1, 2]),
        ({"target_modules": ["query"], "exclude_modules": r".*layer\.1\..*"}, [0, 2]),
        ({"target_modules": ["query"], "layers_to_transform": [0, 2]}, [0, 2]),
        ({"target_modules": ["query"], "layers_to_transform": 1}, [1]),
    ],
    ids=str,
)
def test_names_a_regex_exclusions_and_layers_select_modules(fields: Any, layers: list[int]) -> None:
    paths = [f"bert.encoder.layer.{n}.attention.self.query" for n in layers]
    assert adapted(make(bert(), **fields)) == paths


def test_any_sequence_of_layers_is_saved_as_a_list(tmp_path: Path) -> None:
    model = make(bert(), target_modules=("query",), layers_to_transform=range(2), layers_pattern=("layer",))
    assert len(adapted(model)) == 2
    model.save_pretrained(tmp_path)
    assert LotrConfig.from_pretrained(str(tmp_path)).layers_to_transform == [0, 1]


def test_all_linear_takes_every_linear_but_the_head() -> None:
    model = make(bert(), target_modules="all-linear", task_type="SEQ_CLS")
    names = adapted(model)
    assert len(names) == 3 * 6 + 1 and not any("classifier" in name for name in names)
    output = make(llama(), target_modules="all-linear")
    assert len(adapted(output)) == 3 * 7 and "lm_head" not in adapted(output)


def test_layers_pattern_names_the_list_that_is_counted() -> None:
    kwargs = {"target_modules": ["q"], "layers_to_transform": [0]}
    assert len(adapted(make(t5(), layers_pattern="block", **kwargs))) == 2 * 1 + 1
    # in the decoder, number 0 of each block's "layer" list is self-attention, number 1 cross-attention
    names = adapted(make(t5(), layers_pattern="layer", **kwargs))
    assert len(names) == 4 and all(".layer.0." in name for name in names)


@pytest.mark.parametrize(
    "model, targets",
    [
        (bert, ["query", "value"]),
        (llama, ["q_proj", "v_proj"]),
        (gpt2, ["c_attn"]),
        (t5, ["q", "v"]),
        (vit, ["q_proj", "v_proj"]),
    ],
)
def test_without_targets_the_usual_modules_of_the_architecture_are_taken(model: Any, targets: Any) -> None:
    names = adapted(make(model()))
    assert names and {name.rpartition(".")[2] for name in names} == set(targets)


def test_an_unknown_architecture_must_name_its_modules() -> None:
    model = nn.Sequential()
    model.add_module("up", nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"no default\. .*end in: up\."):
        make(model)


def test_a_module_that_is_not_linear_is_refused_and_the_model_left_alone() -> None:
    model = bert()
    with pytest.raises(PlanError, match=r"word_embeddings' \(Embedding\) is not supported"):
        make(model, target_modules=["query", "word_embeddings"])
    assert not [m for m in model.modules() if isinstance(m, LotrLayer)]


# ---- what is trained and kept


def test_modules_to_save_are_trained_in_full_and_saved(tmp_path: Any) -> None:
    model = make(bert(), target_modules=["query"], modules_to_save=["classifier"], init_weights=False)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight += 1.0
    assert model.base_model.model.classifier.modules_to_save["default"].weight.requires_grad
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path)
    inputs = {"input_ids": tokens()}
    assert torch.equal(outputs(loaded, inputs), outputs(model.eval(), inputs))


def test_no_path_of_the_basis_ends_like_a_module_of_the_model() -> None:
    """PEFT matches `modules_to_save` by the end of the path."""
    names = {path.rpartition(".")[2] for path, _ in bert().named_modules() if path}
    names = {name for name in names if not name.isdigit()}
    model = make(bert(), target_modules="all-linear")
    paths = [path for path, _ in model.named_modules() if "lotrbasis" in path]
    assert len(paths) > 10
    assert not [(path, name) for path in paths for name in names if path.endswith(name)]


@pytest.mark.parametrize("bias, trained", [("none", 0), ("lotr_only", 3), ("all", 27)])
def test_bias_says_which_biases_are_trained(bias: Any, trained: int) -> None:
    model = make(bert(), target_modules=["query"], bias=bias)
    names = [n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")]
    assert len(names) == trained


def test_a_task_type_chooses_the_class_and_keeps_the_head() -> None:
    model = make(bert(), task_type="SEQ_CLS")
    assert type(model).__name__ == "PeftModelForSequenceClassification"
    assert any("classifier.modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad)


def test_in_inference_mode_nothing_is_trained() -> None:
    model = make(bert(), inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


def test_the_trainable_numbers_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    make(bert(), target_modules=["query"]).print_trainable_parameters()
    assert "trainable params: 140 ||" in capsys.readouterr().out  # 2·(32 + 32) + 3·2·2


# ---- ranks


def test_a_rank_pattern_gives_a_group_its_own_rank() -> None:
    model = make(bert(), target_modules=["query", "value"], rank_pattern={"value": 5})
    ranks = {
        path.rpartition(".")[2]: tuple(layer.lotr_C["default"].weight.shape)
        for path, layer in model.named_modules()
        if isinstance(layer, LotrLinear)
    }
    assert ranks == {"query": (2, 2), "value": (5, 5)}


def test_unequal_ranks_in_a_group_are_refused_and_the_model_left_alone() -> None:
    model = bert()
    with pytest.raises(PlanError, match="Shared factors need one rank"):
        make(model, target_modules=["query"], rank_pattern={"layer.1.attention.self.query": 5})
    assert not [m for m in model.modules() if isinstance(m, LotrLayer)]


def test_a_pair_of_ranks_is_output_then_input() -> None:
    model = make(bert(), target_modules=["intermediate.dense"], r=(3, 5))
    (group,) = (m for m in model.modules() if isinstance(m, LotrGroup))
    assert group.lotr_U["default"].weight.shape == (64, 3)
    assert group.lotr_V["default"].weight.shape == (5, 32)


def test_grouped_queries_share_one_pair_unless_the_configuration_says_otherwise() -> None:
    def groups(**fields: Any) -> list[tuple[int, int]]:
        config = LotrConfig(method="lotr_joint", target_modules=["q_proj", "v_proj"], **fields)
        return [group.shape for group in plan(llama(), config).groups]

    assert groups() == groups(unequal="slice") == [(32, 32)]
    for unequal in ("separate", "error"):
        model = llama()
        with pytest.raises(
            PlanError, match=r'"q_proj\|v_proj" cannot share factors: .*\(32, 32\) and \(16, 32\)'
        ):
            make(model, method="lotr_joint", target_modules=["q_proj", "v_proj"], unequal=unequal)
        assert not [m for m in model.modules() if isinstance(m, LotrLayer)]


@pytest.mark.parametrize(
    "settings, ranks",
    [
        ({"r": 40}, {"q_proj": (32, 32), "v_proj": (16, 16)}),
        ({"r": (40, 20)}, {"q_proj": (32, 20), "v_proj": (16, 20)}),
        ({"r": 4, "rank_pattern": {"v_proj": 20}}, {"q_proj": (4, 4), "v_proj": (16, 16)}),
        ({"r": 20, "method": "lora"}, {"q_proj": (20, 20), "v_proj": (16, 16)}),
        ({"r": 20, "blocks": "head"}, {"q_proj": (8, 8), "v_proj": (8, 8)}),
    ],
    ids=str,
)
def test_a_rank_above_the_block_is_cut_with_one_warning(
    settings: dict[str, Any], ranks: dict[str, tuple[int, int]], tmp_path: Any
) -> None:
    settings = {"target_modules": ["q_proj", "v_proj"], "init_weights": False, **settings}
    with pytest.warns(UserWarning, match="is cut to the size of the block") as warned:
        model = make(llama(), **settings).eval()
    assert len([w for w in warned if "is cut" in str(w.message)]) == 1
    found = {g.projections[0]: g.rank for g in model.peft_config["default"].recorded_plan().groups}
    assert found == ranks
    inputs = {"input_ids": tokens()}
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as again:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))
    assert not [w for w in again if "is cut" in str(w.message)]
    export(tmp_path, tmp_path / "lora")
    lora = PeftModel.from_pretrained(llama(), tmp_path / "lora")
    torch.testing.assert_close(outputs(lora, inputs), outputs(model, inputs), atol=5e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Rank")
def test_cut_ranks_are_truncated_swapped_summed_and_kept_as_a_basis(tmp_path: Any) -> None:
    options = {"target_modules": ["q_proj", "v_proj"], "init_weights": False, "r": 24}
    inputs = {"input_ids": tokens()}
    other = make(llama(), seed=1, **options).eval()
    other.save_pretrained(tmp_path / "other")
    model = make(llama(), seed=0, **options).eval()
    hotswap_adapter(model, str(tmp_path / "other"), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(outputs(model, inputs), outputs(other, inputs), atol=1e-6, rtol=1e-5)

    model.add_adapter("b", LotrConfig(**options))
    with pytest.raises(PlanError, match=r"add up to \(48, 48\) in group 'q_proj_32x32'"):
        model.base_model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum")
    assert set(model.peft_config) == {"default", "b"}

    task = get_peft_model(llama(), LotrConfig(basis=str(tmp_path / "other"))).eval()
    assert {g.rank for g in task.peft_config["default"].recorded_plan().groups} == {(24, 24), (16, 16)}

    truncate(other, rank=20)
    other.save_pretrained(tmp_path / "truncated")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "truncated")
    assert torch.equal(outputs(loaded, inputs), outputs(other, inputs))


# ---- the object


def test_the_configuration_that_is_passed_is_the_one_that_is_held() -> None:
    for make_model, task in (
        (bert, "SEQ_CLS"),
        (bert, "TOKEN_CLS"),
        (bert, "QUESTION_ANS"),
        (llama, "CAUSAL_LM"),
    ):
        config = LotrConfig(r=2, task_type=task)
        model = get_peft_model(make_model(), config)
        assert model.peft_config["default"] is config and config.targets
        if task != "CAUSAL_LM":
            assert config.modules_to_save


def test_an_adapter_that_is_made_again_takes_the_place_of_the_first() -> None:
    base, settings = bert(), {"r": 2, "target_modules": ["query"], "init_weights": False}
    first = get_peft_model(base, LotrConfig(**settings, seed=0))
    before = outputs(first, {"input_ids": tokens()})
    with pytest.warns(UserWarning, match="second time|multiple adapters"):
        again = get_peft_model(base, LotrConfig(**(settings | {"target_modules": ["value"]}), seed=1))
    fresh = get_peft_model(bert(), LotrConfig(**(settings | {"target_modules": ["value"]}), seed=1))
    found = outputs(again.eval(), {"input_ids": tokens()})
    torch.testing.assert_close(found, outputs(fresh.eval(), {"input_ids": tokens()}))
    assert not torch.equal(found, before)


@pytest.mark.parametrize(
    "words, instead",
    [
        ({"lora_alpha": 32}, r"scaling=2, LoRA's alpha / r"),
        ({"r": 4, "lora_alpha": 4, "use_rslora": True}, r"scaling=2, LoRA's alpha / √r"),
        ({"lora_dropout": 0.1}, r"dropout=0\.1"),
        ({"use_dora": True}, 'method="dora"'),
        ({"use_rslora": False}, "leave it out"),
        ({"init_lora_weights": False}, "init_weights=False"),
        ({"init_lora_weights": "gaussian"}, 'init="gaussian"'),
        ({"init_lora_weights": "eva"}, "use init"),
    ],
    ids=str,
)
def test_a_word_of_lora_is_refused_with_its_counterpart(words: dict[str, Any], instead: str) -> None:
    with pytest.raises(ConfigError, match=instead):
        LotrConfig(**words)


def test_the_constructor_reads_no_file() -> None:
    config = LotrConfig(basis="/nowhere/at/all")
    assert config.trainable == "cores"
    with pytest.raises(CheckpointError, match="does not exist"):
        plan(bert(), config)


# ---- seeds


def test_groups_and_factors_start_differently() -> None:
    model = make(bert(), target_modules=["query", "value"])
    factors = [p for n, p in model.named_parameters() if "lotrbasis" in n]
    flat = [f.reshape(-1) for f in factors]
    assert all(not torch.equal(a, b) for i, a in enumerate(flat) for b in flat[:i])


def test_a_module_that_is_no_text_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"target_modules has 3, which is no name"):
        LotrConfig(target_modules=["query", 3])  # type: ignore[list-item]
