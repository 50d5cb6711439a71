"""Preference pairs from the files people have: which form rows are in is told from the rows themselves and said in words.

| format | a row |
| --- | --- |
| explicit | `prompt`, `chosen`, `rejected`: texts, or lists of chat messages `{role, content}` (TRL) |
| implicit | `chosen`, `rejected` that begin alike: lists of chat messages, or texts (TRL) |
| hh | the same, texts in turns of `Human:` and `Assistant:` (HH-RLHF) |
| ultrafeedback | a text `prompt`; `chosen` and `rejected` whole chats (UltraFeedback-binarized) |
| sharegpt | `conversations` of `{from, value}`; `chosen` and `rejected` one such message each |
| alpaca | `instruction`, perhaps `input`; `chosen`, `rejected`, or `output` of two texts, the better first, or `output_1`, `output_2`, `preference` |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rlkit2.errors import ConfigError, DatasetError, DatasetNotFoundError, first_line, require

Pair = dict[str, Any]
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


def read_pairs(
    path: str | Path, limit: int | None = None, *, format: str = "auto", tell: Callable[[str], None] | None = None
) -> list[Pair]:
    """Pairs from a file or folder, each with `prompt`, `chosen` and `rejected`: all texts, or all lists of chat messages.

    Args:
        path: JSON lines, a JSON array, Parquet (`.parquet`; needs pyarrow), or a folder written by `datasets`' `save_to_disk`. Fields
            `ref_chosen_logps` and `ref_rejected_logps` and `margin` are kept.
        limit: the first so many rows.
        format: one of `FORMATS`; "auto": told from the first row, see `detect_format`.
        tell: called with one line that says which format was found.

    Raises:
        DatasetNotFoundError: no such file.
        DatasetError: a row is not as its format says, or reference scores stand in only some rows; its line (or row) and field are named.
        ConfigError: an unknown format.
    """
    path = Path(path)
    if format not in (*FORMATS, "auto"):
        raise ConfigError(f"unknown format {format!r} of pairs; choose one of: auto, {', '.join(FORMATS)}")
    pairs: list[Pair] = []
    for place, row in _rows(path):
        if not isinstance(row, dict):
            raise DatasetError(f"{path} {place} is {_kind(row)}: each row must be an object with named fields")
        if format == "auto":
            format = detect_format(row, f"{path} {place}")
            if tell is not None:
                tell(f"{path.name} is read as {format} pairs (say otherwise with format: {', '.join(FORMATS)})")
        try:
            pair = FORMATS[format](row)
        except _BadFieldError as error:
            raise DatasetError(f"{path} {place}: {error} (read as {format})") from None
        kept = {name: row[name] for name in (*REFERENCE, "margin") if row.get(name) is not None}
        for name, value in kept.items():
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or value != value
                or abs(value) == float("inf")
            ):
                raise DatasetError(f"{path} {place}: field {name!r} is {value!r}; it must be a finite number")
        if pairs and set(kept) != set(pairs[0]) - {"prompt", "chosen", "rejected"}:
            odd = sorted(set(kept) ^ (set(pairs[0]) - {"prompt", "chosen", "rejected"}))[0]
            raise DatasetError(f"{path} {place}: field {odd!r} stands in only some rows; give it in all or in none")
        pairs.append({**pair, **kept})
        if limit is not None and len(pairs) >= limit:
            break
    if not pairs:
        raise DatasetError(f"{path} holds no pairs")
    if len(set(REFERENCE) & set(pairs[0])) == 1:
        raise DatasetError(f"{path} has only one of {' and '.join(REFERENCE)}; give both or none")
    return pairs


def detect_format(row: Mapping[str, Any], place: str = "the first row") -> str:
    """The name of the format that a row is in.

    Raises:
        DatasetError: none of them; the fields are named.
    """
    names = {name for name, value in row.items() if value is not None}
    chat = isinstance(row.get("chosen"), list)
    if "conversations" in names:
        return "sharegpt"
    if "instruction" in names:
        return "alpaca"
    if {"prompt", "chosen", "rejected"} <= set(row):
        return "ultrafeedback" if chat and isinstance(row["prompt"], str) else "explicit"
    if {"chosen", "rejected"} <= set(row):
        return "hh" if isinstance(row["chosen"], str) and "\n\nAssistant:" in row["chosen"] else "implicit"
    raise DatasetError(
        f"{place} has the fields {', '.join(sorted(row)) or 'none'}, which are none of the known formats; each row needs prompt, chosen and rejected"
    )


class _BadFieldError(Exception):
    """A field is not what the format says."""


def _kind(value: Any) -> str:
    return {type(None): "null", str: "a text", list: "a list", dict: "an object", bool: "a truth value"}.get(
        type(value), "a number"
    )


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise _BadFieldError(f"field {name!r} is {_kind(value) if name in row else 'missing'}; it must be a text")
    return value


def _messages(value: Any, name: str) -> list[dict[str, str]]:
    """Chat messages as `{role, content}` of texts."""
    if not isinstance(value, list) or not value:
        raise _BadFieldError(
            f"field {name!r} is {_kind(value) if value != [] else 'an empty list'}; it must be a list of chat messages"
        )
    for number, message in enumerate(value):
        for part in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(part), str):
                raise _BadFieldError(f"message {number} of field {name!r} has no text {part!r}")
    return [dict(message) for message in value]


def _completions(row: Mapping[str, Any], prompt: str | list[dict[str, str]]) -> Pair:
    """A pair whose completions are of the prompt's kind."""
    found: Pair = {"prompt": prompt}
    for side in ("chosen", "rejected"):
        if isinstance(prompt, str):
            found[side] = _text(row, side)
        elif isinstance(row.get(side), str):
            raise _BadFieldError(
                f"field {side!r} is a text but the prompt is a list of chat messages; give both in one form"
            )
        else:
            found[side] = _messages(row.get(side), side)
        if not found[side]:
            raise _BadFieldError(f"field {side!r} is empty")
    return found


