"""Recipes, and configs given by name, file, object and override."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

import rlkit2
from rlkit2.agents import agent_class, agent_classes, list_agents, make_config
from rlkit2.errors import ConfigError
from rlkit2.fields import Count, field_types, read_fields, read_texts
from rlkit2.recipes import recipe_folder
from rlkit2.training import DataOptions, TrainingOptions, describe_fields, find_recipe, load_recipe, options
from tests.training.tiny_problem import Walk, tiny_dataset

RECIPE = """
agent = "bc"
dataset = "tiny/walk-v0"
[config]
hidden_sizes = [8]
learning_rate = 1
[data]
reward_scale = 2.0
[training]
steps = 12
eval_every = 0
"""


def written(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


def test_a_recipe_gives_what_it_says_and_leaves_the_rest(tmp_path):
    recipe = load_recipe(written(tmp_path, RECIPE))
    assert (recipe.agent, recipe.dataset) == ("bc", "tiny/walk-v0")
    assert recipe.config == {"hidden_sizes": (8,), "learning_rate": 1.0}
    assert isinstance(recipe.config["learning_rate"], float)
    assert recipe.data == {"reward_scale": 2.0}
    assert recipe.training == {"steps": 12, "eval_every": 0}


def test_a_recipe_trains_and_what_is_given_beside_it_wins(tmp_path):
    path = written(tmp_path, RECIPE)
    dataset = tiny_dataset()
    run = rlkit2.train(
        path,
        dataset,
        steps=6,
        seeds=2,
        out=tmp_path,
        overrides={"learning_rate": 0.5},
        reward_scale=3.0,
        progress=False,
    )
    assert run.config["config"]["hidden_sizes"] == [8]
    assert run.config["config"]["learning_rate"] == 0.5
    assert run.config["data"]["reward_scale"] == 3.0
    assert (run.config["training"]["steps"], run.config["training"]["eval_every"]) == (6, 0)
    assert run.config["recipe"] == str(path)
    assert run.config["dataset"]["id"] == "tiny/walk-v0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("hidden_sizes", "hiden_sizes"), r"BCConfig has no field 'hiden_sizes'; did you mean hidden_sizes\?"),
        (("[training]", "[trainingg]"), r"unknown entry 'trainingg'; did you mean training\?"),
        (("steps = 12", "steps = 'a'"), r"steps must be a whole number of at least 1, not 'a'"),
        (("steps = 12", "steps = true"), r"steps must be a whole number of at least 1, not True"),
        (("[8]", "[8.5]"), r"hidden_sizes must be \[a whole number of at least 1, \.\.\.\], not \[8\.5\]"),
        (("[8]", "8"), r"hidden_sizes must be \[a whole number of at least 1, \.\.\.\], not 8"),
        (("reward_scale = 2.0", "reward_scale = 'x'"), r"reward_scale must be a number that is finite, not 'x'"),
        (('agent = "bc"', 'agent = "bd"'), "unknown agent 'bd'"),
        (('agent = "bc"', ""), r'does not name its agent; add a line agent = "\.\.\." at the top'),
        (('dataset = "tiny/walk-v0"', ""), "does not name its dataset"),
        (("[data]", "data = 3\n[other]"), "data must be a section|unknown entry"),
        (("agent =", "agent"), "is not readable TOML"),
    ],
)
def test_a_wrong_recipe_names_the_file_the_field_and_the_mend(tmp_path, change, message):
    path = written(tmp_path, RECIPE.replace(*change))
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"recipe .*nothing\.toml does not exist"):
        load_recipe(tmp_path / "nothing.toml")


@pytest.mark.parametrize(
    "path", sorted(recipe_folder("agents").glob("*/*.toml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_shipped_recipes_can_be_read_and_are_found_by_agent_and_dataset(path):
    recipe = load_recipe(path)
    make_config(recipe.agent, **recipe.config)
    TrainingOptions(**recipe.training)
    DataOptions(**recipe.data)
    assert find_recipe(recipe.agent, recipe.dataset).path == path


def test_without_a_recipe_the_defaults_hold(tmp_path):
    assert find_recipe("bc", "no/such-v0") is None
    run = rlkit2.train("bc", tiny_dataset(), steps=2, out=tmp_path, eval_every=0, progress=False)
    assert run.config["recipe"] is None
    assert run.config["config"]["hidden_sizes"] == [256, 256]


@pytest.mark.parametrize("agent", list_agents())
def test_every_field_of_every_agent_has_a_type_a_default_and_a_meaning(agent):
    for cls in agent_classes(agent):
        rows = describe_fields(cls.config_class)
        assert [row[0] for row in rows] == [field.name for field in dataclasses.fields(cls.config_class)]
        for name, kind, default, meaning in rows:
            assert len(meaning) > 3, f"{agent}.{name} has no comment"
            assert not kind.startswith("<class"), f"{agent}.{name}: {kind}"
            assert default is not dataclasses.MISSING, f"{agent}.{name} has no default"


@pytest.mark.parametrize("cls", [TrainingOptions, DataOptions])
def test_every_option_of_the_trainer_has_a_meaning(cls):
    assert all(len(meaning) > 10 for _, _, _, meaning in describe_fields(cls))


@pytest.mark.parametrize("agent", list_agents())
def test_a_config_survives_json(agent):
    import json

    config = make_config(agent)
    again = read_fields(type(config), json.loads(json.dumps(dataclasses.asdict(config))))
    assert type(config)(**again) == config


def test_what_is_typed_is_read_by_the_type_of_its_field():
    config_class = agent_class("odice").config_class
    typed = {
        "lambda_": "0.7",
        "gradient_rule": "semi",
        "num_values": "1e0",
        "value_layer_norm": "False",
        "policy_hidden_sizes": ("4", "4"),
        "residual_clip": "none",
        "tanh_mean": True,
    }
    assert read_texts(config_class, typed) == {
        "lambda_": 0.7,
        "gradient_rule": "semi",
        "num_values": 1,
        "value_layer_norm": False,
        "policy_hidden_sizes": (4, 4),
        "residual_clip": None,
        "tanh_mean": True,
    }
    for name, text, message in (
        ("lambda", "1", r"no field 'lambda'; did you mean lambda_\?"),
        ("num_values", "1.5", "num_values must be a whole number of at least 1, not 1.5"),
        ("lambda_", "none", r"lambda_ must be a number in \(0, 1\), not 'none'"),
        ("lambda_", "nan", r"lambda_ must be a number in \(0, 1\), not nan"),
        ("value_layer_norm", "yes", "value_layer_norm must be true or false, not 'yes'"),
        (
            "policy_hidden_sizes",
            ("4", "x"),
            r"policy_hidden_sizes must be \[a whole number of at least 1, \.\.\.\] or none, not '4 x'",
        ),
        ("policy_hidden_sizes", ("0",), r"policy_hidden_sizes must be .*, not \[0\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_texts(config_class, {name: text})


@pytest.mark.parametrize("agent", list_agents())
def test_what_is_shown_can_be_typed(agent):
    """Every default, written as `--help` shows it, is read as itself."""
    config = make_config(agent)
    for field, value in dataclasses.asdict(config).items():
        text = (
            tuple(map(str, value))
            if isinstance(value, tuple)
            else str(value).lower()
            if value in (None, True, False)
            else str(value)
        )
        assert read_texts(type(config), {field: text}) == {field: value}


def test_an_option_is_written_once(monkeypatch):
    """A new field of the options is an argument of `train`, an option of the command line, a field of recipes and part of the run's config."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class More(TrainingOptions):
        # how often the dataset is shuffled
        shuffles: Count = 3

    monkeypatch.setitem(options.SECTIONS, "training", More)

    @options.show_options
    def example(*, seeds=1, **options):
        """Example.

        Args:
            seeds: n.
            **options: see above.
        """

    assert "shuffles: how often the dataset is shuffled (default 3); a whole number of at least 1." in example.__doc__
    assert list(inspect.signature(example).parameters)[-5:] != []
    assert "shuffles" in inspect.signature(example).parameters
    training, *_ = options.read_options({"shuffles": 5})
    assert dataclasses.asdict(More(**training))["shuffles"] == 5
    with pytest.raises(ConfigError, match="shuffles must be a whole number of at least 1"):
        options.read_options({"shuffles": 0})
    from rlkit2.cli.train import _parse

    assert _parse(None, ["--shuffles", "4"]) == {"shuffles": "4"}


