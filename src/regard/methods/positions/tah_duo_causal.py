"""Think-at-Hard's duo-causal attention: tokens that iterate see earlier tokens at their own depth and above it.

    slot (p, i)       token p in its iteration i, counted from 0
    (p, i) sees (p', i')  if  p' ≤ p  and  i' ≤ i
    position          p, whatever the slot

A hard token is read again, its input a mixture of embeddings by its own prediction. Later iterations read what all
earlier ones wrote, of this token and of those before it, and the first never reads a later one: it can be computed for
all tokens at once, then the second for those that need it. One iteration of every token is causal attention.

Three tokens of which the middle one iterates, first iterations before second ones:

>>> roles = Roles(token=[0, 1, 2, 1], iteration=[0, 0, 0, 1])
>>> build(Config()).dense(4, roles=roles).int()[0, 0]
tensor([[1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 0, 1]], dtype=torch.int32)
>>> positions(roles, Config())
tensor([0, 1, 2, 1])
"""

from dataclasses import dataclass

from torch import Tensor

from regard.core import Card
from regard.core.mask import Coordinates, Mask, predicate
from regard.core.roles import Roles
from regard.kinds.position import PositionPage


@dataclass(frozen=True)
class Config:
    """Nothing to set: the roles `token` and `iteration` say which token a slot is, and how often it was read before."""


@predicate("token", "iteration")
def duo_causal(at: Coordinates) -> Tensor:
    earlier = at.k_role("token") <= at.q_role("token")
    return earlier & (at.k_role("iteration") <= at.q_role("iteration"))


def build(cfg: Config) -> Mask:
    return duo_causal()


def positions(roles: Roles, cfg: Config) -> Tensor:
    return roles["token"].clamp(min=0)


METHOD = PositionPage(
    config=Config,
    positions=positions,
    build=build,
    patterns=("causal_self",),
    card=Card(
        title="Think-at-Hard (duo-causal attention)",
        paper="Think-at-Hard: Selective Latent Iterations to Improve Reasoning Language Models, arXiv:2511.08577",
        year=2025,
        idea="attention that is causal in the text and in the depth of iteration, so that only hard tokens iterate",
        cost="keys of all shallower iterations: with a share s of the tokens read twice, 1 + s times causal attention",
        state="keys by layer and iteration",
        needs=("token", "iteration"),
        lineage=("causal",),
        caveat=(
            "slots stand in an order in which what is seen comes first: by token, or by iteration. Which tokens "
            "iterate, the low-rank weights of the later iterations, and logits that are added up over them are not "
            "part of the mask. The authors' code hides a key by the smallest finite number, so that a slot that sees "
            "nothing takes a mean"
        ),
    ),
)
