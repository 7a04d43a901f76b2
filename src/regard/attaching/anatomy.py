"""What the layers of a model are made of, proven on a forward of four tokens: what each sublayer adds to the residual.

    resid_post = resid_pre + c (out + mlp)          c = 1 but where a configuration scales its residuals

`out` and `mlp` are what two modules of the layer return: those whose sum is what the layer adds, whatever they are
called, norms after a sublayer included (Gemma, OLMo 2). A module that reads resid_pre + c out makes the layer
sequential; where none does the two run side by side (GPT-NeoX, Cohere), and there is no resid_mid. A layer of which
this does not hold (a norm over the sum, several streams) is refused by name. Nothing is assumed of names.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from regard.attaching.sites import ATTENTION, towers
from regard.core import Unreachable
from regard.core.errors import present

TOKENS = 4
# of the largest number that is compared: what rounding leaves
NEAR = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True, eq=False)
class LayerAnatomy:
    """A decoder layer and the modules that return what its sublayers add to the residual, times `scale`.

    project   the module whose product attention returns: it takes the heads' outputs, side by side; None: unknown
    """

    number: int
    name: str
    module: nn.Module
    attention: nn.Module | None
    out: nn.Module
    mlp: nn.Module
    scale: float
    sequential: bool
    project: nn.Module | None = None


@dataclass
class Seen:
    """A module that ran: its input and output [B, N, width] of the residual's shape, None of another."""

    name: str
    module: nn.Module
    x: Tensor | None
    y: Tensor | None

    @property
    def depth(self) -> int:
        return self.name.count(".")


KNOWN: WeakKeyDictionary[nn.Module, list[LayerAnatomy]] = WeakKeyDictionary()


def anatomy(model: PreTrainedModel) -> list[LayerAnatomy]:
    """The layers of the text tower, in order. A model is asked once, in eval mode, without the hooks of others.

    It is asked again once a module of a layer was exchanged.
    """
    if model.config.is_encoder_decoder:
        raise Unreachable(f"{type(model).__name__}: the residual of an encoder-decoder is not reached")
    known = KNOWN.get(model)
    if known is None or not still_there(model, known):
        known = KNOWN[model] = probed(model)
    return known


def still_there(model: nn.Module, layers: list[LayerAnatomy]) -> bool:
    """Whether the modules of these layers are in the model still."""
    there = {id(m) for m in model.modules()}
    return all(id(m) in there for layer in layers for m in (layer.module, layer.out, layer.mlp))


def probed(model: PreTrainedModel) -> list[LayerAnatomy]:
    tower = towers(model, "text")[0][1]
    names = stack_of(tower)
    seen = recorded(tower, names)
    return [layer_of(model, tower, number, name, seen) for number, name in enumerate(names)]


def stack_of(tower: PreTrainedModel) -> list[str]:
    """The dotted names of the layers: the members of the list that holds the attention modules."""
    owners: dict[str, int] = {}
    lists = {n: m for n, m in tower.named_modules() if isinstance(m, nn.ModuleList)}
    for name, module in tower.named_modules():
        if ATTENTION.search(type(module).__name__):
            for owner in lists:
                if owner and name.startswith(owner + "."):
                    owners[owner] = owners.get(owner, 0) + 1
                    break
    if not owners:
        raise Unreachable(f"{type(tower).__name__} has no list of layers with attention")
    owner = max(owners, key=lambda n: owners[n])
    return [f"{owner}.{i}" for i in range(len(lists[owner]))]


