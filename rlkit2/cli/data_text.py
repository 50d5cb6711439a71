"""What the data commands print."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from minari import MinariDataset
from rich.markup import escape
from rich.table import Table

from rlkit2.cli.output import console, say
from rlkit2.data import AuditReport, TransitionDataset
from rlkit2.data.audit.findings import Distribution
from rlkit2.data.folders import minari_root
from rlkit2.data.notes import note_lines as note_lines
from rlkit2.data.sources.minari import minari_data
from rlkit2.data.spec import env_spec_text
from rlkit2.envs.builtin import builtin_id, data_root
from rlkit2.envs.recipe import read_recipe

EIGHTHS = " ▁▂▃▄▅▆▇█"
HEIGHT = 4  # lines of a histogram
BAR = 3  # characters of one bin
MOST_ACTIONS = 12  # action columns shown
STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}


def short(space: spaces.Space[Any]) -> str:
    """A space in few characters."""
    if isinstance(space, spaces.Box):
        low, high = ({float(value) for value in np.ravel(bound)} for bound in (space.low, space.high))
        bounds = f"{low.pop():g} to {high.pop():g}" if len(low) == len(high) == 1 else "bounds per column"
        return f"Box {space.shape} {space.dtype}, {bounds}"
    if isinstance(space, spaces.Dict):
        return "Dict of " + ", ".join(f"{key} ({short(value)})" for key, value in space.spaces.items())
    return " ".join(str(space).split())


def metadata(source: str) -> dict[str, Any]:
    """Minari's metadata of a source, as they are on disk; nothing for a D4RL-style file."""
    name = builtin_id(source) if source.startswith("builtin/") else source
    found = [minari_data(root / name) for root in (Path(), minari_root(), data_root())]
    folder = next((path for path in found if path is not None), None)
    if folder is None:
        return {}
    values: dict[str, Any] = json.loads((folder / "metadata.json").read_text())
    return {**values, "path": str(folder)}


def summary(name: str, path: Path, recipe: Path | None = None) -> dict[str, Any]:
    """One dataset in the list; `recipe` where it is built in."""
    kind = "Minari" if recipe is None else "built-in"
    try:
        values = json.loads((path / "metadata.json").read_text())
    except (OSError, ValueError):
        values = {}
    described = {
        "id": name,
        "kind": kind,
        "present": bool(values),
        "episodes": values.get("total_episodes"),
        "steps": values.get("total_steps"),
        "megabytes": values.get("dataset_size"),
        "description": values.get("description") or (read_recipe(recipe).description if recipe else None),
        "path": str(path) if values else None,
    }
    if values.get("env_spec") and not described["description"]:
        described["description"] = json.loads(values["env_spec"]).get("id")
    return described


