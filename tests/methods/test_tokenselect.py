"""TokenSelect's vote by hand."""

import torch

from regard import catalog
from regard.ops import View


def test_a_head_that_looks_at_the_sink_has_a_whole_vote():
    """Head 0 gives all but a thousandth to the first token, which is read in any case, and the rest to token 3.

    Head 1 divides its vote among 3, 4 and 5, with a little more for 4: together most is for 3.
    """
    method = catalog.method("tokenselect", budget=3, init=1, local=1, k=1, reuse=None)
    s = torch.full((2, 8), -20.0)
    s[0, 0], s[0, 3] = 7.0, 0.0
    s[1, 3], s[1, 4], s[1, 5] = 0.0, 0.2, 0.0
    k = torch.eye(8)[None, None]
    view = View(
        q=s[None, :, None], k=k, v=k, index=torch.arange(8)[None, None], real=None, scale=1.0, seen=8,
        budget=torch.tensor([3]), groups=1, phase="decode",
    )  # fmt: skip
    assert sorted(method.page.select(view, method.config)[0, 0].tolist()) == [0, 3, 7]
