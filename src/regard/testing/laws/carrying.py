"""States: segments, single tokens and padded rows carried on give what the whole gives."""

from dataclasses import replace
from typing import Any

import torch

from regard.core.trees import tree_leaves, tree_map
from regard.testing.case import GARBAGE, B, Case, H, Inputs, NotApplicable, same_states, stores


def check_segments(case: Case, n: int = 33) -> None:
    """State carried over ragged segments gives the whole; the state handed in is left as it was."""
    case.choosing()
    if (block := case.together) > 1:
        sizes: tuple[int, ...] = (2 * block, block, block + 1)
    else:
        sizes = (13, 1, 19) if n == 33 else tuple(size for size in (n - 1 - n // 2, 1, n // 2) if size)
    segments(case, sizes, f"segments of {', '.join(map(str, sizes))} tokens = the whole")


def check_decode(case: Case, n: int = 7) -> None:
    """Token by token gives what all at once gives."""
    if case.together > 1:
        raise NotApplicable(
            f"{case.together} queries choose their keys together: one alone chooses otherwise"
        )
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


def check_state_rows(case: Case) -> None:
    """Rows of a state that change places, as beams do, go on as each row did where it was."""
    inputs, rows = case.inputs(10), [1, 0, 1]
    if case.pattern != "causal_self":
        raise NotApplicable("only causal_self carries a state")
    if case.run(case.page.reference, inputs)[1] is None:
        raise NotApplicable("it returns no state")
    first, then = inputs.span(slice(0, 6)), inputs.span(slice(6, None))
    for label, path in case.paths.items():
        state = case.run(path, first)[1]
        wanted, end = case.run(path, then, state=state)
        out, after = case.run(path, then.rows(rows), state=rows_of(state, rows))
        law = f"{label}: a state of which rows {rows} are taken"
        case.same(f"{law} goes on as each row did", out, wanted[rows])
        case.same_states(f"{law} ends as each row did", after, rows_of(end, rows))


def rows_of(state: Any, rows: list[int]) -> Any:
    """These rows of a state, as caches take them: its tensors lead with the batch."""
    return tree_map(lambda t: t.index_select(0, torch.tensor(rows)), state)


def check_padded_state(case: Case) -> None:
    """A prompt padded on the left or on the right, and carried on through a state, is the text that is not padded."""
    case.choosing()
    prompt = 5 if case.together == 1 else 2 * case.together
    inputs = case.inputs(prompt + 4 if case.together == 1 else prompt + case.together + 1)
    if case.pattern != "causal_self":
        raise NotApplicable("only causal_self carries a state")
    if case.run(case.page.reference, inputs)[1] is None:
        raise NotApplicable("it returns no state")
    for left, right in ((3, 0), (0, 3), (2, 1)):
        padded_prompt(case, inputs, left, right, prompt)


def padded_prompt(case: Case, inputs: Inputs, left: int, right: int, prompt: int) -> None:
    """The first `prompt` tokens with padding around them, then the others, without any."""
    total = inputs.q.shape[2]
    token = torch.cat([torch.full((left,), -1), torch.arange(prompt), torch.full((right,), -1),
                       torch.arange(prompt, total)])  # fmt: skip

    def spread(t: torch.Tensor | None) -> torch.Tensor | None:
        return None if t is None else t[..., token, :].masked_fill((token < 0)[:, None], GARBAGE)

    roles = None if inputs.roles is None else inputs.roles.gather(token.clamp(min=0))
    wide = replace(inputs, **{name: spread(getattr(inputs, name)) for name in "qkvx"}, roles=roles)
    real = (token >= 0).expand(B, 1, 1, -1)
    first = left + prompt + right
    case.able(wide.span(slice(0, first)), real[..., :first])
    for label, path in case.paths.items():
        wanted = case.run(path, inputs)[0]
        _, state = case.run(path, wide.span(slice(0, first)), real[..., :first])
        for start, stop in ((first, len(token) - 1), (len(token) - 1, len(token))):
            # where keys are stored the mask is of all so far
            mask = real[..., :stop] if stores(case) else None
            out, state = case.run(path, wide.span(slice(start, stop)), mask, state)
            law = f"{label}: padded by {left} before and {right} after, carried on at token {token[start]}"
            case.same(f"{law} = the text without padding", out, wanted[:, :, token[start:stop]])


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
