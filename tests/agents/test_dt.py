"""The decision transformer: its update against one of torch's own layers, its windows against a loop, and its policy against its own network."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn import functional as F

import rlkit2
from rlkit2.agents import make_agent
from rlkit2.agents.dt import DT, DTConfig
from rlkit2.data import DatasetSpec, TransitionDataset, dataset_from_arrays
from rlkit2.data.sequences import SequenceBatch, SequenceDataset
from rlkit2.deploy.graph import PolicyGraph
from rlkit2.errors import ConfigError
from rlkit2.evaluation import evaluate_policy
from rlkit2.nn import Normalizer, Policy, load_policy
from rlkit2.testing import random_sequences

OBS, ACT, SEEDS = 4, 2, (4, 11)
SMALL: dict[str, Any] = {"hidden_sizes": (8, 8), "context_length": 4, "num_heads": 2, "max_timestep": 1000}


STRESS = {"learning_rate": 1e-2, "warmup_steps": 20, "max_gradient_norm": 0.02, "weight_decay": 0.1}


class Twin(nn.Module):
    """One seed with torch's own attention, as CORL has it; no dropout."""

    def __init__(self, agent: DT, index: int) -> None:
        super().__init__()
        config, width = agent.config, agent.config.hidden_sizes[0]
        self.discrete = agent.discrete
        self.time = nn.Embedding(config.max_timestep, width)
        self.return_, self.observation, self.action = nn.Linear(1, width), nn.Linear(OBS, width), nn.Linear(ACT, width)
        self.norm, self.last_norm, self.head = nn.LayerNorm(width), nn.LayerNorm(width), nn.Linear(width, ACT)
        self.blocks = nn.ModuleList()
        for _ in config.hidden_sizes:
            block = nn.Module()
            block.norm1, block.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            block.attention = nn.MultiheadAttention(width, config.num_heads, batch_first=True)
            block.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            self.blocks.append(block)
        self.double()
        own = {
            name.removeprefix("policy."): tensor[index]
            for name, tensor in agent.state_dict().items()
            if name.startswith("policy.")
        }
        with torch.no_grad():
            for name, parameter in self.named_places():
                value = own[name]
                parameter.copy_(value.T if parameter.ndim == 2 and name != "time" else value.view_as(parameter))
        self.adam = torch.optim.AdamW(
            self.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, foreach=False
        )
        self.warmup = torch.optim.lr_scheduler.LambdaLR(
            self.adam, lambda step: min((step + 1) / config.warmup_steps, 1.0)
        )
        self.longest = config.max_gradient_norm

    def named_places(self) -> list[tuple[str, Tensor]]:
        """The agent's name of every parameter."""
        found: list[tuple[str, Tensor]] = [("time", self.time.weight)]
        parts: list[tuple[str, nn.Module]] = [
            (name, getattr(self, name)) for name in ("return_", "observation", "action", "norm", "last_norm", "head")
        ]
        for i, block in enumerate(self.blocks):
            attention: Any = block.attention
            found += [
                (f"blocks.{i}.attention.weight", attention.in_proj_weight),
                (f"blocks.{i}.attention.bias", attention.in_proj_bias),
            ]
            mlp: Any = block.mlp
            named = {
                "norm1": block.norm1,
                "norm2": block.norm2,
                "joined": attention.out_proj,
                "grown": mlp[0],
                "shrunk": mlp[2],
            }
            parts += [(f"blocks.{i}.{name}", module) for name, module in named.items()]  # type: ignore[misc]
        found += [(f"{name}.{kind}", getattr(module, kind)) for name, module in parts for kind in ("weight", "bias")]
        return found

    def forward(self, batch: SequenceBatch, index: int, scale: float) -> Tensor:
        actions = batch.actions[index]
        entered = F.one_hot(actions, ACT).double() if self.discrete else actions
        when = self.time(batch.timesteps[index])
        kinds = [
            self.return_(batch.returns_to_go[index].unsqueeze(-1) / scale) + when,
            self.observation(batch.observations[index]) + when,
            self.action(entered) + when,
        ]
        tokens = torch.stack(kinds, 2).flatten(1, 2)
        hidden = ~batch.known[index].repeat_interleave(3, 1)
        future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        out = self.norm(tokens)
        for block in self.blocks:
            inside: Any = block
            seen = inside.norm1(out)
            out = (
                out
                + inside.attention(seen, seen, seen, attn_mask=future, key_padding_mask=hidden, need_weights=False)[0]
            )
            out = out + inside.mlp(inside.norm2(out))
        return self.head(self.last_norm(out)[:, 1::3])

    def update(self, batch: SequenceBatch, index: int, scale: float) -> float:
        out, actions, known = self(batch, index, scale), batch.actions[index], batch.known[index]
        if self.discrete:
            losses = -torch.log_softmax(out, -1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        else:
            losses = ((out.tanh() - actions) ** 2).mean(-1)
        loss = (losses * known).mean()
        self.adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters(), self.longest)
        self.adam.step()
        self.warmup.step()
        return loss.item()


