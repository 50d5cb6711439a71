"""The report as a page: what it holds for many runs and for none, what a browser makes of it, and how it is kept up to date."""

from __future__ import annotations

import csv
import json
import re
import urllib.error
import urllib.request

import numpy as np
import pytest

from rlkit2.data.spaces import DatasetWarning
from rlkit2.errors import ConfigError
from rlkit2.reporting import write_report
from rlkit2.reporting.charts import Line, _ticks, line_chart
from rlkit2.reporting.groups import open_runs, split_folders
from rlkit2.reporting.page import Number, Tables
from rlkit2.reporting.report import report_page
from rlkit2.reporting.run_sections import readable
from rlkit2.reporting.watching import served, state_of
from tests import browsers
from tests.reporting.written_runs import make_run


def numbers(path: str) -> np.ndarray:
    """The points of a path of relative moves."""
    first, moves = re.fullmatch(r"M(-?\d+ -?\d+)l([-\d ]+)", path).groups()
    steps = np.array((first + " " + moves).split(), dtype=int).reshape(-1, 2)
    return steps.cumsum(axis=0)


def test_a_line_is_where_its_numbers_are() -> None:
    x, y = np.array([0.0, 10.0, 20.0, 40.0]), np.array([1.0, 3.0, 2.0, 5.0])
    drawing = line_chart(
        "a", [Line(3, "<b>", x, y, y - 1, y + 1)], x_label="updates", y_label="score", alt='a "b"', view=(0.0, 6.0)
    )
    points = numbers(re.search(r"class='line' d='([^']+)'", drawing)[1])
    assert np.allclose((points[:, 0] - points[0, 0]) / (points[-1, 0] - points[0, 0]), x / 40, atol=1e-3)
    assert np.allclose((points[:, 1] - points[0, 1]) / (points[3, 1] - points[0, 1]), (y - 1) / 4, atol=2e-3)
    assert "<g class='s3'><title>&lt;b&gt;</title>" in drawing
    assert "aria-label='a &quot;b&quot;'" in drawing


def test_gaps_and_single_points_are_drawn_and_nothing_breaks_on_odd_numbers() -> None:
    x = np.arange(5.0)
    for y in (
        np.array([1.0, np.nan, 3.0, 4.0, np.inf]),
        np.full(5, np.nan),
        np.full(5, 7.0),
        np.array([1e308, -1e308, 0, 0, 0]),
        np.zeros(5),
        np.array([1e-300, 0, 0, 0, 2e-300]),
    ):
        with np.errstate(all="raise", under="ignore"):
            drawing = line_chart("a", [Line(0, "a", x, y, y, y)], x_label="", y_label="", alt="")
        assert "nan" not in drawing
        assert "inf" not in drawing
    assert line_chart("a", [], x_label="", y_label="", alt="").startswith("<svg")
    assert _ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert _ticks(-13.0, 49.0) == [0.0, 20.0, 40.0]


def test_thinning_keeps_the_last_point() -> None:
    x = np.arange(1001.0)
    points = numbers(
        re.search(
            r"class='line' d='([^']+)'",
            line_chart("a", [Line(0, "a", x, x)], x_label="", y_label="", alt="", points=50),
        )[1]
    )
    assert len(points) <= 52
    full = numbers(
        re.search(
            r"class='line' d='([^']+)'",
            line_chart("a", [Line(0, "a", x, x)], x_label="", y_label="", alt="", points=2000),
        )[1]
    )
    assert (points[-1] == full[-1]).all()


def test_cells_carry_their_numbers() -> None:
    text = Tables()(
        "t",
        ["a", "b <i>"],
        [["x & y", Number(1.5, "1.5 [1, 2]", 1.0, 2.0)], ["z", Number(float("nan"), "n/a")]],
        marked=[(0, 0)],
    )
    assert "<td class='mark'>x &amp; y</td>" in text
    assert "<td class='number' data-v='1.5' data-low='1' data-high='2'>1.5 [1, 2]</td>" in text
    assert "data-v=''>n/a" in text
    assert "b &lt;i&gt;" in text


def test_json_within_json_is_escaped_once() -> None:
    spec = json.dumps({"env": json.dumps({"kwargs": json.dumps([1, {"a": "b"}])}), "name": "{odd", "list": "[1"})
    assert readable({"spec": spec}) == {"spec": {"env": {"kwargs": [1, {"a": "b"}]}, "name": "{odd", "list": "[1"}}
    deep = "[" * 5000 + "]" * 5000
    assert readable([deep]) == [deep]


