"""What a run has collected as a dataset: whole episodes, told apart by environment."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from minari import MinariDataset

from rlkit2.data.dataset import TransitionDataset, dataset_from_arrays
from rlkit2.data.records import FIELDS
from rlkit2.errors import ConfigError
from rlkit2.online.replay import read_rows
from rlkit2.training.building import stored_spec
from rlkit2.training.run import Run


def collected(run: Run) -> TransitionDataset:
    """All transitions that the seeds of a run have collected until its newest checkpoint, seed after seed and environment after environment.

    An episode that was in progress then, or was given up, is cut off there (truncated).

    Raises:
        ConfigError: the run does not learn in an environment, sees stacks of frames, or has not collected anything.
        RunError: it has no checkpoint.
    """
    if "online" not in run.config:
        raise ConfigError(f"{run.path} learns from data alone and collects nothing")
    if run.config["data"].get("frame_stack", 1) > 1:
        raise ConfigError("what is kept as a dataset are single observations; leave frame_stack at 1")
    checkpoint, envs = run.checkpoint(), run.config["online"]["num_envs"]
    spec, count = stored_spec(run.config), math.ceil(checkpoint.step / envs) * envs
    if not count:
        raise ConfigError(f"{run.path} has not collected anything yet")
    parts = []
    for seed in run.config["seeds"]:
        given_up = np.zeros(count, bool)
        given_up[checkpoint.facts.get("of_groups", {}).get(str(seed), [])] = True
        for env in range(envs):
            own = read_rows(run.path, spec, seed, slice(env, count, envs))
            own["truncations"] = own["truncations"] | given_up[env::envs]
            own["truncations"][-1] |= not own["terminations"][-1]
            parts.append(own)
    fields: dict[str, Any] = {name: np.concatenate([part[name] for part in parts]) for name in FIELDS}
    return dataset_from_arrays(**fields, spec=replace(spec, id=f"{run.path.name}", notes={}))


def record(run: Run, dataset_id: str) -> MinariDataset:
    """Keep what a run has collected as the Minari dataset `dataset_id`, with what it came from in its metadata.

    Raises:
        ConfigError: as `collected`.
        DatasetError: the id is taken or invalid, or the folder cannot be written.
    """
    config = run.config
    return collected(run).to_minari(
        dataset_id,
        algorithm_name=config["agent"],
        description=f"what {config['agent']} collected in {config['dataset']['id']} over {run.checkpoint().step} steps of seeds {config['seeds']}",
    )