@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])
@pytest.mark.parametrize("options", [{}, STRESS], ids=["CORL", "stress"])
def test_the_reference_learns_the_same(options: dict[str, Any], discrete: bool) -> None:
    normalizer = Normalizer(seeds=2, dtype=torch.float64, return_mean=torch.tensor(0.5), return_std=torch.tensor(2.5))
    config = DTConfig(**SMALL, dropout=0.0, **options)
    agent = DT(config, OBS, ACT, seeds=SEEDS, dtype=torch.float64, discrete=discrete, normalizer=normalizer)
    twins = [Twin(agent, i) for i in range(len(SEEDS))]
    for t in range(1, 51):
        batch = random_sequences(len(SEEDS), 8, OBS, ACT, discrete=discrete, dtype=torch.float64, generator=t)
        metrics = agent.update(batch)
        for i, twin in enumerate(twins):
            assert metrics["policy/loss"][i].item() == pytest.approx(twin.update(batch, i, 2.5), rel=1e-9, abs=1e-11), t
        if t in (1, 10, 50):
            state = agent.state_dict()
            for i, twin in enumerate(twins):
                for name, expected in twin.named_places():
                    found = state[f"policy.{name}"][i]
                    found = found.T if expected.ndim == 2 and name != "time" else found.view_as(expected)
                    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-10, msg=f"{name} at {t}")


def test_dropout_is_the_seeds_own_and_leaves_the_mean_alone() -> None:
    agent = DT(DTConfig(**SMALL, dropout=0.25), OBS, ACT, seeds=SEEDS, dtype=torch.float64)
    ones = torch.ones(2, 200, 50, dtype=torch.float64)
    dropped = agent._drop(ones, "here")
    assert (dropped == 0).double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.03)
    assert not torch.equal(dropped[0], dropped[1])
    assert not torch.equal(agent._drop(ones, "there"), dropped)
    alone = DT(DTConfig(**SMALL, dropout=0.25), OBS, ACT, seeds=SEEDS[1:], dtype=torch.float64)
    assert torch.equal(alone._drop(ones[1:], "here"), dropped[1:])
    agent.step += 1
    assert not torch.equal(agent._drop(ones, "here"), dropped)


# --- windows -----------------------------------------------------------------------------------------------------------------------


def recorded(lengths: tuple[int, ...] = (3, 1, 6), spec: DatasetSpec | None = None) -> TransitionDataset:
    rng = np.random.default_rng(0)
    total = sum(lengths)
    ends = np.zeros(total, bool)
    ends[np.cumsum(lengths) - 1] = True
    spec = spec or DatasetSpec(
        observation_space=spaces.Box(-9, 9, (2,)), action_space=spaces.Box(-1, 1, (1,)), id="seq"
    )
    return dataset_from_arrays(
        rng.normal(size=(total, 2)).astype(np.float32),
        rng.uniform(-1, 1, (total, 1)).astype(np.float32),
        rng.normal(size=total).astype(np.float32),
        rng.normal(size=(total, 2)).astype(np.float32),
        np.zeros(total, bool),
        ends,
        spec,
    )


def test_windows_are_those_of_a_loop_and_never_leave_their_episode() -> None:
    dataset, length = recorded(), 4
    windows = SequenceDataset(dataset, length)
    rows = torch.arange(len(dataset)).view(1, -1)
    batch = windows.gather(rows)
    bounds = dataset.episode_starts.tolist()
    rewards = dataset.rewards.tolist()
    for start, end in itertools.pairwise(bounds):
        for row in range(start, end):
            for k in range(length):
                known = row + k < end
                at = min(row + k, end - 1)
                assert bool(batch.known[0, row, k]) == known
                assert batch.timesteps[0, row, k] == at - start
                assert batch.returns_to_go[0, row, k].item() == pytest.approx(sum(rewards[at:end]), abs=1e-5)
                assert torch.equal(batch.observations[0, row, k], dataset.observations[at])
                assert torch.equal(batch.actions[0, row, k], dataset.actions[at])
    best = max(sum(rewards[a:b]) for a, b in itertools.pairwise(bounds))
    assert batch.best_return.item() == pytest.approx(best, abs=1e-5)
    assert len(windows) == len(dataset)


