"""The checks are checked: faults are planted one at a time in softmax attention, and each is found by the law named."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn import functional as F

from regard import catalog
from regard.core import Unsupported, call, require
from regard.core.mask import Mask
from regard.kinds.mechanism import Mechanism
from regard.testing import mechanism
from regard.testing.case import Case, D, E, value_width
from regard.testing.mechanism import CHECKS, check_mechanism, examine, hold_all

SOFTMAX = catalog.get("softmax")
FAULTS: dict[str, tuple[Mechanism, str, tuple[str, ...]]] = {}


def attention(q, k, v, cfg, call, *, sees=None, zeroed=True, before=0.5):
    """A third softmax attention, short enough to plant faults in. `sees` [n, m] is the pattern's own mask."""
    if call.initial_state is not None:
        k, v = torch.cat([call.initial_state[0], k], 2), torch.cat([call.initial_state[1], v], 2)
    n, m = q.shape[2], k.shape[2]
    if sees is None:
        sees = torch.ones(n, m, dtype=torch.bool)
        sees = sees.tril(m - n) if call.pattern == "causal_self" else sees
    mask = masked(call)
    mask = sees if mask is None else mask & sees
    share = q.shape[1] // k.shape[1]
    k_h, v_h = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    if zeroed and call.key_mask is not None:
        k_h, v_h = (t.masked_fill(~call.key_mask[..., None], 0) for t in (k_h, v_h))
    s = (q * before @ k_h.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5 / before
    s = torch.where(mask.any(-1, keepdim=True), s.masked_fill(~mask, -torch.inf), 0)
    out = s.softmax(-1).masked_fill(~mask, 0).to(v.dtype) @ v_h
    return out, (k, v) if call.pattern == "causal_self" else None


def masked(call):
    """[B|1, H|1, N|1, M] bool, or None."""
    return call.pair_mask if call.key_mask is None else call.key_mask[:, :, None]


def hiding(call, change):
    """The call with its masks changed."""
    key, pair = (None if mask is None else change(mask) for mask in (call.key_mask, call.pair_mask))
    return call.with_(key_mask=key, pair_mask=pair)


@dataclass(frozen=True)
class Plain:
    pass


@dataclass(frozen=True)
class Windowed:
    window: int = 4


def page(
    fault: Callable, config: type = Plain, both: bool = True, init: Callable | None = None, **fields
) -> Mechanism:
    reference = fault if both else attention
    card = replace(
        SOFTMAX.card, neutral=fields.pop("neutral", {"window": 2**20} if config is Windowed else {})
    )
    exempt = {} if card.neutral else {"neutral": "nothing to set"}
    page = replace(
        SOFTMAX, config=config, reference=reference, fast=fault, card=card, test_settings=(), init=init
    )
    return replace(page, exempt=exempt, **fields)


def planted(*laws: str, pattern: str = "causal_self", **fields):
    """Plant this function in a page (as both paths unless both=False); asked for this pattern, it breaks these laws."""

    def plant(fault: Callable) -> Callable:
        FAULTS[fault.__name__] = (page(fault, **fields), pattern, laws)
        return fault

    return plant


@planted("padding_nan")
def nothing_zeroed_under_padding(q, k, v, cfg, call):
    return attention(q, k, v, cfg, call, zeroed=False)


@planted("extremes", pattern="cross")
def rounded_before_it_is_scaled(q, k, v, cfg, call):
    return attention(q, k, v, cfg, call, before=1.0)


@planted("fast_equals_reference", both=False)
def no_causal_mask_in_fast(q, k, v, cfg, call):
    return attention(q, k, v, cfg, call, sees=torch.ones(1, 1, dtype=torch.bool))


@planted("influence", "prefix", "segments", "decode")
def no_causal_mask(q, k, v, cfg, call):
    return attention(q, k, v, cfg, call, sees=torch.ones(1, 1, dtype=torch.bool))


@planted("segments", "decode")
def state_ignored(q, k, v, cfg, call):
    return attention(q, k, v, cfg, call.with_(initial_state=None))


@planted("segments", "decode")
def upper_left(q, k, v, cfg, call):
    m = k.shape[2] + (0 if call.initial_state is None else call.initial_state[0].shape[2])
    sees = torch.ones(q.shape[2], m, dtype=torch.bool).tril() if call.pattern == "causal_self" else None
    return attention(q, k, v, cfg, call, sees=sees)


@planted("fast_equals_reference", both=False)
def the_mask_of_head_0_in_fast(q, k, v, cfg, call):
    return attention(q, k, v, cfg, hiding(call, lambda mask: mask[:, :1]))


@planted("fast_equals_reference", both=False)
def gradient_cut(q, k, v, cfg, call):
    return attention(q, k.detach() if q.shape[2] > 1 else k, v, cfg, call)


class NoForward(torch.autograd.Function):
    """q as it is, with a forward-mode derivative of zero, and a derivative of the gradient that is cut."""

    @staticmethod
    def forward(q):
        return q.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, dq):
        return dq.detach()

    @staticmethod
    def jvp(ctx, dq):
        return torch.zeros_like(dq)


