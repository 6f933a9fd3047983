"""The shapes of heads: a head has an output for each label of its task, and is else like those of other tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..errors import ConfigError

#: What the keys of a head begin with in an adapter's file.
ROOT = "base_model.model."
#: The most outputs of a head: every row of a batch is as wide as the widest.
MOST_OUTPUTS = 10_000


def output_names(head: Mapping[str, Tensor]) -> list[str]:
    """Return the names of a head's tensors that have an axis of labels: those of the module that is named last.

    Example:
        >>> import torch
        >>> output_names(dict.fromkeys(("dense.weight", "out_proj.weight", "out_proj.bias"), torch.zeros(2)))
        ['out_proj.bias', 'out_proj.weight']
    """
    last = max(head).rpartition(".")[0]
    return sorted(name for name in head if name.rpartition(".")[0] == last)


def n_outputs(head: Mapping[str, Tensor]) -> int:
    """Return how many labels a head tells, or 1 for a number."""
    some = head[output_names(head)[0]]
    return len(some) if some.dim() else 0


def labels_of(head: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return `0`, `1` and so on, as many as a head without names of its own tells; none where it gives a number."""
    n = n_outputs(head)
    return tuple(map(str, range(n))) if n > 1 else ()


def head_form(head: Mapping[str, Tensor]) -> str:
    """Return names and shapes of a head's tensors; those of all tasks on one base model are alike.

    Example:
        >>> import torch
        >>> head_form({"base_model.model.score.weight": torch.zeros(3, 8)})
        'score.weight (labels, 8)'
    """
    shapes: dict[str, list[object]] = {name: list(tensor.shape) for name, tensor in head.items()}
    for name in output_names(head):
        shapes[name][:1] = ["labels"]
    return ", ".join(
        f"{name.removeprefix(ROOT)} ({', '.join(map(str, shapes[name]))})" for name in sorted(shapes)
    )


def check_head(head: Mapping[str, Tensor], labels: Sequence[str], kind: str | None) -> None:
    """Raise ConfigError where a head does not tell the labels of its task, whose kind is `kind`."""
    if not head:
        return
    last = {name: head[name] for name in output_names(head)}
    outputs = {tensor.shape[0] if tensor.dim() else 0 for tensor in last.values()}
    expected = len(labels) or (1 if kind == "regression" else None)
    odd = [name for name, tensor in last.items() if name.endswith("weight") and tensor.dim() < 2]
    if len(outputs) > 1 or odd or not 0 < min(outputs) <= MOST_OUTPUTS or expected not in (None, *outputs):
        shapes = ", ".join(
            f"{name.removeprefix(ROOT)} {tuple(tensor.shape)}" for name, tensor in last.items()
        )
        raise ConfigError(
            f"its head has {shapes}, and a head has as many rows as its task has labels "
            f"({expected or 'which are not named'}), at most {MOST_OUTPUTS:,}."
        )
