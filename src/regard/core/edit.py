"""Sites, edits and observers: where in a model, what is changed there, what is written down there. Data only."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regard.core.deprecation import moved, renamed_fields
from regard.core.errors import require

QUANTITIES = ("scores", "weights", "z")
VERBS = ("replace", "scale", "block", "move")
PHASES = ("prefill", "decode", "both")
STATISTICS = ("last_row", "top1", "received", "mass_at", "spans", "z")

__getattr__ = moved(__name__, {"LOOKS": "regard.core.edit:STATISTICS"})


def int_tuple(value: Any) -> tuple[int, ...] | None:
    """One number or several as a tuple; None stays None."""
    if value is None:
        return None
    return (value,) if isinstance(value, int) else tuple(int(v) for v in value)


@dataclass(frozen=True)
class Site:
    """Where in a model's attention. Padding has no number: rows and keys count the tokens of each text of a batch.

    quantity  "scores" (before the softmax), "weights" (after it) or "z" (a head's output, before the projection)
    layers    layer numbers, None: all          heads   query heads, None: all
    rows      queries by number within the forward (negative from its end; -1 the last), None: all
    keys      tokens by number within the text (negative from its end), or a role name such as "image"; None: all
    phase     "prefill", "decode" or "both"     tower   "text", "vision", "encoder", "decoder", "cross" or None: any
    """

    quantity: str = "weights"
    layers: tuple[int, ...] | int | None = None
    heads: tuple[int, ...] | int | None = None
    rows: tuple[int, ...] | int | None = None
    keys: tuple[int, ...] | int | str | None = None
    phase: str = "both"
    tower: str | None = None

    def __post_init__(self) -> None:
        require(self.quantity in QUANTITIES, f"quantity is one of {QUANTITIES}", quantity=self.quantity)
        require(self.phase in PHASES, f"phase is one of {PHASES}", phase=self.phase)
        for name in ("layers", "heads", "rows"):
            object.__setattr__(self, name, int_tuple(getattr(self, name)))
        if not isinstance(self.keys, str):
            object.__setattr__(self, "keys", int_tuple(self.keys))

    def covers(self, layer: int, tower: str, phase: str) -> bool:
        layers = int_tuple(self.layers)
        return (
            (layers is None or layer in layers)
            and self.tower in (None, tower)
            and self.phase in ("both", phase)
        )


@dataclass(frozen=True)
class Edit:
    """A site and a verb.

    replace  the quantity becomes `value`: a number or a tensor that broadcasts to [B, heads, rows, keys or width]
    scale    the quantity at these keys is multiplied by `value`; weights are not renormalised
    block    scores: these keys are hidden and the rest renormalised; weights and z: set to zero
    move     weights: the share `value` in [0, 1] of the mass on `keys` goes to `to`, in proportion to what is there
             (evenly where nothing is); every row keeps its sum
    """

    site: Site
    verb: str
    value: Any = None
    to: tuple[int, ...] | int | str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        require(self.verb in VERBS, f"verb is one of {VERBS}", verb=self.verb)
        require(
            self.verb != "move" or self.site.quantity == "weights", "move acts on weights", site=self.site
        )
        require(self.verb != "move" or self.to is not None, "move says where to", to=self.to)
        require(
            self.verb == "block" or self.value is not None, f"{self.verb} takes a value", value=self.value
        )
        if self.verb == "move":
            require(0 <= self.value <= 1, "the moved share lies in [0, 1]", value=self.value)
        require(
            self.site.quantity != "z" or self.site.keys is None,
            "a head's output has no keys",
            keys=self.site.keys,
        )
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
    spans     [B, heads, rows, spans] weights summed over each of `spans`: (first, past the last) token of the text

    In a padded batch n is the stored slots, and rows those of the site that the longest text has: NaN, and -1 of top1,
    where a text has fewer.  Without rows in the site, rows are the columns of the forward, padding included.
    """

    statistic: str
    site: Site = Site()
    keys_of: Callable[[Any], Any] | None = None
    name: str = ""
    spans: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", tuple((int(first), int(past)) for first, past in self.spans))
        require(self.statistic in STATISTICS, f"statistic is one of {STATISTICS}", statistic=self.statistic)
        require(
            (self.statistic == "mass_at") == (self.keys_of is not None),
            "mass_at takes keys_of",
            keys_of=self.keys_of,
        )
        require(
            (self.statistic == "spans") == bool(self.spans)
            and all(0 <= first < past for first, past in self.spans),
            "the statistic spans, and no other, takes spans: 0 <= first < past the last",
            spans=self.spans,
        )
