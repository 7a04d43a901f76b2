"""The oracle of cache pages with an attention of their own: sound ones pass, planted faults are found."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from regard import catalog
from regard.core import Card, Method, Unsupported
from regard.kinds.cache import CachePage
from regard.methods.caches import longheads
from regard.ops import View, masked_softmax, mix
from regard.testing import cache
from regard.testing.cache.checks import check_attention_budget, check_bfloat16, check_oracle
from regard.testing.cache.script import FAMILIES
from regard.testing.zoo import build


@dataclass(frozen=True)
class Config:
    window: int = 4
    budget: int | float | str | None = 8


def sink_and_window(view: View, cfg: Config, late: int = 0, rank: Callable = View.rank) -> torch.Tensor:
    """Every query reads the first token of its text and the last `window`, its own among them."""
    at = torch.arange(view.seen - view.new, view.seen)[:, None]
    index, first = view.index[:, :, None], rank(view)[:, :, None] < 1
    reads = (index <= at) & view.hold()[:, :, None] & (first | (at - index < cfg.window + late))
    reads = reads | (index == at)  # padding is nobody's answer, but has one
    return mix(masked_softmax(view.scores(), reads, view.sinks), view.v)


def written_out(view: View, cfg: Config) -> torch.Tensor:
    out = torch.zeros(1, view.q.shape[1], view.seen, view.v.shape[-1])
    for h in range(view.q.shape[1]):
        g = h * view.groups // view.q.shape[1]
        for i in range(view.seen):
            slots = sorted({0, *range(max(0, i - cfg.window + 1), i + 1)})
            s = view.k[0, g, slots] @ view.q[0, h, i] * view.scale
            s = s if view.softcap is None else view.softcap * torch.tanh(s / view.softcap)
            sink = [] if view.sinks is None else [view.sinks[h : h + 1]]
            out[0, h, i] = torch.cat([s, *sink]).softmax(0)[: len(slots)] @ view.v[0, g, slots]
    return out


def page(attention: Callable, reference: Callable | None = written_out) -> Method:
    card = Card("Mine", "none", 2026, "a policy of this test", neutral={"window": 1 << 20})
    made = CachePage(
        config=Config, card=card, budget=lambda cfg: 1.0, attention=attention, reference=reference
    )
    return Method("mine", made, Config())


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_a_sound_attention_passes(family):
    assert check_oracle(page(sink_and_window), family) > 1e-3


def test_a_layer_that_slides_its_own_window_is_left_as_it_is():
    """This page reads the first token in every layer, where gemma3's own windows have left it behind."""
    with pytest.raises(AssertionError, match="away from its reference"):
        check_oracle(page(sink_and_window), "gemma3")


def test_in_bfloat16_too():
    check_bfloat16(page(sink_and_window), "llama")


FAULTS = {
    "one token too many": lambda view, cfg: sink_and_window(view, cfg, late=1),
    "padding is the first token": lambda view, cfg: sink_and_window(view, cfg, rank=lambda view: view.index),
    "values of another head": lambda view, cfg: sink_and_window(view, cfg).flip(1),
    "it never acts": lambda view, cfg: None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_an_attention_is_found(fault):
    with pytest.raises(AssertionError, match="away from its reference"):
        check_oracle(page(FAULTS[fault]), "llama")


def test_a_fault_in_low_precision_is_found():
    def coarse(view: View, cfg: Config) -> torch.Tensor:
        out = sink_and_window(view, cfg)
        return out if out.dtype == torch.float32 else 2 * out

    check_oracle(page(coarse), "llama")
    with pytest.raises(AssertionError, match="in bfloat16"):
        check_bfloat16(page(coarse), "llama")


def test_what_an_attention_reads_is_held_to_the_budget():
    """The sink and a window of budget - 1 are the budget; of budget they are one too many."""

    def within(view: View, cfg: Config, more: int = 0) -> torch.Tensor:
        return sink_and_window(view, replace(cfg, window=int(view.budget.min()) - 1 + more))

    for budget in (8, 0.4):
        check_attention_budget(page(within), "llama", budget)
        with pytest.raises(AssertionError, match=r"reads .* the budget is"):
            check_attention_budget(page(lambda view, cfg: within(view, cfg, more=1)), "llama", budget)
    with pytest.raises(AssertionError, match="never acts"):
        check_attention_budget(page(lambda view, cfg: None), "llama", 8)
    check_attention_budget(catalog.method("longheads", **cache.small(catalog.get("longheads"))), "llama", 8)


def test_an_attention_of_its_own_brings_a_reference():
    with pytest.raises(ValueError, match="gives a reference"):
        check_oracle(page(sink_and_window, reference=None), "llama")


def test_a_fault_planted_in_longheads_is_found(monkeypatch):
    """What it did not see before: distances that are a chunk too long, a chunk's key without its last token."""
    method = catalog.method("longheads", **cache.small(catalog.get("longheads")))
    assert check_oracle(method, "llama") > 1e-3
    faults = {
        "choose": lambda view, part, q, first, f=longheads.choose: (
            (c := f(view, part, q, first))[0],
            c[1].flip(3),
        ),
        "chunk_keys": lambda view, q, part, old, now, f=longheads.chunk_keys: -f(view, q, part, old, now),
    }
    for name, fault in faults.items():
        with monkeypatch.context() as patch:
            patch.setattr(longheads, name, fault)
            with pytest.raises(AssertionError, match="away from its reference"):
                check_oracle(method, "llama")


def test_where_positions_cannot_be_computed_by_hand_rows_are_still_held_to_themselves():
    """A policy that moves keys runs on such a model, or says why not; running, it answers each row as it does alone."""
    streaming = catalog.method("streaming_llm", budget=8)
    others = [family for family in FAMILIES if not cache.movable(streaming, build(family)[0])]
    assert others
    for family in others:
        cache.refused(streaming, family)

    def padded(view: View, cfg, keep=streaming.page.keep):
        answer = keep(view, cfg)
        return answer if answer is None or len(view.q) == 1 else type(answer)(answer.slots.clamp(min=1))

    faulty = replace(streaming, page=replace(streaming.page, keep=padded))
    running = [family for family in others if runs(streaming, family)]
    assert running
    for family in running:
        with pytest.raises(AssertionError, match="row"):
            cache.refused(faulty, family)


def runs(method: Method, family: str) -> bool:
    try:
        cache.play(build(family)[0], method, cache.script())
    except Unsupported:
        return False
    return True


@pytest.mark.parametrize("name", ["longheads", "sparq"])
def test_an_attention_that_is_a_tenth_off_in_bfloat16_is_found(name):
    method = catalog.method(name, **cache.small(catalog.get(name)))

    def off(*asked):
        out = method.page.attention(*asked)
        return out * 1.1 if out is not None and out.dtype == torch.bfloat16 else out

    check_bfloat16(method, "llama")
    with pytest.raises(AssertionError, match=r"in bfloat16: .* off, the model"):
        check_bfloat16(replace(method, page=replace(method.page, attention=off)), "llama")


@pytest.mark.parametrize("family", [*FAMILIES, *cache.MIXED, "qwen3", "hunyuan"])
def test_keys_of_tiny_models_have_lengths_that_tell_them_apart(family):
    """Or rounding would choose between tokens: a norm of heads with ones leaves all keys equally long."""
    model, _ = build(family)
    scales = [
        w for label, w in model.named_parameters() if "attn" in label and "norm" in label.split(".")[-2]
    ]
    heads = [w for w in scales if w.shape[-1] == model.config.get_text_config().head_dim]
    assert all(w.unique().numel() > 1 for w in heads)
