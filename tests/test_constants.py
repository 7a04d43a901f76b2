"""Constants of speed: all of them are known, and made small they change no number."""

import re
from pathlib import Path

import pytest
import torch

import regard
from regard import catalog
from regard.core import Edit, Observer, Site
from regard.ops.machine import products_in
from regard.ops.softmax import explicit, times
from regard.testing.cache.oracle import gap, hide
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
