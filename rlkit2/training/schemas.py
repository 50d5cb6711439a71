"""What the files of a run must hold for the rest of rlkit2 to read them; checked once, when they are opened."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rlkit2.errors import ConfigError
from rlkit2.fields import Natural, describe_type, read_fields, read_value
from rlkit2.training.options import ONLINE_SECTIONS, SECTIONS

Schema = Mapping[str, Any]  # name of an entry -> its annotated type
Object = dict[str, Any]
LARGEST = 2**63  # whole numbers beyond it are no steps, seeds or lengths

# What must be there, and what may be.
CONFIG: Schema = {
    "agent": str,
    "config": Object,
    "data": Object,
    "training": Object,
    "dataset": Object,
    "seeds": tuple[int, ...],
}
CONFIG_MORE: Schema = {
    "reading": Object,
    "spec": str,
    "env": str | None,
    "recipe": str | None,
    "agent_source": str | None,
    "online": Object,
    "origin": Object | None,
    "schedule_curves": Object,
}
ORIGIN: Schema = {"run": str, "id": str, "step": Natural}
DATASET: Schema = {"id": str, "source": str, "content_hash": str}
DATASET_MORE: Schema = {"observation_keys": tuple[str, ...] | None}
MANIFEST: Schema = {
    "id": str,
    "status": str,
    "starts": tuple[Object, ...],
    "stopped": Object,
    "best": Object | None,
    "step": Natural,
    "seconds": float,
    "error": str | None,
    "data": Object,
}
STOPPED: Schema = {"step": Natural, "metric": str}
BEST: Schema = {"step": Natural, "score": float}
FACTS: Schema = {
    "stopped": Object,
    "best": Object | None,
    "warned": tuple[str, ...],
    "groups": tuple[tuple[int, ...], ...],
    "sizes": Object,
}
FACTS_MORE: Schema = {"rule": Object, "of_groups": Object}
RULE: Schema = {"chosen": Object | None, "judged": Natural, "waited": Natural, "ended": bool}
CHOSEN: Schema = {"step": Natural, "after": Natural, "value": float}
LINE: Schema = {"step": Natural, "seed": int}
EVALUATION: Schema = {
    **LINE,
    "returns": tuple[float | None, ...],
    "lengths": tuple[int, ...],
    "normalized_scores": tuple[float | None, ...] | None,
    "deterministic": bool,
}


class SchemaError(ValueError):
    """An entry of a file is missing or of another type; the message names it."""


def check(values: Any, schema: Schema, more: Schema | None = None, where: str = "") -> None:
    """Raise `SchemaError` unless `values` has all entries of `schema`, and those of `more` that it has, in their types."""
    if not isinstance(values, dict):
        raise SchemaError(f"{where or 'it'} must be an object, not {_shown(values)}")
    for name in schema:
        if name not in values:
            raise SchemaError(f"{where}{name} is missing")
    for name, hint in {**schema, **(more or {})}.items():
        if name in values:
            try:
                read_value(values[name], hint)
            except TypeError as error:
                raise SchemaError(f"{where}{name} must be {_described(hint)}, not {_shown(values[name])}") from error


def check_config(values: Any) -> None:
    """Raise `SchemaError` unless `values` are those of a run's `config.json`."""
    check(values, CONFIG, CONFIG_MORE)
    if values.get("origin") is not None:
        check(values["origin"], ORIGIN, where="origin.")
    check(values["dataset"], DATASET, DATASET_MORE, where="dataset.")
    for part, curve in values.get("schedule_curves", {}).items():
        if not isinstance(curve, list) or len(curve) < 2 or not all(_is_share(share) for share in curve):
            raise SchemaError(f"schedule_curves.{part} must be two or more numbers from 0 to 1")
    seeds = values["seeds"]
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < LARGEST for seed in seeds):
        raise SchemaError(f"seeds must be distinct whole numbers of at least 0, not {_shown(seeds)}")
    for name, kind in (ONLINE_SECTIONS if "online" in values else SECTIONS).items():
        try:
            kind(**read_fields(kind, values.get(name, {})))
        except (ConfigError, TypeError) as error:
            raise SchemaError(f"{name}: {error}") from error


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def check_manifest(values: Any) -> None:
    """Raise `SchemaError` unless `values` are those of a run's `manifest.json`."""
    check(values, {}, MANIFEST)
    if values.get("best") is not None:
        check(values["best"], BEST, where="best.")
    _check_stopped(values.get("stopped", {}))


def check_facts(values: Any, seeds: list[int], files: tuple[str, ...]) -> None:
    """Raise `SchemaError` unless `values` are those of a checkpoint of a run with these seeds and growing files."""
    check(values, FACTS, FACTS_MORE)
    if "rule" in values:
        check(values["rule"], RULE, where="rule.")
        if values["rule"]["chosen"] is not None:
            check(values["rule"]["chosen"], CHOSEN, where="rule.chosen.")
    if values["best"] is not None:
        check(values["best"], BEST, where="best.")
    check(values["sizes"], dict.fromkeys(files, Natural), where="sizes.")
    _check_stopped(values["stopped"])
    for seed, record in values["stopped"].items():
        check(record, {"last_finite_checkpoint": Natural}, where=f"stopped.{seed}.")
    if sorted(seed for group in values["groups"] for seed in group) != sorted(seeds):
        raise SchemaError(f"groups must hold the seeds {seeds}, not {_shown(values['groups'])}")


def check_metrics(line: Any) -> None:
    """Raise `SchemaError` unless `line` is one of `metrics.jsonl`: a step, a seed and named numbers."""
    if not (isinstance(line, dict) and type(line.get("step")) is int is type(line.get("seed")) and line["step"] >= 0):
        check(line, LINE)  # says what is wrong; there are too many lines to take this way with each
    for name, value in line.items():
        if value is not None and type(value) is not float and not (type(value) is int and abs(value) < LARGEST):
            raise SchemaError(f"{name} must be a number, not {_shown(value)}")


def check_evaluation(line: Any) -> None:
    """Raise `SchemaError` unless `line` is one of `evaluations.jsonl`."""
    check(line, EVALUATION)
    count = len(line["returns"])
    for name in ("lengths", "normalized_scores"):
        if line[name] is not None and len(line[name]) != count:
            raise SchemaError(f"{name} has {len(line[name])} entries, returns {count}")
    if not count:
        raise SchemaError("returns is empty")


def _check_stopped(stopped: dict[str, Any]) -> None:
    for seed, record in stopped.items():
        if not seed.removeprefix("-").isdecimal():
            raise SchemaError(f"stopped must name seeds, not {_shown(seed)}")
        check(record, STOPPED, where=f"stopped.{seed}.")


def _described(hint: Any) -> str:
    return describe_type(hint).replace("dict", "an object")


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except ValueError:
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
