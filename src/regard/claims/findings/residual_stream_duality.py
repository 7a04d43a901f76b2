"""Residual stream duality's claim: attention over depth is windowed attention over a sequence, its axes exchanged.

    depth       layer l of one token reads layers l - W + 1 .. l of the same token:  Σ_i softmax_i(q_l·k_i / √D) v_i
    sequence    the library's causal windowed attention, asked [positions x rows, H, layers, D]: layers are its tokens

The first is a loop over layers, rows, positions and heads that is written out here. What is stored is counted on
running models: along depth what one token carries up through a decoder with attention residuals, and what of it is
still there when the next token comes; along the sequence what a decoder with sliding windows holds in its own cache.
"""

import math

import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from regard.api import attend
from regard.catalog import method
from regard.claims.lab import difference, generator, seeded
from regard.core.claim import Claim, Measured
from regard.core.trees import tree_leaves
from regard.nn import RegardConfig, RegardForCausalLM

LAYERS, ROWS, POSITIONS, HEADS, WIDTH = 12, 2, 8, 2, 16
WINDOWS = (1, 4, LAYERS)
LENGTHS = (24, 48)


def along_depth(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """q, k, v and out [L, B, N, H, D]."""
    out = torch.empty_like(v)
    for row, position, head in torch.cartesian_prod(*map(torch.arange, (ROWS, POSITIONS, HEADS))).tolist():
        at = (row, position, head)
        for layer in range(LAYERS):
            below = range(max(0, layer - window + 1), layer + 1)
            scores = [float(q[(layer, *at)] @ k[(i, *at)]) / math.sqrt(WIDTH) for i in below]
            weights = [math.exp(s - max(scores)) for s in scores]
            mixed = sum(w * v[(i, *at)] for w, i in zip(weights, below, strict=True))
            out[(layer, *at)] = mixed / sum(weights)
    return out


def apart(window: int) -> float:
    """Largest |difference| in float32."""
    g = generator(window)
    q, k, v = (torch.randn(LAYERS, ROWS, POSITIONS, HEADS, WIDTH, generator=g) for _ in range(3))
    turned = (t.permute(1, 2, 3, 0, 4).flatten(0, 1) for t in (q, k, v))
    out = attend(*turned, "softmax", mask=method("window", window=window)).out
    back = out.unflatten(0, (ROWS, POSITIONS)).permute(3, 0, 1, 2, 4)
    return difference(back, along_depth(q, k, v, window))


def stored_along_depth(layers: int, width: int, length: int) -> tuple[float, int]:
    """(numbers that one token carries up at the last read, bytes more in the cache than without reads along depth)"""
    caches, carried = {}, []
    for residual in ("add", "attention"):
        with seeded(0):
            config = RegardConfig(
                vocab_size=32, hidden_size=width, num_hidden_layers=layers, residual=residual
            )
            model = RegardForCausalLM(config).eval()
        if residual == "attention":
            model.model.reads.register_forward_hook(lambda _, __, out: carried.append(out[1]))
        with torch.no_grad():
            caches[residual] = model(torch.zeros(1, length, dtype=torch.long), use_cache=True).past_key_values
    # keys and values that are one tensor are held once
    held = {leaf.data_ptr(): leaf.numel() for leaf in tree_leaves(carried[-1]) if leaf.is_floating_point()}
    return sum(held.values()) / length, caches["attention"].nbytes() - caches["add"].nbytes()


def stored_along_sequence(window: int, width: int, length: int) -> int:
    """Numbers that each layer holds when a text of this length has been read."""
    config = MistralConfig(
        vocab_size=32, hidden_size=width, intermediate_size=width, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=window,
    )  # fmt: skip
    with torch.no_grad():
        model = MistralForCausalLM(config).eval()
        cache = model(torch.zeros(1, length, dtype=torch.long), use_cache=True).past_key_values
    by_layer = {layer.keys.numel() + layer.values.numel() for layer in cache.layers}
    (numbers,) = by_layer
    return numbers


def measure() -> Measured:
    differences = {f"difference_window_{w}": apart(w) for w in WINDOWS}
    deep, wide = [], []
    parts = {
        "the same": max(differences.values()) < 1e-6,
        "stored along depth": True,
        "stored along text": True,
    }
    for n in LENGTHS:
        for layers, width in ((2, 16), (4, 16), (8, 16), (4, 32)):
            numbers, kept = stored_along_depth(layers, width, n)
            deep.append([layers, width, n, numbers])
            # the embedding, and what attention and channel mixer of each layer give
            parts["stored along depth"] &= numbers == (2 * layers + 1) * width and kept == 0
        for window, width in ((4, 16), (8, 16), (16, 16), (8, 32)):
            numbers = stored_along_sequence(window, width, n)
            wide.append([window, width, n, numbers])
            # keys and values; the window counts the token that asks, which may not be held yet
            parts["stored along text"] &= 2 * (window - 1) * width <= numbers <= 2 * window * width
    return Measured.by(
        parts,
        {
            **differences,
            "depth_layers_width_length_numbers": deep,
            "sequence_window_width_length_numbers_per_layer": wide,
        },
    )


CLAIM = Claim(
    name="residual_stream_duality",
    statement=(
        "causal attention along depth is causal windowed attention along a sequence with layers and positions "
        "exchanged; what is stored differs with the placement"
    ),
    bound=(
        "max |Δ| < 1e-6 in float32 at windows 1, 4 and all layers; along depth d numbers for each output so far of a "
        "live token and none once it is done, along the sequence 2·W·d a layer up to one token, both at any length"
    ),
    measure=measure,
)
