"""`lotr.init_from_lora`: factors turn towards a LoRA, against its dense updates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorly as tl
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn

import lotr
from conftest import bert, gpt2, llama, tokens
from loras import dense, lora
from lotr import CheckpointError, ConfigError, LotrConfig
from lotr.files.peft_lora import read_lora
from lotr.tuner.factors import parts_of
from tuner_contract import outputs

TARGETS: dict[Callable[[], nn.Module], list[str]] = {
    bert: ["query", "value"],
    llama: ["q_proj", "k_proj", "down_proj"],
    gpt2: ["c_attn", "c_fc"],
}


def _lora(make: Any, folder: Path, **fields: Any) -> dict[str, Tensor]:
    """Save a LoRA with random numbers; return its dense updates `(out, in)` by module."""
    targets = {"target_modules": TARGETS[make], "fan_in_fan_out": make is gpt2}
    updates = dense(lora(folder, make=make, **{**targets, **fields}))
    return {path: dW.T if make is gpt2 else dW for path, dW in updates.items()}


def _fresh(make: Any, **fields: Any) -> nn.Module:
    config = {"r": 4, "target_modules": TARGETS[make], "seed": 0, **fields}
    return get_peft_model(make(), LotrConfig(**config)).eval()


def _sites(model: nn.Module, dense: dict[str, Tensor]) -> dict[Any, list[Tensor]]:
    """Return the dense update of every site, by group."""
    sites: dict[Any, list[Tensor]] = {}
    for group, parts in parts_of(model, "default").items():
        for _, part in parts:
            for site in part.sites:
                (o, i), W = site.shape, dense[site.module]
                sites.setdefault(group, []).append(W[site.row : site.row + o, site.column : site.column + i])
    return sites


def _factors(group: Any) -> tuple[Tensor, Tensor]:
    return group.lotr_U["default"].weight.detach(), group.lotr_V["default"].weight.detach().T


BLOCKS, SCALINGS = ["none", "head", "square"], ["alpha", "rslora", "patterns"]
#: Every pair of model, blocks and scaling.
CASES = [
    (make, BLOCKS[n], SCALINGS[(n + m) % 3]) for m, make in enumerate(TARGETS) for n in range(len(BLOCKS))
]


@pytest.mark.parametrize("make, blocks, scaling", CASES)
def test_the_factors_are_the_best_for_the_dense_updates(
    make: Any, blocks: str, scaling: str, tmp_path: Path
) -> None:
    """Also of fused weights and of heads; and the model computes what the base does."""
    first, last = TARGETS[make][0], TARGETS[make][-1]
    fields = {
        "patterns": {"rank_pattern": {first: 5}, "alpha_pattern": {last: 9}},
        "rslora": {"use_rslora": True},
    }
    updates, model = _lora(make, tmp_path, **fields.get(scaling, {})), _fresh(make, blocks=blocks)
    inputs = {"input_ids": tokens()}
    lotr.init_from_lora(model, tmp_path)
    assert torch.equal(outputs(model, inputs), outputs(make(), inputs))
    assert model.peft_config["default"].init == "lora"
    for group, sites in _sites(model, updates).items():
        stack = torch.stack(sites).double()
        with tl.backend_context("pytorch"):
            core = partial_tucker(stack, rank=(4, 4), modes=[1, 2], n_iter_max=300, tol=1e-12)[0][0]
        U, V = (factor.double() for factor in _factors(group))
        torch.testing.assert_close(U.T @ U, torch.eye(4).double(), atol=1e-5, rtol=0)
        assert (U.T @ stack @ V).square().sum() > (1 - 1e-4) * core.square().sum()


def test_matrices_are_read_with_peft_s_scaling(tmp_path: Path) -> None:
    fields = {
        "use_rslora": True,
        "rank_pattern": {"layer.1.attention.self.query": 5},
        "alpha_pattern": {"query": 9},
    }
    dense, folder = _lora(bert, tmp_path, **fields), read_lora(tmp_path)
    assert folder.keys.keys() == dense.keys()
    for module, dW in dense.items():
        with folder.reader() as read:
            A, B = read(module)
        torch.testing.assert_close(B @ A, dW)


def test_a_lora_made_of_known_factors_is_recovered(tmp_path: Path) -> None:
    _lora(bert, tmp_path, r=4)
    known = {name: torch.linalg.qr(torch.randn(32, 8)).Q for name in TARGETS[bert]}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key in tensors:
        Q = next(Q for name, Q in known.items() if name in key)
        in_basis = torch.randn(4, 4)
        tensors[key] = (in_basis @ Q[:, 4:].T if "lora_A" in key else Q[:, :4] @ in_basis).contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = _fresh(bert)
    lotr.init_from_lora(model, tmp_path)
    for group, parts in parts_of(model, "default").items():
        Q = known[parts[0][1].sites[0].projection]
        for factor, theirs in zip(_factors(group), (Q[:, :4], Q[:, 4:]), strict=True):
            torch.testing.assert_close(factor @ factor.T, theirs @ theirs.T, atol=1e-5, rtol=0)


def test_modules_that_one_of_both_adapts_are_named(tmp_path: Path) -> None:
    _lora(bert, tmp_path / "few", layers_to_transform=[0, 1])
    with pytest.warns(UserWarning, match=r"does not adapt bert\.encoder\.layer\.2.*no say"):
        lotr.init_from_lora(_fresh(bert), tmp_path / "few")
    _lora(bert, tmp_path / "more", target_modules=["query", "value", "key"])
    with pytest.warns(UserWarning, match=r"'default' does not adapt .*key.*left out"):
        lotr.init_from_lora(_fresh(bert), tmp_path / "more")
    with pytest.raises(ConfigError, match="changes no module of group 'attention-output-dense"):
        lotr.init_from_lora(_fresh(bert, target_modules=["query", "output.dense"]), tmp_path / "few")


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"use_dora": True}, "is a DoRA"),
        ({"lora_bias": True}, r"lora_B\.bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base weight"),
    ],
    ids=str,
)
def test_an_update_that_is_not_b_times_a_is_refused(
    fields: dict[str, Any], says: str, tmp_path: Path
) -> None:
    model = get_peft_model(bert(), LoraConfig(r=3, target_modules=TARGETS[bert], **fields))
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        lotr.init_from_lora(_fresh(bert), tmp_path)


def test_folders_that_hold_no_lora_of_this_base_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        lotr.init_from_lora(_fresh(bert), tmp_path / "nowhere")
    _fresh(bert).save_pretrained(tmp_path / "lotr")
    with pytest.raises(CheckpointError, match="of type LOTR"):
        lotr.init_from_lora(_fresh(bert), tmp_path / "lotr")
    _lora(bert, tmp_path / "lora")
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({key: t[:, :16].contiguous() if "lora_A" in key else t for key, t in tensors.items()}, weights)
    with pytest.raises(ConfigError, match=r"shape \(32, 16\) .*\(32, 32\): .*another base model"):
        lotr.init_from_lora(_fresh(bert), tmp_path / "lora")
    save_file({key: t * float("nan") for key, t in tensors.items()}, weights)
    with pytest.raises(CheckpointError, match="is not finite"):
        lotr.init_from_lora(_fresh(bert), tmp_path / "lora")
    weights.unlink()
    torch.save(tensors, tmp_path / "lora" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="Pickled weights are never read"):
        lotr.init_from_lora(_fresh(bert), tmp_path / "lora")


def test_a_lora_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    get_peft_model(bert(), LoraConfig(r=3, target_modules=TARGETS[bert])).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="never trained"):
        lotr.init_from_lora(_fresh(bert), tmp_path)


def test_an_adapter_that_was_trained_keeps_its_factors(tmp_path: Path) -> None:
    _lora(bert, tmp_path)
    model = _fresh(bert, init_weights=False)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ConfigError, match="is not zero"):
        lotr.init_from_lora(model, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
