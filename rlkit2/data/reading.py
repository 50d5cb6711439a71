"""What a user may say about files that do not say it themselves: the options with which a dataset is opened, written once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlkit2.errors import ConfigError
from rlkit2.fields import Checked, Count


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(Checked):
    """How a dataset is read; the defaults leave everything to its files."""

    # keys of Dict observations, in order; default: all, or observation and desired_goal
    observation_keys: tuple[str, ...] | None = None
    # space of the observations, such as box(-1,1); default: that of the files, else inferred
    observation_space: str | None = None
    # space of the actions: box(-2,2), discrete(4), multidiscrete(3,2), discrete or continuous; default: that of the files, else inferred
    action_space: str | None = None
    # columns of a table by field, such as observations=o_* actions=a,b episodes=id; default: the usual names
    columns: tuple[str, ...] = ()
    # steps after which an episode was cut off, for files without timeouts
    max_episode_steps: Count | None = None
    # what is flagged as an end is a cut: the task never terminates
    never_terminates: bool = False
    # observations that are NaN become the value before them in the episode (previous; at its start the column's mean) or the mean; none: they stay
    fill_missing: Literal["previous", "mean"] | None = None

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `load_dataset`. Raises `ConfigError` for columns that are not FIELD=NAME."""
        return {**vars(self), "columns": read_columns(self.columns)}

    @property
    def given(self) -> dict[str, Any]:
        """The options that are not at their defaults."""
        plain = vars(type(self)())
        return {name: value for name, value in vars(self).items() if value != plain[name]}


def read_columns(texts: Sequence[str]) -> dict[str, tuple[str, ...]] | None:
    """`["observations=o_*", "actions=a,b"]` as a mapping; None where there are none."""
    found = {}
    for text in texts:
        field, equals, names = text.partition("=")
        if not equals or not names:
            raise ConfigError(f"--columns {text!r} is not a mapping; write FIELD=NAME, for example 'observations=o_*'")
        found[field] = tuple(names.split(","))
    return found or None
