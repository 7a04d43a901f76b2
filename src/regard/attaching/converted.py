"""`Converted`: a mechanism with learned parts for a model, in memory and on disk.

It has the parts of every attention module and, where the model was fine-tuned around them, the weights that changed.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from regard import catalog
from regard.core import Method, require
from regard.models.names import MARKER, PARTS
from regard.models.shipped import load, only_errors
from regard.report.folder import fill, vacant

FORMAT = "regard-converted-1"
NOTE = "a_conversion.load_it_with_regard.load_converted"  # beside the weights, for transformers' report of loading


@dataclass(frozen=True, eq=False)
class Converted:
    """A mechanism for a model: `regard.attach(model, converted)`.

    params   by the name of an attention module: what the page's init gave there, trained; empty for a page without any
    weights  by the name of a parameter: what replaces it while attached, until the attachment ends
    report   what was measured when it was made
    by_layer settings that single layers have of their own, by the layer's number
    """

    method: Method
    params: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    by_layer: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def save(self, folder: str | Path, model: PreTrainedModel | None = None, tokenizer: Any = None) -> None:
        """Write it to a new or empty folder: with the model an ordinary Hugging Face folder of the changed weights."""
        save(self, folder, model, tokenizer)


def swap_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> list[Callable[[], Any]]:
    """Replace the model's weights by changed ones; the functions that undo it."""
    named = dict(model.named_parameters())
    undo: list[Callable[[], Any]] = []
    missing = sorted(set(weights) - set(named))
    require(not missing, "the changed weights are parameters of this model", missing=missing)
    for name, new in weights.items():
        parameter, old = named[name], named[name].data
        require(new.shape == old.shape, "a changed weight has the shape of the model's", name=name, new=new)
        undo.append(partial(setattr, parameter, "data", old))
        parameter.data = new.detach().to(old.device, old.dtype)
    return undo


def save(
    converted: Converted, folder: str | Path, model: PreTrainedModel | None = None, tokenizer: Any = None
) -> None:
    """All files, or none, into a folder that is new or empty; what lies in a folder is never replaced."""
    folder = Path(folder)
    vacant(folder, **earlier(folder))
    fill(folder, lambda part: write(converted, part, model, tokenizer), last=MARKER)


def earlier(folder: Path) -> dict[str, str]:
    """In words which conversion a folder holds, for an error; nothing where it holds none."""
    if not (folder / MARKER).exists():
        return {}
    facts = marker(folder)
    return {"holds": f"a conversion to {facts['method']} of {facts['report'].get('model', 'a model')}"}


def read_report(folder: Path) -> dict:
    """What was measured when the conversion in a folder was made."""
    return dict(marker(folder)["report"])


def marker(folder: Path) -> dict:
    """What a conversion's folder says of itself."""
    path = folder / MARKER
    require(path.exists(), f"a conversion's folder holds a {MARKER}", folder=str(folder))
    facts = json.loads(path.read_text(encoding="utf-8"))
    require(facts.get("format") == FORMAT, f"a conversion of the format {FORMAT}", format=facts.get("format"))
    return facts


def write(converted: Converted, folder: Path, model: PreTrainedModel | None, tokenizer: Any) -> None:
    tensors = {f"params/{at}/{n}": p for at, parts in converted.params.items() for n, p in parts.items()}
    if model is None:
        tensors |= {f"weights/{n}": p for n, p in converted.weights.items()}
    else:
        undo = swap_weights(model, converted.weights)
        try:
            # a tensor that transformers does not know is named when it loads the folder without what was learned
            model.save_pretrained(folder, state_dict={**model.state_dict(), NOTE: torch.zeros(1)})
        finally:
            for back in undo:
                back()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    tensors = {n: p.detach().cpu().contiguous() for n, p in tensors.items()}
    save_file(tensors, str(folder / PARTS))
    facts = {"format": FORMAT, "method": converted.method.name, "config": asdict(converted.method.config)}
    facts["report"] = dict(converted.report)
    facts["by_layer"] = {str(layer): dict(own) for layer, own in converted.by_layer.items()}
    (folder / "README.md").write_text(readme(facts, model is not None), encoding="utf-8")
    (folder / MARKER).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def readme(facts: dict, whole: bool) -> str:
    """How a conversion is loaded, for who finds the folder; `whole`: its model lies beside it."""
    method, model = facts["method"], facts["report"].get("model", "a model")
    load = "model, tokenizer, converted = regard.load_converted(FOLDER)"
    read = "converted = regard.read_converted(FOLDER)  # for the model that it was made on"
    lines = [
        f"# {method} in {model}", "",
        f"A conversion of regard: the mechanism `{method}` with what it learned on this model.", "",
        "```python", "import regard", "", load if whole else read, "with regard.attach(model, converted):", "    ...",
        "```",
    ]  # fmt: skip
    if whole:
        lines += [
            "", "`AutoModelForCausalLM.from_pretrained` of this folder gives the model with its own attention and the",
            f"changed weights, which is not the converted one; its report names `{NOTE}`.",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def load_converted(folder: str | Path, device: str | None = None) -> tuple[Any, Any, Converted]:
    """(model with the changed weights, tokenizer, converted), ready for `with regard.attach(model, converted):`."""
    marker(Path(folder))
    # without its report of what it did not load, which is read here
    with only_errors("transformers"):
        model, tokenizer = load(folder, device=device)
    return model, tokenizer, read_converted(folder, device=model.device)


def configured(name: str, settings: Mapping[str, Any], device: Any = "cpu") -> "Method | Converted":
    """A method by its settings; with `learned`, a conversion's folder among them, what it learned under the others.

    Settings that shape what is learned stay as they were, or attaching fails.
    """
    own = {key: value for key, value in settings.items() if key != "learned"}
    if "learned" not in settings:
        return catalog.method(name, **own)
    converted = read_converted(settings["learned"], device)
    held = converted.method.name
    require(held == name, "the folder holds what this page learned", method=name, holds=held)
    return replace(converted, method=converted.method.with_settings(**own)) if own else converted


def read_converted(folder: str | Path, device: Any = "cpu") -> Converted:
    """What `save` wrote, without the model."""
    facts = marker(Path(folder))
    tensors = load_file(str(Path(folder) / PARTS), device=str(device))
    params: dict[str, dict[str, Tensor]] = {}
    for key, p in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "params":
            at, _, name = rest.rpartition("/")
            params.setdefault(at, {})[name] = p
    weights = {k.partition("/")[2]: p for k, p in tensors.items() if k.startswith("weights/")}
    by_layer = {int(layer): own for layer, own in facts.get("by_layer", {}).items()}
    method = catalog.method(facts["method"], **facts["config"])
    return Converted(method, params, weights, facts["report"], by_layer)
