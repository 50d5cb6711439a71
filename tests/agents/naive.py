"""IQL and TD3+BC a second time: one seed, plain linear layers, autograd, a loop over critics; written from the papers, slow on purpose.

Nothing of the library's networks, losses or optimisers is used; only parameters are read from an agent's state dict.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def network(state: Mapping[str, Tensor], prefix: str, seed: int, member: int | None = None) -> nn.Sequential:
    """The ReLU network under `prefix` of an agent's state dict, as torch layers."""
    layers: list[nn.Module] = []
    count = sum(1 for name in state if name.startswith(f"{prefix}.layers.") and name.endswith("weight"))
    for i in range(count):
        weight, bias = (state[f"{prefix}.layers.{i}.{kind}"][seed] for kind in ("weight", "bias"))
        if member is not None:
            weight, bias = weight[member], bias[member]
        linear = nn.Linear(*weight.shape, dtype=weight.dtype)
        linear.weight.data.copy_(weight.T)
        linear.bias.data.copy_(bias.flatten())
        layers += [linear, *normalization(state, prefix, seed, member, i), nn.ReLU()] if i < count - 1 else [linear]
    return nn.Sequential(*layers)


def normalization(
    state: Mapping[str, Tensor], prefix: str, seed: int, member: int | None, layer: int
) -> list[nn.Module]:
    """The layer norm behind a linear layer, where there is one."""
    if f"{prefix}.norms.{layer}.weight" not in state:
        return []
    gain, shift = (state[f"{prefix}.norms.{layer}.{kind}"][seed] for kind in ("weight", "bias"))
    if member is not None:
        gain, shift = gain[member], shift[member]
    norm = nn.LayerNorm(gain.numel(), dtype=gain.dtype)
    norm.weight.data.copy_(gain.flatten())
    norm.bias.data.copy_(shift.flatten())
    return [norm]


def polyak(target: nn.Module, online: nn.Module, rate: float) -> None:
    for old, new in zip(target.parameters(), online.parameters(), strict=True):
        old.data = (1.0 - rate) * old.data + rate * new.data


class NaiveIQL:
    """Kostrikov et al. (2022), equations 5 to 7, all losses at the values before the step."""

    def __init__(
        self, state: Mapping[str, Tensor], seed: int, *, discrete: bool, num_critics: int, **hp: float
    ) -> None:
        self.discrete, self.hp = discrete, hp
        self.v = network(state, "value", seed)
        self.qs = nn.ModuleList(network(state, "critic", seed, i) for i in range(num_critics))
        self.targets = nn.ModuleList(network(state, "critic_target", seed, i) for i in range(num_critics))
        self.pi = network(state, "policy", seed)
        own = [] if discrete else [nn.Parameter(state["policy.log_std"][seed, 0].clone())]
        self.log_std = own
        rates = hp["value_learning_rate"], hp["critic_learning_rate"], hp["policy_learning_rate"]
        groups = list(self.v.parameters()), list(self.qs.parameters()), [*self.pi.parameters(), *own]
        self.v_adam, self.q_adam, self.pi_adam = (
            torch.optim.Adam(group, lr=rate, foreach=False, fused=False)
            for group, rate in zip(groups, rates, strict=True)
        )
        self.steps = 0

    def q(self, net: nn.Module, s: Tensor, a: Tensor) -> Tensor:
        if self.discrete:
            every = net(s)
            return torch.stack([every[i, int(a[i])] for i in range(len(a))])
        return net(torch.cat([s, a], 1)).squeeze(1)

    def log_prob(self, s: Tensor, a: Tensor) -> Tensor:
        if self.discrete:
            return torch.distributions.Categorical(logits=self.pi(s)).log_prob(a)
        scale = self.log_std[0].clamp(-5.0, 2.0).exp()
        return torch.distributions.Normal(torch.tanh(self.pi(s)), scale).log_prob(a).sum(1)

    def update(self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, terminated: Tensor) -> dict[str, float]:
        hp = self.hp
        with torch.no_grad():
            least = torch.stack([self.q(net, s, a) for net in self.targets]).min(0).values
            y = r + hp["discount"] * torch.where(terminated, torch.zeros_like(r), self.v(s2).squeeze(1))
        advantage = least - self.v(s).squeeze(1)
        v_loss = ((hp["expectile"] - (advantage < 0).to(advantage)).abs() * advantage**2).mean()
        q_loss = sum(((self.q(net, s, a) - y) ** 2).mean() for net in self.qs)
        weight = torch.exp(hp["inverse_temperature"] * advantage.detach()).clamp(max=hp["weight_clamp"])
        pi_loss = -(weight * self.log_prob(s, a)).mean()
        decay = 0.5 * (1.0 + math.cos(math.pi * min(self.steps / hp["policy_cosine_steps"], 1.0)))
        self.pi_adam.param_groups[0]["lr"] = hp["policy_learning_rate"] * decay
        for adam, loss in ((self.v_adam, v_loss), (self.q_adam, q_loss), (self.pi_adam, pi_loss)):
            adam.zero_grad()
            loss.backward()
            adam.step()
        for target, online in zip(self.targets, self.qs, strict=True):
            polyak(target, online, hp["target_update_rate"])
        self.steps += 1
        return {
            "value/loss": v_loss.item(),
            "critic/loss": q_loss.item(),
            "policy/loss": pi_loss.item(),
            "weight/mean": weight.mean().item(),
        }

    def parts(self) -> dict[str, nn.Module]:
        named: dict[str, nn.Module] = {"value": self.v, "policy": self.pi}
        for i, (online, target) in enumerate(zip(self.qs, self.targets, strict=True)):
            named[f"critic/{i}"], named[f"critic_target/{i}"] = online, target
        return named