def recorded(tower: PreTrainedModel, names: list[str]) -> dict[str, list[Seen]]:
    """What ran in each layer of one forward, in the order in which it ended."""
    seen: dict[str, list[Seen]] = {name: [] for name in names}
    generator = torch.Generator().manual_seed(0)
    vocabulary = getattr(tower.config.get_text_config(), "vocab_size", 0)
    if not vocabulary:
        raise Unreachable(f"{type(tower).__name__} reads no tokens: the residual of a text model is reached")
    ids = torch.randint(3, max(4, vocabulary - 1), (1, TOKENS), generator=generator).to(tower.device)
    modules = dict(tower.named_modules())

    def note(layer: str, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, y: Any) -> None:
            seen[layer].append(Seen(name, module, stream([*args, *kwargs.values()]), stream(y)))

        return hook

    with quiet(tower), torch.no_grad():
        hooks = [
            module.register_forward_hook(note(layer, name), with_kwargs=True)
            for layer in names
            for name, module in modules.items()
            if name == layer or name.startswith(layer + ".")
        ]
        try:
            tower(input_ids=ids, use_cache=False)
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise Unreachable(
                f"{type(tower).__name__} does not run on tokens alone, so nothing is known of its layers: {error}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
    return seen


@contextmanager
def quiet(root: nn.Module) -> Iterator[None]:
    """In eval mode and without anyone's hooks; afterwards as it was, module by module."""
    kept = [(m, m.training, m._forward_hooks, m._forward_pre_hooks) for m in root.modules()]
    try:
        for m, *_ in kept:
            m.training, m._forward_hooks, m._forward_pre_hooks = False, OrderedDict(), OrderedDict()
        yield
    finally:
        for m, training, after, before in kept:
            m.training, m._forward_hooks, m._forward_pre_hooks = training, after, before


def stream(value: Any) -> Tensor | None:
    """The first tensor [B, N, width] of what a module is given or gives."""
    if isinstance(value, Tensor):
        return value.detach() if value.dim() == 3 and value.is_floating_point() else None
    if isinstance(value, list | tuple):
        return next((t for t in map(stream, value) if t is not None), None)
    return None


def layer_of(
    model: PreTrainedModel, tower: nn.Module, number: int, name: str, seen: dict[str, list[Seen]]
) -> LayerAnatomy:
    """The pair of modules whose sum is what the layer adds."""
    ran = seen[name]
    whole = next((s for s in ran if s.name == name), None)
    if whole is None or whole.x is None or whole.y is None:
        raise refusal(model, name, "it takes and gives no residual [B, N, width]")
    pre, post = whole.x, whole.y
    inner = [s for s in ran if s is not whole and s.y is not None and s.y.shape == pre.shape]
    attention = outermost([s for s in ran if ATTENTION.search(type(s.module).__name__)])
    near = NEAR[pre.dtype] * float(post.abs().max())
    for first, second in pairs(inner, attention):
        a, b = present(first.y, "it returns"), present(second.y, "it returns")
        scale = fitted(post - pre, a, b, model.config.get_text_config())
        if scale is not None and gap(post, pre + scale * (a + b)) <= near:
            middle = pre + scale * a
            reads_middle = any(
                s.x is not None and s.x.shape == pre.shape and gap(s.x, middle) <= near < gap(s.x, pre)
                for s in inner
            )
            module = None if attention is None else attention.module
            return LayerAnatomy(
                number, name, whole.module, module, first.module, second.module, scale, reads_middle,
                projection(ran, attention),
            )  # fmt: skip
    raise refusal(model, name, "no two of its modules return what it adds to the residual")


def projection(ran: list[Seen], attention: Seen | None) -> nn.Module | None:
    """The module with a matrix, within attention, that returns just what attention does."""
    if attention is None or attention.y is None:
        return None
    found = [
        s.module
        for s in ran
        if s is not attention and is_within(s, attention) and s.y is not None and torch.equal(s.y, attention.y)
        and getattr(getattr(s.module, "weight", None), "ndim", 0) == 2
    ]  # fmt: skip
    return found[-1] if found else None


def pairs(inner: list[Seen], attention: Seen | None) -> Iterator[tuple[Seen, Seen]]:
    """(what attention adds, what the other sublayer adds): outer modules first, in the order in which they ran."""
    order = sorted(range(len(inner)), key=lambda i: (inner[i].depth, i))
    for i in order:
        for j in order:
            first, second = inner[i], inner[j]
            if is_within(first, second) or is_within(second, first) or is_of(second, attention):
                continue
            if i < j or is_of(first, attention):
                yield first, second


def is_within(one: Seen, other: Seen) -> bool:
    return one is other or one.name.startswith(other.name + ".")


def is_of(one: Seen, attention: Seen | None) -> bool:
    return attention is not None and is_within(one, attention)


def outermost(found: list[Seen]) -> Seen | None:
    return min(found, key=lambda s: s.depth, default=None)


def fitted(added: Tensor, a: Tensor, b: Tensor, config: Any) -> float | None:
    """The factor c with c (a + b) nearest to what was added: 1, or the configuration's, but for rounding."""
    both = (a + b).double()
    size = float(both.square().sum())
    if not size:
        return None
    scale = float((both * added.double()).sum()) / size
    exact = (1.0, getattr(config, "residual_multiplier", 1.0))
    return next((c for c in exact if abs(scale / c - 1) < 1e-2), scale)


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def refusal(model: PreTrainedModel, name: str, why: str) -> Unreachable:
    return Unreachable(f"the residual of {type(model).__name__} is not reached: {name}: {why}")


def output_weights(model: PreTrainedModel, name: str) -> dict[nn.Module, Tensor]:
    """Attention module -> the weight [heads * width, model's width] by which its heads' outputs are projected."""
    found: dict[nn.Module, Tensor] = {}
    for layer in anatomy(model):
        weight = getattr(layer.project, "weight", None)
        if layer.attention is None:
            continue
        if weight is None or not weight.is_floating_point() or weight.dim() != 2:
            kind = type(layer.project).__name__
            raise Unreachable(f"{name} reads the output projection of {layer.name}, which is a {kind}")
        found[layer.attention] = weight.detach() if isinstance(layer.project, Conv1D) else weight.detach().T
    return found
