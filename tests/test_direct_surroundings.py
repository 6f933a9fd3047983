"""What stands around the one step: modes, tracers, threads, odd inputs. The result is that of PyTorch's own steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lotr import LotrConfig
from lotr.math.orders import AUTOGRAD, ORDERS

Change = Callable[[Tensor], object]


def _nothing(x: Tensor) -> None:
    pass


class Attention(nn.Module):
    """Two projections of one input, something that happens between them, and one of both."""

    def __init__(self, between: Change = _nothing) -> None:
        super().__init__()
        self.between = between
        for name in ("query", "key", "output"):
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x)
        self.between(x)
        return x + self.output((q * self.key(x)).tanh())


class Tower(nn.Module):
    """A layer, named as layers are: its modules share what they read."""

    def __init__(self, between: Change = _nothing) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Attention(between)])

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers[0](x)
        return result


def adapted(
    order: str, between: Change = _nothing, dtype: torch.dtype = torch.float64, **fields: object
) -> PeftModel:
    given = {
        "method": "lotr_joint",
        "r": 3,
        "target_modules": ["query", "key", "output"],
        "init_weights": False,
    }
    return get_peft_model(Tower(between).to(dtype), LotrConfig(**{**given, "order": order, **fields}))


def x_of(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *shape or (2, 5, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(dtype)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of the input and of all that trains."""
    x = x.clone().requires_grad_(True)
    y = model(x)
    y.float().sin().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("order", [order for order in ORDERS if order != AUTOGRAD])
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_a_batch_without_rows_is_no_error(order: str, shape: tuple[int, ...]) -> None:
    """An expert that gets no token, for example."""
    every = (gradients(adapted(name), x_of(*shape)) for name in (order, AUTOGRAD))
    for found, wanted in zip(*every, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_an_input_that_is_written_to_between_two_modules_is_read_again(mode: Callable[[], object]) -> None:
    def edit(x: Tensor) -> None:
        x.add_(1.0)

    with mode():
        found, wanted = (adapted(order, edit)(x_of().clone()) for order in ("plain", AUTOGRAD))
    torch.testing.assert_close(found, wanted)


def test_an_input_that_asks_for_a_gradient_between_two_modules_gets_all_of_it() -> None:
    def gradient(order: str) -> Tensor:
        x = x_of()
        adapted(order, lambda x: x.requires_grad_(True))(x).sin().sum().backward()
        assert x.grad is not None
        return x.grad

    torch.testing.assert_close(gradient("plain"), gradient(AUTOGRAD))


def test_passes_of_other_threads_that_overlap_leave_nothing_behind() -> None:
    model = adapted("auto")
    products = next(m for m in model.modules() if hasattr(m, "products")).products
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        with products.one_pass():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    with products.one_pass():
        thread.start()
        inside.wait(10)
    done.set()
    thread.join()
    products.keep("key", x_of(), x_of())
    assert products.find("key", x_of()) is None and products._here.kept is None


@pytest.mark.parametrize("kept", ["mm", "tanh"])
@pytest.mark.parametrize("order", ORDERS)
def test_selective_checkpointing_gives_the_same_gradients(order: str, kept: str) -> None:
    def policy(context: object, operation: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        saves = kept in str(operation)
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    def whole(model: nn.Module, x: Tensor) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, policy)
        result: Tensor = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
        return result

    model = adapted(order)
    found = gradients(_Calls(model, whole), x_of())
    for one, other in zip(found, gradients(adapted(AUTOGRAD), x_of()), strict=True):
        torch.testing.assert_close(one, other)


class _Calls(nn.Module):
    """A model that is called in a way of its own."""

    def __init__(self, model: nn.Module, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.how = model, how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.model, x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["lotr", "lotr_joint"])
def test_checkpointing_of_a_whole_model_gives_the_same_gradients(method: str, reentrant: bool) -> None:
    def whole(model: nn.Module, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(model, x, use_reentrant=reentrant)
        return result

    found = gradients(_Calls(adapted("auto", method=method), whole), x_of())
    for one, other in zip(found, gradients(adapted(AUTOGRAD, method=method), x_of()), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("forward", [False, True], ids=["float32 forward", "autocast forward"])
def test_the_way_back_may_lie_inside_of_autocast(forward: bool) -> None:
    def all_of(order: str) -> list[Tensor]:
        model, x = adapted(order, dtype=torch.float32), x_of(dtype=torch.float32).requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.autocast("cpu", torch.bfloat16, enabled=forward):
                y = model(x)
            y.float().sin().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    for found, wanted in zip(all_of("auto"), all_of(AUTOGRAD), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


def test_autocast_leaves_double_precision_alone() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = (adapted(order)(x_of()) for order in ("auto", AUTOGRAD))
    assert found.dtype == wanted.dtype == torch.float64
    torch.testing.assert_close(found, wanted)


def test_a_traced_model_can_be_saved(tmp_path: Path) -> None:
    model = adapted("auto").eval()
    wanted = model(x_of())
    traced = torch.jit.trace(model.base_model.model, x_of(), check_trace=False)
    traced.save(str(tmp_path / "model.pt"))
    torch.testing.assert_close(torch.jit.load(str(tmp_path / "model.pt"))(x_of()), wanted)


def test_nested_inputs_take_the_steps_of_autograd() -> None:
    texts = [x_of(4, 8), x_of(2, 8)]
    model = adapted("auto")
    nested = torch.nested.nested_tensor(texts, layout=torch.jagged)
    for found, text in zip(model.base_model.model.layers[0].query(nested).unbind(), texts, strict=True):
        torch.testing.assert_close(found, model.base_model.model.layers[0].query(text))


@pytest.mark.parametrize("magnitude", ["per_output", "per_output_and_input"])
def test_what_is_kept_of_frozen_factors_in_inference_mode_serves_training(magnitude: str) -> None:
    fields = {"trainable": "cores", "init": "orthonormal", "magnitude": magnitude, "norm_gradient": True}
    model, fresh = (adapted("auto", **fields) for _ in range(2))
    with torch.inference_mode():
        model(x_of())
    for found, wanted in zip(gradients(model, x_of()), gradients(fresh, x_of()), strict=True):
        torch.testing.assert_close(found, wanted)


def test_an_adapter_under_the_name_of_a_deleted_one_has_norms_of_its_own(tmp_path: Path) -> None:
    fields = {"trainable": "cores", "init": "orthonormal", "magnitude": "per_output"}
    for seed in range(6):
        adapted("auto", seed=seed, **fields).save_pretrained(str(tmp_path / str(seed)))
    model = PeftModel.from_pretrained(Tower().double(), str(tmp_path / "0"))
    model(x_of())
    for seed in range(1, 6):
        model.delete_adapter("default")
        assert not any(m.base_weight.kept.of for m in model.modules() if hasattr(m, "base_weight"))
        model.load_adapter(str(tmp_path / str(seed)), "default")
        model.set_adapter("default")
        alone = PeftModel.from_pretrained(Tower().double(), str(tmp_path / str(seed)))
        torch.testing.assert_close(model(x_of()), alone(x_of()))