def test_fifty_runs_fit_into_five_megabytes(tmp_path) -> None:
    runs = []
    for index in range(50):
        run = make_run(
            tmp_path / str(index), f"agent{index % 10}", level=float(index), seeds=(0, 1), variant=index // 10
        )
        line = {f"group{k % 5}/metric{k}": 1.0 for k in range(40)}
        text = "".join(
            json.dumps({"step": step, "seed": seed, **{name: step * 0.1 + k for k, name in enumerate(line)}}) + "\n"
            for step in range(1, 73)
            for seed in (0, 1)
        )
        (run.path / "metrics.jsonl").write_text(text)
        runs.append(run)
    page = report_page(runs)
    assert len(page.encode()) < 5e6
    assert page.count("aria-pressed='true'") == 50 + 1
    assert "agent9-e" in page


def test_runs_without_evaluations_are_shown_and_marked(tmp_path) -> None:
    run, empty = make_run(tmp_path / "a"), make_run(tmp_path / "b", "bc")
    (empty.path / "evaluations.jsonl").unlink()
    page = report_page([run, empty])
    assert "bc (no evaluations)" in page
    assert "without evaluations: bc" in page
    assert "<span class='mark'>no evaluations</span>" in page
    assert "never evaluated: no scores" in page
    assert "weight/zero" in page  # its metrics are there
    for folder in (run.path, empty.path):
        (folder / "metrics.jsonl").write_text("")
    (run.path / "evaluations.jsonl").unlink()
    nothing = report_page([run, empty])
    assert "No evaluations." in nothing
    assert "No metrics." in nothing


def test_measured_folders_are_shown_among_the_diagnostics(tmp_path) -> None:
    run = make_run(tmp_path / "a")
    (run.path / "uncertainty").mkdir()
    found = {
        "seeds": [0, 1, 2, 3],
        "nll": [1.0] * 4,
        "calibration_error": [0.25] * 4,
        "auroc": [None] * 4,
        "episodes": "15 held-out",
    }
    (run.path / "uncertainty/diagnostics.json").write_text(
        json.dumps({**found, "coverage": {"0.5": [0.4] * 4, "0.9": [0.8] * 4}})
    )
    starc, broken = tmp_path / "starc", tmp_path / "broken"
    for folder in (starc, broken):
        folder.mkdir()
    ci = [[[0, 0], [0.1, 0.3]], [[0.1, 0.3], [0, 0]]]
    matrix = {"names": ["true", "mine"], "values": [[0, 0.2], [0.2, None]], "ci": ci, "notes": ["few rows"]}
    (starc / "distances.json").write_text(json.dumps(matrix))
    (broken / "report.json").write_text("{}")
    paths, folders = split_folders([run.path, starc, broken])
    assert (paths, folders) == ([run.path], [starc, broken])
    page = report_page(open_runs(paths)[0], folders=folders)
    for expected in ("Calibration of TD errors", "15 held-out", "0.200 [0.100, 0.300]", "few rows", "cannot be read"):
        assert expected in page


def test_an_audit_is_shown_where_the_data_are_here(tmp_path) -> None:
    import h5py

    from rlkit2 import load_dataset

    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        for name, shape in (("observations", (40, 3)), ("actions", (40, 2)), ("rewards", (40,))):
            file[name] = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
        file["terminals"], file["timeouts"] = np.arange(40) % 10 == 9, np.zeros(40, bool)
    with pytest.warns(DatasetWarning):
        dataset = load_dataset(tmp_path / "d.hdf5")
    run, other = make_run(tmp_path / "a"), make_run(tmp_path / "b", dataset="x/y-v0")
    run.config["dataset"]["content_hash"] = dataset.spec.content_hash
    page = report_page([run, other])
    assert f"data-v='{len(dataset)}'" in page
    assert "no errors" in page
    assert "not in this machine&#x27;s cache" in page


def fetched(address: str, host: str | None = None) -> str:
    with urllib.request.urlopen(urllib.request.Request(address, headers={"Host": host} if host else {})) as answer:
        return answer.read().decode()


