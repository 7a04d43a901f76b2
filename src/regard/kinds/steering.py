"""Steering: what a model attends to, adds up or says next is changed while it generates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from regard.core import Kind, Page


def everywhere(at: Any, cfg: Any) -> bool:
    return True


@dataclass(frozen=True, eq=False)
class SteeringPage(Page):
    """A way to steer a trained model (see ops/steered.py for Steered and Stream). A page gives some of these:

    acts(at, cfg) -> bool              at which calls (layer, phase, stream, tower) the three that follow act
    scores(at, s, cfg) -> s            [B, H, R, n] before the softmax, -inf where a query does not see
    weights(at, w, cfg) -> w           [B, H, R, n] after it
    z(at, z, cfg) -> z                 [B, H, R, E] the heads' outputs
    layer_edits                        {"mlp" | "out" | "resid_post": function(at, x [B, N, d], cfg) -> x}
    tower                              "text" (default) or "vision": where scores, weights and z act
    rows                               "last": scores, weights and z are of the newest token alone; "all" (default)

    streams(cfg) -> (Stream, ...)      passes beside the main one; they run before it, at every step unless `once`
    prepare(runs, at, cfg) -> memory   once for each prompt, from the streams' records {stream: {quantity: tensor}};
                                       its tensors lead with B, or with 1 where all texts share them: they follow beams
    logits(at, logits, cfg) -> [B, V]  the next token's logits, from {"main": [B, V], stream: [B, V], ...} in float32
    attention(at, cfg) -> [B, H, N, E] | None    an attention of its own (see Arranged); None: the model's own here
    search(run, cfg) -> ids            a search of its own in the place of generate's (see attaching/search.py)
    images(run, cfg) -> pixel values   another picture in the place of the prompt's (see attaching/pictures.py)

    reference(*case), measure(*case), cases(seed)    as of a tokens page: the page's own mathematics, twice
    needs_image      a prompt without an image is an error
    acts_on_models   False: its functions are for models that `attach` does not reach (diffusion)
    standard         whether compare asks it when no methods are named: False where it needs a setting, or roles
    neutral, on the card, is a setting under which the model's logits are the base's to the last bit
    """

    acts: Callable = everywhere
    scores: Callable | None = None
    weights: Callable | None = None
    z: Callable | None = None
    layer_edits: Mapping[str, Callable] = field(default_factory=dict)
    tower: str = "text"
    rows: str = "all"
    streams: Callable | None = None
    prepare: Callable | None = None
    logits: Callable | None = None
    attention: Callable | None = None
    search: Callable | None = None
    images: Callable | None = None
    measure: Callable = None  # type: ignore[assignment]
    reference: Callable = None  # type: ignore[assignment]
    cases: Callable = None  # type: ignore[assignment]
    needs_image: bool = False
    acts_on_models: bool = True
    standard: bool = True
    kind = "steering"


KIND = Kind(
    name="steering",
    page=SteeringPage,
    says="what a model attends to, adds up or says next, changed while it generates",
    verb="with regard.attach(model, NAME): model.generate(**inputs)",
    room="methods/steering",
    checks="regard.testing.steering:check_steering_page",
)
