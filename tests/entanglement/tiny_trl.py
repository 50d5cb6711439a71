"""A tiny language model, a word-level tokenizer and text pairs, all made on the spot, for trainers of transformers and TRL."""

from __future__ import annotations

import random
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


COMMON = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 0,
    "max_steps": 4,
}


def make_trainer(
    kind: str,
    folder: Any,
    callbacks: Any = (),
    *,
    only_config: bool = False,
    trainer_class: Any = None,
    reference: Any = None,
    train: Any = None,
    evaluation: Any = None,
    **options: Any,
) -> Any:
    """A trainer of TRL (or its configuration); classes move between releases."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    module = pytest.importorskip(f"trl.experimental.{kind.lower()}") if kind in ("CPO", "ORPO", "TPO") else trl
    config = getattr(module, f"{kind}Config")(output_dir=str(folder), **{**COMMON, **options})
    if only_config:
        return config
    extra = {"ref_model": gpt2() if reference is None else reference} if kind in ("DPO", "KTO") else {}
    if train is None:
        train = text_pairs(32)
        if kind == "TPO":
            gold = text_pairs(32, suffix=2)
            train = [{**pair, "reference": other["chosen"]} for pair, other in zip(train, gold, strict=True)]
    if evaluation is not None:
        extra["eval_dataset"] = datasets.Dataset.from_list(evaluation)
    return (trainer_class or getattr(module, f"{kind}Trainer"))(
        model=gpt2(labels=1 if kind == "Reward" else None),
        args=config,
        train_dataset=datasets.Dataset.from_list(train),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
        **extra,
    )


def training_state(trainer: Any) -> dict[str, torch.Tensor]:
    """Everything that training depends on."""
    state = {f"p/{name}": p.detach().clone() for name, p in trainer.model.named_parameters()}
    for i, slots in enumerate(trainer.optimizer.state.values()):
        state |= {f"o/{i}/{name}": torch.as_tensor(x).clone() for name, x in slots.items()}
    return {**state, "rng": torch.get_rng_state(), "python": torch.tensor(random.getstate()[1])}
