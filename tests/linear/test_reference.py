"""Compare with concept-erasure 0.2.4, which has our import name and so runs in a child process.

Install it apart from everything else and name the folder::

    pip install --no-deps --target FOLDER concept-erasure==0.2.4
    CONCEPT_ERASURE_REFERENCE=FOLDER pytest -m reference tests/linear/test_reference.py
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from concept_erasure.linalg import optimal_linear_shrinkage
from concept_erasure.linear import (
    groupby,
    leace,
    optimal_transport,
    oracle,
    quadratic,
    quantile,
    scrubbing,
)
from concept_erasure.linear.leace import ErasureMethod

FOLDER = os.environ.get("CONCEPT_ERASURE_REFERENCE", "")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif(not FOLDER, reason="CONCEPT_ERASURE_REFERENCE names no folder"),
]

METHODS: tuple[ErasureMethod, ...] = ("leace", "orth")
AFFINE = (True, False)

CHILD = """
import inspect, json, sys
import concept_erasure as ce
from concept_erasure import optimal_transport as ot
from safetensors.torch import load_file, save_file

data, out, signatures = load_file(sys.argv[1]), {}, {}
x, fresh = data["x"], data["fresh"]
for name in ("binary", "one_hot", "continuous"):
    z, new = data[name], data["fresh_" + name]
    for method in ("leace", "orth"):
        for affine in (True, False):
            eraser = ce.LeaceEraser.fit(x, z, method=method, affine=affine, shrinkage=False)
            out[f"{name}/{method}/{affine}"] = eraser(fresh)
    out[f"{name}/oracle"] = ce.OracleEraser.fit(x, z, svd_tol=1e-9)(fresh, new)
labels, new = data["labels"], data["fresh_labels"]
fitter = ce.QuadraticFitter.fit(x, labels, shrinkage=False)
out["quadratic"] = fitter.eraser(fresh, new)
out["maps"] = fitter.eraser.ot_maps
out["edited"] = fitter.editor()(fresh, new, 1)
out["shrunk"] = ce.optimal_linear_shrinkage(data["sigma"].clone(), 300)
out["barycenter"] = ot.ot_barycenter(data["sigmas"], data["weights"])
out["coalesced"] = ce.groupby(x, labels).map(lambda k, g: g * k).coalesce()
if hasattr(ce, "QuantileNormalizer"):  # in the repository, not in the release
    out["cdf"] = ce.cdf(fresh[:, 0].contiguous(), data["quantiles"])
    out["icdf"] = ce.icdf(data["p"], data["quantiles"])
    narrow = x.float()
    normalizer = ce.QuantileNormalizer(narrow, labels, num_bins=64)
    out["lut"] = normalizer.lut
    out["transported"] = normalizer.transport(narrow, labels, 1)
save_file({k: v.contiguous() for k, v in out.items()}, sys.argv[2])


def record(name, value):
    try:
        signatures[name] = list(inspect.signature(value).parameters)
    except (TypeError, ValueError):
        pass


for name in ce.__all__ + ["ot." + n for n in ("is_positive_definite", "ot_barycenter",
                          "ot_distance", "ot_map", "ot_midpoint", "psd_sqrt_rsqrt")]:
    value = getattr(ot, name[3:]) if name.startswith("ot.") else getattr(ce, name)
    record(name, value)
    if inspect.isclass(value):
        for key, member in vars(value).items():
            if not key.startswith("_") or key == "__call__":
                record(f"{name}.{key}", getattr(value, key))
json.dump(signatures, open(sys.argv[3], "w"))
"""


def problem() -> dict[str, Tensor]:
    """Return a well-scaled problem; equal classes, so that both weigh the class means alike."""
    g = torch.Generator().manual_seed(0)
    n, d, k = 600, 12, 3
    labels = torch.arange(n) % k
    mix = torch.randn(d, d, generator=g, dtype=torch.float64) / d**0.5
    centers = 2 * torch.randn(k, d, generator=g, dtype=torch.float64)
    x = torch.randn(n, d, generator=g, dtype=torch.float64) @ mix + centers[labels] + 1
    continuous = x[:, :2] @ torch.randn(2, 2, generator=g, dtype=torch.float64)
    continuous = continuous + torch.randn(n, 2, generator=g, dtype=torch.float64)
    roots = torch.randn(3, d, d, generator=g, dtype=torch.float64)
    quantiles = torch.randn(50, generator=g, dtype=torch.float64).sort().values
    data = {
        "x": x,
        "labels": labels,
        "binary": (labels == 0).double()[:, None],
        "one_hot": torch.nn.functional.one_hot(labels).double(),
        "continuous": continuous,
        "sigmas": roots @ roots.mT / d,
        "weights": torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64),
        "sigma": x.T.cov(correction=0),
        "quantiles": quantiles,
        "p": torch.rand(40, generator=g, dtype=torch.float64),
    }
    fresh = torch.randperm(n, generator=g)[:100]
    for name in ("labels", "binary", "one_hot", "continuous"):
        data[f"fresh_{name}"] = data[name][fresh]
    data["fresh"] = x[fresh] + 0.1
    return {name: value.contiguous() for name, value in data.items()}


@pytest.fixture(scope="module")
def theirs(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, list[str]]]:
    """Return the data, the reference's results on it, and the parameters of its public names."""
    folder: Path = tmp_path_factory.mktemp("reference")
    paths = [folder / name for name in ("in.safetensors", "out.safetensors", "names.json")]
    data = problem()
    save_file(data, paths[0])
    environment = {**os.environ, "PYTHONPATH": str(Path(FOLDER).resolve())}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, paths)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the reference failed:\n{done.stderr[-3000:]}")
    return data, load_file(paths[1]), json.loads(paths[2].read_text())


