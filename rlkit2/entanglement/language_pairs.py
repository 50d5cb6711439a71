"""Preference pairs as token rows: from texts and chats with a tokenizer, or from a trainer's token columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from rlkit2.entanglement.scores import PairBatch
from rlkit2.entanglement.trainers import RowForm
from rlkit2.errors import ConfigError, DatasetError

Example = Mapping[str, Any]
Row = tuple[list[int], list[int]]
"""Token ids, and 1 for each that belongs to the completion."""

SIDES = ("chosen", "rejected")
IGNORED = -100
"""The label of tokens that are not trained (transformers' convention)."""


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
        DatasetError: a merged boundary, a field of another kind, or a completion that is empty after cutting; the pair is named.
    """
    rows: tuple[list[Row], list[Row]] = ([], [])
    form = RowForm(max_length)
    for index, example in enumerate(examples):
        for side, name in enumerate(SIDES):
            row = cut(_encoded(tokenizer, example, name, index, add_eos), form)
            if row is None:
                hint = f"; raise max_length={max_length}" if max_length is not None else ""
                raise DatasetError(f"the {name} completion of pair {index} is empty: drop the pair{hint}")
            rows[side].append(row)
    return PairBatch(padded(rows[0]), padded(rows[1]))


def cut(row: Row, form: RowForm) -> Row | None:
    """The row as a trainer of this form sees it; None where no token of the completion is left to predict."""
    ids, mask = row
    if form.max_length is not None and len(ids) > form.max_length:
        if form.drop_longer:
            return None
        kept = slice(-form.max_length, None) if form.keep_end else slice(form.max_length)
        ids, mask = ids[kept], mask[kept]
        if form.keep_end and mask[0]:
            return None  # the prompt is gone
    return (ids, mask) if any(mask) else None


def _encoded(
    tokenizer: Any, example: Example, side: str, index: int, add_eos: bool = True, add_bos: bool = False
) -> Row:
    """Ids of prompt and completion, and the completion's mask."""
    prompt, completion = (_checked(example, name, index) for name in ("prompt", side))
    if isinstance(prompt, str) != isinstance(completion, str):
        kinds = ("text", "chat messages") if isinstance(prompt, str) else ("chat messages", "text")
        raise DatasetError(f"pair {index} has a prompt of {kinds[0]} but {side} is {kinds[1]}: give both in one form")
    if isinstance(prompt, str):
        end = getattr(tokenizer, "eos_token", None)
        if add_eos and completion and end and not completion.endswith(end):
            completion = completion + end
        head, full = (list(tokenizer(text)["input_ids"]) for text in (prompt, prompt + completion))
        if head and full[: len(head)] != head and head[-1] == getattr(tokenizer, "eos_token_id", None):
            head = head[:-1]  # some tokenizers close every text
    else:
        if not getattr(tokenizer, "chat_template", None) and hasattr(tokenizer, "chat_template"):
            raise DatasetError(f"pair {index} holds chat messages but the tokenizer has no chat_template: give texts")
        head = list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False))
        full = list(tokenizer.apply_chat_template([*prompt, *completion], tokenize=True, return_dict=False))
    if full[: len(head)] != head:
        raise DatasetError(
            f"the tokenizer merges prompt and completion of pair {index} ({side}): end the prompt on a token boundary, "
            "for example with the space moved to the completion's start, or give token ids yourself"
        )
    start = getattr(tokenizer, "bos_token_id", None) if add_bos else None
    if start is not None and full[:1] != [start]:
        head, full = [start, *head], [start, *full]
    return full, [0] * len(head) + [1] * (len(full) - len(head))


def _checked(example: Example, name: str, index: int) -> Any:
    """A field that is a text or a list of chat messages."""
    value = example.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in value
    ):
        return list(value)
    raise DatasetError(
        f"{name} of pair {index} is {type(value).__name__ if value is not None else 'null'}: it must be a text or a list of chat messages"
    )


def pairs_by_prompt(rows: Iterable[Example], count: int) -> list[dict[str, Any]]:
    """Pairs made of unpaired rows `prompt, completion, label`: a wanted and an unwanted completion of one prompt.

    Prepared rows (`prompt_ids, completion_ids, label`) become prepared pairs.

    Raises:
        DatasetError: no prompt has both; entanglement is between two completions of one prompt.
    """
    waiting: dict[str, dict[bool, Any]] = {}
    pairs: list[dict[str, Any]] = []
    for row in rows:
        end = "_ids" if "completion_ids" in row else ""
        prompt = row[f"prompt{end}"]
        seen = waiting.setdefault(json.dumps(prompt), {})
        seen.setdefault(bool(row["label"]), row[f"completion{end}"])
        if len(seen) == 2:
            del waiting[json.dumps(prompt)]
            pairs.append({f"prompt{end}": prompt, f"chosen{end}": seen[True], f"rejected{end}": seen[False]})
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
        for side, name in enumerate(SIDES):
            row = _token_row(example, name)
            if not any(row[1]):
                raise DatasetError(f"the {name} completion of pair {index} is empty: drop the pair")
            rows[side].append(row)
    return PairBatch(padded(rows[0]), padded(rows[1]))


