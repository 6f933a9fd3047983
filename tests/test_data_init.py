"""`lotr.init_from_data`: factors turn towards gradients, and the model computes what it did before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn

import lotr
from conftest import bert, gpt2, llama, tokens
from lotr import ConfigError, LotrConfig, TrainingError
from lotr.tuner.factors import parts_of
from lotr.tuner.group import LotrGroup

MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "bert": (bert, ["query", "value", "dense"]),
    "llama": (llama, ["q_proj", "k_proj", "o_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_proj"]),
}


def _batches(name: str) -> list[dict[str, Tensor]]:
    ids = [tokens(8, 9, seed=n) for n in range(2)]
    return [{"input_ids": x, "labels": torch.arange(8) % 3 if name == "bert" else x} for x in ids]


def _adapted(name: str, method: str = "lotr", **fields: Any) -> nn.Module:
    make, targets = MODELS[name]
    return get_peft_model(
        make(), LotrConfig(method=method, r=4, target_modules=targets, seed=0, **fields)
    ).eval()


def _gradients(name: str) -> dict[str, Tensor]:
    """Return the gradients of the bare model's weights over the batches, `(out, in)` each."""
    model = MODELS[name][0]()
    sum(model(**batch).loss for batch in _batches(name)).backward()
    conv1d = name == "gpt2"
    found = {path: p.grad for path, p in model.named_parameters() if p.grad is not None and p.dim() == 2}
    return {path.removesuffix(".weight"): g.T if conv1d else g for path, g in found.items()}


def _factors(model: nn.Module) -> list[Tensor]:
    groups = [m for m in model.modules() if isinstance(m, LotrGroup)]
    return [f["default"].weight.detach().clone() for g in groups for f in (g.lotr_U, g.lotr_V)]


