"""Multiverse's claim, on the shipped language model: parallel paths commute, and are written on copies of a cache.

A text with a block of three paths, of which the second holds a block of two, and a conclusion after each. Two ways to
its logits: one forward of the flattened text under the page's mask and positions, and token by token, where every path
goes on from a copy of the stored prefix, and the new keys of all are put together as they are before the conclusion.
Permuting the paths of the outer block must leave the logits of its conclusion alone; under plain causal attention, with
positions in the order of the text, it does not. The tags are ids of the vocabulary that the text does not hold.
"""

from copy import deepcopy
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from regard.attaching.attachment import attach
from regard.claims.lab import difference
from regard.claims.shipped_lm import shipped, stream
from regard.core.claim import Claim, Measured
from regard.methods.positions import multiverse_attention as page

PARALLEL, PATH = (2044, 2045), (2046, 2047)
PREFIX, CONCLUSION = 48, 24


@dataclass(frozen=True)
class Block:
    """<Parallel> goal, the paths, conclusion </Parallel>; goal and conclusion are tokens, paths are documents."""

    goal: list[int]
    paths: tuple[list, ...]
    conclusion: list[int]


def document(order: tuple[int, ...] = (0, 1, 2)) -> list:
    """Tokens and Blocks."""
    ids = iter(stream(400)[1:].tolist())

    def words(n: int) -> list[int]:
        drawn = [next(ids) for _ in range(n)]
        assert not set(drawn) & {*PARALLEL, *PATH}, drawn
        return drawn

    prefix, goal = [shipped().tokenizer.bos_token_id, *words(PREFIX)], words(11)
    inner = Block(words(7), (words(9), words(14)), words(6))
    paths = (words(21), [*words(5), inner, *words(4)], words(12))
    return [*prefix, Block(goal, tuple(paths[i] for i in order), words(CONCLUSION))]


def flat(text: list) -> list[int]:
    """The tokens of a document, tags among them."""
    ids: list[int] = []
    for piece in text:
        if isinstance(piece, Block):
            paths = [token for path in piece.paths for token in (PATH[0], *flat(path), PATH[1])]
            ids += [PARALLEL[0], *piece.goal, *paths, *piece.conclusion, PARALLEL[1]]
        else:
            ids.append(piece)
    return ids


def flattened(text: list) -> Tensor:
    """Logits [N, V] of one forward under the page's mask, at its positions."""
    ids, cfg = torch.tensor([flat(text)]), page.Config()
    roles = {
        name: lambda ids, name=name: page.read_roles(ids, PARALLEL, PATH)[name]
        for name in ("parallel", "path")
    }
    at = page.positions(page.read_roles(ids, PARALLEL, PATH), cfg)
    # beside positions that start anew and no mask, transformers takes a row for several packed texts
    whole = dict(input_ids=ids, position_ids=at, attention_mask=torch.ones_like(ids), use_cache=False)
    with torch.inference_mode(), attach(shipped().model, page.build(cfg), roles=roles):
        return shipped().model(**whole).logits[0]


def causal(text: list) -> Tensor:
    with torch.inference_mode():
        return shipped().model(torch.tensor([flat(text)]), use_cache=False).logits[0]


def stored(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


class Writer:
    """Token by token with forked caches; `rows` are the logits in the order of the flattened text."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def write(self, text: list, cache: DynamicCache, at: int) -> int:
        """The position after the text; the cache grows by its keys."""
        for piece in text:
            if isinstance(piece, Block):
                at = self.write([PARALLEL[0], *piece.goal], cache, at)
                at = self.branch(piece.paths, cache, at)
                at = self.write([*piece.conclusion, PARALLEL[1]], cache, at)
            else:
                step = dict(input_ids=torch.tensor([[piece]]), position_ids=torch.tensor([[at]]))
                self.rows.append(shipped().model(**step, past_key_values=cache).logits[0, 0])
                at += 1
        return at

    def branch(self, paths: tuple[list, ...], cache: DynamicCache, at: int) -> int:
        """Every path on a copy of the cache, which then gets the new keys of all; the end of the longest."""
        before, forks = cache.get_seq_length(), [deepcopy(cache) for _ in paths]
        ends = [
            self.write([PATH[0], *path, PATH[1]], fork, at) for path, fork in zip(paths, forks, strict=True)
        ]
        for fork in forks:
            for i, (keys, values) in enumerate(stored(fork)):
                cache.update(keys[:, :, before:], values[:, :, before:], i)
        return max(ends)


def measure() -> Measured:
    text, writer = document(), Writer()
    whole = flattened(text)
    with torch.inference_mode():
        end = writer.write(text, DynamicCache(), 0)
    forked = difference(torch.stack(writer.rows), whole)
    tail, plain = slice(-CONCLUSION - 1, None), causal(text)
    orders = [order for order in permutations(range(3)) if order != (0, 1, 2)]
    moved = [difference(flattened(document(order))[tail], whole[tail]) for order in orders]
    control = [difference(causal(document(order))[tail], plain[tail]) for order in orders]
    numbers = {
        "tokens": len(whole),
        "positions": end,
        "largest_change_by_permutation": max(moved),
        "forked_against_flattened": forked,
        "causal_smallest_change": min(control),
        "causal_largest_change": max(control),
        "largest_logit": whole.abs().max().item(),
    }
    parts = {
        "paths permute": max(moved) < 1e-4,
        "forked caches": forked < 1e-4,
        "causal knows the order": min(control) > 1e-2,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="multiverse_attention",
    statement=(
        "permuting sibling paths leaves the logits of the conclusion as they were, and decoding on forked caches is "
        "one masked forward of the flattened text; sequential causal attention depends on the order"
    ),
    bound=(
        "largest change of the conclusion's logits by any permutation < 1e-4; forked against flattened logits < 1e-4; "
        "the smallest change under causal attention > 1e-2"
    ),
    measure=measure,
)
