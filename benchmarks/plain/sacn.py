"""SAC-N and EDAC, one seed, in the style of most single-seed libraries: a vectorised ensemble under autograd, gradients through all critics.

As in CORL's SAC-N, the temperature has a policy sample of its own and the disagreement at random actions is measured in every update (`monitor`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from .networks import follow, mlp, target_of


class EnsembleLinear(nn.Module):
    """One linear layer for every member, `[M, B, in]` to `[M, B, out]`."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, inputs: Tensor) -> Tensor:
        """All members."""
        return inputs @ self.weight + self.bias


class EnsembleCritic(nn.Module):
    """M critics with one output each."""

    def __init__(self, members: int, inputs: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.members = members
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [EnsembleLinear(members, inputs, width), nn.ReLU()]
            inputs = width
        self.net = nn.Sequential(*layers, EnsembleLinear(members, inputs, 1))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Q of every member, `[M, B]`, for inputs `[B, ...]` or `[M, B, ...]`."""
        inputs = torch.cat([observations, actions], -1)
        if inputs.ndim == 2:
            inputs = inputs.unsqueeze(0).repeat(self.members, 1, 1)
        return self.net(inputs).squeeze(-1)


class PlainSACN:
    """SAC-N (eta = 0) or EDAC."""

    def __init__(
        self,
        observations: int,
        actions: int,
        members: int = 10,
        hidden: tuple[int, ...] = (256, 256, 256),
        eta: float = 0.0,
        monitor: bool = True,
    ) -> None:
        self.policy = mlp(observations, hidden, 2 * actions)
        self.critic = EnsembleCritic(members, observations + actions, hidden)
        self.target = target_of(self.critic)
        self.log_alpha = torch.zeros(1, requires_grad=True)
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=3e-4)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=3e-4)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=3e-4)
        self.members, self.eta, self.monitor, self.target_entropy = members, eta, monitor, -float(actions)

    def sample(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Actions and log-densities."""
        mean, log_std = self.policy(observations).chunk(2, -1)
        law = Normal(mean, log_std.clamp(-5.0, 2.0).exp())
        raw = law.rsample()
        action = raw.tanh()
        return action, law.log_prob(raw).sum(-1) - torch.log(1.0 - action.pow(2) + 1e-6).sum(-1)

    def update(
        self, observations: Tensor, actions: Tensor, rewards: Tensor, next_observations: Tensor, terminations: Tensor
    ) -> dict[str, float]:
        """One update on `[B, ...]` tensors."""
        with torch.no_grad():
            _, log_prob = self.sample(observations)
        alpha_loss = (-self.log_alpha * (log_prob + self.target_entropy)).mean()
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()
        alpha = self.log_alpha.exp().detach()
        new_actions, log_prob = self.sample(observations)
        policy_loss = (alpha * log_prob - self.critic(observations, new_actions).min(0).values).mean()
        self.policy_optimizer.zero_grad()
        policy_loss.backward()
        self.policy_optimizer.step()

        with torch.no_grad():
            next_actions, next_log_prob = self.sample(next_observations)
            next_q = self.target(next_observations, next_actions).min(0).values - alpha * next_log_prob
            targets = rewards + 0.99 * (1.0 - terminations) * next_q
        q = self.critic(observations, actions)
        critic_loss = (q - targets).pow(2).mean(1).sum()
        if self.eta > 0.0:
            critic_loss = critic_loss + self.eta * self.diversity(observations, actions)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()
        follow(self.target, self.critic, 0.005)
        metrics = {"critic": critic_loss.item(), "policy": policy_loss.item(), "alpha": alpha.item()}
        if self.monitor:
            with torch.no_grad():
                random_actions = 2.0 * torch.rand_like(actions) - 1.0
                metrics["q_random_std"] = self.critic(observations, random_actions).std(0).mean().item()
        return metrics

    def diversity(self, observations: Tensor, actions: Tensor) -> Tensor:
        """EDAC's term by a second derivative."""
        wide = actions.unsqueeze(0).repeat(self.members, 1, 1).requires_grad_()
        q = self.critic(observations.unsqueeze(0).repeat(self.members, 1, 1), wide)
        (slopes,) = torch.autograd.grad(q.sum(), wide, create_graph=True)
        unit = (slopes / (slopes.norm(dim=2, keepdim=True) + 1e-10)).transpose(0, 1)
        cosines = unit @ unit.transpose(1, 2)
        off_diagonal = cosines * (1.0 - torch.eye(self.members))
        return off_diagonal.sum((1, 2)).mean() / (self.members - 1)
