"""Sites, edits and observers: where in a model, what is changed there, what is written down there. Data only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regard.core.deprecation import moved, renamed_fields
from regard.core.errors import require

HEADED = ("q", "k", "v", "scores", "weights", "z")  # in the attention function, by head
STREAMS = (
    "resid_pre",
    "out",
    "resid_mid",
    "mlp",
    "resid_post",
    "logits",
)  # of a layer as a whole; logits of the model
QUANTITIES = (*HEADED, *STREAMS)
BY_KEY = ("scores", "weights")
VERBS = (
    "replace", "zero", "mean", "resample", "scale", "add", "project", "block", "uniform", "move", "rotate",
)  # fmt: skip
# verbs that act on some quantities only
ONLY = {
    "block": ("scores", "weights", "z"),
    "uniform": ("weights",),
    "move": ("weights",),
    "rotate": ("q", "k"),
    **dict.fromkeys(("mean", "resample", "project"), ("q", "k", "v", "z", *STREAMS)),
}
WITHOUT_VALUE = ("zero", "mean", "resample", "block", "uniform")
PHASES = ("prefill", "decode", "both")
STATISTICS = ("last_row", "top1", "received", "mass_at", "spans", "z", "value", "z_if")

__getattr__ = moved(__name__, {"LOOKS": "regard.core.edit:STATISTICS"})


def int_tuple(value: Any) -> tuple[int, ...] | None:
    """One number or several as a tuple; None stays None."""
    if value is None:
        return None
    return (value,) if isinstance(value, int) else tuple(int(v) for v in value)


@dataclass(frozen=True)
class Site:
    """Where in a model. Padding has no number: rows and keys count the tokens of each text of a batch.

    quantity  by head: "q", "k" (as attention uses them, rotated where the model rotates), "v", "scores" (before the
              softmax), "weights" (after it), "z" (a head's output, before the projection). Of a layer: "resid_pre"
              (its input), "out" and "mlp" (what its two sublayers add to the residual), "resid_mid" (between them),
              "resid_post" (its output). "logits" of the model
    layers    layer numbers, None: all          heads   query heads, of k and v the cache's heads; None: all
    rows      queries by number within the forward (negative from its end; -1 the last), None: all. Of k and v: tokens
    keys      tokens by number within the text (negative from its end), or a role name such as "image"; None: all
    phase     "prefill", "decode" or "both"     tower   "text", "vision", "encoder", "decoder", "cross" or None: any;
              keys of a role are in no vision tower, whose patches have none
    texts     texts by number within the batch, None: all
    """

    quantity: str = "weights"
    layers: tuple[int, ...] | int | None = None
    heads: tuple[int, ...] | int | None = None
    rows: tuple[int, ...] | int | None = None
    keys: tuple[int, ...] | int | str | None = None
    phase: str = "both"
    tower: str | None = None
    texts: tuple[int, ...] | int | None = None

    def __post_init__(self) -> None:
        require(self.quantity in QUANTITIES, f"quantity is one of {QUANTITIES}", quantity=self.quantity)
        require(self.phase in PHASES, f"phase is one of {PHASES}", phase=self.phase)
        for name in ("layers", "heads", "rows", "texts"):
            object.__setattr__(self, name, int_tuple(getattr(self, name)))
        if not isinstance(self.keys, str):
            object.__setattr__(self, "keys", int_tuple(self.keys))
        if self.quantity == "z":
            require(self.keys is None, "a head's output has no keys", keys=self.keys)
        rule = f"{self.quantity} has no keys: only scores and weights have"
        require(self.keys is None or self.quantity in BY_KEY, rule, keys=self.keys)
        if isinstance(self.keys, str):
            require(self.tower != "vision", "patches in a vision tower have no roles", keys=self.keys)
        rule = f"{self.quantity} is of a whole layer: only {', '.join(HEADED)} have heads"
        require(self.heads is None or self.quantity in HEADED, rule, heads=self.heads)
        require(self.quantity != "logits" or self.layers is None, "logits have no layer", layers=self.layers)

    def covers(self, layer: int, tower: str, phase: str, roles: bool = False) -> bool:
        """roles: whether what is done there names roles, as `keys` may."""
        layers = int_tuple(self.layers)
        without_roles = tower == "vision" and (roles or isinstance(self.keys, str))
        return (
            (layers is None or layer in layers)
            and self.tower in (None, tower)
            and self.phase in ("both", phase)
            and not without_roles
        )


@dataclass(frozen=True)
class Edit:
    """A site and a verb.

    replace   the quantity becomes `value`: a number, or a tensor that broadcasts to [texts, heads, rows, keys or
              width], of a layer as a whole to [texts, rows, width]
    zero      it becomes zero; weights are not renormalised
    mean      it becomes its mean over the rows of the site, text by text, or `value`, a mean over other texts
    resample  it becomes that of another text of this forward at the same row: of the next one, or `value`: the number
              of a text for each one of the site
    scale     it is multiplied by `value`; weights are not renormalised
    add       `value` is added
    project   its part in the space of `value` [width, r], orthonormal columns, is taken out, or becomes that part of
              `source`, a tensor as `replace` takes one
    block     scores: these keys are hidden and the rest renormalised; weights and z: set to zero
    uniform   weights: the mass on `keys` is shared evenly among those of them that a row sees
    move      weights: the share `value` in [0, 1] of the mass on `keys` goes to `to`, in proportion to what is there
              (evenly where nothing is); every row keeps its sum
    rotate    q and k: turned `value` positions further, by the model's own rotary tables
    """

    site: Site
    verb: str
    value: Any = None
    to: tuple[int, ...] | int | str | None = None
    name: str = ""
    source: Any = None
    required: bool = True  # that it never fires is an error; else it may name what no query sees

    def __post_init__(self) -> None:
        require(self.verb in VERBS, f"verb is one of {VERBS}", verb=self.verb)
        if isinstance(self.to, str):
            require(self.site.tower != "vision", "patches in a vision tower have no roles", to=self.to)
        allowed, verb = ONLY.get(self.verb, QUANTITIES), self.verb
        rule = f"{verb} acts on {', '.join(allowed)}"
        require(self.site.quantity in allowed, rule, quantity=self.site.quantity)
        require(verb in WITHOUT_VALUE or self.value is not None, f"{verb} takes a value", value=self.value)
        unused = verb in WITHOUT_VALUE and verb not in ("mean", "resample") and self.value is not None
        require(not unused, f"{verb} takes no value", value=self.value)
        require(self.to is None or verb == "move", "only move goes somewhere", verb=verb, to=self.to)
        require(self.source is None or verb == "project", "only project has a source", verb=verb)
        if verb == "move":
            require(self.to is not None, "move says where to", to=self.to)
            require(0 <= self.value <= 1, "the moved share lies in [0, 1]", value=self.value)
        if not isinstance(self.to, str):
            object.__setattr__(self, "to", int_tuple(self.to))

    def __str__(self) -> str:
        parts = [
            f"{k}={v}"
            for k, v in vars(self.site).items()
            if v is not None and v != "both" and k != "quantity"
        ]
        amount = f" by {self.value}" if isinstance(self.value, int | float) else ""
        return self.name or f"{self.verb} {self.site.quantity}{amount} at {', '.join(parts) or 'every site'}"


@renamed_fields(look="statistic")
@dataclass(frozen=True)
class Observer:
    """A statistic of attention that never holds an N x N tensor; records are lists of (layer, step, tensor).

    last_row  [B, heads, n] weights of the last query        top1  [B, heads, rows] number of the top key's token
    received  [B, heads, n] weights summed over the rows     z     [B, heads, rows, E] head outputs
    mass_at   [B, heads, rows] weight on one key a row: `keys_of(rows) -> number of a token per row` (-1: none)
    value     the quantity of the site itself: q, k, v or z [B, heads, rows, width], of a layer [B, rows, width]; where
              rows are named scores and weights too [B, heads, rows, n]
    z_if      [B, heads, N, E] what z would be if q, k or v, the quantity of the site, were `given` in all heads
    spans     [B, heads, rows, spans] weights summed over each of `spans`: (first, past the last) token of the text

    In a padded batch n is the stored slots, and rows those of the site that the longest text has: NaN, and -1 of top1,
    where a text has fewer.  Without rows in the site, rows are the columns of the forward, padding included.
    """

    statistic: str
    site: Site = Site()
    keys_of: Callable[[Any], Any] | None = None
    name: str = ""
    given: Any = None  # of z_if: a tensor [B, heads, N, D]
    live: bool = False  # records stay in the graph of autograd; else they are copies
    spans: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", tuple((int(first), int(past)) for first, past in self.spans))
        require(self.statistic in STATISTICS, f"statistic is one of {STATISTICS}", statistic=self.statistic)
        require(
            (self.statistic == "mass_at") == (self.keys_of is not None),
            "mass_at takes keys_of",
            keys_of=self.keys_of,
        )
        rule, what_if = "z_if is given q, k or v", self.statistic == "z_if"
        require(what_if == (self.given is not None), rule, statistic=self.statistic)
        require(not what_if or self.site.quantity in ("q", "k", "v"), rule, quantity=self.site.quantity)
        if self.site.quantity in BY_KEY and self.statistic == "value":
            require(
                self.site.rows is not None, "the value of scores or weights names rows", rows=self.site.rows
            )
        rule = "of a layer as a whole the value is observed"
        require(
            self.site.quantity not in STREAMS or self.statistic == "value", rule, statistic=self.statistic
        )
        require(
            (self.statistic == "spans") == bool(self.spans)
            and all(0 <= first < past for first, past in self.spans),
            "the statistic spans, and no other, takes spans: 0 <= first < past the last",
            spans=self.spans,
        )