def test_train_shows_its_options():
    signature = inspect.signature(rlkit2.train)
    assert set(field_types(TrainingOptions)) | set(field_types(DataOptions)) < set(signature.parameters)
    for cls in (TrainingOptions, DataOptions):
        assert all(f"{name}: " in rlkit2.train.__doc__ for name in field_types(cls))
    with pytest.raises(ConfigError, match="there is no option 'stepz'; did you mean steps"):
        rlkit2.train("bc", "x", stepz=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"eval_every": -1}, r"eval_every must be a whole number of at least 0 or none, not -1"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        (
            {"reward_transform": "nothing"},
            "reward_transform must be one of none, return_range, goal_penalty, not 'nothing'",
        ),
        ({"overrides": {"learning_rat": 1.0}}, r"no field 'learning_rat'; did you mean learning_rate\?"),
        ({"overrides": {"fraction": 2.0}}, r"fraction must be a number in \(0, 1\], not 2\.0"),
        ({"device": "tpu9"}, "device 'tpu9' cannot be used here"),
        ({"compile": "fast"}, "compile must be auto, on or off, not 'fast'"),
        ({"seeds": []}, "seeds must be a positive number or distinct integers"),
        ({"seeds": [1, 1]}, "seeds must be a positive number or distinct integers"),
    ],
)
def test_wrong_options_are_refused_before_a_folder_is_made(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        rlkit2.train(
            "bc", tiny_dataset(), **{"steps": 2, "out": tmp_path / "runs", "env": Walk, "progress": False, **options}
        )
    assert not (tmp_path / "runs").exists()


def test_what_is_missing_is_said():
    with pytest.raises(ConfigError, match="no agent is named; choose one of: awac, bc"):
        rlkit2.train()
    with pytest.raises(ConfigError, match="no dataset is named; give one, for example: rlkit2 train bc --dataset"):
        rlkit2.train("bc")
    with pytest.raises(ConfigError, match="unknown agent 'nothing'"):
        rlkit2.train("nothing", tiny_dataset())
