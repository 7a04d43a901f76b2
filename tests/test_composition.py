"""What acts together: masks beside the model's own, sparse prefill under a policy, edits beside them, and refusals.

The oracle of a mask is the model itself, given one 4-D mask for each layer type that is made here by hand, or an
explicit softmax in which a loop hides what neither mask shows.
"""

import copy

import pytest
import torch
from tests.test_attach import greedy, run, state
from tests.test_edits import EDITS, MARK, by_hand, role_of
from transformers import DynamicCache

from regard import catalog
from regard.attaching import replacement
from regard.attaching.attachment import attach
from regard.core import Edit, NeverFired, Observer, Site, Unsupported
from regard.core.mask import Coordinates, causal, first, predicate, window
from regard.testing.cache.oracle import gap, hide
from regard.testing.cache.script import NEAR, play, script
from regard.testing.zoo import build, ids

STEPS = (20, 1, 1, 1, 1)
PADS = (0, 6)


@predicate()
def striped(at: Coordinates, heads: int) -> torch.Tensor:
    """Head h sees itself and the tokens whose index is h modulo the heads."""
    return ((at.k - at.h) % heads == 0) | (at.k == at.q)


MASKS = {
    "window": catalog.method("window", window=5),
    "sinks and window": causal() & (window(4) | first(8)),
    "by head": striped(heads=4),
    "two": (window(9), ~(first(9) & ~first(7))),
}
RULES = {  # (head, query, key) -> whether it sees it, once more in plain Python
    "window": lambda h, i, j: 0 <= i - j < 5,
    "sinks and window": lambda h, i, j: j <= i and (i - j < 4 or j < 8),
    "by head": lambda h, i, j: (j - h) % 4 == 0 or i == j,
    "two": lambda h, i, j: 0 <= i - j < 9 and j not in (7, 8),
}


def several(mask):
    return list(mask) if isinstance(mask, tuple) else [mask]


def by_loop(rule, n, m, heads=4):
    """[heads, n, m] bool: the last query is that of the last key."""
    past = m - n
    return torch.tensor([[[rule(h, past + r, j) for j in range(m)] for r in range(n)] for h in range(heads)])


def by_text(rule, n, mask, heads=4):
    """[B, heads, n, m] bool for a batch: the rule speaks of the tokens of each text; padding [B, m] has no number."""
    seen = torch.zeros(len(mask), heads, n, mask.shape[1], dtype=torch.bool)
    for b, text in enumerate(mask.tolist()):
        columns = [j for j, token in enumerate(text) if token]
        asking = [i for i, j in enumerate(columns) if j >= len(text) - n]
        for i in asking:
            for j, column in enumerate(columns):
                for h in range(heads):
                    seen[b, h, columns[i] - len(text) + n, column] = rule(h, i, j)
    return seen


def models_own(model, kind, feed, n):
    """[B, 1, n, m] bool of a layer type: causal, the model's window where it has one, and padding."""
    mask = feed["attention_mask"].bool()
    m = mask.shape[1]
    age = torch.arange(m - n, m)[:, None] - torch.arange(m)
    seen = age >= 0
    if kind == "sliding_attention":
        seen = seen & (age < model.config.sliding_window)
    return seen & mask[:, None, None]


