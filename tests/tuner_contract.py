"""What an adapter must do on any architecture. Run it for a model by subclassing `TunerContract`."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

from conftest import Architecture
from dense_truth import adapt
from lotr import LotrConfig
from lotr.tuner.group import LotrGroup, LotrLayer
from lotr.tuner.weight import AdaptedWeight


def outputs(model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def linears(model: nn.Module) -> Iterator[Any]:
    """The adapted weights: of linear modules, and of stacks of experts."""
    return (module for module in model.modules() if isinstance(module, AdaptedWeight))


def weights(model: nn.Module) -> list[Tensor]:
    return [layer.get_base_layer().weight.detach().clone() for layer in linears(model)]


class TunerContract:
    """Needs a fixture `architecture`."""

    def config(self, architecture: Architecture, **kwargs: Any) -> LotrConfig:
        defaults: dict[str, Any] = {"r": 4, "scaling": 2.0, "init_weights": False, "seed": 0}
        return LotrConfig(**(defaults | {"target_modules": architecture.targets} | kwargs))

    @pytest.fixture
    def inputs(self, architecture: Architecture) -> dict[str, Tensor]:
        return architecture.inputs()

    @pytest.fixture
    def base(self, architecture: Architecture, inputs: dict[str, Tensor]) -> Tensor:
        return outputs(architecture.make(), inputs)

    @pytest.fixture
    def model(self, architecture: Architecture) -> PeftModel:
        """A model whose adapter does something."""
        return get_peft_model(architecture.make(), self.config(architecture)).eval()

    @pytest.fixture
    def two(self, architecture: Architecture, model: PeftModel) -> PeftModel:
        """The same with a second adapter of another rank, the first being active."""
        model.add_adapter("other", self.config(architecture, r=(2, 6), seed=1))
        return model.eval()

    # ---- the formula

    def test_step_0_equals_the_base_bit_for_bit(self, architecture, inputs, base) -> None:
        model = get_peft_model(architecture.make(), self.config(architecture, init_weights=True)).eval()
        assert sum(1 for _ in linears(model)) == architecture.n_targets
        assert torch.equal(outputs(model, inputs), base)

    def test_the_output_is_that_of_the_base_plus_the_dense_product(
        self, architecture, model, inputs, base
    ) -> None:
        plan = model.peft_config["default"].recorded_plan()
        dense = adapt(architecture.make(), plan, get_peft_model_state_dict(model), scaling=2.0)
        result = outputs(model, inputs)
        assert (result - base).abs().max() > 1e-4
        torch.testing.assert_close(result, outputs(dense, inputs), atol=2e-6, rtol=1e-5)

    # ---- shared numbers

    def test_shared_numbers_are_registered_and_counted_once(self, model) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        ours = [p for n, p in model.named_parameters(remove_duplicate=False) if "lotr_" in n]
        assert len(ours) == len({id(p) for p in ours}) == len(trained)
        groups = [m for m in model.modules() if isinstance(m, LotrGroup)]
        parts = sum(len(layer.adapters["default"].parts) for layer in linears(model))
        assert len(trained) == 2 * len(groups) + parts
        assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in trained)

    def test_trained_numbers_are_contiguous(self, model) -> None:
        """FSDP2 refuses others, and a QR decomposition gives others."""
        assert all(p.is_contiguous() for p in model.parameters() if p.requires_grad)

    def test_only_the_adapter_gets_gradients(self, model, inputs) -> None:
        model.train()
        model(**inputs).logits.square().sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == ("lotr_" in name), name
            assert parameter.grad is None or parameter.grad.any(), name

    # ---- files

    def test_a_state_dict_carries_the_adapter_into_an_injected_model(
        self, architecture, model, inputs
    ) -> None:
        state = get_peft_model_state_dict(model)
        bare = inject_adapter_in_model(self.config(architecture, seed=9), architecture.make()).eval()
        bare_state = get_peft_model_state_dict(bare)
        assert {f"base_model.model.{key}" for key in bare_state} == set(state)
        set_peft_model_state_dict(
            bare, {key.removeprefix("base_model.model."): t for key, t in state.items()}
        )
        assert torch.equal(outputs(bare, inputs), outputs(model, inputs))

    def test_a_state_dict_says_which_modules_are_adapted(self, architecture, model, inputs) -> None:
        state = {
            key.removeprefix("base_model.model."): t for key, t in get_peft_model_state_dict(model).items()
        }
        config = self.config(architecture, target_modules=["something else"])
        with pytest.warns(RuntimeWarning, match="inconsistency"):
            bare = inject_adapter_in_model(config, architecture.make(), state_dict=state).eval()
        set_peft_model_state_dict(bare, state)
        assert torch.equal(outputs(bare, inputs), outputs(model, inputs))

    # ---- several adapters

    def test_active_adapters_add_up(self, two, inputs) -> None:
        alone = {}
        for name in ("default", "other"):
            two.set_adapter(name)
            alone[name] = [layer.get_delta_weight(name) for layer in linears(two)]
        two.base_model.set_adapter(["default", "other"])
        both = outputs(two, inputs)
        two.base_model.disable_adapter_layers()
        with torch.no_grad():
            for n, layer in enumerate(linears(two)):
                layer.get_base_layer().weight += alone["default"][n] + alone["other"][n]
        torch.testing.assert_close(both, outputs(two, inputs), atol=5e-6, rtol=1e-5)

    def test_setting_an_adapter_moves_the_gradients_to_it(self, two) -> None:
        two.set_adapter("other")
        trained = [name for name, p in two.named_parameters() if p.requires_grad]
        assert trained and all(".other." in name for name in trained)

    def test_a_disabled_adapter_leaves_the_base(self, model, inputs, base) -> None:
        with model.disable_adapter():
            assert torch.equal(outputs(model, inputs), base)
        assert not torch.equal(outputs(model, inputs), base)

    def test_deleting_an_adapter_removes_its_numbers_and_empty_groups(self, two, inputs) -> None:
        before = outputs(two, inputs)
        two.delete_adapter("other")
        assert not [name for name, _ in two.named_parameters() if ".other." in name]
        assert torch.equal(outputs(two, inputs), before)
        two.base_model.delete_adapter("default")
        assert not [m for m in two.modules() if isinstance(m, LotrGroup)]

    def test_each_row_of_a_mixed_batch_uses_its_own_adapter(self, two, inputs) -> None:
        names = ["other", "__base__", "default", "other"]
        alone = {}
        for name in ("default", "other"):
            two.set_adapter(name)
            alone[name] = outputs(two, inputs)
        with two.disable_adapter():
            alone["__base__"] = outputs(two, inputs)
        mixed = outputs(two, inputs, adapter_names=names)
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], alone[name][row], atol=2e-6, rtol=1e-5)

    # ---- merging

    @pytest.mark.parametrize("safe", [False, True])
    def test_merged_equals_unmerged(self, model, inputs, safe) -> None:
        unmerged = outputs(model, inputs)
        merged = copy.deepcopy(model).merge_and_unload(safe_merge=safe)
        assert not [m for m in merged.modules() if isinstance(m, LotrLayer)]
        assert "lotr" not in "".join(merged.state_dict())
        torch.testing.assert_close(outputs(merged, inputs), unmerged, atol=2e-6, rtol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_unmerging_restores_the_base_weights_exactly(self, architecture, dtype) -> None:
        model = get_peft_model(architecture.make().to(dtype), self.config(architecture))
        before = weights(model)
        model.merge_adapter()
        assert not any(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
        model.unmerge_adapter()
        assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))

    def test_unloading_gives_the_plain_model_back(self, architecture, model, inputs, base) -> None:
        plain = model.unload()
        assert plain.state_dict().keys() == architecture.make().state_dict().keys()
        assert torch.equal(outputs(plain, inputs), base)

    # ---- copies, types

    def test_copies_are_equal_and_independent(self, model, inputs) -> None:
        expected, buffer = outputs(model, inputs), io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
            assert torch.equal(outputs(duplicate, inputs), expected)
            for group in (m for m in duplicate.modules() if isinstance(m, LotrGroup)):
                nn.init.zeros_(group.lotr_U["default"].weight)
            assert not torch.equal(outputs(duplicate, inputs), expected)
        assert torch.equal(outputs(model, inputs), expected)

    def test_the_whole_model_can_change_its_type(self, model, inputs) -> None:
        expected = outputs(model, inputs).double()
        wide = outputs(
            model.double(), {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
        )
        assert wide.dtype == torch.float64
        torch.testing.assert_close(wide, expected, atol=1e-5, rtol=1e-4)

    def test_autocast_computes_in_the_small_type_and_stays_close(self, model, inputs) -> None:
        expected = outputs(model, inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = outputs(model, inputs)
        assert not torch.equal(result.float(), expected)
        assert (result.float() - expected).abs().max() < 0.03 * expected.abs().max()

    # ---- training

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_gives_the_same_gradients(self, architecture, inputs, reentrant) -> None:
        found = []
        for checkpointing in (False, True):
            model = get_peft_model(architecture.make(), self.config(architecture)).train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            if checkpointing:
                model.enable_input_require_grads()
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            torch.manual_seed(0)
            model(**inputs).logits.square().mean().backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert all(gradient is not None and gradient.any() for gradient in found[1].values())
        torch.testing.assert_close(*found)

    def test_a_model_prepared_for_quantised_training_trains_the_adapter_only(
        self, architecture, inputs
    ) -> None:
        prepared = prepare_model_for_kbit_training(
            architecture.make(), gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        model = get_peft_model(prepared, self.config(architecture)).train()
        model(**inputs).logits.square().mean().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == ("lotr_" in name), name
