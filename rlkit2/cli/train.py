"""`rlkit2 train AGENT --dataset ID`: train an agent, several seeds together, or resume a run that was stopped."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypedDict

import tyro
from rich.console import Console
from tyro.conf import OmitArgPrefixes

from rlkit2.agents import (
    agent_class,
    agent_classes,
    class_name,
    import_agent,
    list_agents,
    make_config,
    read_config,
)
from rlkit2.api import train, train_online
from rlkit2.cli import output
from rlkit2.cli.parsing import as_seeds, parse
from rlkit2.envs.builtin import builtin_recipes
from rlkit2.errors import ConfigError
from rlkit2.evaluation.evaluation import mean_text
from rlkit2.evaluation.scores import score_summary
from rlkit2.fields import field_types, read_texts
from rlkit2.training import Run, describe_fields, load_recipe
from rlkit2.training.options import ONLINE_SECTIONS, TrainingOptions
from rlkit2.training.recipe import agent_recipes

Classes = list[tuple[str, type[Any], dict[str, Any]]]
"""Whose options (kinds of actions, where that matters), the dataclass that has them, and defaults that go before its own."""

COMMAND = {
    "dataset": ("ID", "Minari id, builtin/... id, or a file or folder in a known format (default: that of the recipe)"),
    "seeds": ("N", "number of seeds trained together, or the seeds themselves: 3,7 (default: 1)"),
    "recipe": (
        "FILE",
        "TOML with agent, dataset and options; none: the agent's own defaults (default: the shipped one for agent and dataset, if any)",
    ),
    "out": ("DIR", "folder in which the run's own folder is made (default: runs)"),
    "resume": ("RUN", "resume this run from its newest checkpoint; --steps N prolongs it to N in all"),
    "online": (
        "STEPS",
        "act in the environment and learn from that, for so many transitions of each seed: the agent of --resume RUN in a new run, or a named one",
    ),
    "env": (
        "ENV",
        "environment to evaluate in, or to act in with --online: an id, my_envs.py:NAME or module:NAME of what makes one (default: the dataset's)",
    ),
    "device": ("NAME", "auto, cpu, cuda or cuda:1 (default: auto)"),
    "compile": (
        "MODE",
        "auto: a CUDA graph where there is a GPU; on: torch.compile on a CPU, too; off (default: auto)",
    ),
}


def run(arguments: Sequence[str]) -> int | None:
    """Entry of the command line."""
    agent, rest = _agent(arguments)
    given = _parse(agent, rest)
    recipe = given.pop("recipe", None)
    shipped = recipe != "none"
    recipe = recipe if shipped else None
    if recipe is not None and agent is not None:
        named = class_name(agent_class(agent)) if ":" in agent else agent
        if (of := load_recipe(recipe).agent) != named:
            raise ConfigError(f"recipe {recipe} is for {of}, not {agent}; name only one of them")
    common: dict[str, Any] = {
        "seeds": as_seeds(given.pop("seeds", "1")),
        "overrides": _overrides(agent, given) if agent else None,
        "loggers": given.pop("logger", ()),
        **{name: value for cls in ONLINE_SECTIONS.values() for name, value in _section(cls, given).items()},
    }
    what: Any = agent if recipe is None else Path(recipe)
    dataset = given.pop("dataset", None)
    if "online" in given:
        done = _online(what, dataset, {**common, **given})
    else:
        done = train(what, dataset, recipes=shipped, **common, **given)
    _print(output.console(), done)
    return 1 if done.status == "failed" else 0


def _online(agent: Any, dataset: str | None, given: dict[str, Any]) -> Run:
    """Act and learn in an environment."""
    (steps,) = read_texts(TrainingOptions, {"steps": given.pop("online")}).values()
    if "steps" in given:
        raise ConfigError("--online says how many steps there are; leave --steps out")
    run = given.pop("resume", None)
    if run is None:
        if isinstance(agent, Path):
            raise ConfigError(
                "a recipe is for learning from data; name the agent instead: rlkit2 train AGENT --env ENV --online STEPS"
            )
        if agent is None:
            raise ConfigError(
                "name what is to act: rlkit2 train --resume RUN --online STEPS, or rlkit2 train sac --env Pendulum-v1 --online STEPS"
            )
        return train_online(agent, dataset, steps=steps, **given)
    if agent is not None and agent != Run(run).config["agent"]:
        raise ConfigError(f"{run} trains {Run(run).config['agent']}, not {agent}; resume it without naming an agent")
    return train_online(Run(run), dataset, steps=steps, **given)


def _agent(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The agent, whose fields are options (the first word, or that of the recipe), and the other arguments."""
    if arguments and not arguments[0].startswith("-"):
        if ":" in arguments[0]:
            import_agent(arguments[0])
        agent_class(arguments[0])  # an unknown name is said before anything else
        return arguments[0], list(arguments[1:])
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--recipe" and (file := value or next(iter(arguments[index + 1 :]), "none")) != "none":
            return load_recipe(file).agent, list(arguments)
    return None, list(arguments)