def given_masks(model, feeds, rule):
    """Logits of the script when every layer type is given its mask as an additive 4-D tensor by hand."""
    eager, cache, outs = copy.deepcopy(model), DynamicCache(), []
    eager.set_attn_implementation("eager")
    low = torch.finfo(torch.float32).min
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    for feed in feeds:
        n = feed["input_ids"].shape[1]
        masks = {
            kind: torch.where(
                models_own(model, kind, feed, n) & by_text(rule, n, feed["attention_mask"]), 0.0, low
            )
            for kind in kinds
        }
        mask = masks if len(kinds) > 1 else masks["full_attention"]
        with torch.no_grad():
            outs.append(eager(**{**feed, "attention_mask": mask}, past_key_values=cache).logits)
    return outs


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("pads", [(0,), PADS, "gaps"], ids=["one row", "left padding", "padding anywhere"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_mask_is_the_4d_mask_given_by_hand(family, pads, name):
    model, _ = build(family)
    if pads == "gaps":
        feeds = script((*STEPS, 4, 1), PADS, gaps={5: ((2, 0), (0, 1))})
    else:
        feeds = script(STEPS, pads)
    tape = play(model, None, feeds, several(MASKS[name]))
    wanted = given_masks(model, feeds, RULES[name])
    assert gap(feeds, tape.outs, wanted) <= NEAR
    assert gap(feeds, tape.outs, hide(model, feeds)) > 1e-3


def test_without_a_cache_and_in_pieces():
    model, _ = build("llama")
    tokens, mask = ids(2, 18), MASKS["sinks and window"]
    with attach(model, mask):
        whole = run(model, dict(input_ids=tokens), use_cache=False)
        cache = DynamicCache()
        parts = [
            run(model, dict(input_ids=t), past_key_values=cache) for t in tokens.split([7, 1, 6, 1, 3], 1)
        ]
        words = greedy(model, dict(input_ids=tokens))
        static = greedy(model, dict(input_ids=tokens), cache_implementation="static", disable_compile=True)
    assert (torch.cat(parts, 1) - whole).abs().max() <= NEAR
    assert torch.equal(words, static)
    assert not torch.equal(words, greedy(model, dict(input_ids=tokens)))


def test_a_mask_that_shows_everything_changes_nothing():
    model, _ = build("gemma3")
    feeds = script(STEPS, PADS)
    assert gap(feeds, play(model, None, feeds, [window(1 << 20)]).outs, hide(model, feeds)) <= NEAR


def hidden_too(rule, feeds):
    """A change of scores for `hide`: what the rule does not show is hidden."""

    def change(layer, quantity, x, seen):
        if quantity != "scores":
            return x
        n, m = x.shape[2:]
        seen = by_text(rule, n, feeds[-1]["attention_mask"][:, :m], x.shape[1])
        return x.masked_fill(~seen, -torch.inf)

    return change


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "policy",
    [
        catalog.method("streaming_llm", sinks=3, window=6),
        catalog.method("streaming_llm", sinks=3, window=6, positions="text"),
        catalog.method("h2o", budget=9),
        catalog.method("tokenselect", budget=8, reuse=None),
        catalog.method(
            "razor_attention", budget=8, sinks=1, window=3, heads=((1, 0), (0, 1), (2, 0)), compensate=False
        ),
    ],
    ids=lambda m: m.label.split("(")[0] + ("_text" if "text" in m.label else ""),
)
def test_a_mask_under_a_policy_is_the_dense_model_with_both(policy, family, name):
    """Whatever the policy holds or reads, and the mask hides of it: exactly that, on a full cache."""
    model, _ = build(family)
    feeds = script((20, 1, 1, 4, 1, 1), PADS, gaps={3: ((2, 0), (0, 1))})
    tape = play(model, policy, feeds, several(MASKS[name]))
    wanted = hide(model, feeds, tape.reads, hidden_too(RULES[name], feeds))
    assert gap(feeds, tape.outs, wanted) <= NEAR
    assert gap(feeds, tape.outs, hide(model, feeds, tape.reads)) > 1e-3


def test_streaming_llm_under_a_mask_holds_sinks_and_window():
    model, _ = build("llama")
    tape = play(model, catalog.method("streaming_llm", sinks=2, window=5), script(STEPS, (0,)), [window(4)])
    assert [x[0] for x in tape.stored[-1]] == [7, 7, 7]
    assert tape.held[-1][0][0, 0].nonzero()[:, 0].tolist() == [0, 1, *range(19, 24)]


def test_a_row_that_sees_nothing_gives_zeros():
    model, inputs = build("llama")
    blind = ~window(1) & causal()  # the first query sees itself only
    with attach(model, [blind, Observer("z"), Observer("received")]) as attached:
        out = run(model, inputs)
    assert out.isfinite().all()
    for _, _, z in attached.records["z"]:
        assert not z[:, :, 0].any()
        assert z[:, :, 1:].any(-1).all()
    assert torch.allclose(attached.records["received"][0][2].sum(-1), torch.tensor(11.0))


def test_a_mask_of_roles_reads_the_labels_of_the_text():
    model, _ = build("llama")
    tokens = ids(1, 14)
    document = lambda t: (t == 100).cumsum(-1)  # noqa: E731
    tokens[0, 6] = 100
    with attach(model, catalog.method("document"), roles={"document": document}):
        both = run(model, dict(input_ids=tokens))
        assert torch.equal(both, run(model, dict(input_ids=tokens), use_cache=False))
    places = torch.arange(6, 14)[None]
    alone = run(model, dict(input_ids=tokens[:, 6:], position_ids=places, attention_mask=torch.ones(1, 8)))
    assert (both[:, 6:] - alone).abs().max() <= NEAR
    with attach(model, catalog.method("document"), roles={"document": lambda t: torch.full_like(t, 3)}):
        grown = greedy(model, dict(input_ids=tokens))
    assert torch.equal(grown, greedy(model, dict(input_ids=tokens)))
    with pytest.raises(KeyError, match="needs the role 'document'"), attach(model, "document"):
        run(model, dict(input_ids=tokens))


@pytest.mark.parametrize("name", ["scale scores", "block weights", "move", "scale a role", "scale z"])
@pytest.mark.parametrize("policy", [None, catalog.method("streaming_llm", sinks=3, window=8)])
def test_edits_beside_a_mask(policy, name):
    model, _ = build("llama")
    feeds, edit, mask = script((20, 1, 1, 4, 1), PADS), EDITS[name], "sinks and window"
    tape = play(model, policy, feeds, [MASKS[mask], edit], roles=MARK)
    edits, rule = by_hand(edit, feeds=feeds, role=role_of(feeds)), RULES[mask]

    def both(layer, quantity, x, seen):
        seen = (
            seen & by_text(rule, x.shape[2], feeds[-1]["attention_mask"][:, : x.shape[3]])
            if quantity != "z"
            else seen
        )
        x = edits(layer, quantity, x, seen)
        return hidden_too(rule, feeds)(layer, quantity, x, seen)

    wanted = hide(model, feeds, None if policy is None else tape.reads, both)
    assert gap(feeds, tape.outs, wanted) <= NEAR


def test_observers_and_attentions_show_what_the_mask_left():
    model, inputs = build("gemma3")
    with attach(model, [MASKS["window"], Observer("received")]) as attached, torch.no_grad():
        out = model(**inputs, output_attentions=True)
    hidden = ~by_loop(RULES["window"], 12, 12)
    assert len(out.attentions) == model.config.num_hidden_layers
    for weights, (_, _, received) in zip(out.attentions, attached.records["received"], strict=True):
        assert not weights[hidden.expand_as(weights)].any()
        torch.testing.assert_close(weights.sum(2), received)


# -- a mechanism that stores keys, beside others


@pytest.mark.parametrize("mechanism", ["lean_attention", "softmax"])
@pytest.mark.parametrize(
    "policy",
    [
        catalog.method("snapkv", budget=9, window=3),
        catalog.method("streaming_llm", sinks=3, window=6),
        catalog.method("h2o", budget=9),
        catalog.method("tokenselect", budget=8, reuse=None),
    ],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek3"])
def test_sparse_prefill_and_a_policy(family, policy, mechanism):
    """These mechanisms are exact: with one of them beside it a policy gives its own numbers."""
    model, _ = build(family)
    if policy.page.shift is not None and family != "llama":
        policy = policy.with_settings(positions="text")
    feeds = script((20, 1, 1, 5, 1), PADS)
    alone = play(model, policy, feeds)
    together = play(model, policy, feeds, [catalog.method(mechanism)])
    assert gap(feeds, together.outs, alone.outs) <= 1e-5
    assert together.stored == alone.stored


def test_the_mechanism_is_what_runs_in_prefill(monkeypatch):
    """And in single steps where no policy is there to decode."""
    model, inputs = build("llama")
    calls, plain = [], replacement.run_mechanism

    def counted(method, call, *tensors, **settings):
        calls.append(call.q.shape[2])
        return plain(method, call, *tensors, **settings)

    monkeypatch.setattr(replacement, "run_mechanism", counted)
    with attach(model, ["lean_attention", "snapkv"]):
        greedy(model, inputs)
    assert calls == [12] * 3
    calls.clear()
    with attach(model, ["lean_attention", window(4)]):
        greedy(model, inputs, max_new_tokens=3)
    assert calls == [12] * 3 + [1] * 6


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_a_mechanism_under_a_mask_is_attention_under_it(family):
    model, _ = build(family)
    feeds = script((20, 1, 1, 4, 1), PADS)
    alone = play(model, None, feeds, [MASKS["sinks and window"]])
    together = play(model, None, feeds, [MASKS["sinks and window"], catalog.method("lean_attention")])
    assert gap(feeds, together.outs, alone.outs) <= 1e-5


def test_everything_at_once():
    """A mask, sparse prefill, a policy, edits where weights are known, and an observer, against one oracle."""
    model, _ = build("llama")
    feeds, mask = script((20, 1, 1, 4, 1), PADS), "sinks and window"
    edits = [Edit(Site("scores", layers=1, heads=(0, 3), phase="decode"), "scale", 0.3),
             Edit(Site("z", layers=2, heads=1), "scale", 0.5)]  # fmt: skip
    policy = catalog.method("streaming_llm", sinks=3, window=8)
    others = [MASKS[mask], catalog.method("lean_attention"), *edits, Observer("top1", Site(phase="decode"))]
    tape = play(model, policy, feeds, others)
    change = by_hand(*edits, feeds=feeds)

    def both(layer, quantity, x, seen):
        return hidden_too(RULES[mask], feeds)(layer, quantity, change(layer, quantity, x, seen), seen)

    assert gap(feeds, tape.outs, hide(model, feeds, tape.reads, both)) <= NEAR


def test_edits_beside_sparse_prefill_act_where_weights_are_known():
    model, _ = build("llama")
    feeds, policy = script((20, 1, 1), (0, 6)), catalog.method("snapkv", budget=9, window=3)
    edit = Edit(Site(layers=1, heads=(0, 2), phase="decode"), "scale", 0.2)
    alone = play(model, policy, feeds, [edit])
    together = play(model, policy, feeds, [catalog.method("lean_attention"), edit])
    assert gap(feeds, together.outs, alone.outs) <= 1e-5
    for touching in (Edit(Site(layers=1), "scale", 0.2), Observer("last_row")):
        with pytest.raises(
            Unsupported, match=r"lean_attention at model\.layers.*builds no attention weights"
        ):
            play(model, policy, feeds, [catalog.method("lean_attention"), touching])


# -- what cannot act together


def test_refusals_name_what_they_refuse():
    model, inputs = build("llama")
    before = state(model)
    with pytest.raises(Unsupported, match="linear_attention takes the place of attention"):
        attach(model, ["linear_attention", window(4)])
    with pytest.raises(Unsupported, match="second mechanism"):
        attach(model, ["lean_attention", "softmax", "snapkv"])
    with pytest.raises(Unsupported, match="longheads has an attention of its own, and lean_attention"):
        attach(model, ["lean_attention", "longheads"])
    with pytest.raises(Unsupported, match="longheads has an attention of its own, which would leave"), \
            attach(model, [window(4), "longheads"]):  # fmt: skip
        run(model, inputs)
    with pytest.raises(ValueError, match="heads of the mask"), attach(model, striped(heads=3)):
        run(model, inputs)
    user_mask = torch.ones(12, 12).tril().bool()[None, None]
    with pytest.raises(Unsupported, match="4-D mask of your own"), attach(model, window(4)):
        run(model, dict(**inputs, attention_mask=user_mask))
    assert state(model) == before


def test_a_mask_on_an_encoder_and_a_decoder():
    for family in ("whisper", "t5"):
        with pytest.raises(Unsupported, match="encoder-decoder"):
            attach(build(family)[0], window(4))


def test_a_mask_on_an_encoder():
    model, inputs = build("bert")
    with attach(model, catalog.method("window", window=5, ahead=2)), torch.no_grad():
        out = model(**inputs, output_attentions=True)
    n = inputs["input_ids"].shape[1]
    age = torch.arange(n)[:, None] - torch.arange(n)
    hidden = (age < -2) | (age >= 3)
    asked = inputs["attention_mask"].bool()[:, None, :, None]
    assert len(out.attentions) == model.config.num_hidden_layers
    for w in out.attentions:
        assert not (w * asked)[hidden.expand_as(w)].any()
        assert float((w * asked).sum()) > 0


def test_a_mask_that_is_never_asked():
    model, _ = build("llava")
    with pytest.raises(NeverFired, match="never asked"), attach(model, window(4), where="vision"):
        run(model, dict(input_ids=ids(1, 5)))
