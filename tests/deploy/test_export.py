"""Exported policies act as the policy does, in every format, for every kind of space; what would not is never written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rlkit2
from rlkit2.agents import make_agent, make_config, make_normalizer
from rlkit2.agents.bc import BCConfig
from rlkit2.cli.main import main
from rlkit2.data import DatasetSpec
from rlkit2.deploy import export_policy, formats
from rlkit2.deploy.export import compare, describe
from rlkit2.deploy.formats import FORMATS, NOTE, exported_program
from rlkit2.deploy.graph import LayeredMLP, PolicyGraph
from rlkit2.errors import ConfigError, MissingExtraError
from rlkit2.nn import Policy, load_policy
from rlkit2.nn.mlp import StackedMLP
from tests.agents.test_interface import ACTIONS, OBSERVATIONS, made, samples
from tests.training.tiny_problem import Walk, tiny_dataset

WITHOUT_EXTRA = ["torch.export", "torchscript", "safetensors"]


@pytest.fixture(scope="module", autouse=True)
def operators_are_read_once() -> Iterator[None]:
    """torch.onnx reads the source of every operator it knows anew at each export, which is a quarter of the time."""
    with pytest.MonkeyPatch.context() as patch:
        with suppress(ImportError, AttributeError):  # not public
            from torch.onnx._internal.exporter._registration import onnxscript_apis

            patch.setattr(onnxscript_apis, "get_torchlib_ops", cache(onnxscript_apis.get_torchlib_ops))
        yield


def onnx() -> None:
    for module in FORMATS["onnx"].modules:
        pytest.importorskip(module)


def standardised(name: str = "dict", frames: int = 3, seeds: int = 1) -> Policy:
    """On stacks of a dictionary with image, choice and numbers, which are standardised."""
    spec = DatasetSpec(observation_space=OBSERVATIONS[name], action_space=ACTIONS["box"], id="some/set-v0").stacked(
        frames
    )
    draw = torch.Generator().manual_seed(0)
    mean, std = (
        torch.randn(spec.observation_size, generator=draw),
        torch.rand(spec.observation_size, generator=draw) + 0.5,
    )
    normalizer = make_normalizer(spec, seeds=seeds, observation_mean=mean, observation_std=std)
    policy = make_agent(BCConfig(hidden_sizes=(16, 16)), spec, seeds=seeds, normalizer=normalizer).policy
    policy.metadata["spec"] = spec.to_json()
    return policy


def act(path: Path, policy: Policy, sampling: bool = False) -> Any:
    """The file as a function."""
    name = next(kind.name for kind in FORMATS.values() if path.suffix in kind.suffixes)
    return FORMATS[name].load(path, PolicyGraph(policy, sampling))


@pytest.mark.parametrize("format", [*FORMATS])
@pytest.mark.parametrize("sampling", [False, True])
def test_a_stacking_policy_of_a_dictionary_is_one_file(format: str, sampling: bool, tmp_path: Path) -> None:
    if format == "onnx":
        onnx()
    policy, path = standardised(), tmp_path / f"new/policy{FORMATS[format].suffixes[0]}"
    done = export_policy(policy, path, sampling=sampling)
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert done.difference is not None
    assert done.difference < 1e-5
    names = ["observation.a", "observation.b.a", "observation.b.z", "history", "episode_start"]
    assert [port.name for port in done.inputs] == [*names, *(["noise"] if sampling else [])]
    assert [str(port) for port in done.outputs] == ["action float32 [B, 2]", "next_history float32 [B, 3, 35]"]
    run = act(path, policy, sampling)
    seen = samples(OBSERVATIONS["dict"], 4)
    state, history = None, np.zeros((1, 3, 35), np.float32)
    for step, one in enumerate(seen):
        start = step in (0, 2)
        given = [one["a"][None], np.array([one["b"]["a"]]), one["b"]["z"][None], history, np.array([start])]
        noise = torch.Generator().manual_seed(step)
        if sampling:
            given.append(torch.randn(1, 1, 2, generator=noise)[0].numpy())
        wanted, state = policy.predict(one, state, start, not sampling, torch.Generator().manual_seed(step))
        action, history = run(given)
        np.testing.assert_allclose(action[0], wanted, atol=1e-5)
        np.testing.assert_array_equal(history[0], state)


PAIRS = [(one, "box") for one in OBSERVATIONS] + [("box", one) for one in ACTIONS if one != "box"]


@pytest.mark.parametrize(("observation", "action"), PAIRS, ids=map("-".join, PAIRS))
def test_every_space_is_exported(observation: str, action: str, tmp_path: Path) -> None:
    """Each space by one of the formats that need nothing more; the check of the export itself compares 1,000 observations."""
    policy = made(OBSERVATIONS[observation], ACTIONS[action])
    place = PAIRS.index((observation, action))
    format = "torchscript" if place % 5 else "torch.export"
    sampling = place % 2 == 1
    done = export_policy(policy, tmp_path / "policy", format=format, sampling=sampling)
    whole = done.difference is None
    assert whole == (action in ("whole", "discrete", "multidiscrete", "multibinary", "tuple"))
    assert done.differing == 0
    assert done.observations == 1000
    assert [port.name for port in done.outputs] == {
        "dict": ["action.a.c", "action.b"],
        "tuple": ["action.0", "action.1"],
    }.get(action, ["action"])


@pytest.mark.parametrize(
    ("agent", "action", "head"),
    [
        ("bc", "discrete", "categorical"),
        ("dqn", "discrete", "greedy"),
        ("td3bc", "box", "deterministic"),
        ("sacn", "box", "squashed_gaussian"),
        ("bc", "multidiscrete", "multicategorical"),
    ],
)
def test_every_head_is_exported(agent: str, action: str, head: str, tmp_path: Path) -> None:
    """To ONNX, where it is installed."""
    small = {"hidden_sizes": (8,), **({"num_critics": 3, "prior_scale": 1.0} if agent == "dqn" else {})}
    spec = DatasetSpec(observation_space=OBSERVATIONS["box"], action_space=ACTIONS[action])
    policy = make_agent(make_config(agent, **small), spec).policy
    assert policy.actor.head == head
    format = "onnx" if all(map(installed, FORMATS["onnx"].modules)) else "torchscript"
    sampling = head not in ("greedy", "deterministic")
    done = export_policy(policy, tmp_path / "policy", format=format, sampling=sampling)
    assert done.differing == 0
    if not sampling:
        with pytest.raises(ConfigError, match=f"the policy is {head}, so there is nothing to sample"):
            export_policy(policy, tmp_path / "other", format=format, sampling=True)


def installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    run = rlkit2.train(
        BCConfig(hidden_sizes=(8,)), tiny_dataset(), steps=4, seeds=[3, 8], eval_every=0, out=tmp_path, progress=False
    )
    for suffix, read in ((".pt2", torch.export.load), (".ts", torch.jit.load)):
        done = rlkit2.export(run, tmp_path / f"policy{suffix}", seed=8)
        assert done.seed == 8
        note = {NOTE: ""}
        read(str(done.path), **({"extra_files": note} if suffix == ".pt2" else {"_extra_files": note}))
        found = json.loads(note[NOTE])
        assert found["seed"] == 8
        assert found["dataset"] == "tiny/walk-v0"
        assert found["content_hash"] == run.config["dataset"]["content_hash"]
        assert (found["agent"], found["step"], found["actions"]) == ("bc", 4, "mode")
        assert [port["name"] for port in found["inputs"]] == ["observation"]
    done = rlkit2.export(run, tmp_path / "policy.safetensors", seed=8)
    loaded = rlkit2.load_policy(done.path)
    assert loaded.seeds == (8,)
    np.testing.assert_array_equal(
        rlkit2.evaluate(done.path, episodes=2, env=Walk).returns, rlkit2.evaluate(run, episodes=2, env=Walk).returns[1:]
    )
    with pytest.raises(ConfigError, match="there is no seed 5; seeds: 3, 8"):
        rlkit2.export(run, tmp_path / "other.pt2", seed=5)


def test_onnx_says_what_it_is(tmp_path: Path) -> None:
    onnx()
    import onnx as library

    export_policy(standardised(), tmp_path / "policy.onnx", facts={"agent": "iql"})
    model = library.load(str(tmp_path / "policy.onnx"), load_external_data=False)
    library.checker.check_model(model)
    found = json.loads({prop.key: prop.value for prop in model.metadata_props}["rlkit2"])
    assert found["agent"] == "iql"
    assert found["inputs"][0] == {
        "name": "observation.a",
        "dtype": "float32",
        "shape": [2],
        "meaning": "observation as the environment has it",
    }
    assert all(port.type.tensor_type.shape.dim[0].dim_param for port in (*model.graph.input, *model.graph.output))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = rlkit2.train(
        BCConfig(hidden_sizes=(8,)), tiny_dataset(), steps=6, seeds=2, checkpoint_every=3, eval_every=0, out=tmp_path, progress=False
    )  # fmt: skip
    assert main(["export", str(run.path), "--out", str(tmp_path / "a.ts")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'a.ts'}: torchscript, mode of seed 0 of 0, 1 (--seed K)\n")
    assert "  in observation float32 [B, 3]: observation as the environment has it\n" in out
    assert " out action float32 [B, 2]: action as the environment has it\n" in out
    assert "1,000 observations: actions differ from the policy's by at most " in out
    words = ["--checkpoint", "3", "--seed", "1", "--sampling", "--json"]
    assert main(["export", str(run.path), "--out", str(tmp_path / "b.safetensors"), *words]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 1
    seen = torch.zeros(1, 3)
    expected = run.at(3).policy(seen.expand(2, 1, 3))[1]
    torch.testing.assert_close(load_policy(tmp_path / "b.safetensors")(seen), expected)
    assert main(["export", str(run.path / "policy"), "--out", str(tmp_path / "c.ts"), "--seed", "1"]) == 0
    capsys.readouterr()
    for words, message in (
        (["--out", str(tmp_path / "a.ts")], "a.ts is there already; name another file or remove it"),
        (
            ["--out", str(tmp_path / "a.bin")],
            "does not say its format: give --format (format=...), or one of the suffixes .onnx (onnx), .pt2",
        ),
        (["--out", str(tmp_path / "d.ts"), "--seed", "7"], "there is no seed 7; seeds: 0, 1"),
        (["--out", str(tmp_path / "d.ts"), "--checkpoint", "5"], "has no checkpoint of step 5"),
    ):
        assert main(["export", str(run.path), *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_file_that_would_differ_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = made(OBSERVATIONS["box"], ACTIONS["box"])
    honest = LayeredMLP.forward
    monkeypatch.setattr(LayeredMLP, "forward", lambda self, inputs, **options: honest(self, inputs, **options) + 0.01)
    with pytest.raises(
        ConfigError,
        match=r"would differ from the policy: actions by up to 0\.0\d+ \(tolerance 0.0001 of the range\); nothing",
    ):
        export_policy(policy, tmp_path / "policy.ts")
    assert not list(tmp_path.iterdir())
    choices = made(OBSERVATIONS["box"], ACTIONS["discrete"])
    monkeypatch.setattr(LayeredMLP, "forward", lambda self, inputs, **options: -honest(self, inputs, **options))
    with pytest.raises(ConfigError, match=r"would differ from the policy: \d{3,4} whole-numbered actions"):
        export_policy(choices, tmp_path / "policy.ts")


@pytest.mark.parametrize("fault", ["history", "start", "order", "bounds"])
def test_the_check_sees_faults_of_every_part(fault: str) -> None:
    policy = standardised()
    graph = PolicyGraph(policy)

    def wrong(inputs: list[Any]) -> list[Any]:
        inputs = list(inputs)
        if fault == "history":
            inputs[3] = inputs[3][:, ::-1].copy()
        elif fault == "start":
            inputs[4] = np.zeros_like(inputs[4])
        elif fault == "order":
            inputs[0] = inputs[0][:, ::-1].copy()
        found = [tensor.numpy() for tensor in graph(*map(torch.from_numpy, inputs))]
        return [1.5 * found[0], *found[1:]] if fault == "bounds" else found

    assert compare(wrong, graph, policy)[2] > 1e-3


def test_several_seeds_and_networks_of_ones_own_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a graph holds one policy"):
        export_policy(made(OBSERVATIONS["box"], ACTIONS["box"], seeds=2), tmp_path / "policy.ts")
    policy = made(OBSERVATIONS["box"], ACTIONS["box"])
    policy.actor.network = torch.nn.Linear(3, 2)
    with pytest.raises(ConfigError, match="a policy on Linear cannot be"):
        export_policy(policy, tmp_path / "policy.ts")


def test_without_the_extra_it_is_named_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(
        MissingExtraError, match=r"onnx is not installed; install it with: pip install 'rlkit2\[export\]'"
    ):
        export_policy(made(OBSERVATIONS["box"], ACTIONS["box"]), tmp_path / "new" / "policy.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("members", [None, 2])
@pytest.mark.parametrize("output", [None, 3])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_layers_on_their_own_compute_the_same(members: int | None, output: int | None, layer_norm: bool) -> None:
    network = StackedMLP(4, (5, 6), output, seeds=[1, 2], members=members, layer_norm=layer_norm, dtype=torch.float64)
    inputs = torch.randn(2, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(LayeredMLP(network)(inputs), network(inputs).detach())


def test_what_is_quiet_stays_usable(capsys: pytest.CaptureFixture[str]) -> None:
    graph = PolicyGraph(made(OBSERVATIONS["box"], ACTIONS["box"]))
    exported_program(graph)
    assert capsys.readouterr() == ("", "")
    assert describe(graph, made(OBSERVATIONS["box"], ACTIONS["box"]), FORMATS["onnx"], {})["frames"] == 1
    assert formats.EXTRA == "export"
