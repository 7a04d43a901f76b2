"""`regard.doctor(model, **inputs)`: which attention sites an attachment reaches, and whether it changes anything."""

import inspect
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regard.attaching.attachment import attach
from regard.attaching.sites import ATTENTION, recurrent_layers, site_of, towers
from regard.core import require
from regard.core.deprecation import moved
from regard.models.shipped import load_any
from regard.ops.machine import slow_on_cpu

OUTPUTS = ("logits", "logits_per_image", "last_hidden_state")

__getattr__ = moved(__name__, {"Report": "regard.models.doctor:ModelReport"})


@dataclass(frozen=True)
class ModelReport:
    """What the doctor found. `drift` is the largest difference of the outputs, attached against not.

    `recurrent` are layers that hold a state and no keys: nothing attached acts there, and nothing is amiss. `slow` says
    that the CPU does not multiply the model's dtype; empty where it does.
    """

    model: str
    reached: tuple[str, ...]
    missed: tuple[str, ...]
    drift: float | None
    refused: str = ""
    recurrent: tuple[str, ...] = ()
    slow: str = ""

    @property
    def healthy(self) -> bool:
        return not self.missed and not self.refused and self.drift is not None and self.drift <= 1e-5

    def to_dict(self) -> dict:
        return {**asdict(self), "healthy": self.healthy}

    def __str__(self) -> str:
        if self.refused:
            return f"{self.model}: cannot be attached to. {self.refused}"
        missed = f"; missed: {', '.join(self.missed)}" if self.missed else ""
        beside = f"; without attention: {', '.join(self.recurrent)}" if self.recurrent else ""
        slow = f". {self.slow}" if self.slow else ""
        reached = f"{len(self.reached)} attention sites reached{missed}{beside}"
        return f"{self.model}: {reached}; drift {self.drift:.1e}{slow}"


def doctor(model: PreTrainedModel | str | Path, **inputs: Any) -> ModelReport:
    """Run the model once as it is and once attached. Without inputs, a short forward of random tokens is made up.

    model   a model, or what loads one: a name of ours, a GGUF file, a Hugging Face folder or name
    inputs  of one forward, as the model takes them
    """
    loaded: Any = load_any(model)[0] if isinstance(model, str | Path) else model
    require(isinstance(loaded, PreTrainedModel), "a model of transformers, or its folder or name",
            model=type(loaded).__name__)  # fmt: skip
    return examined(loaded, inputs or made_up(loaded))


def examined(model: PreTrainedModel, inputs: dict[str, Any]) -> ModelReport:
    """What one forward of these inputs reaches, and what attaching changes in it."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            plain, ran = watched(model, inputs)
            unreachable = [
                name or "the model" for name, m in towers(model, None) if not m._can_set_attn_implementation()
            ]
            with attach(model, strict=False) as attached:
                through = output(model(**inputs))
    finally:
        model.train(training)
    reached = tuple(attached.reached())
    kinds = recurrent_layers(model)
    missed = tuple(
        n
        for n in ran
        if not any(n == r or r.startswith(n + ".") or n.startswith(r + ".") for r in reached)
        and not (site_of(n).tower == "text" and site_of(n).layer in kinds)
    )
    names = ", ".join(unreachable)
    refused = f"Its code never calls the attention interface ({names})." if names else ""
    beside = tuple(f"layer {i} ({kind})" for i, kind in kinds.items())
    drift = float((plain - through).abs().max())
    slow = slow_on_cpu(model.dtype, model.device) or ""
    return ModelReport(type(model).__name__, reached, missed, drift, refused, beside, slow)


def watched(model: nn.Module, inputs: dict) -> tuple[Tensor, list[str]]:
    """The output of one forward, and the attention modules that ran in it, innermost ones only."""
    ran: dict[str, None] = {}
    hooks = [
        m.register_forward_hook(lambda mod, a, o, n=n: ran.setdefault(n))
        for n, m in model.named_modules()
        if (ATTENTION.search(type(m).__name__) and any(isinstance(c, nn.Module) for c in m.children()))
        or isinstance(m, nn.MultiheadAttention)
    ]
    try:
        result = output(model(**inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return result, [n for n in ran if not any(o != n and o.startswith(n + ".") for o in ran)]


def output(out: Any) -> Tensor:
    for name in OUTPUTS:
        if out.get(name) is not None:
            return out[name].float()
    raise ValueError(f"the model's output has none of {', '.join(OUTPUTS)}, so nothing can be compared")


def made_up(model: PreTrainedModel) -> dict:
    """Inputs for one forward: random token ids; models of other inputs have to bring their own."""
    names = inspect.signature(model.forward).parameters
    others = [n for n in ("pixel_values", "input_features", "input_values") if n in names]
    if "input_ids" not in names or model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} takes {', '.join(others) or 'more than ids'}: doctor(model, **inputs)"
        )
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, max(4, int(vocabulary * 0.9)), (1, 16), generator=generator)
    return {"input_ids": ids.to(model.device)}
