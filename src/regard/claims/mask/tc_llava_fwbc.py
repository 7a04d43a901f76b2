"""TC-LLaVA's claim on its frame-wise mask, in a stack of random layers: what does an edited frame change?"""

import torch
from torch import Tensor, nn

from regard.claims.lab import difference, generator, seeded
from regard.core.claim import Claim, Measured
from regard.core.mask import causal
from regard.core.roles import Roles
from regard.methods.masks import tc_llava_fwbc as page
from regard.nn.attention import Attention

FRAMES, PATCHES, BEFORE, AFTER = 5, 9, 3, 4
LAYERS, HEADS, WIDTH = 3, 4, 64


def video() -> Roles:
    """Some words, a video, some words."""
    frame = torch.arange(FRAMES).repeat_interleave(PATCHES)
    return Roles(frame=nn.functional.pad(frame, (BEFORE, AFTER), value=-1))


def states(layers: list[Attention], x: Tensor, roles: Roles) -> list[Tensor]:
    """[N, WIDTH] after each layer."""
    after = []
    for layer in layers:
        x = x + layer(nn.functional.layer_norm(x, x.shape[-1:]), roles=roles)[0]
        after.append(x[0])
    return after


@torch.no_grad()
def measure() -> Measured:
    roles = video()
    frame, n = roles["frame"], roles.length
    with seeded(0):
        layers = [
            Attention(WIDTH, HEADS, "softmax", "self", mask=page.build(page.Config())) for _ in range(LAYERS)
        ]
    x = torch.randn(1, n, WIDTH, generator=generator(1))
    plain = states(layers, x, roles)
    backward, within = 0.0, []
    for f in range(FRAMES):
        mine = (frame == f).nonzero().flatten()
        for patch in mine:
            edited = x.clone()
            edited[:, patch] = torch.randn(WIDTH, generator=generator(2))
            changed = states(layers, edited, roles)
            earlier = [difference(a[: mine[0]], b[: mine[0]]) for a, b in zip(changed, plain, strict=True)]
            backward = max(backward, *earlier)
        # the last patch was edited last: what of it reached the first patch of the frame, in one layer
        within.append(difference(changed[0][mine[0]], plain[0][mine[0]]))
    seen = page.build(page.Config()).dense(n, roles=roles)[0, 0]
    words = frame < 0
    same_rows = torch.equal(seen[words], causal().dense(n)[0, 0][words])
    numbers = {
        "change_of_what_lies_before_the_edited_frame": backward,
        "smallest_change_of_the_first_patch_by_the_last": min(within),
        "text_rows_equal_tril": int(same_rows),
        "text_rows": int(words.sum()),
        "pairs_ahead": int((seen & ~causal().dense(n)[0, 0]).sum()),
    }
    parts = {
        "nothing before the edit": backward == 0,
        "within the frame": min(within) > 1e-4,
        "rows of words": same_rows,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="tc_llava_fwbc",
    statement=(
        "editing a frame leaves every state before it identical, in every layer, while its last patch changes its "
        "first one; rows of words are plain causal rows"
    ),
    bound="edit of a later frame: largest change == 0; within the frame > 1e-4; rows of words bit-identical to tril",
    measure=measure,
)
