"""O-DICE with the orthogonal rule and Pearson's chi-square, one seed, as plain autograd writes it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .networks import Gaussian, Twin, follow, target_of


class PlainODICE:
    """Twin V without layer norm and a Gaussian policy, hidden layers of 256."""

    def __init__(self, observations: int, actions: int, hidden: tuple[int, ...] = (256, 256)) -> None:
        self.value = Twin(observations, hidden)
        self.target = target_of(self.value)
        self.policy = Gaussian(observations, actions, hidden, tanh_mean=False)
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), lr=2e-4)
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=2e-4, weight_decay=1e-4)
        self.lambda_, self.eta, self.discount, self.rate = 0.6, 1.0, 0.99, 0.005

    def conjugate(self, residual: Tensor) -> Tensor:
        """f* of Pearson's chi-square."""
        omega = torch.relu(residual / 2.0 + 1.0)
        return residual * omega - (omega - 1.0) ** 2

    def update(
        self, observations: Tensor, actions: Tensor, rewards: Tensor, next_observations: Tensor, terminations: Tensor
    ) -> dict[str, float]:
        """One update on `[B, ...]` tensors."""
        not_done = 1.0 - terminations
        with torch.no_grad():
            target = torch.minimum(*self.target(observations))
            next_target = torch.minimum(*self.target(next_observations))
        values, next_values = self.value(observations), self.value(next_observations)
        forward_residuals = [rewards + self.discount * not_done * next_target - v for v in values]
        backward_residuals = [rewards + self.discount * not_done * v - target for v in next_values]
        forward_loss = sum(self.lambda_ * self.conjugate(r).mean() for r in forward_residuals) / 2
        backward_loss = sum(self.lambda_ * self.eta * self.conjugate(r).mean() for r in backward_residuals) / 2
        value_loss = sum((1.0 - self.lambda_) * v.mean() for v in values) / 2

        parameters = list(self.value.parameters())
        forward = torch.autograd.grad(forward_loss, parameters, retain_graph=True)
        backward = torch.autograd.grad(backward_loss, parameters, retain_graph=True)
        flat_forward = torch.cat([g.reshape(-1) for g in forward])
        flat_backward = torch.cat([g.reshape(-1) for g in backward])
        coefficient = (flat_forward @ flat_backward / (flat_forward @ flat_forward).clamp(min=1e-10)).item()
        self.value_optimizer.zero_grad()
        value_loss.backward()
        for p, f, b in zip(parameters, forward, backward, strict=True):
            p.grad = (torch.zeros_like(p) if p.grad is None else p.grad) + f + b - coefficient * f
        self.value_optimizer.step()
        follow(self.target, self.value, self.rate)

        weights = [torch.clamp(F.relu(r), max=100.0).detach() for r in forward_residuals]
        log_prob = self.policy(observations).log_prob(actions)
        policy_loss = -sum((w * log_prob).mean() for w in weights) / 2
        self.policy_optimizer.zero_grad()
        policy_loss.backward()
        self.policy_optimizer.step()
        return {
            "value_loss": value_loss.item(),
            "forward_loss": forward_loss.item(),
            "backward_loss": backward_loss.item(),
            "policy_loss": policy_loss.item(),
            "coefficient": coefficient,
            "value": values[0].mean().item(),
            "weight": weights[0].mean().item(),
            "forward_norm": flat_forward.norm().item(),
            "backward_norm": flat_backward.norm().item(),
        }
