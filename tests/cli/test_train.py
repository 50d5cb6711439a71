"""`rlkit2 train` and the commands that follow it, as a user types them."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields

import gymnasium
import pytest

from rlkit2.agents import agent_class, agent_classes, list_agents
from rlkit2.cli.main import main
from rlkit2.cli.train import COMMAND, _parse, examples
from rlkit2.envs.builtin import builtin_recipes
from rlkit2.testing import Problem
from rlkit2.training import DataOptions, OnlineOptions, Run, TrainingOptions
from tests.training.tiny_problem import store_tiny

QUICK = ["--dataset", "tiny/walk-v0", "--steps", "6", "--eval-episodes", "2", "--env", "TinyWalk-v0"]


@pytest.fixture(autouse=True)
def place(roots, monkeypatch):
    """A folder to work in, with one dataset."""
    monkeypatch.chdir(roots)
    store_tiny()
    return roots


def typed(capsys, *arguments, status=0):
    """What a command prints on (standard output, standard error)."""
    assert main([str(argument) for argument in arguments]) == status
    return tuple(capsys.readouterr())


def refused(capsys, *arguments):
    """The one line of a refused command."""
    text = typed(capsys, *arguments, status=2)[1].splitlines()[-1]
    assert text.startswith("rlkit2: ")
    return text


def test_train_evaluate_compare_report(capsys, place):
    """The main job, for two agents."""
    for agent in ("odice", "bc"):
        size = "--policy-hidden-sizes" if agent == "odice" else "--hidden-sizes"
        out, err = typed(capsys, "train", agent, *QUICK, "--seeds", "4,1", size, "8", "8")
        path = f"runs/{agent}-tiny-walk-v0-001"
        assert out.splitlines()[0].startswith(f"{path}: finished at step 6")
        assert "final return: " in out
        assert "seeds 4, 1, 2 episodes each" in out
        assert f"next: rlkit2 evaluate {path}" in out
        assert f"{path}: {agent} on tiny/walk-v0, seeds [4, 1], 6 steps" in err
    run = Run("runs/odice-tiny-walk-v0-001")
    assert run.config["seeds"] == [4, 1]
    assert run.config["config"]["policy_hidden_sizes"] == [8, 8]
    result = json.loads(typed(capsys, "evaluate", run.path, "--episodes", "3", "--json")[0])
    assert [len(line["returns"]) for line in result["results"]] == [3, 3]
    comparison = json.loads(typed(capsys, "compare", *sorted(place.glob("runs/*")), "--baseline", "bc", "--json")[0])
    assert [row["label"] for row in comparison["rows"]] == ["bc", "odice"]
    assert comparison["rows"][1]["probability_of_improvement"] is not None
    typed(capsys, "report", *place.glob("runs/*"), "--out", "report.html")
    assert (place / "report.html").stat().st_size > 10_000


def test_every_option_arrives_where_it_belongs(capsys):
    typed(
        capsys, "train", "odice", *QUICK, "--batch-size", "8", "--log-every", "3", "--eval-every", "0", "--checkpoint-every", "2",
        "--normalize-observations", "--reward-transform", "return_range", "--reward-scale", "0.5", "--device", "cpu", "--compile", "off",
        "--lambda", "0.7", "--no-value-layer-norm", "--log-std-bounds", "-4", "1", "--weight-clamp", "none", "--gradient-rule=semi",
        "--value-hidden-sizes", "8", "--policy-hidden-sizes", "4", "--out", "there", "--steps", "8e0",
    )  # fmt: skip
    config = Run("there/odice-tiny-walk-v0-001").config
    assert config["training"] == {
        "steps": 8, "batch_size": 8, "log_every": 3, "eval_every": 0, "eval_episodes": 2, "checkpoint_every": 2,
        "stop_when": None, "patience": 5, "schedule": "constant", "policy_ema": 0.9999, "refine_from": None,
    }  # fmt: skip
    assert config["data"] == {
        "normalize_observations": True, "reward_transform": "return_range", "reward_scale": 0.5, "frame_stack": 1,
        "held_out": 0.0, "num_steps": 1,
    }  # fmt: skip
    given = {
        "lambda_": 0.7, "value_layer_norm": False, "log_std_bounds": [-4.0, 1.0], "weight_clamp": None, "gradient_rule": "semi",
        "value_hidden_sizes": [8], "policy_hidden_sizes": [4],
    }  # fmt: skip
    assert {name: config["config"][name] for name in given} == given
    assert config["config"]["discount"] == 0.99
    assert config["env"] == "TinyWalk-v0"


def test_a_recipe_file_names_agent_and_dataset_and_options_win_over_it(capsys, place):
    (place / "mine.toml").write_text(
        'agent = "bc"\ndataset = "tiny/walk-v0"\n[config]\nhidden_sizes = [8]\nlearning_rate = 0.1\n[training]\nsteps = 4\n'
    )
    typed(capsys, "train", "--recipe", "mine.toml", "--learning-rate", "0.2", "--eval-every", "0")
    config = Run("runs/bc-tiny-walk-v0-001").config
    assert (config["config"]["learning_rate"], config["config"]["hidden_sizes"]) == (0.2, [8])
    assert config["training"]["steps"] == 4
    typed(capsys, "train", "bc", "--recipe", "mine.toml", "--eval-every", "0")
    assert Run("runs/bc-tiny-walk-v0-002").config["config"]["learning_rate"] == 0.1
    assert "recipe mine.toml is for bc, not odice" in refused(capsys, "train", "odice", "--recipe", "mine.toml")
    assert "recipe none.toml does not exist" in refused(capsys, "train", "--recipe", "none.toml")


def test_no_recipe_is_taken_where_none_is_wanted(capsys, place, monkeypatch):
    folder = place / "recipes" / "bc"
    folder.mkdir(parents=True)
    (folder / "walk.toml").write_text('agent = "bc"\ndataset = "tiny/walk-v0"\n[config]\nlearning_rate = 0.1\n')
    monkeypatch.setattr("rlkit2.training.recipe.recipe_folder", lambda kind: folder.parent)
    typed(capsys, "train", "bc", *QUICK, "--hidden-sizes", "8")
    typed(capsys, "train", "bc", *QUICK, "--hidden-sizes", "8", "--recipe", "none")
    first, second = (Run(f"runs/bc-tiny-walk-v0-00{number}").config for number in (1, 2))
    assert (first["config"]["learning_rate"], second["config"]["learning_rate"]) == (0.1, 3e-4)
    assert (first["recipe"], second["recipe"]) == (str(folder / "walk.toml"), None)
    assert "no agent is named" in refused(capsys, "train", "--recipe", "none")


def test_resume_prolongs_a_run(capsys):
    typed(capsys, "train", "bc", *QUICK, "--hidden-sizes", "8")
    out, _ = typed(capsys, "train", "--resume", "runs/bc-tiny-walk-v0-001", "--steps", "9")
    assert "runs/bc-tiny-walk-v0-001: finished at step 9" in out
    assert "cannot be resumed with 3" in refused(
        capsys, "train", "--resume", "runs/bc-tiny-walk-v0-001", "--steps", "3"
    )
    assert "only steps may change" in refused(
        capsys, "train", "--resume", "runs/bc-tiny-walk-v0-001", "--batch-size", "3"
    )
    assert "nothing does not exist" in refused(capsys, "train", "--resume", "nothing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["odcie"], "unknown agent 'odcie'; did you mean odice?"),
        (["xyz"], "unknown agent 'xyz'; there are awac, bc, "),
        (["odice", "--lamda", "1"], "unknown option '--lamda'; did you mean --lambda or --gae-lambda?"),
        (["odice", "--policy_hidden_size", "8"], "did you mean --policy-hidden-sizes"),
        (["odice", "--zzz"], "unknown option '--zzz'; rlkit2 train odice --help shows all options"),
        (["--learning-rate", "3"], "unknown option '--learning-rate'; name the agent first"),
        (["--steps", "5", "odice"], "the agent comes first: rlkit2 train odice ..."),
        (["odice", "5"], "unexpected argument '5'"),
        (["odice"], "no dataset is named; give one"),
        ([], "no agent is named; choose one of: "),
        (["odice", "--dataset", "tiny/wolk-v0"], "tiny/walk-v0"),
        (["odice", "--dataset", "tiny/walk-v0", "--lambda", "x"], "lambda_ must be a number in (0, 1), not 'x'"),
        (["odice", "--dataset", "tiny/walk-v0", "--lambda", "1.5"], "lambda_ must be a number in (0, 1), not 1.5"),
        (["odice", "--dataset", "tiny/walk-v0", "--steps", "some"], "steps must be a whole number of at least 1, not 'some'"),
        (["odice", "--dataset", "tiny/walk-v0", "--seeds", "two"], "--seeds must be a number of seeds or seeds with commas between, not 'two'"),
        (["odice", "--dataset", "tiny/walk-v0", "--seeds", "0"], "seeds must be a positive number or distinct integers, not 0"),
        (["odice", "--dataset", "tiny/walk-v0", "--device", "abacus"], "device 'abacus' cannot be used here"),
        (["odice", "--dataset", "tiny/walk-v0", "--logger", "pen"], "unknown logger 'pen'; there are tensorboard, wandb, trackio"),
        (["odice", "--dataset", "tiny/walk-v0", "--env", "Nothing-v9"], "environment Nothing-v9 cannot be built"),
        (["odice", "--dataset", "tiny/walk-v0", "--env", "CartPole-v1"], "CartPole-v1 gives observations of 4 columns"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_with_the_mend(capsys, place, arguments, message):
    assert message in refused(capsys, "train", *arguments)
    assert not (place / "runs").exists()


def test_a_dataset_without_an_environment_trains_without_scores_and_says_so(capsys):
    out, err = typed(capsys, "train", "bc", "--dataset", "tiny/walk-v0", "--steps", "3", "--hidden-sizes", "4")
    assert "training without scores: dataset tiny/walk-v0 names no environment; name one with --env ID" in err
    assert "final" not in out


def test_a_run_all_of_whose_seeds_failed_exits_with_one(capsys, monkeypatch):
    from rlkit2.agents.bc import BC

    update = BC.update
    monkeypatch.setattr(BC, "update", lambda self, batch: {**update(self, batch), "policy/loss": self.step / 0.0})
    out, err = typed(capsys, "train", "bc", *QUICK, "--hidden-sizes", "4", status=1)
    assert "runs/bc-tiny-walk-v0-001: failed at step 1" in out
    assert "seed 0 stopped at step 1 (policy/loss was not finite)" in err


@pytest.mark.parametrize("agent", list_agents())
def test_help_explains_every_field_of_every_agent(capsys, agent):
    with pytest.raises(SystemExit) as end:
        main(["train", agent, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    own = dict.fromkeys(field.name for cls in agent_classes(agent) for field in fields(cls.config_class))
    names = [*(field.name for cls in (TrainingOptions, DataOptions, OnlineOptions) for field in fields(cls)), *own]
    assert len({*names, *COMMAND, "logger"}) == len(names) + len(COMMAND) + 1  # no option hides another
    for name in (*names, *COMMAND, "logger"):
        assert f"--{name.rstrip('_').replace('_', '-')}" in text
    assert "rlkit2 train" in text


def test_help_without_an_agent_lists_the_agents(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n  {agent} " in text for agent in list_agents())
    assert "rlkit2 train odice --dataset builtin/" in " ".join(text.split())


@pytest.mark.parametrize("agent", list_agents())
def test_examples_are_of_the_agent_and_work_on_a_fresh_machine(agent, monkeypatch):
    """Built-in datasets whose actions the agent takes, options that it has; nothing that only its authors' machines hold."""
    lines = [line.strip() for line in examples(agent).splitlines() if line.startswith("  rlkit2 train")]
    assert len(lines) >= 2
    for line in lines:
        words = shlex.split(line)[2:]
        given = _parse(agent, words[1:] if words[0] == agent else words)
        if "resume" in given:
            continue
        if "online" in given:
            discrete = isinstance(gymnasium.make(given["env"]).action_space, gymnasium.spaces.Discrete)
            Problem(agent_class(agent), "discrete" if discrete else "continuous").build(1)
            continue
        assert given["dataset"] in builtin_recipes()
        discrete = any(name in given["dataset"] for name in ("cartpole", "gridworld"))
        Problem(agent_class(agent), "discrete" if discrete else "continuous").build(1)
