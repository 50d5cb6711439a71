"""`rlkit2 --completion SHELL`: a script that completes commands, agents, built-in datasets and options."""

from __future__ import annotations

import importlib
import io
import re
from contextlib import redirect_stdout, suppress

from rlkit2.agents import list_agents
from rlkit2.envs.builtin import builtin_recipes
from rlkit2.errors import ConfigError

SHELLS = ("bash", "zsh")
# What the words before the cursor offer; options are offered after a dash, files where nothing else fits.
SCRIPT = """\
_rlkit2() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" offered=""
  case "$before" in
    --dataset) offered="{datasets}" ;;
    *) case "${{COMP_WORDS[*]:1:COMP_CWORD-1}}" in
{cases}
    esac ;;
  esac
  COMPREPLY=($(compgen -W "$offered" -- "$word"))
  [ ${{#COMPREPLY[@]}} -eq 0 ] && COMPREPLY=($(compgen -f -- "$word"))
}}
complete -o filenames -F _rlkit2 rlkit2
"""


def completion(shell: str) -> str:
    """The script for a shell, to be put into its start file.

    Raises:
        ConfigError: another shell than bash and zsh.
    """
    if shell not in SHELLS:
        raise ConfigError(f"there is completion for {' and '.join(SHELLS)}, not {shell!r}")
    from rlkit2.cli.main import COMMANDS

    cases = [('""', [*COMMANDS, "--version", "--help"])]
    for name, (module, _) in COMMANDS.items():
        inner = list(getattr(importlib.import_module(module), "SUBCOMMANDS", ()))
        cases += [(f'"{name} {sub}"*', _options(name, sub)) for sub in inner]
        if name == "train":
            cases += [(f'"train {agent}"*', _options("train", agent)) for agent in list_agents()]
        firsts = list_agents() if name == "train" else inner
        cases.append((f'"{name}"*', [*firsts, *_options(name)]))
    lines = "\n".join(f'      {words}) offered="{" ".join(offered)}" ;;' for words, offered in cases)
    script = SCRIPT.format(datasets=" ".join(builtin_recipes()), cases=lines)
    return ("autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else "") + script


def _options(*words: str) -> list[str]:
    """Options that a command's help names."""
    from rlkit2.cli.main import main

    with redirect_stdout(io.StringIO()) as text, suppress(SystemExit):
        main([*words, "--help"])
    return sorted({*re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text.getvalue()), "--quiet", "--plain"})
