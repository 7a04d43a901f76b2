"""Prefix linear attention where it is not causal by design: what is seen within the prefix and after it, and its state.

The laws that the page is exempt from have their meaning where the prefix is at most the first token; they are held to
it there. With a longer prefix the first call is the prompt, and everything after the prefix carries on from its state.
"""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from regard import catalog
from regard.core import Method
from regard.kinds.mechanism import run
from regard.testing.case import moved
from regard.testing.mechanism import (
    Case,
    check_decode,
    check_influence,
    check_padded_state,
    check_prefix,
    check_segments,
)

PAGE = catalog.get("jrt")
PATHS = pytest.mark.parametrize("path", [PAGE.reference, PAGE.fast], ids=["reference", "fast"])
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def case(prefix: int, pattern: str = "causal_self") -> Case:
    return Case(replace(PAGE, exempt={}), PAGE.configure(prefix=prefix), pattern)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(
    "law", [check_influence, check_prefix, check_segments, check_decode, check_padded_state]
)
def test_a_prefix_of_at_most_one_token_obeys_every_law(law, prefix):
    law(case(prefix))


@pytest.mark.parametrize("pattern", ["self", "cross", "causal_cross"])
@pytest.mark.parametrize("prefix", [0, 4, 1024])
def test_without_an_order_every_key_is_seen(pattern, prefix):
    check_influence(case(prefix, pattern))


@PATHS
def test_the_prefix_sees_itself_and_the_rest_its_past(path):
    prefixed, m = case(4), 4
    inputs = prefixed.inputs(9)
    for j in range(9):
        wanted = list(range(j, 9)) if j >= m else list(range(9))
        assert moved(prefixed, path, inputs, "kvx", j) == wanted, f"token {j} of 9, prefix of {m}"
        assert moved(prefixed, path, inputs, "kv", j) == list(range(j, 9)), (
            "k and v are read in order, also within"
        )


@PATHS
@pytest.mark.parametrize("n", [3, 8, 9])  # a prompt shorter than the prefix, as long, longer
def test_decoding_is_reading_the_rest_at_once(path, n):
    """Against sums over what each token may see, written out."""
    prefixed = case(8)
    inputs = prefixed.inputs(12)
    _, state = prefixed.run(path, inputs.span(slice(0, n)))
    rows = []
    for t in range(n, 12):
        out, state = prefixed.run(path, inputs.span(slice(t, t + 1)), state=state)
        rows.append(out)
    k_e = torch.einsum("bnc,gcd->bgnd", inputs.x[:, : min(n, 8)], inputs.params["k_enc"])
    v_e = torch.einsum("bnc,gcd->bgnd", inputs.x[:, : min(n, 8)], inputs.params["v_enc"])
    for t in range(n, 12):
        keys, values = (
            torch.cat(pair, dim=2)
            for pair in ((inputs.k[:, :, : t + 1], k_e), (inputs.v[:, :, : t + 1], v_e))
        )
        s = inputs.q[:, :, t : t + 1] @ keys.mT / 2  # D is 4
        w = 1 + s + s * s / 2
        assert_close(rows[t - n], w @ values / w.sum(-1, keepdim=True), **TOLERANCE)


@PATHS
def test_segments_after_the_prefix_and_padding_before_it(path):
    prefixed = case(5)
    inputs = prefixed.inputs(16)
    wanted, end = prefixed.run(path, inputs)
    names = ("q", "k", "v", "x")
    padded = {n: torch.nn.functional.pad(getattr(inputs, n), (0, 0, 3, 0), value=1e3) for n in names}
    wide = replace(inputs, **padded)
    hidden = (torch.arange(19) >= 3).expand(2, 1, 1, 19)
    out, state = prefixed.run(path, wide.span(slice(0, 10)), hidden[..., :10])
    rows = [out[:, :, 3:]]
    for cut in (slice(10, 13), slice(13, 14), slice(14, 19)):
        out, state = prefixed.run(path, wide.span(cut), state=state)
        rows.append(out)
    assert_close(torch.cat(rows, dim=2), wanted, **TOLERANCE)
    assert_close(state, end, **TOLERANCE)


@PATHS
def test_the_second_reading_is_weighed_by_the_same_denominator(path):
    """With k^e = k and v^e = v of a prefix that is the whole text, the last token reads plain attention's answer."""
    prefixed = case(1024)
    inputs = prefixed.inputs(6)
    x = inputs.x
    solve = torch.linalg.lstsq
    params = {}
    one = inputs.rows(slice(0, 1))
    for name, t in (("k_enc", one.k), ("v_enc", one.v)):
        # six tokens, six numbers each
        square = torch.cat([x[:1], torch.ones(1, 6, 1, dtype=x.dtype)], dim=-1)
        params[name] = torch.stack([solve(square[0], t[0, g]).solution for g in range(t.shape[1])])
    twice = replace(one, x=square, params=params)
    plain = case(0).run(path, replace(one, x=None, params={}))[0]
    assert_close(prefixed.run(path, twice)[0][:, :, -1], plain[:, :, -1], **TOLERANCE)


def test_wide_queries_need_their_maps():
    q, k, v = (torch.zeros(1, 1, 3, 20) for _ in range(3))
    with pytest.raises(ValueError, match="q_map"):
        run(Method("jrt", PAGE, PAGE.configure(prefix=0)), q, k, v)
    with pytest.raises(ValueError, match="beside the keys"):
        run(Method("jrt", PAGE, PAGE.configure()), q[..., :4], k[..., :4], v, x=torch.zeros(1, 2, 5))


def test_without_a_prefix_no_input_of_the_layer_is_read():
    inputs = case(0).inputs(9)
    plain = Method("jrt", PAGE, PAGE.configure(prefix=0))
    assert inputs.x is None and inputs.params == {}
    with pytest.raises(ValueError, match="this one does not"):
        run(plain, inputs.q, inputs.k, inputs.v, x=torch.zeros(2, 9, 5))
    with pytest.raises(ValueError, match="reads the layer's input"):
        run(Method("jrt", PAGE, PAGE.configure()), inputs.q, inputs.k, inputs.v)
