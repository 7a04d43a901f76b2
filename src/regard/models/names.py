"""Models by their names and folders, judged before anything is loaded: no torch is imported here.

The small trained ones come with this package; pretrained ones are carried by others, or lie on the Hugging Face hub.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from regard.core.errors import near, require, unknown
from regard.models.carried import PRETRAINED

HERE = Path(__file__).parent
SHIPPED = {"lm": HERE / "lm", "vlm": HERE / "vlm"}
VISION = ("vlm",)
MARKER = "regard.json"  # what makes a folder a conversion's
PARTS = "regard.safetensors"  # what a conversion learned
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TOKENIZERS = ("tokenizer*", "*.model", "vocab*", "merges.txt", "*.tiktoken", "tekken.json")


def shipped_name(model: Any) -> str | None:
    """The name of a model of ours in what a command is given: None is "lm"; "shipped:lm" and "lm" are the same."""
    if model is None:
        return "lm"
    name = model.removeprefix("shipped:") if isinstance(model, str) else None
    explicit = name is not None and name != model
    return name if explicit or name in SHIPPED or name in PRETRAINED else None


def is_gguf(path: str | Path) -> bool:
    return str(path).endswith(".gguf")


def check_model(model: str | Path, beside: Iterable[str] = ()) -> None:
    """Refuse what no model can be loaded from, as far as names and folders tell; no network is asked.

    beside  other names that a wrong one may have meant
    """
    name = shipped_name(model)
    if name is not None:
        if name not in SHIPPED and name not in PRETRAINED:
            raise unknown("shipped model", name, (*SHIPPED, *PRETRAINED))
        return
    if is_gguf(model):
        require(Path(model).expanduser().is_file(), "the GGUF file is there", path=str(model))
        return
    refuse_misspelt(model, beside)
    local = Path(model)
    looks_local = local.is_absolute() or str(model).startswith((".", "~")) or len(local.parts) > 2
    require(local.exists() or not looks_local, "the model path is there", path=str(model))
    if local.exists():
        check_folder(local)


def check_folder(folder: Path) -> None:
    """Refuse a folder that lacks what a model with its tokenizer is made of."""
    require(folder.is_dir(), "a model is a folder, a GGUF file or a name", path=str(folder))
    rule, there = "a model folder holds a config.json", (folder / "config.json").exists()
    if not there and (folder / MARKER).exists():
        rule += "; here is what a conversion learned, for regard.attach(model, regard.read_converted(folder))"
    require(there, rule, path=str(folder))
    held = sorted(p.name for p in folder.iterdir() if p.name != PARTS)
    for what, names in (("weights", WEIGHTS), ("a tokenizer", TOKENIZERS)):
        found = any(p.name != PARTS for name in names for p in folder.glob(name))
        require(
            found, f"a model folder holds {what}: {', '.join(names[:2])}", path=str(folder), holds=held[:5]
        )


def converted_to(folder: str | Path) -> str | None:
    """The mechanism of a conversion's folder; None for what is none."""
    file = Path(folder) / MARKER
    return json.loads(file.read_text(encoding="utf-8")).get("method") if file.exists() else None


def refuse_misspelt(path: str | Path, beside: Iterable[str] = ()) -> None:
    """Raise, without asking any network, for a name that is no folder, is not in the Hugging Face cache and names no
    organisation, as models of the hub do: it is most likely one of ours, misspelt.
    """
    name = str(path)
    if Path(path).exists() or len(Path(path).parts) > 1 or name.startswith("~") or in_cache(name):
        return
    said = near(name, (*SHIPPED, *PRETRAINED, *beside))
    raise ValueError(
        f"no model can be loaded from {name!r}: it is no folder here, no model of ours and not in the Hugging Face "
        f"cache; {said}. A model of the hub is named with its organisation, ORG/{name}"
    )


def in_cache(name: str) -> bool:
    """Whether the Hugging Face cache holds the configuration of a model of this name."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False
