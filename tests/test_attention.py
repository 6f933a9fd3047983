"""Head blocks are the heads that the attention computes with, and fused weights are cut where it cuts them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import lotr
from conftest import SIZES, VOCABULARY, bert, gpt2, llama, pico, t5, tokens
from lotr import LotrConfig
from lotr.sharing.blocks import Heads, Site
from lotr.tuner.attention import fused_projections, heads_of
from lotr.tuner.layer import LotrLinear

SIZE = 8  # features of a head, in every model here


def modernbert() -> nn.Module:
    special = dict.fromkeys((f"{name}_token_id" for name in ("pad", "bos", "eos", "cls", "sep")), 0)
    return pico("ModernBertModel", vocab_size=VOCABULARY, **SIZES, **special)


def phi3() -> nn.Module:
    return pico("Phi3ForCausalLM", vocab_size=VOCABULARY, num_key_value_heads=2, pad_token_id=0, **SIZES)


@dataclass(frozen=True)
class Attention:
    """Names of the modules of one architecture, and how many query heads a value head serves."""

    make: Callable[[], nn.Module]
    inputs: list[str]  # query, key and value
    output: str  # path of the first layer's output projection
    value: str  # how the name of the value projection ends
    served: int = 1

    def adapted(self, targets: list[str], **kwargs: Any) -> PeftModel:
        options = {"modes": ("layer", "head"), "blocks": "head", "init_weights": False, "seed": 0} | kwargs
        return get_peft_model(self.make(), LotrConfig(r=4, target_modules=targets, **options)).eval()


ATTENTIONS = {
    "bert": Attention(
        bert, ["query", "key", "value"], "bert.encoder.layer.0.attention.output.dense", "value"
    ),
    "llama": Attention(llama, ["q_proj", "k_proj", "v_proj"], "model.layers.0.self_attn.o_proj", "v_proj", 2),
    "gpt2": Attention(gpt2, ["c_attn"], "transformer.h.0.attn.c_proj", "value"),
    "modernbert": Attention(modernbert, ["Wqkv"], "layers.0.attn.Wo", "value"),
    "phi3": Attention(phi3, ["qkv_proj"], "model.layers.0.self_attn.o_proj", "value", 2),
}


@torch.no_grad()
def keep(model: nn.Module, wanted: Callable[[Site], bool]) -> None:
    """Set the free cores of all other sites to zero."""
    kept = 0
    for layer in (m for m in model.modules() if isinstance(m, LotrLinear)):
        for part, _ in layer.adapters["default"].parts:
            (_, across), (k, r) = part.grid, part.group.rank
            C = layer.site_core("default", part)
            for n, site in enumerate(part.sites):
                row, column = divmod(n, across)
                if wanted(site):
                    kept += 1
                else:
                    C[row * k : (row + 1) * k, column * r : (column + 1) * r] = 0.0
    assert kept == 1, "one site is left"


@torch.no_grad()
def mixed_values(model: nn.Module, attention: Attention) -> Tensor:  # (rows, length, heads, size)
    """What the first layer's output projection is fed."""
    seen: list[Tensor] = []
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    handle = root.get_submodule(attention.output).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model(input_ids=tokens())
    handle.remove()
    return seen[0].unflatten(-1, (-1, SIZE))


MODES = [("layer", "head"), ("layer", "projection", "head"), ("site",), ("layer",)]