@pytest.mark.parametrize(
    "name, method",
    [
        *(("bert", method) for method in ("lotr", "fact_tk")),
        *(("llama", method) for method in ("lotr_joint", "metatt_5d")),
        *(("gpt2", method) for method in ("lotr", "metatt_5d")),
    ],
)
def test_a_start_changes_the_factors_and_not_the_model(name: str, method: str) -> None:
    model, batches = _adapted(name, method, init="gradient"), _batches(name)
    before, factors, state = model(**batches[0]).logits, _factors(model), torch.get_rng_state()
    lotr.init_from_data(model, batches)
    assert torch.equal(model(**batches[0]).logits, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not all(torch.equal(a, b) for a, b in zip(factors, _factors(model), strict=True))
    assert all(p.grad is None for p in model.parameters()) and not model.training
    assert model.peft_config["default"].init == "gradient"


@pytest.mark.parametrize("name", MODELS)
def test_factors_from_gradients_keep_more_of_them_than_random_ones(name: str) -> None:
    """Against the dense gradients of the bare model, site by site."""
    dense = _gradients(name)

    def kept(model: nn.Module) -> Tensor:
        shares = []
        for group, parts in parts_of(model, "default").items():
            U, Vt = (getattr(group, f"lotr_{f}")["default"].weight for f in "UV")
            for _, part in parts:
                row, rows = part.rows
                G = dense[part.sites[0].module][row : row + rows]
                shares.append((U.T @ G @ Vt.T).square().sum() / G.square().sum())
        return torch.stack(shares)

    model = _adapted(name)
    random = kept(model)
    lotr.init_from_data(model, _batches(name))
    turned = kept(model)
    assert turned.mean() > 3 * random.mean() and turned.min() > random.mean()


def test_a_first_step_is_as_large_on_sites_that_use_the_first_rows_of_a_factor() -> None:
    """Against AdamW's first step on the dense weights, which full ranks hold whole."""
    torch.manual_seed(0)
    plain = nn.ModuleDict({"wide": nn.Linear(8, 8), "narrow": nn.Linear(8, 2)})
    config = LotrConfig(
        method="lora_sb",
        r=8,
        modes=("layer", "projection"),
        unequal="slice",
        target_modules=["wide", "narrow"],
        seed=0,
    )
    dense = {name: layer.weight.detach().clone().requires_grad_() for name, layer in plain.items()}
    x = torch.randn(5, 8)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return sum(((layer(batch) - 1) ** 2).sum() for layer in model.base_model.model.values())

    model = get_peft_model(plain, config)
    lotr.init_from_data(model, [x], loss)
    for name, W in dense.items():
        layer = model.base_model.model[name]
        ((F.linear(x, W, layer.base_layer.bias) - 1) ** 2).sum().backward()
        step = layer.get_delta_weight("default")
        torch.testing.assert_close(step / step.abs().max(), -W.grad.sign(), atol=1e-4, rtol=1e-4)
        assert float(step.abs().max()) == pytest.approx(
            float(model.base_model.model["wide"].get_delta_weight("default").abs().max()), rel=1e-4
        )


def test_of_one_site_the_start_spans_the_singular_vectors_of_its_gradient() -> None:
    model = get_peft_model(bert(), LotrConfig(r=4, modes=(), target_modules=r".*layer\.1.*query", seed=0))
    lotr.init_from_data(model, _batches("bert"), rounds=6)
    U, S, Vt = torch.linalg.svd(_gradients("bert")["bert.encoder.layer.1.attention.self.query"])
    found = _factors(model)
    for ours, theirs in ((found[0], U[:, :4]), (found[1].T, Vt[:4].T)):
        cosines = torch.linalg.svdvals(ours.T @ theirs)
        assert cosines.min() > 0.99, (cosines, S[:6])


def test_a_start_is_decided_by_its_seed() -> None:
    def started(seed: int) -> list[Tensor]:
        model = _adapted("bert")
        lotr.init_from_data(model, _batches("bert"), rounds=1, seed=seed)
        return _factors(model)

    assert all(torch.equal(a, b) for a, b in zip(started(0), started(0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(started(0), started(1), strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_a_half_precision_base_give_the_same_subspaces(reentrant: bool) -> None:
    plain, model = _adapted("llama"), _adapted("llama")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for one in (plain, model):
        lotr.init_from_data(one, _batches("llama"))
    for a, b in zip(_factors(plain), _factors(model), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    half = get_peft_model(
        llama().to(torch.bfloat16), LotrConfig(r=4, target_modules=MODELS["llama"][1], seed=0)
    )
    lotr.init_from_data(half, _batches("llama"))
    for a, b in zip(_factors(plain), _factors(half), strict=True):
        a, b = (m if m.shape[0] >= m.shape[1] else m.T for m in (a, b))
        assert torch.linalg.svdvals(a.T @ b.float())[0] > 0.95


# ---- refusals


def _as_it_was(
    model: nn.Module, error: type[Exception], says: str, batches: Any = None, **fields: Any
) -> None:
    """Check that a start is refused, and leaves factors, gradients, hooks and the mode of a model."""

    def state() -> list[Any]:
        hooks = sum(len(module._forward_hooks) for module in model.modules())
        gradients = sum(p.grad is not None for p in model.parameters())
        return [hooks, gradients, model.training, model.peft_config["default"].init]

    factors, before = _factors(model), state()
    with pytest.raises(error, match=says):
        lotr.init_from_data(model, _batches("bert") if batches is None else batches, **fields)
    assert all(torch.equal(a, b) for a, b in zip(factors, _factors(model), strict=True))
    assert state() == before and before[1] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("passes", [1, 3], ids=["first", "last"])
def test_a_loss_that_is_not_finite_is_named_and_leaves_the_factors(value: float, passes: int) -> None:
    calls = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(batch)
        return model(**batch).loss * (value if len(calls) == 2 * passes else 1.0)

    _as_it_was(_adapted("bert"), TrainingError, f"loss of batch 2 of 2 is {value}", loss=loss)


def _infinite_slope(model: nn.Module, batch: Any) -> Tensor:
    logits: Tensor = model(**batch).logits
    return (logits - logits.detach()).sqrt().sum()  # zero


@pytest.mark.parametrize(
    "fields, error, says",
    [
        ({"loss": _infinite_slope}, TrainingError, r"gradient at 'bert\.encoder.*' is not finite"),
        ({"loss": lambda model, batch: model(**batch).loss.detach()}, ConfigError,
         "batch 1 of 2 depends on no trained number"),
        ({"loss": lambda model, batch: model(**batch).logits}, ConfigError, r"Tensor of shape \(8, 3\)"),
        ({"loss": lambda model, batch: 0.5}, ConfigError, r"float 0\.5"),
        ({"rounds": 0}, ConfigError, "rounds=0"),
        ({"rounds": True}, ConfigError, "rounds=True"),
        ({"rounds": 1.5}, ConfigError, "rounds=1.5"),
        ({"batches": []}, ConfigError, "no batches"),
        ({"batches": [{"input_ids": tokens()}]}, ConfigError, "has no labels"),
        ({"batches": [tokens()]}, ConfigError, "A batch is a Tensor"),
    ],
)  # fmt: skip
def test_a_call_that_shows_no_gradient_is_refused_by_name(
    fields: dict[str, Any], error: type[Exception], says: str
) -> None:
    _as_it_was(_adapted("bert"), error, says, **fields)


def test_a_model_without_gradients_is_refused_with_the_way_out() -> None:
    model = _adapted("bert")
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            _as_it_was(model, ConfigError, r"torch\.no_grad")
    with model.disable_adapter():
        _as_it_was(model, ConfigError, "'default' is disabled")
    model.merge_adapter()
    _as_it_was(model, ConfigError, "unmerge_adapter")
    model.unmerge_adapter()
    model.requires_grad_(False)
    _as_it_was(model, ConfigError, "is_trainable=True")
    model.base_model.model.classifier.weight.requires_grad_(True)
    _as_it_was(model, ConfigError, "No gradient reaches 'bert.encoder.layer.0")


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"magnitude": "base_and_update"}, "magnitude='base_and_update', .*another magnitude"),
        ({"method": "lora"}, "core='identity': .*core='free'"),
        ({"init_weights": False}, "'default' is not zero"),
        ({"init_weights": False, "method": "metatt_5d", "zero": "core"}, "'default' is not zero"),
        ({"method": "metatt_5d"}, "has zero='input'.* zero=\"core\""),
        ({"basis": "basis"}, "to which the cores will refer"),
    ],
    ids=str,
)
def test_factors_that_may_not_turn_are_refused_by_name(
    fields: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "basis" in fields:
        _adapted("bert").save_pretrained("basis")
    _as_it_was(_adapted("bert", **fields), ConfigError, says)


class _OneUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_module_that_no_batch_reaches_counts_for_nothing() -> None:
    """The other modules of its group turn the factors as they would without it."""

    def started(targets: list[str]) -> list[Tensor]:
        fields = {"r": 2, "method": "lotr_joint", "seed": 0}
        model = get_peft_model(_OneUnused(), LotrConfig(target_modules=targets, **fields))
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
        lotr.init_from_data(model, [x], rounds=8, loss=lambda model, x: model(x).square().mean())
        return _factors(model)

    for both, alone in zip(started(["used", "unused"]), started(["used"]), strict=True):
        both, alone = (m if m.shape[0] >= m.shape[1] else m.T for m in (both, alone))
        assert torch.linalg.svdvals(both.T @ alone).min() > 0.999


def test_cores_alone_on_random_factors_warn_with_the_way_out(recwarn: pytest.WarningsRecorder) -> None:
    targets = MODELS["bert"][1]
    for fields in ({"init": "orthonormal"}, {"init": "gradient"}, {"method": "lora_xs"}):
        get_peft_model(bert(), LotrConfig(r=4, target_modules=targets, trainable="cores", **fields))
    assert not [str(w.message) for w in recwarn if "init_from_data" in str(w.message)]
    with pytest.warns(UserWarning, match=r"lotr\.init_from_data\(model, batches\)"):
        get_peft_model(bert(), LotrConfig(r=4, target_modules=targets, trainable="cores"))


def test_gradients_that_were_there_are_there_afterwards() -> None:
    model = _adapted("bert")
    model(**_batches("bert")[0]).loss.backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    lotr.init_from_data(model, _batches("bert"))
    after = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert before and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
