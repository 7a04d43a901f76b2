"""Cache pages: the public checks on every page of the catalogue, planted faults that they must find, StreamingLLM."""

from dataclasses import dataclass, replace

import pytest
import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from regard import catalog
from regard.attaching import slots, views
from regard.attaching.attachment import attach
from regard.attaching.lazy_mask import MaskRule
from regard.attaching.ledger import LedgerLayer, Pending
from regard.attaching.policy import CachePolicy
from regard.attaching.rotary import Rotary
from regard.attaching.slots import Group
from regard.core import Card, Method, Observer, Unsupported, edit
from regard.kinds.cache import CachePage
from regard.ops import Kept, View, gather_rows, keep_best, slots_of, top_slots
from regard.testing.cache import check_cache
from regard.testing.cache.oracle import gap, hide
from regard.testing.cache.script import FAMILIES, NEAR, held, ledgers, play, script
from regard.testing.zoo import DECODERS, build

# -- policies of this file: the newest tokens, and a choice of what to read


@dataclass(frozen=True)
class Config:
    budget: int | float | str | None = 8


def newest(view: View, extra: int = 0) -> Kept | None:
    stays = view.hold() & (view.age() < view.budget[:, None, None] + extra)
    return Kept(slots_of(stays)) if view.over() else None


def page(**functions) -> Method:
    card = Card("Mine", "none", 2026, "a policy of this test", neutral={"budget": 1.0})
    return Method("mine", CachePage(config=Config, card=card, budget=lambda cfg: 1.0, **functions), Config())


def window(view: View, cfg: Config) -> Kept | None:
    return newest(view)


def important(view: View, cfg: Config) -> Kept | None:
    view.notes("sum").add_(view.received())
    return keep_best(view, view.notes("sum"), always=view.age() < 1)


def fickle(view: View, cfg: Config) -> Kept | None:
    before = view.notes("last").clone()
    view.notes("last").copy_(view.received())
    return keep_best(view, before, always=view.age() < 1)


def top(view: View, cfg: Config) -> torch.Tensor | None:
    if view.phase != "decode":
        return None
    return top_slots(view.visible_scores()[:, :, 0], view.budget[:, None])


@pytest.mark.parametrize("made", [page(keep=window), page(keep=important), page(select=top)])
def test_sound_policies_pass(made):
    check_cache(made, families=("llama", "gemma3", "gptoss", "deepseek3"))


@pytest.mark.parametrize("made", [page(keep=important), page(select=top)], ids=["evicting", "selecting"])
@pytest.mark.parametrize("family", ["llava", "qwen25vl", "qwen3vl", "gemma3mm", "qwen3next"])
def test_images_and_hybrid_models(family, made):
    """A prompt with an image, or layers without attention among the others; then steps and a question."""
    model, inputs = build(family)
    length = inputs["input_ids"].shape[1]
    feeds = [{**inputs, "attention_mask": torch.ones(1, length, dtype=torch.long)}]
    for n in (1, 1, 4, 1):
        length += n
        feeds.append(dict(input_ids=torch.randint(3, 118, (1, n)), attention_mask=torch.ones(1, length)))
    for feed in feeds[1:]:
        if family == "gemma3mm":
            feed["token_type_ids"] = torch.zeros_like(feed["input_ids"])
    kinds = [{} if family != "qwen3next" else {"cache": DynamicCache(config=model.config)} for _ in range(3)]
    outs = []
    for how, kind in zip((None, "reads", "nothing"), kinds):
        if hasattr(getattr(model, "model", None), "rope_deltas"):
            model.model.rope_deltas = None
        if how is None:
            tape = play(model, made, no_mask(feeds, family), **kind)
        outs.append(
            tape.outs
            if how is None
            else hide(model, no_mask(feeds, family), tape.reads if how == "reads" else None, **kind)
        )
    assert gap(feeds, outs[0], outs[1]) <= NEAR
    assert gap(feeds, outs[1], outs[2]) > 1e-3


