"""How an update is executed: as it is written, compiled, or captured as a CUDA graph; whatever fails or differs is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rlkit2.agents.base import Agent
    from rlkit2.data.dataset import TransitionDataset

Update = Callable[[Tensor], Mapping[str, Tensor]]  # rows [S, B] -> metrics [S]
TRIAL_STEPS = 4  # enough to meet both branches of an update that delays a part of itself
TOLERANCE = 1e-3  # of the distance the parameters move in the trial


def choose_update(
    agent: Agent, dataset: TransitionDataset, batch_size: int, device: torch.device, compile: str = "auto"
) -> tuple[Update, str | None]:
    """The fastest update that provably does the same as the plain one on a few trial steps.

    Args:
        agent: trained in place; its state is the same before and after this call.
        dataset: where the rows come from.
        batch_size: rows a minibatch.
        device: where the agent lives.
        compile: `off`: the plain update; `auto`: a CUDA graph on a GPU, the plain update on a CPU; `on`: also
            `torch.compile` on a CPU.

    Returns:
        The update and, when a faster one was tried in vain, the reason.
    """

    def plain(rows: Tensor) -> Mapping[str, Tensor]:
        return agent.update(dataset.gather(rows).to(device, non_blocking=True))

    if compile == "off" or (compile == "auto" and device.type != "cuda"):
        return plain, None
    before = _copy(agent.state_dict())
    rows = torch.arange(len(agent.seeds) * batch_size, device=dataset.device).remainder(len(dataset))
    rows = rows.view(len(agent.seeds), batch_size)
    try:
        fast = _captured(agent, plain, rows, device) if device.type == "cuda" else _compiled(agent, dataset, device)
        if _agree(agent, plain, fast, rows):
            return fast, None
        reason = "its results differ from those of the plain one"
    except (RuntimeError, TypeError, ValueError, OSError, ImportError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
    finally:
        agent.load_state_dict(before)
    return plain, f"the update runs as written, not compiled: {reason}"


def _compiled(agent: Agent, dataset: TransitionDataset, device: torch.device) -> Update:
    update = torch.compile(agent.update, dynamic=False)
    return lambda rows: update(dataset.gather(rows).to(device))


def _captured(agent: Agent, plain: Update, rows: Tensor, device: torch.device) -> Update:
    """Capture one update over static rows; what runs outside the graph is one copy of `[S, B]` indices."""
    if rows.device != device:
        raise RuntimeError("the dataset does not fit on the device")
    static = rows.clone()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # allocations and lazy initialisation must lie behind a capture
        for _ in range(3):
            plain(static)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        metrics = plain(static)

    def replay(rows: Tensor) -> Mapping[str, Tensor]:
        static.copy_(rows)
        graph.replay()
        return metrics

    return replay


def _agree(agent: Agent, plain: Update, fast: Update, rows: Tensor) -> bool:
    """Whether both move every tensor of the state to the same place from the same start."""
    start = _copy(agent.state_dict())
    ends = []
    for update in (plain, fast):
        agent.load_state_dict(start)
        for shift in range(TRIAL_STEPS):
            update(rows.roll(shift, dims=-1))
        ends.append(_copy(agent.state_dict()))
    return all(
        bool((ends[1][name] - end).double().norm() <= TOLERANCE * (end - start[name]).double().norm())
        for name, end in ends[0].items()
        if end.is_floating_point() or name == "step"
    )


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}
