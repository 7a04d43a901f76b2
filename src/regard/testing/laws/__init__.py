"""The laws of attention, one function each: a page, its settings and a pattern go in as a Case.

`n` is the length at which a law is asked where none is given; a search for the smallest counterexample gives others.
Mechanisms and blocks are asked the same functions (testing/mechanism.py, testing/block.py).
"""

from regard.testing.laws.carrying import check_decode, check_padded_state, check_segments, check_state_size
from regard.testing.laws.equality import check_fast_equals_reference, check_gradients, check_speed_settings
from regard.testing.laws.influence import (
    check_accumulates,
    check_causality,
    check_influence,
    check_last_queries,
    check_prefix,
    check_queries,
    check_reach,
    check_window,
)
from regard.testing.laws.masking import (
    check_blind_rows,
    check_mask_obeyed,
    check_mask_object,
    check_no_tokens,
    check_padding_left,
    check_padding_right,
)
from regard.testing.laws.numbers import (
    check_batch,
    check_compiles,
    check_extremes,
    check_frozen,
    check_groups,
    check_neutral,
    check_precision,
    check_pure,
    finite,
    plain,
    softmax,
)

CHECKS = (
    check_fast_equals_reference,
    check_speed_settings,
    check_gradients,
    check_influence,
    check_queries,
    check_last_queries,
    check_window,
    check_prefix,
    check_segments,
    check_decode,
    check_padding_right,
    check_padding_left,
    check_padded_state,
    check_mask_obeyed,
    check_mask_object,
    check_no_tokens,
    check_batch,
    check_neutral,
    check_blind_rows,
    check_extremes,
    check_precision,
    check_frozen,
    check_groups,
    check_compiles,
    check_state_size,
    check_pure,
)

__all__ = [
    "check_last_queries",
    "CHECKS",
    "finite",
    "plain",
    "softmax",
    "check_fast_equals_reference",
    "check_speed_settings",
    "check_gradients",
    "check_influence",
    "check_causality",
    "check_reach",
    "check_accumulates",
    "check_queries",
    "check_window",
    "check_prefix",
    "check_segments",
    "check_decode",
    "check_padded_state",
    "check_state_size",
    "check_padding_right",
    "check_padding_left",
    "check_mask_obeyed",
    "check_mask_object",
    "check_no_tokens",
    "check_blind_rows",
    "check_batch",
    "check_neutral",
    "check_extremes",
    "check_precision",
    "check_frozen",
    "check_groups",
    "check_compiles",
    "check_pure",
]
