"""A sentiment grammar with its preference pairs, and a small causal language model of GPT-2's shape.

A sentence reads `<bos> the SUBJECT was ADV ADJ CONN ADV ADJ <answer>`, both adjectives of one polarity; its completion is `positive`
or `negative`, the first `suffix` words of a fixed clause whose nouns and verbs are drawn from three synonyms each (so that predicting
it is never certain), and `<eos>`. A pair has one prompt and one suffix and differs in the sentiment word alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from rlkit2.entanglement.scores import PairBatch
from rlkit2.errors import ConfigError

SUBJECTS = ("film", "book", "song", "meal", "hotel", "game", "show", "trip")
ADVERBS = ("very", "quite", "rather", "truly", "really")
CONNECTIVES = ("and", "but", "yet", "so")
ADJECTIVES = {
    "positive": ("lovely", "superb", "bright", "gentle", "witty", "warm", "crisp", "joyful"),
    "negative": ("dreadful", "bland", "grim", "harsh", "dull", "cold", "stale", "bitter"),
}
SUFFIX = (
    ("sentiment",),
    ("tone", "feeling", "mood"),
    ("based", "judging", "drawn"),
    ("on", "from", "by"),
    ("the",),
    ("overall", "general", "whole"),
    ("words", "phrases", "terms"),
    ("that",),
    ("the",),
    ("author", "writer", "speaker"),
    ("picked", "used", "chose"),
    ("here", "above", "throughout"),
)
WORDS = tuple(
    dict.fromkeys(
        ("<pad>", "<bos>", "<answer>", "<eos>", "positive", "negative", "the", "was")
        + SUBJECTS
        + ADVERBS
        + CONNECTIVES
        + ADJECTIVES["positive"]
        + ADJECTIVES["negative"]
        + tuple(word for slot in SUFFIX for word in slot)
    )
)
_ID = {word: index for index, word in enumerate(WORDS)}
PROMPT_LENGTH = 10


class SentimentGrammar:
    """Draws sentences and preference pairs.

    Args:
        suffix: words shared by both completions of a pair, 0 to 12.
        seed: of the draws.
    """

    def __init__(self, suffix: int, seed: int = 0) -> None:
        if not 0 <= suffix <= len(SUFFIX):
            raise ConfigError(f"suffix={suffix} must be from 0 to {len(SUFFIX)} words")
        self.suffix = suffix
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def length(self) -> int:
        """Tokens of a sentence with its completion."""
        return PROMPT_LENGTH + self.suffix + 2

    def _pick(self, words: tuple[str, ...], count: int) -> Tensor:
        ids = torch.tensor([_ID[word] for word in words])
        return ids[torch.randint(len(words), (count,), generator=self.generator)]

    def _sentences(self, count: int) -> tuple[Tensor, Tensor]:
        """Ids `[count, length]` with the sentiment word left open, and polarity `[count]` (True: positive)."""
        positive = torch.rand(count, generator=self.generator) < 0.5
        adjectives = [
            torch.where(positive, self._pick(ADJECTIVES["positive"], count), self._pick(ADJECTIVES["negative"], count))
            for _ in range(2)
        ]

        def word(name: str) -> Tensor:
            return torch.full((count,), _ID[name])

        columns = [word("<bos>"), word("the"), self._pick(SUBJECTS, count), word("was"), self._pick(ADVERBS, count)]
        columns += [adjectives[0], self._pick(CONNECTIVES, count), self._pick(ADVERBS, count), adjectives[1]]
        columns += [word("<answer>"), word("<pad>"), *(self._pick(slot, count) for slot in SUFFIX[: self.suffix])]
        return torch.stack([*columns, word("<eos>")], 1), positive

    def _completed(self, ids: Tensor, positive: Tensor) -> Tensor:
        completed = ids.clone()
        completed[:, PROMPT_LENGTH] = torch.where(positive, _ID["positive"], _ID["negative"])
        return completed

    def labelled(self, count: int, wrong: float = 0.3) -> Tensor:
        """Completed sentences `[count, length]`, the share `wrong` of them with the other sentiment word."""
        ids, positive = self._sentences(count)
        flipped = torch.rand(count, generator=self.generator) < wrong
        return self._completed(ids, positive ^ flipped)

    def pairs(self, count: int) -> PairBatch:
        """Preference pairs: the right sentiment word is chosen, the wrong one rejected."""
        ids, positive = self._sentences(count)
        mask = torch.zeros_like(ids)
        mask[:, PROMPT_LENGTH:] = 1
        sides = (self._completed(ids, label) for label in (positive, ~positive))
        return PairBatch(*({"input_ids": side, "completion_mask": mask} for side in sides))


# --- the model -------------------------------------------------------------------------------------------------------------------


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.c_attn(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.c_proj(mixed.transpose(-3, -2).flatten(-2))  # type: ignore[no-any-return]


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(nn.functional.gelu(self.c_fc(x), approximate="tanh"))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = _MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class SmallGPT(nn.Module):
    """Token ids `[B, T]` to logits `[B, T, vocabulary]`: GPT-2's computation (Radford et al. 2019) with tied embeddings, no dropout.

    Parameters have the names of transformers' GPT-2 inside `transformer`; linear weights are `[out, in]`.
    """

    def __init__(
        self, vocabulary: int = len(WORDS), *, width: int = 64, layers: int = 2, heads: int = 4, positions: int = 32
    ) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"width={width} must be a multiple of heads={heads}")
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, width),
                "wpe": nn.Embedding(positions, width),
                "h": nn.ModuleList(_Block(width, heads) for _ in range(layers)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight  # type: ignore[assignment]
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the next token at every position."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
        x = self.transformer["wte"](input_ids) + self.transformer["wpe"](places)
        for block in self.transformer["h"]:  # type: ignore[attr-defined]
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))  # type: ignore[no-any-return]
