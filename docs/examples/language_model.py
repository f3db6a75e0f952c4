"""Erase a concept from a language model's residual stream, and take the eraser off again.

Runs on a tiny random model; with ``--smollm2`` on SmolLM2-135M-Instruct from its package.
"""

import sys

import torch

from concept_erasure import LeaceFitter, collect, fit_streaming
from concept_erasure.probes import evaluate

WOMEN = ["actress", "queen", "nun", "mother", "aunt", "waitress", "princess", "wife"]
MEN = ["actor", "king", "monk", "father", "uncle", "waiter", "prince", "husband"]
FRAMES = ["The {} came home.", "We met a {} today.", "I spoke with the {} at length.", "A {} left."]


def tiny_model():
    """Return a random two-layer Llama and a word-level tokenizer; nothing is downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = sorted({word for text in texts for word in text.rstrip(".").split()} | {"."})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(vocabulary), tie_word_embeddings=False, **sizes, **heads
        )
        return LlamaForCausalLM(config).eval(), tokenizer


texts = [frame.format(word) for frame in FRAMES for word in WOMEN + MEN]
labels = ["f" if word in WOMEN else "m" for _ in FRAMES for word in WOMEN + MEN]
if "--smollm2" in sys.argv:
    from concept_erasure.evals.models import load_smollm2

    model, tokenizer = load_smollm2()
    site = "residual.15"
else:
    model, tokenizer = tiny_model()
    site = "residual.1"

# What the model holds of each text at one site; the model is not changed by looking.
found = collect(model, tokenizer, texts, labels, sites=site, tokens="last")
# Labels belong to last tokens; with background=True the edit is the smallest on all tokens it will act on.
fitted = fit_streaming(
    model, tokenizer, texts, labels, sites=site, tokens="last", background=True,
    fitter=lambda width: LeaceFitter(width, 2, classes=["f", "m"]),
)  # fmt: skip
eraser = fitted[site].eraser
print(eraser)
batch = tokenizer(texts, return_tensors="pt", padding=True)
batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
with torch.no_grad():
    before = model(**batch).logits
    with eraser.attach(model) as edit:  # hooks: works at every site
        print(edit.summary())
        during = model(**batch).logits
    after = model(**batch).logits
print(f"logits moved by {(during - before).abs().max():.3f} while attached")
assert torch.equal(before, after), "the way back is exact"

# These rows were used for the fit, so this shows the guarantee, not generalisation.
for name, rows in (("before", found), ("after", eraser(found))):
    print(name, evaluate(rows.x, labels, rows.x, labels, probe="linear"))
