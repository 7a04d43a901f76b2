"""What a model is by its content, so that one path trained further, or two models of one class, are told apart."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file, extract_commit_hash

# what loading reads; a model card beside it changes nothing
SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".json", ".txt", ".model", ".jinja", ".py")
DRAWN = 4096  # numbers that are read of a tensor of a model that is loaded


def revision(model: Any) -> str | None:
    """A model's content in 12 characters: a folder, a GGUF file, a name on the hub (its commit), or (model, tokenizer).

    None for a name of which nothing is on this machine: loading it says what is wrong. Folders are read whole, at some
    2 GB a second from memory.
    """
    if isinstance(model, tuple):
        return of_loaded(*model)
    path = Path(model)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    return of_folder(path) if path.is_dir() else of_name(str(model))


def of_folder(folder: Path) -> str:
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file()):
        with path.open("rb") as file:
            whole.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()[:12]


def of_name(name: str) -> str | None:
    try:
        commit = extract_commit_hash(cached_file(name, "config.json"), None)
    except OSError:
        return None
    return commit and commit[:12]


def of_loaded(model: Any, tokenizer: Any) -> str:
    """Names, shapes and evenly drawn numbers of all tensors: training a tensor changes nearly all of its numbers."""
    whole = hashlib.sha256(model.config.to_json_string().encode())
    words = [getattr(tokenizer, name, None) for name in ("vocab_size", "chat_template", "bos_token_id")]
    whole.update(str(words).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        whole.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        if not tensor.is_meta:
            flat = tensor.detach().reshape(-1)
            drawn = flat[:: max(1, len(flat) // DRAWN)].cpu().contiguous()
            whole.update(drawn.view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:12]