def no_mask(feeds, family):
    """Qwen-VL's own code does not take a 2-D mask in a loop by hand."""
    drop = ("attention_mask",) if family in ("qwen25vl", "qwen3vl") else ()
    return [feeds[0], *({k: x for k, x in feed.items() if k not in drop} for feed in feeds[1:])]


# -- faults planted in a policy


def keeps_padding(view: View, cfg: Config) -> Kept | None:
    return Kept(slots_of((view.index < 4) | (view.age() < 4))) if view.over() else None


def one_too_many(view: View, cfg: Config) -> Kept | None:
    return newest(view, extra=1)


def drops_the_new(view: View, cfg: Config) -> Kept | None:
    stays = view.hold() & (view.age() > 0) & (view.age() <= view.budget[:, None, None])
    return Kept(slots_of(stays)) if view.over() else None


def reads_padding(view: View, cfg: Config) -> torch.Tensor | None:
    ends = [*range(4), *range(view.stored - 4, view.stored)]
    return torch.tensor([[ends]]) if view.phase == "decode" else None


def reads_the_longest_budget(view: View, cfg: Config) -> torch.Tensor | None:
    return (
        top_slots(view.visible_scores()[:, :, 0], int(view.budget.max())) if view.phase == "decode" else None
    )


def never_calm(view: View, cfg: Config) -> Kept | None:
    return Kept(slots_of(view.hold() & (view.age() < 8)))


POLICY_FAULTS = {
    "other tokens than the row alone": page(keep=keeps_padding),
    "the budget is": page(keep=one_too_many),
    "dropped the newest token|other tokens": page(keep=drops_the_new),
    "away from the row alone": page(select=reads_padding),
    r"layer \d reads": page(select=reads_the_longest_budget),
    "should change nothing": page(keep=never_calm),
    "settings too large": page(keep=lambda view, cfg: None),
}


@pytest.mark.parametrize("said", POLICY_FAULTS)
def test_fault_in_a_policy_is_found(said):
    with pytest.raises(AssertionError, match=said):
        check_cache(POLICY_FAULTS[said], families=("llama",))


# -- faults planted in the machinery


def shifted_mask(self, rows, index, at=MaskRule.at):
    return at(replace(self, q_offset=self.q_offset + 1), rows, index)


def tiled_heads(x, heads):
    return x if x.shape[1] in (1, heads) else x.repeat(1, heads // x.shape[1], *[1] * (x.dim() - 2))


def swapped_heads(x, slots):
    return gather_rows(x.flip(1), slots)


def wrong_hole(self, slots):
    self.index = self.table().int()
    self.n -= 1  # whatever went, the newest slot is taken off


def other_rows(self, rows, select=Group.select_rows):
    keys = self.keys
    select(self, rows)
    self.keys = keys if len(keys) == len(rows) else self.keys


def other_notes(self, rows, select=Group.select_rows):
    notes = self.notes
    select(self, rows)
    self.notes = notes


def stored_length(self):
    return self.groups[0].n if self.groups else 0


def padded_budget(self, view, group, budget=CachePolicy.budget):
    return budget(self, replace(view, order=None, real=None), group)


def hoard(x, slots):
    wide = x.new_empty(*x.shape[:2], 400, x.shape[3])
    result = gather_rows(x, slots)
    wide[:, :, : result.shape[2]] = result
    return wide[:, :, : result.shape[2]]


def one_further(self, attention, x, by, queries, rotate=Rotary.rotate):
    return rotate(self, attention, x, by + 1, queries)


def late_keys(self, k, v, start, append=Group.append):
    append(self, k.roll(1, 1), v, start)


def once_evicted_nothing_leaves(self, before, viewed=False, forget=Group.forget):
    return forget(self, before, viewed) if self.index is None else False


STREAM = catalog.method("streaming_llm", budget=8)
MACHINE_FAULTS = {
    "mask off by one": (MaskRule, "at", shifted_mask, page(keep=window), "gemma3"),
    "query heads beside the wrong KV heads": (
        views,
        "per_query_head",
        tiled_heads,
        page(keep=fickle).with_settings(budget=4),
        "gemma3",
    ),
    "keys of another head": (slots, "gather_rows", swapped_heads, page(keep=window), "llama"),
    "the wrong slot goes": (Group, "_drop_one", wrong_hole, page(keep=window), "llama"),
    "keys stay when beams change": (Group, "select_rows", other_rows, page(keep=important), "llama"),
    "notes stay when beams change": (Group, "select_rows", other_notes, page(keep=fickle), "llama"),
    "length stored instead of seen": (
        LedgerLayer,
        "get_seq_length",
        stored_length,
        page(keep=window),
        "llama",
    ),
    "padding in the budget": (CachePolicy, "budget", padded_budget, page(keep=window), "llama"),
    "nothing is freed": (slots, "gather_rows", hoard, page(keep=window), "llama"),
    "positions off by one": (Rotary, "rotate", one_further, STREAM, "llama"),
    "new keys under other heads": (Group, "append", late_keys, page(keep=window), "llama"),
    "what left the window is weighed": (
        Group,
        "forget",
        once_evicted_nothing_leaves,
        page(keep=important),
        "gemma3",
    ),
}


@pytest.mark.parametrize("fault", MACHINE_FAULTS)
def test_fault_in_the_machinery_is_found(fault, monkeypatch):
    owner, name, wrong, method, family = MACHINE_FAULTS[fault]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError):
        check_cache(method, families=(family,))


