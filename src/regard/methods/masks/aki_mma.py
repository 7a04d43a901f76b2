"""Modality-mutual attention: the tokens of an image also see the question that is asked about it.

    i sees j  if  j ≤ i,  or  i is of an image, j is a word, and both are of the same question

In a causal decoder an image that stands before its question is read without knowing what will be asked. Only the
columns of the question are unlocked, never those of the answer: an answer is still predicted from what stands before.

The role `question` numbers the questions from 1: its words carry the number, and so do the image tokens that it is
asked about; all else (the system's words, the answers) has -1. Two images of one turn see the same question, an image
of the next turn its own. Two patches, a question of two words, the answer:

>>> from regard.core.roles import Roles
>>> turn = Roles(image=[1, 1, 0, 0, 0], question=[1, 1, 1, 1, -1])
>>> build(Config()).dense(5, roles=turn).int()[0, 0]
tensor([[1, 0, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1]], dtype=torch.int32)
"""

from dataclasses import dataclass

from torch import Tensor

from regard.core import Card
from regard.core.mask import Coordinates, Mask, causal, predicate
from regard.kinds.mask import MaskPage


@dataclass(frozen=True)
class Config:
    """Nothing to set: the roles say which words are asked about which image."""


@predicate("image", "question")
def image_sees_question(at: Coordinates) -> Tensor:
    question = at.q_role("question")
    image_to_word = (at.q_role("image") > 0) & (at.k_role("image") <= 0)
    return image_to_word & (question > 0) & (question == at.k_role("question"))


def build(cfg: Config) -> Mask:
    return causal() | image_sees_question()


METHOD = MaskPage(
    config=Config,
    build=build,
    looks_ahead=True,
    patterns=("causal_self",),
    card=Card(
        title="Modality-mutual attention (AKI)",
        paper="Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for Multimodal "
        "LLMs (2025)",
        year=2025,
        idea="image tokens see the question that follows them; answers stay causal",
        cost="as causal, and image tokens times words of their question",
        state="all keys",
        needs=("image", "question"),
        lineage=("causal", "prefix"),
        caveat=(
            "AKI is trained with it: on a model that was not, it shifts the inputs. The patches of an image stay "
            "causal among each other, as in the released code, which knows one image and one turn and takes "
            "everything between the image and the answer as the question; several images and turns are ours. "
            "The prompt is read in one pass, whole; after it rows are causal. Roles that grow carry on the last "
            "label: the last token of a prompt, such as the tag before the answer, is of no question"
        ),
    ),
)