@planted("derivatives")
def derivatives_silently_zero(q, k, v, cfg, call):
    return attention(NoForward.apply(q), k, v, cfg, call)


@planted("gradients")
def gradient_cut_in_both(q, k, v, cfg, call):
    return attention(q.detach() + 0 * q, k, v, cfg, call)


@planted("fast_equals_reference", both=False)
def gradient_of_the_state_cut(q, k, v, cfg, call):
    state = call.initial_state
    state = None if state is None else (state[0].detach(), state[1])
    return attention(q, k, v, cfg, call.with_(initial_state=state))


@planted("fast_equals_reference", both=False)
def last_ragged_chunk_dropped(q, k, v, cfg, call):
    out, state = attention(q, k, v, cfg, call)
    whole = q.shape[2] // 64 * 64 or q.shape[2]
    return F.pad(out[:, :, :whole], (0, 0, 0, q.shape[2] - whole)), state


@planted("batch")
def batch_mixing(q, k, v, cfg, call):
    return attention(q, k - 0.1 * k.mean(0, keepdim=True), v, cfg, call)


@planted("extremes", pattern="self")
def overflow(q, k, v, cfg, call):
    e = (q.float() @ k.float().mT * q.shape[-1] ** -0.5).exp()
    return ((e / e.sum(-1, keepdim=True)).to(v.dtype) @ v), None


def windowed(extra: int) -> Callable:
    def fault(q, k, v, cfg, call):
        m = k.shape[2] + (0 if call.initial_state is None else call.initial_state[0].shape[2])
        age = torch.arange(q.shape[2])[:, None] + (m - q.shape[2]) - torch.arange(m)
        sees = (age >= 0) & (age < cfg.window + extra)
        return attention(q, k, v, cfg, call, sees=sees)

    return fault


@planted("window", config=Windowed)
def window_off_by_one(*args):
    return windowed(1)(*args)


@planted("padding_left", "padded_state", "mask_obeyed", "blind_rows")
def reads_padding(q, k, v, cfg, call):
    return attention(q, k, v, cfg, call.with_(key_mask=None, pair_mask=None))


@planted("padding_right", pattern="self")
def reads_padding_after_the_text(q, k, v, cfg, call):
    return attention(q, k, v, cfg, hiding(call, lambda mask: mask | mask.flip(-1)))


@planted("padded_state")
def padding_forgotten_while_decoding(q, k, v, cfg, call):
    call = call if call.initial_state is None else call.with_(key_mask=None, pair_mask=None)
    return attention(q, k, v, cfg, call)


@planted("blind_rows")
def blind_rows_are_nan(q, k, v, cfg, call):
    out, state = attention(q, k, v, cfg, call)
    mask = masked(call)
    return (out if mask is None else out / mask.any(-1, keepdim=True)), state


@planted("precision")
def always_float32(q, k, v, cfg, call):
    out, state = attention(q, k, v, cfg, call)
    return out.float(), state


@planted("gradients")
def float64_lost(q, k, v, cfg, call):
    out, state = attention(q, k, v, cfg, call)
    return out.float().to(q.dtype), state


