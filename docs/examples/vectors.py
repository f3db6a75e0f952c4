"""Erase a concept from vectors: fit, check with fresh probes, save, load."""

import tempfile

import torch

from concept_erasure import Eraser, LeaceEraser, LeaceFitter
from concept_erasure.probes import evaluate

# Vectors whose first coordinates tell three classes apart; a task rides on another coordinate.
generator = torch.Generator().manual_seed(0)
z = torch.randint(0, 3, (6000,), generator=generator)
task = torch.randint(0, 2, (6000,), generator=generator)
x = torch.randn(6000, 16, generator=generator, dtype=torch.float64)
x[:, :3] += 2 * torch.nn.functional.one_hot(z, 3)
x[:, 5] += 3 * task
train, test = slice(0, 4000), slice(4000, None)

# The one-liner. Integer labels are classes; see `z_kind` for numbers.
eraser = LeaceEraser.fit(x[train], z[train])
x_clean = eraser(x)

# Probes are trained afresh on the erased vectors, and tested on rows the eraser has not seen.
for name, values in (("before", x), ("after", x_clean)):
    concept = evaluate(values[train], z[train], values[test], z[test], probe="linear")
    kept = evaluate(values[train], task[train], values[test], task[test], probe="linear")
    print(f"{name:>6}  concept {concept.accuracy:.3f} [{concept.low:.3f}, {concept.high:.3f}]"
          f"  (majority {concept.majority:.3f})  task {kept.accuracy:.3f}")  # fmt: skip
    if name == "after":
        assert concept.accuracy < concept.majority + 0.05
        assert kept.accuracy > 0.85

# The same in a stream: memory does not depend on the number of rows.
fitter = LeaceFitter(16, 3)
one_hot = torch.nn.functional.one_hot(z, 3).to(x.dtype)
for start in range(0, 4000, 500):
    fitter.update(x[start : start + 500], one_hot[start : start + 500])
gap = (fitter.eraser(x) - x_clean).abs().max()
print(f"streamed and one-line fit differ by at most {gap:.1e}")
assert gap < 1e-9

# An eraser is a small folder: tensors, json, card.
with tempfile.TemporaryDirectory() as folder:
    eraser.save_pretrained(folder)
    assert torch.equal(Eraser.from_pretrained(folder)(x), x_clean)
