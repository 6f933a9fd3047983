"""Experts that one parameter holds: each has a core of its own, and factors are shared as the row shares layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

import lotr
from conftest import Architecture, bert, tokens
from dense_truth import adapt
from lotr import METHODS, ConfigError, LotrConfig, PlanError
from lotr.errors import TrainingError
from lotr.math.stacked_weight import StackUpdate
from moe_models import EXPERTS, gpt_oss, mixtral, qwen
from tuner_contract import TunerContract, outputs

INPUTS = {"input_ids": tokens()}


@pytest.fixture(params=[qwen, mixtral, gpt_oss], ids=lambda make: make.__name__)
def make(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    return request.param


def config(**fields: Any) -> LotrConfig:
    start: dict[str, Any] = {"r": 3, "scaling": 2.0, "init_weights": False, "seed": 0}
    return LotrConfig(**(start | {"target_parameters": EXPERTS} | fields))


def adapted(make: Callable[[], nn.Module], **fields: Any) -> PeftModel:
    return get_peft_model(make(), config(**fields)).eval()


def dense(model: PeftModel, plain: nn.Module, row: str, adapter: str = "default") -> nn.Module:
    """Write the adapted weights into a plain model, from the adapter's file alone."""
    of_adapter = model.peft_config[adapter]
    tensors = get_peft_model_state_dict(model, adapter_name=adapter)
    return adapt(plain, of_adapter.recorded_plan(), tensors, of_adapter.scaling, row)


class TestExperts(TunerContract):
    """The contract, with experts alone adapted."""

    # experts see tokens, not rows
    test_each_row_of_a_mixed_batch_uses_its_own_adapter = None
    # torch groups no products of double precision
    test_the_whole_model_can_change_its_type = None
    # the state names no parameter
    test_a_state_dict_says_which_modules_are_adapted = None

    @pytest.fixture
    def architecture(self, make: Callable[[], nn.Module]) -> Architecture:
        return Architecture(make, lambda: INPUTS, [], 4)

    def config(self, architecture: Architecture, **kwargs: Any) -> LotrConfig:
        return super().config(architecture, target_modules=None, target_parameters=EXPERTS, **kwargs)


# ---- the formula


IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_output_is_that_of_the_dense_weights(make, implementation) -> None:
    model, plain = adapted(make), make()
    for each in (model.base_model.model, plain):
        each.set_experts_implementation(implementation)
    base = outputs(plain, INPUTS)
    assert (outputs(model, INPUTS) - base).abs().max() > 1e-4
    torch.testing.assert_close(outputs(model, INPUTS), outputs(dense(model, plain, "lotr"), INPUTS))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_those_of_the_dense_sum(make, implementation, monkeypatch) -> None:
    gradients = []
    for grids in ("shared", "dense"):
        model = adapted(make).train()
        model.base_model.model.set_experts_implementation(implementation)
        if grids == "dense":
            monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        model(**INPUTS).logits.square().mean().backward()
        monkeypatch.undo()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("modes", [("layer",), ()], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_dense_update_is_built(make, implementation, modes, monkeypatch) -> None:
    model, plain = adapted(make, modes=modes), make()
    for each in (model.base_model.model, plain):
        each.set_experts_implementation(implementation)
    expected = outputs(dense(model, plain, "lotr"), INPUTS)
    monkeypatch.setattr(StackUpdate, "dense", lambda update: pytest.fail("a dense update was built"))
    torch.testing.assert_close(outputs(model, INPUTS), expected)


_NO_EXPERTS = {"dora", "bora", "map"}


@pytest.mark.parametrize("row", sorted(set(METHODS) - _NO_EXPERTS))
def test_every_row_has_experts_beside_attention(row) -> None:
    modules = ["q_proj", "v_proj"]
    fields = {"method": row, "target_modules": modules, "zero": "none", "init_weights": None}
    model = adapted(qwen, **fields)
    with torch.device("meta"):
        planned = lotr.plan(qwen(), config(**fields))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == planned.n_parameters == model.peft_config["default"].recorded_plan().n_parameters
    result = outputs(model, INPUTS)
    if row != "cara":  # whose squares are transposed
        torch.testing.assert_close(result, outputs(dense(model, qwen(), row), INPUTS), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs(model.merge_and_unload(), INPUTS), result, atol=1e-5, rtol=1e-5)


# ---- sharing and counts


def test_every_expert_has_a_core_and_all_layers_and_experts_share_factors(make) -> None:
    with torch.device("meta"):
        plan = lotr.plan(make(), LotrConfig(r=3, target_parameters=EXPERTS))
    assert [(group.shape, group.modes) for group in plan.groups] == [
        ((24, 16), ("layer", "expert")),
        ((16, 12), ("layer", "expert")),
    ]
    assert plan.n_factors == 3 * (24 + 16 + 16 + 12)
    assert plan.n_cores == 2 * 2 * 4 * 3 * 3
    assert plan.lora_per_rank == 2 * 4 * (24 + 16 + 16 + 12)
    assert plan.n_parameters == adapted(make).get_nb_trainable_parameters()[0]


def test_pefts_lora_has_as_many_numbers_as_the_plan_says_on_the_shape_of_a_large_model() -> None:
    """Two layers of Qwen3 30B-A3B, with 128 experts each, on the meta device."""
    layer = {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}
    with torch.device("meta"):
        model = qwen(**layer, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768)
        plan = lotr.plan(model, LotrConfig(r=16, target_modules="all-linear"))
        attention = [f"{name}_proj" for name in "qkvo"]
        lora = get_peft_model(
            model,
            LoraConfig(r=16, target_modules=attention, target_parameters=EXPERTS),
            low_cpu_mem_usage=True,
        )
    assert 16 * plan.lora_per_rank == lora.get_nb_trainable_parameters()[0] == 26_771_456
    assert plan.n_factors == 380_928 and plan.n_cores == 2 * (4 + 2 * 128) * 16 * 16


def test_experts_alone_share_where_layers_do_not() -> None:
    plan = lotr.plan(qwen(), LotrConfig(r=3, modes=("expert",), target_parameters=EXPERTS))
    assert len(plan.groups) == 4 and all(len(group.sites) == 4 for group in plan.groups)
    assert len(lotr.plan(qwen(), LotrConfig(r=3, modes=(), target_parameters=EXPERTS)).groups) == 16


@pytest.mark.parametrize(
    "make_model, names",
    [(qwen, ["gate_proj", "up_proj", "down_proj"]), (mixtral, ["w1", "w2", "w3"]), (gpt_oss, ["down_proj"])],
)
def test_old_names_mean_the_parameters(make_model, names) -> None:
    own = EXPERTS if len(names) == 3 else EXPERTS[1:]
    expected = lotr.plan(make_model(), LotrConfig(target_modules=["q_proj"], target_parameters=own))
    assert lotr.plan(make_model(), LotrConfig(target_modules=["q_proj", *names])).targets == expected.targets


def test_an_old_name_that_linear_modules_have_too_means_both() -> None:
    paths = [target.path for target in lotr.plan(
        qwen(mlp_only_layers=[0]), LotrConfig(target_modules=["down_proj"])
    ).targets]  # fmt: skip
    assert paths == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.experts.down_proj"]


class Ungated(nn.Module):
    """Experts without a gate, as Nemotron's, beside shared ones, as Inkling's."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16)
        for name in ("experts", "shared_experts"):
            stacks = nn.Module()
            stacks.up_proj, stacks.down_proj = (nn.Parameter(torch.randn(4, 12, 12)) for _ in range(2))
            self.add_module(name, stacks)


@pytest.mark.parametrize("names", ["all-linear", ["q_proj", "up_proj"], r".*(q|up|down)_proj"], ids=str)
def test_experts_are_named_as_they_are_too(names) -> None:
    model = nn.ModuleDict({"mlp": Ungated()})
    stacks = ("up_proj",) if isinstance(names, list) else ("up_proj", "down_proj")
    expected = {f"mlp.{e}.{name}" for e in ("experts", "shared_experts") for name in stacks}
    found = {target.path for target in lotr.plan(model, LotrConfig(target_modules=names)).targets}
    assert found == expected | {"mlp.q_proj"}


def test_a_regex_reaches_experts_by_old_names_and_by_layer() -> None:
    def experts(regex: str) -> list[str]:
        targets = lotr.plan(qwen(), LotrConfig(target_modules=regex)).targets
        return [target.path for target in targets if target.experts]

    both = [f"model.layers.1.mlp.{name}" for name in EXPERTS]
    assert experts(r".*\.1\.(self_attn\.q_proj|mlp\..*(gate|up|down)_proj)") == both
    assert experts(r".*\.1\.mlp\.experts\..*") == both
    with pytest.raises(PlanError, match="holds 'gate_proj' too"):
        experts(r".*\.(q_proj|up_proj)")


def test_all_linear_means_the_experts_too(make) -> None:
    targets = lotr.plan(make(), LotrConfig(target_modules="all-linear")).targets
    assert sum(target.experts == 4 for target in targets) == 4
    assert sum(target.path.endswith("o_proj") for target in targets) == 2


def test_layers_and_exclusions_reach_experts() -> None:
    only = LotrConfig(target_parameters=EXPERTS, layers_to_transform=[1], layers_pattern="layers")
    assert {t.path.split(".")[2] for t in lotr.plan(qwen(), only).targets} == {"1"}
    without = LotrConfig(target_modules="all-linear", exclude_modules=r".*\.experts\..*")
    assert not any(target.experts for target in lotr.plan(qwen(), without).targets)


# ---- training and files


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("fields", [{}, {"target_modules": "all-linear", "target_parameters": None}], ids=str)
def test_a_saved_adapter_loads(make, fields, low_memory, tmp_path: Path) -> None:
    model = adapted(make, **fields)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path, low_cpu_mem_usage=low_memory).eval()
    assert torch.equal(outputs(loaded, INPUTS), outputs(model, INPUTS))
    reports = lotr.inspect(tmp_path).sites
    assert sum("experts" in report.module for report in reports) == 2 * 2 * 4


def test_cores_train_on_a_basis_with_experts(tmp_path: Path) -> None:
    adapted(qwen).save_pretrained(tmp_path / "basis")
    model = get_peft_model(qwen(), LotrConfig(basis=str(tmp_path / "basis"), init_weights=False)).eval()
    assert model.get_nb_trainable_parameters()[0] == 2 * 2 * 4 * 3 * 3
    model.save_pretrained(tmp_path / "task")
    loaded = PeftModel.from_pretrained(qwen(), tmp_path / "task").eval()
    assert torch.equal(outputs(loaded, INPUTS), outputs(model, INPUTS))


def test_factors_can_start_from_the_weights(make) -> None:
    assert torch.equal(
        outputs(adapted(make, init="weight", init_weights=True), INPUTS), outputs(make(), INPUTS)
    )


# ---- merging and several adapters


def test_adapters_can_be_switched_added_summed_disabled_and_deleted(make) -> None:
    model = adapted(make)
    first = outputs(model, INPUTS)
    model.add_adapter("other", config(r=2, seed=1, target_parameters=EXPERTS[:1]))
    model.set_adapter("other")
    second = outputs(model, INPUTS)
    torch.testing.assert_close(second, outputs(dense(model, make(), "lotr", "other"), INPUTS))
    model.base_model.set_adapter(["default", "other"])
    both = dense(model, dense(model, make(), "lotr", "other"), "lotr", "default")
    torch.testing.assert_close(outputs(model, INPUTS), outputs(both, INPUTS))
    with model.disable_adapter():
        assert torch.equal(outputs(model, INPUTS), outputs(make(), INPUTS))
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(outputs(model, INPUTS), first)
    model.add_adapter("third", config(seed=2))
    model.base_model.add_weighted_adapter(["default", "third"], [0.5, -1.0], "sum")
    model.set_adapter("sum")
    half, minus = copy.deepcopy(model.peft_config["default"]), copy.deepcopy(model.peft_config["third"])
    plain = make()
    for of_adapter, name, weight in ((half, "default", 0.5), (minus, "third", -1.0)):
        model.peft_config[name].scaling = of_adapter.scaling * weight
        plain = dense(model, plain, "lotr", name)
    torch.testing.assert_close(outputs(model, INPUTS), outputs(plain, INPUTS))


def test_a_sum_is_truncated_back() -> None:
    model = adapted(qwen)
    expected = outputs(model, INPUTS)
    model.base_model.add_weighted_adapter(["default", "default"], [0.5, 0.5], "sum")
    model.set_adapter("sum")
    lotr.truncate(model, rank=3)
    torch.testing.assert_close(outputs(model, INPUTS), expected, atol=1e-5, rtol=1e-5)


# ---- what is refused


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"method": "dora"}, ConfigError, "magnitude='per_output' is not supported on experts"),
        ({"dropout": 0.1}, ConfigError, "dropout=0.1 is not supported on experts"),
        ({"target_parameters": ["experts.gate_upproj"]}, PlanError, "Near matches: experts.gate_up_proj"),
        ({"target_parameters": ["norm.weight"]}, PlanError, "matches no stack of experts"),
        ({"target_modules": ["gate_proj"]}, PlanError, "holds 'up_proj' too"),
        ({"target_parameters": None, "target_modules": ["q_proj"], "modes": ("layer", "expert")}, PlanError,
         "no adapted parameter holds experts"),
    ],
    ids=str,
)  # fmt: skip
def test_what_experts_do_not_have_is_refused_before_the_model_is_touched(fields, error, message) -> None:
    model = qwen()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=message):
        get_peft_model(model, config(**({"init_weights": None, "scaling": None} | fields)))
    assert [name for name, _ in model.named_modules()] == before


def test_quantised_experts_are_refused() -> None:
    model = qwen()
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(PlanError, match="not quantised"):
        lotr.plan(model, LotrConfig(target_parameters=EXPERTS))


def test_training_under_zero_3_is_refused() -> None:
    model = adapted(qwen)
    for parameter in model.parameters():
        parameter.ds_id = 0  # as DeepSpeed marks what it cuts into parts
    with pytest.raises(TrainingError, match="Use ZeRO-2 or FSDP2"):
        model(**INPUTS)
    assert torch.equal(outputs(model, INPUTS), outputs(adapted(qwen), INPUTS))


def test_mixed_batches_of_adapters_and_starts_from_data_are_refused() -> None:
    model = adapted(qwen, init_weights=True)
    with pytest.raises(ConfigError, match="experts see tokens, not rows"):
        outputs(model, INPUTS, adapter_names=["default"] * 4)
    with pytest.raises(ConfigError, match="their gradients are not watched"):
        lotr.init_from_data(model, [INPUTS])


def test_a_model_without_experts_is_as_before() -> None:
    assert not any(
        target.experts for target in lotr.plan(bert(), LotrConfig(target_modules="all-linear")).targets
    )


def test_experts_adapted_beside_others_leave_as_a_lora(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """PEFT goes by the order of the parameters, whatever another adapter has adapted before."""
    model = adapted(make, target_parameters=EXPERTS[:1])
    model.add_adapter("b", config(init_weights=False))
    model.set_adapter("b")
    model.save_pretrained(tmp_path)
    expected = outputs(model, INPUTS)
    lotr.export(tmp_path / "b", tmp_path / "lora")
    loaded = PeftModel.from_pretrained(make(), tmp_path / "lora").eval()
    torch.testing.assert_close(outputs(loaded, INPUTS), expected, atol=1e-5, rtol=1e-4)
