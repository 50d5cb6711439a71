"""A benchmark as tables in Markdown and as a page: agents by datasets, from cells alone, without the folders of the runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np

from rlkit2.evaluation.aggregates import performance_profile
from rlkit2.evaluation.scores import ScoreHistory
from rlkit2.reporting.cells import Cell
from rlkit2.reporting.comparison import ALL, MISSING, SCORE, Comparison, Row, compare_histories, markdown_table
from rlkit2.reporting.page import Cell as Entry
from rlkit2.reporting.page import Number, Tables, legend, page
from rlkit2.reporting.score_sections import estimate, history_curves, improvement_section, profiles_section

LAST = 5  # evaluations of the headline
LEVELS = (0, 25, 50, 75, 100)  # of the profiles in Markdown


@dataclass(frozen=True)
class Board:
    """Agents by datasets.

    `datasets`: id -> the kind of its actions. `cells`: (dataset, agent) -> its cell, or the reason why there is none. `against`: the agent that
    probabilities of improvement refer to. `command`: what makes the same. `notes`: what a reader must know.
    """

    datasets: Mapping[str, str]
    agents: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell | str]
    against: str
    command: str
    notes: tuple[str, ...] = ()

    @property
    def found(self) -> list[Cell]:
        """The cells that there are."""
        return [cell for cell in self.cells.values() if isinstance(cell, Cell)]

    def comparison(self, *, last: bool, datasets: Sequence[str] | None = None) -> Comparison:
        """Final scores, or those of the last evaluations, of some datasets (default: all)."""
        histories: dict[tuple[str, str], ScoreHistory] = {}
        for dataset in self.datasets if datasets is None else datasets:
            for agent in self.agents:
                cell = self.cells[dataset, agent]
                if isinstance(cell, Cell):
                    histories[agent, dataset] = cell.last(LAST) if last else cell.history
        return compare_histories(histories, baseline=self.against, last=LAST)

    @property
    def kinds(self) -> dict[str, list[str]]:
        """The datasets with one kind of actions, by a title."""
        found: dict[str, list[str]] = {}
        for name, kind in self.datasets.items():
            found.setdefault(kind, []).append(name)
        return {
            f"{kind} actions: {names[0] if len(names) == 1 else f'{len(names)} datasets'}": names
            for kind, names in found.items()
        }

    def pools(self, *, last: bool) -> dict[str, list[Row]]:
        """Rows over all datasets with one kind of actions, by its title; of a single dataset, its own."""
        found = {}
        for title, names in self.kinds.items():
            comparison = self.comparison(last=last, datasets=names)
            rows = [row for row in comparison.rows if len(names) == 1 or row.dataset == ALL]
            if rows:
                found[title] = [replace(row, dataset=title) for row in rows]
        return found

    @property
    def header(self) -> list[str]:
        """Column titles of `summaries`."""
        return [
            "agent",
            "seeds",
            f"last {LAST} [95 %]",
            "final [95 %]",
            "IQM",
            "optimality gap",
            f"P(> {self.against})",
            "hours",
        ]

    def summaries(self) -> dict[str, list[list[str]]]:
        """The rows of every pool as text, the best first."""
        finals = self.pools(last=False)
        return {
            title: [
                [cell if isinstance(cell, str) else cell.text for cell in cells]
                for cells in _summary(self, rows, finals[title])
            ]
            for title, rows in self.pools(last=True).items()
        }

    def hours(self, agent: str, datasets: Sequence[str]) -> float:
        """Hours of all trainings of an agent on some datasets."""
        return sum(cell.hours for cell in self.found if cell.agent == agent and cell.dataset in datasets)


def board_markdown(board: Board) -> str:
    """Summary, scores of every dataset, probabilities of improvement, profiles, versions and notes."""
    parts = [f"    {board.command}\n", _caption(board)]
    parts += [f"### {title}\n\n{markdown_table(board.header, rows)}" for title, rows in board.summaries().items()]
    for heading, last in ((f"Mean of the last {LAST} evaluations", True), ("Final evaluation", False)):
        parts.append(f"### {heading}\n\n{_grid(board, last=last, shown=_score)}")
    parts.append(
        f"### Probability of improvement over {board.against}, last {LAST} evaluations\n\n{_grid(board, last=True, shown=_improvement)}"
    )
    if profiles := _profiles(board.pools(last=True)):
        header = ["datasets", "agent", *(f"> {level}" for level in LEVELS)]
        parts.append(f"### Performance profiles: share of seeds above a score\n\n{markdown_table(header, profiles)}")
    return "\n".join([*parts, *(f"- {note}" for note in (*_versions(board), *board.notes)), ""])


def board_page(board: Board, title: str = "rlkit2 benchmark") -> str:
    """The same as one self-contained page, with learning curves."""
    series = {agent: index for index, agent in enumerate(board.agents)}
    tables = Tables()
    lasts, finals = board.pools(last=True), board.pools(last=False)
    summary = "".join(
        f"<h3>{escape(name)}</h3>" + tables("summary", board.header, _summary(board, rows, finals[name]))
        for name, rows in lasts.items()
    )
    pooled = Comparison(tuple(row for rows in lasts.values() for row in rows), board.against)
    notes = "".join(f"<p class='note'>{escape(note)}</p>" for note in (*_versions(board), *board.notes))
    sections = [
        ("Summary", f"<p class='note'>{escape(_caption(board))}</p>{summary}"),
        ("How it was made", f"<pre>{escape(board.command)}</pre>{notes}"),
        *((heading, _scores(board, tables, last=last)) for heading, last in (
            (f"Mean of the last {LAST} evaluations", True), ("Final evaluation", False))),
        *_curves(board, series),
        ("Performance profiles", profiles_section(pooled, series)),
        ("Probability of improvement", improvement_section(pooled, tables)),
        ("Trainings", tables("trainings", ["dataset", "agent", "seeds", "hours", "rlkit2", "torch", "device"], _trainings(board))),
    ]  # fmt: skip
    return page(title, [(heading, body) for heading, body in sections if body], top=legend(list(series)))


# --- tables ------------------------------------------------------------------------------------------------------------------------


def _caption(board: Board) -> str:
    methods = board.comparison(last=True).notes
    return (
        "Scores in per cent of the way from a random to an expert policy, or returns where that is said; 95 % intervals over training seeds. "
        f"Headline: each seed's mean over its last {LAST} evaluations; P: probability that a new training run scores above one of {board.against}. "
        + " ".join(methods)
        + "\n"
    )


def _summary(board: Board, lasts: Sequence[Row], finals: Sequence[Row]) -> list[list[Entry]]:
    final = {row.label: row for row in finals}
    hours = {row.label: board.hours(row.label, board.kinds[row.dataset]) for row in lasts}
    ordered = sorted(lasts, key=lambda row: -np.nan_to_num(row.mean.value, nan=-np.inf))
    return [
        [
            row.label,
            Number(row.seeds, str(row.seeds)),
            estimate(row.mean),
            estimate(final[row.label].mean),
            estimate(row.iqm),
            estimate(row.gap),
            estimate(row.improvement, digits=2, nothing=""),
            Number(hours[row.label], f"{hours[row.label]:.3g}"),
        ]
        for row in ordered
    ]


def _score(row: Row) -> Number:
    return estimate(row.mean)


def _improvement(row: Row) -> Number:
    return estimate(row.improvement, digits=2, nothing="")


def _grid(board: Board, *, last: bool, shown: Callable[[Row], Number]) -> str:
    """Datasets by agents in Markdown; the highest mean of a dataset is bold where there is another to be higher than."""
    rows = {(row.dataset, row.label): row for row in board.comparison(last=last).rows}
    lines = []
    for dataset in board.datasets:
        own = [rows[dataset, agent] for agent in board.agents if (dataset, agent) in rows]
        means = [row.mean.value for row in own if np.isfinite(row.mean.value)]
        best = max(means) if len(means) > 1 else np.nan
        cells = []
        for agent in board.agents:
            row = rows.get((dataset, agent))
            text = str(board.cells[dataset, agent]) if row is None else shown(row).text
            cells.append(f"**{text}**" if row is not None and shown is _score and row.mean.value == best else text)
        lines.append([_named(dataset, own), *cells])
    return markdown_table(["dataset", *board.agents], lines)


def _named(dataset: str, rows: Sequence[Row]) -> str:
    return dataset + ("" if all(row.unit == SCORE for row in rows) else " (return)")


def _scores(board: Board, tables: Tables, *, last: bool) -> str:
    """Datasets by agents on the page; the highest mean of a dataset is marked."""
    rows = {(row.dataset, row.label): row for row in board.comparison(last=last).rows}
    lines, marked = [], []
    for index, dataset in enumerate(board.datasets):
        own = {agent: rows[dataset, agent] for agent in board.agents if (dataset, agent) in rows}
        values = {agent: row.mean.value for agent, row in own.items() if np.isfinite(row.mean.value)}
        if values:
            marked.append((index, 1 + board.agents.index(max(values, key=lambda agent: values[agent]))))
        cells: list[Entry] = [
            _score(own[agent]) if agent in own else Number(np.nan, str(board.cells[dataset, agent]))
            for agent in board.agents
        ]
        lines.append([_named(dataset, list(own.values())), *cells])
    return tables("last" if last else "final", ["dataset", *board.agents], lines, marked=marked)


def _profiles(pools: Mapping[str, Sequence[Row]]) -> list[list[str]]:
    found = []
    for title, rows in pools.items():
        for row in rows:
            if row.unit == SCORE and all(np.isfinite(scores).all() for scores in row.scores):
                shares = performance_profile(row.scores, LEVELS).share
                found.append([title, row.label, *(f"{share:.2f}" for share in shares)])
    return found


def _curves(board: Board, series: Mapping[str, int]) -> list[tuple[str, str]]:
    found = []
    for number, dataset in enumerate(board.datasets):
        cells = {agent: board.cells[dataset, agent] for agent in board.agents}
        histories = {agent: [cell.history] for agent, cell in cells.items() if isinstance(cell, Cell)}
        if histories:
            found.append((f"Learning curves: {dataset}", history_curves(histories, dataset, series, f"curves{number}")))
    return found


def _trainings(board: Board) -> list[list[Entry]]:
    lines: list[list[Entry]] = []
    for cell in board.found:
        for run in cell.runs:
            hours, versions = run["seconds"] / 3600, run["versions"]
            seeds = ", ".join(map(str, run["seeds"]))
            lines.append(
                [cell.dataset, cell.agent, seeds, Number(hours, f"{hours:.3g}"), versions["rlkit2"], versions["torch"], run["device"]]
            )  # fmt: skip
    return lines


def _versions(board: Board) -> list[str]:
    """Hours, machines and versions of all trainings, and the seeds that stopped."""
    runs = [run for cell in board.found for run in cell.runs]
    if not runs:
        return []
    named = {
        name: sorted({str(run["versions"].get(name, MISSING)) for run in runs})
        for name in ("rlkit2", "torch", "gymnasium")
    }
    python = sorted({run["python"] for run in runs})
    devices = sorted({f"{run['device']} ({run['processors']} processors)" for run in runs})
    versions = "; ".join(f"{name} {', '.join(found)}" for name, found in {**named, "Python": python}.items())
    lines = [
        f"{sum(cell.hours for cell in board.found):.3g} hours of training and evaluation on {', '.join(devices)}; {versions}."
    ]
    for cell in board.found:
        stopped = [seed for seed, score in zip(cell.seeds, cell.history.per_seed[-1], strict=True) if np.isnan(score)]
        if stopped:
            listed = ", ".join(map(str, stopped))
            lines.append(
                f"{cell.agent} on {cell.dataset}: seed {listed} stopped at a loss that was not finite: no score."
            )
    return lines