@pytest.mark.parametrize(
    "name, modes",
    [(name, modes) for n, name in enumerate(ATTENTIONS) for modes in MODES[n % 2 :: 2]],
    ids=str,
)
def test_an_update_of_one_value_head_changes_what_that_head_gives_alone(
    name: str, modes: tuple[str, ...]
) -> None:
    """On every architecture, and under every way of sharing by turns."""
    attention = ATTENTIONS[name]
    plain, whole = mixed_values(attention.make(), attention), attention.adapted(attention.inputs, modes=modes)
    first = attention.output.rpartition(".0.")[0] + ".0"
    for head in range(4 // attention.served):
        model = copy.deepcopy(whole)
        keep(
            model,
            lambda site, head=head: (
                site.module.startswith(first)
                and site.projection.endswith(attention.value)
                and site.head == head
            ),
        )
        change = (mixed_values(model, attention) - plain).abs().amax((0, 1, 3))
        served = {head * attention.served + n for n in range(attention.served)}
        assert {h for h in range(4) if change[h] > 1e-3} == served
        assert {h for h in range(4) if change[h] == 0.0} == set(range(4)) - served


@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_head_of_the_output_projection_reads_what_that_head_gives_alone(name: str) -> None:
    attention = ATTENTIONS[name]
    whole, values = attention.adapted([attention.output]), mixed_values(attention.make(), attention)
    for head in range(4):
        model = copy.deepcopy(whole)
        keep(model, lambda site, head=head: site.head == head)
        layer = model.get_base_model().get_submodule(attention.output)
        for other in range(4):
            alone = torch.zeros_like(values)
            alone[..., other, :] = values[..., other, :]
            assert bool(layer.update("default", alone.flatten(-2)).any()) == (other == head)


@pytest.mark.parametrize(
    "make, target, path, sizes",
    [
        (gpt2, "c_attn", "transformer.h.0.attn.c_attn", (32, 32, 32)),
        (modernbert, "Wqkv", "layers.0.attn.Wqkv", (32, 32, 32)),
        (phi3, "qkv_proj", "model.layers.0.self_attn.qkv_proj", (32, 16, 16)),
    ],
)
def test_a_fused_weight_is_cut_where_its_projections_end(
    make: Any, target: str, path: str, sizes: tuple[int, ...]
) -> None:
    plan = lotr.plan(make(), LotrConfig(r=4, target_modules=[target], modes=("layer",)))
    assert [(g.projections[0].rpartition(".")[2], g.shape, len(g.sites)) for g in plan.groups] == [
        (name, (size, 32), 3) for name, size in zip(("query", "key", "value"), sizes, strict=True)
    ]
    assert [part.rows for part in plan.parts[path]] == [
        (sum(sizes[:n]), size) for n, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("row", ["lora", "dora", "bora", "map", "lora_xs"])
@pytest.mark.parametrize("make, target", [(gpt2, "c_attn"), (modernbert, "Wqkv"), (phi3, "qkv_proj")])
def test_a_fused_weight_stays_whole_where_nothing_is_shared(make: Any, target: str, row: str) -> None:
    """PEFT's LoRA does not know of projections."""
    model = make()
    plan = lotr.plan(model, LotrConfig(method=row, r=4, target_modules=[target]))
    wide = {g.shape for g in plan.groups}
    assert len(plan.groups) == 3 and wide == {(64 if target == "qkv_proj" else 96, 32)}


def test_a_feed_forward_matrix_is_not_cut_into_heads() -> None:
    for model, targets in ((t5(), ["q", "wo"]), (bert(), ["query", "dense"]), (modernbert(), ["Wqkv", "Wo"])):
        plan = lotr.plan(
            model, LotrConfig(r=4, target_modules=targets, modes=("layer", "head"), blocks="head")
        )
        fed = [site for group in plan.groups for site in group.sites if "att" not in site.module.lower()]
        assert fed and all(site.head is None for site in fed)
        assert all(site.head is not None for g in plan.groups for site in g.sites if site not in fed)


@pytest.mark.parametrize(
    "path, shape",
    [
        ("h.0.attn.q_proj", (64, 32)),  # a query and a gate beside each head
        ("h.0.attn.k_proj", (32, 32)),  # as many rows as queries have, but there are two heads
        ("h.0.attn.c_attn", (48, 32)),  # neither q+k+v nor k+v
        ("h.0.mlp.c_proj", (32, 32)),
    ],
)
def test_features_that_are_not_all_heads_are_not_cut(path: str, shape: tuple[int, int]) -> None:
    attention = nn.Module()
    attention.num_heads, attention.num_key_value_heads, attention.head_dim = 4, 2, 8
    model = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"attn": attention, "mlp": nn.Module()})])})
    assert heads_of(model, path, shape) is None
    assert heads_of(model, "h.0.attn.k_proj", (16, 32)) == Heads(8, 0)
    assert heads_of(model, "h.0.attn.c_attn", (64, 32)) == Heads(8, 0)
    assert fused_projections(model, "h.0.attn.c_attn", (64, 32)) == (
        ("query", 32),
        ("key", 16),
        ("value", 16),
    )
