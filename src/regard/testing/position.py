"""Checks that every position page must pass; yours too: `check_position(METHOD)`."""

from typing import Any

import torch
from torch import Tensor

from regard import catalog
from regard.core.roles import Roles
from regard.kinds.position import PositionPage
from regard.testing.labels import example_roles
from regard.testing.mask import check_mask, odd_settings

N = 40


def check_position_page(name: str) -> dict[str, str]:
    """The laws of its kind on a page of the catalogue."""
    return check_position(catalog.get(name))


def check_position(page: PositionPage) -> dict[str, str]:
    """Every law on its default and on odd settings; the laws of masks on the mask that belongs to it."""
    report: dict[str, str] = {}
    for settings in ({}, *odd_settings(page), *page.test_settings):
        report |= hold_laws(page, page.configure(**settings))
    check_plain_text(page)
    if page.build is not None:
        check_mask(page, settings=page.test_settings)
    return {
        **report,
        "plain_text": "held",
        "mask": "held" if page.build else "not applicable: it has no mask",
    }


def hold_laws(page: PositionPage, cfg: Any) -> dict[str, str]:
    """Every law on these settings."""
    roles = example_roles({*page.card.needs, "padding"}, N, cfg)
    for law in LAWS:
        law(page, cfg, roles)
    return {law.__name__.removeprefix("check_"): "held" for law in LAWS}


def where(page: PositionPage, cfg: Any, roles: Roles) -> Tensor:
    return page.positions(roles, cfg)


def check_shape(page: PositionPage, cfg: Any, roles: Roles) -> None:
    """Whole numbers from 0 on, one for each token."""
    at = where(page, cfg, roles)
    assert at.shape[-1] == roles.length, (
        f"{page.card.title}: {list(at.shape)} positions of {roles.length} tokens"
    )
    assert not at.is_floating_point(), f"{page.card.title}: positions are whole numbers, not {at.dtype}"
    assert int(at.min()) >= 0, f"{page.card.title}: position {int(at.min())}"


def check_prefix(page: PositionPage, cfg: Any, roles: Roles) -> None:
    """What comes later moves no token: the positions of a prefix are those that it has in the whole."""
    whole = where(page, cfg, roles)
    for n in (1, 7, N - 1):
        part = where(page, cfg, roles.gather(range(n)))
        assert torch.equal(part, whole[..., :n]), f"{page.card.title}: tokens after the first {n} move these"


def check_rows(page: PositionPage, cfg: Any, roles: Roles) -> None:
    """A row of a batch has the positions that it has alone."""
    whole = where(page, cfg, roles)
    for row in range(roles.batch):
        alone = where(
            page, cfg, Roles(**{r: roles[r][row] if roles[r].dim() == 2 else roles[r] for r in roles})
        )
        together = whole[row] if whole.dim() == 2 else whole
        assert torch.equal(alone.flatten(), together.flatten()), f"{page.card.title}: row {row} alone differs"


def check_padding(page: PositionPage, cfg: Any, roles: Roles) -> None:
    """Padding before a text moves none of its tokens."""
    text = roles.gather(range(N // 4, N))
    padded = Roles(**{r: torch.nn.functional.pad(text[r], (3, 0), value=padding_label(r)) for r in text})
    clean = text.with_(padding=torch.zeros(text.length, dtype=torch.long))
    padded = padded.with_(padding=(torch.arange(padded.length) < 3).long())
    actual, wanted = where(page, cfg, padded)[..., 3:], where(page, cfg, clean)
    assert torch.equal(actual, wanted), f"{page.card.title}: three tokens of padding move the text"


def padding_label(role: str) -> int:
    return {"padding": 1, "image": 0}.get(role, -1)


def plain_labels(role: str, n: int) -> Tensor:
    """The labels of text without marks: a slot for each token, all else in nothing."""
    if role == "token":
        return torch.arange(n)
    return torch.full((n,), 0 if role == "iteration" else padding_label(role))


def check_plain_text(page: PositionPage) -> None:
    """Text without images or other marks is counted 0, 1, 2, ..."""
    cfg = page.config()
    marks = {r: plain_labels(r, 9) for r in page.card.needs}
    at = where(page, cfg, Roles(**{**marks, "padding": torch.zeros(9, dtype=torch.long)}))
    assert at.flatten().tolist() == list(range(9)), f"{page.card.title}: plain text stands at {at.tolist()}"


LAWS = (check_shape, check_prefix, check_rows, check_padding)
