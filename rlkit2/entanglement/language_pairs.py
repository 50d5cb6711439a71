"""Preference pairs of text as token rows: from JSON lines, from strings with a tokenizer, from a trainer's token columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlkit2.entanglement.scores import PairBatch
from rlkit2.errors import ConfigError, DatasetError, DatasetNotFoundError

Example = Mapping[str, Any]
Row = tuple[list[int], int]
"""Token ids, and where the completion starts."""


def read_pairs(path: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """Pairs from a file of JSON lines with the fields `prompt`, `chosen` and `rejected` (text, or lists of chat messages), and optionally
    `ref_chosen_logps` and `ref_rejected_logps`.

    Raises:
        DatasetNotFoundError: no such file.
        DatasetError: a line is no JSON object or lacks a field; the line's number is named.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetNotFoundError(f"{path} does not exist; give a file of JSON lines with prompt, chosen and rejected")
    pairs: list[dict[str, Any]] = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                pair = json.loads(line)
            except ValueError as error:
                raise DatasetError(f"{path} line {number} is no JSON: {error}") from error
            missing = (
                [name for name in ("prompt", "chosen", "rejected") if name not in pair]
                if isinstance(pair, dict)
                else ["object"]
            )
            if missing:
                raise DatasetError(
                    f"{path} line {number} has no {missing[0]!r}; each line needs prompt, chosen and rejected"
                )
            pairs.append(pair)
            if limit is not None and len(pairs) >= limit:
                break
    if not pairs:
        raise DatasetError(f"{path} holds no pairs")
    return pairs


def encode_pairs(
    tokenizer: Any, examples: Sequence[Example], *, max_length: int | None = None, add_eos: bool = True
) -> PairBatch:
    """Token rows of text pairs, with masks on the completions.

    The completion starts after the prompt's own tokens. A tokenizer that merges the end of the prompt with the start of the completion
    would make the two completions start from different contexts, so that is refused.

    Args:
        tokenizer: of transformers (any callable that returns `input_ids` for a text; `apply_chat_template` for chat messages).
        examples: `prompt`, `chosen`, `rejected`: texts, or lists of chat messages.
        max_length: cut rows there from the right.
        add_eos: append the tokenizer's end token to completions of plain text that do not end with it, as TRL does.

    Raises:
        DatasetError: a merged boundary, or a completion that is empty after cutting; the pair is named.
    """
    rows: tuple[list[Row], list[Row]] = ([], [])
    for index, example in enumerate(examples):
        for side, name in enumerate(("chosen", "rejected")):
            ids, start = _encoded(tokenizer, example, name, index, add_eos)
            ids = ids[:max_length]
            if len(ids) <= start:
                hint = f"; raise max_length={max_length}" if max_length is not None else ""
                raise DatasetError(f"the {name} completion of pair {index} is empty: drop the pair{hint}")
            rows[side].append((ids, start))
    return PairBatch(_padded(rows[0]), _padded(rows[1]))


def _encoded(tokenizer: Any, example: Example, side: str, index: int, add_eos: bool) -> tuple[list[int], int]:
    """Ids of prompt and completion, and where the completion starts."""
    prompt, completion = example["prompt"], example[side]
    if isinstance(prompt, str):
        end = getattr(tokenizer, "eos_token", None)
        if add_eos and completion and end and not completion.endswith(end):
            completion = completion + end
        head, full = (list(tokenizer(text)["input_ids"]) for text in (prompt, prompt + completion))
        if full[: len(head)] != head and head[-1] == getattr(tokenizer, "eos_token_id", None):
            head = head[:-1]  # some tokenizers close every text
    else:
        head = list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False))
        full = list(tokenizer.apply_chat_template([*prompt, *completion], tokenize=True, return_dict=False))
    if full[: len(head)] != head:
        raise DatasetError(
            f"the tokenizer merges prompt and completion of pair {index} ({side}): end the prompt on a token boundary, "
            "for example with the space moved to the completion's start, or give token ids yourself"
        )
    return full, len(head)


