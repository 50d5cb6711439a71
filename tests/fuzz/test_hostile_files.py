"""Files that name code: whatever carries them, nothing they name is imported, opened or started."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path

import gymnasium
import pytest
import torch
from gymnasium.envs.registration import EnvSpec, registry
from hypothesis import given, settings
from hypothesis import strategies as st

import rlkit2
from rlkit2.agents.bc import BCConfig
from rlkit2.cli.main import main
from rlkit2.data.known_environments import WRAPPERS, registered_spec
from rlkit2.data.preferences import PreferenceDataset
from rlkit2.data.reward_file import load_rewards, save_rewards
from rlkit2.data.spec import read_env_spec
from rlkit2.errors import EnvironmentUnavailableError, MissingExtraError, RLKitError
from rlkit2.preferences import ScriptedTeacher, collect_preferences
from tests.data.make import FAMILIES, Ending, make_minari
from tests.fuzz.watching import watched
from tests.training.tiny_problem import tiny_dataset

CODE = ("canary:run", "canary.inner:Env", "os:system", "subprocess:run", "builtins:exec", "rlkit2.sweeps.worker:carry_out",
        "gymnasium.envs.registration:load_env_creator", "gymnasium.wrappers:RecordVideo", "importlib:import_module")  # fmt: skip
MODULE_IDS = ("canary:Env-v0", "canary.inner:CartPole-v1", "canary:namespace/Env-v0")
ORDINARY = EnvSpec(
    "CartPole-v1", entry_point="gymnasium.envs.classic_control.cartpole:CartPoleEnv", max_episode_steps=500
)

codes = st.sampled_from(CODE)
texts = st.sampled_from(["/etc/passwd", "../x", "canary:run", "canary.inner.Env", "~", "a\\b", "file://x", "os.system"])
nested = st.recursive(
    texts,
    lambda inner: st.lists(inner, min_size=1, max_size=2) | st.dictionaries(st.just("a"), inner, min_size=1),
    max_leaves=3,
)
wrappers = codes.map(lambda entry: {"name": "W", "entry_point": entry, "kwargs": {}})
bad_arguments = nested.map(
    lambda value: {"name": "W", "entry_point": "gymnasium.wrappers:TimeLimit", "kwargs": {"max_episode_steps": value}}
)
# One change to an ordinary specification that names code or a file.
changes = st.one_of(
    codes.map(lambda entry: {"entry_point": entry}),
    codes.map(lambda entry: {"entry_point": entry, "id": "Unheard-v0"}),
    st.sampled_from(["canary:run", "os:system"]).map(lambda entry: {"vector_entry_point": entry}),
    st.sampled_from(MODULE_IDS).map(lambda name: {"id": name}),
    (wrappers | bad_arguments).map(lambda wrapper: {"additional_wrappers": [wrapper]}),
    nested.map(lambda value: {"kwargs": {"xml_file": value}}),
)


def hostile(**changes):
    return json.dumps({**json.loads(ORDINARY.to_json()), **changes})


@pytest.fixture(autouse=True)
def canary(tmp_path_factory, monkeypatch):
    """A module that can be imported and must not be, beside the folders that may be read."""
    folder = tmp_path_factory.mktemp("importable") / "canary"
    folder.mkdir(parents=True)
    for name in ("__init__", "inner"):
        (folder / f"{name}.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(folder.parent))


@settings(max_examples=300)
@given(changes)
def test_no_specification_builds_what_it_names(change):
    spec = read_env_spec(hostile(**change))
    assert spec is not None
    with (
        watched() as seen,
        pytest.raises(EnvironmentUnavailableError, match=r"would (import|be built with).*--trust-env"),
    ):
        registered_spec(spec, "dataset x")
    assert seen == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | codes,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
fields = st.sampled_from(
    ["id", "entry_point", "kwargs", "additional_wrappers", "max_episode_steps", "vector_entry_point", "order_enforce"]
)


@settings(max_examples=300)
@given(st.dictionaries(fields, json_values))
def test_a_specification_of_any_content_is_read_or_refused(change):
    spec = read_env_spec(hostile(**change))
    if spec is None:
        return
    with watched() as seen:
        try:
            built = registered_spec(spec, "dataset x")
        except (EnvironmentUnavailableError, MissingExtraError):
            pass
        else:
            assert built.entry_point in {known.entry_point for known in registry.values()}
    assert seen == []


@pytest.mark.parametrize("name", sorted(name for name, spec in registry.items() if isinstance(spec.entry_point, str)))
def test_what_gymnasium_registers_stays_as_it_is(name):
    spec = read_env_spec(registry[name].to_json())
    built = registered_spec(spec, "dataset x")
    assert built.to_json() == spec.to_json()


def test_arguments_time_limit_and_harmless_wrappers_stay():
    stored = gymnasium.make("CartPole-v1", sutton_barto_reward=True, max_episode_steps=7)
    for kind in (gymnasium.wrappers.RecordEpisodeStatistics, gymnasium.wrappers.TimeAwareObservation):
        stored = kind(stored)
    spec = read_env_spec(stored.spec.to_json())
    made = gymnasium.make(registered_spec(spec, "dataset x"))
    assert made.spec.to_json() == stored.spec.to_json()
    assert made.observation_space == stored.observation_space
    assert all(hasattr(gymnasium.wrappers, name) for name in WRAPPERS)


def test_an_id_of_the_users_own_is_built_where_it_is_registered():
    spec = EnvSpec("Mine-v0", entry_point="canary:run")
    with pytest.raises(EnvironmentUnavailableError, match="would import canary:run"):
        registered_spec(spec, "dataset x")
    gymnasium.register("Mine-v0", entry_point="canary:run")
    try:
        assert registered_spec(spec, "dataset x").entry_point == "canary:run"
    finally:
        del registry["Mine-v0"]
    assert registered_spec(spec, "dataset x", trust_env=True) is spec


# ---- from end to end ----------------------------------------------------------------------------------------------------


def dataset(change, **metadata):
    """The id of a Minari dataset whose two specifications carry a change, and the path of its metadata."""
    made = make_minari([Ending(6, True, False)] * 4, *FAMILIES["box32"])
    path = Path(made.storage.data_path) / "metadata.json"
    values = {**json.loads(path.read_text()), **metadata}
    for name in ("env_spec", "eval_env_spec"):
        values[name] = hostile(**change)
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))
    return made.id


EXAMPLES = [
    {"entry_point": "canary:run"},
    {"entry_point": "os:system", "id": "Unheard-v0", "kwargs": {"command": "touch x"}},
    {"vector_entry_point": "canary:run"},
    {"id": "canary:Env-v0"},
    {"additional_wrappers": [{"name": "W", "entry_point": "canary:run", "kwargs": {}}]},
]


@pytest.mark.parametrize("change", EXAMPLES)
def test_a_dataset_is_opened_checked_trained_on_and_evaluated(change, tmp_path, capsys):
    name = dataset(change)
    with watched(tmp_path) as seen:
        assert main(["data", "check", name]) in (0, 1)
        run = rlkit2.train(BCConfig(hidden_sizes=(4,)), name, steps=2, out=tmp_path / "runs", progress=True)
        assert main(["evaluate", str(run.path), "--episodes", "1"]) == 2
        assert main(["evaluate", str(run.path / "policy"), "--episodes", "1"]) == 2
        assert main(["compare", str(run.path), "--episodes", "1"]) == 2
    assert seen == []
    assert "canary" not in sys.modules
    printed = capsys.readouterr()
    assert printed.err.count("would import") >= 4  # training without scores, and three refusals
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("change", EXAMPLES[:2])
def test_a_dataset_without_spaces_is_refused(change, tmp_path):
    name = dataset(change, observation_space=..., action_space=...)
    with (
        watched(tmp_path) as seen,
        pytest.raises(rlkit2.errors.DatasetError, match=r"no observation_space.*would import"),
    ):
        rlkit2.load_dataset(name)
    assert seen == []
    assert main(["data", "check", name]) == 2


def test_who_trusts_a_file_runs_what_it_names(tmp_path):
    """The canary sings: the tests above would see it."""
    name = dataset(EXAMPLES[0])
    run = rlkit2.train(BCConfig(hidden_sizes=(4,)), name, steps=2, out=tmp_path / "runs", eval_every=0, progress=False)
    nameless = dataset(EXAMPLES[0], observation_space=..., action_space=...)
    with watched(tmp_path) as seen:
        for use in (
            lambda: rlkit2.evaluate(run, episodes=1, trust_env=True),
            lambda: rlkit2.load_dataset(nameless, trust_env=True),
            lambda: main(["data", "check", nameless, "--trust-env"]),
            lambda: main(["evaluate", str(run.path), "--trust-env"]),
        ):
            with pytest.raises(SystemExit, match="imported"):
                use()
    assert sum("canary" in text for text in seen) >= 4


@pytest.mark.parametrize("kind", ["labels", "rewards", "policy"])
def test_other_files_open_nothing_beyond_their_folder(kind, tmp_path):
    """Names in them lead nowhere: neither out of the folder nor to code."""
    data = tiny_dataset()
    (tmp_path / "secret").write_text("nobody's business")
    folder = tmp_path / "sent"
    folder.mkdir()
    use = {
        "labels": lambda: PreferenceDataset.load(folder),
        "rewards": lambda: load_rewards(folder / "rewards.safetensors", data),
        "policy": lambda: rlkit2.load_policy(folder),
    }[kind]
    if kind == "labels":
        collect_preferences(data, ScriptedTeacher(), 8, length=4).save(folder)
        text = (folder / "preferences.json").read_text()
        description = json.loads(text) | {"tensors": "../secret", "dataset": "canary:run", "source": "canary"}
        (folder / "preferences.json").write_text(json.dumps(description))
    elif kind == "rewards":
        save_rewards(
            folder / "rewards.safetensors", data, torch.zeros(len(data)), {"module": "canary", "file": "../secret"}
        )
    else:
        run = rlkit2.train(
            BCConfig(hidden_sizes=(4,)), data, steps=1, out=tmp_path / "runs", eval_every=0, progress=False
        )
        run.policy.save(folder, {"spec": "../secret", "agent": "canary:Agent"})
    with watched(folder) as seen, suppress(RLKitError):
        use()
    assert seen == []


@pytest.mark.parametrize("change", [{"env": "canary:Env-v0"}, {"agent": "canary:Agent"}, {"agent": "canary.py:Agent"}])
def test_a_run_is_opened_resumed_evaluated_and_reported(change, tmp_path, capsys):
    name = dataset({})
    run = rlkit2.train(BCConfig(hidden_sizes=(4,)), name, steps=2, out=tmp_path / "runs", eval_every=0, progress=False)
    config = json.loads((run.path / "config.json").read_text())
    config["training"]["eval_every"] = 2
    (run.path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "canary.py").write_text("raise SystemExit('imported')\n")
    with watched(tmp_path) as seen:
        for words in (["train", "--resume", run.path, "--steps", "4"], ["evaluate", run.path, "--episodes", "1"],
                      ["compare", run.path], ["report", run.path, "--out", tmp_path / "r.html"]):  # fmt: skip
            assert main([str(word) for word in words]) in (0, 2)
    assert seen == []
    assert "canary" not in sys.modules
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("line", ['agent = "canary:Agent"', 'agent = "bc"\nenv = "canary:Env-v0"'])
def test_recipes_and_sweeps_name_nothing_to_import(line, tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(f'{line}\ndataset = "builtin/rooms"\n')
    (tmp_path / "sweep.toml").write_text(f'[base]\n{line}\ndataset = "builtin/rooms"\n')
    with watched(tmp_path) as seen:
        assert main(["train", "--recipe", str(tmp_path / "recipe.toml")]) == 2
        assert main(["sweep", str(tmp_path / "sweep.toml"), "--dry-run"]) == 2
    assert seen == []
    assert "Traceback" not in capsys.readouterr().err
