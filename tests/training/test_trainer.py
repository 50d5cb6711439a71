"""Groups of seeds, stopped seeds, checkpoints that are kept, the files and the manifest of a run."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import torch
from gymnasium import spaces
from rich.console import Console

import rlkit2
from rlkit2.agents.bc import BC, BCConfig
from rlkit2.agents.metrics import Metrics
from rlkit2.agents.td3bc import TD3BC, TD3BCConfig
from rlkit2.data import dataset_from_arrays
from rlkit2.data.spaces import DatasetWarning
from rlkit2.errors import RunError
from rlkit2.training import Run, Trainer
from rlkit2.training.building import agent_factory
from rlkit2.training.groups import BatchIndices, MetricRows, seed_groups
from rlkit2.training.progress import Progress
from rlkit2.training.updates import replayed
from tests.training.tiny_problem import FaultyConfig, Walk, contents, fit, interrupting, tiny_dataset, tiny_run

DATASET = tiny_dataset()
CONFIG = BCConfig(hidden_sizes=(8,))
SCHEDULE = {"steps": 40, "log_every": 4, "eval_every": 20, "checkpoint_every": 8}


def layout(*groups):
    """For `Trainer`: these groups, without the seeds that have stopped."""
    parts = lambda seeds: (tuple(seed for seed in group if seed in seeds) for group in groups)  # noqa: E731
    return lambda seeds, device: [part for part in parts(seeds) if part]


# groups of seeds


def close(run, other, seeds, other_seeds):
    """Whether both runs learnt the same for these seeds, up to the rounding of float32."""
    ours, theirs = run.checkpoint().tensors, other.checkpoint().tensors
    assert torch.equal(ours["generators"][seeds], theirs["generators"][other_seeds])
    for name, tensor in ours.items():
        if name.startswith("agent."):
            torch.testing.assert_close(tensor[seeds], theirs[name][other_seeds], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("groups", [[(3,), (0,), (5,)], [(3, 0), (5,)]])
def test_a_seed_learns_the_same_in_any_group(tmp_path, groups):
    reference = fit(tiny_run(tmp_path / "a", CONFIG, DATASET, [3, 0, 5], **SCHEDULE), DATASET, groups=layout((3, 0, 5)))
    other = fit(tiny_run(tmp_path / "b", CONFIG, DATASET, [3, 0, 5], **SCHEDULE), DATASET, groups=layout(*groups))
    close(other, reference, [0, 1, 2], [0, 1, 2])
    alone = fit(tiny_run(tmp_path / "c", CONFIG, DATASET, [0], **SCHEDULE), DATASET)
    close(alone, reference, [0], [1])


def test_the_same_groups_are_the_same_bits_on_any_number_of_threads(tmp_path, monkeypatch):
    groups = layout((3,), (0,), (5,))
    one = fit(tiny_run(tmp_path / "a", CONFIG, DATASET, [3, 0, 5], **SCHEDULE), DATASET, groups=groups)
    monkeypatch.setattr("rlkit2.training.groups.available_cores", lambda: 3)
    three = fit(tiny_run(tmp_path / "b", CONFIG, DATASET, [3, 0, 5], **SCHEDULE), DATASET, groups=groups)
    assert contents(three) == contents(one)


def test_a_run_keeps_its_groups_when_it_resumes_on_another_machine(tmp_path, monkeypatch):
    whole = fit(tiny_run(tmp_path / "a", CONFIG, DATASET, [0, 1, 2], **SCHEDULE), DATASET)
    run = tiny_run(tmp_path / "b", CONFIG, DATASET, [0, 1, 2], **SCHEDULE)
    with pytest.raises(KeyboardInterrupt):
        fit(run, DATASET, wrap=interrupting(17))
    monkeypatch.setattr("rlkit2.training.groups.available_cores", lambda: 1)
    assert contents(fit(run, DATASET)) == contents(whole)


def test_seeds_are_spread_evenly_over_cores(monkeypatch):
    monkeypatch.setattr("rlkit2.training.groups.available_cores", lambda: 2)
    sizes = {count: [len(g) for g in seed_groups(range(count), torch.device("cpu"))] for count in (1, 2, 3, 8, 9, 16)}
    assert sizes == {1: [1], 2: [1, 1], 3: [2, 1], 8: [4, 4], 9: [3, 2, 2, 2], 16: [4, 4, 4, 4]}
    assert seed_groups([4, 9, 2], torch.device("cuda")) == [(4, 9, 2)]


def test_rows_are_uniform_and_belong_to_the_seed():
    draws = BatchIndices(DATASET, [0, 1], 50)
    rows = torch.stack([draws.next() for _ in range(300)])  # crosses a block
    assert rows.shape == (300, 2, 50)
    counts = np.bincount(rows[:, 0].flatten().numpy(), minlength=len(DATASET))
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert abs(chi2 - len(DATASET)) < 5 * math.sqrt(2 * len(DATASET))
    assert not torch.equal(rows[:, 0], rows[:, 1])
    for step in (1, 256, 257, 300):
        np.testing.assert_array_equal(BatchIndices(DATASET, [1], 50).at(step)[0], rows[step - 1, 1].numpy())


def test_metrics_that_appear_late_or_rarely_are_averaged_over_the_updates_that_have_them():
    rows = MetricRows()
    for step in range(100):
        metrics = {"a": torch.tensor([float(step), 0.0])}
        if step >= 70 and step % 10 == 0:
            metrics["b"] = torch.tensor([1.0, float(step)])
        rows.add(metrics)
    names, values, present = rows.take()
    assert names == ["a", "b"]
    assert present[:, 0].all()
    assert np.flatnonzero(present[:, 1]).tolist() == [70, 80, 90]
    assert values[present[:, 1], 1, 1].tolist() == [70, 80, 90]
    assert values[:, 0, 0].tolist() == list(range(100))
    assert rows.length == 0


def test_derived_metrics_are_those_of_every_update():
    """Computed for all updates of an interval at once, and not kept: a restored interval derives them anew."""
    derived = {"ratio": lambda m: m["a"] / m["b"]}
    rows, restored = MetricRows(), MetricRows()
    made = [{"a": torch.tensor([float(k), 1.0]), "b": torch.tensor([2.0, float(k + 1)])} for k in range(5)]
    for metrics in made[:3]:
        rows.add(Metrics(metrics, derived))
    restored.restore(*rows.take(clear=False))
    for metrics in made[3:]:
        rows.add(Metrics(metrics, derived))
        restored.add(Metrics(metrics, derived))
    for taken in (rows.take_all(), restored.take_all()):
        names, values, present = taken
        assert names == ["a", "b", "ratio"]
        assert present.all()
        assert values[:, 2].tolist() == [(m["a"] / m["b"]).tolist() for m in made]


# a seed whose loss is no number


def faulty(tmp_path, **changes):
    config = FaultyConfig(**{"hidden_sizes": (8,), "broken_seed": 1, "broken_step": 18, **changes})
    return tiny_run(tmp_path, config, DATASET, [0, 1, 2], **SCHEDULE)


@pytest.mark.parametrize("groups", [[(0, 1, 2)], [(0,), (1,), (2,)]])
def test_a_non_finite_loss_stops_its_seed_alone(tmp_path, groups):
    text = io.StringIO()
    run = fit(faulty(tmp_path), DATASET, groups=layout(*groups), progress=Progress(Console(file=text, width=200)))
    stopped = run.manifest["stopped"]
    assert list(stopped) == ["1"]
    assert (stopped["1"]["step"], stopped["1"]["metric"]) == (18, "policy/loss")
    assert stopped["1"]["batch_indices"] == BatchIndices(DATASET, [1], 16).at(18)[0].tolist()
    assert stopped["1"]["last_finite_checkpoint"] == 16
    assert run.manifest["status"] == "finished"
    assert "seed 1 stopped at step 18 (policy/loss was not finite)" in text.getvalue().splitlines()[-1]

    whole = fit(faulty(tmp_path / "whole", broken_step=1000), DATASET, groups=layout(*groups))
    close(run, whole, [0, 2], [0, 2])
    assert {line["step"] for line in run.metrics() if line["seed"] == 2} == set(range(4, 41, 4))
    assert all(line["step"] < 20 for line in [*run.metrics(), *run.evaluations()] if line["seed"] == 1)
    after, before = run.checkpoint(), run.checkpoint(16)
    for name, tensor in after.tensors.items():
        if name.startswith("agent."):
            assert torch.equal(tensor[1], before.tensors[name][1])
    assert all(tensor.isfinite().all() for tensor in run.policy.state_dict().values() if tensor.is_floating_point())


def test_a_run_with_a_stopped_seed_resumes(tmp_path):
    run = fit(faulty(tmp_path), DATASET)
    run.rewrite({**run.config, "training": {**run.config["training"], "steps": 60}})
    fit(run, DATASET)
    assert run.checkpoint().step == 60
    assert {line["seed"] for line in run.metrics() if line["step"] > 40} == {0, 2}
    assert 16 in run.checkpoints


def test_the_run_fails_when_every_seed_stopped(tmp_path):
    config = FaultyConfig(hidden_sizes=(8,), broken_seed=0, broken_step=5)
    run = fit(tiny_run(tmp_path, config, DATASET, [0], **SCHEDULE), DATASET)
    assert run.manifest["status"] == "failed"
    assert run.checkpoint().step == 8
    assert all(tensor.isfinite().all() for tensor in run.policy.state_dict().values() if tensor.is_floating_point())


def test_a_metric_that_is_missing_from_some_updates_is_not_taken_for_a_broken_one(tmp_path):
    run = fit(faulty(tmp_path, broken_step=1000, rare_every=5), DATASET)
    assert run.manifest["stopped"] == {}
    values = {line["step"]: line["rare"] for line in run.metrics() if line["seed"] == 0 and "rare" in line}
    assert values == {8: 5, 12: 10, 16: 15, 20: 20, 28: 25, 32: 30, 36: 35, 40: 40}


# checkpoints and files


def test_the_last_two_checkpoints_and_the_best_are_kept(tmp_path):
    run = tiny_run(tmp_path, CONFIG, DATASET, [0], steps=60, log_every=10, eval_every=10, checkpoint_every=10)
    scores = {10: 1.0, 20: 5.0, 30: 2.0, 40: 5.0, 50: 4.0, 60: 3.0}
    seen = []

    def evaluator(policy, step):
        seen.append(list(run.checkpoints))
        return [{"returns": [scores[step]], "lengths": [1], "normalized_scores": None, "deterministic": True}]

    fit(run, DATASET, evaluator=evaluator)
    assert list(run.checkpoints) == [20, 50, 60]
    assert run.manifest["best"] == {"step": 20, "score": 5.0}
    assert seen[2] == [10, 20]
    assert seen[4] == [20, 30, 40]
    assert run.load_agent(20).step.tolist() == [20]
    with pytest.raises(RunError, match=r"no checkpoint of step 30; steps there are: \[20, 50, 60\]"):
        run.load_agent(30)


def test_metrics_are_means_and_csv_holds_the_same_numbers(tmp_path):
    seen = []

    class Recorded(BC):
        def update(self, batch):
            metrics = super().update(batch)
            seen.append(metrics["policy/loss"].clone())
            return metrics

    run = tiny_run(tmp_path, CONFIG, DATASET, [0, 1], **SCHEDULE)
    spec = DATASET.spec

    def factory(seeds, device):
        return Recorded(CONFIG, spec.observation_size, spec.action_size, seeds=seeds)

    Trainer(run, DATASET, factory, groups=layout((0, 1))).fit()
    losses = torch.stack(seen).double().numpy()
    for line in run.metrics():
        assert line["policy/loss"] == pytest.approx(
            losses[line["step"] - 4 : line["step"], line["seed"]].mean(), rel=1e-12
        )
    with (run.path / "metrics.csv").open() as file:
        rows = [{key: json.loads(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert rows == run.metrics()
    assert len(rows) == 2 * 10


def test_the_manifest_says_where_and_when_and_with_what(tmp_path):
    run = rlkit2.train(CONFIG, DATASET, steps=5, seeds=2, out=tmp_path, env=Walk, eval_episodes=1, progress=False)
    manifest = run.manifest
    assert manifest["status"] == "finished"
    assert manifest["seeds"] == [0, 1]
    assert manifest["dataset"]["content_hash"] == DATASET.spec.content_hash
    (start,) = manifest["starts"]
    assert start["versions"]["torch"] == torch.__version__
    assert set(start) >= {"time", "command", "python", "platform", "processors", "device", "matmul", "git", "step"}
    assert manifest["seconds"] > 0
    assert run.config["config"]["hidden_sizes"] == [8]
    assert run.config["training"]["eval_every"] == 5
    second = rlkit2.train(CONFIG, DATASET, steps=5, out=tmp_path, eval_every=0, progress=False)
    assert (run.path.name, second.path.name) == ("bc-tiny-walk-v0-001", "bc-tiny-walk-v0-002")
    assert second.evaluations() == []


def test_a_policy_folder_loads_anywhere(tmp_path):
    run = rlkit2.train(
        CONFIG, DATASET, steps=5, seeds=[4, 7], out=tmp_path, eval_every=0, normalize_observations=True, progress=False
    )
    elsewhere = (run.path / "policy").rename(tmp_path / "elsewhere")
    policy = rlkit2.load_policy(elsewhere)
    observations = DATASET.observations[:10].expand(2, 10, 3)
    actions = policy(observations)
    torch.testing.assert_close(actions, run.agent.policy(observations), rtol=0, atol=0)
    assert policy.metadata["agent"] == "bc"
    assert policy.metadata["seeds"] == [4, 7]
    assert (actions.abs() <= 2).all()
    one = rlkit2.load_policy(elsewhere, seed_index=1)
    torch.testing.assert_close(one(observations[1]), actions[1], rtol=0, atol=0)
    evaluation = rlkit2.evaluate(elsewhere, episodes=3, env=Walk)
    assert evaluation.returns.shape == (2, 3)
    np.testing.assert_array_equal(evaluation.returns, rlkit2.evaluate(run, episodes=3, env=Walk).returns)


def test_two_processes_cannot_train_one_run(tmp_path):
    run = tiny_run(tmp_path, CONFIG, DATASET, [0], **SCHEDULE)
    hold = (
        "import fcntl,sys,time;f=open(sys.argv[1],'w');fcntl.flock(f,fcntl.LOCK_EX);print(1,flush=True);time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", hold, str(run.path / ".lock")], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline()
        with pytest.raises(RunError, match="is being trained by another process; wait for it or stop it first"):
            fit(run, DATASET)
        assert run.manifest["status"] == "created"
    finally:
        other.kill()
        other.wait()
    assert fit(run, DATASET).manifest["status"] == "finished"  # the lock of a killed process is gone


def test_runs_started_together_get_folders_of_their_own(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    config = tiny_run(tmp_path / "one", BCConfig(), tiny_dataset(), [0], steps=1).config
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: Run.create(tmp_path, "a b/C", config), range(16)))
    assert sorted(run.path.name for run in runs) == [f"a-b-c-{k:03d}" for k in range(1, 17)]


@dataclasses.dataclass(frozen=True)
class LoudConfig(BCConfig):
    """Behaviour cloning that complains."""


class Loud(BC):
    """Complains about every line of metrics."""

    config_class = LoudConfig

    @classmethod
    def warnings(cls, config, metrics):
        return {"loud": f"loss {metrics['policy/loss']:.1f} is suspicious; lower it"}


def test_a_warning_is_shown_once_per_run_and_not_at_the_bumpy_start(tmp_path):
    text = io.StringIO()
    run = tiny_run(tmp_path, LoudConfig(hidden_sizes=(8,)), DATASET, [0, 1], **{**SCHEDULE, "steps": 80})
    progress = Progress(Console(file=text, width=200))
    fit(run, DATASET, progress=progress)
    (line,) = [line for line in text.getvalue().splitlines() if "suspicious" in line]
    assert line.startswith("warning: seed 0 at step 8: loss")
    run.rewrite({**run.config, "training": {**run.config["training"], "steps": 100}})
    fit(run, DATASET, progress=progress)
    assert text.getvalue().count("suspicious") == 1


@dataclasses.dataclass(frozen=True)
class DivergingConfig(TD3BCConfig):
    """TD3+BC whose values may run away."""

    growth: float = 1.0


class Diverging(TD3BC):
    """Every target is a multiple of what it should be."""

    config_class = DivergingConfig

    def critic_targets(self, batch):
        return super().critic_targets(batch) * self.config.growth ** self.step.view(-1, 1)


@pytest.mark.parametrize("growth", [1.0, 1.5], ids=["sound", "diverging"])
def test_an_agent_that_diverges_says_so(tmp_path, growth):
    text = io.StringIO()
    config = DivergingConfig(hidden_sizes=(16,), growth=growth, critic_learning_rate=0.03, discount=0.5)
    run = tiny_run(tmp_path, config, DATASET, [0], **SCHEDULE)
    fit(run, DATASET, progress=Progress(Console(file=text, width=400)))
    said = [line for line in text.getvalue().splitlines() if "by the data's rewards no policy is worth" in line]
    assert len(said) == int(growth > 1.0)


def test_training_in_a_thread_leaves_signals_alone(tmp_path):
    import threading

    run = tiny_run(tmp_path, CONFIG, DATASET, [0], **SCHEDULE)
    thread = threading.Thread(target=lambda: fit(run, DATASET))
    thread.start()
    thread.join()
    assert run.manifest["status"] == "finished"


def test_compiled_updates_agree_or_are_left_out(tmp_path, monkeypatch):
    """What `compile` gives must move the parameters like the plain update; else the plain one runs and says so."""
    from rlkit2.training import updates

    agent = agent_factory(tiny_run(tmp_path, CONFIG, DATASET, [0], **SCHEDULE).config, DATASET)([0], "cpu")
    before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}

    def wrong(agent, dataset, device):
        def update(rows):
            metrics = agent.update(dataset.gather(rows))
            with torch.no_grad():
                for parameter in agent.actor.parameters():
                    parameter.mul_(1.001)
            return metrics

        return update

    monkeypatch.setattr(updates, "_compiled", wrong)
    _, note = updates.choose_update(agent, DATASET, 16, torch.device("cpu"), "on")
    assert note == "the update runs as written, not compiled: its results differ from those of the plain one"
    monkeypatch.setattr(
        updates, "_compiled", lambda agent, dataset, device: lambda rows: agent.update(dataset.gather(rows))
    )
    _, note = updates.choose_update(agent, DATASET, 16, torch.device("cpu"), "on")
    assert note is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in agent.state_dict().items())


def test_time_is_not_part_of_the_results(tmp_path, monkeypatch):
    """A slow machine shows other lines of progress and the same numbers."""
    quick = contents(fit(tiny_run(tmp_path / "a", CONFIG, DATASET, [0, 1], **SCHEDULE), DATASET))
    clock = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: 100 * clock())
    text = io.StringIO()
    slow = fit(
        tiny_run(tmp_path / "b", CONFIG, DATASET, [0, 1], **SCHEDULE), DATASET, progress=Progress(Console(file=text))
    )
    assert contents(slow) == quick


# actions that the policy cannot reach


@pytest.mark.parametrize("largest", [0.9, 3.0])
@pytest.mark.parametrize(("bound", "settings"), [(np.inf, {}), (np.inf, {"tanh_mean": False}), (4.0, {})])
def test_actions_beyond_a_tanh_are_told(tmp_path, largest, bound, settings):
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1.0, 1.0, (40, 2)).astype(np.float32)
    actions[3, 1] = -largest
    ends = np.arange(40) % 10 == 9
    spec = dataclasses.replace(DATASET.spec, action_space=spaces.Box(-bound, bound, (2,), np.float32))
    rows = rng.normal(size=(40, DATASET.spec.observation_size)).astype(np.float32)
    data = dataset_from_arrays(rows, actions, rng.normal(size=40), rows, ends, ~ends & False, spec=spec)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"steps": 2, "eval_every": 0, "out": tmp_path, "progress": False}
        run = rlkit2.train(BCConfig(hidden_sizes=(8,), **settings), data, **options)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, DatasetWarning)]
    told = any("go up to 3, but the policy's stay within 1: set tanh_mean = false" in text for text in said)
    assert told == bool(run.manifest.get("warnings"))
    assert told == (largest > 1.0 and bound == np.inf and not settings)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_an_update_with_phases_is_recorded_once_for_each(first):
    """Recording executes nothing, playing repeats one phase whatever the host's state: as CUDA graphs do, imitated here on a CPU."""

    def fresh():
        agent = TD3BC(TD3BCConfig(hidden_sizes=(8,), policy_delay=3), 3, 2, seeds=2)
        for _ in range(first):
            agent.update(DATASET.gather(draw()))
        return agent

    def draw():
        return torch.randint(len(DATASET), (2, 16), generator=generator)

    generator = torch.Generator().manual_seed(0)
    plain = fresh()
    generator.manual_seed(0)
    recorded = fresh()
    static = torch.zeros((2, 16), dtype=torch.int64)

    def record():
        phase, state = recorded.phase, recorded.state_dict()
        metrics = dict(recorded.update(DATASET.gather(static)))
        following = recorded.phase
        recorded.load_state_dict(state)
        recorded.phase = following

        def play():
            now, recorded.phase = recorded.phase, phase
            for name, value in recorded.update(DATASET.gather(static)).items():
                metrics[name].copy_(value)
            recorded.phase = now

        return play, metrics

    update = replayed(recorded, record, static)
    assert recorded.phase == first
    for _ in range(7):
        rows = draw()
        expected = plain.update(DATASET.gather(rows))
        found = update(rows)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert plain.phase == recorded.phase
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in recorded.state_dict().items())


