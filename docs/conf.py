"""Sphinx settings; the page of methods is written from the registry before each build."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import concept_erasure
from concept_erasure import registry

project = "deconcept"
author = "The deconcept contributors"
copyright = "The deconcept contributors"
release = version = concept_erasure.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build", "examples", "results"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"deconcept {release}"
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_param = False
napoleon_use_rtype = False

HEAD = """# Methods

Made from the registry, `concept_erasure/registry.py`. A guarantee is listed only if the shared test battery
checks it for the method. `concept-erasure list` prints the same table.

| name | family | what it does | guarantees | paper |
|---|---|---|---|---|
"""


def _page_of_methods() -> str:
    """Return the page: a table, what the guarantees mean, and each method's own documentation."""
    methods = [registry.METHODS[name] for name in sorted(registry.METHODS)]
    text = HEAD
    for method in methods:
        promises = ", ".join(sorted(method.guarantees)) or "none"
        text += (
            f"| [`{method.name}`](#{method.name}) | {method.family} | {method.summary} "
            f"| {promises} | {method.paper} |\n"
        )
    text += "\n## What the guarantees mean\n\n"
    text += "\n".join(f"- **{name}**: {words}." for name, words in registry.GUARANTEES.items())
    documented: set[str] = set()
    for method in methods:
        target = method.target.replace(":", ".")
        options = "".join(f", {key}={value!r}" for key, value in method.options.items())
        name = target.rpartition(".")[2]
        text += f"\n\n## {method.name}\n\n{method.summary} *{method.paper}*.\n\n"
        required = [
            parameter.name
            for parameter in inspect.signature(method.load().fit).parameters.values()
            if parameter.default is inspect.Parameter.empty or parameter.name in {"x", "z"}
        ]
        text += f"```python\n{name}.fit({', '.join(required)}{options})\n```\n"
        if target in documented:
            text += f"\nThe class is described above, under `{name}`.\n"
            continue
        documented.add(target)
        text += (
            f"\n```{{eval-rst}}\n.. autoclass:: {target}\n   :members: fit\n   :no-index:\n```\n"
        )
    return text


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text("utf-8") != text:
        path.write_text(text, "utf-8")


_write_if_changed(HERE / "reference" / "methods.md", _page_of_methods())


def _tables_as_written(
    app: object, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Show tables in docstrings as they are written; reStructuredText would misread the bars."""
    shown: list[str] = []
    inside = False
    for line in lines:
        table = line.lstrip().startswith("|")
        if table and not inside:
            shown += ["", "::", ""]
        elif inside and not table:
            shown.append("")
        shown.append(f"    {line.lstrip()}" if table else line)
        inside = table
    lines[:] = [*shown, ""]


def setup(app) -> None:
    """Register the hook."""
    app.connect("autodoc-process-docstring", _tables_as_written)
