from __future__ import annotations

import torch
from tensorly import tt_to_tensor, tucker_to_tensor

from core_contract import CoreContract
from lotr.cores import FreeCore


class TestFreeCore(CoreContract):
    core_class = FreeCore


def _stack() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factors, the core tensor, and the updates of all layers that our core gives."""
    U, V, C = torch.randn(6, 3), torch.randn(5, 4), torch.randn(7, 3, 4)
    core = FreeCore(k=3, r=4, sizes=(7,))
    shared, owns = core.from_tensor(C)
    updates = [U @ core.matrix((layer,), shared, owns[(layer,)]) @ V.T for layer in range(7)]
    return U, V, C, torch.stack(updates)


def test_tucker_2_with_an_identity_layer_mode_is_the_free_core() -> None:
    U, V, C, updates = _stack()
    tucker = tucker_to_tensor((C.numpy(), [torch.eye(7).numpy(), U.numpy(), V.numpy()]))
    torch.testing.assert_close(torch.as_tensor(tucker), updates)


def test_a_tensor_train_with_the_layer_in_the_middle_is_the_free_core() -> None:
    U, V, C, updates = _stack()
    train = [U[None].numpy(), C.movedim(0, 1).numpy(), V.T[:, :, None].numpy()]
    torch.testing.assert_close(torch.as_tensor(tt_to_tensor(train)).movedim(1, 0), updates)
