"""What is tried on each decoder: the bare machinery, leaving it, and three cache methods."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from regard import catalog
from regard.attaching.attachment import attach
from regard.core import Method, NeverFired, Unreachable, Unsupported
from regard.core.errors import present
from regard.models.doctor import doctor
from regard.testing.cache.oracle import gap, hide, movable
from regard.testing.cache.script import NEAR, alone, play, script

# of the second script single tokens: some models take no question on a cache
STEPS, SINGLE, PADS = (12, 1, 1, 3, 1), (12, 1, 1, 1, 1), (0, 3, 7)
# budgets below the windows of the tiny models, so that every layer evicts
METHODS = (
    catalog.method("streaming_llm", sinks=1, window=2),
    catalog.method("snapkv", budget=3, window=1, pool=1),
    catalog.method("h2o", budget=3),
)
SEEN = 1e-4  # what an eviction has to move logits by, to be tested at all


@dataclass(frozen=True)
class Outcome:
    """How a trial went: "right", "refused", "wrong", "crashed", "idle" (it changed nothing) or "not asked".

    drift  the largest difference from what is right, of logits; None: there is none
    """

    state: str
    said: str = ""
    drift: float | None = None


class Wrong(AssertionError):
    """Logits or tokens differ."""

    def __init__(self, said: str, drift: float | None = None) -> None:
        super().__init__(said)
        self.drift = drift


def tried(trial: Callable[[], Outcome]) -> Outcome:
    """The outcome, whatever the trial raises: what went wrong is what is asked for."""
    try:
        return trial()
    except Wrong as error:
        return Outcome("wrong", str(error), error.drift)
    except (Unreachable, Unsupported, NeverFired) as error:
        return Outcome("refused", str(error))
    except Exception as error:
        return Outcome("crashed", f"{type(error).__name__}: {error}")


def taken(model: Any, feeds: list[dict]) -> list[dict]:
    """The feeds with what the model's forward has names for."""
    names = inspect.signature(model.forward).parameters
    return [{name: x for name, x in feed.items() if name in names} for feed in feeds]


def play_own(model: Any, feeds: list[dict]) -> list[Tensor]:
    """Logits of the script, on the cache that the model makes for itself, or one of transformers' own."""
    with torch.no_grad():
        out = model(**feeds[0], use_cache=True)
        outs, cache = [out.logits], out.get("past_key_values")
        if cache is None:
            cache = DynamicCache(config=model.config)
            model(**feeds[0], past_key_values=cache, use_cache=True)
        for feed in feeds[1:]:
            outs.append(model(**feed, past_key_values=cache, use_cache=True).logits)
    return outs


def generated(model: Any, feed: dict) -> Tensor:
    """Six tokens, greedily, of a padded batch."""
    inputs = {name: feed[name] for name in ("input_ids", "attention_mask") if name in feed}
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)


@dataclass
class Subject:
    """A model, a script, and its own answers to it, where it has any: some take no cache, or cannot generate."""

    model: Any
    padded: list[dict]  # the script, as masks need it
    feeds: list[dict]  # of it what the model takes
    forward: Tensor  # logits of one forward without a cache
    script: list[Tensor]  # logits of the script
    tokens: Tensor | None  # what it generates
    lacks: tuple[str, ...]  # what it does not do by itself, and why

    @staticmethod
    def of(model: Any) -> "Subject":
        lacks: list[str] = []
        padded = script(steps=STEPS, pads=PADS)
        own = taken(model, padded)
        forward = once(model, padded)
        steps = own_answer("several tokens on a cache", lacks, lambda: play_own(model, own))
        if steps is None:
            padded = script(steps=SINGLE, pads=PADS)
            own = taken(model, padded)
            steps = own_answer("a cache", lacks, lambda: play_own(model, own))
        tokens = own_answer("generate()", lacks, lambda: generated(model, own[0]))
        return Subject(model, padded, own, forward, steps or [], tokens, tuple(lacks))

    def same(self, what: str) -> float:
        """The drift, on a cache, of what the model does now from what it does by itself."""
        steps = gap(self.padded, play_own(self.model, self.feeds), self.script) if self.script else 0.0
        if not steps <= NEAR:
            raise Wrong(f"{what}: a padded batch with a cache differs by {steps:.1e}", steps)
        if self.tokens is not None and not torch.equal(generated(self.model, self.feeds[0]), self.tokens):
            raise Wrong(f"{what}: generate() writes other tokens", steps)
        return steps

    def same_without_cache(self, what: str) -> float:
        drift = float((once(self.model, self.padded) - self.forward).abs().max())
        if not drift <= NEAR:
            raise Wrong(f"{what}: a forward differs by {drift:.1e}", drift)
        return drift


