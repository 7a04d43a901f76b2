"""Checks of what happens to a cache beside plain decoding: windows, copies, modes of PyTorch, drafts."""

import copy
import pickle
from contextlib import suppress
from dataclasses import fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from regard.attaching.attachment import attach
from regard.attaching.store import load_cache, save_cache
from regard.core import Method, Unsupported
from regard.testing.cache.checks import generate, hidden_nothing
from regard.testing.cache.oracle import gap, hide
from regard.testing.cache.script import GAPS, NEAR, full_cache, play, script
from regard.testing.zoo import build


def check_window(method: Method, family: str = "mistral") -> None:
    """A sliding layer holds what its window still reaches, and nothing changes where the budget covers the window.

    In the model's own cache and in one of full layers, for budgets above and below the window.
    """
    model, _ = build(family)
    feeds, window = script(), model.config.sliding_window
    full = hidden_nothing(family)
    budgets = (window + 2, window - 2) if any(f.name == "budget" for f in fields(method.config)) else (None,)
    for budget, config in product(budgets, (model.config, None)):
        some = method if budget is None else method.with_settings(budget=budget)
        tape = play(model, some, feeds, cache=DynamicCache(config=config))
        said = f"{some.label} on {family}, whose layers see {window} tokens"
        for step, layers in enumerate(tape.held):
            late = [i for i, held in layers.items() if bool(held[..., : 1 - window].any())]
            assert not late, f"{said}: after forward {step} layers {late} hold tokens that no query will see"
        if some.page.attention is None:
            wrong = gap(feeds, tape.outs, hide(model, feeds, tape.reads))
            assert wrong <= NEAR, f"{said}: {wrong:.1e} away from a full cache with the same tokens hidden"
        if budget is not None and budget > window:
            wrong = gap(feeds, tape.outs, full)
            assert wrong <= NEAR, f"{said}: the budget covers them all, and {wrong:.1e} changes"


def check_goes_on(method: Method, family: str) -> None:
    """A cache that was copied, pickled, saved, offloaded, or begun in inference mode goes on as if it had not been."""
    model, _ = build(family)
    feeds = script((20, 1, 1, 3, 1))
    expected = play(model, method, feeds).outs
    for what, change in {
        "a copy": copy.deepcopy,
        "pickled": lambda cache: pickle.loads(pickle.dumps(cache)),
        "saved": saved,
        "offloaded": offloaded,
        "inference mode": lambda cache: cache,
    }.items():
        cache, outs = Cache(layer_class_to_replicate=DynamicLayer), []
        with attach(model, method):
            for i, feed in enumerate(feeds):
                with torch.inference_mode(what == "inference mode" and i % 2 == 0), torch.no_grad():
                    outs.append(model(**feed, past_key_values=cache).logits)
                cache = change(cache)
        wrong = gap(feeds, outs, expected)
        assert wrong <= NEAR, f"{method.label} on {family}, {what} after every step: {wrong:.1e} away"


def saved(cache: Cache) -> Cache:
    with TemporaryDirectory() as folder:
        save_cache(cache, Path(folder, "cache.safetensors"))
        return load_cache(Path(folder, "cache.safetensors"))


def offloaded(cache: Cache) -> Cache:
    for layer in cache.layers:
        layer.offload()
    return cache


def check_by_place(method: Method, family: str) -> None:
    """A page that says its answers follow from places alone gives, layer by layer, what layers that share them got."""
    if not method.page.by_place:
        return
    model, _ = build(family)
    each = replace(method, page=replace(method.page, by_place=False))
    (shared, kept), (apart, stored) = (answers(model, m) for m in (method, each))
    assert kept == stored, f"{method.label} on {family}: by place, other tokens stay"
    wrong = max(float((a - b).abs().max()) for a, b in zip(shared, apart, strict=True))
    assert wrong == 0, f"{method.label} on {family}: by place, {wrong:.1e} away from layer by layer"


def answers(model: Any, method: Method) -> tuple[list[Tensor], list]:
    """The logits of each forward of a script, and what every layer held after it."""
    outs, held, cache = [], [], full_cache(model)
    with attach(model, method) as attached, torch.no_grad():
        for feed in script(gaps=GAPS):
            outs.append(model(**feed, past_key_values=cache).logits)
            groups = [group for layer in attached.context.caches.layers for group in layer.groups]
            held.append([group.table().tolist() for group in groups])
    return outs, held


@cache
def undrafted(family: str) -> tuple[dict, Tensor]:
    """A prompt, and what a model of the family writes after it without a draft."""
    feed = script(steps=(20,), pads=(0,))[0]
    return feed, generate(build(family)[0], feed, max_new_tokens=16).sequences


def check_draft(method: Method, family: str) -> None:
    """On the assistant of another model it changes no token, or says that it cannot; on that model it is refused."""
    (model, _), (draft, _) = build(family), build(family)
    feed, alone = undrafted(family)
    # an attention of the page's own may need what it computed before some tokens were taken back
    with suppress(*[Unsupported] if method.page.attention is not None else []), attach(draft, method):
        drafted = generate(model, feed, max_new_tokens=16, assistant_model=draft).sequences
        assert torch.equal(drafted, alone), f"{method.label} on {family}: other tokens when it drafts"
    refused = ""
    try:
        with attach(model, method):
            generate(model, feed, assistant_model=draft)
    except Unsupported as error:
        refused = str(error)
    said = f"{method.label} on {family}: assisted decoding would change what it answers, and is not refused by name"
    assert "assisted decoding" in refused, said
