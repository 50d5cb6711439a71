"""The completion script, in a real bash."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from rlkit2.cli import completion
from rlkit2.cli.main import main


def test_bash_completes_commands_agents_datasets_and_options(
    tmp_path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash")
    monkeypatch.setattr(
        completion, "_options", lambda *words: [f"--{'-'.join(words)}-option", "--quiet"]
    )  # each help takes its time
    assert main(["--completion", "bash"]) == 0
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)
    show = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _rlkit2; echo "${COMPREPLY[*]}"'
    for words, expected in (
        (["rlkit2", "tra"], "train"),
        (["rlkit2", "train", "odice_il_"], "odice_il_zero"),
        (["rlkit2", "train", "iql", "--tr"], "--train-iql-option"),
        (["rlkit2", "data", "rela"], "relabel"),
        (["rlkit2", "data", "check", "x", "--d"], "--data-check-option"),
        (["rlkit2", "train", "bc", "--dataset", "builtin/pendulum/r"], "builtin/pendulum/random-v0"),
        (["rlkit2", "report", "a", "--q"], "--quiet"),
    ):
        shown = subprocess.run(["bash", "-c", show, str(script), *words], capture_output=True, text=True, check=True)
        assert shown.stdout.strip() == expected


def test_options_are_those_of_the_help() -> None:
    assert {"--watch", "--out", "--plain"} <= set(completion._options("report"))


def test_other_shells_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", "fish"]) == 2
    assert "there is completion for bash and zsh, not 'fish'" in capsys.readouterr().err
