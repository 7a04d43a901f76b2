"""VisionBackbone: a Hugging Face model around any mechanism or vision block."""

import pytest
import torch
from torch import nn

from regard import catalog
from regard import nn as rnn
from regard.core import Unsupported
from regard.core.grid import sides_of
from regard.core.roles import Roles
from regard.nn import VisionBackbone, VisionConfig

SMALL = dict(image_size=8, patch_size=1, num_channels=1, hidden_sizes=16, depths=1, num_labels=10)
NEAR = "fused_neighborhood_attention:window=3"


def made(seed=0, **settings):
    torch.manual_seed(seed)
    return VisionBackbone(**{**SMALL, **settings}).eval()


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mechanism", ["softmax", "linear_attention", NEAR])
def test_it_is_a_hugging_face_model(mechanism, tmp_path):
    model, x = made(mechanism=mechanism, hidden_sizes=[16, 24], depths=[2, 1]), images(2, 1, 8, 8)
    out = model(x, labels=torch.tensor([3, 4]), output_hidden_states=True)
    assert out.logits.shape == (2, 10) and len(out.hidden_states) == 4
    assert [h.shape[1:] for h in out.hidden_states] == [(64, 16), (64, 16), (16, 24), (16, 24)]
    assert torch.allclose(out.loss, nn.functional.cross_entropy(out.logits, torch.tensor([3, 4])))
    assert model(x, return_dict=False)[0].shape == (2, 10)
    model.save_pretrained(tmp_path)
    assert torch.equal(VisionBackbone.from_pretrained(tmp_path)(x).logits, out.logits)
    rnn.register()
    from transformers import AutoModelForImageClassification

    found = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(found, VisionBackbone) and torch.equal(found(x).logits, out.logits)


def test_a_new_head_is_drawn_and_the_rest_is_the_checkpoint(tmp_path):
    model = made(mechanism="softmax")
    model.save_pretrained(tmp_path)
    other = VisionBackbone.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert other.classifier.weight.shape == (3, 16) and other.classifier.weight.isfinite().all()
    assert other.classifier.weight.abs().max() > 0
    assert torch.equal(other.patches.weight, model.patches.weight)


def test_layers_are_what_the_file_says():
    """x + attention(norm x), then x + MLP(norm x); the mean of the normed tokens."""
    model, x = made(mechanism=NEAR), images(2, 1, 8, 8)
    tokens = model.patches(x).flatten(2).mT + model.places
    (layer,) = model.stages[0]
    tokens = tokens + layer.attention(layer.norm(tokens), roles=Roles.grid(8, 8))[0]
    tokens = tokens + layer.mlp(layer.mlp_norm(tokens))
    wanted = model.classifier(model.norm(tokens).mean(1))
    assert torch.allclose(model(x).logits, wanted, atol=1e-6)


def test_merging_makes_one_token_of_the_four_of_a_square():
    model, x = made(mechanism="softmax", hidden_sizes=[16, 24], depths=[1, 1]), images(1, 64, 16)
    merge = model.merges[0]
    out = merge(x, (8, 8)).view(4, 4, 24)
    square = merge.norm(x).view(8, 8, 16)[2:4, 6:8]
    wanted = torch.einsum("yxc,dcyx->d", square, merge.reduce.weight) + merge.reduce.bias
    assert torch.allclose(out[1, 3], wanted, atol=1e-6)


