"""Constants of speed: all of them are known, and made small they change no number."""

import re
from pathlib import Path

import pytest
import torch

import regard
from regard import catalog
from regard.core import Edit, Site
from regard.ops.machine import products_in
from regard.ops.softmax import explicit, times
from regard.testing.cache.oracle import gap
from regard.testing.cache.script import NEAR, play, script
from regard.testing.constants import SMALL, small_constants
from regard.testing.zoo import build

ROOT = Path(regard.__file__).parent
SAYS = re.compile(r"changes? (only )?the (speed|memory)|bounds the memory|changes? the speed only")
DEFINED = re.compile(r"^([A-Z][A-Z_0-9]*(?:, [A-Z][A-Z_0-9]*)*)(?:: [^=]+)? = ")


def said():
    """Dotted names of the constants of which a comment, beside or above, says that they change speed or memory."""
    names = set()
    for path in (p for p in ROOT.rglob("*.py") if "testing" not in p.parts):
        module = ".".join(("regard", *path.relative_to(ROOT).with_suffix("").parts))
        lines = path.read_text(encoding="utf8").splitlines()
        for above, line in zip(["", *lines], lines):
            found = DEFINED.match(line)
            words = line.partition("#")[2] + (above if above.startswith("#") else "")
            if found and SAYS.search(words):
                names |= {f"{module}.{name}" for name in found[1].split(", ")}
    return names


def test_every_constant_of_speed_is_known():
    assert said() <= set(SMALL), f"not in regard/testing/constants.py: {sorted(said() - set(SMALL))}"
    with small_constants():
        pass  # each of them is there


EDITS = (
    Edit(Site("scores", layers=1, heads=(0, 3), keys=(2, 9, -1)), "scale", 0.3),
    Edit(Site(layers=(1, 2), heads=(1, 3), keys=(5, 9, 13)), "move", 0.6, to=(2, 10)),
    Edit(Site(layers=2, heads=(1, 2), rows=(-1, -2, 4)), "scale", 1.7),
)


@pytest.mark.parametrize("method", [None, "h2o", "snapkv", "streaming_llm"])
def test_caches_and_edits_in_small_blocks_and_without_slack(method):
    """Prompts, steps and padding: logits, and what is held, are what they are in one block."""
    model, _ = build("llama")
    settings = {None: {}, "snapkv": dict(budget=10, window=3)}.get(method, dict(budget=10))
    policy = None if method is None else catalog.method(method, **settings)
    feeds = script(steps=(20, 1, 4, 1))
    whole = play(model, policy, feeds, EDITS)
    with small_constants():
        parts = play(model, policy, feeds, EDITS)
    assert gap(feeds, parts.outs, whole.outs) <= NEAR
    assert parts.stored == whole.stored
    for one, other in zip(parts.held, whole.held, strict=True):
        assert all(torch.equal(one[layer], other[layer]) for layer in other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("products", ["native", "float32"])
def test_products_with_stored_keys_in_pieces(products, dtype):
    """Heads of their own, pieces widened, dense or a part of a longer buffer: the product."""
    g = torch.Generator().manual_seed(0)
    for batch, groups in ((2, 3), (3, 2), (1, 2)):
        buffer = torch.randn(batch, groups, 40, 6, generator=g).to(dtype)
        for x in (buffer, buffer[:, :, :33]):
            for width, turned in ((6, True), (x.shape[2], False)):
                a = torch.randn(batch, groups, 4, width, generator=g).to(dtype)
                wanted = a.double() @ (x.double().mT if turned else x.double())
                with torch.no_grad(), products_in(products), small_constants():
                    found = times(a, x, turned).double()
                error = (found - wanted).norm() / wanted.norm()
                assert error < (1e-5 if dtype == torch.float32 else 1e-2), (batch, groups, turned, error)


def test_blocks_of_rows_have_their_own_rows_of_masks_and_biases():
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, n, 4, generator=g, dtype=torch.float64) for h, n in ((4, 33), (2, 36), (2, 36))
    )
    for h, n in ((4, 33), (1, 33), (4, 1)):
        mask = torch.rand(2, h, n, 36, generator=g) < 0.5
        bias = torch.randn(2, h, n, 36, generator=g, dtype=torch.float64)
        wanted = explicit(q, k, v, scale=0.5, mask=mask, bias=bias, softcap=2.0)
        with small_constants():
            found = explicit(q, k, v, scale=0.5, mask=mask, bias=bias, softcap=2.0)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
