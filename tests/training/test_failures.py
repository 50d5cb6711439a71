"""A full disk, a read-only folder or a damaged file ends in one clear line, and the last good checkpoint stays."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource

import pytest
import torch

import rlkit2
from rlkit2 import files
from rlkit2.agents.bc import BCConfig
from rlkit2.checksums import UncheckedWarning
from rlkit2.errors import RLKitError, RunError
from rlkit2.training import Run, checkpoints
from rlkit2.training.progress import Progress
from rlkit2.training.run import DamageWarning
from tests.training.tiny_problem import Walk, contents, fit, tiny_dataset, tiny_run

DATASET = tiny_dataset()
CONFIG = BCConfig(hidden_sizes=(8,))
SCHEDULE = {"steps": 24, "log_every": 4, "eval_every": 12, "checkpoint_every": 8, "batch_size": 8}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return contents(fit(tiny_run(tmp_path_factory.mktemp("whole"), CONFIG, DATASET, [0, 1], **SCHEDULE), DATASET))


@pytest.mark.parametrize("operation", [1, 2, 3, 4, 6, 8, 11, 14, 17, 20, 23])
def test_a_full_disk_at_any_write_is_one_line_and_the_run_goes_on_later(tmp_path, monkeypatch, whole, operation):
    """Every write from one of them on takes half of its data and fails, as on a disk that has filled up."""
    run = tiny_run(tmp_path, CONFIG, DATASET, [0, 1], **SCHEDULE)
    count = itertools.count(1)
    write, write_synced = os.write, files.write_synced

    def full():
        return next(count) >= operation

    def short_write(descriptor, data):
        if full():
            write(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    def short_file(path, data, **options):
        if full():
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_synced(path, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short_write)
        patch.setattr(files, "write_synced", short_file)
        patch.setattr(checkpoints, "write_synced", short_file)
        with pytest.raises(RunError, match=rf"cannot write {run.path}.*: No space left on device") as caught:
            fit(run, DATASET)
    assert "\n" not in str(caught.value)
    assert ("--resume" in str(caught.value)) == bool(run.checkpoints)
    assert next(count) > operation
    for step in run.checkpoints:
        run.checkpoint(step)
    assert contents(fit(run, DATASET)) == whole


def test_a_real_limit_on_file_sizes_is_met_in_the_same_way(tmp_path):
    """The system itself refuses the checkpoint's bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(
            RunError, match=r"cannot write .*checkpoints/000000000: File too large \([\d,.]+ MiB free\)"
        ):
            rlkit2.train(CONFIG, DATASET, steps=8, out=tmp_path, eval_every=0, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (path,) = tmp_path.glob("bc-*")
    assert Run(path).checkpoints == {}
    assert rlkit2.train(resume=path, dataset=DATASET, progress=False).manifest["status"] == "finished"


def test_a_read_only_folder_is_one_line(tmp_path, monkeypatch, capsys):
    from rlkit2.cli.main import main

    run = fit(tiny_run(tmp_path, CONFIG, DATASET, [0, 1], **SCHEDULE), DATASET)
    before = contents(run)
    opened = os.open

    def refuse(path, flags, *arguments, **options):
        if flags & (os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(run.path)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RunError, match=rf"cannot write {run.path}: Read-only file system"):
        fit(run, DATASET)
    assert contents(run) == before
    monkeypatch.undo()

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    DATASET.to_minari("tiny/walk-v0")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["train", "bc", "--dataset", "tiny/walk-v0", "--steps", "2", "--out", str(out)]) == 2
        text = capsys.readouterr().err.splitlines()[-1]
        assert text.startswith(f"rlkit2: cannot write {out}: ")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_one_line(tmp_path):
    out = tmp_path / "runs"
    out.mkdir(mode=0o500)
    with pytest.raises(RunError, match=rf"cannot write {out}: Permission denied"):
        rlkit2.train(CONFIG, DATASET, steps=2, out=out, env=Walk, progress=False)


def damage(path):
    """Cut a file in the middle."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", r"config\.json cannot be read .*; it is damaged"),
        ("metrics.jsonl", r"metrics\.jsonl is shorter than its checkpoint says \(\d+ bytes\); the run is damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, message):
    run = fit(tiny_run(tmp_path, CONFIG, DATASET, [0, 1], **SCHEDULE), DATASET)
    damage(run.path / name)
    with pytest.raises(RunError, match=message):
        fit(Run(run.path), DATASET)


def cut(path):
    damage(path)


def flip(path):
    """Two bits in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0b1001
    path.write_bytes(data)


def remove(path):
    path.unlink()


class Told(Progress):
    """Remembers what it is to show."""

    def __init__(self):
        super().__init__(None)
        self.said = []

    def message(self, text):
        self.said.append(text)


@pytest.mark.parametrize("how", [cut, flip, remove])
@pytest.mark.parametrize("name", ["state.safetensors", "checkpoint.json"])
def test_the_checkpoint_before_serves_where_the_newest_is_damaged(tmp_path, whole, name, how):
    run = fit(tiny_run(tmp_path, CONFIG, DATASET, [0, 1], **SCHEDULE), DATASET)
    how(run.path / "checkpoints" / "000000024" / name)
    with pytest.warns(DamageWarning, match=rf"000000024/{name}.*; taking the one of step 16"):
        assert run.checkpoint().step == 16
    with pytest.raises(RunError, match=rf"000000024/{name}"):
        run.checkpoint(24)
    told = Told()
    assert contents(fit(run, DATASET, progress=told)) == whole
    (line,) = told.said
    assert f"000000024/{name}" in line
    assert line.endswith("set aside as damaged-000000024, resuming from step 16")
    assert (run.path / "checkpoints" / "damaged-000000024").is_dir()


def test_where_every_checkpoint_is_damaged_the_run_says_so(tmp_path):
    run = fit(tiny_run(tmp_path, CONFIG, DATASET, [0, 1], **SCHEDULE), DATASET)
    for path in run.checkpoints.values():
        flip(path / "state.safetensors")
    with pytest.raises(RunError, match=r"has no checkpoint that can be read: .*000000024.*does not have the checksum"):
        fit(run, DATASET)


def test_a_damaged_policy_is_made_anew_from_the_checkpoint(tmp_path):
    run = fit(tiny_run(tmp_path, CONFIG, DATASET, [0, 1], **SCHEDULE), DATASET)
    before = {name: tensor.clone() for name, tensor in run.policy.state_dict().items()}
    flip(run.path / "policy" / "policy.safetensors")
    with pytest.warns(DamageWarning, match="files are damaged.*taking that of the newest checkpoint"):
        policy = run.policy
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())


def test_a_checkpoint_without_checksums_is_resumed_from_and_said(tmp_path, whole):
    run = fit(tiny_run(tmp_path, CONFIG, DATASET, [0, 1], **SCHEDULE), DATASET)
    for path in run.checkpoints.values():
        facts = json.loads((path / "checkpoint.json").read_text())
        del facts["sha256"], facts["format"]
        (path / "checkpoint.json").write_text(json.dumps(facts))
    with pytest.warns(UncheckedWarning, match="older rlkit2, without checksums"):
        assert contents(fit(run, DATASET)) == whole


def test_a_folder_that_is_no_run_says_so(tmp_path):
    for path, message in ((tmp_path / "nothing", "does not exist"), (tmp_path, r"holds no config\.json")):
        with pytest.raises(RunError, match=message):
            rlkit2.load_run(path)
    with pytest.raises(RLKitError, match="no policy here"):
        rlkit2.load_policy(tmp_path)
