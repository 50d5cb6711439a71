"""The public functions at the top of the package."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import rlkit2
from rlkit2.agents.bc import BCConfig
from rlkit2.errors import ConfigError, EnvironmentUnavailableError, RunError
from rlkit2.training import Run
from tests import warm
from tests.training.tiny_problem import Walk, tiny_dataset

DATASET = tiny_dataset()
QUICK = {"steps": 6, "env": Walk, "eval_episodes": 2, "batch_size": 8, "progress": False}
SMALL = {"hidden_sizes": (8,)}


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, rlkit2; print(sorted({'torch', 'gymnasium', 'minari', 'matplotlib', 'scipy'} & set(sys.modules)), dir(rlkit2))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] [")
    for name in ("train", "evaluate", "load_dataset", "load_run", "load_policy", "agents", "rewards", "sweeps"):
        assert f"'{name}'" in done.stdout
    with pytest.raises(AttributeError, match="module 'rlkit2' has no attribute 'trainn'"):
        _ = rlkit2.trainn


def test_the_main_job_in_five_lines(tmp_path):
    run = rlkit2.train("bc", DATASET, seeds=[5, 2], out=tmp_path, eval_every=3, overrides=SMALL, **QUICK)
    assert isinstance(run, Run)
    assert {line["step"] for line in run.evaluations()} == {3, 6}
    assert run.agent.seeds == (5, 2)
    evaluation = rlkit2.evaluate(run, episodes=4, env=Walk)
    assert evaluation.returns.shape == evaluation.lengths.shape == (2, 4)
    assert evaluation.normalized_scores is None
    assert "no reference returns" in evaluation.normalization
    assert set(evaluation.summary()) >= {"mean", "iqm", "interval", "between_seed_error", "within_policy_error"}
    again = rlkit2.load_run(str(run.path))
    assert again.metrics() == run.metrics()
    policy = rlkit2.load_policy(run.path)
    assert policy(torch.zeros(2, 4, 3)).shape == (2, 4, 2)
    assert rlkit2.load_policy(run.path, seed_index=0)(torch.zeros(4, 3)).shape == (4, 2)


def test_every_way_to_name_run_or_policy_evaluates_alike(tmp_path):
    run = rlkit2.train(BCConfig(**SMALL), DATASET, seeds=2, out=tmp_path, **QUICK)
    results = [
        rlkit2.evaluate(what, episodes=3, env=Walk).returns
        for what in (run, run.path, str(run.path), run.policy, run.path / "policy", rlkit2.load_policy(run.path))
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    lines = run.evaluations()
    assert lines[0]["returns"] == rlkit2.evaluate(run, episodes=2, env=Walk).returns[0].tolist()


def test_evaluate_says_what_is_missing(tmp_path):
    run = rlkit2.train(BCConfig(**SMALL), DATASET, out=tmp_path, **QUICK)
    with pytest.raises(EnvironmentUnavailableError, match="tiny/walk-v0 names no environment; name one with --env"):
        rlkit2.evaluate(run)
    policy = run.policy
    policy.metadata = {}
    with pytest.raises(ConfigError, match="the policy carries no dataset specification"):
        rlkit2.evaluate(policy)
    with pytest.raises(RunError, match="does not exist"):
        rlkit2.evaluate(tmp_path / "nothing")


def test_the_environment_of_the_evaluations_is_the_evaluation_environment_of_the_dataset(tmp_path):
    gym.register("ShortWalk-v0", entry_point="tests.training.tiny_problem:Walk", max_episode_steps=3)
    gym.register("LongWalk-v0", entry_point="tests.training.tiny_problem:Walk")
    for changes, length in (
        ({"env_spec": gym.spec("LongWalk-v0"), "eval_env_spec": gym.spec("ShortWalk-v0")}, 3),
        ({"env_spec": gym.spec("LongWalk-v0")}, 5),
    ):
        dataset = dataclasses.replace(DATASET, spec=dataclasses.replace(DATASET.spec, **changes))
        run = rlkit2.train(BCConfig(**SMALL), dataset, out=tmp_path, **{**QUICK, "env": None})
        assert run.evaluations()[0]["lengths"] == [length, length]
        assert rlkit2.evaluate(run, episodes=1).lengths.item() == length


def test_seeds_one_is_the_ordinary_case(tmp_path):
    run = rlkit2.train(BCConfig(**SMALL), DATASET, out=tmp_path, **QUICK)
    assert run.policy(torch.zeros(4, 3)).shape == (4, 2)
    assert rlkit2.evaluate(run, episodes=2, env=Walk).returns.shape == (1, 2)


def test_normalisation_and_reward_options_reach_the_agent(tmp_path):
    run = rlkit2.train(
        "odice",
        DATASET,
        out=tmp_path,
        normalize_observations=True,
        reward_scale=3.0,
        overrides={"value_hidden_sizes": (8,), "policy_hidden_sizes": (8,)},
        **QUICK,
    )
    normalizer = run.policy.normalizer
    torch.testing.assert_close(
        normalizer.observation_mean.squeeze().double(), DATASET.observations.double().mean(0), rtol=1e-4, atol=1e-5
    )
    expected = {
        "normalize_observations": True,
        "frame_stack": 1,
        "num_steps": 1,
        "reward_transform": "none",
        "reward_scale": 3.0,
        "held_out": 0.0,
    }
    assert run.config["data"] == expected


def test_a_config_object_of_ones_own_trains_and_is_found_again(tmp_path):
    from tests.training.tiny_problem import FaultyConfig

    run = rlkit2.train(FaultyConfig(**SMALL), DATASET, out=tmp_path, **QUICK)
    assert run.config["agent"] == "tests.training.tiny_problem:Faulty"
    assert run.path.name == "faulty-tiny-walk-v0-001"
    assert type(rlkit2.load_run(run.path).agent).__name__ == "Faulty"
    code = f"import rlkit2; rlkit2.load_run({str(run.path)!r}).agent"
    done = warm.run([sys.executable, "-c", code])
    assert "Faulty of tests.training.tiny_problem is not loaded, and what a file names is not imported" in done.stderr


@pytest.mark.parametrize("dataset", ["zoo/pendulum/mixed-v0", "zoo/cartpole/mixed-v0", "zoo/hopper/medium-v0"])
def test_real_datasets_train_evaluate_and_resume(tmp_path, real_datasets, dataset):
    if "hopper" in dataset:
        pytest.importorskip("mujoco")
    options = {"seeds": 2, "eval_episodes": 1, "progress": False, "batch_size": 32}
    run = rlkit2.train("bc", dataset, steps=20, out=Path(tmp_path), overrides={"hidden_sizes": (16,)}, **options)
    assert all(line["normalized_scores"] is not None for line in run.evaluations())
    assert rlkit2.train(resume=run, steps=30, progress=False).checkpoint().step == 30
    assert np.isfinite(rlkit2.evaluate(run, episodes=1, deterministic=False).returns).all()


def test_every_option_of_the_trainer_is_an_argument_of_train():
    import inspect

    from rlkit2.training import DataOptions, TrainingOptions

    names = {field.name for cls in (DataOptions, TrainingOptions) for field in dataclasses.fields(cls)}
    assert names <= set(inspect.signature(rlkit2.train).parameters)
