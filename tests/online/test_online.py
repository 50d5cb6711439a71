"""A run that goes online: what it collects and learns, what it was after a kill, and what it says when an environment will not do."""

from __future__ import annotations

import errno
import json
import os
import signal
import time

import numpy as np
import pytest

import rlkit2
from rlkit2.agents import list_agents
from rlkit2.agents.dqn import DQNConfig
from rlkit2.cli.main import main
from rlkit2.errors import ConfigError, EnvironmentUnavailableError, EpisodeError, RunError
from rlkit2.evaluation.environments import EnvironmentWarning
from rlkit2.evaluation.rollouts import FIRST_EVALUATION_SEED
from rlkit2.files import WriteError
from rlkit2.online.collector import Collector
from rlkit2.online.exploration import Explorer
from rlkit2.online.group import OnlineGroup
from rlkit2.online.replay import RecordFile, online_dtype, replay_path
from rlkit2.training import Run
from rlkit2.training.building import stored_spec
from tests.built import give_built
from tests.online.walks import DATASET, Breaking, Forgetful, LongWalk, Narrow, Wide, offline_run, online
from tests.training.tiny_problem import contents


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Offline runs by agent, trained once."""
    folder, runs = tmp_path_factory.mktemp("offline"), {}

    def get(agent="sacn", **options):
        key = (agent, repr(options))
        if key not in runs:
            runs[key] = offline_run(folder, agent, **options)
        return runs[key]

    return get


@pytest.fixture(scope="module")
def whole(offline, tmp_path_factory):
    """What an uninterrupted run leaves, by the options of `offline` and of `online`; each is trained once."""
    found = {}

    def get(agent="sacn", data=(), **options):
        key = (agent, repr(data), repr(options))
        if key not in found:
            folder = tmp_path_factory.mktemp("whole")
            found[key] = contents(online(offline(agent, **dict(data)), folder, **options))
        return found[key]

    return get


def interrupt(monkeypatch, step):
    """The process gets SIGINT when a group begins this step."""
    advance = Collector.collect

    def collect(self, count):
        if count >= step and self.seeds[0] == 0:
            monkeypatch.setattr(Collector, "collect", advance)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)  # the main thread, which handles it, may be waiting for a core
        advance(self, count)

    monkeypatch.setattr(Collector, "collect", collect)


def records(run, seed=0):
    return np.fromfile(replay_path(run.path, seed), online_dtype(stored_spec(run.config)))


# what is collected and learnt


def test_a_run_continues_in_the_environment(offline, tmp_path):
    start = offline()
    before = contents(start)
    run = online(start, tmp_path)
    assert contents(start) == before
    assert run.path.name.startswith("sacn-online-")
    assert run.manifest["status"] == "finished"
    assert run.config["origin"] == {"run": str(start.path.resolve()), "id": start.id, "step": 20}
    assert [line["step"] for line in run.evaluations() if line["seed"] == 1] == [20, 40, 60]
    lines = [line for line in run.metrics() if line["seed"] == 0]
    assert "critic/loss" not in lines[0]  # ten steps of warm-up, a log line after seven
    assert all("critic/loss" in line for line in lines[1:])
    assert int(run.agent.step[0]) == 20 + 50
    rows = records(run)
    assert len(rows) == 60
    ended = sum(line["online/episodes"] for line in lines)
    assert ended == (rows["terminations"] | rows["truncations"]).sum() > 0
    assert rlkit2.evaluate(run, episodes=2, env=LongWalk).returns.shape == (2, 2)


def test_no_step_leads_from_one_episode_into_the_next(offline, tmp_path):
    rows = records(online(offline(), tmp_path, steps=90)).reshape(30, 3)
    ends = rows["terminations"] | rows["truncations"]
    follows = (rows["next_observations"][:-1] == rows["observations"][1:]).all(-1)
    np.testing.assert_array_equal(follows, ~ends[:-1])
    assert rows["terminations"].any()
    assert (rows["truncations"] & ~rows["terminations"]).any()
    # a seed's episode follows from its number alone
    collector = Collector.__new__(Collector)
    collector.seeds, collector.episodes = (0, 1), np.zeros((2, 3), np.int64)
    seeds = {collector.episode_seed(key) for key in np.ndindex(2, 3)}
    assert len(seeds) == 6
    assert max(seeds) < FIRST_EVALUATION_SEED
    first, _ = LongWalk().reset(seed=collector.episode_seed((0, 2)))
    np.testing.assert_array_equal(rows["observations"][0, 2], first)


def test_a_seed_collects_the_same_alone(offline, tmp_path):
    both = online(offline(), tmp_path)
    alone = online(offline(seeds=1), tmp_path)
    for name in ("observations", "rewards", "terminations"):
        np.testing.assert_allclose(records(alone)[name], records(both)[name], rtol=1e-4, atol=1e-5)
    assert not np.array_equal(records(both, 1)["observations"], records(both)["observations"])


@pytest.mark.parametrize(("ratio", "updates"), [(0.25, 12), (1.0, 50), (2.0, 100)])
def test_updates_per_transition(offline, tmp_path, ratio, updates):
    run = online(offline(), tmp_path, update_ratio=ratio, eval_every=0)
    assert int(run.agent.step[0]) - 20 == updates
    group = OnlineGroup.__new__(OnlineGroup)
    group.options = rlkit2.training.OnlineOptions(**run.config["online"])
    group.step = 60
    steps = [group.step_of(row, updates) for row in range(updates)]
    assert steps == sorted(steps)
    assert steps[0] > 10
    assert steps[-1] > 60 - 1 / ratio
    assert all(
        group.updates_before(step) > number >= group.updates_before(step - 1) for number, step in enumerate(steps)
    )


def test_deterministic_policies_act_with_noise_and_greedy_ones_at_random_now_and_then(offline, tmp_path):
    quiet, noisy = (
        records(online(offline("td3bc"), tmp_path, exploration_noise=noise, warmup=60)) for noise in (0.0, 0.5)
    )
    policy = offline("td3bc").policy.select_seed(0)
    np.testing.assert_allclose(policy(quiet["observations"]), quiet["actions"], atol=1e-5)
    distance = (policy(noisy["observations"]) - noisy["actions"]) / 2.0  # half of the range of 4
    assert 0.3 < distance.std() < 0.6
    assert np.abs(noisy["actions"]).max() <= 2.0


def greedy_run(folder, **options):
    """200 steps without an update."""
    none = {"warmup": 0, "update_ratio": 0.004, "eval_every": 0, "progress": False}
    return rlkit2.train_online(
        DQNConfig(hidden_sizes=(8,)), env="CartPole-v1", steps=200, out=folder, **none, **options
    )


def test_a_greedy_policy_explores_by_its_share(tmp_path):
    run = greedy_run(tmp_path, epsilon=0.3, epsilon_steps=0)
    rows, policy = records(run), run.policy
    differ = (policy(rows["observations"]) != rows["actions"]).mean()
    assert 0.08 < differ < 0.22  # half of 0.3: a random action is the best one in half of the steps
    everywhere = records(greedy_run(tmp_path, epsilon=0.0, epsilon_steps=400))
    early, late = (
        (policy(part["observations"]) != part["actions"]).mean() for part in (everywhere[:50], everywhere[-50:])
    )
    assert early > 0.35 > late


def test_rewards_are_seen_as_the_offline_run_saw_them(offline, tmp_path, monkeypatch):
    seen = []
    update = rlkit2.agents.agent_class("sacn").update

    def watch(self, batch):
        if self.seeds[0] == 0:
            seen.append(batch)
        return update(self, batch)

    monkeypatch.setattr(rlkit2.agents.agent_class("sacn"), "update", watch)
    start = offline(reward_transform="return_range", reward_scale=3.0)
    run = online(start, tmp_path, eval_every=0, batch_size=8)
    returns = DATASET.episode_returns
    factor = 3000.0 / float(returns.max() - returns.min())
    rows, batch = records(run)["rewards"], seen[-1]
    assert batch.rewards.shape[1] == 8
    assert all(np.isclose(rows * factor, reward.item(), rtol=1e-5).any() for reward in batch.rewards[0, 4:])
    assert all(np.isclose(DATASET.rewards * factor, reward.item(), rtol=1e-5).any() for reward in batch.rewards[0, :4])


def test_agents_that_select_their_data_are_refused(offline, tmp_path):
    with pytest.raises(ConfigError, match=r"^BC chooses or makes what it learns from"):
        online(offline("bc"), tmp_path)
    refused = {name for name in list_agents() if rlkit2.agents.agent_class(name).online_refusal()}
    assert refused >= {"bc", "dt", "cpl", "ipl", "p_iql", "odice_il"}
    assert not refused & {"odice", "iql", "td3bc", "sacn", "edac", "rebrac", "dqn", "cql", "awac"}


# kills


KINDS = [
    ("sacn", {}, {}),
    ("sacn", {"num_steps": 3}, {"num_envs": 1, "update_ratio": 0.5}),
    ("td3bc", {}, {"num_envs": 2, "update_ratio": 2.0}),
    ("rebrac", {}, {"capacity": 24}),
    ("iql", {"normalize_observations": True}, {"offline_share": 0.0}),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[0])
def test_an_interruption_leaves_no_trace(offline, whole, tmp_path, monkeypatch, kind):
    agent, data, options = kind
    start = offline(agent, **data)
    expected = whole(agent, data, **options)
    for step in (4, 31):
        interrupt(monkeypatch, step)
        with pytest.raises(KeyboardInterrupt):
            online(start, tmp_path / str(step), **options)
        (config,) = (tmp_path / str(step)).glob("*/config.json")
        run = Run(config.parent)
        assert step <= run.checkpoint().step < 60
        assert contents(rlkit2.train(resume=run, dataset=DATASET, env=LongWalk, progress=False)) == expected


def forget_the_noise(monkeypatch):
    monkeypatch.setattr(Explorer, "load_state", lambda self, state: None)


def forget_where_it_was(monkeypatch):
    def load(self, state):
        self._begin(list(np.ndindex(self.episodes.shape)))
        return []

    monkeypatch.setattr(Collector, "load_state", load)


@pytest.mark.parametrize("mistake", [forget_the_noise, forget_where_it_was])
def test_the_check_sees_what_a_resume_forgets(offline, whole, tmp_path, monkeypatch, mistake):
    expected = whole()
    interrupt(monkeypatch, 31)
    with pytest.raises(KeyboardInterrupt):
        online(offline(), tmp_path / "a")
    (config,) = (tmp_path / "a").glob("*/config.json")
    mistake(monkeypatch)
    assert contents(rlkit2.train(resume=config.parent, dataset=DATASET, env=LongWalk, progress=False)) != expected


def test_an_environment_that_does_not_come_back_begins_a_new_episode_and_that_is_said(
    offline, tmp_path, monkeypatch, capsys
):
    Forgetful.steps = 0
    interrupt(monkeypatch, 31)
    with pytest.raises(KeyboardInterrupt):
        online(offline(), tmp_path, env=Forgetful, eval_every=0)
    (config,) = tmp_path.glob("*/config.json")
    run = rlkit2.train_online(config.parent, DATASET, env=Forgetful)
    said = capsys.readouterr().err
    assert said.count("does not come back to where it was") == 1
    assert run.manifest["status"] == "finished"
    cuts = run.checkpoint().facts["of_groups"]["0"]
    assert len(cuts) == 3
    rows = records(run)
    for row in cuts:
        assert not np.array_equal(rows[row]["next_observations"], rows[row + 3]["observations"])


def test_a_prolonged_run_is_the_longer_run(offline, tmp_path):
    even = {"log_every": 10, "checkpoint_every": 20}
    short = online(offline(), tmp_path / "a", steps=40, **even)
    with pytest.raises(ConfigError, match=r"is a run of 40 steps; it cannot be resumed with 30"):
        rlkit2.train_online(short, DATASET, steps=30, env=LongWalk)
    with pytest.raises(ConfigError, match="leave all out but --online STEPS"):
        rlkit2.train_online(short, DATASET, steps=60, env=LongWalk, offline_share=0.1)
    with pytest.raises(ConfigError, match="resume it without other options"):
        rlkit2.train(resume=short, steps=60)
    run = rlkit2.train_online(short, DATASET, steps=60, env=LongWalk, progress=False)
    assert contents(run) == contents(online(offline(), tmp_path / "b", **even))


def test_a_damaged_replay_is_one_line(offline, tmp_path):
    run = online(offline(), tmp_path)
    path = replay_path(run.path, 1)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        RunError,
        match=r"seed-1.records does not have the checksum it was written with: what the run has collected is damaged",
    ):
        rlkit2.train_online(run, DATASET, steps=80, env=LongWalk, progress=False)


# environments that will not do


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            {},
            r"failed in step \d+ of an episode of seed 0 \(environment \d, at \d+ transitions\): ZeroDivisionError: a joint is broken",
        ),
        ({"reward": float("nan")}, r"the reward was nan"),
        ({"observation": float("nan")}, r"the observation holds values that are not numbers"),
    ],
)
def test_a_failing_environment_is_one_line_and_nothing_is_lost(offline, whole, tmp_path, monkeypatch, fault, message):
    start, expected = offline(seeds=1), whole(data={"seeds": 1}, eval_every=0)
    for name, value in {"steps": 0, "reward": None, "observation": None, **fault}.items():
        monkeypatch.setattr(Breaking, name, value)
    with pytest.raises(
        EpisodeError, match=message + r".*; what was learnt before is saved, resume it with: rlkit2 train --resume"
    ):
        online(start, tmp_path / "a", env=Breaking, eval_every=0)
    (config,) = (tmp_path / "a").glob("*/config.json")
    assert Run(config.parent).status == "died"
    assert Run(config.parent).checkpoint().step == 48  # the step at which it failed, not the last regular one
    monkeypatch.setattr(Breaking, "steps", 1000)  # mended
    assert contents(rlkit2.train(resume=config.parent, dataset=DATASET, env=Breaking, progress=False)) == expected


def test_a_full_disk_ends_a_run_with_one_line_and_it_resumes(offline, whole, tmp_path, monkeypatch):
    start, expected = offline(seeds=1), whole(data={"seeds": 1}, eval_every=0)
    append = RecordFile.append

    def full(self, rows):
        if self.length + len(rows) < 45:
            return append(self, rows)
        with monkeypatch.context() as patch:
            patch.setattr(
                os,
                "write",
                lambda descriptor, data: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
            )
            return append(self, rows)

    monkeypatch.setattr(RecordFile, "append", full)
    with pytest.raises(
        WriteError,
        match=r"seed-0.records: No space left on device.*; its checkpoints are intact; resume it with: rlkit2 train",
    ):
        online(start, tmp_path / "a", eval_every=0)
    monkeypatch.setattr(RecordFile, "append", append)
    (config,) = (tmp_path / "a").glob("*/config.json")
    assert Run(config.parent).checkpoint().step == 30
    assert contents(rlkit2.train(resume=config.parent, dataset=DATASET, env=LongWalk, progress=False)) == expected


def test_environments_that_do_not_fit(offline, tmp_path):
    with pytest.raises(EnvironmentUnavailableError, match="takes actions in"):
        online(offline(), tmp_path, env=Wide)
    with pytest.warns(EnvironmentWarning, match="takes actions in -1 to 1"):
        run = online(offline(), tmp_path, env=Narrow, eval_every=0)
    assert np.abs(records(run)["actions"]).max() <= 1.0  # what was done is what is kept
    with pytest.raises(ConfigError, match="not an environment that is there"):
        online(offline(), tmp_path, env=LongWalk())
    with pytest.raises(EnvironmentUnavailableError, match="names no environment"):
        online(offline(), tmp_path, env=None)
    assert len(list(tmp_path.iterdir())) == 1  # what is refused leaves no folder


def test_what_would_change_the_offline_part_is_refused(offline, tmp_path):
    for options, message in (
        ({"schedule": "cosine"}, "learning rates are constant online"),
        ({"reward_scale": 2.0}, "has reward_scale = 1.0; what it learns online must be seen as what it has learnt"),
        ({"offline_shares": 0.5}, "did you mean offline_share"),
        ({"steps": None}, "say for how many steps"),
        ({"seeds": 3}, r"has seeds \[0, 1\], which all continue"),
    ):
        with pytest.raises(ConfigError, match=message):
            online(offline(), tmp_path, **options)
    with pytest.raises(ConfigError, match=r"does not fit|another configuration"):
        online(offline(), tmp_path, overrides={"num_critics": 5})
    with pytest.raises(ConfigError, match="offline_share is for training in an environment"):
        rlkit2.train("sacn", DATASET, steps=5, offline_share=0.5)
    run = online(offline(), tmp_path, overrides={"target_entropy": 0.0}, eval_every=0)
    assert run.config["config"]["target_entropy"] == 0.0


def test_a_seed_that_diverges_leaves_the_others_alone(offline, tmp_path, monkeypatch):
    cls = rlkit2.agents.agent_class("sacn")
    update = cls.update

    def broken(self, batch):
        metrics = update(self, batch)
        if 1 in self.seeds and int(self.step[0]) == 20 + 25:
            k = self.seeds.index(1)
            for parameter in self.actor.parameters():
                parameter.data[k] = np.nan
            metrics["policy/loss"][k] = np.nan
        return metrics

    monkeypatch.setattr(cls, "update", broken)
    run = online(offline(seeds=3), tmp_path, num_envs=1, eval_every=0)
    assert run.manifest["status"] == "finished"
    assert set(run.manifest["stopped"]) == {"1"}
    assert run.manifest["stopped"]["1"]["step"] == 35
    assert len(records(run, 2)) == 60


# the command line


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    give_built("builtin/pendulum")
    small = "--batch-size 8 --eval-every 0 --hidden-sizes 8"
    assert main(f"train sacn --dataset builtin/pendulum --num-critics 2 --steps 5 {small}".split()) == 0
    run = "runs/sacn-builtin-pendulum-mixed-v0-001"
    assert main(f"train --resume {run} --online 40 --eval-episodes 1 --offline-share 0.25 --num-envs 2".split()) == 0
    done = Run("runs/sacn-online-builtin-pendulum-mixed-v0-001")
    assert done.config["online"]["offline_share"] == 0.25
    assert done.config["training"]["steps"] == 40
    assert main(["train", "--resume", str(done.path)]) == 0
    assert main(["train", "--resume", str(done.path), "--online", "50"]) == 0
    assert len(records(done)) == 50
    for words, message in (
        (f"--resume {run} --online 40 --steps 3", "--online says how many steps there are"),
        ("sacn --dataset builtin/pendulum --num-envs 2", "num_envs is for training in an environment"),
        (f"iql --resume {run} --online 40", "trains sacn, not iql"),
        (f"--resume {run} --online many", "steps must be a whole number"),
    ):
        capsys.readouterr()
        assert main(["train", *words.split()]) != 0
        said = capsys.readouterr().err
        assert message in said
        assert len(said.strip().splitlines()) == 1
    capsys.readouterr()
    assert main(["report", run, str(done.path), "--out", "page.html"]) == 0
    assert main(["compare", run, str(done.path)]) is not None
    manifest = json.loads((done.path / "manifest.json").read_text())
    assert manifest["status"] == "finished"
