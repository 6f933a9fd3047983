"""Adapters that keep the factors of another one: cores alone train, the file refers to the basis, and it is checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import banks
import lotr
from banks import stirred
from conftest import bert, gpt2, tokens
from lotr import CheckpointError, ConfigError, LotrConfig, PlanError
from lotr.adapters.export import export
from lotr.adapters.inspection import inspect
from lotr.files.adapter_folder import CONFIG, WEIGHTS, read_adapter
from lotr.tuner.layer import LotrLinear
from tuner_contract import linears, outputs

INPUTS = {"input_ids": tokens()}
TARGETS = ["query", "value"]


def _config(**fields: Any) -> LotrConfig:
    return LotrConfig(**{"r": 4, "target_modules": TARGETS, **fields})


def _saved(folder: Path, **fields: Any) -> Path:
    return banks.basis(folder, task_type=None, **fields)


@pytest.fixture(params=["lotr", "metatt_5d", "tenslora_att_qkv"])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def basis(tmp_path: Path, method: str) -> Path:
    return _saved(tmp_path / "basis", method=method)


@pytest.fixture
def task(basis: Path, method: str, tmp_path: Path) -> tuple[PeftModel, Path]:
    model = stirred(_config(method=method, basis=str(basis)), seed=1)
    model.save_pretrained(tmp_path / "task")
    return model, tmp_path / "task"


def test_cores_alone_train_on_the_factors_of_the_basis(task, basis: Path) -> None:
    model, _ = task
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and not [name for name in trained if "lotr_U" in name or "lotr_V" in name]
    factors = {k: t for k, t in load_file(basis / WEIGHTS).items() if "lotr_U" in k or "lotr_V" in k}
    mine = {name.replace(".default", ""): p for name, p in model.named_parameters()}
    assert factors and all(torch.equal(mine[key], tensor) for key, tensor in factors.items())


def test_the_file_holds_what_was_trained_and_a_reference(task, basis: Path) -> None:
    model, folder = task
    tensors = load_file(folder / WEIGHTS)
    assert sum(t.numel() for t in tensors.values()) == model.get_nb_trainable_parameters()[0]
    assert not [key for key in tensors if "lotr_U" in key or "lotr_V" in key]
    config = json.loads((folder / CONFIG).read_text())
    assert Path(config["basis"]) == basis and len(config["basis_hash"]) == 16


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_it_loads_on_its_basis(task, low_cpu_mem_usage: bool) -> None:
    model, folder = task
    loaded = PeftModel.from_pretrained(bert(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(outputs(loaded, INPUTS), outputs(model, INPUTS))
    again = PeftModel.from_pretrained(bert(), folder, is_trainable=True)
    assert again.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_a_basis_that_moved_along_is_found_beside_the_adapter(task, tmp_path: Path) -> None:
    model, _ = task
    (tmp_path / "elsewhere").mkdir()
    for name in ("basis", "task"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "elsewhere" / "task")
    assert torch.equal(outputs(loaded, INPUTS), outputs(model, INPUTS))


def test_a_copy_of_the_basis_stands_alone(basis: Path, method: str, tmp_path: Path) -> None:
    model = stirred(_config(method=method, basis=str(basis), basis_copy=True))
    model.save_pretrained(tmp_path / "task")
    shutil.rmtree(basis)
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "task", is_trainable=True)
    assert torch.equal(outputs(loaded, INPUTS), outputs(model, INPUTS))
    assert loaded.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_it_is_inspected_exported_and_merged_like_any_other(task, tmp_path: Path) -> None:
    model, folder = task
    expected = outputs(model, INPUTS)
    assert all(site.norm > 0 for site in inspect(folder).sites)
    export(folder, tmp_path / "lora")
    lora = PeftModel.from_pretrained(bert(), tmp_path / "lora")
    torch.testing.assert_close(outputs(lora, INPUTS), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(outputs(model.merge_and_unload(), INPUTS), expected, atol=2e-6, rtol=1e-5)


def test_a_basis_can_be_where_all_training_starts(basis: Path, method: str, tmp_path: Path) -> None:
    model = stirred(_config(method=method, basis=str(basis), trainable="all"))
    assert any("lotr_U" in name for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "whole")
    shutil.rmtree(basis)
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "whole")
    assert torch.equal(outputs(loaded, INPUTS), outputs(model, INPUTS))


def test_a_copy_of_the_basis_can_be_truncated(tmp_path: Path) -> None:
    basis = tmp_path / "basis"
    _saved(basis, r=8)
    model = stirred(LotrConfig(basis=str(basis), basis_copy=True), seed=1)
    lotr.truncate(model, rank=3)
    model.save_pretrained(tmp_path / "task")
    assert json.loads((tmp_path / "task" / CONFIG).read_text())["basis_hash"] is None
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "task")
    assert torch.equal(outputs(loaded, INPUTS), outputs(model, INPUTS))


@pytest.mark.parametrize("basis_copy", [False, True])
def test_factors_that_looked_at_data_can_be_kept_below_any_magnitude(
    basis_copy: bool, tmp_path: Path
) -> None:
    """Such a magnitude has no start of that kind, but these factors have had theirs."""
    _saved(tmp_path / "basis", init="gradient")
    fields = {"magnitude": "base_and_update", "basis_copy": basis_copy}
    model = stirred(LotrConfig(basis=str(tmp_path / "basis"), **fields), seed=1)
    model.save_pretrained(tmp_path / "task")
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "task")
    assert torch.equal(outputs(loaded, INPUTS), outputs(model, INPUTS))


# ---- sums


def _two(basis: Path, *fields: dict[str, Any]) -> PeftModel:
    """Two adapters with random cores on one model, each on the basis unless its fields say otherwise."""
    model = get_peft_model(bert(), LotrConfig(basis=str(basis), **fields[0]), adapter_name="a")
    model.add_adapter("b", LotrConfig(**{"basis": str(basis), **fields[1]}))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lotr_C" in name or "lotr_core" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def _check_sum(model: PeftModel, folder: Path) -> PeftModel:
    """Check that `sum` is `0.7 a - 2 b`, in the model and where it is loaded."""
    for layer in linears(model):
        expected = 0.7 * layer.get_delta_weight("a") - 2.0 * layer.get_delta_weight("b")
        assert expected.any()
        torch.testing.assert_close(layer.get_delta_weight("sum"), expected, atol=1e-6, rtol=1e-5)
    model.set_adapter("sum")
    model.save_pretrained(folder, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(bert(), folder / "sum")
    assert torch.equal(outputs(loaded, INPUTS), outputs(model.eval(), INPUTS))
    return loaded


@pytest.mark.parametrize("combination, scaling", [("cat", 0.5), ("linear", 1.0)])
def test_a_sum_on_one_basis_adds_cores_and_refers_to_it(
    method: str, combination: str, scaling: float, tmp_path: Path
) -> None:
    basis = tmp_path / "basis"
    _saved(basis, method=method, scaling=scaling, r=20 if method == "lotr" else 4)
    model = _two(basis, {}, {})
    model.base_model.add_weighted_adapter(["a", "b"], [0.7, -2.0], "sum", combination)
    loaded = _check_sum(model, tmp_path / "out")
    config = loaded.peft_config["default"]
    assert Path(config.basis) == basis and config.basis_hash == model.peft_config["a"].basis_hash
    assert config.r == model.peft_config["a"].r and config.scaling == scaling
    assert not [key for key in load_file(tmp_path / "out" / "sum" / WEIGHTS) if "lotr_U" in key]
    assert not [n for n, p in model.named_parameters() if ".sum" in n and "lotr_U" in n and p.requires_grad]


@pytest.mark.parametrize(
    "fields",
    [
        ({}, {"basis": None, "r": 3, "target_modules": TARGETS, "seed": 5}),
        ({}, {"basis_copy": True}),
        ({"basis_copy": True}, {"basis_copy": True}),
        ({"trainable": "all"}, {}),
    ],
    ids=["and no basis", "and a copy", "copies", "all"],
)
def test_any_other_sum_stands_alone(basis: Path, method: str, fields: Any, tmp_path: Path) -> None:
    mine, other = fields
    model = _two(basis, mine, {**other, "method": method})
    model.base_model.add_weighted_adapter(["a", "b"], [0.7, -2.0], "sum")
    shutil.rmtree(basis)
    assert _check_sum(model, tmp_path / "out").peft_config["default"].basis is None


def test_a_sum_of_copies_whose_factors_were_truncated_stands_alone(tmp_path: Path) -> None:
    _saved(tmp_path / "basis")
    model = _two(tmp_path / "basis", {"basis_copy": True}, {})
    lotr.truncate(model, rank=2, adapter="a")
    model.base_model.add_weighted_adapter(["a", "b"], [0.7, -2.0], "sum")
    assert _check_sum(model, tmp_path / "out").peft_config["default"].r == 6


# ---- refusals


@pytest.mark.parametrize("rank", [2, 4])
def test_factors_to_which_the_file_refers_are_not_truncated(basis: Path, rank: int) -> None:
    """At the full rank too: they would be turned, and the file would still name those of the basis."""
    model = stirred(LotrConfig(basis=str(basis)), seed=1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    free = model.peft_config["default"].core == "free"
    with pytest.raises(ConfigError, match=r"basis_copy=True" if free else "Only free cores"):
        lotr.truncate(model, rank=rank)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_basis_with_other_numbers_is_refused(task, basis: Path) -> None:
    tensors = load_file(basis / WEIGHTS)
    key = next(key for key in tensors if "lotr_V" in key)
    tensors[key][0, 0] += 1
    save_file(tensors, basis / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"not those that the adapter was trained on: hash \w{16}"):
        PeftModel.from_pretrained(bert(), task[1])
    with pytest.raises(CheckpointError, match="hash"):
        inspect(task[1])


def test_a_basis_that_is_gone_is_named(task, basis: Path) -> None:
    shutil.rmtree(basis)
    with pytest.raises(CheckpointError, match=r"basis of the adapter cannot be read: .*basis does not exist"):
        PeftModel.from_pretrained(bert(), task[1])


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"r": 3}, "r=3 contradicts basis=.*which has r=4"),
        ({"r": (4, 8)}, r"r=\(4, 8\) contradicts"),
        ({"r": "4"}, "r='4' is not a rank"),
        ({"rank_pattern": {"query": 2}}, "rank_pattern={'query': 2} contradicts"),
        ({"method": "lotr_joint"}, "method='lotr_joint' contradicts"),
        (
            {"modes": ("layer", "projection")},
            r"modes=\('layer', 'projection'\) contradicts .* modes=\('layer',\)",
        ),
        ({"core": "tucker"}, "core='tucker' contradicts"),
        ({"blocks": "head"}, "blocks='head' contradicts"),
        ({"scaling": 2.0}, r"scaling=2\.0 contradicts"),
        ({"init": "gradient"}, "init='gradient' contradicts"),
    ],
    ids=str,
)
def test_a_field_that_contradicts_the_basis_is_refused(
    tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    _saved(tmp_path / "basis")
    with pytest.raises(ConfigError, match=says):
        lotr.plan(bert(), LotrConfig(basis=str(tmp_path / "basis"), **fields))


def test_the_structure_is_that_of_the_basis_where_nothing_is_said(tmp_path: Path) -> None:
    structure = {
        "method": "metatt_5d",
        "r": 3,
        "scaling": 0.5,
        "magnitude": "per_output",
        "layers_to_transform": [0, 2],
        "target_modules": ["query", "value"],
        "rank_pattern": {},
    }
    stirred(LotrConfig(**structure)).save_pretrained(tmp_path / "basis")
    config = LotrConfig(basis=str(tmp_path / "basis"))
    assert LotrConfig(**config.to_dict()).to_dict() == config.to_dict()  # what is open stays open
    model = get_peft_model(bert(), config)
    for name, value in structure.items():
        found = getattr(config, name)
        assert (sorted(found) if name == "target_modules" else found) == value, name
    assert (config.modes, config.core, config.trainable) == (("head", "projection", "layer"), "tt", "cores")
    assert LotrConfig(**config.to_dict()) == config  # what was filled in is no contradiction
    assert not [n for n, p in model.named_parameters() if p.requires_grad and ("_U" in n or "_V" in n)]
    plain = LotrConfig(basis=str(tmp_path / "basis"), magnitude="none")
    assert lotr.plan(bert(), plain).magnitude == "none"


def test_ranks_of_single_modules_are_those_of_the_basis(tmp_path: Path) -> None:
    _saved(tmp_path / "basis", rank_pattern={"query": (2, 3)})
    model = get_peft_model(bert(), LotrConfig(basis=str(tmp_path / "basis")))
    model.save_pretrained(tmp_path / "task")
    assert len(load_file(tmp_path / "task" / WEIGHTS)) == 6
    ranks = {group["group"]: group["rank"] for group in inspect(tmp_path / "task").groups}
    assert ranks == {"query_32x32": (2, 3), "value_32x32": (4, 4)}


def test_some_modules_of_the_basis_can_be_adapted_and_no_others(tmp_path: Path) -> None:
    _saved(tmp_path / "basis")
    some = get_peft_model(bert(), LotrConfig(basis=str(tmp_path / "basis"), target_modules=["value"]))
    assert some.get_nb_trainable_parameters()[0] == 3 * 4 * 4
    model = bert()
    modules = [type(module) for module in model.modules()]
    with pytest.raises(PlanError, match="no factors for group 'key"):
        get_peft_model(model, LotrConfig(basis=str(tmp_path / "basis"), target_modules=["key"]))
    assert [type(module) for module in model.modules()] == modules


@pytest.mark.parametrize("target", ["query", "value"])
def test_an_adapter_on_some_modules_of_its_basis_loads(target: str, tmp_path: Path) -> None:
    _saved(tmp_path / "basis")
    model = stirred(LotrConfig(basis=str(tmp_path / "basis"), target_modules=[target]), seed=1)
    model.save_pretrained(tmp_path / "some")
    for low in (False, True):
        loaded = PeftModel.from_pretrained(bert(), tmp_path / "some", low_cpu_mem_usage=low)
        assert torch.equal(outputs(loaded, INPUTS), outputs(model, INPUTS))
    assert [group["group"] for group in inspect(tmp_path / "some").groups] == [f"{target}_32x32"]
    export(tmp_path / "some", tmp_path / "lora")
    lora = PeftModel.from_pretrained(bert(), tmp_path / "lora")
    torch.testing.assert_close(outputs(lora, INPUTS), outputs(model, INPUTS), atol=2e-6, rtol=1e-5)


def test_the_hash_checks_what_an_adapter_on_some_modules_does_not_use(tmp_path: Path) -> None:
    basis = tmp_path / "basis"
    _saved(basis)
    some = LotrConfig(basis=str(basis), target_modules=["query"])
    get_peft_model(bert(), some).save_pretrained(tmp_path / "some")
    tensors = load_file(basis / WEIGHTS)
    key = next(key for key in tensors if "value_32x32.lotr_V" in key)
    save_file({**tensors, key: tensors[key] + 1}, basis / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="hash"):
        PeftModel.from_pretrained(bert(), tmp_path / "some")


def test_an_adapter_without_cores_or_of_another_method_is_no_basis(tmp_path: Path) -> None:
    _saved(tmp_path / "lora", method="lora")
    with pytest.raises(ConfigError, match="it cannot be a basis"):
        lotr.plan(bert(), LotrConfig(basis=str(tmp_path / "lora")))
    get_peft_model(bert(), LoraConfig(target_modules=TARGETS)).save_pretrained(tmp_path / "peft")
    with pytest.raises(CheckpointError, match="of the method LORA"):
        lotr.plan(bert(), LotrConfig(basis=str(tmp_path / "peft")))
    with pytest.raises(CheckpointError, match=r"cannot be read: .*nowhere does not exist"):
        lotr.plan(bert(), LotrConfig(basis=str(tmp_path / "nowhere")))


def test_a_basis_of_another_model_or_of_references_is_refused(task, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"matches no module of the model\. Known: c_attn"):
        get_peft_model(gpt2(), LotrConfig(basis=str(tmp_path / "basis")))
    with pytest.raises(CheckpointError, match="holds no factors"):
        get_peft_model(bert(), _config(basis=str(task[1])))


# ---- a task in a tensor train


def test_a_task_of_a_train_has_its_own_matrix_and_the_basis_the_others(tmp_path: Path) -> None:
    modes = ("projection", "task", "layer")
    config = _config(method="metatt_4d", modes=modes, init="gaussian", zero="none", core_init="uniform")
    first = get_peft_model(bert(), config)
    assert first.get_nb_trainable_parameters()[0] == 2 * 32 * 4 + (2 + 1 + 3) * 4 * 4
    first.save_pretrained(tmp_path / "basis")

    model = get_peft_model(bert(), LotrConfig(basis=str(tmp_path / "basis"))).eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2]: tuple(p.shape) for name, p in trained.items()} == {"core_1": (1, 4, 4)}
    assert torch.equal(outputs(model, INPUTS), outputs(bert(), INPUTS))  # its matrix starts at zero
    model(**INPUTS).logits.square().sum().backward()
    (own,) = trained.values()
    assert own.grad is not None and bool(own.grad.any())
    with torch.no_grad():
        own.copy_(torch.randn(1, 4, 4))
    model.save_pretrained(tmp_path / "task")
    saved = read_adapter(tmp_path / "task").tensors()
    assert [tuple(tensor.shape) for tensor in saved.values()] == [(1, 4, 4)]

    shared = read_adapter(tmp_path / "basis").tensors()
    numbers = {key.rpartition("joint")[2].partition(".")[2]: tensor for key, tensor in shared.items()}
    U, V = numbers["lotr_U.weight"], numbers["lotr_V.weight"].T
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "task")
    for path, layer in loaded.get_base_model().named_modules():
        if isinstance(layer, LotrLinear):
            p, n = int(path.endswith("value")), int(path.split("layer.")[1][0])
            train = numbers["lotr_shared.core_0"][p] @ own[0].detach() @ numbers["lotr_shared.core_2"][n]
            torch.testing.assert_close(
                layer.get_delta_weight("default"), U @ train @ V.T, atol=1e-5, rtol=1e-4
            )


def test_matrices_of_other_layers_are_not_taken_from_a_basis(tmp_path: Path) -> None:
    config = _config(method="metatt_4d", modes=("projection", "task", "layer"))
    get_peft_model(bert(), config).save_pretrained(tmp_path)
    with pytest.raises(PlanError, match="'core_2' of group 'joint_32x32' for other layers"):
        get_peft_model(bert(), LotrConfig(basis=str(tmp_path), layers_to_transform=[1]))


def test_a_task_without_a_train_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task.*core='free'"):
        LotrConfig(modes=("layer", "task"))