def _parse(agent: str | None, arguments: Sequence[str]) -> dict[str, Any]:
    """The options that were given, as text (lists as tuples of text, switches as booleans)."""
    fields: dict[str, Any] = {name: _option(*texts) for name, texts in COMMAND.items()}
    fields["trust_env"] = _option("", "build the environment as files say, which runs the code they name", bool)
    fields["logger"] = _option("NAME", "tensorboard, wandb, trackio; several may be named", tuple[str, ...])
    groups: dict[str, Any] = {title: _group(title, classes) for title, classes in _sections(agent)}
    untold = tyro.conf.arg(
        help=""
    )  # else tyro looks for a docstring of each in the source, which takes longer than all the rest
    titled = {title: Annotated[group, OmitArgPrefixes, untold] for title, group in groups.items()}
    parser = TypedDict("parser", {**fields, **titled}, total=False)  # type: ignore[misc]
    prog = f"rlkit2 train {agent or 'AGENT'}"
    asked = not {"-h", "--help"}.isdisjoint(arguments)  # describing the agents imports them all
    given, unknown = parse(
        parser,
        arguments,
        prog=prog,
        description=_description(agent) if asked else "",
        return_unknown_args=True,
    )
    if unknown:
        known = [name for group in groups.values() for name in group.__annotations__]
        raise ConfigError(_unknown(unknown[0], agent, [*fields, *known]))
    of_groups = [given.pop(title, {}) for title in groups]
    return {**given, **{name: value for group in of_groups for name, value in group.items()}}


def _group(title: str, classes: Classes) -> Any:
    """The fields of a config as options, under a title of their own in the help."""
    rows: dict[str, list[tuple[str, str, str, str]]] = {}  # field -> whose, type, default, meaning
    for whose, cls, defaults in classes:
        for name, kind, default, meaning in describe_fields(cls):
            rows.setdefault(name, []).append((whose, kind, _show(defaults.get(name, default)), meaning))
    fields = {}
    for name, found in rows.items():
        _, kind, _, meaning = found[0]
        if len({row[1] for row in found}) > 1:
            kind = "; ".join(f"{whose}: {own}" for whose, own, _, _ in found)
        typed = bool if kind.startswith("true or false") else tuple[str, ...] if kind.startswith("[") else str
        fields[name] = _option(kind, f"{meaning}{_default(found, len(classes))}", typed, name.rstrip("_"))
    return TypedDict(title, fields, total=False)  # type: ignore[operator]


def _default(rows: Sequence[tuple[str, str, str, str]], classes: int) -> str:
    """The default behind an option's meaning, and for whom it is where the agent's name stands for several algorithms."""
    shown = list(dict.fromkeys(row[2] for row in rows))
    text = shown[0] if len(shown) == 1 else ", ".join(f"{whose} actions {default}" for whose, _, default, _ in rows)
    alone = f"{rows[0][0]} actions alone; " if len(rows) < classes else ""
    return f" ({alone.removesuffix('; ')})" * bool(alone) if "default:" in rows[0][3] else f" ({alone}default: {text})"


def _option(kind: str, meaning: str, typed: Any = str, name: str | None = None) -> Any:
    words = {"whole number": "N", "number": "NUMBER", "text": "TEXT"}
    metavar = next((short for word, short in words.items() if word in kind), kind if kind.isupper() else None)
    if typed == tuple[str, ...]:
        metavar = f"{metavar} ..."
    return Annotated[typed, tyro.conf.arg(name=name, metavar=metavar, help=meaning, help_behavior_hint="")]


def _sections(agent: str | None) -> list[tuple[str, Classes]]:
    """Where options come from: how to train, how to see the data, and the agent's own configs with their preset."""
    titles = {"online": "acting"}  # --online itself has that name
    sections: list[tuple[str, Classes]] = [
        (titles.get(name, name), [("", cls, {})]) for name, cls in ONLINE_SECTIONS.items()
    ]
    if agent is None:
        return sections
    own: Classes = [
        (" or ".join(cls.action_kinds), cls.config_class, asdict(make_config(agent, cls.action_kinds[0])))
        for cls in agent_classes(agent)
    ]
    return [*sections, ("agent", own)]


def _overrides(agent: str, given: dict[str, Any]) -> dict[str, Any]:
    """Take the options of the agent out of `given`, read as the types of their fields."""
    names = {name for cls in agent_classes(agent) for name in field_types(cls.config_class)}
    return read_config(agent, {name: given.pop(name) for name in list(given) if name in names}, typed=True)


def _section(cls: type[Any], given: dict[str, Any]) -> dict[str, Any]:
    """Take a section's options out of `given`, read as the types of its fields."""
    return read_texts(cls, {name: given.pop(name) for name in field_types(cls) if name in given})


def _show(value: Any) -> str:
    return (
        " ".join(map(str, value))
        if isinstance(value, tuple)
        else str(value).lower()
        if value in (None, True, False)
        else str(value)
    )


