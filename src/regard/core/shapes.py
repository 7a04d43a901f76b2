"""Axis letters, one each, for the whole library, and the tensor types that public signatures carry.

B batch, H query heads, G KV heads (H is a multiple of G), N queries, M keys, D key width, E value width.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.core.pages import PATTERNS as PATTERNS

Q = Float[Tensor, "B H N D"]
K = Float[Tensor, "B G M D"]
V = Float[Tensor, "B G M E"]
Out = Float[Tensor, "B H N E"]
Scores = Float[Tensor, "B H N M"]
LogSum = Float[Tensor, "B H N"]
MaskTensor = Bool[Tensor, "#B #H #N M"]
Slots = Int[Tensor, "#B #G m"]
SlotScores = Float[Tensor, "#B #G n"]
Alive = Bool[Tensor, "#B #G n"]
State = Float[Tensor, "B H D E"]
