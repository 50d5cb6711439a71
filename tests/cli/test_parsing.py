"""Arguments that do not fit are one line, whatever frame the parser draws around it."""

from __future__ import annotations

import pytest

from rlkit2.cli.main import main
from rlkit2.cli.parsing import one_line

LINES = """╭─ Value error ──────╮
│ Error:  one        │
│ two.               │
│ ────────────────── │
│ rest               │
╰────────────────────╯
"""
PLAIN = """ Value error
 --------------------
  Error:  one
  two.
  -------------------
  rest
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "no run is named; give the folder of a run or of a saved policy"),
        (["evaluate", "x", "--episodes", "u"], "Error parsing --episodes: invalid literal for int() with base 10: 'u'; rlkit2"),
        (["evaluate", "x", "--episode", "3"], "Unrecognized options: --episode, 3; did you mean --episodes?"),
        (["evaluate", "x", "--env"], "Missing value for argument '--env'"),
        (["compare", "x", "--marckdown"], "did you mean --markdown?"),
        (["report", "x", "--ouut", "y"], "did you mean --out?"),
        (["sweep"], "Missing from rlkit2 sweep: PATH"),
        (["train", "bc", "--steps"], "Missing value for argument '--steps'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line_and_status_two(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("rlkit2: ")
    assert error.count("\n") == 1
    assert message in error


def test_help_still_comes_whole(capsys):
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--help"])
    assert end.value.code == 0
    assert "--episodes" in capsys.readouterr().out


@pytest.mark.parametrize("text", [LINES, PLAIN])
def test_the_words_of_a_frame(text):
    assert one_line(text) == "Error: one two"
    assert one_line("") == ""