def pairs_by_prompt(rows: Iterable[Example], count: int) -> list[dict[str, Any]]:
    """Pairs made of unpaired rows `prompt, completion, label`: a wanted and an unwanted completion of one prompt.

    Raises:
        DatasetError: no prompt has both; entanglement is between two completions of one prompt.
    """
    waiting: dict[str, dict[bool, Any]] = {}
    pairs: list[dict[str, Any]] = []
    for row in rows:
        seen = waiting.setdefault(json.dumps(row["prompt"]), {})
        seen.setdefault(bool(row["label"]), row["completion"])
        if len(seen) == 2:
            del waiting[json.dumps(row["prompt"])]
            pairs.append({"prompt": row["prompt"], "chosen": seen[True], "rejected": seen[False]})
            if len(pairs) == count:
                break
    if not pairs:
        raise DatasetError("the dataset is unpaired and no prompt has a wanted and an unwanted completion: give pairs")
    return pairs


def token_rows(examples: Sequence[Example]) -> PairBatch:
    """Token rows from the columns of a prepared dataset: `prompt_ids, chosen_ids, rejected_ids` (TRL from 1.0), or
    `prompt_input_ids, chosen_input_ids, rejected_input_ids` with the prompt in front or left out (CPO, ORPO and earlier TRL).

    Raises:
        DatasetError: the columns are not there, or a completion is empty.
    """
    rows: tuple[list[Row], list[Row]] = ([], [])
    for index, example in enumerate(examples):
        suffix = "_ids" if "chosen_ids" in example else "_input_ids"
        if f"prompt{suffix}" not in example or f"chosen{suffix}" not in example:
            raise DatasetError(
                f"the pairs have {', '.join(sorted(example))} but no prompt_ids, chosen_ids and rejected_ids"
            )
        prompt = list(example[f"prompt{suffix}"])
        for side, name in enumerate(("chosen", "rejected")):
            ids = list(example[f"{name}{suffix}"])
            labels = example.get(f"{name}_labels")
            if labels is not None:  # the row holds the prompt, its labels are -100
                start = next((i for i, label in enumerate(labels) if label != -100), len(ids))
            else:
                ids, start = prompt + ids, len(prompt)
            if start >= len(ids):
                raise DatasetError(f"the {name} completion of pair {index} is empty: drop the pair")
            rows[side].append((ids, start))
    return PairBatch(_padded(rows[0]), _padded(rows[1]))


def reward_rows(examples: Sequence[Example], tokenizer: Any = None) -> PairBatch:
    """Whole sequences for a reward model: `chosen_ids, rejected_ids` (TRL from 1.0), `input_ids_chosen, input_ids_rejected` (earlier), or texts.

    Raises:
        DatasetError: neither is there.
    """
    sides: tuple[list[Row], list[Row]] = ([], [])
    for index, example in enumerate(examples):
        for side, name in enumerate(("chosen", "rejected")):
            ids = example.get(f"{name}_ids", example.get(f"input_ids_{name}"))
            if ids is None and tokenizer is not None and isinstance(example.get(name), str):
                ids = tokenizer(example.get("prompt", "") + example[name])["input_ids"]
            if not ids:
                raise DatasetError(f"pair {index} has no {name}_ids and no text to tokenize: give chosen and rejected")
            sides[side].append((list(ids), 0))
    first, second = (_padded(side) for side in sides)
    return PairBatch(*({name: rows[name] for name in ("input_ids", "attention_mask")} for rows in (first, second)))


def _padded(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Rows padded with zeros on the right, and their masks."""
    length = max(len(ids) for ids, _ in rows)
    ids, attended, completion = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    for i, (row, start) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        attended[i, : len(row)] = 1
        completion[i, start : len(row)] = 1
    return {"input_ids": ids, "attention_mask": attended, "completion_mask": completion}


def check_vocabulary(batch: PairBatch, size: int | None) -> None:
    """Refuse token ids that the model has no embedding for (where its vocabulary's size is known).

    Raises:
        ConfigError: an id is out of range.
    """
    largest = max(int(rows["input_ids"].max()) for rows in (batch.chosen, batch.rejected))
    if size and largest >= size:
        raise ConfigError(
            f"token id {largest} is beyond the model's vocabulary of {size}: use the model's own tokenizer"
        )
