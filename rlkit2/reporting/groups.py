"""Which runs belong together: agent, settings and dataset make a row, the seeds are its sample. Labels are short, what differs is a table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from rlkit2.errors import ConfigError, RunError
from rlkit2.training.run import Run

# What differs between two runs without making them different experiments.
WATCHING = ("training.log_every", "training.eval_every", "training.eval_episodes", "training.checkpoint_every")
UNSET = object()


@dataclass(frozen=True)
class Group:
    """Runs of one agent and configuration on one dataset; their seeds are the sample.

    `label`: the agent, with a letter where a dataset has several configurations of it. `settings`: those that the letter stands for.
    """

    label: str
    dataset: str
    runs: tuple[Run, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def agent(self) -> str:
        """The agent's name, as the runs have it."""
        return str(self.runs[0].config["agent"])


def split_folders(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The paths that may be runs, and the folders of `rlkit2 starc ... --out` and `rlkit2 entangle model --out` among them."""
    measured = [path for path in paths if any((path / name).is_file() for name in ("distances.json", "report.json"))]
    return [path for path in paths if path not in measured], measured


def open_runs(paths: Sequence[str | os.PathLike[str]]) -> tuple[list[Run], list[str]]:
    """The runs in these folders whose files can be read, each training once, and a line for every folder that is left out.

    Raises:
        RunError: a path does not exist, or none is left.
    """
    runs, left_out = [], []
    for path in paths:
        if not os.path.exists(path):
            Run(path)  # says so
        try:
            run = Run(path)
            run.manifest, run.evaluations(), run.metrics()
            runs.append(run)
        except RunError as error:
            left_out.append(f"left out: {_of_several(path) or error}")
    if left_out and not runs:
        raise RunError(left_out[0].removeprefix("left out: "))
    kept, repeated = without_repeats(runs)
    return kept, left_out + repeated


def _of_several(path: str | os.PathLike[str]) -> str | None:
    """What to name instead of a folder of runs, such as a sweep's."""
    for pattern in ("*", "*/*"):
        if any(Path(path).glob(f"{pattern}/config.json")):
            return f"{path} is a folder of runs, such as a sweep's; name its runs: {path}/{pattern}"
    return None


def without_repeats(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs without those that hold a seed of a training that is there already, and a line for each of these.

    Of two, the one that was evaluated further is kept, else the first: counting both would count one result as two.
    """
    once = list({run.path.resolve(): run for run in runs}.values())  # the same folder twice is one run
    order = sorted(range(len(once)), key=lambda index: (-_reached(once[index]), index))
    holders: dict[tuple[str, int], Run] = {}
    left_out: dict[int, str] = {}
    for index in order:
        run = once[index]
        same = (
            json.dumps([run.config["agent"], _dataset_key(run), flat_settings(run)], sort_keys=True),
            run.config["seeds"],
        )
        taken = [seed for seed in same[1] if (same[0], seed) in holders]
        if taken:
            holder = holders[same[0], taken[0]].path
            left_out[index] = (
                f"left out: {run.path} is the training of {holder} again (seed {', '.join(map(str, taken))})"
            )
        else:
            holders.update({(same[0], seed): run for seed in same[1]})
    return [run for index, run in enumerate(once) if index not in left_out], [
        left_out[index] for index in sorted(left_out)
    ]


def _reached(run: Run) -> int:
    return max((line["step"] for line in run.evaluations()), default=-1)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs by agent, configuration and dataset, in the order given.

    A label is the agent's name; where a dataset has several configurations of one agent, `-a`, `-b`, ... stand for them, the same on every dataset.

    Raises:
        ConfigError: no runs, or the same seed of the same experiment twice, which would count one result as two (see `without_repeats`).
    """
    if not runs:
        raise ConfigError("nothing to compare; name at least one run folder")
    names = _dataset_names(runs)
    labels = _labels(runs, names)
    groups: dict[tuple[str, str], list[Run]] = {}
    for run, name, (label, _) in zip(runs, names, labels, strict=True):
        groups.setdefault((label, name), []).append(run)
    for (label, dataset), members in groups.items():
        seen: dict[int, Run] = {}
        for run in members:
            for seed in run.config["seeds"]:
                if seed in seen:
                    raise ConfigError(
                        f"{seen[seed].path} and {run.path} both hold seed {seed} of {label} on {dataset}; leave one of them out"
                    )
                seen[seed] = run
    settings = dict(labels)
    return [Group(label, dataset, tuple(members), settings[label]) for (label, dataset), members in groups.items()]


def settings_table(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """What the letters of the labels stand for: a column per setting that differs, a row per label. No rows where no label has a letter."""
    labelled = {group.label: group.settings for group in groups if group.settings}
    names = list(dict.fromkeys(name for settings in labelled.values() for name in settings))
    header = ["run", *(name.split(".", 1)[1] for name in names)]
    rows = [[label, *(value_text(settings.get(name, UNSET)) for name in names)] for label, settings in labelled.items()]
    return header, rows


def value_text(value: Any) -> str:
    """A setting as a reader knows it."""
    if value is UNSET:
        return ""
    if isinstance(value, list | tuple):
        return " ".join(map(value_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _labels(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """A label and the settings behind it for every run."""
    short = _short_names([run.config["agent"] for run in runs])
    settings = [flat_settings(run) for run in runs]
    differing: dict[str, dict[str, None]] = {}  # agent -> settings that differ on some dataset, in order
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for run, name, own in zip(runs, names, settings, strict=True):
        rival = first.setdefault((run.config["agent"], name), own)
        found = [key for key in {**rival, **own} if rival.get(key, UNSET) != own.get(key, UNSET)]
        differing.setdefault(run.config["agent"], {}).update(dict.fromkeys(found))
    letters: dict[str, dict[str, str]] = {}
    labels: list[tuple[str, dict[str, Any]]] = []
    for run, own in zip(runs, settings, strict=True):
        agent = run.config["agent"]
        details = {key: own[key] for key in differing[agent] if key in own}
        if not differing[agent]:
            labels.append((short[agent], {}))
            continue
        known = letters.setdefault(agent, {})
        letter = known.setdefault(json.dumps(details, sort_keys=True), _letter(len(known)))
        labels.append((f"{short[agent]}-{letter}", details))
    return labels


def _letter(number: int) -> str:
    """a to z, aa, ab, ..."""
    words = ("".join(letters) for length in count(1) for letters in product(ascii_lowercase, repeat=length))
    return next(islice(words, number, None))


def _short_names(agents: Iterable[str]) -> dict[str, str]:
    """An agent of the user's own by its class, where no other is called so."""
    found = {agent: agent.rpartition(":")[2] for agent in agents}
    return {agent: agent if list(found.values()).count(short) > 1 else short for agent, short in found.items()}


def flat_settings(run: Run) -> dict[str, Any]:
    """Everything that makes two runs different experiments, flat."""
    sections: Mapping[str, Mapping[str, Any]] = {
        name: run.config.get(name, {}) for name in ("config", "data", "training")
    }
    flat = {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}
    flat |= {f"reading.{key}": value for key, value in run.config.get("reading", {}).items() if value}
    return {key: value for key, value in flat.items() if key not in WATCHING}


def _dataset_key(run: Run) -> tuple[str, str]:
    return run.config["dataset"]["id"], run.config["dataset"]["content_hash"]


def _dataset_names(runs: Sequence[Run]) -> list[str]:
    """Dataset ids, with the start of the content hash where two different contents share an id."""
    hashes: dict[str, set[str]] = {}
    for run in runs:
        name, content = _dataset_key(run)
        hashes.setdefault(name, set()).add(content)
    return [
        name + (f"@{content[:8]}" if len(hashes[name]) > 1 else "")
        for name, content in (_dataset_key(run) for run in runs)
    ]
