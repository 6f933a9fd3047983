"""What a configuration selects, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from conftest import ARCHITECTURES, Architecture, bert, gpt2, llama, t5, tokens
from lotr import ConfigError, LotrConfig, PlanError
from lotr.tuner.group import LotrGroup, LotrLayer
from lotr.tuner.layer import LotrLinear
from tuner_contract import linears, outputs


def adapted(model: nn.Module) -> list[str]:
    return [
        path.removeprefix("base_model.model.")
        for path, module in model.named_modules()
        if isinstance(module, LotrLinear)
    ]


def make(model: nn.Module, **kwargs: Any) -> PeftModel:
    return get_peft_model(model, LotrConfig(**({"r": 2} | kwargs)))


QUERIES = [f"bert.encoder.layer.{n}.attention.self.query" for n in range(3)]


# ---- which modules


def test_a_list_names_modules_by_the_end_of_their_path() -> None:
    assert adapted(make(bert(), target_modules=["query"])) == QUERIES


def test_a_regex_must_match_the_whole_path() -> None:
    assert adapted(make(bert(), target_modules=r".*layer\.[02]\..*\.query")) == [QUERIES[0], QUERIES[2]]


def test_all_linear_takes_every_linear_but_the_head() -> None:
    model = make(bert(), target_modules="all-linear", task_type="SEQ_CLS")
    names = adapted(model)
    assert len(names) == 3 * 6 + 1 and not any("classifier" in name for name in names)
    output = make(llama(), target_modules="all-linear")
    assert len(adapted(output)) == 3 * 7 and "lm_head" not in adapted(output)


def test_excluded_modules_are_left_out() -> None:
    names = adapted(make(bert(), target_modules=["query", "value"], exclude_modules=["value"]))
    assert names == QUERIES
    names = adapted(make(bert(), target_modules=["query"], exclude_modules=r".*layer\.1\..*"))
    assert names == [QUERIES[0], QUERIES[2]]


def test_layers_to_transform_takes_those_layers_only() -> None:
    assert adapted(make(bert(), target_modules=["query"], layers_to_transform=[0, 2])) == [
        QUERIES[0],
        QUERIES[2],
    ]
    assert adapted(make(bert(), target_modules=["query"], layers_to_transform=1)) == [QUERIES[1]]


def test_layers_pattern_names_the_list_that_is_counted() -> None:
    kwargs = {"target_modules": ["q"], "layers_to_transform": [0]}
    assert len(adapted(make(t5(), layers_pattern="block", **kwargs))) == 2 * 1 + 1
    # in the decoder, number 0 of each block's "layer" list is self-attention, number 1 cross-attention
    names = adapted(make(t5(), layers_pattern="layer", **kwargs))
    assert len(names) == 4 and all(".layer.0." in name for name in names)


@pytest.mark.parametrize(
    "model, targets",
    [(bert, ["query", "value"]), (llama, ["q_proj", "v_proj"]), (gpt2, ["c_attn"]), (t5, ["q", "v"])],
)
def test_without_targets_the_usual_modules_of_the_architecture_are_taken(model: Any, targets: Any) -> None:
    names = adapted(make(model()))
    assert names and {name.rpartition(".")[2] for name in names} == set(targets)


def test_an_unknown_architecture_must_name_its_modules() -> None:
    model = nn.Sequential()
    model.add_module("up", nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"no default\. .*end in: up\."):
        make(model)


def test_targets_that_match_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="querry"):
        make(bert(), target_modules=["querry"])


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


def test_queries_and_values_of_unequal_width_cannot_share_one_pair() -> None:
    model = llama()
    with pytest.raises(
        PlanError, match=r'"q_proj\|v_proj" cannot share factors: .*\(32, 32\) and \(16, 32\)'
    ):
        make(model, method="lotr_joint", target_modules=["q_proj", "v_proj"])
    assert not [m for m in model.modules() if isinstance(m, LotrLayer)]


def test_a_rank_above_the_block_is_refused() -> None:
    with pytest.raises(PlanError, match="k can be at most 16"):
        make(llama(), target_modules=["v_proj"], r=17)


def test_joint_projections_share_one_pair(architecture: Architecture) -> None:
    model = make(bert(), method="lotr_joint", target_modules=["query", "value"])
    assert len([m for m in model.modules() if isinstance(m, LotrGroup)]) == 1
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * 32 + 6 * 2 * 2


# ---- settings that mean nothing


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "lore"}, "method='lore'"),
        ({"modes": ["layers"]}, "modes=.*'layers'"),
        ({"core": "fre"}, "core='fre' .*Near matches: free"),
        ({"init": "gausian"}, "init='gausian' .*Near matches: gaussian"),
        ({"magnitude": "dora"}, "magnitude='dora'"),
        ({"bias": "lora_only"}, "bias='lora_only' .*Near matches: lotr_only"),
        ({"r": 0}, "r=0"),
        ({"r": (2, -1)}, r"r=\(2, -1\)"),
        ({"r": True}, "r=True"),
        ({"r": 1.5}, r"r=1\.5"),
        ({"rank_pattern": {"query": 0}}, "rank_pattern\\['query'\\]=0"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"scaling": 0.0}, r"scaling=0\.0"),
        ({"scaling": float("nan")}, "scaling=nan"),
        ({"layers_pattern": "layers"}, "layers_pattern is set"),
        ({"target_modules": ".*query", "layers_to_transform": [0]}, "layers_to_transform cannot"),
    ],
)
def test_a_setting_without_meaning_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LotrConfig(**settings)


# ---- dropout, seeds


def test_dropout_drops_in_training_only() -> None:
    model = make(bert(), target_modules=["query"], dropout=0.5, init_weights=False)
    layer = next(linears(model))
    x = torch.ones(3, 32)
    full = layer.eval().update("default", x)
    assert torch.equal(layer.update("default", x), full)
    layer.train()
    first, second = layer.update("default", x), layer.update("default", x)
    assert not torch.equal(first, full) and not torch.equal(first, second)
    mean = torch.stack([layer.update("default", x) for _ in range(2000)]).mean((0, 1))
    assert (mean - full[0]).abs().max() < 0.15 * full.abs().max()


def test_building_an_adapter_leaves_the_global_random_state() -> None:
    model, before = bert(), torch.get_rng_state()
    make(model, target_modules="all-linear", task_type="SEQ_CLS", init_weights=False)
    assert torch.equal(torch.get_rng_state(), before)


def _factors(**kwargs: Any) -> torch.Tensor:
    model = make(ARCHITECTURES["bert"].make(), target_modules=["query", "value"], **kwargs)
    return torch.cat([p.flatten() for n, p in model.named_parameters() if "lotrbasis" in n])


def test_one_seed_gives_one_set_of_factors() -> None:
    assert torch.equal(_factors(seed=3), _factors(seed=3))
    assert not torch.equal(_factors(seed=3), _factors(seed=4))


def test_without_a_seed_that_of_torch_decides() -> None:
    torch.manual_seed(5)
    first = _factors()
    torch.rand(3)
    assert torch.equal(_factors(), first)
    torch.manual_seed(6)
    assert not torch.equal(_factors(), first)


def test_groups_and_factors_start_differently() -> None:
    model = make(bert(), target_modules=["query", "value"])
    factors = [p for n, p in model.named_parameters() if "lotrbasis" in n]
    flat = [f.reshape(-1) for f in factors]
    assert all(not torch.equal(a, b) for i, a in enumerate(flat) for b in flat[:i])