def _token_row(example: Example, side: str) -> Row:
    suffix = "_ids" if "chosen_ids" in example else "_input_ids"
    if f"prompt{suffix}" not in example or f"{side}{suffix}" not in example:
        raise DatasetError(
            f"the pairs have {', '.join(sorted(example))} but no prompt_ids, chosen_ids and rejected_ids"
        )
    prompt, ids = list(example[f"prompt{suffix}"]), list(example[f"{side}{suffix}"])
    labels = example.get(f"{side}_labels")
    if labels is None:
        return prompt + ids, [0] * len(prompt) + [1] * len(ids)
    return ids, [
        int(label != IGNORED) for label in labels
    ]  # the row holds the prompt, and what is not trained has this label


def reward_rows(examples: Sequence[Example], tokenizer: Any = None) -> PairBatch:
    """Whole sequences for a reward model: `chosen_ids, rejected_ids` (TRL from 1.0), `input_ids_chosen, input_ids_rejected` (earlier), or texts.

    Raises:
        DatasetError: neither is there.
    """
    sides = [[_reward_row(example, name, index, tokenizer) for index, example in enumerate(examples)] for name in SIDES]
    return whole_rows(PairBatch(*(padded(side) for side in sides)))


def whole_rows(batch: PairBatch) -> PairBatch:
    """Rows as a reward model reads them: no part is a completion."""
    names = ("input_ids", "attention_mask")
    return PairBatch(*({name: rows[name] for name in names} for rows in (batch.chosen, batch.rejected)))


def _reward_row(example: Example, side: str, index: int, tokenizer: Any) -> Row:
    ids = example.get(f"{side}_ids", example.get(f"input_ids_{side}"))
    if ids is None and tokenizer is not None and example.get(side) is not None:
        if "prompt" in example:
            ids = _encoded(tokenizer, example, side, index)[0]
        elif isinstance(example[side], str):
            ids = tokenizer(example[side])["input_ids"]
    if not ids:
        raise DatasetError(f"pair {index} has no {side}_ids and no text to tokenize: give chosen and rejected")
    return list(ids), [1] * len(ids)


def trained_pairs(
    examples: Iterable[Any], count: int, form: RowForm, tokenizer: Any, *, reward: bool
) -> tuple[PairBatch, list[Any]]:
    """The first `count` pairs that a trainer of this form would train on, cut as it cuts them, and their examples.

    Args:
        examples: prepared token columns, or `prompt`, `chosen`, `rejected`.
        form: how the trainer makes rows.
        reward: rows for a reward model.

    Raises:
        ConfigError: rows of another kind.
        DatasetError: no row is left, or a row is not as it should be.
    """
    sides: tuple[list[Row], list[Row]] = ([], [])
    used: list[Any] = []
    for index, example in enumerate(examples):
        if not isinstance(example, Mapping):
            raise ConfigError(f"cannot make pairs of {type(example).__name__} rows: give prompt, chosen and rejected")
        pair = [cut(_any_row(example, name, index, form, tokenizer, reward), form) for name in SIDES]
        if pair[0] is None or pair[1] is None:
            continue  # the trainer leaves it out, or nothing of it is trained
        for side, row in zip(sides, pair, strict=True):
            side.append(row)  # type: ignore[arg-type]
        used.append(example)
        if len(used) == count:
            break
    if not used:
        raise DatasetError(
            f"no pair has a completion within max_length={form.max_length}: raise it or give other pairs"
        )
    batch = PairBatch(padded(sides[0]), padded(sides[1]))
    return (whole_rows(batch) if reward else batch), used


def gold_rows(examples: Sequence[Any], form: RowForm, tokenizer: Any) -> dict[str, torch.Tensor]:
    """Rows of the third completion that TPO trains beside every pair (`reference_ids`, or the text `reference`).

    Raises:
        ConfigError: there is none, or nothing is left of one after cutting.
    """
    rows = []
    for index, example in enumerate(examples):
        if "reference_ids" not in example and "reference" not in example:
            raise ConfigError("TPO trains a third completion beside each pair: give the pairs a field reference")
        row = cut(_any_row(example, "reference", index, form, tokenizer, reward=False), form)
        if row is None:
            raise ConfigError(
                f"the reference completion of pair {index} is cut away: raise max_length={form.max_length}"
            )
        rows.append(row)
    return padded(rows)


def _any_row(example: Example, side: str, index: int, form: RowForm, tokenizer: Any, reward: bool) -> Row:
    if reward:
        return _reward_row(example, side, index, tokenizer)
    if any(name in example for name in ("chosen_ids", "chosen_input_ids")):
        return _token_row(example, side)
    if tokenizer is not None and all(name in example for name in ("prompt", *SIDES)):
        return _encoded(tokenizer, example, side, index, add_bos=form.add_bos)
    raise ConfigError(f"cannot make pairs of rows with {', '.join(sorted(example))}: give prompt, chosen and rejected")


def padded(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Rows padded with zeros on the right, and their masks."""
    length = max(len(ids) for ids, _ in rows)
    ids, attended, completion = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    for i, (row, mask) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        attended[i, : len(row)] = 1
        completion[i, : len(row)] = torch.tensor(mask)
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


def check_positions(batch: PairBatch, config: Any) -> None:
    """Refuse rows that are longer than the model's positions (where their number is known).

    Raises:
        ConfigError: naming the first such pair.
    """
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return
    for side, rows in zip(SIDES, (batch.chosen, batch.rejected), strict=True):
        lengths = (
            rows["attention_mask"].sum(1) if "attention_mask" in rows else torch.tensor([rows["input_ids"].shape[1]])
        )
        if int(lengths.max()) > most:
            raise ConfigError(
                f"pair {int(lengths.argmax())} ({side}) has {int(lengths.max())} tokens but the model {most} positions: "
                f"cut rows with max_length={most} or leave the pair out"
            )
