"""Mathematics that two or more pages share."""

from regard.ops.budget import Budget, parse_budget
from regard.ops.features import elu_plus_one, taylor
from regard.ops.linear import dense_linear, inputs_of_keys, key_mask, linear, shown, undecayed
from regard.ops.pattern import carried, dense_mask, seen_by
from regard.ops.softmax import (
    at_least_float32,
    attend,
    explicit,
    few_rows,
    finish,
    fused,
    lower_right,
    masked_softmax,
    merge,
    mix,
    partial,
    per_query_head,
    row_blocks,
    scores,
)
from regard.ops.topk import best, gather_rows, slots_of, top_slots
from regard.ops.view import Kept, View, keep_best

__all__ = [
    "Budget",
    "Kept",
    "View",
    "at_least_float32",
    "attend",
    "best",
    "carried",
    "dense_linear",
    "dense_mask",
    "elu_plus_one",
    "explicit",
    "few_rows",
    "finish",
    "fused",
    "gather_rows",
    "inputs_of_keys",
    "keep_best",
    "key_mask",
    "linear",
    "lower_right",
    "masked_softmax",
    "merge",
    "mix",
    "parse_budget",
    "partial",
    "per_query_head",
    "row_blocks",
    "scores",
    "seen_by",
    "shown",
    "slots_of",
    "taylor",
    "top_slots",
    "undecayed",
]
