"""Blocks: whole layers with their own projections, norms, gates and channel mixing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from regard.core import Kind, Page, Unsupported
from regard.core.call import Call, check_tokens
from regard.core.grid import OnGrid, grid_of
from regard.ops.precision import as_written


@dataclass(frozen=True, eq=False)
class BlockPage(Page):
    """A whole layer as pure functions: reference(x, cfg, call) -> (out [B, N, C], state)

    x           [B, N, C]; out has its shape and dtype, the residual included
    call        a core Call: params, initial_state, key_mask [B|1, 1, N] (True = a token, False = padding)
    init        init(cfg, dims) -> params, dims = {"width": C, "heads": H}
    state_size  state_size(cfg, dims, n) -> numbers held for one row of the batch after n tokens

    A page that differs by depth has the settings `layer` and `layers`. State comes and goes as for a Mechanism.
    patterns    ("self",) for a block in which all tokens may see all; it has no state. Others are causal_self
    grid        what a block for images needs of the grid of its tokens; call.grid has its sides. Such a block is for
                the pattern self and takes no masks
    for_tokens  for_tokens(cfg, n) -> the settings for n tokens, of a block whose settings fix their number. Another
                number is refused, and so are masks
    speed_settings change the speed, never the result; exempt are laws that do not hold for it, with the reason.
    """

    reference: Callable = None  # type: ignore[assignment]
    fast: Callable | None = None
    init: Callable | None = None
    speed_settings: tuple[str, ...] = ()
    state_size: Callable | None = None
    grid: OnGrid | None = None
    for_tokens: Callable[[Any, int], Any] | None = None
    exempt: Mapping[str, str] = field(default_factory=dict)
    kind = "block"

    def __post_init__(self) -> None:
        for path in ("reference", "fast"):
            if (function := getattr(self, path)) is not None:
                object.__setattr__(self, path, as_written(function))

    @property
    def pattern(self) -> str:
        """The one pattern that it is asked."""
        return "self" if self.grid is not None or self.patterns == ("self",) else "causal_self"


def make_call(
    page: BlockPage, cfg: Any, x: Tensor, params: Mapping[str, Tensor], *, key_mask: Tensor | None = None,
    initial_state: Any = None, roles: Any = None,
) -> Call:  # fmt: skip
    """The Call of a block for x [B, N, C]; a block for images is told the grid of its tokens by `roles`."""
    grid = grid_of(page.grid, cfg, roles, x.shape[1], key_mask is not None)
    check_tokens(page.for_tokens, cfg, x.shape[1], key_mask is not None)
    if page.pattern == "self" and initial_state is not None:
        raise Unsupported("only causal_self carries a state")
    return Call(page.pattern, key_mask, initial_state=initial_state, params=params, roles=roles, grid=grid)


KIND = Kind(
    name="block",
    page=BlockPage,
    says="a whole layer with its own projections, norms and gates",
    verb="regard.nn.RegardForCausalLM(regard.nn.RegardConfig(mechanisms=NAME)); for images "
    "regard.nn.VisionBackbone(mechanism=NAME)",
    room="methods/blocks",
    costs=True,
    checks="regard.testing.block:check_block_page",
)
