"""One self-contained HTML page: tables that sort and download as CSV, a legend that shows and hides runs, dark mode; nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import resources
from itertools import count
from typing import TypeAlias

from rlkit2 import __version__

COLORS = 10  # in page.css
DASHES = ("none", "6 3", "2 3", "8 3 2 3", "1 4", "12 4")
LONG = 60  # characters of a cell from which on it is wrapped


@dataclass(frozen=True)
class Number:
    """A cell that sorts by `value` and shows `text`; NaN comes last. `low`, `high`: its interval, for the CSV."""

    value: float
    text: str
    low: float | None = None
    high: float | None = None


Cell: TypeAlias = "str | Number"


class Tables:
    """Makes the tables of one page, each with an id of its own."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def __call__(
        self,
        name: str,
        header: Sequence[str],
        rows: Sequence[Sequence[Cell]],
        *,
        marked: Sequence[tuple[int, int]] = (),
    ) -> str:
        """A sortable table with a button that downloads it. `marked`: (row, column) of highlighted cells."""
        ident = f"{name}-{next(self._numbers)}"
        numeric = [any(isinstance(row[index], Number) for row in rows) for index in range(len(header))]
        head = "".join(
            f"<th scope='col'{_class(['number'] if is_number else [])}><button type='button'>{escape(title)}</button></th>"
            for title, is_number in zip(header, numeric, strict=True)
        )
        found = set(marked)
        body = "".join(
            "<tr>" + "".join(_cell(cell, (i, j) in found) for j, cell in enumerate(row)) + "</tr>"
            for i, row in enumerate(rows)
        )
        return (
            f"<div class='scroll'><table id='{ident}'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
            f"<button type='button' class='csv' data-table='{ident}'>CSV</button>"
        )


def _cell(cell: Cell, marked: bool) -> str:
    kinds = ["mark"] if marked else []
    if isinstance(cell, str):
        kinds += ["long"] if len(cell) > LONG else []
        return f"<td{_class(kinds)}>{escape(cell)}</td>"
    ends = (
        ""
        if cell.low is None or cell.high is None
        else f" data-low='{_plain(cell.low)}' data-high='{_plain(cell.high)}'"
    )
    return f"<td{_class([*kinds, 'number'])} data-v='{_plain(cell.value)}'{ends}>{escape(cell.text)}</td>"


def _class(kinds: Sequence[str]) -> str:
    return f" class='{' '.join(kinds)}'" if kinds else ""


def _plain(value: float) -> str:
    return f"{value:.10g}" if math.isfinite(value) else ""


def legend(labels: Sequence[str]) -> str:
    """A button per run that shows and hides it in all figures, and the style of every series."""
    sample = "<svg viewBox='0 0 34 10' aria-hidden='true'><path class='line' d='M1 5H33'/></svg>"
    buttons = "".join(
        f"<button type='button' class='s{index}' data-series='{index}' aria-pressed='true'>{sample} {escape(label)}</button>"
        for index, label in enumerate(labels)
    )
    both = "".join(f"<button type='button' data-all='{word}'>{word} all</button>" for word in ("show", "hide"))
    rules = "".join(
        f".s{index}{{--c:var(--c{index % COLORS});--d:{DASHES[index // COLORS % len(DASHES)]}}}.off{index} figure .s{index}{{display:none}}"
        for index in range(len(labels))
    )
    bands = "<button type='button' data-bands='' aria-pressed='true'>bands</button>"
    more = (both if len(labels) > 1 else "") + bands
    return f"<style>{rules}</style><div class='legend' role='group' aria-label='runs shown in the figures'>{buttons}{more}</div>"


def figure(drawing: str, caption: str) -> str:
    """A chart with its caption."""
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def page(title: str, sections: Sequence[tuple[str, str]], *, top: str = "", stamp: str | None = None) -> str:
    """The page: sections are (heading, HTML); one without a heading follows the one before. `top`: above the contents' sections, such as the legend.

    `stamp`: what `--watch` compares with the state of the runs.
    """
    style, script = _file("page.css"), _file("page.js")
    headed = [(f"section-{number}", heading, body) for number, (heading, body) in enumerate(sections, 1)]
    listed = "".join(f"<li><a href='#{ident}'>{escape(heading)}</a></li>" for ident, heading, _ in headed if heading)
    contents = f"<nav aria-label='contents'><ol>{listed}</ol></nav>" if listed else ""
    body = "".join(
        (f"<h2 id='{ident}'>{escape(heading)}</h2>" if heading else "") + content for ident, heading, content in headed
    )
    watch = f" data-watch='{escape(stamp, quote=True)}'" if stamp else ""
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title><link rel='icon' href='data:,'>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{style}</style></head>"
        f"<body{watch}><h1>{escape(title)}</h1>{contents}{top}<main>{body}</main>"
        f"<p class='note'>Written by rlkit2 {__version__}.</p><script>{script}</script></body></html>\n"
    )


@cache
def _file(name: str) -> str:
    return resources.files("rlkit2.reporting").joinpath(name).read_text(encoding="utf-8")
