"""Tokens: which visual tokens of a prompt a decoder reads, and which of them later layers still see."""

from collections.abc import Callable
from dataclasses import dataclass

from regard.core import Kind, Page


@dataclass(frozen=True, eq=False)
class TokensPage(Page):
    """Fewer visual tokens (see ops/images.py for what is given). A page gives one of these, or both:

    before(images, cfg) -> [Reduced, ...]   what of the images of one prompt goes to the decoder, one for each
    after(view, cfg) -> keep | None         after each layer of the prefill, the numbers (ascending, all of view.alive)
                                            that later layers still see; None: all of them

    A text is asked alone, whatever the batch. Dropped tokens never come back, and the others keep their positions.

    reference(*case)       what `measure` gives, by its definition in float64, plain; they share nothing
    measure(*case)         the page's own mathematics on tensors: what `before` and `after` are made of
    cases(seed)            arguments of both, a tuple each: what the checks compare them on
    standard               whether compare asks it when no methods are named: False where it needs a setting
    """

    before: Callable | None = None
    after: Callable | None = None
    measure: Callable = None  # type: ignore[assignment]
    reference: Callable = None  # type: ignore[assignment]
    cases: Callable = None  # type: ignore[assignment]
    standard: bool = True
    kind = "tokens"


KIND = Kind(
    name="tokens",
    page=TokensPage,
    says="which visual tokens a decoder reads, and which of them later layers still see",
    verb="with regard.attach(model, NAME, keep=0.25): model.generate(**processor(text=..., images=...))",
    room="methods/tokens",
    checks="regard.testing.tokens:check_tokens_page",
)
