"""What is known to differ between our cache pages and the presses of NVIDIA/kvpress, each taken out of theirs.

`scripts/kept_sets.py` asks a press as it is, and once more within these contexts: what a row of its table says of a
difference is shown by sets that are equal without it. Runs where kvpress is installed.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Known:
    """What a difference may hang on: the press, the model's config and our sets, [G, n] bool by layer."""

    press: object
    config: object
    ours: list[Tensor]

    @property
    def inner(self):
        return getattr(self.press, "press", self.press)

    @property
    def shared(self) -> int:
        """Query heads of a key head."""
        return self.config.num_attention_heads // self.config.num_key_value_heads


def scored(known: Known, change: Callable[[Tensor, Tensor, bool], Tensor]):
    """The press's scores, changed: change(scores, keys, whether they are of the end of the text)."""
    score = known.inner.score

    def changed(module, hidden_states, keys, values, attentions, kwargs):
        result = score(module, hidden_states, keys, values, attentions, kwargs)
        last = kwargs["past_key_values"].layers[module.layer_idx].keys[:, :, -1]
        return change(result.clone(), keys, bool((keys[:, :, -1] == last).all()))

    return patch.object(known.inner, "score", changed)


def newest(known: Known):
    """The newest token stays in any case."""

    def change(scores: Tensor, keys: Tensor, end: bool) -> Tensor:
        if end:
            scores[..., -1] = scores.abs().max() + 1
        return scores

    return scored(known, change)


def newest_beside(known: Known):
    """The newest token counts in no mean: its score is that of its chunk's others."""

    def change(scores: Tensor, keys: Tensor, end: bool) -> Tensor:
        chunk = known.press.chunk_length
        first = (scores.shape[-1] - 1) // chunk * chunk
        scores[..., -1] = scores[..., first:-1].mean(-1)
        return scores

    return scored(known, change)


def ties(known: Known):
    """Of equal scores the earlier token stays, and of heads the first."""

    def change(scores: Tensor, keys: Tensor, end: bool) -> Tensor:
        order = scores.flatten(1).argsort(descending=True, stable=True)
        ranks = torch.zeros_like(order).scatter(1, order, torch.arange(order.shape[1]).expand_as(order))
        return -ranks.view(scores.shape).float()

    return scored(known, change)


def earlier(known: Known):
    """Of equal scores the earlier token stays, where scores go on into a product."""
    return scored(known, lambda scores, keys, end: scores.double() - 1e-12 * torch.arange(scores.shape[-1]))


def rounded(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**13).round() / 2**13, exponent)


def digits(known: Known):
    """Scores that agree in four digits are equal."""
    if not hasattr(known.inner, "compute_leverage_scores"):
        return scored(known, lambda scores, keys, end: rounded(scores))
    compute = known.inner.compute_leverage_scores
    return patch.object(known.inner, "compute_leverage_scores", lambda *args: rounded(compute(*args)))


@contextmanager
def sketch(known: Known) -> Iterator[None]:
    """Leverage of all channels, not of 48 random mixtures of them."""
    width = (
        getattr(known.config, "head_dim", None)
        or known.config.hidden_size // known.config.num_attention_heads
    )

    def basis(*shape, **options):
        return torch.eye(shape[-1]).expand(shape) * width**0.5

    with patch.object(known.press, "sketch_dimension", width), patch("torch.randn", basis):
        yield


def edges(known: Known):
    """A token at the end of a text has one neighbour, and not a second one of 0."""
    pool = F.avg_pool1d
    return patch.object(F, "avg_pool1d", lambda x, **options: pool(x, **options, count_include_pad=False))


def blend(known: Known):
    """Leverage weighs one half, not the share of tokens that go."""
    return patch.object(known.press, "blending", 0.5)


def pooling(known: Known):
    """The maximum over neighbours, of the query heads that share a key together."""

    def together(x: Tensor, kernel_size: int, padding: int, stride: int) -> Tensor:
        x = x.unflatten(1, (-1, known.shared)).mean(2)
        return F.max_pool1d(x, kernel_size, stride, padding).repeat_interleave(known.shared, 1)

    return patch.object(F, "avg_pool1d", together)


