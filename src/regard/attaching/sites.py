"""Which attention modules a model has, what they are called, and which of them an attachment can reach."""

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from regard.core import Unreachable

ATTENTION = re.compile(r"Attention|Attn(?!.*Norm)|MLA$")
# kinds of layers, as configurations name them, that hold a state and no keys
RECURRENT = ("linear_attention", "conv", "recurrent")
VISION = re.compile(r"(^|\.)(vision\w*|visual|image_\w+|vit|vpm)(\.|$)")


@dataclass(frozen=True)
class ModuleSite:
    """An attention module: its dotted name, its tower, its layer number (the first number in the name)."""

    name: str
    tower: str
    layer: int


def site_of(name: str, cross: bool = False) -> ModuleSite:
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    if cross or re.search(r"cross|encoder_attn|EncDec", name, re.IGNORECASE):
        tower = "cross"
    elif VISION.search(name):
        tower = "vision"
    elif re.search(r"(^|\.)(encoder|decoder)\.", name):
        tower = "encoder" if re.search(r"(^|\.)encoder\.", name) else "decoder"
    else:
        tower = "text"
    return ModuleSite(name, tower, int(number[1]) if number else 0)


class Sites:
    """The attention modules of a model, by identity, and how often each was called."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(m): n for n, m in model.named_modules()}
        self.reached: dict[str, int] = {}
        self._sites: dict[int, ModuleSite] = {}

    def __contains__(self, module: nn.Module) -> bool:
        return id(module) in self.names

    def of(self, module: nn.Module) -> ModuleSite:
        key = id(module)
        if key not in self._sites:
            self._sites[key] = site_of(self.names[key])
        return self._sites[key]

    def count(self, site: ModuleSite) -> None:
        self.reached[site.name] = self.reached.get(site.name, 0) + 1


def towers(model: PreTrainedModel, where: str | None) -> list[tuple[str, PreTrainedModel]]:
    """The PreTrainedModels inside, one for each configuration object; `where` is None (all), "text" or "vision"."""
    text, result, configs = model.config.get_text_config(), [], set()
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or id(module.config) in configs:
            continue
        configs.add(id(module.config))
        is_text = module.config is text or (module.config is model.config and text is model.config)
        is_vision = bool(VISION.search(name)) or "vision" in type(module.config).__name__.lower()
        if where is None or (where == "text" and is_text) or (where == "vision" and is_vision):
            result.append((name, module))
    if not result:
        raise Unreachable(
            f"{type(model).__name__} has no {where or ''} attention tower; it has none to attach to"
        )
    return result


def recurrent_layers(model: PreTrainedModel) -> dict[int, str]:
    """Layers of the text that hold a state and no keys, by the kind that their configuration gives them."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    return {i: kind for i, kind in enumerate(kinds) if kind in RECURRENT}


def refuse_unreachable(model: PreTrainedModel, reachable: list[tuple[str, PreTrainedModel]]) -> None:
    """Raise for towers whose code never calls the attention interface (Falcon, Bloom, GPT-J, ...)."""
    kinds = recurrent_layers(model)
    if kinds and len(kinds) == len(model.config.get_text_config(decoder=True).layer_types):
        raise Unreachable(
            f"{type(model).__name__}: no layer has attention, all are {', '.join(sorted(set(kinds.values())))}"
        )
    bad = [
        f"{name or 'the model'} ({type(m).__name__})"
        for name, m in reachable
        if not m._can_set_attn_implementation()
    ]
    if bad:
        raise Unreachable(
            f"{type(model).__name__}: {', '.join(bad)} computes attention in its own code and never calls "
            "transformers' AttentionInterface, so nothing attached would act; regard.doctor(model) lists the sites"
        )
