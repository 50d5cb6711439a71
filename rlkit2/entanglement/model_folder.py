"""A model that transformers saved, as what is scored; and reference scores for its pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlkit2.entanglement.language_pairs import check_positions, check_vocabulary, encode_pairs, reward_rows
from rlkit2.entanglement.scores import PairBatch, SequenceScore, causal_lm_logp, sequence_reward, sums_of_sides
from rlkit2.errors import ConfigError, first_line, require


@dataclass(frozen=True)
class ModelFolder:
    """A causal language model or a reward model (one label) with its tokenizer.

    Attributes:
        score: summed log-probability of a completion, or the reward of a whole text.
        tokenizer: its own.
        config: transformers' configuration.
        path: where it is from.
    """

    score: SequenceScore
    tokenizer: Any
    config: Any
    path: Path

    @classmethod
    def load(cls, folder: str | Path, *, dtype: str = "float32", device: str = "cpu") -> ModelFolder:
        """Load a folder written by `save_pretrained`; nothing is downloaded.

        Raises:
            MissingExtraError: transformers is not installed.
            ConfigError: not such a folder, or a classifier with more labels than one.
        """
        folder = Path(folder)
        transformers = require("transformers", extra="trl")
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder; give the folder of a model saved with save_pretrained")
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            reward = any("SequenceClassification" in name for name in config.architectures or ())
            kind = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
            network = kind.from_pretrained(folder, local_files_only=True, dtype=getattr(torch, dtype)).to(device).eval()
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"transformers cannot load {folder}: {first_line(error)}") from error
        if reward and config.num_labels != 1:
            raise ConfigError(f"{folder} is a classifier with {config.num_labels} labels; a reward model has one")
        return cls(sequence_reward(network) if reward else causal_lm_logp(network), tokenizer, config, folder)

    def rows(self, examples: Sequence[Mapping[str, Any]], *, max_length: int | None = None) -> PairBatch:
        """Token rows of text or chat pairs, on the model's device.

        Raises:
            DatasetError: a pair that cannot be encoded; it is named.
            ConfigError: a row with more tokens than the model has positions, or with a token it does not know.
        """
        if self.score.head is None:
            batch = reward_rows(examples, self.tokenizer)
        else:
            batch = encode_pairs(self.tokenizer, examples, max_length=max_length)
        check_vocabulary(batch, getattr(self.config, "vocab_size", None))
        check_positions(batch, self.config)
        device = next(iter(self.score.params.values())).device
        sides = ({name: tensor.to(device) for name, tensor in rows.items()} for rows in (batch.chosen, batch.rejected))
        return PairBatch(*sides)

    def sums(self, batch: PairBatch, microbatch: int | None = None) -> tuple[Tensor, Tensor]:
        """Scores of the chosen and of the rejected, `[P]` each."""
        return sums_of_sides(self.score, self.score.prepare(batch), microbatch)


def reference_scores(
    model: ModelFolder,
    examples: Sequence[Mapping[str, Any]],
    batch: PairBatch,
    reference: ModelFolder | None,
    *,
    max_length: int | None = None,
    microbatch: int | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Reference scores of the pairs: those that stand in the examples, else those of the reference model, else None.

    Raises:
        ConfigError: the reference model makes other rows of the pairs than the model.
    """
    if "ref_chosen_logps" in examples[0]:
        device = next(iter(model.score.params.values())).device
        columns = [[float(e[f"ref_{side}_logps"]) for e in examples] for side in ("chosen", "rejected")]
        return torch.tensor(columns[0], device=device), torch.tensor(columns[1], device=device)
    if reference is None:
        return None
    rows = reference.rows(examples, max_length=max_length)
    masks = [
        score.mask(score.prepare(pairs).chosen) for score, pairs in ((reference.score, rows), (model.score, batch))
    ]
    if masks[0].shape != masks[1].shape:
        raise ConfigError(f"{reference.path} is not the same kind of model as {model.path}, or has another tokenizer")
    return reference.sums(rows, microbatch)
