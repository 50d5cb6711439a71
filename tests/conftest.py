"""Shared fixtures: every test has its own cache, dataset roots and no network."""

from __future__ import annotations

import copy
import gc
import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import built

REAL_DATASETS = os.environ.get("RLKIT2_TEST_DATASETS") or os.environ.get("MINARI_DATASETS_PATH")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell that runs the tests in the background does that
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Files that take longer than files with as many tests, and about how many tests of middling length that would be.
LONG = {
    "tests/cli/test_offline.py": 120,
    "tests/cli/test_prefs.py": 150,
    "tests/cli/test_own_agent.py": 120,
    "tests/evaluation/test_offline.py": 300,
    "tests/evaluation/test_uncertainty.py": 100,
    "tests/preferences/test_labelling.py": 150,
    "tests/studies/test_demo.py": 120,
    "tests/studies/test_preferences_to_regret.py": 250,
    "tests/sweeps/test_sweeps.py": 300,
    "tests/test_files.py": 120,
    "tests/training/test_resume.py": 100,
}


def pytest_configure(config: pytest.Config) -> None:
    """See `tests.built`; and files are given to the workers of pytest-xdist in the order of the tests, not by their number."""
    built.pytest_configure(config)
    config.option.loadscopereorder = False
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        prepare()


def prepare() -> None:
    """What a process needs that runs tests; the one that gives them out starts its workers the sooner for not importing this."""
    import torch
    from hypothesis import HealthCheck, settings

    torch.set_num_threads(1)
    unhurried = [HealthCheck.function_scoped_fixture]
    settings.register_profile("rlkit2", deadline=None, derandomize=True, suppress_health_check=unhurried)
    settings.load_profile("rlkit2")
    gc.disable()  # until the tests begin: nothing that is imported or collected goes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that no worker is left with one at the end."""
    files = [item.nodeid.partition("::")[0] for item in items]
    count = Counter(files)
    items.sort(key=lambda item: -max(count[file := item.nodeid.partition("::")[0]], LONG.get(file, 0)))


@pytest.fixture(autouse=True)
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty dataset roots and an empty cache under `tmp_path`."""
    monkeypatch.setenv("RLKIT2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RLKIT2_DATA", str(tmp_path / "builtin"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name resolution fails, as on a machine without a network; loopback stays."""
    resolve = socket.getaddrinfo

    def refuse(host: object, *args: object, **kwargs: object) -> object:
        if host in ("localhost", "127.0.0.1", "::1", None):
            return resolve(host, *args, **kwargs)  # type: ignore[arg-type]
        raise socket.gaierror("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def registry_as_before() -> Iterator[None]:
    """Arguments of registered environments stay: `gymnasium.make_vec` writes into the specification that it is given."""
    from gymnasium.envs.registration import registry

    before = {name: copy.deepcopy(spec.kwargs) for name, spec in registry.items() if name.startswith("rlkit2/")}
    yield
    changed = [name for name, kwargs in before.items() if name in registry and registry[name].kwargs != kwargs]
    for name in changed:  # the next tests are not to suffer
        registry[name].kwargs = before[name]
    assert not changed, f"the registered arguments of {', '.join(changed)} have been changed"


@pytest.fixture(autouse=True, scope="module")
def frozen_heap() -> None:
    """What is imported by now is left out of garbage collections: transformers asks for a whole one after every training, over a million objects."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def short_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole garbage collection looks at what the last hundred tests imported, too; transformers asks for several in every training."""
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda generation=1: collect(min(generation, 1)))


@pytest.fixture
def real_datasets(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of recorded Minari datasets, where this machine has one."""
    if not REAL_DATASETS or not Path(REAL_DATASETS, "zoo").is_dir():
        pytest.skip("no recorded datasets; set RLKIT2_TEST_DATASETS to a Minari root that holds zoo/")
    monkeypatch.setenv("MINARI_DATASETS_PATH", REAL_DATASETS)
    return Path(REAL_DATASETS)
