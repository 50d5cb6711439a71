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
Recording = tuple[Callable[[], None], Mapping[str, Tensor]]  # what plays an update, and where its metrics lie then
TRIAL_STEPS = 4  # at least, and twice through all phases of an update
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
        return agent.learn(dataset.gather(rows).to(device, non_blocking=True))

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
    update = torch.compile(agent.learn, dynamic=False)
    return lambda rows: update(dataset.gather(rows).to(device))


def _captured(agent: Agent, plain: Update, rows: Tensor, device: torch.device) -> Update:
    """Capture the update over static rows, once for each phase it may be in; what runs outside a graph is one copy of `[S, B]` indices."""
    if rows.device != device:
        raise RuntimeError("the dataset does not fit on the device")
    static = rows.clone()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # allocations and lazy initialisation must lie behind a capture
        for _ in range(3 * agent.phases):
            plain(static)
    torch.cuda.current_stream(device).wait_stream(stream)

    def record() -> Recording:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            metrics = plain(static)
        return graph.replay, metrics

    return replayed(agent, record, static)


def replayed(agent: Agent, record: Callable[[], Recording], static: Tensor) -> Update:
    """The update that plays, for the phase the agent is in, what `record` recorded in that phase.

    Args:
        agent: recording runs its code, so it goes through its phases; playing does not, so its phase is moved on here.
        record: records one update of the rows in `static`, and returns what plays it and the tensors that its metrics lie in afterwards.
        static: `[S, B]`, the rows that the recordings read.
    """
    recordings = {}
    for _ in range(agent.phases):
        phase = agent.phase
        recordings[phase] = record()

    def update(rows: Tensor) -> Mapping[str, Tensor]:
        play, metrics = recordings[agent.phase]
        static.copy_(rows)
        play()
        agent.phase = (agent.phase + 1) % agent.phases
        return metrics

    return update


def _agree(agent: Agent, plain: Update, fast: Update, rows: Tensor) -> bool:
    """Whether both move every tensor of the state to the same place from the same start."""
    start = _copy(agent.state_dict())
    ends = []
    for update in (plain, fast):
        agent.load_state_dict(start)
        for shift in range(max(TRIAL_STEPS, 2 * agent.phases)):
            update(rows.roll(shift, dims=-1))
        ends.append(_copy(agent.state_dict()))
    return all(
        bool((ends[1][name] - end).double().norm() <= TOLERANCE * (end - start[name]).double().norm())
        for name, end in ends[0].items()
        if end.is_floating_point() or name == "step"
    )


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}
