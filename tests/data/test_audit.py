"""What an audit must find, and what it must not."""

from __future__ import annotations

import json
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from hypothesis import given
from hypothesis import strategies as st

from rlkit2.data import DatasetSpec, audit, dataset_from_arrays, read_dataset
from rlkit2.data.audit import scan
from rlkit2.data.audit.findings import Distribution
from rlkit2.errors import ConfigError, DatasetError
from tests.data.make import FAMILIES, Ending, make_minari


def arrays(lengths=(4, 3, 5), seed=0):
    """Clean arrays of episodes of the given lengths, all ending terminated."""
    random = np.random.default_rng(seed)
    chains = [random.normal(size=(length + 1, 2)).astype(np.float32) for length in lengths]
    total = sum(lengths)
    ends = np.zeros(total, bool)
    ends[np.cumsum(lengths) - 1] = True
    return {
        "observations": np.concatenate([chain[:-1] for chain in chains]),
        "actions": random.uniform(-1, 1, (total, 2)).astype(np.float32),
        "rewards": random.normal(size=total).astype(np.float32),
        "next_observations": np.concatenate([chain[1:] for chain in chains]),
        "terminations": ends,
        "truncations": np.zeros(total, bool),
    }


def codes(report, severity=None):
    return [f.code for f in report.findings if severity in (None, f.severity)]


def finding(report, code):
    (found,) = (f for f in report.findings if f.code == code)
    return found


ALWAYS = ["no_reference_scores", "no_environment"]  # arrays name neither


BOXES = DatasetSpec(observation_space=spaces.Box(-np.inf, np.inf, (2,)), action_space=spaces.Box(-1, 1, (2,)))


def test_a_clean_dataset_has_nothing_but_what_it_lacks():
    dataset = dataset_from_arrays(**arrays(), spec=BOXES)
    report = audit(dataset)
    assert report.ok
    assert codes(report) == ALWAYS
    assert (report.transitions, report.episodes) == (12, 3)
    assert report.endings == {"terminated": 3, "truncated": 0, "both": 0, "cut_off_without_flag": 0}
    assert report.lengths.minimum == 3
    assert report.lengths.maximum == 5
    assert report.returns.mean == pytest.approx(float(dataset.episode_returns.mean()))
    assert sum(report.rewards.counts) == 12
    assert len(report.actions) == 2
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["ok"] is True


