"""Two processes of data parallelism on one machine: the first one measures, nothing deadlocks, and what is sharded is refused."""

import os
import socket
import subprocess
import sys

import pytest

pytest.importorskip("trl")


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("what", ["DPO", "KTO", "CPO", "normalised", "token_mask", "fsdp"])
def test_two_processes(tmp_path, what):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.entanglement.two_processes", what, str(tmp_path)]
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    shared |= {"ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        said = [process.communicate(timeout=900)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text[-3000:]
        assert text.rstrip().endswith("fine")
