"""Checks that a family of models must pass under all that attaches: `check_family("falconh1")`.

They ask of the model what `check_cache` asks of a policy. The oracle is the same: transformers' own cache and masks
with an explicit softmax, layer by layer, so that a layer which reads another's keys, or has states beside them, is
known by what it computes.
"""

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from regard import catalog
from regard.attaching.attachment import attach
from regard.attaching.hybrid_layer import holds_no_keys
from regard.attaching.sharing import readers_of
from regard.attaching.store import load_cache, save_cache
from regard.core import Edit, Method, Observer, Site, Unsupported
from regard.core.mask import window
from regard.testing.cache.checks import check_neutral, check_oracle, check_rows, check_two_calls, generate
from regard.testing.cache.oracle import gap, hide
from regard.testing.cache.script import NEAR, full_cache, ledgers, play, script
from regard.testing.zoo import build

# one that evicts by all queries, one that selects what each layer reads
METHODS = (
    catalog.method("h2o", budget=8),
    catalog.method("tokenselect", budget=8, init=3, local=3, k=3),
)
SHORT = (20, 1, 4, 1)
WINDOW = 5


def check_family(family: str, methods: Iterable[Method] = METHODS) -> dict[str, float]:
    """Every check on a family of the zoo. Returns how far each method moved the logits."""
    check_bare(family)
    check_edits(family)
    check_observer(family)
    check_mask(family)
    effect = {}
    model, _ = build(family)
    sliding = all(getattr(layer, "is_sliding", False) for layer in keyed(model))
    for method in methods:
        # a budget that covers every window changes nothing
        method = method.with_settings(budget=4) if sliding else method
        effect[method.label] = check_oracle(method, family)
        assert effect[method.label] > 1e-4, (
            f"{method.label} on {family} changed nothing, so nothing was tested"
        )
        for check in (check_rows, check_neutral, check_two_calls):
            check(method, family)
        check_saved(method, family)
    return effect


def keyed(model: Any) -> list[Any]:
    """The layers of the model's own cache that hold keys."""
    layers = DynamicCache(config=model.config).layers
    return [layer for layer in layers if not holds_no_keys(layer)]


def own(model: Any, feeds: list[dict]) -> list[Tensor]:
    """Logits of the script by the model itself, on its own cache."""
    cache = full_cache(model)
    with torch.no_grad():
        return [model(**feed, past_key_values=cache).logits for feed in feeds]


def check_bare(family: str) -> None:
    """The bare machinery gives the model's own logits over several turns of a padded batch, and its own tokens."""
    model, _ = build(family)
    feeds = script()
    wrong = gap(feeds, play(model, None, feeds).outs, own(model, feeds))
    assert wrong <= NEAR, f"{family} under an empty attachment is {wrong:.1e} away from itself"
    plain = generate(model, feeds[0]).sequences
    with attach(model):
        assert torch.equal(generate(model, feeds[0]).sequences, plain), (
            f"{family} attached writes other tokens"
        )


def attention_layers(model: Any) -> list[int]:
    """Numbers of the layers that have attention, over keys of their own or those of another."""
    readers = readers_of(model.config.get_text_config(decoder=True))
    with attach(model) as attached, torch.no_grad():
        model(**script(steps=(4,), pads=(0,))[0], past_key_values=full_cache(model))
        return sorted([*ledgers(attached), *(i for r in readers.values() for i in r)])


def check_edits(family: str) -> None:
    """An edit of scores, of weights and of z at every layer is its definition, also in steps and questions."""
    model, _ = build(family)
    feeds = script(steps=SHORT)
    for layer in attention_layers(model):
        edits = [
            Edit(Site("scores", layers=layer, heads=0, keys=(9, 12)), "scale", -2.0),
            Edit(Site("weights", layers=layer, heads=(1, 2), keys=(3, -1)), "scale", 0.3),
            Edit(Site("z", layers=layer, heads=3, rows=-1), "scale", -1.5),
        ]
        wanted = hide(model, feeds, change=by_definition(layer, feeds))
        wrong = gap(feeds, play(model, None, feeds, edits).outs, wanted)
        assert wrong <= NEAR, f"edits at layer {layer} of {family}: {wrong:.1e} away from explicit attention"