@pytest.mark.parametrize(("patch", "kernel"), [(1, 3), (2, 4), (4, 8)])
def test_a_stem_that_overlaps_has_a_token_for_each_patch(patch, kernel):
    model = made(mechanism="softmax", stem="overlap", patch_size=patch)
    tokens = model(images(1, 1, 8, 8), output_hidden_states=True).hidden_states[0]
    assert model.patches.kernel_size == (kernel, kernel) and tokens.shape == (1, (8 // patch) ** 2, 16)
    # a pixel is read by its own patch and by that before it, or after it
    for pixel, other in ((patch, 0), (patch - 1, 1)):
        image = torch.zeros(1, 1, 8, 8)
        image[0, 0, 0, pixel] = 1
        change = model.patches(image) - model.patches(torch.zeros(1, 1, 8, 8))
        assert change[0, :, 0, other].abs().max() > 0


def test_a_class_token_is_asked_and_stands_nowhere():
    model, x = made(mechanism="softmax", pooling="class"), images(2, 1, 8, 8)
    out = model(x, output_hidden_states=True)
    assert out.hidden_states[-1].shape == (2, 65, 16)
    assert torch.allclose(out.logits, model.classifier(out.hidden_states[-1][:, 0]))
    assert model.roles((8, 8), x.device)["y"][:3].tolist() == [-1, 0, 0]


def test_places_are_scored_one_by_one():
    model, x = made(mechanism="softmax", pooling="places", image_size=(8, 4)), images(2, 1, 8, 4)
    out = model(x, labels=torch.tensor([31, 0]))
    assert out.logits.shape == (2, 32) and out.loss.isfinite()


def test_images_of_another_size_are_asked_for():
    model = made(mechanism=NEAR)
    with pytest.raises(ValueError, match=r"interpolate_pos_encoding=True for others \(image=\(8, 12\)"):
        model(images(1, 1, 8, 12))
    assert model(images(1, 1, 8, 12), interpolate_pos_encoding=True).logits.shape == (1, 10)
    same = model(images(1, 1, 8, 8), interpolate_pos_encoding=True).logits
    assert torch.equal(same, model(images(1, 1, 8, 8)).logits)


def test_it_compiles_learns_and_checkpoints():
    model, x = made(mechanism=NEAR).train(), images(4, 1, 8, 8)
    labels = torch.tensor([0, 1, 2, 3])
    model(x, labels=labels).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    # the sum of a key and a bias moves no softmax: its gradient is none
    assert all(g.abs().max() > 0 for name, g in wanted.items() if "k_proj.bias" not in name)
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(x, labels=labels).loss.backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, wanted[name], atol=1e-6), name
    model = made(mechanism=NEAR)
    traced = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(traced(x).logits, model(x).logits, atol=1e-6)


def test_half_precision_runs():
    model, x = made(mechanism=NEAR), images(2, 1, 8, 8)
    low = made(mechanism=NEAR).bfloat16()(x.bfloat16()).logits
    assert low.dtype == torch.bfloat16 and torch.allclose(low.float(), model(x).logits, atol=0.05)


BLOCK = """
from dataclasses import dataclass
import torch
from regard.core import Card
from regard.core.grid import OnGrid
from regard.kinds.block import BlockPage


@dataclass(frozen=True)
class Config:
    even: bool = False


def reference(x, cfg, call):
    assert call.sides == (8, 8) and call.pattern == "self"
    return x + x * call.params["by"], None


def fits(cfg, sides):
    if cfg.even and sides[0] % 16:
        raise ValueError(f"sides are multiples of 16 (side={sides[0]})")


METHOD = BlockPage(
    config=Config, reference=reference, init=lambda cfg, dims: {"by": torch.ones(dims["width"])}, patterns=("self",),
    grid=OnGrid(fits), card=Card(title="twice", paper="none", year=2026, idea="twice", cost="O(N)", state="none"),
)
"""


@pytest.fixture
def block(monkeypatch, tmp_path):
    monkeypatch.setattr(catalog, "_registered", {})
    (tmp_path / "twice.py").write_text(BLOCK)
    catalog.register(tmp_path / "twice.py")


def test_a_block_page_is_a_whole_layer(block):
    model, x = made(mechanism="twice"), images(1, 1, 8, 8)
    tokens = model.patches(x).flatten(2).mT + model.places
    assert torch.allclose(model(x).logits, model.classifier(model.norm(2 * tokens).mean(1)), atol=1e-6)
    with pytest.raises(Unsupported, match="whole layer, and has none"):
        made(mechanism="twice", dropout=0.1)


def test_what_does_not_fit_the_grid_is_refused_at_once(block):
    with pytest.raises(ValueError, match=r"multiples of 16 \(side=8\)"):
        made(mechanism="twice:even=true")
    with pytest.raises(ValueError, match="2·dilation <= side"):
        made(mechanism="fused_neighborhood_attention:window=3,dilation=5")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(image_size=9, patch_size=2), r"multiples of a patch.*side=9"),
        (dict(hidden_sizes=[16, 16, 16, 16, 16]), r"multiples of a patch.*side=8, patch=1, multiple=16"),
        (dict(hidden_sizes=[16, 16], depths=[1, 1, 1]), "one for each"),
        (dict(pooling="max"), "pooling is one of"),
        (dict(positions="rotary"), "positions is one of"),
        (dict(stem="convolution"), "stem is one of"),
        (dict(pooling="class", hidden_sizes=[16, 16]), "a class token is for one stage"),
        (dict(dropout=1.0), "0 <= dropout < 1"),
        (dict(depths=0), "depths >= 1"),
        (dict(image_size=[8, 8, 8]), "a side, or rows and columns"),
    ],
)
def test_bad_settings_name_the_rule(settings, message):
    with pytest.raises(ValueError, match=message):
        VisionConfig(**{**SMALL, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(mechanism="snapkv"), "snapkv is a cache page"),
        (dict(mechanism="gam"), "gam does not do self"),
        (dict(mechanism=NEAR, pooling="class"), "on which a class token has no place"),
    ],
)
def test_pages_that_are_not_for_images_are_refused(settings, message):
    with pytest.raises(Unsupported, match=message):
        made(**settings)


