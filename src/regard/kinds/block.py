"""Blocks: whole layers with their own projections, norms, gates and channel mixing."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from regard.core import Kind, Page
from regard.ops.precision import as_written


@dataclass(frozen=True, eq=False)
class BlockPage(Page):
    """A whole layer as pure functions: reference(x, cfg, call) -> (out [B, N, C], state)

    x           [B, N, C]; out has its shape and dtype, the residual included
    call        a core Call: params, initial_state, key_mask [B|1, 1, N] (True = a token, False = padding)
    init        init(cfg, dims) -> params, dims = {"width": C, "heads": H}
    state_size  state_size(cfg, dims, n) -> numbers held for one row of the batch after n tokens

    A page that differs by depth has the settings `layer` and `layers`. State comes and goes as for a Mechanism.
    speed_settings change the speed, never the result; exempt are laws that do not hold for it, with the reason.
    """

    reference: Callable = None  # type: ignore[assignment]
    fast: Callable | None = None
    init: Callable | None = None
    speed_settings: tuple[str, ...] = ()
    state_size: Callable | None = None
    exempt: Mapping[str, str] = field(default_factory=dict)
    kind = "block"

    def __post_init__(self) -> None:
        for path in ("reference", "fast"):
            if (function := getattr(self, path)) is not None:
                object.__setattr__(self, path, as_written(function))


KIND = Kind(
    name="block",
    page=BlockPage,
    says="a whole layer with its own projections, norms and gates",
    verb="regard.nn.RegardForCausalLM(regard.nn.RegardConfig(mechanisms=NAME))",
    room="methods/blocks",
    costs=True,
    checks="regard.testing.block:check_block_page",
)