def test_what_lies_behind_the_end_of_an_episode_does_not_count() -> None:
    batch = random_sequences(1, 8, OBS, ACT, dtype=torch.float64)
    other = SequenceBatch(
        **{**vars(batch), "observations": torch.where(batch.known.unsqueeze(-1), batch.observations, 9.0)}
    )
    first, second = (DT(DTConfig(**SMALL), OBS, ACT, dtype=torch.float64) for _ in range(2))
    assert not batch.known.all()
    assert torch.equal(first.update(batch)["policy/loss"], second.update(other)["policy/loss"])


def test_the_future_is_not_seen() -> None:
    agent = DT(DTConfig(**SMALL, dropout=0.0), OBS, ACT, dtype=torch.float64)
    batch = random_sequences(1, 8, OBS, ACT, dtype=torch.float64)
    known = SequenceBatch(**{**vars(batch), "known": torch.ones_like(batch.known)})
    before, _ = agent.outputs(known)
    for name in ("observations", "actions", "returns_to_go"):
        changed = getattr(known, name).clone()
        changed[:, :, 2] += 0.1
        after, _ = agent.outputs(SequenceBatch(**{**vars(known), name: changed}))
        first = 3 if name == "actions" else 2  # an action is what is to be put out
        assert torch.equal(after[:, :, :first], before[:, :, :first])
        assert not torch.allclose(after[:, :, first:], before[:, :, first:])


# --- acting ------------------------------------------------------------------------------------------------------------------------


