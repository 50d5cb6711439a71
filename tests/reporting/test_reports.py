"""Scores, comparisons and reports of runs written by hand."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from rlkit2.cli.main import main
from rlkit2.errors import ConfigError, RunError
from rlkit2.evaluation.scores import score_history, score_summary
from rlkit2.reporting import compare, group_runs, learning_curves, write_report
from rlkit2.reporting.groups import settings_table, without_repeats
from tests.reporting.written_runs import STEPS, make_run


def test_the_last_evaluation_is_the_headline_and_the_best_is_marked(tmp_path):
    summary = score_summary(make_run(tmp_path / "a"), last=2)
    assert summary["unit"] == "normalized score"
    assert summary["final"]["step"] == 30
    assert summary["final"]["mean"] == pytest.approx(50.75, abs=1)
    assert summary["last"]["evaluations"] == 2
    assert summary["last"]["mean"] == pytest.approx(55.75, abs=1)
    assert summary["best"]["oracle"] is True
    assert summary["best"]["step"] == 20
    assert summary["final"]["interval"][0] < summary["final"]["mean"] < summary["final"]["interval"][1]
    json.dumps(summary, allow_nan=False)


def test_sampled_evaluations_do_not_mix_with_deterministic_ones(tmp_path):
    run = make_run(tmp_path / "a", seeds=(0,))
    with (run.path / "evaluations.jsonl").open("a") as file:
        file.write(
            json.dumps(
                {
                    "step": 30,
                    "seed": 0,
                    "returns": [0.0],
                    "lengths": [1],
                    "normalized_scores": [0.0],
                    "deterministic": False,
                }
            )
            + "\n"
        )
    assert score_history(run).scores[-1].shape == (1, 6)


def test_a_stopped_seed_is_missing_and_said(tmp_path):
    run = make_run(tmp_path / "a")
    lines = [json.loads(line) for line in (run.path / "evaluations.jsonl").read_text().splitlines()]
    kept = [line for line in lines if not (line["seed"] == 2 and line["step"] > 10)]
    (run.path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    (run.path / "manifest.json").write_text(json.dumps({"stopped": {"2": {"step": 15, "metric": "loss/value"}}}))
    summary = score_summary(run)
    assert summary["final"]["mean"] is None
    assert summary["final"]["per_seed"][2] is None
    assert summary["final"]["per_seed"][1] is not None
    assert summary["best"]["step"] == 10
    comparison = compare([run])
    assert any("seed 2 stopped at step 15" in note for note in comparison.notes)
    assert comparison.cells()[0][3] == "n/a"
    assert "seed 2 stopped at step 15" in write_report([run], tmp_path / "page.html").read_text()


def test_runs_group_by_agent_configuration_and_dataset(tmp_path):
    runs = [
        make_run(tmp_path / "0", "bc"),
        make_run(tmp_path / "1", "odice", seeds=(0, 1)),
        make_run(tmp_path / "2", "odice", seeds=(2, 3)),
        make_run(tmp_path / "3", "odice", gradient_rule="semi"),
        make_run(tmp_path / "4", "odice", "zoo/cheetah/v0", gradient_rule="semi"),
    ]
    groups = group_runs(runs)
    assert [(group.label, group.dataset.split("/")[1], len(group.runs)) for group in groups] == [
        ("bc", "hopper", 1),
        ("odice-a", "hopper", 2),
        ("odice-b", "hopper", 1),
        ("odice-b", "cheetah", 1),  # the same settings have the same letter on every dataset
    ]
    assert settings_table(groups) == (["run", "gradient_rule"], [["odice-a", "orthogonal"], ["odice-b", "semi"]])
    comparison = compare(runs, baseline="odice-a")
    assert comparison.markdown().count("gradient_rule") == 1
    assert compare(runs, baseline=str(runs[3].path)).baseline == "odice-b"
    with pytest.raises(
        ConfigError, match="baseline 'odice' is more than one of the compared runs: 'bc', 'odice-a', 'odice-b'"
    ):
        compare(runs, baseline="odice")


def test_labels_are_short_however_much_differs(tmp_path):
    """Settings of 150 characters are a column each in a table of their own, never a label."""
    runs = [
        make_run(
            tmp_path / str(i), "my_agents.py:Careful", temperature=float(i), hidden_sizes=[256, 256], extra=f"{i}" * 150
        )
        for i in range(28)
    ]
    groups = group_runs(runs)
    assert [group.label for group in groups[:3]] == ["Careful-a", "Careful-b", "Careful-c"]
    assert groups[-1].label == "Careful-ab"
    header, rows = settings_table(groups)
    assert header == ["run", "temperature", "extra"]
    assert rows[2] == ["Careful-c", "2", "2" * 150]
    other = make_run(tmp_path / "other", "others:Careful")
    assert {group.label for group in group_runs([runs[0], other])} == {"my_agents.py:Careful", "others:Careful"}


def test_the_same_training_twice_counts_once_and_is_named(tmp_path):
    runs = [make_run(tmp_path / "0"), make_run(tmp_path / "1", seeds=(3, 4)), make_run(tmp_path / "2", "bc")]
    with pytest.raises(ConfigError, match=r"both hold seed 3 of odice on zoo/hopper/medium-v0"):
        group_runs(runs)
    comparison = compare(runs)
    assert [(row.label, row.seeds) for row in comparison.rows] == [("odice", 4), ("bc", 4)]
    assert f"left out: {runs[1].path} is the training of {runs[0].path} again (seed 3)" in comparison.notes
    (runs[0].path / "evaluations.jsonl").unlink()  # now the second one says more
    kept, said = without_repeats(runs)
    assert [run.path.name for run in kept] == ["1", "2"]
    assert said == [f"left out: {runs[0].path} is the training of {runs[1].path} again (seed 3)"]
    assert without_repeats([runs[2], runs[2]]) == ([runs[2]], [])  # one folder, named twice


def test_scores_and_returns_never_meet(tmp_path):
    """One run without normalised scores on a dataset: all of that dataset are returns, a note says so, and none is held against a score."""
    runs = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", "bc", normalized=False),
        make_run(tmp_path / "c", dataset="x/y-v0"),
    ]
    comparison = compare(runs)
    assert [(row.label, row.dataset, row.unit) for row in comparison.rows] == [
        ("odice", "zoo/hopper/medium-v0", "return"),
        ("bc", "zoo/hopper/medium-v0", "return"),
        ("odice", "x/y-v0", "normalized score"),
    ]
    assert comparison.rows[0].mean.value == pytest.approx(507.5, abs=10)
    assert comparison.rows[0].gap is None
    assert comparison.rows[2].gap.value == pytest.approx(49.25, abs=1)
    assert (
        "zoo/hopper/medium-v0: some runs have no normalised scores, so these are the returns of all" in comparison.notes
    )
    assert any(
        "no row over all datasets: there are returns and no scores on zoo/hopper" in note for note in comparison.notes
    )


def test_a_run_without_evaluations_does_not_hide_those_beside_it(tmp_path):
    """It is left out with its name; one whose seeds diverged is not, since leaving it out would make the mean look better."""
    runs = [make_run(tmp_path / "a", seeds=(0, 1)), make_run(tmp_path / "b", seeds=(2,))]
    (runs[1].path / "evaluations.jsonl").unlink()
    comparison = compare(runs)
    assert comparison.rows[0].seeds == 2
    assert (
        f"odice on zoo/hopper/medium-v0: {runs[1].path} has no evaluations (finished) and is left out"
        in comparison.notes
    )
    (runs[1].path / "manifest.json").write_text(json.dumps({"stopped": {"2": {"step": 5, "metric": "loss/value"}}}))
    assert compare(runs).cells()[0][2:4] == ["3", "n/a"]


def test_a_run_that_is_not_through_says_how_far_it_was_evaluated(tmp_path):
    run = make_run(tmp_path / "a")
    run.config["training"]["steps"] = 50
    assert any("is finished; its last evaluation is at step 30 of 50" in note for note in compare([run]).notes)


def test_datasets_that_share_an_id_but_not_their_content_are_kept_apart(tmp_path):
    runs = [make_run(tmp_path / "0"), make_run(tmp_path / "1")]
    runs[1].config["dataset"]["content_hash"] = "another content"
    assert len({group.dataset for group in group_runs(runs)}) == 2


def test_comparison_numbers(tmp_path):
    datasets = ("a/b-v0", "a/c-v0")
    runs = [
        make_run(tmp_path / f"{agent}{i}", agent, d, level=level)
        for agent, level in (("bc", 20), ("odice", 60))
        for i, d in enumerate(datasets)
    ]
    comparison = compare(runs, baseline="bc")
    assert [(row.label, row.dataset) for row in comparison.rows] == [
        ("bc", "a/b-v0"),
        ("odice", "a/b-v0"),
        ("bc", "a/c-v0"),
        ("odice", "a/c-v0"),
        ("bc", "all datasets"),
        ("odice", "all datasets"),
    ]
    bc, odice = comparison.rows[-2:]
    assert bc.improvement is None
    assert odice.improvement.value == 1
    assert odice.mean.low > bc.mean.high
    assert odice.mean.value == pytest.approx(60.75, abs=1)
    assert odice.best > odice.mean.value
    assert (odice.seeds, odice.to_dict()["episodes"]) == (8, 6)
    json.dumps(comparison.to_dict(), allow_nan=False)


def test_returns_are_compared_where_there_are_no_scores_and_never_averaged_over_datasets(tmp_path):
    runs = [
        make_run(tmp_path / str(i), dataset=dataset, normalized=False) for i, dataset in enumerate(("a/b-v0", "a/c-v0"))
    ]
    rows = compare(runs).rows
    assert [row.dataset for row in rows] == ["a/b-v0", "a/c-v0"]
    assert rows[0].unit == "return"
    assert rows[0].mean.value == pytest.approx(507.5, abs=10)
    assert "(return)" in compare(runs).cells()[0][0]


class Page(HTMLParser):
    """Collects what a browser would fetch, and checks that elements close."""

    def __init__(self):
        super().__init__()
        self.fetched, self.open, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "br", "path", "use", "rect", "circle", "link"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not value.startswith("#") and value != "data:,":
                self.fetched.append(value)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag


def test_the_report_is_one_page_that_fetches_nothing(tmp_path):
    runs = [make_run(tmp_path / "bc", "bc", level=20), make_run(tmp_path / "odice", temperature=0.6)]
    path = write_report(runs, tmp_path / "report.html", title="A <b> title")
    text = path.read_text()
    page = Page()
    page.feed(text)
    assert not page.fetched
    assert not page.open
    assert page.tags.count("script") == 1
    # intervals, learning curves, profile, two budgets, three metrics; and one sample of each line in the legend
    assert page.tags.count("svg") == 1 + 1 + 1 + 2 + 3 + 2
    assert page.tags.count("figure") == 8
    assert len(re.findall(r"<svg [^>]*role='img' aria-label='[^']{20,}'", text)) == 8  # every figure says what it shows
    assert "http" not in text
    for expected in (
        "Final scores",
        "projection",
        "weight",
        "gradient_rule",
        "rlkit2 &lt;train&gt;",
        "A &lt;b&gt; title",
        "oracle",
        "P(&gt; bc)",
    ):
        assert expected in text
    ids = re.findall(r'<clipPath id="(\w+)"', text)
    assert len(ids) == len(set(ids))
    assert write_report(runs, tmp_path / "again.html", title="A <b> title").read_text() == text


def test_learning_curves_draw_every_seed_the_mean_and_a_band(tmp_path):
    groups = group_runs([make_run(tmp_path / "bc", "bc", level=20), make_run(tmp_path / "odice")])
    (axes,) = learning_curves(groups).axes
    assert len(axes.lines) == 2 * (4 + 1)
    assert len(axes.collections) == 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["bc", "odice"]
    np.testing.assert_array_equal(axes.lines[4].get_xdata(), STEPS)
    np.testing.assert_allclose(axes.lines[4].get_ydata()[-1], 20.75, atol=1)
    with pytest.raises(ConfigError, match="one dataset"):
        learning_curves(group_runs([make_run(tmp_path / "c"), make_run(tmp_path / "d", dataset="x/y-v0")]))


def test_the_commands_print_what_the_library_says(tmp_path, capsys):
    runs = [make_run(tmp_path / "bc", "bc", level=20), make_run(tmp_path / "odice")]
    paths = [str(run.path) for run in runs]
    assert main(["compare", *paths, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == compare(runs).to_dict()
    assert main(["compare", *paths, "--markdown", "--baseline", "odice"]) == 0
    assert capsys.readouterr().out == compare(runs, baseline="odice").markdown()
    assert main(["compare", *paths]) == 0
    assert "P(> bc)" in capsys.readouterr().out
    assert main(["report", *paths, "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").stat().st_size > 10_000


@pytest.mark.parametrize("command", ["compare", "report"])
def test_bad_input_is_one_line_and_status_two(tmp_path, capsys, command):
    run = make_run(tmp_path / "a")
    out = ["--out", str(tmp_path / "r.html")] if command == "report" else []
    for arguments, expected in (
        ([str(tmp_path / "nothing")], "nothing does not exist"),
        ([str(run.path), str(tmp_path / "nothing")], "nothing does not exist"),
        ([str(tmp_path)], "is a folder of runs, such as a sweep's; name its runs"),
        ([str(run.path / "config.json")], "config.json is a file, not the folder of a run"),
        ([str(run.path), "--baseline", "iql"], "baseline 'iql' is none of the compared runs: 'odice'"),
        ([], "nothing to compare"),
    ):
        assert main([command, *arguments, *out]) == 2
        error = capsys.readouterr().err
        assert expected in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("command", ["compare", "report"])
def test_no_run_keeps_the_others_from_being_shown(tmp_path, capsys, command):
    """One that was never evaluated is a row without scores; what is no run, or damaged, is left out with a line."""
    run, empty, damaged = make_run(tmp_path / "a"), make_run(tmp_path / "b", "bc"), make_run(tmp_path / "c", "iql")
    (empty.path / "evaluations.jsonl").unlink()
    (empty.path / "metrics.jsonl").write_text("")
    text = (damaged.path / "evaluations.jsonl").read_text().splitlines()
    (damaged.path / "evaluations.jsonl").write_text("\n".join([text[0], text[1][:20], *text[2:]]) + "\n")
    page = tmp_path / "r.html"
    out = ["--out", str(page)] if command == "report" else ["--json"]
    assert main([command, *map(str, (run.path, empty.path, damaged.path, tmp_path)), *out]) == 0
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 2
    assert re.search(r"left out: .*c/evaluations\.jsonl: line 2 is damaged", lines[0])
    assert "is a folder of runs, such as a sweep's; name its runs" in lines[1]
    if command == "report":
        assert "never evaluated: no scores" in page.read_text()
    else:
        first, second = json.loads(printed.out)["rows"]
        assert first["mean"]["value"] is not None
        assert second["mean"] == {"value": None, "interval": [None, None], "method": ""}
        assert any("b has no evaluations" in note for note in json.loads(printed.out)["notes"])
    nothing = write_report([empty], tmp_path / "nothing.html").read_text()
    assert "No evaluations." in nothing


def test_contradicting_evaluations_are_refused(tmp_path):
    run = make_run(tmp_path / "a", seeds=(0, 1))
    run.config["seeds"] = [0]
    with pytest.raises(RunError, match=r"seeds \[1\] that config.json does not name"):
        score_history(run)
