"""Quantised base weights: what is known of how they were made, and the layout that they are kept in."""

from __future__ import annotations

from typing import Any

from peft.utils import resolve_quantization_backend
from torch import nn

from ..errors import ConfigError, PlanError

_TORCHAO = "get_apply_tensor_subclass"  # how PEFT calls what quantises a merged weight again


def backend_of(module: nn.Module, **quantization: Any) -> Any:
    """Return how PEFT reads and writes a quantised weight, or `None` where it is an ordinary one.

    Without transformers' `TorchAoConfig` nothing tells how to quantise again: adapters work there and cannot be merged.
    """
    backend: Any = resolve_quantization_backend(module, **({_TORCHAO: object} | quantization))
    if hasattr(backend, _TORCHAO) and _TORCHAO not in quantization:
        backend.supports_merge = False
    return backend


def check_can_merge(backend: Any) -> None:
    """Refuse to merge into a weight that nothing can quantise again.

    Raises:
        ConfigError: The message says what to do instead.
    """
    if backend is not None and not backend.supports_merge:
        raise ConfigError(
            f"A weight of {backend.backend_name} cannot be merged here: nothing tells how to quantise the sum. Keep "
            "the adapter beside the base model. For torchao, quantise with TorchAoConfig of transformers."
        )


def check_layout(model: nn.Module) -> None:
    """Refuse a model whose 4-bit weights bitsandbytes has laid out for some processors' kernels.

    Raises:
        PlanError: See `keep_layout`.
    """
    for path, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            raise PlanError(
                f"bitsandbytes has packed the 4-bit weight of {path!r} for evaluation on this processor, and a packed "
                "weight can neither be merged nor pass gradients. Load the base model anew, and add or load the "
                "adapter before its first forward pass."
            )


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes from laying 4-bit weights out for some processors' kernels (AVX-512 with bfloat16).

    It does so in the first forward pass in evaluation mode. From then on gradients do not pass the layer, and its
    weight is dequantised to other numbers, so norms and merged weights would be wrong; nothing says so.
    """
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
