"""What the head of a model makes of a layer's output: the final norm, found by what it is given, and the projection."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regard.attaching.anatomy import TOKENS, quiet, stack_of, stream
from regard.attaching.sites import towers
from regard.core import Unreachable

NORMS: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The module of the text tower that is given the last layer's output and gives what the head reads.

    Found on a forward of four tokens, once a model; Unreachable where no single module does it.
    """
    if model not in NORMS:
        NORMS[model] = found_norm(model)
    return NORMS[model]


def found_norm(model: PreTrainedModel) -> nn.Module:
    tower = towers(model, "text")[0][1].base_model  # without the head, where the whole model is the tower
    names = stack_of(tower)
    modules, seen, last = dict(tower.named_modules()), [], []

    def note(module: nn.Module, args: tuple, kwargs: dict, y: Any) -> None:
        seen.append((module, stream([*args, *kwargs.values()]), stream(y)))

    ids = torch.randint(3, 64, (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(tower.device)
    with quiet(tower), torch.no_grad():  # which takes these hooks away again
        for name, module in modules.items():
            if name and "." not in name:
                module.register_forward_hook(note, with_kwargs=True)
        modules[names[-1]].register_forward_hook(lambda m, a, y: last.append(stream(y)))
        output = tower(input_ids=ids, use_cache=False).last_hidden_state
    for module, x, y in seen:
        if x is not None and y is not None and torch.equal(x, last[0]) and torch.equal(y, output):
            return module
    raise Unreachable(
        f"{type(model).__name__}: no single module turns the last layer's output into what the head reads"
    )


def early_logits(model: PreTrainedModel, states: Tensor, normed: bool = True) -> Tensor:
    """[B, V] float32 of hidden states [B, d]."""
    head = model.get_output_embeddings()
    if head is None:
        raise Unreachable(f"{type(model).__name__} has no output embeddings")
    states = final_norm(model)(states) if normed else states
    logits = head(states).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)
