"""Steps and cores that follow from the geometry of `U C_s Vᵀ`, tried on the decoder of thirty layers.

    python benchmarks/deep_geometry.py base "principal frame" --seed 1 --runs docs/data/deep_geometry.csv

On all linear modules at the count of LoRA's rank 8, otherwise as `deep.py`. None of these is in the library: see what
did not help in docs/results.md. A line a run: loss on dev after 100 steps.
"""

from __future__ import annotations

import argparse
import itertools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import deep
from decoder import batches, loss_of
from lotr.sharing.groups import Part
from lotr.tuner.factors import parts_of
from quality_runs import append
from records import calm

COLUMNS = ("variant", "seed", "numbers", "rates", "dev", "train", "seconds")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Pair:
    """The trained numbers of a group."""

    U: nn.Parameter  # (o, k)
    Vt: nn.Parameter  # (r, i)
    cores: list[tuple[nn.Parameter, Part]]

    def gradients(self) -> list[Tensor]:
        """Return those of the cores, `(k, r)` each."""
        return [as_core(C.grad, part) for C, part in self.cores]


def as_core(C: Any, part: Part) -> Tensor:
    """Return a core as `(k, r)`, from how it lies, or the other way round."""
    turned: Tensor = C.mT if part.transposed else C
    return turned


