"""`lotr.init_from_data`: factors turn towards gradients or activations, and the model computes what it did before."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import lotr
from conftest import bert, gpt2, llama, tokens
from lotr import ConfigError, LotrConfig, TrainingError
from lotr.tuner.group import LotrGroup
from lotr.tuner.layer import LotrLinear
from lotr.tuner.trial import Trial

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


@pytest.mark.parametrize("kind", ["gradient", "activation", "update"])
@pytest.mark.parametrize("method", ["lotr", "lotr_joint", "metatt_5d", "fact_tk", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_a_start_changes_the_factors_and_not_the_model(name: str, method: str, kind: str) -> None:
    model, batches = _adapted(name, method), _batches(name)
    before, factors, state = model(**batches[0]).logits, _factors(model), torch.get_rng_state()
    report = lotr.init_from_data(model, batches, kind=kind)
    assert torch.equal(model(**batches[0]).logits, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not all(torch.equal(a, b) for a, b in zip(factors, _factors(model), strict=True))
    assert all(p.grad is None for p in model.parameters()) and not model.training
    assert model.peft_config["default"].init == kind
    assert len(report) == lotr.plan(MODELS[name][0](), model.peft_config["default"]).n_sites
    assert all(0 <= site.kept <= 1 for site in report) and any(site.norm > 0 for site in report)


@pytest.mark.parametrize("name", MODELS)
def test_factors_from_gradients_keep_more_of_them_than_random_ones(name: str) -> None:
    """Against the dense gradients of the bare model, site by site."""
    dense = _gradients(name)

    def kept(model: nn.Module) -> Tensor:
        shares = []
        for path, layer in model.get_base_model().named_modules():
            if isinstance(layer, LotrLinear):
                for member in layer.lotr_site["default"].members:
                    U, Vt = (getattr(member.group, f"lotr_{f}")["default"].weight for f in "UV")
                    row, rows = member.part.rows
                    G = dense[path][row : row + rows]
                    shares.append((U.T @ G @ Vt.T).square().sum() / G.square().sum())
        return torch.stack(shares)

    model = _adapted(name)
    random = kept(model)
    lotr.init_from_data(model, _batches(name))
    turned = kept(model)
    assert turned.mean() > 3 * random.mean() and turned.min() > random.mean()


def test_of_one_site_the_start_spans_the_singular_vectors_of_its_gradient() -> None:
    model = get_peft_model(bert(), LotrConfig(r=4, modes=(), target_modules=r".*layer\.1.*query", seed=0))
    lotr.init_from_data(model, _batches("bert"), rounds=6)
    U, S, Vt = torch.linalg.svd(_gradients("bert")["bert.encoder.layer.1.attention.self.query"])
    found = _factors(model)
    for ours, theirs in ((found[0], U[:, :4]), (found[1].T, Vt[:4].T)):
        cosines = torch.linalg.svdvals(ours.T @ theirs)
        assert cosines.min() > 0.99, (cosines, S[:6])


def test_the_report_is_the_share_of_each_batch_of_gradients() -> None:
    model, batches = _adapted("bert"), _batches("bert")[:1]
    report = {site.module: site for site in lotr.init_from_data(model, batches)}
    bare = bert()
    bare(**batches[0]).loss.backward()
    path = "bert.encoder.layer.0.attention.self.value"
    G = bare.get_submodule(path).weight.grad
    group = model.get_base_model().get_submodule(path).lotr_site["default"].members[0].group
    U, Vt = (f["default"].weight.detach() for f in (group.lotr_U, group.lotr_V))
    assert report[path].norm == pytest.approx(G.norm().item(), rel=1e-4)
    assert report[path].kept == pytest.approx(((U.T @ G @ Vt.T).norm() / G.norm()).item() ** 2, rel=1e-3)


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
    report = lotr.init_from_data(half, _batches("llama"))
    assert sum(site.kept for site in report) / len(report) > 0.2


def test_a_start_with_lora_turns_the_input_factor_alone() -> None:
    model = _adapted("bert", "lora")
    lotr.init_from_data(model, _batches("bert"))
    groups = [m for m in model.modules() if isinstance(m, LotrGroup)]
    assert not any(group.lotr_U["default"].weight.any() for group in groups)
    for group in groups:
        Vt = group.lotr_V["default"].weight
        torch.testing.assert_close(Vt @ Vt.T, torch.eye(4), atol=1e-5, rtol=0)


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def _as_it_was(model: nn.Module, call: Callable[[], Any], error: type[Exception], says: str) -> None:
    """Check that a call is refused, and leaves factors, gradients, hooks and the mode of a model."""
    factors, hooks, training = _factors(model), _hooks(model), model.training
    start = model.peft_config["default"].init
    with pytest.raises(error, match=says):
        call()
    assert all(torch.equal(a, b) for a, b in zip(factors, _factors(model), strict=True))
    assert all(p.grad is None for p in model.parameters()) and _hooks(model) == hooks
    assert model.training == training and model.peft_config["default"].init == start


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("passes", [1, 4], ids=["first", "last"])
def test_a_loss_that_is_not_finite_is_named_and_leaves_the_factors(value: float, passes: int) -> None:
    """Also in the last pass, which measures what the new factors keep."""
    model, batches, calls = _adapted("bert"), _batches("bert"), []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(batch)
        found: Tensor = model(**batch).loss
        return found * value if len(calls) == 2 * passes else found

    def call() -> None:
        lotr.init_from_data(model, batches, loss=loss)

    _as_it_was(model, call, TrainingError, f"loss of batch 2 of 2 is {value}")


def test_gradients_that_are_not_finite_are_named() -> None:
    model = _adapted("bert")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits: Tensor = model(**batch).logits
        return (logits - logits.detach()).sqrt().sum()  # zero, with an infinite slope

    def call() -> None:
        lotr.init_from_data(model, _batches("bert"), loss=loss)

    _as_it_was(model, call, TrainingError, r"gradient at 'bert\.encoder.*' is not finite")


def test_a_model_without_gradients_is_refused_with_the_way_out() -> None:
    model, batches = _adapted("bert"), _batches("bert")

    def call(**fields: Any) -> Callable[[], Any]:
        return lambda: lotr.init_from_data(model, batches, **fields)

    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            _as_it_was(model, call(), ConfigError, r"torch\.no_grad")
    with model.disable_adapter():
        _as_it_was(model, call(), ConfigError, "'default' is disabled")
    model.merge_adapter()
    _as_it_was(model, call(), ConfigError, "unmerge_adapter")
    model.unmerge_adapter()
    detached = {"loss": lambda model, batch: model(**batch).loss.detach()}
    _as_it_was(model, call(**detached), ConfigError, "batch 1 of 2 depends on no trained number")
    many = {"loss": lambda model, batch: model(**batch).logits}
    _as_it_was(model, call(**many), ConfigError, r"Tensor of shape \(8, 3\)")
    number = {"loss": lambda model, batch: 0.5}
    _as_it_was(model, call(**number), ConfigError, r"float 0\.5")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _as_it_was(model, call(), ConfigError, "is_trainable=True")
    _as_it_was(model, call(kind="update"), ConfigError, "is_trainable=True")
    model.base_model.model.classifier.weight.requires_grad_(True)
    _as_it_was(model, call(), ConfigError, "No gradient reaches 'bert.encoder.layer.0")


@pytest.mark.parametrize("rounds", [0, -1, 1.5, True, "3"])
def test_there_is_at_least_one_round(rounds: Any) -> None:
    model = _adapted("bert")
    _as_it_was(
        model, lambda: lotr.init_from_data(model, _batches("bert"), rounds=rounds), ConfigError, "rounds="
    )


def test_a_magnitude_that_divides_by_the_update_is_refused_by_name() -> None:
    model = _adapted("bert", magnitude="base_and_update")
    call = partial(lotr.init_from_data, model, _batches("bert"))
    _as_it_was(model, call, ConfigError, "magnitude='base_and_update', .*another magnitude")


def test_what_cannot_start_is_refused_by_name() -> None:
    model = _adapted("bert")
    with pytest.raises(ConfigError, match="kind='gradients'"):
        lotr.init_from_data(model, _batches("bert"), kind="gradients")
    with pytest.raises(ConfigError, match="no batches"):
        lotr.init_from_data(model, [])
    with pytest.raises(ConfigError, match="has no labels"):
        lotr.init_from_data(model, [{"input_ids": tokens()}])
    with pytest.raises(ConfigError, match="A batch is a Tensor"):
        lotr.init_from_data(model, [tokens()])
    with pytest.raises(ConfigError, match="no adapter of this library"):
        lotr.init_from_data(bert(), _batches("bert"))
    with pytest.raises(ConfigError, match="Name one adapter"):
        lotr.init_from_data(model, _batches("bert"), adapter="other")
    with pytest.raises(ConfigError, match=r"'default' is not zero"):
        lotr.init_from_data(_adapted("bert", init_weights=False), _batches("bert"))


def test_a_trial_of_one_site_is_spanned_by_its_factors() -> None:
    """A LoRA of rank 8 has an update of rank 8, so eight columns a side hold it all."""
    config = LotrConfig(r=8, modes=(), target_modules=MODELS["bert"][1][:2], seed=0)
    for site in lotr.init_from_data(get_peft_model(bert(), config), _batches("bert") * 4, kind="update"):
        assert site.norm > 0 and site.kept == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("method", ["lotr", "lotr_joint", "metatt_5d", "fact_tk", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_kept_of_a_trial_is_that_of_its_dense_updates(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials: list[Trial] = []
    turn = Trial.turn
    monkeypatch.setattr(Trial, "turn", lambda trial, spaces: trials.append(trial) or turn(trial, spaces))
    model = _adapted(name, method)
    report = iter(lotr.init_from_data(model, _batches(name) * 3, kind="update"))
    (trial,) = trials
    for adapted in trial.found:
        pair = trial.pairs[adapted.layer]
        dense = (pair.B @ pair.A).detach() / len(pair.A) ** 0.5
        for member in adapted.members:
            part, U = member.part, member.group.lotr_U["default"].weight.detach()
            Vt = member.group.lotr_V["default"].weight.detach()
            (row, rows), (column, columns), (a, b) = part.rows, part.columns, part.grid
            block = dense[row : row + rows, column : column + columns]
            for across in block.chunk(a, 0):
                for D in across.chunk(b, 1):
                    inside = (D if method == "lora" else U.T @ D) @ Vt.T
                    site = next(report)
                    assert site.norm == pytest.approx(float(D.norm()), rel=1e-4)
                    assert site.kept == pytest.approx(float(inside.norm() / D.norm()) ** 2, rel=1e-3)
    assert next(report, None) is None


def test_factors_from_a_trial_hold_more_of_what_training_changes_than_those_from_gradients() -> None:
    """Against the change of the weights themselves, trained in full on the same batches."""
    batches = _batches("bert")
    bare = bert()
    paths = [path for path, m in bare.named_modules() if path.endswith(("query", "value"))]
    weights = {path: bare.get_submodule(path).weight for path in paths}
    before = {path: W.detach().clone() for path, W in weights.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=1e-3)
    for n in range(40):
        optimizer.zero_grad()
        bare(**batches[n % 2]).loss.backward()
        optimizer.step()
    change = {path: W.detach() - before[path] for path, W in weights.items()}

    def held(kind: str) -> float:
        model = get_peft_model(bert(), LotrConfig(r=4, target_modules=["query", "value"], seed=0)).eval()
        lotr.init_from_data(model, batches * (20 if kind == "update" else 1), kind=kind)
        shares = []
        for path, D in change.items():
            group = model.get_base_model().get_submodule(path).lotr_site["default"].members[0].group
            U, Vt = (f["default"].weight.detach() for f in (group.lotr_U, group.lotr_V))
            shares.append(float((U.T @ D @ Vt.T).norm() / D.norm()) ** 2)
        return sum(shares) / len(shares)

    assert held("update") > held("gradient") > 0


@pytest.mark.parametrize("kind", ["gradient", "activation", "update"])
def test_gradients_that_were_there_are_there_afterwards(kind: str) -> None:
    model = _adapted("bert")
    model(**_batches("bert")[0]).loss.backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    lotr.init_from_data(model, _batches("bert"), kind=kind)
    after = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert before and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_trial_that_breaks_off_leaves_nothing() -> None:
    model, calls = _adapted("bert"), []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(batch)
        found: Tensor = model(**batch).loss
        return found * float("nan") if len(calls) == 3 else found

    def call() -> None:
        lotr.init_from_data(model, _batches("bert") * 2, kind="update", loss=loss)

    _as_it_was(model, call, TrainingError, "loss of batch 3 of 4 is nan")


@pytest.mark.parametrize("lr", [0, -1e-3, float("inf"), float("nan"), "1e-2"])
def test_the_rate_of_a_trial_is_a_positive_number(lr: Any) -> None:
    model = _adapted("bert")
    call = partial(lotr.init_from_data, model, _batches("bert"), kind="update", lr=lr)
    _as_it_was(model, call, ConfigError, "lr=")
