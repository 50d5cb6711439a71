"""What a saved policy keeps, and the maps between raw units and those of the networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rlkit2.agents import make_agent
from rlkit2.checksums import UncheckedWarning, sealed
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import ConfigError, RunError
from rlkit2.nn import Normalizer, Policy, load_policy, make_actor
from rlkit2.nn.actors import HEADS

OBS, ACT = 3, 2


def policy(head: str = "gaussian", seeds: tuple[int, ...] = (4, 9), dtype: torch.dtype = torch.float32) -> Policy:
    """With observation statistics and asymmetric action bounds."""
    actor = make_actor(head, OBS, ACT, (8, 8), seeds=seeds, layer_norm=True, tanh_mean=True, dtype=dtype)
    discrete = head == "categorical"
    normalizer = Normalizer(
        observation_mean=torch.tensor([1.0, -2.0, 0.0]),
        observation_std=torch.tensor([0.5, 2.0, 1.0]),
        action_low=None if discrete else torch.tensor([-2.0, 0.0]),
        action_high=None if discrete else torch.tensor([2.0, 10.0]),
        action_start=3 if discrete else 0,
        seeds=len(seeds),
        dtype=dtype,
    )
    return Policy(actor, normalizer, seeds, {"spec": {"id": "tests"}})


def observations(*lead: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*lead, OBS, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("head", HEADS)
def test_a_saved_policy_acts_the_same(head: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made = policy(head, dtype=dtype)
    made.save(tmp_path / "policy")
    loaded = load_policy(tmp_path / "policy")
    seen = observations(2, 50, dtype=dtype)
    assert torch.equal(loaded(seen), made(seen))
    one, two = (p(seen, deterministic=False, generator=torch.Generator().manual_seed(3)) for p in (made, loaded))
    assert torch.equal(one, two)
    assert loaded.seeds == made.seeds
    assert loaded.metadata == made.metadata
    single = load_policy(tmp_path / "policy", seed_index=1)
    torch.testing.assert_close(single(seen[1]), made(seen)[1])
    assert single.seeds == (9,)


def test_saving_again_replaces_and_leaves_no_litter(tmp_path: Path) -> None:
    policy().save(tmp_path)
    second = policy(seeds=(1, 2))
    second.save(tmp_path, metadata={"note": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["policy.json", "policy.safetensors"]
    assert load_policy(tmp_path).metadata == {"note": 1}
    assert torch.equal(load_policy(tmp_path)(observations(2, 4)), second(observations(2, 4)))


def damage(folder: Path, kind: str) -> None:
    weights, text = folder / "policy.safetensors", folder / "policy.json"
    if kind == "missing":
        weights.unlink()
    elif kind == "cut":
        weights.write_bytes(weights.read_bytes()[:50])
    elif kind == "no json":
        text.write_text("{")
    elif kind == "other save":
        description = json.loads(text.read_text())
        text.write_text(json.dumps({**description, "pair": "0"}))
    elif kind == "newer":
        description = json.loads(text.read_text())
        text.write_text(json.dumps({**description, "format": 99}))
    else:
        description = json.loads(text.read_text())
        description["actor"]["hidden_sizes"] = [8, 9]
        if "sealed" in kind:
            files = description.pop("sha256")
            description = sealed(description, {"policy.safetensors": files["policy.safetensors"]})
        text.write_text(json.dumps(description))


@settings(max_examples=60)
@given(name=st.sampled_from(["policy.json", "policy.safetensors"]), place=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_no_flipped_bit_is_loaded(name: str, place: int, bit: int, tmp_path: Path) -> None:
    made = policy()
    made.save(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[place % len(data)] ^= 1 << bit
    (tmp_path / name).write_bytes(data)
    try:
        found = load_policy(tmp_path)
    except RunError:
        return
    assert name == "policy.json"  # white space
    assert json.loads((tmp_path / name).read_text())["sha256"]
    assert all(torch.equal(a, b) for a, b in zip(found.state_dict().values(), made.state_dict().values(), strict=True))


def test_a_policy_without_checksums_is_read_and_said(tmp_path: Path) -> None:
    made = policy()
    made.save(tmp_path)
    description = json.loads((tmp_path / "policy.json").read_text())
    del description["sha256"]
    (tmp_path / "policy.json").write_text(json.dumps({**description, "format": 1}))
    with pytest.warns(UncheckedWarning, match="older rlkit2, without checksums"):
        load_policy(tmp_path)
    (tmp_path / "policy.json").write_text(json.dumps(description))
    with pytest.raises(RunError, match="damaged"):  # a file of today has them
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "policy.safetensors is missing"),
        ("cut", "damaged"),
        ("no json", "damaged"),
        ("other save", "different saves"),
        ("newer", "upgrade rlkit2"),
        ("other shape", "does not have the checksum"),
        ("other shape, sealed", "larger networks|another shape"),
    ],
)
def test_damage_is_named(kind: str, message: str, tmp_path: Path) -> None:
    policy().save(tmp_path)
    damage(tmp_path, kind)
    with pytest.raises(RunError, match=message):
        load_policy(tmp_path)


def test_wrong_requests_are_named(tmp_path: Path) -> None:
    made = policy()
    made.save(tmp_path)
    with pytest.raises(ConfigError, match="seed index 2 is out of range"):
        load_policy(tmp_path, seed_index=2)
    for shape in ((5, OBS), (3, 5, OBS), (2, 5, OBS + 1)):
        with pytest.raises(ConfigError, match=r"takes observations \[2, B, 3\]"):
            made(torch.zeros(shape))
    made.actor.network = nn.Linear(OBS, ACT)
    with pytest.raises(ConfigError, match="cannot be saved"):
        made.save(tmp_path)


def test_one_seed_needs_no_seed_axis() -> None:
    made = policy(seeds=(4,))
    seen = observations(1, 7)
    assert made(seen[0]).shape == (7, ACT)
    assert torch.equal(made(seen)[0], made(seen[0]))


# Units


numbers = st.floats(-50.0, 50.0)


@given(
    low=st.lists(numbers, min_size=ACT, max_size=ACT),
    width=st.lists(st.floats(0.1, 100.0), min_size=ACT, max_size=ACT),
    share=st.lists(st.floats(0.0, 1.0), min_size=ACT, max_size=ACT),
)
def test_actions_travel_there_and_back(low: list[float], width: list[float], share: list[float]) -> None:
    """Inside the bounds the two maps are inverse and the networks see [-1, 1]; from outside, the way back ends on the bounds."""
    bottom, size = torch.tensor(low, dtype=torch.float64), torch.tensor(width, dtype=torch.float64)
    maps = Normalizer(action_low=bottom, action_high=bottom + size, dtype=torch.float64)
    actions = (bottom + size * torch.tensor(share, dtype=torch.float64)).view(1, 1, ACT)
    inner = maps.actions(actions)
    assert (inner.abs() <= 1.0 + 1e-9).all()
    torch.testing.assert_close(maps.environment_actions(inner), actions, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(maps.environment_actions(torch.full_like(inner, 7.0))[0, 0], bottom + size)
    torch.testing.assert_close(maps.environment_actions(torch.full_like(inner, -7.0))[0, 0], bottom)


@pytest.mark.parametrize("bounds", [(0.5, 0.5), (2.0, 1.0), (float("nan"), 1.0), (float("inf"), float("inf"))])
def test_bounds_that_leave_nothing_to_choose_are_refused(bounds: tuple[float, float]) -> None:
    """Their map to [-1, 1] would divide by zero, and every number after it would be NaN."""
    low, high = torch.tensor([-1.0, bounds[0]]), torch.tensor([1.0, bounds[1]])
    with pytest.raises(ConfigError, match=r"action 1 has bounds .* nothing to choose between"):
        Normalizer(action_low=low, action_high=high)


def test_an_agent_is_not_made_for_an_action_without_a_choice() -> None:
    space = spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 0.0], np.float32))
    spec = DatasetSpec(observation_space=spaces.Box(-1.0, 1.0, (3,)), action_space=space)
    with pytest.raises(ConfigError, match="action 1 has bounds 0 and 0"):
        make_agent("td3bc", spec)


def test_unbounded_actions_pass_unchanged() -> None:
    maps = Normalizer(action_low=torch.tensor([-2.0, -torch.inf]), action_high=torch.tensor([2.0, torch.inf]))
    actions = torch.tensor([[[1.0, 300.0]]])
    assert maps.actions(actions).tolist() == [[[0.5, 300.0]]]
    assert maps.environment_actions(torch.tensor([[[3.0, 300.0]]])).tolist() == [[[2.0, 300.0]]]


def test_discrete_actions_are_counted_from_the_start_of_their_space() -> None:
    maps = Normalizer(action_start=5)
    assert maps.actions(torch.tensor([[5, 7]])).tolist() == [[0, 2]]
    assert maps.environment_actions(torch.tensor([[0, 2]])).tolist() == [[5, 7]]


def test_observations_are_standardised_per_seed() -> None:
    mean = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    maps = Normalizer(observation_mean=mean, observation_std=torch.full((2, 1, 2), 2.0), seeds=2)
    assert maps.observations(torch.ones(2, 1, 2)).tolist() == [[[0.0, -0.5]], [[-1.0, -1.5]]]


def test_the_identity_costs_nothing() -> None:
    maps: Any = Normalizer(action_low=-torch.ones(2), action_high=torch.ones(2))
    seen = torch.randn(1, 4, 3)
    assert maps.observations(seen) is seen
    assert maps.actions(seen) is seen
