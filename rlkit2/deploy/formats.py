"""The formats of exported policies: how a file of each is written, and how it is run."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlkit2.deploy.graph import PolicyGraph
from rlkit2.errors import ConfigError, first_line, require
from rlkit2.nn.policy import Policy, load_policy

EXTRA = "export"
NOTE = "rlkit2.json"
"""Name under which torch's formats keep what a file says about itself (in ONNX: the metadata entry `rlkit2`)."""
Act = Callable[[Sequence[NDArray[Any]]], list[NDArray[Any]]]
"""A loaded file: inputs in order to outputs in order."""


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name, suffixes: what it is called by; files of it end in the first suffix.
        modules: what writing and checking it needs beyond rlkit2, of the extra `export`.
        write: the graph, its policy, the file and what it says about itself.
        load: the file as a function (the graph says what goes in).
    """

    name: str
    suffixes: tuple[str, ...]
    modules: tuple[str, ...]
    write: Callable[[PolicyGraph, Policy, Path, str], None]
    load: Callable[[Path, PolicyGraph], Act]

    def check_installed(self) -> None:
        """Raise `MissingExtraError` where something it needs is not installed."""
        for module in self.modules:
            require(module, extra=EXTRA)


def exported_program(graph: PolicyGraph) -> Any:
    """The graph by `torch.export`, for batches of any size.

    Raises:
        ConfigError: torch cannot trace it.
    """
    batch = torch.export.Dim("batch", min=1)
    inputs = graph.examples(3)  # of one row torch would conclude that it is always one
    try:
        with _quietly(), torch.no_grad():
            return torch.export.export(graph, inputs, dynamic_shapes={"inputs": tuple({0: batch} for _ in inputs)})
    except Exception as error:
        raise ConfigError(f"torch cannot export this policy: {first_line(error)}") from error


def _write_onnx(graph: PolicyGraph, policy: Policy, path: Path, note: str) -> None:
    program = exported_program(graph)
    with _quietly():
        made: Any = torch.onnx.export(
            program,
            (),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=[port.name for port in graph.inputs],
            output_names=[port.name for port in graph.outputs],
        )
        made.model.metadata_props["rlkit2"] = note
        made.save(str(path), external_data=False)


def _load_onnx(path: Path, graph: PolicyGraph) -> Act:
    runtime: Any = require("onnxruntime", extra=EXTRA)
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [port.name for port in graph.inputs]

    def act(inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        return list(session.run(None, dict(zip(names, inputs, strict=True))))

    return act


def _write_program(graph: PolicyGraph, policy: Policy, path: Path, note: str) -> None:
    with _quietly():
        torch.export.save(exported_program(graph), str(path), extra_files={NOTE: note})


def _load_program(path: Path, graph: PolicyGraph) -> Act:
    with _quietly():
        return _torch_act(torch.export.load(str(path)).module())


def _write_script(graph: PolicyGraph, policy: Policy, path: Path, note: str) -> None:
    with _quietly(), torch.no_grad():
        try:
            traced = torch.jit.trace(graph, graph.examples(3), check_trace=False)  # type: ignore[no-untyped-call]
        except Exception as error:
            raise ConfigError(f"torch cannot trace this policy: {first_line(error)}") from error
        torch.jit.save(traced, str(path), _extra_files={NOTE: note})


def _load_script(path: Path, graph: PolicyGraph) -> Act:
    with _quietly():
        return _torch_act(torch.jit.load(str(path)))  # type: ignore[no-untyped-call]


def _torch_act(run: Callable[..., Sequence[Tensor]]) -> Act:
    @torch.no_grad()
    def act(inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        return [tensor.numpy() for tensor in run(*(torch.from_numpy(np.asarray(part)) for part in inputs))]

    return act


def _write_tensors(graph: PolicyGraph, policy: Policy, path: Path, note: str) -> None:
    policy.save(path)


def _load_tensors(path: Path, graph: PolicyGraph) -> Act:
    return _torch_act(PolicyGraph(load_policy(path), graph.sampling))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the notices of exporters: deprecations, operators of packages that are not installed, progress."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    silent = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(silent), contextlib.redirect_stdout(silent):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


FORMATS = {
    kind.name: kind
    for kind in (
        Format("onnx", (".onnx",), ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _load_onnx),
        Format("torch.export", (".pt2",), (), _write_program, _load_program),
        Format("torchscript", (".ts", ".torchscript"), (), _write_script, _load_script),
        Format("safetensors", (".safetensors",), (), _write_tensors, _load_tensors),
    )
}
"""By name. ONNX: other languages and runtimes; torch.export: torch programs; TorchScript: programs in C++ that load it (torch itself calls it
deprecated); safetensors: rlkit2 itself, tensors and JSON alone."""