def test_what_seeds_that_stop_at_once_leave_is_readable_by_every_command(tmp_path, capsys):
    """Rewards of 1e30: both seeds stop at the first update, before there is a line of metrics or an evaluation."""
    from rlkit2.cli.main import main

    data = tiny_dataset()
    data = data.with_rewards(torch.full((len(data),), 1e30))
    data.to_minari("tiny/huge-v0")
    words = [
        "--dataset",
        "tiny/huge-v0",
        "--hidden-sizes",
        "8",
        "--seeds",
        "2",
        "--env",
        "tests.training.tiny_problem:TinyWalk-v0",
    ]
    assert main(["train", "iql", *words, "--steps", "9", "--out", str(tmp_path)]) == 1
    (run,) = map(Run, tmp_path.glob("iql-*"))
    assert (run.metrics(), run.evaluations(), run.status) == ([], [], "failed")
    env = words[-2:]
    for command in (
        ["evaluate", run.path, "--episodes", "2", *env],
        ["compare", run.path],
        ["compare", run.path, "--episodes", "2"],
        ["report", run.path, "--out", tmp_path / "r.html"],
        ["evaluate", run.path, "--offline", "--steps", "20", "--members", "3"],
    ):
        assert main([str(word) for word in command]) in (0, 1), command
    assert main(["train", "--resume", str(run.path), *env]) == 1
    assert "Traceback" not in capsys.readouterr().err
    run.policy(torch.zeros(2, 4, 3))
    assert run.agent.seeds == (0, 1)


def test_a_policy_of_ones_own_network_is_left_out_with_a_line_and_the_run_stays_whole(tmp_path, capsys):
    made, told = tiny_run(tmp_path, BCConfig(hidden_sizes=(8,)), tiny_dataset(), [0], steps=4, eval_every=0), []

    class Line(torch.nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1, inputs, outputs))

        def forward(self, observations):
            return observations @ self.weight

    class Told(Progress):
        def message(self, text):
            told.append(text)

    def own(agent):
        agent.replace_network("policy", Line(3, 2 * 1))

    run = fit(made, tiny_dataset(), wrap=own, progress=Told(None))
    assert run.status == "finished"
    assert any("policy/ is not written" in line and "Line" in line for line in told), told
    assert not (run.path / "policy").exists()