def once(model: Any, feeds: list[dict]) -> Tensor:
    """Logits of one forward without a cache."""
    with torch.no_grad():
        return model(input_ids=feeds[0]["input_ids"][:1], use_cache=False).logits


def own_answer(what: str, lacks: list[str], ask: Callable[[], Any]) -> Any:
    """What the model does by itself; None, and a note in `lacks`, where it raises."""
    try:
        return ask()
    except Exception as error:
        lacks.append(f"{what} (by itself: {type(error).__name__}: {error})")
        return None


def bare(subject: Subject) -> Outcome:
    """Attached with no method the model does what it does by itself; and after it, as if nothing had been."""
    before = surroundings(subject.model)
    with attach(subject.model, where="text"):
        what = "attached with no method"
        drift = max(subject.same_without_cache(what), subject.same(what))
    if surroundings(subject.model) != before:
        raise Wrong("hooks, settings or registered functions stay behind")
    if not torch.equal(once(subject.model, subject.padded), subject.forward):
        raise Wrong("after leaving, the model's output is not bit for bit what it was")
    return Outcome("right", drift=drift)


def surroundings(model: nn.Module) -> list[Any]:
    """What an attachment touches: hooks, attributes, configurations, what is registered."""
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)), m.training)
        for m in model.modules()
    ]
    configs = [
        m.config._attn_implementation_internal for m in model.modules() if isinstance(m, PreTrainedModel)
    ]
    return [
        hooks,
        configs,
        sorted(AttentionInterface._global_mapping),
        sorted(AttentionMaskInterface._global_mapping),
    ]


def policy(subject: Subject, method: Method) -> Outcome:
    """A budget that covers all changes nothing; a small one is a full cache in which what was evicted is hidden."""
    if not subject.script:
        lack = next(x for x in subject.lacks if x.startswith("a cache"))
        return Outcome("not asked", f"{type(subject.model).__name__} lacks {lack}")
    try:
        return policy_as_is(subject, method)
    except Unsupported as refusal:
        if method.page.shift is None:
            raise
        left = method.with_settings(positions="text")
        outcome = tried(lambda: policy_as_is(subject, left))
        if outcome.state != "right":
            return outcome
        return Outcome("refused", f'only with positions="text". {refusal}', outcome.drift)


def policy_as_is(subject: Subject, method: Method) -> Outcome:
    model = subject.model
    neutral = method.with_settings(**{"budget": None, **method.page.card.neutral})
    with attach(model, neutral):
        subject.same(f"{method.name} with room for all")
    tape = play(model, method, subject.feeds)
    drift = None
    if movable(method, model):
        drift = gap(subject.padded, tape.outs, hide(model, subject.feeds, tape.reads))
        if not drift <= NEAR:
            raise Wrong(
                f"{method.name}: {drift:.1e} away from a full cache with the same tokens hidden", drift
            )
    rows(subject, method, tape.outs)
    with attach(model, method):
        tokens = None if subject.tokens is None else generated(model, subject.feeds[0])
    if tokens is not None and tokens.shape != present(subject.tokens, "it generates").shape:
        raise Wrong(f"{method.name}: generate() gives {list(tokens.shape)}")
    effect = gap(subject.padded, tape.outs, subject.script)
    if not effect >= SEEN:  # nan too
        return Outcome("idle", f"{method.name} moves logits by {effect:.0e} only: nothing was tested", drift)
    return Outcome("right", drift=drift)


def rows(subject: Subject, method: Method, outs: list[Tensor]) -> None:
    """A row of the padded batch is the row alone, where it is for the model by itself."""
    for row in range(1, len(PADS)):
        feeds = alone(subject.padded, row)
        own = taken(subject.model, feeds)
        if apart(subject, play_own(subject.model, own), subject.script, row) > NEAR:
            continue
        wrong = apart(subject, play(subject.model, method, own).outs, outs, row)
        if not wrong <= NEAR:
            raise Wrong(
                f"{method.name}: row {row} of a padded batch is {wrong:.1e} away from the row alone", wrong
            )


def apart(subject: Subject, single: list[Tensor], batch: list[Tensor], row: int) -> float:
    """The largest difference of a row alone from the row in the batch."""
    worst = 0.0
    for one, all_, feed in zip(single, batch, subject.padded, strict=True):
        real = feed["attention_mask"][row, -feed["input_ids"].shape[1] :].bool()
        worst = max(worst, float((one[0] - all_[row][real]).abs().max()))
    return worst


def sites(model: Any) -> tuple[int, tuple[str, ...], tuple[str, ...], str]:
    """How many attention sites are reached, which are missed, which layers are recurrent, and a refusal."""
    found = doctor(model, input_ids=script(steps=STEPS, pads=(0,))[0]["input_ids"], use_cache=False)
    return len(found.reached), found.missed, found.recurrent, found.refused
