"""What acts on a model's attention: one call of an attention module, and the stages at which an actor may act on it.

Masks, mechanisms, cache policies, edits and observers are all actors. The attention function calls them in this order:

    check_call, acts_on     whether this call can be acted on, and is
    replace                 a mechanism instead of attention: nothing else follows
    rewrite                 edits of q, k and v
    narrow                  masks: what queries see
    select                  a policy: which slots are read
    attend                  an attention of one's own over what is read
    edit, observe           change the output; write down what the model used
    evict                   a policy: which slots stay
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from regard.attaching.lazy_mask import LazyMask, MaskRule
from regard.attaching.ledger import LedgerLayer
from regard.attaching.rotary import Rotary
from regard.attaching.sharing import ALONE, Turn
from regard.attaching.sites import ModuleSite
from regard.attaching.slots import Group
from regard.attaching.step import Labels, Step
from regard.core import Unsupported
from regard.core.errors import present
from regard.ops import View


@dataclass
class AttentionCall:
    """One call of one attention module, or of a group of its heads.

    mask     what the model hands over: the stand-in that carries its rule, a tensor of the user's own, or None
    options  everything else that the model hands over: scaling, dropout, softcap, s_aux, output_attentions, ...
    layer    the ledger layer that this module has just written, if any; `group` the slots that are attended to
    layers   all ledger layers of the cache
    turn     who reads the keys of this layer in one step, and the number of this layer among them
    heads    the query heads of this group; None: all
    x        the layer's input, where an actor needs it
    view     all that is stored, once the call has a view
    """

    module: nn.Module
    site: ModuleSite
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    options: dict[str, Any]
    step: Step
    layer: LedgerLayer | None = None
    group: Group | None = None
    layers: Sequence[LedgerLayer] = ()
    turn: Turn = ALONE
    heads: tuple[int, ...] | None = None
    labels: Labels = field(default_factory=dict)
    x: Tensor | None = None
    rotary: Rotary | None = None
    acting: Sequence["Actor"] = ()
    view: View | None = None

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def where(self) -> str:
        return f"{self.name} ({type(self.module).__name__})"

    @property
    def rule(self) -> MaskRule | None:
        return self.mask.rule if isinstance(self.mask, LazyMask) else None

    @property
    def own_mask(self) -> bool:
        """The user gave the model a 4-D mask."""
        return self.mask is not None and self.rule is None

    @property
    def fed(self) -> int:
        """Tokens that this step brought, of which a reader of another layer's keys may have the last queries alone."""
        return self.turn.fed or self.q.shape[2]

    @property
    def phase(self) -> str:
        """ "decode" for one new token on a cache that already holds some, else "prefill"."""
        decode = self.fed == 1 and self.layer is not None and self.layer.seen > 1
        return "decode" if decode else "prefill"

    @property
    def ledger(self) -> LedgerLayer:
        """The layer, of a call that has one."""
        return present(self.layer, "the call has written a ledger layer")

    @property
    def slots(self) -> Group:
        """The group, of a call that has one."""
        return present(self.group, "the call attends to slots of a ledger layer")

    @property
    def stored(self) -> View:
        """The view of all that is stored, once there is one."""
        return present(self.view, "the call has a view")

    @property
    def order(self) -> Tensor | None:
        """[B, seen] place of each token among the real ones of its row; None: no padding."""
        order = None if self.rule is None else self.rule.order()
        seen = self.k.shape[2] if self.layer is None else self.layer.seen
        return None if order is None else order[:, :seen]

    def weights(self, view: View, rows: slice = slice(None), heads: list[int] | None = None) -> Tensor:
        """[B, heads, rows, n] attention weights as the model uses them, after what acts here."""
        for actor in self.acting:
            weights = actor.weights(self, view, rows, heads)
            if weights is not None:
                return weights
        return view.weights(rows, heads)

    def token_mask(self, stores: bool) -> Tensor | None:
        """[B, 1, 1, N] bool: this call's tokens that are not padding, or all so far; None: every token is one."""
        pad = None if self.rule is None else self.rule.pad()
        if pad is None:
            return None
        seen = self.k.shape[2] if self.layer is None else self.layer.seen
        real = pad[:, :seen] if stores else pad[:, seen - self.k.shape[2] : seen]
        return real[:, None, None]

    def scaled(self) -> Tensor:
        """Queries such that a page's own scale, one over the root of the width, gives the model's."""
        scaling = self.options.get("scaling")
        ratio = 1.0 if scaling is None else scaling * self.q.shape[-1] ** 0.5
        return self.q if abs(ratio - 1) < 1e-6 else self.q * ratio


