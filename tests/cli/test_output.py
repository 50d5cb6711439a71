"""One place prints, one place explains: no command makes a console of its own or says twice what it does."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import shlex
import typing
from pathlib import Path

import pytest

from rlkit2 import terminal
from rlkit2.cli import main, output, parsing
from rlkit2.cli.main import COMMANDS
from rlkit2.envs.builtin import builtin_id

FILES = sorted(Path(main.__file__).parent.glob("*.py"))
GROUPS = {
    name: module for name, (module, _) in COMMANDS.items() if hasattr(importlib.import_module(module), "SUBCOMMANDS")
}
FUNCTIONS = {
    f"{group} {name}": function
    for group, module in GROUPS.items()
    for name, function in importlib.import_module(module).SUBCOMMANDS.items()
}


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "output.py"], ids=lambda path: path.name)
def test_consoles_are_made_in_one_place(path: Path) -> None:
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call.id for call in calls if isinstance(call, ast.Name) and call.id == "Console"]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_commands_docstring_is_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = parsing.help_text(FUNCTIONS[name])
    first = text.partition("\n")[0]
    assert first.endswith(".")
    assert len(first.split()) >= 4  # a sentence, not "Fit."
    assert f"Example: rlkit2 {name} " in f"{text} "
    with pytest.raises(SystemExit) as ended:
        main.main([*name.split(), "--help"])
    assert not ended.value.code
    shown = " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert " ".join(first.split()) in shown
    for parameter in inspect.signature(FUNCTIONS[name]).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            kind = typing.get_type_hints(FUNCTIONS[name])[parameter.name]
            group = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else (parameter,)
            for option in (field.name for field in group):
                name_typed = option.rstrip("_").replace("_", "-")
                assert f"--{name_typed}" in shown or f"--no-{name_typed}" in shown


@pytest.mark.parametrize("group", GROUPS)
def test_a_groups_help_lists_the_first_lines(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([group, "--help"]) == 0
    shown = capsys.readouterr().out
    for name, function in importlib.import_module(GROUPS[group]).SUBCOMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(parsing.summary(function))}$", shown, re.M)


@pytest.mark.parametrize("path", ["runs/a", "runs/my run's", "a $HOME `x`", "-x"])
def test_hints_can_be_pasted(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    output.say_next("rlkit2", "evaluate", Path(path))
    line = capsys.readouterr().out.removesuffix("\n")
    assert shlex.split(line.removeprefix("next: ")) == ["rlkit2", "evaluate", path]


def test_json_has_null_for_what_json_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"a": [1.0, float("nan")], "b": {"c": (float("inf"), "x")}})
    assert "".join(capsys.readouterr().out.split()) == '{"a":[1.0,null],"b":{"c":[null,"x"]}}'


@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_table_uses_the_terminal_and_keeps_an_interval_in_one_piece(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = output.Console
    monkeypatch.setattr(output, "console", lambda: console(width=width, highlight=False))
    row = ["odice-a", "4", "67.3 [38.0, 96.6]", "65.6 [22.2, 109.1]", "39.6", "67.3", "1.00 [0.58, 1.00]"]
    output.print_table(["run", "seeds", "mean [95 %]", "IQM [95 %]", "last", "best*", "P(> bc)"], [row], left=1)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(lines).replace("\N{NO-BREAK SPACE}", " ")
    for part in ("67.3", "[38.0, 96.6]", "[22.2, 109.1]", "[0.58, 1.00]") if width > 60 else ("67.3",):
        assert part in text
    body = [line for line in lines[2:] if line.strip() and "─" not in line]
    assert len(body) == (1 if width == 160 else 2) or width == 60


def test_quiet_and_plain_go_with_every_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run(arguments: list[str]) -> None:
        seen.append((list(arguments), terminal.asked.quiet, terminal.asked.plain))
        output.say_next("rlkit2", "evaluate", "x")

    monkeypatch.setattr(importlib.import_module(COMMANDS["doctor"][0]), "run", run)
    assert main.main(["doctor", "--quiet", "a", "--plain", "--", "--quiet"]) == 0
    assert main.main(["doctor", "b"]) == 0
    assert seen == [(["a", "--", "--quiet"], True, True), (["b"], False, False)]
    assert capsys.readouterr().out.count("next:") == 1
    with terminal.options_of(["--plain"]):
        monkeypatch.setenv("FORCE_COLOR", "1")
        assert not output.console().is_terminal


SINGLE = {
    name: getattr(importlib.import_module(module), name)
    for name, (module, _) in COMMANDS.items()
    if name not in GROUPS and name != "train"
}
EXAMPLES = [
    (name, line.strip().removeprefix("Example: "))
    for name, function in {**FUNCTIONS, **SINGLE}.items()
    for line in parsing.help_text(function).splitlines()
    if line.strip().removeprefix("Example: ").startswith("rlkit2 ")
]


def test_every_command_has_an_example() -> None:
    assert {name for name, _ in EXAMPLES} == {*FUNCTIONS, *SINGLE}


@pytest.mark.parametrize(("name", "line"), EXAMPLES, ids=[line for _, line in EXAMPLES])
def test_examples_work_as_typed_on_a_fresh_machine(name: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They name only built-in datasets, and every option and value in them is understood."""
    words = shlex.split(line)
    command = words[words.index("rlkit2") + 1 :]
    group = command[0] if command[0] in GROUPS else None
    assert " ".join(command[: 2 if group else 1]) in {name, "train"}
    for word in command:
        if re.match(r"(zoo|mujoco|D4RL)/", word) or (word.startswith("builtin/") and not builtin_id(word)):
            pytest.fail(f"{word} is not on a fresh machine")
    if command[0] != "train":  # whose options are checked with its own tests
        monkeypatch.setattr(parsing, "bound", lambda *values, **options: lambda: BOUND(*values, **options) and None)
        assert (
            main.main(
                [word for word in command if not word.startswith(">")][: command.index(">") if ">" in command else None]
            )
            == 0
        )


BOUND = parsing.bound
