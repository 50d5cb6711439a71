"""A tiny language model, a word-level tokenizer and text pairs, all made on the spot, for trainers of transformers and TRL."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlkit2.studies.toy_language import PROMPT_LENGTH, WORDS, SentimentGrammar


def tokenizer() -> Any:
    """Splits at spaces; the grammar's words are the vocabulary."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )


def text_pairs(count: int, *, suffix: int = 3, seed: int = 0) -> list[dict[str, str]]:
    """Prompt, chosen and rejected as texts."""
    pairs = SentimentGrammar(suffix, seed).pairs(count)

    def text(ids: torch.Tensor) -> str:
        return " ".join(WORDS[i] for i in ids)

    return [
        {
            "prompt": text(chosen[:PROMPT_LENGTH]),
            "chosen": " " + text(chosen[PROMPT_LENGTH:]),
            "rejected": " " + text(rejected[PROMPT_LENGTH:]),
        }
        for chosen, rejected in zip(pairs.chosen["input_ids"], pairs.rejected["input_ids"], strict=True)
    ]


def gpt2(*, labels: int | None = None, dropout: float = 0.1) -> Any:
    """A GPT-2 of width 16 with dropout, as a language model or a sequence classifier."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_positions=32, n_embd=16, n_layer=2, n_head=2, pad_token_id=0, bos_token_id=1, eos_token_id=3,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    if labels is None:
        return transformers.GPT2LMHeadModel(config)
    config.num_labels = labels
    return transformers.GPT2ForSequenceClassification(config)
