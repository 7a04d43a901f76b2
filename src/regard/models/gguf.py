"""GGUF files as models: weights are brought to float32 once, into a folder of the user's cache, and loaded from there.

transformers reads them, with the packages `gguf` and `accelerate` (the extra `regard[real]`). What it gives counts as
quantised though its weights are plain numbers, and cannot be saved; here the quantiser is taken off first.
"""

import hashlib
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from regard.core import require
from regard.core.errors import NotInstalled
from regard.models.carried import cache_folder
from regard.models.carried import joined as joined
from regard.models.names import is_gguf as is_gguf

NEEDS = ("gguf", "accelerate")


def dequantised(file: str | Path) -> Path:
    """A Hugging Face folder of a GGUF file's model, made the first time it is asked for; its name has the content's."""
    file = Path(file).expanduser()
    require(file.is_file(), "the GGUF file is there", path=str(file))
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:12]
    folder = cache_folder() / f"{file.stem}-{digest}"
    if not folder.exists():
        model, tokenizer = read(file)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # whole or not at all, whoever else makes it at the same time
        part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            save(model, tokenizer, part)
            part.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def read(file: Path) -> tuple[Any, Any]:
    """(model in float32, tokenizer) as transformers reads them."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    rule = "a GGUF file is read with the extra regard[real]: pip install 'regard[real]'"
    if missing:
        raise NotInstalled(f"must hold: {rule} (missing={missing}, path={str(file)!r})")
    try:
        with quietly():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32
            )
    except Exception as error:  # a broken file fails anywhere in its reading
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"transformers reads no model from the GGUF file {str(file)!r}: {first}") from error
    return model, tokenizer


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.hf_quantizer = None
    marks = (model.config, "quantization_config"), (model, "is_quantized"), (model, "quantization_method")
    for holder, name in marks:
        if name in vars(holder):
            delattr(holder, name)
    with quietly():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def quietly() -> Iterator[None]:
    """No bars of transformers' own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