def _unknown(argument: str, agent: str | None, fields: Sequence[str]) -> str:
    options = [f"--{name.rstrip('_').replace('_', '-')}" for name in fields]
    where = f"rlkit2 train {agent} --help" if agent else "rlkit2 train --help"
    if argument in list_agents():
        return f"the agent comes first: rlkit2 train {argument} ..."
    if not argument.startswith("-"):
        return f"unexpected argument {argument!r}; {where} shows all options"
    close = get_close_matches(argument.partition("=")[0].replace("_", "-"), options, 2)
    hint = f"did you mean {' or '.join(close)}?" if close else f"{where} shows all options"
    return (
        f"unknown option {argument!r}; {hint}"
        if agent
        else f"unknown option {argument!r}; name the agent first, or {hint}"
    )


def _description(agent: str | None) -> str:
    if agent is not None:
        classes = [(cls.config_class.__name__, " or ".join(cls.action_kinds)) for cls in agent_classes(agent)]
        names = " and ".join(f"{name} ({kinds} actions)" if classes[1:] else name for name, kinds in classes)
        return f"{_about(agent)}\n\nEvery field of {names} is an option.\n\n{examples(agent)}"
    width = max(map(len, list_agents()))
    lines = "\n".join(f"  {name:<{width}}  {_about(name)}" for name in list_agents())
    return "\n\n".join(
        [
            "Train an agent on a dataset, several seeds together, into a new run folder.",
            f"Agents:\n{lines}",
            "rlkit2 train AGENT --help shows the agent's own options.",
            examples("odice"),
        ]
    )


def examples(agent: str) -> str:
    """Lines that work as they are typed: with a built-in dataset, and what the agent learns from beside it."""
    here = ["builtin/" + recipe.dataset.partition("/")[2] for recipe in agent_recipes(agent)]
    known = [name for name in here if name in builtin_recipes()]
    dataset = "builtin/pendulum/mixed-v0" if not known or "builtin/pendulum/mixed-v0" in known else known[0]
    names = field_types(agent_class(agent).config_class)
    if agent_class(agent).learns_from == "rollouts":
        play = f"rlkit2 train {agent} --env"
        lines = [
            f"{play} CartPole-v1 --online 50000 --num-envs 4",
            f"{play} Pendulum-v1 --online 200000 --discount 0.9",
        ]
        return "\n".join(["Examples:", *(f"  {line}" for line in lines)])
    lines, inputs = [], ""
    if {"preferences", "rewards"} & set(names):
        lines.append(f"rlkit2 prefs label {dataset} --teacher oracle --count 200 --length 16 --out labels")
        inputs = " --preferences labels"
    if "rewards" in names:
        lines.append("rlkit2 prefs fit labels --out reward")
        inputs = " --rewards reward/rewards.safetensors"
    word = shlex.quote(agent)
    lines.append(f"rlkit2 train {word} --dataset {dataset}{inputs} --seeds 4 --steps 5000")
    lines.append(
        f"rlkit2 train {word} --dataset {dataset}{inputs} --discount 0.98 --eval-every 1000 --eval-episodes 20"
    )
    slug = re.sub("[^a-z0-9.]+", "-", f"{agent.rpartition(':')[2]} {dataset}".lower())
    lines.append(f"rlkit2 train --resume runs/{slug}-001")
    if all(cls.online_refusal() is None for cls in agent_classes(agent)):
        lines.append(f"rlkit2 train --resume runs/{slug}-001 --online 5000")
    kept = [line for line in lines if "--discount" not in line or "discount" in names]
    return "\n".join(["Examples:", *(f"  {line}" for line in kept)])


def _about(agent: str) -> str:
    """The first line of the agent's file, and what its preset changes; why not, where an installed package's agent is broken."""
    try:
        cls, config = agent_class(agent), make_config(agent)
    except ConfigError as error:
        return str(error)
    preset = {name: value for name, value in asdict(config).items() if value != getattr(cls.config_class(), name)}
    text = (inspect.getdoc(importlib.import_module(cls.__module__)) or agent).partition("\n")[0].rstrip(".")
    return text + (f" ({', '.join(f'{name} = {value}' for name, value in preset.items())})" if preset else "")


def _print(out: Console, done: Run) -> None:
    """Where the run is, what it scored last, and what to do with it."""
    manifest = done.manifest
    out.print(
        f"{done.path}: {manifest['status']} at step {manifest['step']} after {manifest['seconds']:.0f} s",
        soft_wrap=True,
    )
    if done.evaluations():
        summary = score_summary(done)
        final, seeds = summary["final"], summary["seeds"]
        if final["mean"] is not None:
            out.print(
                f"final {summary['unit']}: {mean_text(final)}, seeds {', '.join(map(str, seeds))}, {final['episodes']} episodes each",
                soft_wrap=True,
            )
    output.say_next("rlkit2", "evaluate", done.path)
