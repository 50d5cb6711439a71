"""From runs, policies and their folders to what can be judged, and what their training says about the question."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.normalizers import reward_transform
from rlkit2.data.reading import ReadingOptions
from rlkit2.data.spec import DatasetSpec
from rlkit2.errors import ConfigError
from rlkit2.evaluation.offline.evaluate import Candidate
from rlkit2.nn import Policy
from rlkit2.nn.policy import holds_policy, load_policy
from rlkit2.training.building import dataset_source, reading_arguments
from rlkit2.training.run import Run

DISCOUNT = 0.99


def as_run(source: Run | Policy | str | os.PathLike[str]) -> Run | Policy:
    """A run or a policy, opened where it is a folder; `RunError` where the folder is neither."""
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        return load_policy(path) if holds_policy(path) else Run(path)
    return source


def as_candidate(source: Run | Policy, dataset: TransitionDataset, index: int) -> Candidate:
    """A run's policy (the final one, or that of the checkpoint meant) with its agent, or a policy alone, named by its number."""
    if isinstance(source, Policy):
        return Candidate(f"policy {index}", source)
    return Candidate(source.label, source.policy, source.agent, reward_factor(source, dataset))


def reward_factor(run: Run, dataset: TransitionDataset) -> float | None:
    """What the rewards of `dataset` were multiplied by for the run's agent; None where they were transformed otherwise."""
    options = run.config["data"]
    scale, name = float(options["reward_scale"]), options["reward_transform"]
    if name == "none":
        return scale
    rewards, transformed = dataset.rewards, reward_transform(name, dataset)
    moved = rewards != 0
    if not bool(moved.any()) or bool((transformed[~moved] != 0).any()):
        return None
    factors = transformed[moved] / rewards[moved]
    return scale * float(factors.median()) if bool((factors / factors.median() - 1).abs().max() < 1e-3) else None


def common_reading(runs: Sequence[Run | Policy], given: Mapping[str, Any]) -> dict[str, Any]:
    """How all runs read their dataset, as arguments of `load_dataset`, under what is `given`; `ConfigError` where they differ."""
    found: list[dict[str, Any]] = []
    for run in runs:
        if isinstance(run, Run) and (own := reading_arguments(run.config, given)) not in found:
            found.append(own)
    if len(found) > 1:
        names = sorted(name for name in found[0] if any(own[name] != found[0][name] for own in found))
        raise ConfigError(
            f"the runs read their dataset in several ways ({', '.join(names)} differ); open it yourself: dataset=load_dataset(...) in Python"
        )
    return found[0] if found else ReadingOptions(**given).arguments()


def common_dataset(runs: Sequence[Run | Policy]) -> str:
    """Where all runs found their dataset; `ConfigError` where they differ or there are policies alone."""
    sources = {dataset_source(run.config) for run in runs if isinstance(run, Run)}
    if len(sources) != 1 or any(isinstance(run, Policy) for run in runs):
        found = (
            "a policy alone names no dataset"
            if not sources
            else f"the runs have several datasets ({', '.join(sorted(sources))})"
        )
        raise ConfigError(f"{found}; name the one to judge with: --dataset ID (dataset=... in Python)")
    return str(sources.pop())


def common_stack(runs: Sequence[Run | Policy]) -> int:
    """How many observations every policy sees as one; `ConfigError` where they differ."""
    texts = [(run.config if isinstance(run, Run) else run.metadata).get("spec") for run in runs]
    stacks = {DatasetSpec.from_json(text).frame_stack for text in texts if text is not None}
    if len(stacks) > 1:
        found = ", ".join(map(str, sorted(stacks)))
        raise ConfigError(f"the policies see stacks of {found} observations; judge those of one kind together")
    return stacks.pop() if stacks else 1


def common_discount(runs: Sequence[Run | Policy]) -> tuple[float, str]:
    """The discount that all runs with one trained with, else `DISCOUNT`, and where it comes from; `ConfigError` where they differ."""
    known = {
        float(run.config["config"]["discount"])
        for run in runs
        if isinstance(run, Run) and "discount" in run.config["config"]
    }
    if len(known) > 1:
        raise ConfigError(
            f"the runs were trained with several discounts ({', '.join(map(str, sorted(known)))}); name one with --discount (discount=... in Python)"
        )
    if known:
        return known.pop(), "that of the training"
    return DISCOUNT, "the default, as the training had none; name another with --discount (discount=... in Python)"
