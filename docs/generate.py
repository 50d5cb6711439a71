"""Pages that are made from code and cards when the site is built: the command line, one page per agent, one page per room of the library.

`docs/conf.py` calls `write_pages`; what appears in the registry, in `rlkit2 --help` or as a card appears here by itself.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import os
import re
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rlkit2.agents import agent_class, agent_classes, list_agents, make_config, plain_name
from rlkit2.cli.main import COMMANDS, main
from rlkit2.cli.train import examples
from rlkit2.errors import ConfigError
from rlkit2.fields import describe_fields
from rlkit2.testing import Problem

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# Rooms of the library in the order of its floors, and the modules of each whose names are public.
ROOMS = {
    "rlkit2": ("rlkit2.api",),
    "data": ("rlkit2.data",),
    "nn": ("rlkit2.nn",),
    "losses": ("rlkit2.losses.divergences", "rlkit2.losses.margin", "rlkit2.losses.preference", "rlkit2.losses.ggd"),
    "rewards": ("rlkit2.rewards",),
    "entanglement": (
        "rlkit2.entanglement",
        "rlkit2.entanglement.pair_scores",
        "rlkit2.entanglement.remedy_trainers",
        "rlkit2.entanglement.token_mask",
    ),
    "preferences": ("rlkit2.preferences",),
    "envs": ("rlkit2.envs",),
    "training": ("rlkit2.training",),
    "evaluation": ("rlkit2.evaluation", "rlkit2.evaluation.offline"),
    "reporting": ("rlkit2.reporting",),
    "deploy": ("rlkit2.deploy",),
    "sweeps": ("rlkit2.sweeps",),
    "studies": ("rlkit2.studies.benchmark", "rlkit2.studies.preferences_to_regret", "rlkit2.studies.pair_ranking"),
    "testing": ("rlkit2.testing",),
    "errors": ("rlkit2.errors",),
}
ONLY = {
    "rlkit2.studies.benchmark": "run_benchmark, Benchmark",
    "rlkit2.api": "load_dataset, train, evaluate, offline_evaluate, load_run, load_policy",
    "rlkit2.studies.preferences_to_regret": "StudySettings, StudyResult, run_study, load_study",
    "rlkit2.studies.pair_ranking": "rank_pairs",
    "rlkit2.entanglement.remedy_trainers": "with_remedy",
    "rlkit2.testing": "check_agent, agent_checks",
}


def write_pages(folder: Path) -> list[Path]:
    """Write all generated pages below `folder`; files that would not change are left alone, so that a build reads only what is new."""
    pages = {
        "cli.md": command_line(),
        "agents/index.md": agents_index(),
        **{f"agents/{name}.md": agent_page(name) for name in carded_agents()},
        "api/index.md": api_index(),
        **{f"api/{room}.md": api_page(room, modules) for room, modules in {**ROOMS, "agents": agent_modules()}.items()},
    }
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    wanted = {folder / name for name in pages}
    for old in folder.rglob("*.md"):
        if old not in wanted:
            old.unlink()
    return sorted(wanted)


# --- the command line ------------------------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every command with its help as it is printed."""
    parts = [
        "# Command line\n",
        "Every command and its `--help`, as installed. The options of an agent stand on [its page](agents/index.md).\n",
        _block(_printed()),
    ]
    for name in COMMANDS:
        subcommands = list(getattr(importlib.import_module(COMMANDS[name][0]), "SUBCOMMANDS", ()))
        parts.append(f"\n## rlkit2 {name}\n\n{_block(_printed(name))}")
        parts += [f"\n### rlkit2 {name} {sub}\n\n{_block(_printed(name, sub))}" for sub in subcommands]
    return "\n".join(parts)


