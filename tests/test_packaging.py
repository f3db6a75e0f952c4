"""What a user gets on installing and importing the package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

OPTIONAL = (
    "accelerate", "cvxpy", "datasets", "diffusers", "gguf", "lm_eval", "matplotlib", "pandas",
    "peft", "sae_lens", "scipy", "sklearn", "torchmetrics", "transformers", "tyro",
)  # fmt: skip


def child(root: Path, code: str) -> str:
    """Run code in a fresh interpreter and return what it printed last."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["probes", "evals"])
def test_links(root: Path, name: str) -> None:
    link = root / "concept_erasure" / name
    assert link.is_symlink(), "check out with core.symlinks=true"
    assert os.readlink(link) == f"../{name}"
    assert (root / name / "__init__.py").is_file()


def test_top_level_folders_are_never_imported(root: Path) -> None:
    pattern = re.compile(r"^\s*(import|from)\s+(probes|evals)\b", re.MULTILINE)
    folders = ("concept_erasure", "probes", "evals", "tests", "docs")
    files = [path for folder in folders for path in (root / folder).rglob("*.py")]
    assert len(files) > 10
    assert [str(path) for path in files if pattern.search(path.read_text("utf-8"))] == []


def test_import_is_light(root: Path) -> None:
    code = (
        "import json, sys, time\nimport torch, numpy\n"
        "before = time.process_time()\nimport concept_erasure\n"
        "spent = time.process_time() - before\n"
        f"loaded = [name for name in {OPTIONAL!r} if name in sys.modules]\n"
        "print(json.dumps([spent, loaded]))"
    )
    first = json.loads(child(root, code))
    assert first[1] == []
    spent = first[0]
    if spent > 0.3:  # a busy machine, or bytecode written for the first time
        spent = min(json.loads(child(root, code))[0] for _ in range(2))
    assert spent <= 0.3


def test_public_names_load_lazily_and_exist(root: Path) -> None:
    code = (
        "import concept_erasure as ce\n"
        "missing = [name for name in ce.__all__ if getattr(ce, name, None) is None]\n"
        "unlisted = set(ce.__all__) - set(dir(ce))\n"
        "print(missing, sorted(unlisted))"
    )
    assert child(root, code) == "[] []"


def test_version_agrees(root: Path) -> None:
    import concept_erasure

    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    assert concept_erasure.__version__ == project["version"]
    assert f"\nversion: {project['version']}\n" in (root / "CITATION.cff").read_text("utf-8")
    assert f"## [{project['version']}]" in (root / "CHANGELOG.md").read_text("utf-8")


def test_extras_are_complete(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    (everything,) = extras["all"]
    named = re.fullmatch(r"deconcept\[(.+)\]", everything)
    assert named is not None
    assert set(named[1].split(",")) == set(extras) - {"all"}


def test_everything_declared_is_pinned(root: Path) -> None:
    data = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    declared = [*data["project"]["dependencies"]]
    for extra in data["project"]["optional-dependencies"].values():
        declared += extra
    for group in data["dependency-groups"].values():
        declared += [line for line in group if isinstance(line, str)]
    names = {re.split(r"[\[<>=!~ ]", line)[0] for line in declared} - {"deconcept"}
    pinned = {
        line.split("==")[0]
        for line in (root / "constraints.txt").read_text("utf-8").splitlines()
        if "==" in line
    }
    assert {name.lower().replace("_", "-") for name in names} - pinned == set()


def test_missing_extra_names_the_install_line() -> None:
    from concept_erasure.errors import missing_extra

    assert "pip install 'deconcept[llm]'" in str(missing_extra("transformers", "llm"))


def test_a_foreign_distribution_under_our_import_name_is_reported(
    root: Path, tmp_path: Path
) -> None:
    (tmp_path / "concept_erasure").mkdir()
    for name in ("concept-erasure", "deconcept"):
        folder = tmp_path / f"{name.replace('-', '_')}-0.2.4.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.2.4\n")
        (folder / "top_level.txt").write_text("concept_erasure\n")
        (folder / "RECORD").write_text("concept_erasure/__init__.py,,\n")
    code = (
        "import sys, warnings\n"
        f"sys.path.append({str(tmp_path)!r})\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n    import concept_erasure\n"
        "print(' '.join(' '.join(str(one.message).split()) for one in caught))"
    )
    said = child(root, code)
    assert "pip uninstall" in said
    assert "concept-erasure" in said


def test_a_submodule_does_not_hide_the_function_of_its_name(root: Path) -> None:
    code = (
        "import concept_erasure as ce\nfrom concept_erasure import LeaceEraser\n"
        "from concept_erasure.collect import Representations\n"
        "from concept_erasure import collect\nprint(callable(collect), callable(ce.collect))"
    )
    assert child(root, code) == "True True"
