"""What a causal language model says, knows and still writes, before and after an edit.

`evaluate` runs whole suites and writes the report; the functions below are its parts. Attacks (`relearn`,
`soft_prompt`, `gcg`, `beast`, `ablation`, `quantise`, `rewording`) and lm-eval (`harness`) are modules of their own,
loaded when asked for.
"""

from concept_erasure.evals.language.evaluate import DEFAULT_SUITE, SUITES, evaluate
from concept_erasure.evals.language.generate import (
    Fluency,
    LeakRate,
    distinct,
    fluency,
    leak_rate,
    reverse_perplexity,
    sample,
)
from concept_erasure.evals.language.items import (
    ItemScores,
    equivalence,
    ignorance,
    item_scores,
    mcnemar,
)
from concept_erasure.evals.language.likelihood import (
    ContinuationGap,
    TokenizerLike,
    continuation_gap,
    perplexity,
)
from concept_erasure.evals.language.neutral import Divergence, kl_to_original, neutral_texts
from concept_erasure.evals.language.plots import plot_kept, plot_probes, plot_relearning
from concept_erasure.evals.language.probing import LayerProbes, probe_concept
from concept_erasure.evals.language.statistics import Equivalence, Paired, equivalence_to, paired

__all__ = [
    "DEFAULT_SUITE",
    "SUITES",
    "ContinuationGap",
    "Divergence",
    "Equivalence",
    "Fluency",
    "ItemScores",
    "LayerProbes",
    "LeakRate",
    "Paired",
    "TokenizerLike",
    "continuation_gap",
    "distinct",
    "equivalence",
    "equivalence_to",
    "evaluate",
    "fluency",
    "ignorance",
    "item_scores",
    "kl_to_original",
    "leak_rate",
    "mcnemar",
    "neutral_texts",
    "paired",
    "perplexity",
    "plot_kept",
    "plot_probes",
    "plot_relearning",
    "probe_concept",
    "reverse_perplexity",
    "sample",
]