def seed_of(config: Any) -> int:
    """Of what a page draws at random: its setting of that name, or 0."""
    return getattr(config, "seed", 0)


class Actor:
    """Something attached. Every stage does nothing unless a kind of actor says otherwise."""

    name: str = ""
    needs_cache = False  # it acts on a cache, and only on one of ledger layers
    evicts = False  # it decides which stored tokens stay or are read
    keeps_state = False  # its cache layers hold a state and no keys
    needs_rotary = False
    rewrites = False  # it changes queries, keys or values
    needs_input = False  # it reads the layer's input
    reads_roles = False
    reads_tower = False  # it reads what the vision tower computes
    removes = False  # it takes tokens out of the forward, so that rows are no longer those of the text
    # it changes or records single rows and heads, and leaves all others to be bitwise those of the model
    touches_rows = False
    selected: Any = None  # what it read of a prompt, where it leaves keys unread

    def check(self, model: PreTrainedModel) -> None:
        """Raise for a model that it cannot act on."""

    def cache_layer(self, old: DynamicLayer) -> LedgerLayer | None:
        """What replaces a dynamic cache layer; None: a ledger layer with what it holds."""
        return None

    def begin(self, step: Step) -> None:
        """A forward of the whole model starts."""

    def look(self, model: PreTrainedModel) -> None:
        """Find out, before anything is attached, what a forward of the model shows."""

    def hooks(self, model: PreTrainedModel, context: Any) -> Iterator[Any]:
        """What it puts on modules of the model for the length of the attachment, each with a `remove`."""
        yield from ()

    def in_place_of(self, model: PreTrainedModel) -> Mapping[str, Any]:
        """Methods of the model that are others for the length of the attachment, by name."""
        return {}

    def check_fired(self, forwards: int) -> None:
        """Raise when it never acted although the model ran."""

    def check_call(self, call: AttentionCall) -> None:
        """Raise for a call that it cannot act on."""

    def acts_on(self, call: AttentionCall) -> bool:
        return False

    def replace(self, call: AttentionCall) -> Tensor | None:
        """[B, H, N, E] instead of attention."""
        return None

    def rewrite(self, call: AttentionCall, view: View) -> None:
        """Change the queries, keys and values of the call, and what the cache holds of them."""

    def narrow(self, call: AttentionCall) -> AttentionCall:
        """The call in which queries see less."""
        return call

    def select(self, call: AttentionCall, view: View) -> View:
        """The view of what is read."""
        return view

    def attend(self, call: AttentionCall, view: View) -> Tensor | None:
        """[B, H, N, E]: an attention of one's own over the view that is read."""
        return None

    def weights(self, call: AttentionCall, view: View, rows: slice, heads: list[int] | None) -> Tensor | None:
        """The weights of these rows and heads, if the actor changes them."""
        return None

    def edit(self, call: AttentionCall, view: View, out: Tensor) -> Tensor:
        return out

    def observe(self, call: AttentionCall, view: View, out: Tensor) -> None:
        """Record what an observer asks for, as it is after the edits."""

    def evict(self, call: AttentionCall, view: View) -> None:
        """Say which slots stay; `view` is what was read, call.view all that is stored."""

    def finish(self, call: AttentionCall) -> None:
        """The step of this layer is done, by all heads and by all layers that read its keys."""


def refuse_encoder_decoder(name: str, model: PreTrainedModel) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise Unsupported(f"{name} on {type(model).__name__}, an encoder-decoder: causal models only")
