"""Is a dataset fit for training? What is wrong in it, what is unusual, and how its numbers are distributed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from io import StringIO
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from rlkit2.data.audit.findings import AuditReport, Distribution, Finding, Severity
from rlkit2.data.audit.scan import Scan, chunks, space_text
from rlkit2.data.dataset import TransitionDataset
from rlkit2.data.known_environments import registered_spec
from rlkit2.data.notes import NOTES
from rlkit2.data.spaces import DatasetWarning, action_bounds, action_layout, flattener
from rlkit2.data.spec import DatasetSpec, env_spec_text
from rlkit2.errors import EnvironmentUnavailableError, RLKitError, first_line

Progress: TypeAlias = Callable[[int, int], None]

# A word in an entry point or an import error, and the extra that installs what it stands for.
SIMULATORS = {"gymnasium_robotics": "robotics", "mujoco": "mujoco", "box2d": "box2d"}


def audit(dataset: TransitionDataset, *, progress: Progress | None = None) -> AuditReport:
    """Check `dataset` and describe its distributions.

    Errors (training on it would go wrong): NaN or infinite values, flags in mid-episode, actions outside their space, an environment of other spaces,
    reference scores in the wrong order. Warnings (it may be meant so): rounding over the action bounds, both flags at once, duplicate episodes,
    constant observation columns, broken chains of observations, an environment that cannot be built here, and whatever the loader had to mend.

    The records are read once, 64 MB at a time, so that a dataset may be larger than memory; what is kept is a few bytes per row.
    `progress` is called with (rows done, rows in all).
    """
    scan = Scan(dataset)
    for start, words, fields in chunks(dataset):
        scan.add(start, words, fields)
        if progress is not None:
            progress(start + len(words), len(dataset))
    environment, environment_findings = _environment(dataset.spec)
    findings = [
        *scan.findings(),
        *_noted(dataset.spec),
        *_scores(dataset.spec),
        *environment_findings,
    ]
    order = ("error", "warning", "info")
    return AuditReport(
        dataset=dataset.spec.id,
        content_hash=dataset.spec.content_hash,
        transitions=len(dataset),
        episodes=dataset.num_episodes,
        findings=tuple(sorted(findings, key=lambda finding: order.index(finding.severity))),
        endings={**scan.endings, "cut_off_without_flag": dataset.spec.notes.get("episodes_without_end_flag", 0)},
        lengths=Distribution.of(scan.lengths),
        returns=Distribution.of(scan.returns),
        rewards=Distribution.of(scan.rewards),
        actions=scan.action_distributions(),
        environment=environment,
        reference_scores={"minimum": dataset.spec.ref_min_score, "maximum": dataset.spec.ref_max_score},
    )


def _noted(spec: DatasetSpec) -> Iterator[Finding]:
    """What the loader had to handle."""
    for code, count in spec.notes.items():
        if code in NOTES and code != "non_finite_values":  # found with its places
            severity: Severity = "info" if code == "action_spaces_inferred" else "warning"
            yield Finding(severity, code, f"{count} {NOTES[code]}")


def _scores(spec: DatasetSpec) -> Iterator[Finding]:
    low, high = spec.ref_min_score, spec.ref_max_score
    if low is None or high is None:
        yield Finding("info", "no_reference_scores", "there are no reference scores, so returns cannot be normalised")
    elif not low < high:
        message = f"reference scores {low:g} (random) and {high:g} (expert) are not in ascending order"
        yield Finding("error", "reference_scores", message)


def _environment(spec: DatasetSpec) -> tuple[dict[str, Any], list[Finding]]:
    """Whether the environments can be rebuilt here, and whether their spaces are those of the data."""
    if spec.env_spec is None and spec.eval_env_spec is None:
        message = "no environment is named (or its specification cannot be read here); evaluation needs one with --env"
        return {"id": None, "evaluation_id": None}, [Finding("info", "no_environment", message)]
    found: list[Finding] = []
    roles = {"env_spec": spec.env_spec, "eval_env_spec": spec.eval_env_spec}
    if env_spec_text(spec.env_spec) == env_spec_text(spec.eval_env_spec):
        del roles["eval_env_spec"]
    elif spec.env_spec is not None and spec.eval_env_spec is not None:
        message = (
            "the evaluation environment differs from the one of the data, so their returns are on different scales"
        )
        found.append(Finding("info", "evaluation_environment_differs", message))
    for role, env_spec in roles.items():
        if env_spec is not None:
            found.extend(_rebuild(spec, role, env_spec))
    codes = {finding.code for finding in found}
    built = "environment_unavailable" not in codes
    summary = {
        "id": spec.env_spec.id if spec.env_spec else None,
        "evaluation_id": spec.eval_env_spec.id if spec.eval_env_spec else None,
        "can_be_built": built,
        "spaces_match": "environment_spaces" not in codes if built else None,
    }
    return summary, found


def _rebuild(spec: DatasetSpec, role: str, env_spec: EnvSpec) -> Iterator[Finding]:
    try:
        # Left out: advice about newer versions, and what simulators print when they are imported.
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            known = registered_spec(env_spec, f"dataset {spec.id}")
            env = gymnasium.make(known, disable_env_checker=True)
    except EnvironmentUnavailableError as error:
        yield Finding("warning", "environment_unavailable", f"{role}: {error}")
        return
    except Exception as error:  # noqa: BLE001 - simulators raise many kinds
        text = f"{env_spec.entry_point} {error}".lower()
        extra = next((extra for word, extra in SIMULATORS.items() if word in text), None)
        missing = isinstance(error, ImportError | gymnasium.error.DependencyNotInstalled)
        mend = f"; install it with: pip install 'rlkit2[{extra}]'" if missing and extra else ""
        message = f"{role} {env_spec.id} cannot be built here ({first_line(error)}){mend}"
        yield Finding("warning", "environment_unavailable", message)
        return
    try:
        yield from _compare_spaces(spec, f"{role} {env_spec.id}", env)
    finally:
        env.close()


def _compare_spaces(spec: DatasetSpec, name: str, env: gymnasium.Env[Any, Any]) -> Iterator[Finding]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DatasetWarning)  # said when the dataset was loaded
            rows, theirs = flattener(env.observation_space, spec.observation_keys), action_layout(env.action_space)
    except RLKitError as error:
        yield Finding("error", "environment_spaces", f"{name} does not fit the data: {error}")
        return
    ours = action_layout(spec.action_space)
    if rows.size != spec.flattener.size or rows.ranges != spec.flattener.ranges:
        message = f"{name} gives observations of {rows.size} columns ({space_text(env.observation_space)}), the data hold {spec.flattener.size}"
        yield Finding("error", "environment_spaces", message)
    same = all(
        np.array_equal(a, b)
        for a, b in zip(action_bounds(env.action_space), action_bounds(spec.action_space), strict=True)
    )
    if (theirs.shape, theirs.dtype) != (ours.shape, ours.dtype) or (ours.dtype == np.int64 and not same):
        message = (
            f"{name} takes actions in {space_text(env.action_space)}, the data hold {space_text(spec.action_space)}"
        )
        yield Finding("error", "environment_spaces", message)
    elif not same:
        message = f"{name} bounds actions otherwise ({space_text(env.action_space)}) than the data ({space_text(spec.action_space)})"
        yield Finding("warning", "environment_action_bounds", message)