@planted("precision", state_size=None)
def sums_kept_in_low_precision(q, k, v, cfg, call):
    """Linear attention whose state has the input's dtype."""
    state = k.mT @ v
    return (q[..., None, :] @ (k[..., None] * v[..., None, :]).cumsum(2))[..., 0, :], state


@planted("precision")
def scores_in_low_precision(q, k, v, cfg, call):
    if q.dtype == torch.bfloat16:
        q, k = (t.to(torch.float8_e4m3fn).to(t.dtype) for t in (q, k))
    return attention(q, k, v, cfg, call)


@planted("groups")
def wrong_head_of_the_group(q, k, v, cfg, call):
    if k.shape[1] not in (1, q.shape[1]):
        k, v = (t.flip(1) for t in (k, v))
    return attention(q, k, v, cfg, call)


@planted("heads_alone")
def heads_speak(q, k, v, cfg, call):
    return attention(q, k - 0.1 * k.mean(1, keepdim=True), v, cfg, call)


@planted("heads_alone", init=lambda cfg, dims: {"sink": torch.arange(1.0, dims["heads"] + 1)})
def first_parameter_for_all_heads(q, k, v, cfg, call):
    out, state = attention(q, k, v, cfg, call)
    return out * call.params["sink"][0].to(out.dtype), state