class Usual:
    """Training as it is; the other variants change gradients before a step, or numbers after it."""

    def __init__(self, pairs: list[Pair], rates: dict[str, float], seed: int) -> None:
        self.pairs, self.rates, self.seed = pairs, rates, seed
        self.cores = {id(C) for pair in pairs for C, _ in pair.cores}

    def trained(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return what the optimiser has, and at which rates."""
        return groups

    def fewer(self) -> int:
        """Return how many numbers of the adapter are not trained."""
        return 0

    def collect(self) -> None:
        """Turn the gradients of the model into those of what trains, before they are clipped."""

    def gradients(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Change gradients before a step."""

    def moved(self, optimizer: torch.optim.Optimizer) -> None:
        """Change numbers after it."""


class InTurn(Usual):
    """Cores rest while factors move, and the reverse, step by step."""

    def gradients(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if (id(parameter) in self.cores) != (step % 2 == 0):
                parameter.grad = None


class FactorsRest(Usual):
    """Factors rest in the second half."""

    def gradients(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if step >= 50 and id(parameter) not in self.cores:
                parameter.grad = None


class Scaled(Usual):
    """Gradients by the inverse of what multiplies a number: `(Σ C_s VᵀV C_sᵀ)⁻¹` for `U`, and so on."""

    @torch.no_grad()
    def gradients(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        def inverse(S: Tensor) -> Tensor:
            return torch.linalg.inv(S + (0.1 * S.trace() / len(S) + 1e-12) * torch.eye(len(S)))

        for pair in self.pairs:
            UU, VV = pair.U.T @ pair.U, pair.Vt @ pair.Vt.T
            cores = [as_core(C, part) for C, part in pair.cores]
            left, right = sum(C @ VV @ C.T for C in cores), sum(C.T @ UU @ C for C in cores)
            if left.trace() > 0:
                pair.U.grad, pair.Vt.grad = pair.U.grad @ inverse(left), inverse(right) @ pair.Vt.grad
            for (C, part), gradient in zip(pair.cores, pair.gradients(), strict=True):
                C.grad = as_core(inverse(UU) @ gradient @ inverse(VV), part).contiguous()


class Framed(Usual):
    """The same update with other factors: `U A⁻¹`, `A C_s Bᵀ` and `V B⁻¹`, to which the moments of Adam are carried."""

    @torch.no_grad()
    def turn(self, pair: Pair, A: Tensor, B: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Change the numbers of a pair, and of what AdamW keeps with them."""
        A_, B_ = torch.linalg.inv(A), torch.linalg.inv(B)

        def carry(p: nn.Parameter, m: Callable[[Tensor], Tensor], v: Callable[[Tensor], Tensor]) -> None:
            state = optimizer.state.get(p)
            if state:
                state["exp_avg"].copy_(m(state["exp_avg"]))
                state["exp_avg_sq"].copy_(v(state["exp_avg_sq"]))
            if p.grad is not None:
                p.grad.copy_(m(p.grad))

        pair.U.copy_(pair.U @ A_)
        pair.Vt.copy_(B_.T @ pair.Vt)
        carry(pair.U, lambda m: m @ A.T, lambda v: v @ A.square().T)
        carry(pair.Vt, lambda m: B @ m, lambda v: B.square() @ v)
        for C, part in pair.cores:
            C.copy_(as_core(A @ as_core(C, part) @ B.T, part))
            carry(
                C,
                lambda m, part=part: as_core(A_.T @ as_core(m, part) @ B_, part),
                lambda v, part=part: as_core(A_.square().T @ as_core(v, part) @ B_.square(), part),
            )


class PrincipalFrame(Framed):
    """Momentum in the frame of the cores: every ten steps the axes are the principal ones of the gradients."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sums: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def gradients(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        for n, pair in enumerate(self.pairs):
            of_cores = pair.gradients()
            left, right = sum(G @ G.T for G in of_cores), sum(G.T @ G for G in of_cores)
            U, Vt = pair.U.grad, pair.Vt.grad
            now = [
                left / left.trace().clamp_min(1e-30) + U.T @ U / U.square().sum().clamp_min(1e-30),
                right / right.trace().clamp_min(1e-30) + Vt @ Vt.T / Vt.square().sum().clamp_min(1e-30),
            ]
            mean = self.sums.get(n, now)
            self.sums[n] = [0.95 * old + 0.05 * new for old, new in zip(mean, now, strict=True)]
            if step % 10 == 0:
                axes = [torch.linalg.eigh(S)[1] for S in self.sums[n]]
                self.sums[n] = [Q.T @ S @ Q for Q, S in zip(axes, self.sums[n], strict=True)]
                self.turn(pair, axes[0].T.contiguous(), axes[1].T.contiguous(), optimizer)


class Retracted(Framed):
    """A Riemannian step: factors move out of their own span alone, and stay orthonormal; the cores take `R`."""

    @torch.no_grad()
    def gradients(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        for pair in self.pairs:
            pair.U.grad -= pair.U @ (pair.U.T @ pair.U.grad)
            pair.Vt.grad -= (pair.Vt.grad @ pair.Vt.T) @ pair.Vt

    def moved(self, optimizer: torch.optim.Optimizer) -> None:
        def triangle(X: Tensor) -> Tensor:
            R = torch.linalg.qr(X)[1]
            return R * R.diagonal().sign()[:, None]

        for pair in self.pairs:
            self.turn(pair, triangle(pair.U.detach()), triangle(pair.Vt.detach().T), optimizer)


class TwoBlocks(Usual):
    """Cores of two blocks on the diagonal."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.masks = {}
        for C, _ in (core for pair in self.pairs for core in pair.cores):
            self.masks[C] = torch.block_diag(*[torch.ones(len(C) // 2, len(C) // 2)] * 2)
            C.data *= self.masks[C]

    def fewer(self) -> int:
        return sum(int((mask == 0).sum()) for mask in self.masks.values())

    def collect(self) -> None:
        for C, mask in self.masks.items():
            C.grad *= mask


class LowRank(Usual):
    """Cores of a diagonal and a product of rank 8."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        draw, self.own = torch.Generator().manual_seed(self.seed), {}
        for C, _ in (core for pair in self.pairs for core in pair.cores):
            r = len(C)
            start = torch.zeros(r), torch.zeros(r, 8), torch.randn(r, 8, generator=draw) / r**0.5
            self.own[C] = [nn.Parameter(x) for x in start]

    def trained(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        kept = [{**g, "params": [p for p in g["params"] if id(p) not in self.cores]} for g in groups]
        own = [p for parts in self.own.values() for p in parts]
        return [g for g in kept if g["params"]] + [{"params": own, "lr": self.rates["core_lr"]}]

    def fewer(self) -> int:
        return sum(C.numel() - sum(p.numel() for p in parts) for C, parts in self.own.items())

    def collect(self) -> None:
        for C, (diagonal, A, B) in self.own.items():
            G, C.grad = C.grad, None
            diagonal.grad, A.grad, B.grad = G.diagonal().clone(), G @ B, G.T @ A

    @torch.no_grad()
    def moved(self, optimizer: torch.optim.Optimizer) -> None:
        for C, (diagonal, A, B) in self.own.items():
            C.copy_(torch.diag(diagonal) + A @ B.T)


@dataclass(frozen=True)
class Variant:
    """How a run differs from others."""

    kind: type[Usual] = Usual
    fields: dict[str, Any] = field(default_factory=lambda: {"r": 86})
    core_lr: float = 2.5e-3
    lr: float = 5e-3
    ends: tuple[int, ...] = ()  # first layers of the second and third run of layers that share a pair


THREE = {"r": 57, "layers_per_group": 10}
VARIANTS = {
    "base": Variant(),
    "in turn": Variant(InTurn),
    "factors rest": Variant(FactorsRest),
    "scaled": Variant(Scaled),
    "principal frame": Variant(PrincipalFrame),
    "retracted": Variant(Retracted),
    "retracted, a fifth of the rate": Variant(Retracted, lr=1e-3),
    "two blocks": Variant(TwoBlocks, {"r": 110}, 4e-3),
    "low rank and diagonal": Variant(LowRank, {"r": 176}, 6e-3),
    "4, 6 and 20 layers": Variant(fields=THREE, ends=(4, 10)),
    "20, 6 and 4 layers": Variant(fields=THREE, ends=(20, 26)),
}


def share(ends: tuple[int, ...]) -> None:
    """Make layers share along runs that begin at these."""
    from lotr.sharing import make_plan

    def run_of(path: str, layers: int) -> str:
        layer = int(re.findall(r"layers\.(\d+)", path)[0])
        return f"run{sum(layer >= end for end in ends)}"

    make_plan.run_of = run_of


def measure(name: str, seed: int, plan: deep.Plan) -> dict[str, Any]:
    """Return a run as a line of the file."""
    started, variant = time.perf_counter(), VARIANTS[name]
    rates = {"lr": variant.lr, "core_lr": variant.core_lr, "beta2": 0.99}
    if variant.ends:
        share(variant.ends)
    plan["methods"][name] = {"fields": {**variant.fields, "init": "gradient"}}
    key = deep.Key(" ".join(ALL), name, deep.rates_text(rates), plan["steps"], seed, "rates")
    tokens = deep.rows(plan["model"], plan["length"], plan["text"], None)
    model = deep.adapted(plan, key, tokens["train"])
    pairs = [
        Pair(
            group.lotr_U["default"].weight,
            group.lotr_V["default"].weight,
            [(getattr(layer.lotr_C["default"], part.name), part) for layer, part in parts],
        )
        for group, parts in parts_of(model, "default").items()
    ]
    variation = variant.kind(pairs, rates, seed)
    optimizer = deep.optimizer(variation.trained(deep.groups(model, rates)), rates)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    steps, warmup, losses = plan["steps"], plan["warmup"], []
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    model.train()
    stream = batches(tokens["train"], plan["batch_size"], seed)
    for step, batch in enumerate(itertools.islice(stream, steps)):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        variation.collect()
        nn.utils.clip_grad_norm_(trained, 1.0)
        variation.gradients(step, optimizer)
        optimizer.step()
        variation.moved(optimizer)
        optimizer.zero_grad()
        schedule.step()
    return {
        "variant": name,
        "seed": seed,
        "numbers": sum(p.numel() for p in model.parameters() if p.requires_grad) - variation.fewer(),
        "rates": key.rates,
        "dev": round(loss_of(model, tokens["dev"][: plan["dev_rows"]]), 5),
        "train": round(sum(losses[-20:]) / len(losses[-20:]), 5),
        "seconds": round(time.perf_counter() - started),
    }


def main() -> None:
    """Run variants one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="+", choices=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--runs", type=Path, default=Path("out/deep_geometry.csv"))
    options = parser.parse_args()
    plan = yaml.safe_load((deep.HERE / "deep.yaml").read_text())
    plan |= {"precision": "float32", "steps": options.steps}
    calm()
    options.runs.parent.mkdir(parents=True, exist_ok=True)
    for name in options.variants:
        line = measure(name, options.seed, plan)
        append(options.runs, line, COLUMNS)
        print(line, flush=True)


if __name__ == "__main__":
    main()