def by_definition(layer: int, feeds: list[dict]) -> Any:
    """The edits of `check_edits`, carried out by hand, text by text: keys count the tokens that are not padding."""
    mask = feeds[-1]["attention_mask"].bool()

    def change(at: int, quantity: str, x: Tensor, seen: Tensor) -> Tensor:
        x = x.clone()
        for b, text in enumerate(mask[:, : x.shape[-1]] if at == layer and quantity != "z" else ()):
            columns = text.nonzero()[:, 0].tolist()
            if quantity == "scores":
                x[b, 0, :, [columns[i] for i in (9, 12) if i < len(columns)]] *= -2.0
            else:
                x[b, 1:3, :, [columns[i] for i in (3, -1) if i < len(columns)]] *= 0.3
        if at == layer and quantity == "z":
            x[:, 3, -1] *= -1.5
        return x

    return change


def check_observer(family: str) -> None:
    """What is observed at every layer is what explicit attention computes there, step by step."""
    model, _ = build(family)
    feeds, wanted = script(steps=SHORT), {}

    def note(layer: int, quantity: str, x: Tensor, seen: Tensor) -> Tensor:
        if quantity == "z":
            wanted.setdefault(layer, []).append(x[:, :, -1])
        return x

    hide(model, feeds, change=note)
    with attach(model, Observer("z", Site("z", rows=-1))) as attached, torch.no_grad():
        cache = full_cache(model)
        for feed in feeds:
            model(**feed, past_key_values=cache)
    found: dict[int, list[Tensor]] = {}
    for layer, _, z in attached.records["z"]:
        found.setdefault(layer, []).append(z[:, :, 0])
    assert sorted(found) == sorted(wanted), (
        f"{family}: observed {sorted(found)}, attention in {sorted(wanted)}"
    )
    for layer, seen in found.items():
        wrong = max(float((a - b).abs().max()) for a, b in zip(seen, wanted[layer], strict=True))
        assert wrong <= NEAR, f"z at layer {layer} of {family} is {wrong:.1e} away from explicit attention"


def check_mask(family: str) -> None:
    """A window beside the model's own mask hides the same tokens in every layer."""
    model, _ = build(family)
    feeds = script(steps=SHORT, pads=(0, 6))

    def hidden(layer: int, quantity: str, x: Tensor, seen: Tensor) -> Tensor:
        if quantity != "scores":
            return x
        n, m = x.shape[-2:]
        age = torch.arange(m - n, m)[:, None] - torch.arange(m)
        return x.masked_fill(age >= WINDOW, -torch.inf)

    wrong = gap(feeds, play(model, None, feeds, [window(WINDOW)]).outs, hide(model, feeds, change=hidden))
    assert wrong <= NEAR, f"a window on {family}: {wrong:.1e} away from explicit attention"


def check_saved(method: Method, family: str) -> None:
    """A cache that was saved goes on as if it had stayed, or is refused by the name of what keeps its states."""
    model, _ = build(family)
    feeds = script(steps=(20, 1, 1, 1))
    with TemporaryDirectory() as folder, torch.no_grad():
        file, cache = Path(folder) / "cache.safetensors", full_cache(model)
        with attach(model, method):
            for feed in feeds[:2]:
                model(**feed, past_key_values=cache)
            if (said := refusal(cache, file)) is not None:
                assert "state" in said, f"{family}: {said!r} does not say what cannot be saved"
                return
            stayed = [model(**feed, past_key_values=cache).logits for feed in feeds[2:]]
        with attach(model, method):
            cache = load_cache(file)
            again = [model(**feed, past_key_values=cache).logits for feed in feeds[2:]]
    wrong = max(float((a - b).abs().max()) for a, b in zip(stayed, again))
    assert wrong <= NEAR, (
        f"{method.label} on {family}: a saved cache goes on {wrong:.1e} away from one that stayed"
    )


def refusal(cache: Cache, file: Path) -> str | None:
    """Save the cache; what is said where it cannot be."""
    try:
        save_cache(cache, file)
    except Unsupported as error:
        return str(error)
    return None