def print_list(found: Sequence[Mapping[str, Any]]) -> None:
    """The table of `rlkit2 data list`."""
    out, names = console(), max(len(row["id"]) for row in found)
    table = Table(box=None, pad_edge=False)
    table.add_column("dataset", no_wrap=True)
    for column in ("episodes", "steps", "MB"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("what it is", no_wrap=True)
    room = max(out.width - names - 34, 20)
    for row in found:
        numbers = (
            [f"{row['episodes']:,}", f"{row['steps']:,}", f"{row['megabytes'] or 0:.1f}"]
            if row["present"]
            else [""] * 3
        )
        state = "" if row["present"] else "on first use: " if row["kind"] == "built-in" else "unreadable"
        line = state + (row["description"] or "")
        table.add_row(row["id"], *numbers, line if len(line) <= room else line[: room - 3] + "...")
    out.print(table)
    say(f"\nMinari's root: {minari_root()} (MINARI_DATASETS_PATH); built-in datasets: {data_root()} (RLKIT2_DATA)")


def describe(dataset: TransitionDataset, source: str) -> dict[str, Any]:
    """Everything `rlkit2 data info` tells, as JSON values."""
    spec, returns, stored = dataset.spec, dataset.episode_returns, metadata(source)
    ends = dataset.episode_starts[1:] - 1
    terminated = dataset.terminations[ends]
    return {
        "id": spec.id,
        "description": stored.get("description"),
        "path": stored.get("path", source),
        "content_hash": spec.content_hash,
        "transitions": len(dataset),
        "episodes": dataset.num_episodes,
        "terminated": int(terminated.sum()),
        "truncated": int((dataset.truncations[ends] & ~terminated).sum()),
        "episode_length": {
            "minimum": int(dataset.episode_lengths.min()),
            "mean": float(dataset.episode_lengths.double().mean()),
            "maximum": int(dataset.episode_lengths.max()),
        },
        "episode_return": {
            "minimum": float(returns.min()),
            "mean": float(returns.mean()),
            "maximum": float(returns.max()),
        },
        "observation_space": short(spec.observation_space),
        "observations": {"shape": list(spec.flattener.shape), "dtype": str(spec.flattener.dtype)},
        "observation_ranges": {key: list(span) for key, span in spec.observation_ranges.items()},
        "action_space": short(spec.action_space),
        "env": spec.env_spec.id if spec.env_spec else None,
        "eval_env": spec.eval_env_spec.id if spec.eval_env_spec else None,
        "eval_env_differs": env_spec_text(spec.env_spec) != env_spec_text(spec.eval_env_spec),
        "ref_min_score": spec.ref_min_score,
        "ref_max_score": spec.ref_max_score,
        "reference_scores": stored.get("reference_scores"),
        "provenance": stored.get("provenance"),
        "recipe": stored.get("recipe"),
        "notes": spec.notes,
        "bytes": dataset.nbytes,
    }


def print_info(found: Mapping[str, Any]) -> None:
    """The text of `rlkit2 data info`."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, text in _info_rows(found):
        table.add_row(f"[bold]{name}", escape(text))
    console().print(table)


def print_card(found: Mapping[str, Any]) -> None:
    """The text of `rlkit2 data info --markdown`: a card to keep beside the dataset."""
    description = found["description"] or ""
    lines = [
        f"# {found['id']}",
        "",
        f"{description[:1].upper()}{description[1:].rstrip('.')}.",
        "",
        "| | |",
        "|---|---|",
    ]
    left_out = ("dataset", "description", "content hash", "path")
    lines += [f"| {name} | {text} |" for name, text in _info_rows(found) if name not in left_out]
    if found["recipe"]:
        lines += ["", "| episodes | policy | options | noise | random actions | cut after | environment |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for part in found["recipe"]["behaviors"]:
            share = f"{100 * part['epsilon']:g} %" if part["epsilon"] else ""
            cells = (part["episodes"], part["policy"], _settings(part["options"]), part["noise"] or "", share)
            more = (part["max_steps"] or "", _settings(part["kwargs"]))
            lines.append(f"| {' | '.join(map(str, (*cells, *more)))} |")
        lines += [
            "",
            "Noise is Gaussian, in units of half the action range. The recipe beside this card makes the same bytes again.",
        ]
    if found["reference_scores"]:
        expert = json.loads(found["reference_scores"]["expert"]["policy"])
        policy = _settings({key: value for key, value in expert.items() if value}).removeprefix("policy ")
        lines += [
            "",
            "Scores: 0 is the return of uniformly random actions, 100 that of the expert "
            f"(`{policy}`) in the evaluation environment.",
        ]
    lines += ["", "Measured by:", "", "```console", f"$ rlkit2 data info {found['id']} --markdown", "```"]
    sys.stdout.write("\n".join(lines) + "\n")


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _info_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of each fact."""
    length, value = found["episode_length"], found["episode_return"]
    rows = [
        ("dataset", found["id"]),
        ("description", found["description"]),
        ("transitions", f"{found['transitions']:,} in {found['episodes']:,} episodes, {found['bytes'] / 1e6:.1f} MB"),
        ("endings", f"{found['terminated']:,} terminated, {found['truncated']:,} truncated"),
        ("length", f"{length['minimum']} to {length['maximum']}, mean {length['mean']:.1f}"),
        ("return", f"{value['minimum']:.2f} to {value['maximum']:.2f}, mean {value['mean']:.2f}"),
        (
            "observations",
            f"{found['observation_space']}; rows {found['observations']['shape']} {found['observations']['dtype']}",
        ),
        ("columns", ", ".join(f"{key} {a}..{b - 1}" for key, (a, b) in found["observation_ranges"].items())),
        ("actions", found["action_space"]),
        ("environment", found["env"]),
        (
            "evaluation",
            f"{found['eval_env']}, other settings" if found["eval_env"] and found["eval_env_differs"] else None,
        ),
        *_reference_rows(found),
        ("provenance", ", ".join(f"{key} {text}" for key, text in (found["provenance"] or {}).items())),
        *(("note", line) for line in note_lines(found["notes"])),
        ("content hash", found["content_hash"]),
        ("path", found["path"]),
    ]
    yield from ((name, str(text)) for name, text in rows if text)


def _reference_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    scores = found["reference_scores"]
    if scores:
        for name, score in scores.items():
            error = score["standard_error"]
            spread = "" if error is None else f" ± {error:.2g} (standard error)"
            yield (
                f"{name} return",
                f"{score['mean']:.2f}{spread}, {score['episodes']} episodes from seed {score['seed']}",
            )
    elif found["ref_min_score"] is not None and found["ref_max_score"] is not None:
        yield "reference", f"returns {found['ref_min_score']:.2f} (random) and {found['ref_max_score']:.2f} (expert)"
    else:
        yield "reference", "no reference returns, so returns cannot be normalised"


def built(dataset: MinariDataset) -> str:
    """One line about a dataset that is now there."""
    path = Path(dataset.storage.data_path).parent
    return f"{dataset.spec.dataset_id}: {dataset.total_steps:,} steps in {dataset.total_episodes:,} episodes, {path}"


def print_report(report: AuditReport) -> None:
    """The text of `rlkit2 data check`."""
    out = console()
    out.print(f"[bold]{report.dataset}[/bold]: {report.transitions:,} transitions in {report.episodes:,} episodes")
    shares = [
        f"{count:,} {name.replace('_', ' ')} ({100 * count / report.episodes:.0f} %)"
        for name, count in report.endings.items()
        if count or name in ("terminated", "truncated")
    ]
    out.print(f"endings: {', '.join(shares)}")
    out.print(f"environment: {_environment(report.environment)}")
    low, high = report.reference_scores["minimum"], report.reference_scores["maximum"]
    if low is not None and high is not None:
        out.print(f"reference returns: {low:g} (random), {high:g} (expert)")
    for name, distribution in (("return", report.returns), ("length", report.lengths), ("reward", report.rewards)):
        if distribution is not None:
            out.print()
            for line in histogram(name, distribution):
                out.print(line, markup=False, soft_wrap=True)
    if any(report.actions):
        out.print()
    for index, column in enumerate(report.actions[:MOST_ACTIONS]):
        if column is not None:
            out.print(
                f"action {index:<2} {_bars(column.counts, 1)[0]} {column.edges[0]:.3g} to {column.edges[-1]:.3g}, mean {column.mean:.3g}"
            )
    if len(report.actions) > MOST_ACTIONS:
        out.print(f"... and {len(report.actions) - MOST_ACTIONS} more action columns")
    out.print()
    for finding in report.findings:
        out.print(f"[{STYLES[finding.severity]}]{finding.severity}[/] {finding.code}: ", end="")
        out.print(finding.message, markup=False, soft_wrap=True)
    counts = {level: sum(finding.severity == level for finding in report.findings) for level in ("error", "warning")}
    out.print(", ".join(f"{count or 'no'} {level}{'' if count == 1 else 's'}" for level, count in counts.items()))


def _environment(found: Mapping[str, Any]) -> str:
    if found["id"] is None and found["evaluation_id"] is None:
        return "none is named"
    name = found["id"] or found["evaluation_id"]
    if found["evaluation_id"] not in (None, name):
        name += f", evaluation {found['evaluation_id']}"
    if not found["can_be_built"]:
        return f"{name}, cannot be built here"
    return f"{name}, can be built here, {'its spaces are those of the data' if found['spaces_match'] else 'its spaces differ'}"


def histogram(name: str, values: Distribution) -> Iterator[str]:
    """Lines of a histogram in block characters, under a line of numbers."""
    low, first, median, third, high = (f"{q:.4g}" for q in values.quantiles)
    yield f"{name}: mean {values.mean:.4g}, std {values.std:.3g}; quantiles (5, 25, 50, 75, 95 %) {low}, {first}, {median}, {third}, {high}"
    yield from (f"  {line}" for line in _bars(values.counts, HEIGHT))
    left, right = f"{values.edges[0]:.4g}", f"{values.edges[-1]:.4g}"
    width = BAR * len(values.counts)
    yield f"  {left}{right:>{max(width - len(left), len(right) + 1)}}   (highest bar: {max(values.counts):,})"


def _bars(counts: Sequence[int], height: int) -> list[str]:
    """Bars of `height` lines, top first; a bin that is not empty shows at least an eighth of a line."""
    top = max(max(counts), 1)
    eighths = [max(round(8 * height * count / top), 1 if count else 0) for count in counts]
    width = BAR if height > 1 else 1
    return ["".join(EIGHTHS[min(max(e - 8 * row, 0), 8)] * width for e in eighths) for row in reversed(range(height))]
