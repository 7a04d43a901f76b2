"""States: segments, single tokens and padded rows carried on give what the whole gives."""

from dataclasses import replace

import torch

from regard.core.trees import tree_leaves, tree_map
from regard.testing.case import GARBAGE, B, Case, H, NotApplicable, same_states, stores


def check_segments(case: Case, n: int = 33) -> None:
    """State carried over ragged segments gives the whole; the state handed in is left as it was."""
    sizes = (13, 1, 19) if n == 33 else tuple(size for size in (n - 1 - n // 2, 1, n // 2) if size)
    segments(case, sizes, f"segments of {', '.join(map(str, sizes))} tokens = the whole")


def check_decode(case: Case, n: int = 7) -> None:
    """Token by token gives what all at once gives."""
    segments(case, (1,) * n, "token by token = all at once")
    if n > 2:
        segments(case, (n - 2, 1, 1), f"two tokens after a prompt of {n - 2} = all at once")


def segments(case: Case, sizes: tuple[int, ...], law: str) -> None:
    inputs = case.inputs(sum(sizes))
    if case.pattern != "causal_self":
        raise NotApplicable("only causal_self carries a state")
    if case.run(case.page.reference, inputs)[1] is None:
        raise NotApplicable("it returns no state")
    for label, path in case.paths.items():
        wanted, end = case.run(path, inputs)
        state, rows, start = None, [], 0
        for size in sizes:
            before = tree_map(torch.clone, state)
            out, after = case.run(path, inputs.span(slice(start, start + size)), state=state)
            same_states(f"{label}: the state handed in is left as it was", state, before, tol=0)
            state, start = after, start + size
            rows.append(out)
        case.same(f"{label}: {law}", torch.cat(rows, dim=2), wanted)
        case.same_states(f"{label}: {law}", state, end)


def check_padded_state(case: Case) -> None:
    """A text padded on the left and carried on through a state is the text that is not padded."""
    inputs = case.inputs(9)
    if case.pattern != "causal_self":
        raise NotApplicable("only causal_self carries a state")
    if case.run(case.page.reference, inputs)[1] is None:
        raise NotApplicable("it returns no state")
    grows = stores(case)  # then the mask is of all keys so far
    ahead = {
        name: torch.nn.functional.pad(getattr(inputs, name), (0, 0, 3, 0), value=GARBAGE) for name in "qkv"
    }
    x = None if inputs.x is None else torch.nn.functional.pad(inputs.x, (0, 0, 3, 0), value=GARBAGE)
    roles = None if inputs.roles is None else inputs.roles.gather((torch.arange(12) - 3).clamp(min=0))
    wide = replace(inputs, **ahead, x=x, roles=roles)
    hidden = (torch.arange(12) >= 3).expand(B, 1, 1, 12)
    case.able(wide.span(slice(0, 8)), hidden[..., :8])
    for label, path in case.paths.items():
        wanted = case.run(path, inputs)[0]
        _, state = case.run(path, wide.span(slice(0, 8)), hidden[..., :8])
        for start, stop in ((8, 11), (11, 12)):
            out, state = case.run(
                path, wide.span(slice(start, stop)), hidden[..., :stop] if grows else None, state
            )
            law = f"{label}: padded by 3 and carried on at token {start - 3} = the text without padding"
            case.same(law, out, wanted[:, :, start - 3 : stop - 3])


def check_state_size(case: Case) -> None:
    """The state holds as many numbers as the page declares, in the input's dtype or in float32."""
    if case.pattern != "causal_self" or case.page.state_size is None:
        raise NotApplicable("no state is declared")
    for n, groups in ((1, H), (7, H), (33, H), (7, 1)):
        inputs = case.inputs(n, groups=groups)
        declared = case.page.state_size(case.cfg, case.dims(inputs), n)
        for label, path in case.paths.items():
            for dtype in (torch.float64, torch.bfloat16):
                end = case.run(path, inputs.to(dtype))[1]
                parts = [leaf for leaf in tree_leaves(end) if leaf.is_floating_point()]
                held = sum(leaf.numel() for leaf in parts) / B
                assert held == declared, (
                    f"{label}: {n} tokens on {groups} KV heads leave {held:g} numbers a row in the state, "
                    f"declared {declared}"
                )
                kinds = {leaf.dtype for leaf in parts} - {dtype, torch.float32}
                assert not kinds, f"{label}: {dtype} in, a state of {kinds}"
