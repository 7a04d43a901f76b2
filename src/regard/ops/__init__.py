"""Mathematics that two or more pages share."""

from regard.core.deprecation import moved
from regard.ops.budget import Budget, parse_budget, tokens_within
from regard.ops.clock import clocked, part
from regard.ops.distances import Distances
from regard.ops.features import elu_plus_one, taylor
from regard.ops.kept import Kept, keep_best
from regard.ops.linear import Form, dense_linear, linear, run_form, shown, undecayed
from regard.ops.machine import for_products, matmul, product_dtype, products_in
from regard.ops.pattern import carried, visible
from regard.ops.recurrence import exact, heads_of, initial, quotient, recurrence, rounded
from regard.ops.short_convolution import closed_up, short_convolution
from regard.ops.softmax import (
    at_least_float32,
    capped,
    explicit,
    few_rows,
    finish,
    fused,
    join_sinks,
    lower_right,
    masked_softmax,
    merge,
    mix,
    partial,
    per_query_head,
    row_blocks,
    scores,
    softmax_attention,
)
from regard.ops.topk import best, by_row, gather_rows, slots_of, top_slots
from regard.ops.view import View, at_index

__all__ = [
    "Budget",
    "Distances",
    "Form",
    "Kept",
    "View",
    "at_index",
    "at_least_float32",
    "best",
    "by_row",
    "capped",
    "carried",
    "clocked",
    "closed_up",
    "dense_linear",
    "elu_plus_one",
    "exact",
    "explicit",
    "few_rows",
    "finish",
    "for_products",
    "fused",
    "gather_rows",
    "heads_of",
    "initial",
    "join_sinks",
    "keep_best",
    "linear",
    "lower_right",
    "masked_softmax",
    "matmul",
    "merge",
    "mix",
    "parse_budget",
    "part",
    "partial",
    "per_query_head",
    "product_dtype",
    "products_in",
    "quotient",
    "recurrence",
    "rounded",
    "run_form",
    "row_blocks",
    "scores",
    "short_convolution",
    "shown",
    "slots_of",
    "softmax_attention",
    "taylor",
    "tokens_within",
    "top_slots",
    "undecayed",
    "visible",
]

__getattr__ = moved(__name__, {"attend": "regard.ops.softmax:softmax_attention"})
