"""The names of a configuration that match nothing in a model. PEFT passes over them; here each is an error."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from ..errors import PlanError, near
from ..sharing.keys import BASIS
from ..sharing.paths import normalise
from .adaptable import is_linear
from .experts import stacked_weights

#: Heads that PEFT itself adds to `modules_to_save`, whether the model has them or not.
_HEADS = {
    "SEQ_CLS": {"classifier", "score"},
    "TOKEN_CLS": {"classifier", "score"},
    "QUESTION_ANS": {"qa_outputs"},
}


def check_names(model: nn.Module, config: PeftConfig) -> None:
    """Refuse a configuration that names modules or layers which a model lacks, also when other names match.

    Raises:
        PlanError: The message names the field, what matches nothing, and near matches.
    """
    own = partial(_field, config)
    every = [normalise(path) for path, _ in model.named_modules(remove_duplicate=False)]
    paths = [path for path in every if path and BASIS not in path.split(".")]
    targets, linear = own("target_modules"), linear_paths(model)
    stacks = list(stacked_weights(model))
    _check_list("target_parameters", own("target_parameters") or (), stacks, stacks)
    if isinstance(targets, str):
        if targets not in ("all-linear", DUMMY_TARGET_MODULES):
            _check_regex("target_modules", targets, paths, linear)
    elif targets is not None:
        _check_list("target_modules", targets, paths, linear)
        if own("layers_to_transform") is not None:
            _check_layers(config, paths + stacks)
    excluded, tokens = own("exclude_modules"), own("trainable_token_indices")
    if isinstance(excluded, str):
        _check_regex("exclude_modules", excluded, paths + stacks, paths)
    else:
        _check_list("exclude_modules", excluded or (), paths + stacks, paths)
    if isinstance(tokens, dict):
        _check_list("trainable_token_indices", tokens, paths, paths)
    of_peft, saved = _HEADS.get(str(config.task_type), set()), own("modules_to_save") or ()
    found = {name for name in saved if any(path.endswith(name) for path in paths)}
    # PEFT names the heads of its own accord, also for a second adapter that tells no task
    of_peft = of_peft.union(*(heads for heads in _HEADS.values() if heads & found))
    for name in saved:
        if name not in found | of_peft:
            raise PlanError(_nothing("modules_to_save", name, paths))


def _field(config: PeftConfig, name: str) -> Any:
    """Return a field of a configuration, `None` where its method has no such field."""
    return getattr(config, name, None)


def check_rank_pattern(patterns: Iterable[str], paths: Collection[str]) -> None:
    """Refuse a key of `rank_pattern` that matches no adapted module.

    Raises:
        PlanError: The message names the key and near matches.
    """
    for pattern in patterns:
        if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths):
            known = {path.rpartition(".")[2] for path in paths}
            raise PlanError(
                f"rank_pattern={pattern!r} matches no adapted module of the model. {near(pattern, known)}"
            )


def linear_paths(model: nn.Module) -> list[str]:
    """Return the paths of all modules that could be adapted."""
    return [path for path, module in model.named_modules() if path and is_linear(module)]


def suffixes(paths: Iterable[str]) -> set[str]:
    """Return every end of a path that a name can match.

    Example:
        >>> sorted(suffixes(["h.0.q_proj"]))
        ['0.q_proj', 'h.0.q_proj', 'q_proj']
    """
    return {path.split(".", n)[n] for path in paths for n in range(path.count(".") + 1)}


def _check_list(field: str, names: Iterable[str], paths: list[str], examples: list[str]) -> None:
    known = suffixes(paths)
    for name in sorted(names):
        if normalise(name) not in known:
            raise PlanError(_nothing(field, name, examples))


def _check_regex(field: str, regex: str, paths: list[str], examples: list[str]) -> None:
    if not any(re.fullmatch(regex, path) for path in paths):
        example = f" {examples[0]!r}" if examples else ""
        raise PlanError(
            f"{field}={regex!r} matches no module of the model. A regex must match a whole path, such as{example}."
        )


def _nothing(field: str, name: str, paths: list[str]) -> str:
    length = name.count(".") + 1
    known = {".".join(path.split(".")[-length:]) for path in paths}
    kind = "stack of experts" if field == "target_parameters" else "module"
    return f"{field}={name!r} matches no {kind} of the model. {near(name, {n for n in known if not n.isdigit()})}"


def names_in_layers(config: Any) -> set[str]:
    """Return the own names of the modules behind "all-linear" in the layers of a configuration; all where none is.

    PEFT looks at the layer of what a name ends, and not of a whole path.
    """
    names = {path: path.rpartition(".")[2] for path in config.target_modules}
    probe = copy.copy(config)
    probe.target_modules, probe.exclude_modules = set(names.values()), None
    inside = {
        name for path, name in names.items() if name != path and check_target_module_exists(probe, path)
    }
    return inside or set(names.values())


def _check_layers(config: Any, paths: list[str]) -> None:
    """Refuse layers that no named module has, names that no named layer has, and lists that do not exist."""
    patterns = config.layers_pattern
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        if not any(re.match(rf"(?:^|.*?\.){pattern}\.\d+\.", path) for path in paths):
            lists = {name for path in paths for name in re.findall(r"([^.]+)\.\d+(?:\.|$)", path)}
            raise PlanError(
                f"layers_pattern={pattern!r} names no list of modules of the model. {near(pattern, lists)}"
            )
    asked = config.layers_to_transform
    asked = [asked] if isinstance(asked, int) else list(asked)
    probe = copy.copy(config)
    probe.exclude_modules = probe.modules_to_save = None

    def matches(names: Collection[str], layers: list[int]) -> bool:
        probe.target_modules, probe.layers_to_transform = set(names), layers
        return any(check_target_module_exists(probe, path) for path in paths)

    names = {*config.target_modules, *(config.target_parameters or ())}
    ends = names.difference(paths)  # whole paths are adapted whatever their layer
    for layer in asked:
        if not matches(ends, [layer]):
            numbers = {int(part) for path in paths for part in path.split(".") if part.isdigit()}
            known = [str(n) for n in sorted(numbers) if matches(ends, [n])]
            raise PlanError(
                f"layers_to_transform={layer} is no layer of target_modules={sorted(names)!r}. "
                f"Known: {', '.join(known) or 'none'}."
            )
    for name in sorted(names):
        if not matches([name], asked):
            raise PlanError(
                f"target_modules={name!r} matches no module of the layers that "
                f"layers_to_transform={config.layers_to_transform!r} leaves. Leave the name out, or name other layers."
            )
