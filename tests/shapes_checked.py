"""Every page is asked once, in a process of its own, with all shapes and types of methods and ops checked.

The hook makes calls many times slower and cannot be traced, so the battery runs without it (tests/test_shapes.py).
"""

from contextlib import suppress
from dataclasses import replace

import torch
from jaxtyping import TypeCheckError, install_import_hook

torch.set_num_threads(1)
install_import_hook(["regard.methods", "regard.ops", "regard.kinds"], "beartype.beartype")

from regard import catalog  # noqa: E402
from regard.core import Unsupported  # noqa: E402
from regard.core.call import Call  # noqa: E402
from regard.testing.block import BlockCase  # noqa: E402
from regard.testing.case import B, Case, H  # noqa: E402
from regard.testing.labels import example_roles  # noqa: E402


def ask_mechanism(page) -> int:
    calls = 0
    for settings in ({}, *page.test_settings):
        for pattern in page.patterns:
            case = Case(page, page.configure(**settings), pattern)
            for groups in (H, 1):
                inputs = case.inputs(7, 9, groups=groups)
                # a grid has all of its tokens
                mask = None if page.grid else torch.ones(B, 1, 1, inputs.k.shape[2], dtype=torch.bool)
                for path in case.paths.values():
                    calls += carry_on(case, path, inputs, mask)
    return calls


def carry_on(case, path, inputs, mask) -> int:
    with suppress(Unsupported):
        case.run(path, inputs, mask)
    try:
        state = case.run(path, inputs)[1]
        if state is not None:
            # roles label the tokens of the state too
            after = replace(inputs.span(slice(0, 1)), roles=case.labels(inputs.k.shape[2] + 1))
            case.run(path, after, state=state)
    except Unsupported:
        return 0
    return 1


def ask_block(page) -> int:
    case = BlockCase(page, page.config(), page.patterns[0])
    for path in case.paths.values():
        state = case.run(path, case.inputs(7))[1]
        case.run(path, case.inputs(3), state=state)
    return len(case.paths)


def ask_mask(page) -> int:
    cfg = page.configure(**(page.test_settings[0] if page.test_settings else page.card.neutral))
    mask = page.build(cfg)
    mask.dense(9, roles=example_roles(mask.needs, 9, cfg))
    return 1


def ask_cache(name) -> int:
    from regard.attaching.attachment import attach
    from regard.testing.cache import small
    from regard.testing.zoo import build

    model, inputs = build("llama")
    with torch.no_grad(), attach(model, catalog.method(name, **small(catalog.get(name)))):
        cache = model(**inputs, use_cache=True).past_key_values
        for _ in range(3):
            model(inputs["input_ids"][:, :1], past_key_values=cache)
    return 1


def main() -> None:
    ask = {"mechanism": ask_mechanism, "block": ask_block, "mask": ask_mask}
    for name, page in catalog.every():
        if page.kind == "cache":
            assert ask_cache(name), name
        elif page.kind in ask:
            assert ask[page.kind](page), name
    softmax, (q, k) = catalog.get("softmax"), torch.randn(2, 1, 2, 3, 4).unbind()
    try:
        softmax.fast(q, k, torch.randn(1, 2, 5, 4), softmax.config(), Call("cross"))
    except TypeCheckError:
        print("shapes are checked")


if __name__ == "__main__":
    main()
