"""Reference returns that turn a return into a score: 0 is a uniformly random policy, 100 an expert.

A dataset's own reference returns always come first. The table below serves Minari datasets that ship none; every value has a source and belongs to
one environment version. D4RL's published references are not in it: they were measured in the -v2 MuJoCo environments, with other dynamics and
rewards than the -v5 ones behind `mujoco/...`, so a score computed with them would look comparable and not be.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlkit2.data.spec import DatasetSpec


@dataclass(frozen=True)
class ReferenceScores:
    """Returns of a random and an expert policy, the environment they were measured in, and where they come from."""

    minimum: float
    maximum: float
    environment: str
    source: str

    def __str__(self) -> str:
        return f"reference returns {self.minimum:g} (random) and {self.maximum:g} (expert): {self.source}"


def _farama(environment: str, algorithm: str, random: float, expert: float) -> ReferenceScores:
    card = f"https://huggingface.co/farama-minari/{environment}-{algorithm}-expert"
    random_source = f"1000 uniform-random episodes of {environment} (Gymnasium 1.4, MuJoCo 4.0)"
    source = f"expert: model card of the policy that collected expert-v0 ({card}); random: {random_source}"
    return ReferenceScores(random, expert, environment, source)


# Prefix of a dataset id -> references.
KNOWN: dict[str, ReferenceScores] = {
    "mujoco/hopper/": _farama("Hopper-v5", "SAC", 17.63, 4098.17),
    "mujoco/halfcheetah/": _farama("HalfCheetah-v5", "TQC", -281.73, 17641.80),
    "mujoco/walker2d/": _farama("Walker2d-v5", "SAC", 1.78, 6956.61),
}


def reference_scores(spec: DatasetSpec) -> ReferenceScores | None:
    """The references for a dataset: its own, else the shipped table's for its id and environment, else None."""
    environment = spec.eval_env_spec or spec.env_spec
    name = environment.id if environment is not None else "unknown environment"
    if spec.ref_min_score is not None and spec.ref_max_score is not None and spec.ref_max_score > spec.ref_min_score:
        return ReferenceScores(spec.ref_min_score, spec.ref_max_score, name, f"metadata of {spec.id}")
    return next(
        (known for prefix, known in KNOWN.items() if spec.id.startswith(prefix) and known.environment == name), None
    )
