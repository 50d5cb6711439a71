"""Pages name what exists: every agent, where its code is, the floors in the linter's order, the functions of the walk."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from pathlib import Path

import pytest

from rlkit2.agents import agent_class, list_agents, plain_name

ROOT = Path(__file__).parents[1]
WALK = re.findall(r"`([\w/]+\.py):([\w.]+)`", (ROOT / "docs/walk.md").read_text())


@pytest.mark.parametrize("page", ["README.md", "agents/README.md"])
def test_every_agent_is_named(page: str) -> None:
    text = (ROOT / page).read_text()
    assert not [name for name in list_agents() if not re.search(rf"`{name}`|\[{name}\]", text)]


@pytest.mark.parametrize("name", sorted({plain_name(name) for name in list_agents()}))
def test_a_card_says_where_the_code_is(name: str) -> None:
    path = agent_class(name).__module__.replace(".", "/") + ".py"
    assert f"`{path}`" in (ROOT / "agents" / name / "README.md").read_text()
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_floors_are_named_in_the_order_of_the_linter(page: str) -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    floors = [room.strip().removeprefix("rlkit2.") for layer in layers for room in layer.split("|")]
    text = (ROOT / page).read_text().lower()
    sentence = text[text.index("imports run only downwards") :]
    assert re.findall(r"`(\w+)`", sentence)[: len(floors)] == floors


def test_the_walk_is_not_empty() -> None:
    assert {path.split("/")[0] for path, _ in WALK} >= {
        "data",
        "agents",
        "losses",
        "training",
        "evaluation",
        "reporting",
    }


@pytest.mark.parametrize(("path", "name"), WALK, ids=lambda part: str(part))
def test_the_walk_names_what_exists(path: str, name: str) -> None:
    names = ast.parse((ROOT / "rlkit2" / path).read_text()).body
    for part in name.split("."):
        found = [node for node in names if getattr(node, "name", None) == part]
        assert found, f"{path} has no {name}"
        names = getattr(found[0], "body", [])
    module = importlib.import_module("rlkit2." + path.removesuffix(".py").replace("/", "."))
    assert module.__name__
