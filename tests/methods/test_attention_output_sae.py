"""Attention-output SAEs: the sum law on models, splicing, training, files, and the loss by loops."""

import pytest
import torch
from torch.testing import assert_close

from regard.attaching.attachment import attach
from regard.claims.tracing import attention_output_sae as claim
from regard.core import Edit, NeverFired, Observer, Site
from regard.explaining import sae as made
from regard.explaining.sae_training import Learner, quality, train
from regard.methods.tracing import attention_output_sae as page
from regard.testing import zoo

FAMILIES = ("llama", "gemma3", "gpt2")
LAYER = 1


def tiny(family: str, seed: int = 0):
    """(model, ids [2, 12], an SAE of random numbers for its layer 1)."""
    model, _ = zoo.build(family)
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 118, (2, 12), generator=g)
    z = made.head_outputs(model, LAYER, [ids])
    width = z.shape[1] * z.shape[2]
    draw = lambda *shape: torch.randn(*shape, generator=g) * z.std()  # noqa: E731
    parts = page.Dictionary(draw(20, width), draw(20), draw(20, width), draw(width))
    return model, ids, made.SAE(parts, LAYER, z.shape[1])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_attributions_sum_to_the_pre_activation(family):
    model, ids, sae = tiny(family)
    z = made.head_outputs(model, LAYER, [ids]).flatten(1).view(*ids.shape, -1)
    wanted = page.pre_activations(sae.dictionary, z)
    parts = made.attribute(model, sae, ids, range(20))
    by_source, biases = parts["by_source"], parts["b_dec"] + parts["b_enc"]
    assert by_source.shape == (2, 12, 20, sae.heads, 12)
    assert_close(by_source.sum((-1, -2)) + biases, wanted, rtol=0, atol=1e-5)
    assert_close(parts["by_head"].sum(-1) + biases, wanted, rtol=0, atol=1e-5)
    assert_close(by_source.sum(-1), parts["by_head"], rtol=0, atol=1e-5)
    assert_close(parts["features"], wanted.relu(), rtol=0, atol=1e-5)
    later = torch.ones(12, 12).triu(1).bool()
    assert by_source.permute(1, 4, 0, 2, 3)[later].abs().max() == 0


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_source_is_what_hiding_its_value_takes_away(family):
    """By source, found another way: the same attention, in which one token has no weight, changes z by its part."""
    model, ids, sae = tiny(family)
    parts = made.attribute(model, sae, ids, [3, 7])
    site = Site("weights", layers=LAYER, keys=4)
    with attach(model, [Edit(site, "scale", 0.0), Observer("z", made.site(LAYER), name="z")]) as attached:
        model(ids, use_cache=False)
    without = page.pre_activations(sae.dictionary, attached.records["z"][0][2].transpose(1, 2).flatten(2))
    whole = (parts["by_head"].sum(-1) + parts["b_dec"] + parts["b_enc"]) - without[..., [3, 7]]
    assert_close(parts["by_source"][..., 4].sum(-1), whole, rtol=0, atol=1e-5)
    assert whole.abs().max() > 1e-3