Results = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, list[str]]]


def close(ours: Tensor, theirs: Tensor, bound: float = 1e-10) -> None:
    assert ours.shape == theirs.shape
    assert float((ours.double() - theirs.double()).abs().max()) < bound


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["binary", "one_hot", "continuous"])
def test_leace(theirs: Results, name: str, method: ErasureMethod, affine: bool) -> None:
    data, expected, _ = theirs
    eraser = leace.LeaceEraser.fit(
        data["x"], data[name], method=method, affine=affine, shrinkage=False
    )
    close(eraser(data["fresh"]), expected[f"{name}/{method}/{affine}"])


@pytest.mark.parametrize("name", ["binary", "one_hot", "continuous"])
def test_oracle(theirs: Results, name: str) -> None:
    data, expected, _ = theirs
    eraser = oracle.OracleEraser.fit(data["x"], data[name])
    close(eraser(data["fresh"], data[f"fresh_{name}"]), expected[f"{name}/oracle"])


def test_quadratic(theirs: Results) -> None:
    data, expected, _ = theirs
    fitter = quadratic.QuadraticFitter.fit(data["x"], data["labels"], shrinkage=False)
    # the reference stops its fixed point when the objective, not the matrix, stands still
    close(fitter.eraser.ot_maps, expected["maps"], 1e-6)
    close(fitter.eraser(data["fresh"], data["fresh_labels"]), expected["quadratic"], 1e-6)
    close(fitter.editor()(data["fresh"], data["fresh_labels"], 1), expected["edited"], 1e-9)


def test_transport_and_shrinkage(theirs: Results) -> None:
    data, expected, _ = theirs
    center = optimal_transport.ot_barycenter(data["sigmas"], data["weights"])
    close(center, expected["barycenter"], 1e-6)
    close(optimal_linear_shrinkage(data["sigma"], 300), expected["shrunk"])


def test_groups(theirs: Results) -> None:
    data, expected, _ = theirs
    split = groupby.groupby(data["x"], data["labels"])
    close(split.map(lambda k, g: g * k).coalesce(), expected["coalesced"])


def test_quantiles(theirs: Results) -> None:
    data, expected, _ = theirs
    if "lut" not in expected:
        pytest.skip("the release has no quantiles; install the repository's head")
    x, labels, q = data["x"].float(), data["labels"], data["quantiles"]
    close(quantile.cdf(data["fresh"][:, 0], q), expected["cdf"])
    close(quantile.icdf(data["p"], q), expected["icdf"])
    normalizer = quantile.QuantileNormalizer(x, labels, num_bins=64)
    close(normalizer.lut, expected["lut"], 1e-4)
    others = labels != 1  # ours leaves the rows that are in the target class alone
    # a rounding of a table's entry may move a row that sits on it to the next one
    moved, same = normalizer.transport(x, labels, 1)[others], expected["transported"][others]
    assert ((moved - same).abs() < 1e-4).double().mean() > 0.9


def test_every_public_name_takes_the_same_arguments(theirs: Results) -> None:
    _, _, signatures = theirs
    import concept_erasure as ce  # noqa: PLC0415 the whole package, only here

    assert {scrubbing.ConceptScrubber} == {ce.ConceptScrubber}
    problems = []
    for name, parameters in signatures.items():
        value: object = optimal_transport if name.startswith("ot.") else ce
        for part in name.removeprefix("ot.").split("."):
            value = getattr(value, part, None)
        if value is None:
            problems.append(f"{name} is missing")
            continue
        if not callable(value):
            continue
        try:
            ours = list(inspect.signature(value).parameters)
        except ValueError:
            continue
        # the trace constraint is left out on purpose: see the deviations in linear/leace.py
        left_out = ("kwargs", "_args", "args", "constrain_cov_trace")
        wanted = [p for p in parameters if p not in left_out]
        problems += [f"{name} does not take {p!r}" for p in wanted if p not in ours]
    assert not problems, problems


def test_their_own_tests_pass_on_ours() -> None:
    """Runs the test files of concept-erasure, from a folder the user gives, against this library.

    Left out: complex numbers (not supported here), and quadratic erasure with more than two classes, which
    the reference fails too since scikit-learn divides class covariances by n.
    """
    folder = os.environ.get("CONCEPT_ERASURE_REFERENCE_TESTS")
    if not folder:
        pytest.skip("set CONCEPT_ERASURE_REFERENCE_TESTS to the folder with their tests")
    names = ("groupby", "leace", "ot", "quantile", "shrinkage")
    files = [str(path) for name in names if (path := Path(folder) / f"test_{name}.py").is_file()]
    assert files, f"{folder} holds none of their test files"
    classes = " or ".join(f"quadratic_erasure[{k}]" for k in (3, 5, 10, 20))
    left_out = f"dtype1 or {classes}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-c", os.devnull, *files]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [*command, "-k", f"not ({left_out})"],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
