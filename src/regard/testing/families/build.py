"""Any causal decoder of the installed transformers, tiny and random, from its configuration's fields alone."""

from dataclasses import fields
from typing import Any

import torch
import transformers as tf
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from regard.core import unknown
from regard.testing.families.settings import GENERIC, LATENT, LAYERS, LOUDER, OVERRIDES, SHARP, UNBUILT

# fields that give each layer a kind
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")


def names() -> list[str]:
    """Model types of the causal decoders, as transformers lists them; ours is among them once it was imported."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - {"regard"})


def build(name: str, seed: int = 1) -> Any:
    """The tiny random decoder of this model type, in eval mode, its queries and keys sharpened.

    Raises KeyError for a name that is none, and whatever its own code raises where it cannot be built.
    """
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise unknown("causal decoder", name, names())
    if name in UNBUILT:
        raise ValueError(UNBUILT[name])
    kind = getattr(tf, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
    torch.manual_seed(seed)
    model = kind(config_of(kind.config_class, name))
    sharpen(model, LOUDER.get(name, {}))
    return model.eval()


def sharpen(model: nn.Module, louder: dict[str, float]) -> None:
    """Make attention far from uniform, so that a wrong mask or a dropped token shows."""
    with torch.no_grad():
        for label, weight in model.named_parameters():
            if SHARP.search(label) and weight.ndim == 2:
                weight.mul_(12)
            for part, factor in louder.items():
                if part in label:
                    weight.mul_(factor)


def config_of(kind: type, name: str) -> Any:
    """The configuration: generic settings where it has the field, the family's own over them."""
    return kind(**over(generic(kind), OVERRIDES.get(name, {})))


def over(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings with these changes, those of a configuration within it one by one; None takes a setting out."""
    both = {
        name: over(settings[name], x) if isinstance(x, dict) and isinstance(settings.get(name), dict) else x
        for name, x in changes.items()
    }
    return {name: x for name, x in {**settings, **both}.items() if x is not None}


def generic(kind: type) -> dict[str, Any]:
    """Generic settings that this configuration has fields for, those of the configurations within it too."""
    has, default = {field.name for field in fields(kind)}, kind()
    settings = {name: x for name, x in GENERIC.items() if name in has}
    if "kv_lora_rank" in has:
        settings |= {name: x for name, x in LATENT.items() if name in has}
    for name in KINDS:
        if name in has and getattr(default, name, None):
            settings[name] = mixed(getattr(default, name))
    for name in getattr(kind, "sub_configs", None) or {}:
        inner = getattr(default, name, None)
        if name in has and isinstance(inner, tf.PreTrainedConfig):
            settings[name] = {**generic(type(inner)), "model_type": inner.model_type}
    return settings


def mixed(kinds: list[str]) -> list[str]:
    """As few layers as are tiny, of every kind that these layers have."""
    of = list(dict.fromkeys(kinds))
    return [of[i % len(of)] for i in range(LAYERS)]