@pytest.mark.parametrize("field", ["observations", "next_observations", "actions", "rewards"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_errors_with_their_place(field, value):
    data = arrays()
    data[field][5] = value
    report = audit(dataset_from_arrays(**data))
    found = finding(report, f"non_finite_{field}")
    assert not report.ok
    assert found.severity == "error"
    assert found.where[0]["episode"] == 1
    assert found.where[0]["step"] == 1
    assert "episode 1, step 1" in found.message
    json.dumps(report.to_dict(), allow_nan=False)


def test_action_bounds_tell_rounding_from_violation():
    data = arrays()
    data["actions"][6, 1] = 1 + 1e-5
    report = audit(dataset_from_arrays(**data, spec=BOXES))
    assert report.ok
    assert finding(report, "actions_out_of_bounds").severity == "warning"
    data["actions"][7, 0] = -1.5
    report = audit(dataset_from_arrays(**data, spec=BOXES))
    found = finding(report, "actions_out_of_bounds")
    assert not report.ok
    assert found.message.startswith("2 action values")
    assert "25 %" in found.message  # 0.5 over a range of 2
    assert found.where == ({"episode": 1, "step": 2, "column": 1}, {"episode": 2, "step": 0, "column": 0})


@pytest.mark.parametrize(
    ("space", "good", "bad"),
    [
        (spaces.Discrete(3, start=-1), [-1, 0, 1], 2),
        (spaces.MultiDiscrete([2, 4]), [[0, 0], [1, 3], [0, 2]], [1, 4]),
        (spaces.MultiBinary(2), [[0, 1], [1, 1], [0, 0]], [0, 2]),
        (spaces.Box(0, 4, (1,), np.int64), [[0], [4], [2]], [5]),
    ],
)
def test_discrete_actions_outside_their_space_are_errors(space, good, bad):
    data = arrays((3,))
    data["actions"] = np.array(good)
    spec = DatasetSpec(observation_space=spaces.Box(-np.inf, np.inf, (2,)), action_space=space)
    assert audit(dataset_from_arrays(**data, spec=spec)).ok
    data["actions"][1] = bad
    assert codes(audit(dataset_from_arrays(**data, spec=spec)), "error") == ["actions_out_of_bounds"]


def test_both_flags_and_endings():
    data = arrays()
    data["truncations"][3] = True
    data["terminations"][6] = False
    data["truncations"][6] = True
    data["terminations"][-1] = False
    report = audit(dataset_from_arrays(**data))
    assert report.endings == {"terminated": 1, "truncated": 3, "both": 1, "cut_off_without_flag": 1}
    assert finding(report, "terminated_and_truncated").where == ({"episode": 0, "step": 3},)
    assert finding(report, "episodes_without_end_flag").severity == "warning"
    assert report.ok


def test_a_flag_in_mid_episode_is_an_error():
    dataset = dataset_from_arrays(**arrays())
    joined = replace(dataset, episode_starts=torch.tensor([0, 4, 12]))  # the end of the second episode is now inside
    found = finding(audit(joined), "flag_in_mid_episode")
    assert found.severity == "error"
    assert found.where == ({"episode": 1, "step": 2},)


def test_duplicate_episodes_are_told_with_their_originals():
    dataset = dataset_from_arrays(**arrays())
    report = audit(dataset.select([2, 0, 2, 1, 0]))
    assert finding(report, "duplicate_episodes").where == (
        {"episode": 2, "same_as": 0},
        {"episode": 4, "same_as": 1},
    )
    assert "duplicate_episodes" not in codes(audit(dataset))


def test_constant_columns_and_rewards():
    data = arrays()
    for name in ("observations", "next_observations"):
        data[name][:, 1] = 3
    data["rewards"][:] = 1
    report = audit(dataset_from_arrays(**data))
    assert finding(report, "constant_observations").where == ({"column": 1},)
    assert finding(report, "constant_rewards").severity == "info"
    goal = make_minari([Ending(3, True, False)], *FAMILIES["goal"])  # one episode: its number never changes
    assert "observation[0], desired_goal[0]" in finding(audit(read_dataset(goal)), "constant_observations").message


def test_shuffled_transitions_break_the_chain():
    data = arrays((6,))
    data["next_observations"][2] += 1
    report = audit(dataset_from_arrays(**data))
    assert finding(report, "broken_chain").where == ({"episode": 0, "step": 3},)
    assert report.ok


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    rows=st.integers(1, 7),
    spoiled=st.integers(0, 35),
    seed=st.integers(0, 9),
)
def test_the_size_of_the_chunks_changes_nothing(lengths, rows, spoiled, seed):
    data = arrays(lengths, seed)
    data["rewards"][spoiled % sum(lengths)] = np.nan
    data["next_observations"][spoiled % sum(lengths)] = 7
    dataset = dataset_from_arrays(**data)
    dataset = dataset.select([*range(len(lengths)), 0])
    whole, steps = audit(dataset), []
    size = scan.CHUNK_BYTES
    try:
        scan.CHUNK_BYTES = rows * dataset.records.dtype.itemsize
        pieces = audit(dataset, progress=lambda done, total: steps.append((done, total)))
    finally:
        scan.CHUNK_BYTES = size
    assert pieces.to_dict() == whole.to_dict()
    assert [done for done, _ in steps] == [*range(rows, len(dataset), rows), len(dataset)]


def test_new_rewards_are_the_ones_audited():
    dataset = dataset_from_arrays(**arrays()).with_rewards(np.full(12, 2.0))
    report = audit(dataset)
    assert report.rewards.maximum == 2
    assert report.returns.minimum == 6


def test_images_are_audited_as_bytes():
    dataset = make_minari(
        [Ending(3, True, False), Ending(2, False, True)],
        spaces.Box(0, 255, (4, 5, 3), np.uint8),
        spaces.Discrete(128),
        jpeg_encoding=False,
    )
    report = audit(read_dataset(dataset))
    assert report.ok
    assert "broken_chain" not in codes(report)
    assert report.endings["truncated"] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_spaces(family):
    report = audit(read_dataset(make_minari([Ending(3, True, False), Ending(1, False, True)], *FAMILIES[family])))
    assert report.ok
    assert report.transitions == 4


def with_env(env_spec, observation_space=None, action_space=None, eval_env_spec=None):
    data = arrays()
    if action_space is not None and isinstance(action_space, spaces.Discrete):
        data["actions"] = np.zeros(12, np.int64)
    spec = DatasetSpec(
        observation_space=observation_space or spaces.Box(-np.inf, np.inf, (2,)),
        action_space=action_space or spaces.Box(-1, 1, (2,)),
        env_spec=env_spec,
        eval_env_spec=eval_env_spec,
        ref_min_score=0.0,
        ref_max_score=1.0,
    )
    return audit(dataset_from_arrays(**data, spec=spec))


class Plain(gymnasium.Env):
    """Spaces and nothing else."""

    def __init__(self, high=1.0):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,))
        self.action_space = spaces.Box(-high, high, (2,))