def test_a_watched_page_follows_the_runs_and_answers_this_machine_alone(tmp_path) -> None:
    run = make_run(tmp_path / "a")
    paths = [run.path, tmp_path / "later"]

    def page(stamp: str) -> str:
        return report_page(open_runs([path for path in paths if path.exists()])[0], stamp=stamp)

    with served(page, lambda: state_of(paths)) as address:
        assert address.startswith("http://127.0.0.1:")
        first = fetched(f"{address}stamp")
        assert f"data-watch='{first}'" in fetched(address)
        make_run(tmp_path / "later", "bc")
        second = fetched(f"{address}stamp")
        assert second != first
        assert "<td>bc</td>" in fetched(address)
        for bad in (lambda: fetched(f"{address}etc/passwd"), lambda: fetched(address, host="evil.example:80")):
            with pytest.raises(urllib.error.HTTPError):
                bad()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium, where this machine has one."""
    if lacks := browsers.missing():
        pytest.skip(lacks)
    with browsers.opened(tmp_path_factory.mktemp("browser")) as found:
        yield found


def column(browser, table: str, index: int) -> list[str]:
    script = (
        "return [...document.querySelectorAll(arguments[0] + ' tbody tr')].map(r => r.cells[arguments[1]].textContent)"
    )
    return browser.execute_script(script, table, index)


def test_a_reader_sorts_toggles_and_downloads(browser, tmp_path) -> None:
    from selenium.webdriver.common.by import By

    runs = [
        make_run(tmp_path / name, name, level=level)
        for name, level in (("bc", 20), ("iql", 60), ("odice", 40), ("new", 1))
    ]
    (runs[3].path / "evaluations.jsonl").unlink()
    path = write_report(runs, tmp_path / "report.html")
    browsers.see_as(browser, width=1200)
    browser.get(path.as_uri())
    table = "#scores-1"
    assert column(browser, table, 0) == ["bc", "iql", "odice", "new (no evaluations)"]
    mean = browser.find_elements(By.CSS_SELECTOR, f"{table} thead button")[3]
    mean.click()
    assert column(browser, table, 0)[:3] == ["iql", "odice", "bc"]
    mean.click()
    assert column(browser, table, 0) == ["bc", "odice", "iql", "new (no evaluations)"]  # no number: last both times
    assert browser.find_elements(By.CSS_SELECTOR, f"{table} thead th")[3].get_attribute("aria-sort") == "ascending"

    lines = browser.find_elements(By.CSS_SELECTOR, "figure g.s1")
    assert len(lines) >= 6
    button = browser.find_element(By.CSS_SELECTOR, ".legend [data-series='1']")
    shown = "return [...document.querySelectorAll('figure g.s1')].filter(g => getComputedStyle(g).display !== 'none').length"
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert browser.execute_script(shown) == 0
    assert browser.find_element(By.CSS_SELECTOR, "figure g.s0").is_displayed()
    button.click()
    assert browser.execute_script(shown) == len(lines)
    browser.find_element(By.CSS_SELECTOR, "[data-bands]").click()
    assert not browser.find_element(By.CSS_SELECTOR, "figure .band").is_displayed()

    text = browser.execute_script("return csvOf(document.querySelector(arguments[0]))", table)
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["run"] for row in rows] == ["bc", "odice", "iql", "new (no evaluations)"]
    low, value, high = (float(rows[0][f"mean [95 %]{end}"]) for end in (" low", "", " high"))
    assert low < value < high
    assert rows[3]["mean [95 %]"] == ""
    before = browser.execute_script("return performance.getEntriesByType('resource').length")
    assert before == 0  # nothing was loaded
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_shows_all_of_it(browser, tmp_path, dark: bool) -> None:
    runs = [
        make_run(tmp_path / str(i), "odice", level=10.0 * i, temperature=0.1 * i, long_setting="x" * 150)
        for i in range(4)
    ]
    path = write_report(runs, tmp_path / "report.html")
    browsers.see_as(browser, width=390, dark=dark)
    browser.get(path.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('details')].forEach(d => d.open = true),"
        "[...document.querySelectorAll('figure > svg')].map(s => [s.getBoundingClientRect().width, s.getScreenCTM().a])"
    )
    assert min(width for width, _ in sizes) > 330
    assert min(11 * scale for _, scale in sizes) > 9  # pixels of a letter of 11 units
    colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", colour)[:3])) / 3
    assert light < 60 if dark else light > 200
    line, paper = browser.execute_script(
        "const l = document.querySelector('figure .line'); return [getComputedStyle(l).stroke, getComputedStyle(document.body).backgroundColor]"
    )
    assert line != paper
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_watched_page_loads_itself_again_and_keeps_what_is_hidden(browser, tmp_path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    run = make_run(tmp_path / "a")
    paths = [run.path]
    make_run(tmp_path / "b", "bc")
    with served(lambda stamp: report_page(open_runs(paths)[0], stamp=stamp), lambda: state_of(paths)) as address:
        browsers.see_as(browser, width=1200)
        browser.get(address)
        browser.find_element(By.CSS_SELECTOR, ".legend [data-series='0']").click()
        paths.append(tmp_path / "b")
        WebDriverWait(browser, 30).until(lambda d: len(d.find_elements(By.CSS_SELECTOR, ".legend [data-series]")) == 2)
        pressed = [
            b.get_attribute("aria-pressed") for b in browser.find_elements(By.CSS_SELECTOR, ".legend [data-series]")
        ]
        assert pressed == ["false", "true"]


def test_only_folders_of_measurements_make_no_report(tmp_path) -> None:
    from rlkit2.cli.report import report

    (tmp_path / "distances.json").write_text("{}")
    with pytest.raises(ConfigError, match="at least one run"):
        report((tmp_path,))
