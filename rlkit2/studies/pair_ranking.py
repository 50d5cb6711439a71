"""Rank every preference pair of a file by the harm it is likely to do to its chosen completion: cheap scores of all, exact ones of the worst.

Every scored pair is one line of a file beside the result, so that a killed run continues where it stopped and a later one can measure more
pairs exactly without repeating anything. At any time one microbatch of pairs is in memory, and logits of one completion per side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from rlkit2.entanglement.model_folder import ModelFolder
from rlkit2.entanglement.pair_scores import FORWARD, GRADIENT, forward_scores, measured_scores
from rlkit2.entanglement.scores import PairBatch
from rlkit2.errors import ConfigError, DatasetError, first_line
from rlkit2.files import write_atomically
from rlkit2.training.run_files import JsonLines, read_json_lines

Line = dict[str, Any]
MEASURED_AT_ONCE = 16
"""Pairs between two savings; their gradients are taken one pair at a time."""
METHODS = ("auto", "ghost", "loop", "sketch")


def rank_pairs(
    model: ModelFolder,
    examples: Sequence[Mapping[str, Any]],
    out: str | Path = "ranked.jsonl",
    *,
    exact: int = 200,
    by: str = "head_gap",
    then_by: str = "gap",
    head: bool = True,
    method: str = "auto",
    sketch_dim: int = 1024,
    max_length: int | None = None,
    microbatch: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> list[Line]:
    """Score all pairs, write them from the most to the least harmful as JSON lines, and return them.

    A line holds `rank`, `index` (of the pair in `examples`), the scores `FORWARD`, log-probabilities and lengths, and for the `exact` pairs with the
    highest `by` also the scores `GRADIENT`, by which (`then_by`) these are ordered in front of all others. Pairs that cannot be scored (a
    merged token boundary, more tokens than the model has positions) come last, with the reason in `skipped`.

    Args:
        model: a causal language model.
        examples: `prompt`, `chosen`, `rejected`; see `read_pairs`.
        out: the result; scores are kept beside it in `<name>.scores.jsonl`.
        exact: how many pairs' gradients are measured.
        by: one of `FORWARD`, which chooses them and orders the rest. The default foretold the fall of the chosen best in two studies
            (`benchmarks/entanglement_ranking.py`), as well as the gradients themselves.
        then_by: one of `GRADIENT`, which orders them.
        head: also the scores of the output matrix, which cost the products of a pair's logits.
        method: how gradients are measured: auto, ghost, loop or sketch.
        sketch_dim: for the sketch.
        max_length: cut rows there.
        microbatch: pairs at a time.
        progress: called with (pairs scored, all); a gradient measurement counts as a pair.

    Raises:
        ConfigError: a setting that does not exist, a reward model, or scores beside `out` that are of another model, other pairs or settings.
        DatasetError: no pair can be scored.
    """
    _check(model, exact, by, then_by, head, method, microbatch)
    out = Path(out)
    settings = {"max_length": max_length, "head": head, "method": method, "sketch_dim": sketch_dim}
    kept = _Kept(out.with_name(f"{out.stem}.scores.jsonl"), {**_identity(model, examples), **settings})
    count = len(examples)
    with closing(kept):
        cheap = [i for i in range(count) if i not in kept.cheap]
        for start in range(0, len(cheap), microbatch):
            chosen = cheap[start : start + microbatch]
            kept.add("cheap", _cheap(model, examples, chosen, max_length, head))
            if progress:
                progress(len(kept.cheap), count + exact)
        usable = [i for i, line in kept.cheap.items() if "skipped" not in line]
        if not usable:
            raise DatasetError(f"no pair can be scored: {kept.cheap[0]['skipped']}")
        worst = sorted(usable, key=lambda i: (-kept.cheap[i][by], i))[:exact]
        missing = [i for i in worst if i not in kept.exact]
        for start in range(0, len(missing), MEASURED_AT_ONCE):
            chosen = missing[start : start + MEASURED_AT_ONCE]
            batch = model.rows([examples[i] for i in chosen], max_length=max_length)
            scores, used = measured_scores(model.score, batch, method=method, sketch_dim=sketch_dim, microbatch=1)
            kept.add("exact", [{"index": i, **_row(scores, k), "method": used} for k, i in enumerate(chosen)])
            if progress:
                progress(count + len(worst) - len(missing) + start + len(chosen), count + len(worst))
    lines = _ordered(kept, set(worst), by, then_by)
    write_atomically(out, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def _check(model: ModelFolder, exact: int, by: str, then_by: str, head: bool, method: str, microbatch: int) -> None:
    names = FORWARD if head else tuple(name for name in FORWARD if not name.startswith("head"))
    for name, value, known in (("by", by, names), ("then_by", then_by, GRADIENT), ("method", method, METHODS)):
        if value not in known:
            hint = " without head=True" if value in FORWARD and name == "by" else ""
            raise ConfigError(f"{name}={value!r} of a ranking must be one of{hint}: {', '.join(known)}")
    if exact < 0 or microbatch < 1:
        raise ConfigError(f"exact={exact} must be at least 0 and microbatch={microbatch} at least 1")
    if model.score.head is None:
        raise ConfigError(f"{model.path} is a reward model; pairs are ranked under a causal language model")


def _identity(model: ModelFolder, examples: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Digests of the model's files and of the pairs."""
    digest = hashlib.sha256()
    for path in sorted(model.path.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            digest.update(path.name.encode())
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    dtype = str(next(iter(model.score.params.values())).dtype)
    digest.update(dtype.encode())
    pairs = hashlib.sha256()
    for example in examples:
        pairs.update(json.dumps(example, sort_keys=True).encode())
    return {"model": digest.hexdigest(), "pairs": pairs.hexdigest()}


class _Kept:
    """The file of finished scores: first what they are of, then one line a pair and kind."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.cheap: dict[int, Line] = {}
        self.exact: dict[int, Line] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = read_json_lines(path)
        if lines and lines[0] != identity:
            odd = next((name for name, value in identity.items() if lines[0].get(name) != value), "settings")
            what = {"model": "of another model", "pairs": "of other pairs"}.get(odd, f"with another {odd}")
            raise ConfigError(f"{path} holds scores {what}: delete it or name another --out")
        for line in lines[1:]:
            kind = self.exact if line.pop("kind") == "exact" else self.cheap
            kind[line["index"]] = line
        whole = path.read_bytes() if path.is_file() else b""
        self._file = JsonLines(path, whole.rfind(b"\n") + 1)  # a line that a kill cut off goes
        if not lines:
            self._file.append([identity])

    def add(self, kind: str, lines: Sequence[Line]) -> None:
        """Keep finished pairs."""
        self._file.append({"kind": kind, **line} for line in lines)
        (self.exact if kind == "exact" else self.cheap).update({line["index"]: line for line in lines})

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _cheap(
    model: ModelFolder,
    examples: Sequence[Mapping[str, Any]],
    chosen: Sequence[int],
    max_length: int | None,
    head: bool,
) -> list[Line]:
    """Scores without gradients; a pair that cannot be scored is a line that says why."""
    rows, lines = list(chosen), list[Line]()
    batch: PairBatch | None
    try:
        batch = model.rows([examples[i] for i in rows], max_length=max_length)
    except (DatasetError, ConfigError):  # at least one of them: which?
        rows = []
        for i in chosen:
            try:
                model.rows([examples[i]], max_length=max_length)
                rows.append(i)
            except (DatasetError, ConfigError) as error:
                lines.append({"index": i, "skipped": first_line(error)})
        batch = model.rows([examples[i] for i in rows], max_length=max_length) if rows else None
    if batch is not None:
        scores = forward_scores(model.score, batch, head=head)
        for k, i in enumerate(rows):
            line = {"index": i, **_row(scores, k)}
            odd = next((name for name, value in line.items() if not torch.tensor(float(value)).isfinite()), None)
            lines.append({"index": i, "skipped": f"its {odd} is not finite"} if odd else line)
    return lines


def _row(scores: Mapping[str, torch.Tensor], k: int) -> dict[str, float]:
    return {name: float(values[k]) for name, values in scores.items()}


def _ordered(kept: _Kept, worst: set[int], by: str, then_by: str) -> list[Line]:
    """Measured pairs first, then the others, then those without scores."""

    def key(i: int) -> tuple[int, float, int]:
        if i in worst:
            return (0, -kept.exact[i][then_by], i)
        line = kept.cheap[i]
        return (2, 0.0, i) if "skipped" in line else (1, -line[by], i)

    order = sorted(kept.cheap, key=key)
    return [{"rank": rank, **kept.cheap[i], **(kept.exact[i] if i in worst else {})} for rank, i in enumerate(order, 1)]