class NaiveTD3BC:
    """Fujimoto and Gu (2021), equation 5, on TD3; `noise` is the standard normal draw of the step."""

    def __init__(self, state: Mapping[str, Tensor], seed: int, *, num_critics: int, **hp: float) -> None:
        self.hp = hp
        self.qs = nn.ModuleList(network(state, "critic", seed, i) for i in range(num_critics))
        self.q_targets = copy.deepcopy(self.qs)
        self.pi = network(state, "policy", seed)
        self.pi_target = copy.deepcopy(self.pi)
        self.q_adam = torch.optim.Adam(self.qs.parameters(), lr=hp["critic_learning_rate"], foreach=False, fused=False)
        self.pi_adam = torch.optim.Adam(self.pi.parameters(), lr=hp["policy_learning_rate"], foreach=False, fused=False)
        self.steps = 0

    def update(
        self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, terminated: Tensor, noise: Tensor
    ) -> dict[str, float]:
        hp = self.hp
        with torch.no_grad():
            noise = torch.clamp(hp["target_noise"] * noise, -hp["target_noise_clip"], hp["target_noise_clip"])
            a2 = torch.clamp(torch.tanh(self.pi_target(s2)) + noise, -1.0, 1.0)
            least = torch.stack([net(torch.cat([s2, a2], 1)).squeeze(1) for net in self.q_targets]).min(0).values
            y = r + hp["discount"] * torch.where(terminated, torch.zeros_like(r), least)
        q_loss = sum(((net(torch.cat([s, a], 1)).squeeze(1) - y) ** 2).mean() for net in self.qs)
        self.q_adam.zero_grad()
        q_loss.backward()
        self.q_adam.step()
        metrics = {"critic/loss": q_loss.item()}
        self.steps += 1
        if self.steps % hp["policy_delay"] == 0:
            acted = torch.tanh(self.pi(s))
            value = self.qs[0](torch.cat([s, acted], 1)).squeeze(1)
            scale = hp["alpha"] / value.abs().mean().detach()
            pi_loss = -scale * value.mean() + ((acted - a) ** 2).mean()
            self.pi_adam.zero_grad()
            pi_loss.backward()
            self.pi_adam.step()
            for target, online in [*zip(self.q_targets, self.qs, strict=True), (self.pi_target, self.pi)]:
                polyak(target, online, hp["target_update_rate"])
            metrics["policy/loss"] = pi_loss.item()
        return metrics

    def parts(self) -> dict[str, nn.Module]:
        named: dict[str, nn.Module] = {"policy": self.pi, "policy_target": self.pi_target}
        for i, (online, target) in enumerate(zip(self.qs, self.q_targets, strict=True)):
            named[f"critic/{i}"], named[f"critic_target/{i}"] = online, target
        return named
