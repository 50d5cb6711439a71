"""Typed errors. Every message is one line that names the thing at fault and the mend; the command line prints it as it is."""

from __future__ import annotations

import contextlib
import importlib
import io
import signal
import warnings
from types import ModuleType


class RLKitError(Exception):
    """Base of every error that rlkit2 raises on purpose."""


class DatasetError(RLKitError, ValueError):
    """A dataset cannot be used as it is."""


class DatasetNotFoundError(DatasetError, LookupError):
    """No dataset with that id or path in any place that was searched."""


class CorruptDatasetError(DatasetError):
    """Files of a dataset are damaged, truncated or contradict each other."""


class UnsupportedSpaceError(DatasetError):
    """A space that cannot be flattened to fixed-size rows."""


class ConfigError(RLKitError, ValueError):
    """A configuration value is out of range or does not fit the data."""


class RewardError(RLKitError, ValueError):
    """A reward, a policy, dynamics or weights cannot be used as they are."""


class RunError(RLKitError):
    """A run folder is missing, damaged, in use, or cannot be written."""


class EnvironmentUnavailableError(RLKitError):
    """An environment cannot be built here."""


class EpisodeError(RLKitError):
    """An environment failed while an episode was played in it."""


class HubError(RLKitError):
    """A hub refuses, does not answer, or gave something else than was pushed."""


class MissingExtraError(RLKitError, ImportError):
    """An optional dependency is not installed."""


class Preempted(KeyboardInterrupt):
    """The system wants the machine back (SIGTERM, SIGUSR1 or SIGUSR2); what was going on is saved, and the same command continues it."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error of another library, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:limit] if lines else type(error).__name__


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional dependency, or raise `MissingExtraError` naming the extra that installs it.

    What it prints on import (notices, advice) is left out.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"{module} is not installed; install it with: pip install 'rlkit2[{extra}]'") from error