def test_the_budget_of_a_sliding_layer_is_at_most_its_window():
    seen = {}
    made = page(observe=lambda view, cfg: seen.setdefault(view.layer, view.budget.tolist()))
    play(build("gemma3")[0], made, script(pads=(0, 0)))
    assert seen == {0: [6, 6], 1: [6, 6], 2: [8, 8]}


def test_tokens_that_are_read_again_are_the_same_while_slots_move():
    """Recycled Attention in layers that see 6 tokens: what was read is read again while in reach, and the new token."""
    model, _ = build("mistral")
    tape = play(
        model, catalog.method("recycled_attention", budget=4), script((20, 1, 1, 1, 1, 1), pads=(0, 0))
    )
    for step in (3, 4, 5):  # the first of them, step 2, reads what the full step 1 chose
        for layer in range(3):
            before, now = (tape.reads[s][layer].alive for s in (step - 1, step))
            again = torch.cat([before, torch.ones_like(before[..., :1])], -1)
            again[..., :-6] = False
            assert torch.equal(now, again)
            # of the four that were chosen one may have left the window
            assert step > 3 or bool((before.sum(-1) >= 4).all())


def test_votes_in_a_sliding_layer_are_the_models_own_weights():
    """What has left the window by the end of a prompt had its share of what the queries gave."""
    model, _ = build("mistral")
    feeds, weights, found = script((20,), pads=(0,)), {}, {}

    def note(layer, quantity, x, seen):
        if quantity == "weights":
            weights[layer] = x
        return x

    def noting(view, cfg):
        found[view.layer] = view.received(newest=7), view.index[0, 0]

    hide(model, feeds, change=note)
    play(model, page(keep=noting), feeds)
    for layer, (received, index) in found.items():
        wanted = weights[layer][:, :, -7:].sum(2).unflatten(1, (2, 2)).sum(2)
        assert index.tolist() == [15, 16, 17, 18, 19]
        assert float((received - wanted[..., index]).abs().max()) <= NEAR


def test_notes_travel_with_their_slots():
    """What the checks cannot see, since any policy is allowed to forget: a note stays with its token."""

    def mark(view: View, cfg: Config) -> Kept | None:
        view.notes("index").copy_(view.index.expand(view.q.shape[0], view.groups, -1))
        return important(view, cfg)

    model, _ = build("llama")
    with attach(model, page(keep=mark)) as attached, torch.no_grad():
        cache = Cache(layer_class_to_replicate=DynamicLayer)
        for feed in script():
            model(**feed, past_key_values=cache)
        assert len(ledgers(attached)) == 3
        for layer in ledgers(attached).values():
            for group in layer.groups:
                table = group.table().expand(3, 2, -1)
                assert torch.equal(group.note("index").long()[table >= 0], table[table >= 0])


# -- the ledger by itself


