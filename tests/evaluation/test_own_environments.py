"""Environments of the user's own, by file, module, function, class or instance; bounds that differ; environments that fail while they play."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

import rlkit2
from rlkit2.agents.bc import BCConfig
from rlkit2.cli.main import main
from rlkit2.data.environments import make_environment, named_source
from rlkit2.errors import ConfigError, EnvironmentUnavailableError, EpisodeError
from rlkit2.evaluation import evaluate_policy
from rlkit2.evaluation.environments import EnvironmentWarning, check_spaces
from rlkit2.rewards import TabularMDP
from rlkit2.rewards.sampled.collecting import collect
from tests.training.tiny_problem import Walk, tiny_dataset

CODE = """
import gymnasium
from neighbour_of_{name} import Walk

class Still(Walk):
    pass

def make_env():
    return Walk()

def needs(size):
    return Walk()

def nothing():
    return None

there = Walk()
number = 3
gymnasium.register("{name}/Own-v0", entry_point=Walk)
"""
NUMBERS = itertools.count()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A file of environments, whose module is new, with a neighbour; the current folder is theirs."""
    name = f"own_environments_{next(NUMBERS)}"
    (tmp_path / f"{name}.py").write_text(CODE.format(name=name))
    (tmp_path / f"neighbour_of_{name}.py").write_text("from tests.training.tiny_problem import Walk\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    for loaded in (name, f"neighbour_of_{name}"):
        sys.modules.pop(loaded, None)
    gym.registry.pop(f"{name}/Own-v0", None)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return rlkit2.train(
        BCConfig(hidden_sizes=(8,)), tiny_dataset(), steps=4, seeds=2, eval_every=0, out=tmp_path_factory.mktemp("runs"), progress=False
    )  # fmt: skip


def test_every_way_to_name_one_plays_the_same(own: str, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    expected = rlkit2.evaluate(run, episodes=7, env=Walk).returns
    ways = [f"{own}.py:make_env", f"{own}.py:Still", f"./{own}.py:there", f"{own}:make_env", f"{own}:Still"]
    ways += [f"{own}:{own}/Own-v0", str(Path(f"{own}.py").resolve()) + ":make_env"]
    for way in ways:
        assert main(["evaluate", str(run.path), "--episodes", "7", "--env", way, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        np.testing.assert_array_equal([line["returns"] for line in found["results"]], expected)
        assert found["environment"] == way
    for source in (Walk(), lambda: Walk(), gym.spec(f"{own}/Own-v0")):
        np.testing.assert_array_equal(rlkit2.evaluate(run, episodes=7, env=source).returns, expected)


def test_an_environment_that_is_there_plays_alone_and_stays_open(run: Any) -> None:
    class Counting(Walk):
        resets, closed = 0, False

        def reset(self, **options: Any) -> Any:
            self.resets += 1
            return super().reset(**options)

        def close(self) -> None:
            self.closed = True

    env = Counting()
    found = rlkit2.evaluate(run, episodes=13, env=env, num_envs=5)
    np.testing.assert_array_equal(found.returns, rlkit2.evaluate(run, episodes=13, env=Walk).returns)
    assert (env.resets, env.closed) == (26, False)
    assert found.environment == "Counting"


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("nowhere.py:make_env", r"nowhere.py does not exist; name it by an id .*file.py:NAME or module:NAME"),
        ("{own}.py:make_en", r"has no 'make_en'; did you mean make_env\?"),
        ("{own}.py:number", r"number is a int; name it by"),
        ("{own}.py:nothing", r"gave a NoneType, which is not a gymnasium.Env"),
        ("{own}.py:needs", r"needs\(\) missing 1 required positional argument: 'size'"),
        ("no_such_module:make", r"no_such_module cannot be imported: ModuleNotFoundError"),
        ("Nothing-v9", r"`Nothing` doesn't exist. \(an environment is named by an id"),
    ],
)
def test_what_cannot_be_found_is_one_line_that_says_how(way: str, message: str, own: str, run: Any) -> None:
    way = way.format(own=own)
    with pytest.raises(EnvironmentUnavailableError, match=message) as caught:
        rlkit2.evaluate(run, episodes=1, env=way)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"environment {way} cannot be built: ")


def test_a_run_remembers_it_and_imports_nothing(own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = rlkit2.train(
        BCConfig(hidden_sizes=(8,)), tiny_dataset(), steps=4, eval_episodes=1, out="runs", env=f"{own}.py:make_env", progress=False
    )  # fmt: skip
    typed = f"{tmp_path / own}.py:make_env"
    assert run.config["env"] == typed
    assert rlkit2.evaluate(run, episodes=2).returns.shape == (1, 2)  # it is loaded
    del sys.modules[own]
    assert main(["evaluate", str(run.path)]) == 2
    error = capsys.readouterr().err
    assert (
        f"environment {typed} of {run.path} would import {tmp_path / own}.py; name it yourself with --env {typed}"
        in error
    )
    assert own not in sys.modules
    for words in (["evaluate", "--episodes", "2"], ["compare", "--episodes", "2"], ["select", "--play", "1"]):
        sys.modules.pop(own, None)
        more = ["--steps", "20", "--members", "3", "--methods", "fqe"] if words[0] == "select" else []
        if more:
            tiny_dataset().to_minari("tiny/walk-v0")
        assert main([words[0], str(run.path), *words[1:], *more, "--env", typed]) == 0
    assert main(["compare", str(run.path), "--env", typed]) == 2
    assert "--env is for playing: give --episodes, too" in capsys.readouterr().err
    assert run.resume_command.endswith(f"--env {typed}")


def test_distances_are_measured_in_it(own: str, tmp_path: Path) -> None:
    (tmp_path / "chain_of_two.py").write_text(
        "import gymnasium, numpy\n"
        "class Chain(gymnasium.Env):\n"
        "    observation_space = action_space = gymnasium.spaces.Discrete(2)\n"
        "    P = {s: {a: [(1.0, a, float(a), a == 1)] for a in (0, 1)} for s in (0, 1)}\n"
    )
    assert main(["starc", "tabular", "--env", "chain_of_two.py:Chain"]) == 0
    assert TabularMDP.from_gym("chain_of_two:Chain", 0.9)[0].num_states >= 2
    (tmp_path / "reward_of_two.py").write_text("def far(observations):\n    return observations[:, 0]\n")
    words = ["--reward", "reward_of_two.py:far", "--true", "--episodes", "4", "--bootstrap", "0"]
    assert main(["starc", "env", f"{own}.py:make_env", *words]) == 0
    assert len(collect(Walk(), episodes=2)[0]) == 10


def test_a_sweep_names_it_and_the_user_types_it(own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_dataset().to_minari("tiny/walk-v0")
    content = f"""
[base]
agent = "bc"
dataset = "tiny/walk-v0"
env = "{own}.py:make_env"
training = {{steps = 4, eval_episodes = 1}}
config = {{hidden_sizes = [8]}}
"""
    Path("sweep.toml").write_text(content)
    assert main(["sweep", "sweep.toml"]) == 2
    assert f"environment {own}.py:make_env of sweep sweep.toml would import {own}.py" in capsys.readouterr().err
    assert main(["sweep", "sweep.toml", "--env", f"{own}.py:make_env", "--dry-run"]) == 0


# ---- bounds -----------------------------------------------------------------------------------------------------------


class Wide(Walk):
    action_space = spaces.Box(-4.0, 4.0, (2,), np.float32)


class Seen(Walk):
    observation_space = spaces.Box(-1.0, np.array([1.0, 1.0, 5.0], np.float32), (3,), np.float32)


def test_other_bounds_are_said_and_nothing_is_rescaled(run: Any) -> None:
    with pytest.warns(
        EnvironmentWarning, match=r"Wide takes actions in -4 to 4, the policy of dataset tiny/walk-v0 gives -2 to 2: nothing is rescaled"
    ):  # fmt: skip
        wide = rlkit2.evaluate(run, episodes=3, env=Wide)
    np.testing.assert_array_equal(wide.returns, rlkit2.evaluate(run, episodes=3, env=Walk).returns)
    with pytest.warns(EnvironmentWarning, match=r":Wide takes actions in -4 to 4") as said:
        assert main(["evaluate", str(run.path), "--episodes", "1", "--env", f"{__name__}:Wide"]) == 0
    assert len(said) == 1


def test_observations_in_other_bounds_or_types() -> None:
    spec = rlkit2.data.DatasetSpec(observation_space=Seen.observation_space, action_space=Walk.action_space, id="x")
    env = Walk()
    check_spaces(env, spec, "Walk")  # without bounds there is nothing to compare
    env.observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
    message = r"in -1 to 1, those of dataset x lie in -1 to 5 \(column 2; 1 of 3 differ\): nothing is rescaled"
    with pytest.warns(EnvironmentWarning, match=message):
        check_spaces(env, spec, "Walk")
    env.observation_space = spaces.Box(-1.0 - 1e-6, np.array([1.0, 1.0, 5.0], np.float32), (3,), np.float32)
    check_spaces(env, spec, "Walk")  # rounding
    spec = rlkit2.data.DatasetSpec(
        observation_space=spaces.Box(0, 255, (4, 4, 1), np.uint8), action_space=Walk.action_space
    )
    env.observation_space = spaces.Box(0.0, 1.0, (4, 4, 1), np.float32)
    with pytest.raises(EnvironmentUnavailableError, match="bytes and other numbers are not the same"):
        check_spaces(env, spec, "Walk")


# ---- environments that fail -------------------------------------------------------------------------------------------


class Failing(Walk):
    """Breaks, or pays in something else than numbers, in a step of the first episode."""

    how, when = "raise", 5000

    def step(self, action: Any) -> Any:
        observation, reward, _, _, info = super().step(action)
        if self._step == self.when:
            if self.how == "raise":
                raise ZeroDivisionError("the wheel\ncame off")
            reward = {"nan": float("nan"), "text": "much"}[self.how]
        return observation, reward, False, False, info


@pytest.mark.parametrize(
    ("how", "when", "message"),
    [
        ("raise", 5000, "ZeroDivisionError: the wheel$"),
        ("nan", 3, "the reward was nan$"),
        ("text", 1, "could not convert string to float: 'much'$"),
    ],
)
def test_a_failing_environment_is_one_line_with_the_place(
    how: str, when: int, message: str, run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Failing, "how", how)
    monkeypatch.setattr(Failing, "when", when)
    where = rf"environment Failing failed in step {when} of episode 0 \(its seed {2**30}\): {message}"
    with pytest.raises(EpisodeError, match=where):
        rlkit2.evaluate(run.policy.select_seed(0), episodes=1, env=Failing)
    if when < 5000:
        assert main(["evaluate", str(run.path), "--env", f"{__name__}:Failing"]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_training_goes_on_without_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaking(Walk):
        def step(self, action: Any) -> Any:
            raise RuntimeError("out of order")

    run = rlkit2.train(
        BCConfig(hidden_sizes=(8,)), tiny_dataset(), steps=6, eval_every=2, eval_episodes=1, out=tmp_path, env=Breaking, progress=False
    )  # fmt: skip
    assert run.status == "finished"
    assert run.evaluations() == []
    assert run.checkpoint().step == 6
    (text,) = run.manifest["warnings"]
    assert text.startswith(
        "evaluation at step 2 failed, training continues without scores: environment Breaking failed in step 1"
    )


def test_collecting_tells_the_environment_from_the_policy() -> None:
    class Breaking(Walk):
        def step(self, action: Any) -> Any:
            raise ValueError("out of order")

    with pytest.raises(EpisodeError, match="environment Breaking failed in step 1 of the episode from its seed"):
        collect(Breaking, episodes=1)
    with pytest.raises(ConfigError, match="the policy does not fit Walk"):
        collect(Walk, episodes=1, policy=lambda observation: "up")


def test_what_draws_is_asked_for_it(own: str) -> None:
    asked = []

    def make(render_mode: str | None = None) -> Walk:
        asked.append(render_mode)
        return Walk()

    make_environment(make, render_mode="rgb_array")
    make_environment(make)
    make_environment(Walk, render_mode="rgb_array")  # it takes no such argument
    assert asked == ["rgb_array", None]
    assert named_source(f"{own}.py:make_env")() is not None
    assert make_environment("CartPole-v1", render_mode="rgb_array").render_mode == "rgb_array"


def test_spaces_of_a_failing_policy_are_not_touched(run: Any) -> None:
    """Another space is refused before anything is stepped."""
    with pytest.raises(EnvironmentUnavailableError, match="gives observations of 4 columns"):
        evaluate_policy(run.policy, rlkit2.data.DatasetSpec.from_json(run.config["spec"]), env="CartPole-v1")