def test_what_forward_is_asked_is_used_or_refused():
    model, x = made(mechanism="softmax"), images(2, 1, 8, 8)
    for asked, message in (
        (dict(output_attentions=True), "builds no weights"),
        (dict(bool_masked_pos=x), "takes no 'bool_masked_pos'"),
    ):
        with pytest.raises(Unsupported, match=message):
            model(x, **asked)
    with pytest.raises(ValueError, match=r"labels \[B\] are whole numbers"):
        model(x, labels=torch.zeros(2, 10))
    with pytest.raises(ValueError, match=r"pixel_values is \[B, 1, rows, columns\]"):
        model(images(2, 3, 8, 8))
    with pytest.raises(ValueError, match="a config, or settings by name"):
        VisionBackbone(VisionConfig(), mechanism="softmax")


def test_grids_are_read_off_roles():
    assert Roles.grid(2, 3).sides == (2, 3) and Roles(document=[0, 0]).sides is None
    assert Roles(y=[0, 0, 1, 1], x=[0, 1, 0, 1]).sides == (2, 2)
    assert Roles(x=[0, 1, 2]).sides == (3,) and Roles.grid(2, 3, 4).sides == (2, 3, 4)
    row = [0, 0, 1, 1]
    assert Roles(y=[row, row], x=[[0, 1, 0, 1]] * 2).sides == (2, 2)
    for wrong, message in (
        (Roles(y=[0, 0, 1], x=[0, 1, 0]), "each place once"),
        (Roles(y=[0, 1, 0, 1], x=[0, 0, 1, 1]), "in the order of their places"),
        (
            Roles(y=[[0, 0, 1, 1], [0, 0, 0, 0]], x=[[0, 1, 0, 1], [0, 1, 2, 3]]),
            "images of a batch fill one grid",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            _ = wrong.sides
    with pytest.raises(ValueError, match=r"a place for each token \(grid=\(2, 3\), tokens=5\)"):
        sides_of(Roles.grid(2, 3), 5, (2,))
    with pytest.raises(ValueError, match="axes of its grids are y, x"):
        sides_of(Roles.grid(6), 6, (2,))
    with pytest.raises(ValueError, match="say where they stand"):
        sides_of(None, 6, (2,))