PLAIN = EnvSpec("Plain-v0", entry_point=Plain)


def test_the_environment_is_rebuilt_and_compared():
    report = with_env(PLAIN)
    assert codes(report) == []
    assert report.environment == {"id": "Plain-v0", "evaluation_id": None, "can_be_built": True, "spaces_match": True}
    report = with_env(replace(PLAIN, kwargs={"high": 2.0}))
    assert codes(report) == ["environment_action_bounds"]
    report = with_env(gymnasium.spec("CartPole-v1"))
    assert codes(report, "error") == ["environment_spaces"] * 2
    assert report.environment["spaces_match"] is False
    report = with_env(PLAIN, eval_env_spec=gymnasium.spec("Pendulum-v1"))
    assert codes(report) == ["environment_spaces", "environment_spaces", "evaluation_environment_differs"]


def test_an_environment_that_cannot_be_built_is_a_warning():
    report = with_env(EnvSpec("Gone-v0", entry_point="no_such_module:Env"))
    assert report.ok
    assert finding(report, "environment_unavailable").severity == "warning"
    assert report.environment["can_be_built"] is False
    assert report.environment["spaces_match"] is None


def test_a_missing_simulator_names_its_extra(monkeypatch):
    def missing(*args, **kwargs):
        raise gymnasium.error.DependencyNotInstalled("MuJoCo is not installed")

    monkeypatch.setattr(gymnasium, "make", missing)
    message = finding(
        with_env(EnvSpec("Hopper-v5", entry_point="gymnasium.envs.mujoco.hopper_v5:HopperEnv")),
        "environment_unavailable",
    ).message
    assert "rlkit2[mujoco]" in message
    message = finding(
        with_env(EnvSpec("PointMaze_UMaze-v3", entry_point="gymnasium_robotics.envs.maze.point_maze:PointMazeEnv")),
        "environment_unavailable",
    ).message
    assert "rlkit2[robotics]" in message


def test_reference_scores_in_the_wrong_order():
    spec = DatasetSpec(
        observation_space=spaces.Box(-np.inf, np.inf, (2,)),
        action_space=spaces.Box(-1, 1, (2,)),
        ref_min_score=1.0,
        ref_max_score=1.0,
    )
    assert codes(audit(dataset_from_arrays(**arrays(), spec=spec)), "error") == ["reference_scores"]


def test_a_distribution_counts_every_finite_value():
    values = np.array([0.0, 1.0, np.nan, 2.0, np.inf])
    found = Distribution.of(values)
    assert (found.minimum, found.mean, found.maximum) == (0, 1, 2)
    assert sum(found.counts) == 3
    assert Distribution.of(np.array([np.nan])) is None


def test_the_figure_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    report = audit(dataset_from_arrays(**arrays()))
    assert report.figure(tmp_path / "plots.svg").read_text().lstrip().startswith("<?xml")
    with pytest.raises(ConfigError, match="suffix"):
        report.figure(tmp_path / "plots.txt")
    with pytest.raises(DatasetError, match="cannot write"):
        report.figure(tmp_path / "no" / "plots.png")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DatasetError, match="No space left"):
        report.figure(tmp_path / "full.png")
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plots.svg"]


def test_recorded_datasets_are_clean(real_datasets):
    for name in ("zoo/hopper/medium-v0", "zoo/cartpole/mixed-v0", "zoo/pointmaze-umaze/scripted-v0"):
        report = audit(read_dataset(name))
        assert report.ok
        assert sum(report.lengths.counts) == report.episodes
