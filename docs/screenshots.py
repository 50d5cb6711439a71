"""Make the pictures of the README and of the documentation from real runs: `python docs/screenshots.py` (minutes; needs chromium and chromedriver).

Four agents are trained on `builtin/pendulum`; the terminal's table is taken while one of them trains, the report's pages from a headless browser.
"""

from __future__ import annotations

import argparse
import base64
import io
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

import rlkit2
import rlkit2.agents
from rlkit2.reporting import write_report
from rlkit2.training.progress import Progress
from rlkit2.training.run import Run
from tests import browsers

IMAGES = Path(__file__).parent / "images"
WIDTHS = {"hidden_sizes": (64, 64), "value_hidden_sizes": (64, 64), "policy_hidden_sizes": (64, 64)}
VIEWS = {  # name -> width, dark, what is scrolled to, height of the picture
    "report": (1200, False, "h1", 900),
    "report-phone": (390, True, "h1", 844),
    "report-metrics": (1200, False, "#section-2", 760),
}


class Taken(Progress):
    """Remembers what the terminal showed at the last line of metrics before the end."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO(), width=100))
        self.picture = ""

    def log(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Also draw the table, once a score is in it."""
        super().log(lines)
        if any("score" in row for row in self._rows.values()) and self._now() < self._steps:
            drawn = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
            drawn.print(self._table())
            picture = drawn.export_svg(title="rlkit2 train odice --dataset builtin/pendulum --seeds 4")
            self.picture = re.sub(
                r"@font-face \{.*?\}", "", picture, flags=re.S
            )  # which would be loaded from elsewhere


def train_all(folder: Path, steps: int) -> list[Run]:
    """The runs of the pictures."""
    runs = []
    for agent in ("bc", "td3bc", "iql", "odice"):
        names = rlkit2.agents.agent_class(agent).config_class.__dataclass_fields__
        progress = Taken()
        runs.append(
            rlkit2.train(
                agent,
                "builtin/pendulum",
                seeds=4,
                steps=steps,
                eval_every=max(1, steps // 5),
                overrides={name: width for name, width in WIDTHS.items() if name in names},
                out=folder,
                progress=progress,
            )
        )
        if agent == "odice":
            (IMAGES / "terminal.svg").write_text(progress.picture)
    return runs


def take(page: Path, folder: Path) -> None:
    """Pictures of the page in a browser."""
    with browsers.opened(folder) as browser:
        for name, (width, dark, place, height) in VIEWS.items():
            browsers.see_as(browser, width=width, dark=dark, height=height)
            browser.get(page.as_uri())
            top = browser.execute_script(
                "return document.querySelector(arguments[0]).getBoundingClientRect().top", place
            )
            clip = {"x": 0, "y": max(0, top - 16), "width": width, "height": height, "scale": 1}
            shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
            (IMAGES / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


def main() -> int:
    """Train, write the page, take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--runs", type=Path, help="folder of the runs; those that are there are not trained again")
    options = parser.parse_args()
    if lacks := browsers.missing():
        sys.stderr.write(f"{lacks}\n")
        return 1
    IMAGES.mkdir(exist_ok=True)
    with TemporaryDirectory(prefix="pictures-") as temporary:
        folder = options.runs or Path(temporary, "runs")
        there = sorted(path.parent for path in folder.glob("*/config.json"))
        runs = [Run(path) for path in there] if there else train_all(folder, options.steps)
        title = f"Pendulum, four agents after {runs[0].config['training']['steps']:,} updates"
        page = write_report(runs, Path(temporary, "report.html"), baseline="bc", title=title)
        take(page, Path(temporary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