def stored_layer(batch: int = 2, n: int = 5) -> LedgerLayer:
    layer = LedgerLayer()
    k = torch.arange(float(batch * 2 * n)).view(batch, 2, n, 1).expand(-1, -1, -1, 4)
    layer.pending = Pending()
    layer.update(k, -k)
    return layer


def test_rows_carry_memory_and_counts():
    layer = stored_layer(1)
    layer.groups[0].count = torch.ones(1, 2, layer.groups[0].keys.shape[2])
    layer.batch_repeat_interleave(3)
    assert layer.groups[0].count.shape[0] == 3
    layer.memory = {"a": torch.arange(3), (0,): {"b": torch.arange(3)}, "n": 4}
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    assert layer.memory["a"].tolist() == layer.memory[(0,)]["b"].tolist() == [2, 2, 0]


def test_crop_takes_back_until_something_was_evicted():
    layer = stored_layer()
    layer.crop(-2)
    assert (layer.seen, layer.stored()) == (3, [3, 3])
    layer.keep(layer.groups[0], Kept(torch.tensor([[[0, 2]]])))
    with pytest.raises(Unsupported, match="take tokens back"):
        layer.crop(-1)


def test_heads_of_unequal_length_part():
    layer = stored_layer()
    slots = torch.tensor([[[0, 1, 4], [3, 4, -1]]])
    layer.keep(layer.groups[0], Kept(slots))
    assert layer.stored() == [3, 2]
    assert held(layer, 2)[0].tolist() == [[True, True, False, False, True], [False, False, False, True, True]]
    assert layer.bytes_held() < stored_layer().bytes_held()


def test_a_merged_slot_takes_the_index_of_the_first_token_held():
    """Index 0 may be padding in a left-padded row, and would hide it."""
    layer = stored_layer()
    slots, one = torch.tensor([[[0, 4]], [[2, 4]]]), torch.ones(2, 2, 1, 4)
    layer.keep(layer.groups[0], Kept(slots, (one, one, torch.tensor([[[3.0], [3.0]], [[2.0], [0.0]]]))))
    assert layer.groups[0].table()[..., -1].tolist() == [[0, 0], [2, -1]]


def test_every_cache_length_reads_seen():
    layer = stored_layer()
    layer.keep(layer.groups[0], Kept(torch.tensor([[[0, 4]]])))
    assert layer.get_seq_length() == 5
    assert layer.get_mask_sizes(3) == (8, 0)
    layer.reset()
    assert (layer.get_seq_length(), layer.groups, layer.plain) == (0, [], True)


# -- StreamingLLM against independent computations


def test_streaming_llm_holds_sinks_and_window():
    model, _ = build("llama")
    feeds = script()
    tape = play(model, catalog.method("streaming_llm", sinks=2, window=5), feeds)
    for feed, layers in zip(feeds, tape.held):
        for row, mask in enumerate(feed["attention_mask"].bool()):
            real = mask.nonzero()[:, 0].tolist()
            wanted = sorted({*real[:2], *real[-5:]}) if len(real) > 7 else real
            assert len(layers) == 3
            for layer in layers.values():
                assert all((one & mask).nonzero()[:, 0].tolist() == wanted for one in layer[row])


def test_streaming_llm_slots_are_positions():
    """With one layer a key depends on its own token only: the answer is that of the kept tokens as a whole text."""
    torch.manual_seed(0)
    config = build("llama")[0].config
    config.num_hidden_layers = 1
    model = type(build("llama")[0])(config).eval()
    tokens = torch.randint(3, 118, (1, 24))
    with attach(model, "streaming_llm", sinks=2, window=6), torch.no_grad():
        cache = Cache(layer_class_to_replicate=DynamicLayer)
        model(input_ids=tokens[:, :12], past_key_values=cache)
        result = [
            model(input_ids=tokens[:, i : i + 1], past_key_values=cache).logits[0, -1] for i in range(12, 24)
        ]
    with torch.no_grad():
        for i, logits in zip(range(12, 24), result):
            kept = torch.cat([tokens[:, :2], tokens[:, i - 6 : i + 1]], 1)
            assert float((model(input_ids=kept).logits[0, -1] - logits).abs().max()) < 2e-6


