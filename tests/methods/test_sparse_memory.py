"""Pages that read blocks of a long text hold no matrix of all queries by all keys, neither forward nor backward."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regard import catalog
from regard.core.call import Call

N = 4096
SETTINGS = (
    ("landmark_attention", {"block": 31, "top_k": 2}, True),
    ("landmark_attention", {"block": 31}, False),
    ("core_context_aware", {"group": 16, "local": 128}, True),
    ("combiner", {"block": 64}, True),
    ("routing_transformer", {"clusters": 64}, True),
)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that anything gave."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize(("name", "settings", "learns"), SETTINGS)
@pytest.mark.parametrize("padded", [False, True])
def test_no_tensor_is_as_large_as_all_pairs(name, settings, learns, padded):
    page, g = catalog.get(name), torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, 1, N, 8, generator=g).requires_grad_(learns) for _ in range(3)]
    cfg = page.configure(**settings)
    params = (
        page.init(cfg, {"heads": 1, "kv_heads": 1, "key": 8, "value": 8, "width": 8}) if page.init else {}
    )
    there = torch.arange(N).view(1, 1, -1) >= 100 if padded else None
    with Largest() as largest:
        out = page.fast(*qkv, cfg, Call(params=params, key_mask=there))[0]
        if learns:
            out.sum().backward()
    assert largest.bytes < 4 * N * N / 4