@torch.no_grad()
def test_rows_and_padding():
    model, ids, sae = tiny("llama")
    every = made.attribute(model, sae, ids, [5, 2])
    some = made.attribute(model, sae, ids, [5, 2], rows=[3, -1])
    assert_close(some["by_source"], every["by_source"][:, [3, 11]])
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[:, :3] = 0
    padded = {"input_ids": torch.cat([torch.zeros_like(ids[:, :3]), ids], 1), "attention_mask": mask}
    moved = made.attribute(model, sae, padded, [5, 2], rows=range(3, 15))
    assert_close(moved["by_source"][..., 3:], every["by_source"], rtol=0, atol=1e-5)
    assert_close(made.head_outputs(model, LAYER, [padded]), made.head_outputs(model, LAYER, [ids]))
    a, b = made.recovered(model, sae, [padded]), made.recovered(model, sae, [ids])
    assert a["sae"] == pytest.approx(b["sae"], abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_spliced_without_a_change_the_model_is_the_same_to_the_last_bit(family):
    model, ids, sae = tiny(family)
    plain = model(ids).logits
    with attach(model, made.Splice(sae)):
        assert torch.equal(model(ids).logits, plain)
    with attach(model, made.Splice(sae, error=False)):
        assert (model(ids).logits - plain).abs().max() > 1e-3
    assert torch.equal(model(ids).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_moves_z_by_the_features_direction(family):
    model, ids, sae = tiny(family)
    looking = Observer("z", made.site(LAYER), name="z")
    with attach(model, looking) as attached:
        model(ids)
    z = attached.records["z"][0][2]
    with attach(model, [looking, made.Splice(sae, {4: 2.5})]) as attached:
        model(ids)
    moved = (attached.records["z"][0][2] - z).transpose(1, 2).flatten(2)
    old = sae.encode(z)[..., 4]
    assert_close(moved, (2.5 - old)[..., None] * sae.dictionary.w_dec[4], rtol=0, atol=1e-5)
    with attach(model, [looking, made.Splice(sae, lambda features: 0 * features, error=False)]) as attached:
        model(ids)
    only_bias = attached.records["z"][0][2].transpose(1, 2).flatten(2)
    assert_close(only_bias, sae.dictionary.b_dec.expand_as(only_bias))


@torch.no_grad()
def test_a_splice_acts_on_single_tokens_too_and_says_when_it_never_did():
    model, ids, sae = tiny("llama")
    with attach(model, made.Splice(sae, error=False)):
        whole = model(ids).logits
        out = model(ids[:, :8], use_cache=True)
        steps = [out.logits]
        for i in range(8, 12):
            steps.append(model(ids[:, i : i + 1], past_key_values=out.past_key_values).logits)
    assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-4)
    with (
        pytest.raises(NeverFired, match="layer 9"),
        attach(model, made.Splice(made.SAE(sae.dictionary, 9, 4))),
    ):
        model(ids)


@torch.no_grad()
def test_cross_entropies_are_those_of_a_splice():
    model, ids, sae = tiny("llama")
    found = made.recovered(model, sae, [ids[:1], ids[1:]])
    for name, splice in (("model", made.Splice(sae)), ("sae", made.Splice(sae, error=False))):
        with attach(model, splice):
            assert model(ids, labels=ids).loss.item() == pytest.approx(found[name], abs=1e-5)
    assert found["recovered"] == (found["zero"] - found["sae"]) / (found["zero"] - found["model"])


def test_the_loss_is_summed_over_dimensions_and_averaged_over_tokens():
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    sae, z = page.Dictionary(draw(5, 6), draw(5), draw(5, 6), draw(6)), draw(7, 6)
    wanted = 0.0
    for x in z:
        f = [max(0.0, float(w @ (x - sae.b_dec) + b)) for w, b in zip(sae.w_enc, sae.b_enc, strict=True)]
        y = sum((v * d for v, d in zip(f, sae.w_dec, strict=True)), sae.b_dec)
        wanted += (float(((x - y) ** 2).sum()) + 0.3 * sum(f)) / 7
    assert page.loss(sae, z, page.encode(sae, z), 0.3).item() == pytest.approx(wanted, abs=1e-12)


def planted(tokens: int = 4000, scale: float = 3.0):
    """Sparse sums of 12 directions in 8 dimensions."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(12, 8, generator=g), dim=-1)
    on = torch.rand(tokens, 12, generator=g) < 0.1
    return scale * (on * (1 + torch.rand(tokens, 12, generator=g))) @ directions, directions


def test_training_finds_planted_directions_whatever_the_size_of_z():
    z, directions = planted()
    config = page.Config(l1=0.6, expansion=4, rate=1e-2, batch=256)
    schedule = made.linear_to(0.0)
    sae, report = train(z, config, 400, 4, schedule, seed=0)
    assert_close(sae.w_dec.norm(dim=-1), torch.ones(32))
    assert report["explained"] > 0.9 and report["l0"] < 7 and report["features"] == 32
    assert ((directions @ sae.w_dec.T).amax(1) > 0.9).all()
    larger, again = train(100 * z, config, 400, 4, schedule, seed=0)
    assert again["l0"] == pytest.approx(report["l0"], rel=0.05)
    assert_close(page.encode(larger, 100 * z), 100 * page.encode(sae, z), rtol=0, atol=1e-2)


def test_dead_features_begin_anew():
    z, _ = planted()
    learner = Learner(z, page.Config(l1=0.3, expansion=4, rate=1e-2, batch=256), 40, 1, seed=0)
    with torch.no_grad():
        learner.dictionary.b_enc[:5] = -1e3
    made_before = learner.dictionary.w_dec[:5].clone()
    for step in range(20):
        learner.optimizer.zero_grad()
        learner.gradients(learner.loss_at(step), list(learner.dictionary))
        w = learner.dictionary.w_dec
        assert (w.grad * w).sum(-1).abs().max() < 1e-3 * w.grad.norm(dim=-1).max()
        learner.optimizer.step()
        learner.after_step(step, 0.0)
    assert learner.resampled == [5]
    assert (learner.dictionary.b_enc[:5].abs() < 1).all()
    assert not torch.allclose(learner.dictionary.w_dec[:5], made_before)
    assert learner.optimizer.state[learner.dictionary.w_enc]["exp_avg_sq"][:5].abs().max() == 0
    assert quality(learner.dictionary, z)["dead"] <= 1


def test_fitted_on_a_model_saved_and_loaded(tmp_path):
    model, ids, _ = tiny("gemma3")
    sae = made.fit_sae(model, LAYER, [ids], page.Config(expansion=2, batch=16), steps=8, resamples=1)
    assert sae.dictionary.w_enc.shape == (64, 32) and sae.heads == 4 and sae.report["tokens"] == 24
    sae.save(tmp_path / "sae.safetensors")
    back = made.load_sae(tmp_path / "sae.safetensors")
    assert back.layer == LAYER and back.report == sae.report
    assert all(torch.equal(a, b) for a, b in zip(back.dictionary, sae.dictionary, strict=True))


def test_bad_input_is_refused():
    model, ids, sae = tiny("llama")
    with pytest.raises(ValueError, match="multiple of the heads"):
        made.SAE(sae.dictionary, LAYER, 5)
    with pytest.raises(ValueError, match="w_enc"):
        made.SAE(sae.dictionary._replace(b_enc=torch.zeros(3)), LAYER, 4)
    with pytest.raises(ValueError, match="features from 0 to 19"):
        made.Splice(sae, {20: 0.0})
    with pytest.raises(ValueError, match="in this layer"):
        made.head_outputs(model, 7, [ids])
    with pytest.raises(ValueError, match="one batch or more"):
        made.head_outputs(model, LAYER, [])
    with pytest.raises(ValueError, match="KV heads"):
        page.measure(sae.dictionary, torch.ones(1, 4, 2, 8), torch.ones(1, 4, 2, 2), torch.ones(1, 3, 2, 8))
    with pytest.raises(ValueError, match="l1 >= 0"):
        page.Config(l1=-1)


def test_rows_of_the_claim_repeat_what_they_say_and_nothing_else():
    ids, periods = claim.repeats("train", 6)
    copy = claim.in_copy(periods)
    for row, p, inside in zip(ids.tolist(), periods.tolist(), copy.tolist(), strict=True):
        assert [token in row[:i] for i, token in enumerate(row)] == inside and sum(inside) == p
        assert all(row[i] == row[i - p] for i in range(len(row)) if inside[i])
