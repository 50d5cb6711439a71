"""Options of every command that reads a dataset: what the files do not tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from tyro.conf import arg

from rlkit2.errors import ConfigError


@dataclass(frozen=True)
class Reading:
    """How to read a dataset; the defaults leave everything to the files."""

    # keys of Dict observations, in order; default: all, or observation and desired_goal
    observation_keys: Annotated[tuple[str, ...] | None, arg(metavar="KEY...")] = None
    # space of the observations, such as "box(-1,1)"; default: that of the files, else inferred
    observation_space: Annotated[str | None, arg(metavar="SPACE")] = None
    # space of the actions: "box(-2,2)", "discrete(4)", "multidiscrete(3,2)", discrete or continuous; default: that of the files, else inferred
    action_space: Annotated[str | None, arg(metavar="SPACE")] = None
    # columns of a table by field, such as "observations=o_*" "actions=a,b" "episodes=id"; default: the usual names
    columns: Annotated[tuple[str, ...], arg(metavar="FIELD=NAME...")] = ()
    # steps after which an episode was cut off, for files without timeouts
    max_episode_steps: Annotated[int | None, arg(metavar="N")] = None
    # what is flagged as an end is a cut: the task never terminates
    never_terminates: bool = False
    # where no spaces are stored, build the environment as the file says, which runs the code it names
    trust_env: bool = False

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `load_dataset`. Raises `ConfigError` for columns that are not FIELD=NAME."""
        return {
            "observation_keys": self.observation_keys,
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "columns": read_columns(self.columns),
            "max_episode_steps": self.max_episode_steps,
            "never_terminates": self.never_terminates,
            "trust_env": self.trust_env,
        }


def read_columns(texts: Sequence[str]) -> dict[str, tuple[str, ...]] | None:
    """`["observations=o_*", "actions=a,b"]` as a mapping; None where there are none."""
    found = {}
    for text in texts:
        field, equals, names = text.partition("=")
        if not equals or not names:
            raise ConfigError(f"--columns {text!r} is not a mapping; write FIELD=NAME, for example 'observations=o_*'")
        found[field] = tuple(names.split(","))
    return found or None
