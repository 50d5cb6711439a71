"""What `rlkit2 evaluate --offline` and `rlkit2 select` share: judging runs from data alone, and printing it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlkit2.api import offline_evaluate
from rlkit2.cli.output import print_table, say
from rlkit2.data.reading import ReadingOptions
from rlkit2.evaluation.offline import OfflineEvaluation, OfflineOptions, order
from rlkit2.progress import progress_bar
from rlkit2.training.run import Run


def judged(
    runs: Sequence[Path | Run],
    *,
    dataset: str | None,
    reading: ReadingOptions,
    methods: Sequence[str],
    discount: float | None,
    stochastic: bool,
    options: OfflineOptions,
) -> OfflineEvaluation:
    """Judge the runs with a bar for every fit."""
    with _bars() as progress:
        return offline_evaluate(
            list(runs),
            dataset,
            methods=tuple(methods),
            discount=discount,
            deterministic=not stochastic,
            options=options,
            progress=progress,
            **reading.given,
        )


@contextmanager
def _bars() -> Iterator[Any]:
    with progress_bar("judging") as show:
        yield lambda _, done, total: show(done, total)


def print_judged(result: OfflineEvaluation, by: str | None = None) -> None:
    """The table of estimates, best first by method `by` (None: in the order given), what speaks against them, and what was assumed."""
    rows = [
        [
            result.labels[index],
            *(str(found[index]) for found in result.estimates.values()),
            _share(result.outside[index]),
        ]
        for index in (range(len(result.labels)) if by is None else order(result.estimates[by]))
    ]
    title = f"discounted return (discount {result.discount:g}) on {result.dataset}"
    print_table(["policy", *result.estimates, "outside data"], rows, title=title)
    lines: dict[str, list[str]] = {}
    for method, found in result.estimates.items():
        for label, estimate in zip(result.labels, found, strict=True):
            for reason in estimate.reasons:
                lines.setdefault(f"{method}: {reason}", []).append(label)
    for line, labels in lines.items():
        whom = "all policies" if len(labels) == len(result.labels) > 1 else ", ".join(labels)
        say(f"in doubt: {whom}, {line}")
    actions = "deterministic" if result.deterministic else "sampled"
    say(f"{actions} actions; the data's own episodes earn {result.data_return:.4g}")
    for note in result.notes:
        say(note)


def _share(share: float) -> str:
    return "n/a" if share != share else f"{100 * share:.0f} %"
