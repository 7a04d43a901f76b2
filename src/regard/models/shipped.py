"""The small trained models that come with the package: ordinary Hugging Face checkpoints, made by scripts/."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from regard.core import require, unknown

HERE = Path(__file__).parent
SHIPPED = {"lm": HERE / "lm"}


def load_shipped(name: str = "lm") -> tuple[Any, Any]:
    """(model in float32 on the CPU, in eval mode, tokenizer) of a shipped model; "lm" retrieves within 2,048 tokens."""
    if name not in SHIPPED:
        raise unknown("shipped model", name, SHIPPED)
    return load(SHIPPED[name], dtype=torch.float32, device="cpu")


def load(
    path: str | Path,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    device: str | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer) of a Hugging Face folder or name. Weights as safetensors; remote code only when asked for.

    `device` None is the GPU where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    local = Path(path)
    looks_local = local.is_absolute() or str(path).startswith((".", "~")) or len(local.parts) > 2
    require(local.exists() or not looks_local, "the model path is there", path=str(path))
    if local.exists():
        require((local / "config.json").exists(), "a model folder holds a config.json", path=str(path))
    options = dict(trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **options)
    except OSError as error:
        raise ValueError(
            f"no model can be loaded from {str(path)!r}: {str(error).splitlines()[0]}"
        ) from error
    return model.to(device).eval(), tokenizer
