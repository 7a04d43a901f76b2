"""What the battery leaves out: Florence-2's modules, the released roles, whose turn a layer is, who reads whom."""

import pytest
import torch
from torch.testing import assert_close
from transformers.models.florence2 import modeling_florence2
from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig

from regard import catalog
from regard.core import Unsupported
from regard.core.call import Call

PAGE = catalog.get("davit")
PATHS = (PAGE.reference, PAGE.fast)
SIDES = (5, 8)
HEADS, WIDTH = 3, 4


def drawn(value=WIDTH):
    g = torch.Generator().manual_seed(0)
    widths = (WIDTH, WIDTH, value)
    return [torch.randn(2, HEADS, 40, d, generator=g, dtype=torch.float64) for d in widths]


def ask(path, tensors, **settings):
    return path(*tensors, PAGE.configure(**settings), Call("self", grid=SIDES))[0]


def moved(path, tensors, which, place, **settings):
    """The places whose outputs move when one token's query, key or value does."""
    other = [t.clone() for t in tensors]
    other[which][:, :, place] += torch.arange(1.0, 1 + other[which].shape[-1], dtype=torch.float64)
    apart = ask(path, other, **settings) - ask(path, tensors, **settings)
    return {*(apart.abs().amax((0, 1, 3)) > 1e-12).nonzero().flatten().tolist()}


def module(kind):
    torch.manual_seed(0)
    config = Florence2VisionConfig(
        embed_dim=(HEADS * WIDTH,),
        num_heads=(HEADS,),
        num_groups=(HEADS,),
        depths=(1,),
        window_size=3,
        qkv_bias=False,
    )
    config._attn_implementation = "sdpa"
    return getattr(modeling_florence2, f"Florence2Vision{kind}Attention")(config, 0).double()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Window", {"window": 3, "scale": "places"}),
        ("Channel", {"layer": 1, "layers": 2, "scale": "places"}),
    ],
)
def test_it_is_florence_2(kind, settings):
    """Its modules between their projections; windows of 3 x 3 on 5 x 8, filled up with zeros in both."""
    florence, x = module(kind), torch.randn(2, 40, HEADS * WIDTH, dtype=torch.float64)
    wanted = florence(x.unflatten(1, SIDES) if kind == "Window" else x)
    q, k, v = (t.unflatten(2, (HEADS, WIDTH)).transpose(1, 2) for t in florence.qkv(x).chunk(3, -1))
    for path in PATHS:
        out = ask(path, (q, k, v), **settings).transpose(1, 2).flatten(2)
        assert_close(florence.proj(out), wanted, rtol=1e-10, atol=1e-10)


def test_roles_of_the_released_code():
    """A = softmax((k/√D)ᵀ v), o = (A qᵀ)ᵀ: the values weigh, and the queries are what is mixed."""
    q, k, v = drawn()
    a = ((k * WIDTH**-0.5).mT @ v).softmax(-1)
    for path in PATHS:
        out = ask(path, (q, k, v), attention="channel", roles="code")
        assert_close(out, (a @ q.mT).mT, rtol=1e-10, atol=1e-10)
        assert moved(path, (q, k, v), 0, 11, attention="channel", roles="code") == {11}


def test_layers_take_turns_unless_one_of_them_is_asked_for():
    tensors = drawn()
    for path in PATHS:
        one = {name: ask(path, tensors, attention=name, window=3) for name in ("window", "channel")}
        for layer in range(4):
            depth = {"layer": layer, "layers": 4, "window": 3}
            own = ("window", "channel")[layer % 2]
            assert torch.equal(ask(path, tensors, **depth), one[own])
            for name, wanted in one.items():
                assert torch.equal(ask(path, tensors, attention=name, **depth), wanted)
        assert not torch.equal(*one.values())


def test_a_window_reads_itself_and_a_channel_all_places():
    tensors, everywhere = drawn(), {*range(40)}
    for path in PATHS:
        for y, x in ((0, 0), (1, 2), (2, 3), (4, 7)):
            place = 8 * y + x
            window = {i for i in everywhere if (i // 8 // 3, i % 8 // 3) == (y // 3, x // 3)}
            for which, read in enumerate(({place}, window, window)):
                assert moved(path, tensors, which, place, window=3) == read
            # all queries and keys are in the weights, which mix the channels of each token's own value
            for which, read in enumerate((everywhere, everywhere, {place})):
                assert moved(path, tensors, which, place, attention="channel") == read
            assert moved(path, tensors, 0, place, attention="window", window=None) == {place}


def test_a_large_image_leaves_float16_in_its_range():
    """Sums over tokens, 90,000 here, pass what float16 holds; the weights and the output do not."""
    g = torch.Generator().manual_seed(0)
    for scale in ("width", "places"):
        q = torch.rand(1, 1, 10_000, 2, generator=g).half() * 6
        call = Call("self", grid=(100, 100))
        cfg = PAGE.configure(attention="channel", scale=scale)
        wanted = PAGE.reference(*3 * [q.double()], cfg, call)[0]
        out = PAGE.fast(q, q, q, cfg, call)[0]
        assert out.dtype == torch.float16
        assert_close(out.double(), wanted, rtol=2e-3, atol=2e-3)


def test_what_has_no_meaning_is_refused():
    tensors = drawn(value=WIDTH + 1)
    for path in PATHS:
        assert ask(path, tensors, window=3).shape == (2, HEADS, 40, WIDTH + 1)
        with pytest.raises(Unsupported, match="not 4 and 5"):
            ask(path, tensors, attention="channel")
    for settings in ({"attention": "both"}, {"roles": "x"}, {"scale": "x"}, {"window": 0}, {"layer": 1}):
        with pytest.raises(ValueError, match="must hold"):
            PAGE.config(**settings)
