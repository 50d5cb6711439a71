"""The demo: O-DICE reaches a goal that no episode of its data reaches, cloning does not, and both are shown."""

from __future__ import annotations

from pathlib import Path

import pytest

import rlkit2
from rlkit2.cli.main import main
from rlkit2.reporting.comparison import compare
from rlkit2.studies.demo import DATASET, run_demo
from tests.built import give_built


@pytest.fixture(autouse=True)
def built(roots: Path) -> None:
    give_built(DATASET)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_odice_beats_cloning_over_seeds(tmp_path: Path) -> None:
    demo = run_demo(tmp_path / "demo", seeds=3, progress=False)
    assert demo.audit.ok
    rows = {row.label: row for row in demo.comparison.rows}
    assert rows["odice"].seeds == rows["bc"].seeds == 3
    assert rows["odice"].mean.low > rows["bc"].mean.high + 20.0, (rows["odice"].mean, rows["bc"].mean)
    improvement = rows["odice"].improvement
    assert improvement is not None
    assert improvement.value == 1.0
    assert improvement.low > 0.5  # three seeds against three cannot say more
    assert demo.picture.stat().st_size > 20_000
    page = demo.page.read_text()
    assert "<svg" in page
    assert 'src="http' not in page


def test_odice_finds_the_goal_early(tmp_path: Path) -> None:
    """A quarter of the recipe's updates and one seed: O-DICE reaches the goal already, which cloning does not (the slow test above)."""
    run = rlkit2.train(
        "odice", DATASET, steps=1500, seeds=1, out=tmp_path, eval_every=1500, eval_episodes=20, progress=False
    )
    (row,) = compare([run]).rows
    assert row.mean.value > 0


def test_no_episode_leads_from_the_start_to_the_goal() -> None:
    """What makes the comparison mean something: the data hold no whole way."""
    import torch

    from rlkit2 import load_dataset
    from rlkit2.envs.rooms import START

    dataset = load_dataset(DATASET)
    starts = torch.as_tensor(dataset.observations)
    in_start = (starts >= torch.tensor(START[:2])).all(1) & (starts <= torch.tensor(START[2:])).all(1)
    rewards = torch.as_tensor(dataset.rewards)
    assert (rewards > 0).any()
    assert in_start.any()
    for first, last in zip(dataset.episode_starts[:-1].tolist(), dataset.episode_starts[1:].tolist(), strict=True):
        assert not (in_start[first:last].any() and (rewards[first:last] > 0).any())


def test_the_command_prints_where_everything_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--seeds", "2", "--steps", "20"]) == 0
    out = capsys.readouterr().out
    assert "odice" in out
    assert "P(> bc)" in out
    assert Path("runs/demo/demo.png").is_file()
    assert Path("runs/demo/demo.html").is_file()
    assert main(["demo", "--seeds", "0"]) == 2
    assert "seeds must be a positive number" in capsys.readouterr().err