def test_streaming_llm_keys_are_raw_keys_at_their_slots():
    """g2 of the proofs: what is stored = k_proj's own output, rotated by hand."""
    model, _ = build("llama")
    raw = [[] for _ in range(3)]
    hooks = [
        layer.self_attn.k_proj.register_forward_hook(lambda m, a, out, i=i: raw[i].append(out))
        for i, layer in enumerate(model.model.layers)
    ]
    with attach(model, "streaming_llm", sinks=2, window=6) as attached, torch.no_grad():
        model.generate(torch.randint(3, 118, (1, 12)), max_new_tokens=12, eos_token_id=None, do_sample=False)
        layers = list(ledgers(attached).values())
    for hook in hooks:
        hook.remove()
    frequency = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    for keys, layer in zip(raw, layers, strict=True):
        index = layer.groups[0].table()[0, 0]
        order = index.argsort()
        k = torch.cat(keys, 1).view(-1, 2, 8).transpose(0, 1)[:, index[order]].double()
        gone = layer.seen - 9  # the last step read sinks, window and the new token
        position = torch.where(index[order] < 2, index[order] + gone, index[order])
        angle = torch.cat([position[:, None] * frequency] * 2, -1)
        half = torch.cat([-k[..., 4:], k[..., :4]], -1)
        result = layer.groups[0].k()[0][:, order]
        assert float((k * angle.cos() + half * angle.sin() - result).abs().max()) < 2e-5


def test_old_names_work_with_a_warning():
    with pytest.warns(DeprecationWarning, match="turns"):
        old = CachePage(config=Config, card=page().page.card, turns=True)
    assert old.rotates
    with pytest.warns(DeprecationWarning, match=r"CachePage\.turns is now CachePage\.rotates"):
        assert old.turns
    with pytest.warns(DeprecationWarning, match="place"):
        assert CachePage(config=Config, card=old.card, place=newest).shift is newest
    with pytest.raises(ValueError, match="not both"):
        CachePage(config=Config, card=old.card, place=newest, shift=newest)
    with pytest.warns(DeprecationWarning, match=r"regard\.core\.edit\.LOOKS"):
        assert edit.LOOKS is edit.STATISTICS
    with pytest.warns(DeprecationWarning, match="look"):
        assert Observer(look="top1") == Observer(statistic="top1")
    q, slot = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, dtype=torch.long)
    view = View(q, q, q, slot, None, 1.0, 1, slot[0, 0], 1, rotate=lambda x, by: x)
    with pytest.warns(DeprecationWarning, match=r"View\.turn is now View\.rotate"):
        assert view.turn is view.rotate
    with pytest.warns(DeprecationWarning, match=r"Observer\.look is now"):
        assert Observer("top1").look == "top1"


def test_neutral_families_are_all_decoders():
    assert set(FAMILIES) <= set(DECODERS)


def test_slots_of_a_sliding_layer_are_found_again_by_the_index_of_their_tokens():
    """Of 6 tokens the last 4 are stored, in slots of no order; what is gone, or was none, is nowhere."""
    index = torch.tensor([[[4, 2, 5, 3]]])
    k = torch.zeros(1, 1, 4, 2)
    view = View(k[:, :, :1], k, k, index, None, 1.0, 6, torch.tensor([6]), 1, window=4)
    tokens = torch.tensor([[[5, 0, 2, 1, -1, 4]]])
    assert view.slots(tokens).tolist() == [[[2, -1, 1, -1, -1, 0]]]
    assert view.tokens(torch.tensor([[[1, 3, -1]]])).tolist() == [[[2, 3, -1]]]
    # a slot that holds nothing yet is no place of a token that was never there
    gone = index.masked_fill(index == 3, -1)
    holes = View(k[:, :, :1], k, k, gone, None, 1.0, 6, torch.tensor([6]), 1, window=4)
    assert holes.slots(torch.tensor([[[3, 7, -1, 5]]])).tolist() == [[[-1, -1, -1, 2]]]