@planted("groups", init=lambda cfg, dims: {"gain": torch.arange(1.0, dims["kv_heads"] + 1)})
def parameters_of_kv_heads_tiled(q, k, v, cfg, call):
    out, state = attention(q, k, v, cfg, call)
    gain = call.params["gain"].repeat(q.shape[1] // k.shape[1])
    return out * gain.to(out.dtype)[:, None, None], state


@planted("drawn", init=lambda cfg, dims: {"gain": torch.rand(1).expand(dims["heads"]).clone()})
def drawn_once_for_all_heads(q, k, v, cfg, call):
    out, state = attention(q, k, v, cfg, call)
    return out * call.params["gain"].to(out.dtype)[:, None, None], state


@planted("segments", "decode")
def state_changed_in_place(q, k, v, cfg, call):
    out, end = attention(q, k, v, cfg, call)
    if call.initial_state is not None:
        call.initial_state[1].mul_(0.5)
    return out, end


@planted("neutral", neutral={"window": 2**20}, config=Windowed)
def scaled_by_the_value_width(q, k, v, cfg, call):
    return attention(q * (q.shape[-1] / v.shape[-1]) ** 0.5, k, v, cfg, call)


@planted("compiles")
def cannot_be_traced(q, k, v, cfg, call):
    out, state = attention(q, k, v, cfg, call)
    return out if out.sum() > -1e30 else out * 2, state


@planted("influence", pattern="causal_cross")
def causal_cross_as_a_triangle(q, k, v, cfg, call):
    sees = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return attention(q, k, v, cfg, call, sees=sees)


@planted("queries", pattern="cross")
def queries_speak(q, k, v, cfg, call):
    return attention(q + 0.1 * q.mean(2, keepdim=True), k, v, cfg, call)


@planted("pure")
def dropout_left_on(q, k, v, cfg, call):
    return attention(q, F.dropout(k, 0.1), v, cfg, call)


@planted("pure")
def queries_scaled_in_place(q, k, v, cfg, call):
    with torch.no_grad():
        q.mul_(1.01)
    return attention(q, k, v, cfg, call)


@planted("state_size", state_size=lambda cfg, dims, n: n * dims["kv_heads"] * dims["key"])
def state_declared_too_small(q, k, v, cfg, call):
    return attention(q, k, v, cfg, call)


@planted("speed_settings", both=False, config=Windowed, speed_settings=("window",))
def speed_setting_that_matters(q, k, v, cfg, call):
    return attention(q, k, v, cfg, call) if cfg.window == 4 else windowed(0)(q, k, v, cfg, call)


@dataclass(frozen=True)
class TiledByTen:
    tile: int = 10

    def __post_init__(self):
        require(self.tile % 10 == 0, "tile is a multiple of ten", tile=self.tile)


@planted("speed_settings", config=TiledByTen, speed_settings=("tile",))
def speed_setting_that_is_never_tried(q, k, v, cfg, call):
    return attention(q, k, v, cfg, call)


@planted("speed_settings", both=False, config=Windowed, speed_settings=("window",))
def speed_setting_that_cuts_a_gradient(q, k, v, cfg, call):
    return attention(q, k if cfg.window == 4 else k.detach(), v, cfg, call)


@planted("widths", both=False)
def channels_beyond_64_left_out(q, k, v, cfg, call):
    return attention(q, k.index_fill(3, torch.arange(64, max(64, k.shape[3])), 0), v, cfg, call)


@planted("packed", "batch")
def texts_speak(q, k, v, cfg, call):
    out, state = attention(q, k, v, cfg, call)
    return out + 0.1 * out.mean(0), state


@planted("card")
def pattern_declared_and_refused(q, k, v, cfg, call):
    if call.pattern == "cross":
        raise Unsupported("not after all")
    return attention(q, k, v, cfg, call)


def test_the_honest_page_holds():
    report = check_mechanism(page(attention))
    assert {verdict for key, verdict in report.items() if key.endswith("causal_self")} >= {"held"}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(fault, monkeypatch):
    torch.set_num_threads(1)
    broken, pattern, laws = FAULTS[fault]
    if "compiles" not in laws:
        monkeypatch.setattr(
            mechanism, "CHECKS", tuple(c for c in CHECKS if c is not mechanism.check_compiles)
        )
    report = examine(broken, [pattern])
    laws_broken = {
        key.split(",")[0]: verdict for key, verdict in report.items() if verdict.startswith("broken")
    }
    assert set(laws) <= set(laws_broken), f"found by {laws_broken}"
    with pytest.raises(AssertionError, match="Softmax attention"):
        hold_all(broken, report)


def test_each_page_has_a_width_of_values_of_its_own():
    def narrow(q, k, v, cfg, call):
        if v.shape[3] > k.shape[3]:
            raise Unsupported("values as wide as keys")
        return attention(q, k, v, cfg, call)

    cases = [Case(page(path), Plain(), "causal_self") for path in (narrow, attention)]
    assert [value_width(case) for case in (*cases, *cases)] == [D, E, D, E]
    assert [case.inputs(3).v.shape[3] for case in cases] == [D, E]


def test_a_broken_law_is_an_error():
    """What `regard.testing` offers for pages of one's own raises."""
    broken, pattern, laws = FAULTS["pattern_declared_and_refused"]
    with pytest.raises(AssertionError, match="Softmax attention\n  card: broken") as raised:
        check_mechanism(broken, [])
    assert "card" in laws and pattern not in str(raised.value).partition("card")[0]


def test_a_path_that_autocast_reaches_is_found():
    """Pages are run with autocast off inside; one that is not says so."""
    reached = page(attention)
    object.__setattr__(reached, "fast", attention)
    verdict = examine(reached, ["causal_self"])["autocast, causal_self"]
    assert verdict.startswith("broken: (Plain()) fast under autocast to bfloat16")


def test_what_cannot_be_asked_says_why():
    def stateless(q, k, v, cfg, call):
        if masked(call) is not None:
            raise Unsupported("no masks here")
        return attention(q, k, v, cfg, call)[0], None

    report = check_mechanism(page(stateless, state_size=None), ["causal_self"])
    assert report["segments, causal_self"] == "not applicable: it returns no state"
    assert report["padding_left, causal_self"] == "not applicable: no masks here"


def test_mask_objects_that_are_not_lowered_are_found(monkeypatch):
    """Masks are split into those of keys and of pairs in one place; should it leave one out, the law says so."""
    whole = call.split_mask
    ignoring = lambda mask, *args: whole(None if isinstance(mask, Mask) else mask, *args)  # noqa: E731
    monkeypatch.setattr("regard.kinds.mechanism.split_mask", ignoring)
    assert examine(page(attention), ["causal_self"])["mask_object, causal_self"].startswith("broken")


def test_exempt_laws_are_named():
    broken = replace(page(dropout_left_on), exempt={"neutral": "-", "purity": "it is random"})
    assert "laws that do not exist: ['purity']" in examine(broken, [])["card"]
