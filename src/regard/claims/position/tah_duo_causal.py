"""Think-at-Hard's claim, on the shipped language model: what a token gets does not depend on who else iterates.

The model is wrapped as in the paper: the input of a later iteration is the mean of embeddings by the 100 likeliest
tokens, a low-rank change of the query and value projections (random here) is on for later iterations, and logits are
added up over them. Keys are stored by iteration; iteration i reads those of 0 to i. The patterns are random: half of
the tokens iterate a second time, a third of these a third time.

Exactly equal numbers need the same sums, so single passes are compared at equal shapes: all slots in one row, with
deeper ones that belong to the pattern, to another, or to nobody. The model runs in float64.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from regard.claims.lab import difference, generator
from regard.claims.shipped_lm import stream
from regard.core.claim import Claim, Measured
from regard.core.mask import Mask, predicate
from regard.core.roles import Roles
from regard.methods.positions import tah_duo_causal as page
from regard.models.shipped import load_shipped
from regard.nn.layers import RMSNorm

TOKENS, ITERATIONS, TOP, RANK, PATTERNS = 48, 3, 100, 4, 3
NOBODY = 2**40  # the iteration of an unused slot


@predicate("token")
def blind_to_depth(at):
    """The fault: causal by token alone, so that first iterations read later ones."""
    return at.k_role("token") <= at.q_role("token")


class Stored:
    """What one iteration has written: its tokens, and keys and values by layer."""

    def __init__(self) -> None:
        self.tokens = torch.empty(0, dtype=torch.long)
        self.layers: list[tuple[Tensor, Tensor]] = []


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """Also where transformers goes down to float32 on the way: in its norms."""
    for layer in model.model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, name, norm_of(getattr(layer, name)))
    model.model.norm = norm_of(model.model.norm)
    return model.double()


def norm_of(norm: nn.Module) -> RMSNorm:
    wide = RMSNorm(len(norm.weight), eps=norm.variance_epsilon)
    wide.weight = norm.weight
    return wide


def slots(stores: list[Stored]) -> Roles:
    tokens = [store.tokens for store in stores]
    depths = [torch.full_like(t, i) for i, t in enumerate(tokens)]
    return Roles(token=torch.cat(tokens), iteration=torch.cat(depths))


def keys_of(stores: list[Stored]) -> Any:
    """The stored keys of these iterations, one after the other."""
    cache = DynamicCache()
    for store in stores:
        for layer, (k, v) in enumerate(store.layers):
            cache.update(k, v, layer)
    return cache


class Wrapped:
    """The shipped model with a low-rank change that is on for the rows [n, 1] that `later` marks."""

    def __init__(self, mask: Mask) -> None:
        self.mask, self.later = mask, torch.zeros(1, 1)
        self.model = in_float64(load_shipped("lm")[0])
        g = generator(5)
        for layer in self.model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.v_proj):
                self.adapt(projection, g)

    def adapt(self, projection: nn.Linear, g: torch.Generator) -> None:
        down = torch.randn(projection.in_features, RANK, generator=g).double() * projection.in_features**-0.5
        up = torch.randn(RANK, projection.out_features, generator=g).double() * 0.1
        projection.register_forward_hook(lambda _, x, out: out + self.later * (x[0] @ down @ up))

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)

    def next_input(self, logits: Tensor) -> Tensor:
        likeliest = logits.topk(TOP, dim=-1)
        return (likeliest.values.softmax(-1)[..., None] * self.embed(likeliest.indices)).sum(-2)

    def run(self, x: Tensor, queries: Roles, keys: Roles, cache: DynamicCache | None = None) -> Tensor:
        """Logits [n, V] of slots [n, C]; the last of the keys are theirs."""
        seen = self.mask.dense(len(x), keys.length, roles=(queries, keys))
        hidden = torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
        at = page.positions(queries, page.Config())[None]
        self.later = (queries["iteration"] > 0)[:, None].to(x.dtype)
        given = dict(inputs_embeds=x[None], attention_mask=hidden, position_ids=at, past_key_values=cache)
        return self.model(**given, use_cache=cache is not None).logits[0]

    def read(self, ids: Tensor, tokens: Tensor, depth: Tensor, stores: list[Stored]) -> tuple[Tensor, Tensor]:
        """(logits of the first iteration, logits added up) of these tokens; their keys join what is stored."""
        x, rows = self.embed(ids[tokens]), []
        for i in range(int(depth[tokens].max())):
            active = depth[tokens] > i
            queries = Roles(token=tokens[active], iteration=torch.full_like(tokens[active], i))
            cache, store = keys_of(stores[: i + 1]), stores[i]
            before = slots(stores[: i + 1])
            keys = Roles(**{name: torch.cat([before[name], queries[name]]) for name in queries})
            logits = self.run(x[active], queries, keys, cache)
            rows.append(logits if i == 0 else rows[-1].index_add(0, active.nonzero()[:, 0], logits))
            x = x.index_copy(0, active.nonzero()[:, 0], self.next_input(rows[-1][active]))
            new = slice(before.length, None)
            written = [(layer.keys[:, :, new], layer.values[:, :, new]) for layer in cache.layers]
            pairs = store.layers or [(k[:, :, :0], v[:, :, :0]) for k, v in written]
            store.layers = [
                (torch.cat([k, a], 2), torch.cat([v, b], 2)) for (k, v), (a, b) in zip(pairs, written)
            ]
            store.tokens = torch.cat([store.tokens, queries["token"]])
        return rows[0], rows[-1]

    def parallel(self, ids: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        return self.read(ids, torch.arange(len(ids)), depth, [Stored() for _ in range(ITERATIONS)])

    def decoded(self, ids: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
        """Token by token, each through all of its iterations."""
        stores = [Stored() for _ in range(ITERATIONS)]
        rows = [self.read(ids, torch.tensor([t]), depth, stores) for t in range(len(ids))]
        first, total = (torch.cat(part) for part in zip(*rows, strict=True))
        return first, total

    def one_row(self, ids: Tensor, tokens: Tensor, iterations: Tensor, deeper: Tensor) -> Tensor:
        """Logits of all first iterations in one pass over them and the slots of these tokens and iterations."""
        n = len(ids)
        token, iteration = (
            torch.cat([torch.arange(n), tokens]),
            torch.cat([torch.zeros_like(ids), iterations]),
        )
        roles = Roles(token=token, iteration=iteration)
        return self.run(torch.cat([self.embed(ids), deeper]), roles, roles)[:n]


def pattern(g: torch.Generator) -> Tensor:
    """[TOKENS] iterations of each token: 1, of half of them 2, of a third of these 3."""
    order = torch.randperm(TOKENS, generator=g)
    return 1 + (order < TOKENS // 2).long() + (order < TOKENS // 6).long()


def first_changes(wrapped: Wrapped, ids: Tensor, g: torch.Generator) -> float:
    """Largest change of the first iterations in a row, by who iterates again and with what."""
    spare = torch.arange(TOKENS // 2)
    width = wrapped.model.config.hidden_size
    nobody = torch.full_like(spare, NOBODY)
    rows = [wrapped.one_row(ids, spare, nobody, torch.zeros(len(spare), width).double())]
    for _ in range(PATTERNS):
        tokens = torch.randperm(TOKENS, generator=g)[: len(spare)]
        iterations = torch.randint(1, ITERATIONS, (len(spare),), generator=g)
        rows.append(
            wrapped.one_row(ids, tokens, iterations, torch.randn(len(spare), width, generator=g).double())
        )
    return max(difference(row, rows[0]) for row in rows[1:])


@torch.inference_mode()
def measure() -> Measured:
    g, ids = generator(), stream(TOKENS)
    wrapped, once = Wrapped(page.build(page.Config())), torch.ones(TOKENS, dtype=torch.long)
    plain = wrapped.model(ids[None], use_cache=False).logits[0]
    single = difference(wrapped.parallel(ids, once)[0], plain)
    alone, first, apart, moved = wrapped.decoded(ids, once)[0], [first_changes(wrapped, ids, g)], [], []
    for _ in range(PATTERNS):
        depth = pattern(g)
        by_token, at_once = wrapped.decoded(ids, depth), wrapped.parallel(ids, depth)
        first += [difference(by_token[0], alone), difference(at_once[0], plain)]
        apart.append(difference(by_token[1], at_once[1]))
        moved.append(difference(at_once[1], at_once[0]))
    wrapped.mask = blind_to_depth()
    numbers = {
        "first_iteration_change": max(first),
        "single_iteration_against_causal": single,
        "token_by_token_against_parallel": max(apart),
        "change_by_later_iterations": min(moved),
        "first_iteration_change_blind_to_depth": first_changes(wrapped, ids, g),
    }
    parts = {
        "first iterations": max(first) == 0,
        "one iteration is causal": single == 0,
        "token by token": max(apart) < 1e-5,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="tah_duo_causal",
    statement=(
        "the outputs of first iterations are equal bit by bit whether or not any token iterates again, one iteration "
        "is causal attention, and decoding token by token is the parallel pass for any fixed pattern of iterations"
    ),
    bound=(
        "on random patterns: largest difference of first iterations 0, of a single iteration from causal attention 0, "
        "of decoding from the parallel pass < 1e-5"
    ),
    measure=measure,
)