def epsilon(known: Known):
    """Added to sums over queries and heads, not to their means."""
    return patch.object(known.press, "epsilon", known.press.epsilon / (64 * known.shared))


def parts(known: Known):
    """As many tokens in each layer as ours keeps."""
    counts = [int(layer[0].sum()) for layer in known.ours]
    return patch.object(known.press, "get_layer_budget", lambda module, length: counts[module.layer_idx])


def itself(known: Known):
    """A query sees one token more than come before it."""
    from kvpress.presses.snapkv_press import SnapKVPress

    compute = SnapKVPress.compute_window_attention

    def counted(*args):
        weights = compute(*args)
        before = torch.arange(weights.shape[-1], weights.shape[-1] + weights.shape[-2])[:, None]
        return weights * (before + 1) / before

    return patch.object(SnapKVPress, "compute_window_attention", staticmethod(counted))


def recent(known: Known):
    """The newest token's weight on itself counts, and the 64 newest tokens, which theirs keeps, not 65 before it."""
    from kvpress.presses.snapkv_press import SnapKVPress

    compute = SnapKVPress.compute_window_attention

    def counted(*args):
        weights = compute(*args)
        own = 1 - weights.sum(-1)
        weights[..., -65:-63] = 0
        weights[..., -1] += own
        return weights

    return patch.object(SnapKVPress, "compute_window_attention", staticmethod(counted))


# what theirs cannot do without


def in_place(known: Known):
    """Kept keys are told by their numbers, so they are not turned."""
    from kvpress.presses.key_rerotation_press import KeyRerotationPress

    def gathered(module, indices, keys):
        return keys.gather(2, indices[..., None].expand(-1, -1, -1, keys.shape[-1]))

    return patch.object(KeyRerotationPress, "rerotate_keys", staticmethod(gathered))


@contextmanager
def streaming(known: Known) -> Iterator[None]:
    """The heads that stream in ours stream in theirs, which loads them for models that it knows."""
    press = known.press
    given = torch.stack([~layer.all(-1) for layer in known.ours])

    def told(model) -> None:
        press.sink_size, press.recent_size, press.streaming_mask = 4, 60, given

    with patch.object(press, "post_init_from_model", told):
        yield


@contextmanager
def filters(known: Known) -> Iterator[None]:
    """Directions of the prompt's own queries, by a singular value decomposition; theirs loads them for models."""
    from kvpress.utils import get_prerope_query_states
    from transformers.models.llama.modeling_llama import rotate_half

    press, score = known.press, known.press.score

    def own(module, hidden_states, keys, values, attentions, kwargs):
        cos, sin = (x[:, None] for x in kwargs["position_embeddings"])
        q = get_prerope_query_states(module, hidden_states)
        q = (q * cos + rotate_half(q) * sin).double()
        first = torch.linalg.svd(q, full_matrices=False).Vh[:, :, 0]  # [B, H, D]
        first = first * (first * q.mean(2)).sum(-1, keepdim=True).sign()
        press.q_filters = {module.layer_idx: -first[0].unflatten(0, (-1, known.shared)).mean(1).float()}
        return score(module, hidden_states, keys, values, attentions, kwargs)

    with patch.object(press, "post_init_from_model", lambda model: None), patch.object(press, "score", own):
        yield


def marked(known: Known):
    """The first four tokens and the newest stay: they are marked once all are scored."""
    press, compress = known.press, known.press.compress_post

    def after(model):
        for place in (slice(press.n_sink), slice(-1, None)):
            press.score_val[..., place] = 2.0
        compress(model)

    return patch.object(press, "compress_post", after)


@contextmanager
def taken_out(names: tuple[str, ...], known: Known) -> Iterator[None]:
    """The press within the contexts of these names, one on another."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(globals()[name](known))
        yield