def _printed(*words: str) -> str:
    """What a command prints with `--help` on a terminal that can draw nothing."""
    before = {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR", "TERM")}
    os.environ.update(COLUMNS="100", NO_COLOR="1", TERM="dumb")
    try:
        with redirect_stdout(io.StringIO()) as text, suppress(SystemExit):
            main([*words, "--help"])
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return text.getvalue()


def _block(text: str) -> str:
    return f"```text\n{text.strip()}\n```\n"


# --- agents ----------------------------------------------------------------------------------------------------------------------


def carded_agents() -> list[str]:
    """Plain agents that have a card, in alphabetical order."""
    return sorted(name for name in {plain_name(name) for name in list_agents()} if _card(name).is_file())


def _card(name: str) -> Path:
    return ROOT / "agents" / name / "README.md"


def presets_of(name: str) -> list[str]:
    """Names that are this agent with other defaults."""
    return [other for other in list_agents() if other != name and plain_name(other) == name]


def agents_index() -> str:
    """The table of `agents/README.md` with links to the pages, and a table of contents."""
    text = (ROOT / "agents/README.md").read_text()
    table = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    table = re.sub(r"\]\((\w+)/README\.md\)", r"](\1.md)", table)
    listed = "\n".join(carded_agents())
    return (
        "# Agents\n\nOne page each: the idea with its equations, how it differs from its authors' code, what was measured and with which command, "
        f"every option and every metric.\n\n{table}\n\n```{{toctree}}\n:maxdepth: 1\n:hidden:\n\n{listed}\n```\n"
    )


def agent_page(name: str) -> str:
    """The card, then presets, options and metrics from the code."""
    text = _linked(_card(name).read_text().strip())
    classes = agent_classes(name)
    equations = "\n\n\n".join((importlib.import_module(cls.__module__).__doc__ or "").strip() for cls in classes)
    typed = examples(name).partition("\n")[2].replace("\n  ", "\n").strip()
    parts = [
        text,
        "\n## On a fresh machine\n",
        f"```sh\n{typed}\n```",
        "\n## In the words of its file\n",
        f"```text\n{equations}\n```",
    ]
    for preset in presets_of(name):
        plain, own = make_config(name), make_config(preset)
        changed = ", ".join(
            f"`{f.name} = {getattr(own, f.name)}`"
            for f in dataclasses.fields(own)
            if getattr(own, f.name) != getattr(plain, f.name)
        )
        parts.append(f"\n`{preset}` is `{name}` with {changed}.")
    for cls in classes:
        rows = [
            f"| `{field}` | {kind} | `{default}` | {_cell(meaning)} |"
            for field, kind, default, meaning in describe_fields(cls.config_class)
        ]
        whose = f", {' or '.join(cls.action_kinds)} actions" if len(classes) > 1 else ""
        parts += [f"\n## Options{whose}\n", "| option | type | default | meaning |", "|---|---|---|---|", *rows]
    parts += ["\n## Metrics\n", *_metric_table(name), "\n## Code\n"]
    for cls in classes:
        members = f"{cls.__name__}, {cls.config_class.__name__}"
        directive = f".. automodule:: {cls.__module__}\n   :members: {members}\n   :no-index:"
        parts.append(f"```{{eval-rst}}\n{directive}\n```")
    return "\n".join(parts) + "\n"


def _linked(text: str) -> str:
    """Links of a card as links of the site."""
    text = re.sub(r"\]\(\.\./(\w+)/README\.md(#[\w-]+)?\)", r"](\1.md\2)", text)
    text = re.sub(r"\]\(\.\./\.\./docs/([\w/]+)\.md(#[\w-]+)?\)", r"](../../\1.md\2)", text)
    text = re.sub(r"\]\(\.\./\.\./docs/(images/[\w/.-]+)\)", r"](../../\1)", text)
    return re.sub(r"\]\(\.\./\.\./envs/[\w/.-]+\)", "](../../data.md)", text)


def _metric_table(name: str) -> Iterator[str]:
    found = metrics_of(name)
    if not found:
        yield "They are those of the file above."
        return
    yield "| metric | what it is | when to worry |"
    yield "|---|---|---|"
    for metric in found:
        meaning, worry = explained(metric) or ("see the file of the agent", "")
        yield f"| `{metric}` | {_cell(meaning)} | {_cell(worry)} |"


# What other options than the defaults add to an agent's metrics, where it has them.
VARIANTS = ({}, {"critic": "ggd", "num_critics": 3, "sample_weighting": "biev"})


def metrics_of(name: str) -> list[str]:
    """Names of the metrics that two updates report, with the default options and with a noise model."""
    found: set[str] = set()
    for cls in {agent_class(name, kind): None for kind in ("continuous", "discrete")}:
        for options in VARIANTS:
            known = {field.name for field in dataclasses.fields(cls.config_class)}
            if known.issuperset(options):
                with suppress(ConfigError):  # not for these actions, or these options exclude each other
                    small = Problem(cls, cls.action_kinds[0])
                    problem = Problem(cls, small.kind, dataclasses.replace(small.config, **options))
                    agent = problem.build(1)
                    found |= {key for batch in problem.batches(2) for key in agent.update(batch)}
    return sorted(found)


def explained(metric: str) -> tuple[str, str] | None:
    """What a metric is and when to worry, from `metrics.toml`: the first pattern that fits."""
    return next(
        ((entry["is"], entry.get("worry", "")) for pattern, entry in _metrics().items() if fnmatch(metric, pattern)),
        None,
    )


def _metrics() -> dict[str, Any]:
    return tomllib.loads((DOCS / "metrics.toml").read_text())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# --- the library -----------------------------------------------------------------------------------------------------------------


def agent_modules() -> tuple[str, ...]:
    """The package, the base class, and the file of every agent of rlkit2."""
    files = {cls.__module__ for name in list_agents() if ":" not in name for cls in agent_classes(name)}
    return ("rlkit2.agents", "rlkit2.agents.base", *sorted(file for file in files if file.startswith("rlkit2.")))


def api_index() -> str:
    """A page per room."""
    rooms = [room for room in ROOMS if room != "rlkit2"]
    listed = "\n".join(["rlkit2", "agents", *rooms])
    return (
        "# API reference\n\nMade from the docstrings: shapes, units, errors and sources stand there. One page for each room of the library, from the "
        f"names at the top down to the floors.\n\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"
    )


def api_page(room: str, modules: tuple[str, ...]) -> str:
    """The public names of a room."""
    title = room if room == "rlkit2" else f"rlkit2.{room}"
    parts = [f"# {title}\n\n```{{eval-rst}}"]
    for module in modules:
        members = f"   :members: {ONLY[module]}" if module in ONLY else "   :members:"
        imported = hasattr(importlib.import_module(module), "__all__") and module not in ONLY
        lines = [f".. automodule:: {module}", members, *(["   :imported-members:"] if imported else [])]
        if module == "rlkit2.agents":
            lines.append("   :exclude-members: Agent")
        if module == "rlkit2.preferences":
            lines.append("   :exclude-members: PreferenceDataset, SegmentIndex")
        parts.append("\n".join(lines) + "\n")
    return "\n".join([*parts, "```\n"])
