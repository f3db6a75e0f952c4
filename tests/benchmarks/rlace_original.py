"""The authors' R-LACE, run from a folder the user gives; none of it is shipped here.

The folder holds their ``rlace.py`` (github.com/shauli-ravfogel/rlace-icml). It runs with the settings of its
word-vector experiments on one change only: the scikit-learn loss name ``"log"``, which current versions refuse,
is read as ``"log_loss"``. It looks at its matrix every 1000 steps, the first time before it has learnt
anything, and returns the best one looked at; so N steps are asked for as N + 1, or the last thousand would be
thrown away.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PUBLISHED_STEPS = 50_000
SETTINGS = {"lr": 0.005, "weight_decay": 1e-5, "momentum": 0.0}
BATCH, EVALUATE_EVERY, EPSILON = 128, 1000, 0.002


@dataclass(frozen=True)
class Original:
    """The authors' module, how long to run it, and where finished runs are kept."""

    module: types.ModuleType
    steps: int
    keep: Path | None = None

    @classmethod
    def load(cls, folder: Path, steps: int, keep: Path | None = None) -> Original:
        """Import the authors' module with its loss name mended, and nothing else."""
        text = (folder / "rlace.py").read_text(encoding="utf-8")
        mended, count = re.subn(r"""(["']loss["']\s*:\s*)(["'])log\2""", r"\1\2log_loss\2", text)
        if count > 1:
            raise SystemExit(f"expected one loss name to mend in {folder}; found {count}")
        with tempfile.TemporaryDirectory() as work:
            path = Path(work) / "original_rlace.py"
            path.write_text(mended, encoding="utf-8")
            spec = importlib.util.spec_from_file_location("original_rlace", path)
            if spec is None or spec.loader is None:
                raise SystemExit(f"{folder} holds no rlace.py that can be imported")
            module = importlib.util.module_from_spec(spec)
            sys.modules["original_rlace"] = module
            spec.loader.exec_module(module)
        return cls(module, steps, keep)

    def directions(self, x: Tensor, z: Tensor, k: int, seed: int) -> tuple[Tensor, float]:
        """Return the directions it removes, shape ``(d, k)``, and the CPU seconds it took."""
        rows, labels = x.float().numpy(), z.numpy()
        data = hashlib.sha256(rows.tobytes() + labels.tobytes()).hexdigest()[:12]
        kept = None if self.keep is None else self.keep / f"{data}-{k}-{seed}-{self.steps}.npz"
        if kept is not None and kept.is_file():
            with np.load(kept, allow_pickle=False) as stored:
                return torch.from_numpy(stored["v"]), float(stored["seconds"])
        start = time.process_time()
        found = self.run(rows, labels, k, seed)
        took = time.process_time() - start
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            np.savez(kept, v=found.numpy(), seconds=took)
        return found, took

    def run(self, rows: np.ndarray, labels: np.ndarray, k: int, seed: int) -> Tensor:
        """Run it once."""
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 the only generator their code uses
        found = self.module.solve_adv_game(
            rows,
            labels,
            rows,
            labels,
            rank=k,
            device="cpu",
            out_iters=self.steps + 1,
            optimizer_class=torch.optim.SGD,
            optimizer_params_P=SETTINGS,
            optimizer_params_predictor=SETTINGS,
            epsilon=EPSILON,
            batch_size=BATCH,
            evalaute_every=EVALUATE_EVERY,
        )
        p = torch.as_tensor(np.asarray(found["P"])).double()
        return torch.linalg.eigh((p + p.T) / 2)[1][:, :k]  # what P sends to zero