def _explicit(row: Mapping[str, Any]) -> Pair:
    prompt = row.get("prompt")
    return _completions(row, _messages(prompt, "prompt") if isinstance(prompt, list) else _text(row, "prompt"))


def _implicit(row: Mapping[str, Any]) -> Pair:
    if isinstance(row.get("chosen"), list):
        chosen, rejected = (_messages(row.get(side), side) for side in ("chosen", "rejected"))
        shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
        if not shared:
            raise _BadFieldError(
                "fields 'chosen' and 'rejected' begin with different messages: the prompt must be the same"
            )
        return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
    first, second = _text(row, "chosen"), _text(row, "rejected")
    shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(first, second, strict=False)))
    shared = (
        max(0, shared - 1) if shared and first[shared - 1] == " " else shared
    )  # a space belongs to the word after it
    return _completions({"chosen": first[shared:], "rejected": second[shared:]}, first[:shared])


def _hh(row: Mapping[str, Any]) -> Pair:
    marker = "\n\nAssistant:"
    first, second = _text(row, "chosen"), _text(row, "rejected")
    end = first.rfind(marker) + len(marker)
    while end >= len(marker) and not second.startswith(first[:end]):
        end = first.rfind(marker, 0, end - len(marker)) + len(marker)
    if end < len(marker):
        raise _BadFieldError("fields 'chosen' and 'rejected' share no turn that ends with 'Assistant:'")
    return _completions({"chosen": first[end:], "rejected": second[end:]}, first[:end])


def _ultrafeedback(row: Mapping[str, Any]) -> Pair:
    prompt = _text(row, "prompt")
    pair = _implicit(row)
    if pair["prompt"][-1]["content"].strip() != prompt.strip() and all(
        m["content"].strip() != prompt.strip() for m in pair["prompt"]
    ):
        raise _BadFieldError("field 'prompt' is not what the messages of 'chosen' and 'rejected' have in common")
    return pair


def _sharegpt(row: Mapping[str, Any]) -> Pair:
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

    def message(value: Any, name: str) -> dict[str, str]:
        if not isinstance(value, Mapping) or value.get("from") not in roles or not isinstance(value.get("value"), str):
            raise _BadFieldError(
                f"field {name!r} is not a message with 'from' (human, gpt or system) and a text 'value'"
            )
        return {"role": roles[value["from"]], "content": value["value"]}

    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise _BadFieldError("field 'conversations' must be a list of messages")
    prompt = [message(turn, f"conversations[{i}]") for i, turn in enumerate(turns)]
    return {"prompt": prompt, **{side: [message(row.get(side), side)] for side in ("chosen", "rejected")}}


def _alpaca(row: Mapping[str, Any]) -> Pair:
    prompt = _text(row, "instruction")
    if row.get("input"):
        prompt += "\n\n" + _text(row, "input")
    sides: Mapping[str, Any] = row
    if isinstance(row.get("output"), list):
        if len(row["output"]) != 2:
            raise _BadFieldError(f"field 'output' has {len(row['output'])} texts; it must have two, the better first")
        sides = dict(zip(("chosen", "rejected"), row["output"], strict=True))
    elif "preference" in row:
        if row["preference"] not in (1, 2):
            raise _BadFieldError(f"field 'preference' is {row['preference']!r}; it must be 1 or 2")
        better, worse = (_text(row, f"output_{n}") for n in (row["preference"], 3 - row["preference"]))
        sides = {"chosen": better, "rejected": worse}
    return _completions({side: "\n\n" + _text(sides, side) for side in ("chosen", "rejected")}, prompt)


FORMATS: Mapping[str, Callable[[Mapping[str, Any]], Pair]] = MappingProxyType(
    {
        "explicit": _explicit,
        "implicit": _implicit,
        "hh": _hh,
        "ultrafeedback": _ultrafeedback,
        "sharegpt": _sharegpt,
        "alpaca": _alpaca,
    }
)
"""What turns a row of each format into a pair."""


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """`("line 3", row)` of every row."""
    if not path.exists():
        raise DatasetNotFoundError(f"{path} does not exist; give a file of JSON lines with prompt, chosen and rejected")
    if path.is_dir() or path.suffix == ".parquet":
        yield from ((f"row {number}", row) for number, row in enumerate(_table(path), 1))
        return
    try:
        with open(path, encoding="utf-8-sig") as file:  # with or without a byte order mark
            start = next((line for line in file if line.strip()), "")
            file.seek(0)
            if start.lstrip().startswith("["):
                array = json.load(file)
                yield from ((f"row {number}", row) for number, row in enumerate(array, 1))
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"line {number}", json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise DatasetError(f"{path} line {number} is not JSON: {first_line(error)}") from error
    except DatasetError:
        raise
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text: {first_line(error)}") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not JSON: {first_line(error)}") from error


def _table(path: Path) -> Iterator[Any]:
    """Rows of a Parquet file or of a folder of `datasets`."""
    try:
        if path.is_dir():
            found = require("datasets", extra="trl").load_from_disk(str(path))
            if isinstance(found, dict):
                raise DatasetError(f"{path} holds several splits ({', '.join(found)}); give the folder of one of them")
            yield from found
        else:
            yield from require("pyarrow.parquet", extra="trl").read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(f"{path} cannot be read as preference pairs: {first_line(error)}") from error
