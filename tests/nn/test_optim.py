"""`Adam` over the seed axis against `torch.optim.Adam`, one seed at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from rlkit2.nn import Adam, StackedMLP

F64 = torch.float64
SEEDS, STEPS = 3, 8


class Parts(nn.Module):
    """Two parameters of different shapes, as an actor has."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(torch.randn(SEEDS, 4, 2, generator=draw, dtype=F64))
        self.second = nn.Parameter(torch.randn(SEEDS, 1, 3, generator=draw, dtype=F64))


def gradient(step: int) -> Tensor:
    return torch.randn(SEEDS, 11, generator=torch.Generator().manual_seed(100 + step), dtype=F64)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("cosine_steps", [None, 5])
@pytest.mark.parametrize("way", ["step", "minimize"])
def test_every_seed_steps_as_torch_does(decay: float, cosine_steps: int | None, way: str) -> None:
    module = Parts()
    ours = Adam(module, 0.05, weight_decay=decay, cosine_steps=cosine_steps)
    twins = [[nn.Parameter(p[k].detach().clone()) for p in module.parameters()] for k in range(SEEDS)]
    theirs = [torch.optim.Adam(twin, lr=0.05, weight_decay=decay, foreach=False, fused=False) for twin in twins]
    for t in range(STEPS):
        vector = gradient(t)
        if way == "step":
            ours.step(vector)
        else:
            flat = torch.cat([p.flatten(1) for p in module.parameters()], 1)
            norm = ours.minimize((flat * vector).sum(1))
            torch.testing.assert_close(norm, vector.norm(dim=1))
        for k in range(SEEDS):
            for p, part in zip(twins[k], vector[k].split([8, 3]), strict=True):
                p.grad = part.view_as(p).clone()
            if cosine_steps:
                rate = 0.05 * 0.5 * (1.0 + math.cos(math.pi * min(t / cosine_steps, 1.0)))
                theirs[k].param_groups[0]["lr"] = rate
            theirs[k].step()
    for p, *own in zip(module.parameters(), *twins, strict=True):
        torch.testing.assert_close(p.detach(), torch.stack([q.detach() for q in own]), rtol=1e-12, atol=1e-13)
        assert p.grad is None


@pytest.mark.parametrize("decoupled", [False, True])
def test_it_is_the_operation_of_torchs_own_class(decoupled: bool) -> None:
    """To the last bit, with the weight decay of both kinds."""
    module, twin = Parts(), Parts()
    ours = Adam(module, 0.05, weight_decay=0.1, decoupled=decoupled)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    theirs = kind(twin.parameters(), lr=0.05, weight_decay=0.1, fused=True)
    for t in range(STEPS):
        ours.step(gradient(t))
        for p, part in zip(twin.parameters(), gradient(t).split([8, 3], 1), strict=True):
            p.grad = part.reshape(p.shape).clone()
        theirs.step()
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), twin.parameters(), strict=True))


def test_a_gradient_in_another_memory_layout_is_not_misread() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(2, 3, 4, dtype=F64))
    values = torch.randn(2, 4, 3, dtype=F64)
    Adam(module, 1.0).minimize((module.weight.transpose(1, 2) * values).sum((1, 2)))
    torch.testing.assert_close(module.weight.detach(), -values.transpose(1, 2).sign(), rtol=1e-5, atol=1e-5)


def test_the_rate_ends_at_zero_and_stays_there() -> None:
    net = StackedMLP(2, (), seeds=[0], dtype=F64)
    adam = Adam(net, 0.1, cosine_steps=3)
    for _ in range(3):
        adam.step(torch.ones_like(net.flat))
    settled = net.flat.detach().clone()
    for _ in range(4):
        adam.step(torch.ones_like(net.flat))
    torch.testing.assert_close(net.flat.detach(), settled, rtol=0, atol=1e-12)


def test_state_is_complete_before_the_first_step_and_continues_exactly() -> None:
    def run(adam: Adam, module: Parts, start: int, end: int) -> None:
        for t in range(start, end):
            adam.step(gradient(t))

    whole, resumed = Parts(), Parts()
    one, two = Adam(whole, 0.05, cosine_steps=6), Adam(resumed, 0.05, cosine_steps=6)
    assert {n.rpartition(".")[2] for n in two.named_state()} == {"exp_avg", "exp_avg_sq", "step"}
    run(one, whole, 0, 3)
    with torch.no_grad():
        for p, q in zip(resumed.parameters(), whole.parameters(), strict=True):
            p.copy_(q)
        for name, tensor in two.named_state().items():
            tensor.copy_(one.named_state()[name])
    run(one, whole, 3, 6)
    run(two, resumed, 3, 6)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_restarted_keeps_the_settings() -> None:
    module = Parts()
    used = Adam(module, 0.05, weight_decay=0.1, cosine_steps=4)
    used.step(gradient(0))
    one, two = Parts(), Parts()
    fresh, same = used.restarted(one), Adam(two, 0.05, weight_decay=0.1, cosine_steps=4)
    for t in range(3):
        fresh.step(gradient(t))
        same.step(gradient(t))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
