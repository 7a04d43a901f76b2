"""Which heads look back: echo and induction scores on random tokens that repeat.

On random text nothing but the earlier copy tells what comes next. A head that attends to the earlier same token
echoes; one that attends to its successor is an induction head. Measured through observers, so no N x N tensor.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard.attaching.attachment import attach
from regard.attaching.policy import CALIBRATORS
from regard.attaching.sharing import readers_of
from regard.core import Observer, Site, Unsupported, require

LENGTH, REPEATS = 512, 4
MEASURED: WeakKeyDictionary[PreTrainedModel, tuple[int, Tensor]] = WeakKeyDictionary()


@torch.no_grad()
def retrieval_scores(
    model: PreTrainedModel, length: int | None = None, repeats: int = REPEATS, seed: int = 0
) -> dict[str, Tensor]:
    """{"echo": [layers, query heads], "induction": the same}: mean attention mass of the last repetition's queries.

    `length` random tokens follow each other `repeats` times after the model's first token; None: 512, or as many as
    its positions have room for. Mass is summed over all earlier copies. Row i is the i-th layer that has attention.
    """
    require(repeats >= 2, "repeats >= 2", repeats=repeats)
    length = room(model, repeats) if length is None else length
    ids = repeated(model, length, repeats, seed).to(model.device)
    sums: dict[str, dict[int, Tensor]] = {"echo": {}, "induction": {}}
    watching = observers(length, repeats)
    with attach(model, watching, where="text") as attached:
        training = model.training
        model.eval()
        try:
            model.base_model(ids, use_cache=False)
        finally:
            model.train(training)
    for observer in watching:
        by_layer = sums[observer.name.split()[0]]
        for layer, _, mass in attached.records[observer.name]:
            by_layer[layer] = by_layer.get(layer, 0) + mass[0].mean(-1)
    return {kind: torch.stack([sums[kind][layer] for layer in sorted(sums[kind])]) for kind in sums}


def observers(length: int, repeats: int) -> list[Observer]:
    """For each earlier copy: the mass on the same token, and on the one after it, from the last repetition."""
    site, result = Site(rows=tuple(range(-length, 0)), tower="text"), []
    for back in range(1, repeats):
        for kind, step in (("echo", 0), ("induction", 1)):
            result.append(Observer("mass_at", site, away(back * length - step), f"{kind} {back}"))
    return result


def away(distance: int) -> Callable[[Tensor], Tensor]:
    return lambda rows: rows - distance


def room(model: PreTrainedModel, repeats: int) -> int:
    """Tokens of one repetition: LENGTH, or less where the model has fewer positions."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH * repeats + 1
    require(
        most > 2 * repeats, "the model has positions for the repetitions", positions=most, repeats=repeats
    )
    return min(LENGTH, (most - 1) // repeats)


def repeated(model: PreTrainedModel, length: int, repeats: int, seed: int) -> Tensor:
    """[1, 1 + length · repeats] ids: the model's first token if it has one, then the repetitions."""
    special, config = special_ids(model), model.config.get_text_config()
    usable = torch.tensor([i for i in range(config.vocab_size) if i not in special])
    draw = torch.Generator().manual_seed(seed)
    if length <= len(usable):
        # no token twice
        unit = usable[torch.randperm(len(usable), generator=draw)[:length]]
    else:
        unit = usable[torch.randint(len(usable), (length,), generator=draw)]
    bos = config.bos_token_id
    first = bos if isinstance(bos, int) and 0 <= bos < config.vocab_size else int(unit[-1])
    return torch.cat([torch.tensor([first]), unit.repeat(repeats)])[None]


def special_ids(model: PreTrainedModel) -> set[int]:
    """Ids that the configurations give a role: begin, end, padding, images."""
    special: set[int] = set()
    for config in (model.config, model.config.get_text_config(), model.generation_config):
        for name, value in (vars(config) if config is not None else {}).items():
            if name.endswith(("_token_id", "_token_index")) and value is not None:
                special.update(value if isinstance(value, list | tuple) else [value])
    return {i for i in special if isinstance(i, int)}


def induction_heads(model: PreTrainedModel) -> tuple[tuple[int, int], ...]:
    """(cache layer, KV head), best first by the highest induction score among the query heads that share it."""
    return ordered(measured(model))


def induction_importance(model: PreTrainedModel) -> tuple[tuple[float, ...], ...]:
    """Of each cache layer the induction scores of its KV heads."""
    return tuple(tuple(row) for row in measured(model).tolist())


def measured(model: PreTrainedModel) -> Tensor:
    """[cache layers, KV heads] induction scores.

    Measured once for a model and kept beside it; again when its weights were changed in place.
    """
    version = sum(0 if p.is_inference() else p._version for p in model.parameters())
    known = MEASURED.get(model)
    if known is None or known[0] != version:
        known = MEASURED[model] = version, of_kv_heads(model, retrieval_scores(model)["induction"])
    return known[1]


def of_kv_heads(model: PreTrainedModel, scores: Tensor) -> Tensor:
    """[cache layers, KV heads] the highest of the scores of all query heads that read each."""
    config: Any = model.config.get_text_config()
    groups = getattr(config, "num_key_value_heads", None) or scores.shape[1]
    if scores.shape[1] % groups:
        raise Unsupported(f"{scores.shape[1]} query heads over {groups} KV heads")
    best = scores.unflatten(1, (groups, -1)).amax(-1)  # [layers, G]
    readers = readers_of(config)
    for layer, others in readers.items():
        # those who read the keys of this layer speak for its heads
        best[layer] = best[[layer, *others]].amax(0)
    reading = {i for others in readers.values() for i in others}
    return best[[i for i in range(len(best)) if i not in reading]]


def by_kv_head(model: PreTrainedModel, scores: Tensor) -> tuple[tuple[int, int], ...]:
    return ordered(of_kv_heads(model, scores))


def ordered(best: Tensor) -> tuple[tuple[int, int], ...]:
    groups = best.shape[1]
    order = best.flatten().argsort(descending=True, stable=True).tolist()
    return tuple((i // groups, i % groups) for i in order)


CALIBRATORS["induction"] = "heads", induction_heads
CALIBRATORS["importance"] = "importance", induction_importance