class Bank(gym.Env[Any, Any]):
    """Six steps; an action pays what it is, and what is seen is of no use."""

    observation_space = spaces.Box(-9.0, 9.0, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 6
        return self._seen(), {}

    def _seen(self) -> Any:
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        return self._seen(), float(action[0]), self.left == 0, False, {}


def untrained(**options: Any) -> DT:
    spec = recorded().spec
    return make_agent(DTConfig(**{**SMALL, "target_return": 3.0, **options}), spec, seeds=[5])  # type: ignore[return-value]


def test_step_by_step_the_policy_gives_what_its_network_gives_for_the_whole_history() -> None:
    """Also when the history is longer than the window."""
    agent = untrained()
    agent.actor.network.head.weight.data.mul_(50.0)
    draw = torch.Generator().manual_seed(0)
    seen = torch.randn(1, 3, 9, 2, generator=draw)
    rewards = torch.randn(1, 3, 9, generator=draw)
    memory = agent.policy.begin(3)
    acted = []
    for t in range(9):
        found, memory = agent.policy.follow(
            memory, seen[:, :, t], rewards[:, :, t - 1] if t else torch.full((1, 3), 77.0)
        )
        acted.append(found)
    wanted = 3.0 - torch.cat([torch.zeros(1, 3, 1), rewards.cumsum(-1)[..., :-1]], -1)
    for t in range(9):
        window = slice(max(0, t - 3), t + 1)
        done = torch.stack([*acted[window.start : t], torch.zeros(1, 3, 1)], 2)
        steps = torch.arange(window.start, t + 1).expand(1, 3, -1)
        out = agent.actor.network(
            wanted[..., window], seen[:, :, window], done, steps, torch.ones_like(steps, dtype=torch.bool)
        )
        torch.testing.assert_close(acted[t], out[:, :, -1].tanh(), rtol=1e-5, atol=1e-5)


def test_a_saved_policy_predicts_as_the_evaluation_plays(tmp_path: Path) -> None:
    agent = untrained()
    agent.actor.network.head.weight.data.mul_(50.0)
    agent.policy.save(tmp_path)
    policy = load_policy(tmp_path)
    spec = recorded().spec
    played = evaluate_policy(agent.policy, spec, env=Bank, episodes=3)
    env = Bank()
    returns = []
    for seed in played.episode_seeds:
        seen, _ = env.reset(seed=seed)
        state, start, reward, total, over = None, True, None, 0.0, False
        while not over:
            action, state = policy.predict(seen, state, start, reward=reward)
            seen, reward, over, _, _ = env.step(action)
            total, start = total + reward, False
        returns.append(total)
    np.testing.assert_allclose(returns, played.returns[0], atol=1e-4)


def test_an_observation_alone_is_refused_and_so_is_a_step_without_its_past() -> None:
    policy = untrained().policy
    seen = np.zeros(2, np.float32)
    with pytest.raises(ConfigError, match="acts on the history of its episode"):
        policy(torch.zeros(1, 2))
    with pytest.raises(ConfigError, match="episode_start=True"):
        policy.predict(seen)
    _, state = policy.predict(seen, episode_start=True)
    with pytest.raises(ConfigError, match="reward=reward"):
        policy.predict(seen, state)
    both, state = policy.predict(np.zeros((2, 2), np.float32), None, np.array([True, True]))
    again, after = policy.predict(np.zeros((2, 2), np.float32), state, np.array([True, False]), reward=np.zeros(2))
    assert both.shape == again.shape == (2, 1)
    assert after.count.tolist() == [[1, 2]]


@pytest.mark.parametrize("wanted", [-3.0, 3.0])
def test_the_return_that_is_asked_for_is_earned(wanted: float) -> None:
    """Episodes that pay in one size each: asked for a return, the policy pays that much per step, and makes up for what is missing."""
    episodes, length = 80, 6
    rng = np.random.default_rng(1)
    pay = np.repeat(rng.uniform(-1, 1, episodes), length).astype(np.float32)
    total = episodes * length
    seen = rng.uniform(-1, 1, (total, 2)).astype(np.float32)
    ends = np.zeros(total, bool)
    ends[length - 1 :: length] = True
    spec = DatasetSpec(observation_space=Bank.observation_space, action_space=Bank.action_space, id="bank")
    dataset = dataset_from_arrays(seen, pay[:, None], pay, seen, ends, np.zeros(total, bool), spec)
    config = DTConfig(
        hidden_sizes=(16, 16), context_length=4, target_return=wanted, learning_rate=1e-2, warmup_steps=20, dropout=0.0, max_timestep=6
    )  # fmt: skip
    agent = make_agent(config, spec)
    windows = DT.prepare_dataset(config, dataset)
    draw = [torch.Generator().manual_seed(0)]
    for _ in range(150):
        agent.update(windows.gather(windows.sample_indices(64, draw)))
    returns = evaluate_policy(agent.policy, spec, env=Bank, episodes=3).returns
    assert np.abs(returns - wanted).max() < 1.0
    other = evaluate_policy(agent.policy.asked_for(-wanted), spec, env=Bank, episodes=3).returns
    assert np.abs(other + wanted).max() < 1.0
    with pytest.raises(ConfigError, match="only that of dt is asked for one"):
        make_agent("bc", spec).policy.asked_for(1.0)


def test_trained_from_the_name_it_asks_for_the_best_of_the_data(tmp_path: Path) -> None:
    dataset = recorded()
    options: dict[str, Any] = {
        "batch_size": 4,
        "eval_every": 0,
        "progress": False,
        "overrides": {**SMALL, "dropout": 0.1},
    }
    run = rlkit2.train("dt", dataset, steps=6, out=tmp_path, seeds=2, **options)
    part = rlkit2.train("dt", dataset, steps=6, out=tmp_path, seeds=2, until=3, **options)
    rlkit2.train(resume=part, dataset=dataset, progress=False)
    best = max(dataset.rewards[a:b].sum().item() for a, b in itertools.pairwise(dataset.episode_starts.tolist()))
    policy: Policy = run.policy
    assert policy.actor.target_return.flatten().tolist() == pytest.approx([best, best], rel=1e-5)
    for name, tensor in run.agent.state_dict().items():
        assert torch.equal(tensor, part.agent.state_dict()[name]), name
    with pytest.raises(ConfigError, match="leave reward_transform and reward_scale at their defaults"):
        rlkit2.train("dt", dataset, steps=1, out=tmp_path, reward_scale=0.1, **options)
    with pytest.raises(ConfigError, match="remembers the steps before by itself"):
        rlkit2.train("dt", dataset, steps=1, out=tmp_path, frame_stack=2, **options)
    with pytest.raises(ConfigError, match="acts on the history of its episode"):
        rlkit2.offline_evaluate(run, dataset)
    with pytest.raises(ConfigError, match="acts on the history of its episode"):
        PolicyGraph(run.policy.select_seed(0))
    with pytest.raises(ConfigError, match="one width for each block, all the same"):
        rlkit2.train("dt", dataset, steps=1, out=tmp_path, **{**options, "overrides": {"hidden_sizes": (8, 4)}})
