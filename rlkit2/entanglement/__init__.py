"""Gradient entanglement of preference pairs: everything by one name.

`causal_lm_logp(model)`, `segment_return(model)` or `segment_logp(policy)` say what is scored, `pair_geometry` and `gram_matrix` measure,
a margin loss of `rlkit2.losses.margin` gives the coefficients, `entanglement_report` reads them together.
"""

from rlkit2.entanglement.geometry import (
    REGIMES,
    BatchRates,
    GradientGeometry,
    batch_rates,
    predicted_change,
)
from rlkit2.entanglement.measure import (
    METHODS,
    PairGradients,
    ches_scores,
    gram_matrix,
    pair_geometry,
    token_cosines,
    token_geometry,
    token_rates,
    update_alignment,
)
from rlkit2.entanglement.scores import (
    PairBatch,
    SequenceScore,
    causal_lm_logp,
    segment_logp,
    segment_return,
    sequence_reward,
)
from rlkit2.entanglement.summary import entanglement_report

__all__ = [
    "METHODS",
    "REGIMES",
    "BatchRates",
    "GradientGeometry",
    "PairBatch",
    "PairGradients",
    "SequenceScore",
    "batch_rates",
    "causal_lm_logp",
    "ches_scores",
    "entanglement_report",
    "gram_matrix",
    "pair_geometry",
    "predicted_change",
    "segment_logp",
    "segment_return",
    "sequence_reward",
    "token_cosines",
    "token_geometry",
    "token_rates",
    "update_alignment",
]
