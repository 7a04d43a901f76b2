"""The picture of a mask: which settings, tokens and heads are drawn."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.report.mask_picture import MaskPicture, png, svg

if TYPE_CHECKING:
    from torch import Tensor

    from regard.core.roles import Roles

# tokens, where all heads are alike and where they are not
ALONE, BESIDE, MOST_HEADS = 24, 16, 4
# what stands for a number that is large beside so few tokens
SMALL = (4, 3, 2, 6)


def has_mask(page: Any) -> bool:
    """Mask pages, and position pages that have a mask."""
    return getattr(page, "build", None) is not None


def picture_of(name: str, page: Any, settings: dict[str, Any]) -> MaskPicture:
    """The mask under these settings; where none are given, under the first ones that show what it is."""
    from dataclasses import fields

    cfg = page.configure(**settings) if settings else telling(page)
    seen, roles = example(page, cfg)
    labels = {} if roles is None else {role: first_row(roles[role]).tolist() for role in roles}
    given = ",".join(f"{f.name}={getattr(cfg, f.name)}" for f in fields(cfg))
    grids = tuple(head.tolist() for head in seen[:MOST_HEADS])
    return MaskPicture(f"{name}:{given}" if given else name, grids, len(seen), labels)


def telling(page: Any) -> Any:
    """Settings under which few tokens are neither all seen nor seen as causal attention sees them.

    The page's own with small numbers for large ones, else those that its tests use.
    """
    for cfg in candidates(page):
        seen, _ = example(page, cfg)
        plain = (seen.all(), not seen.any(), bool((seen == seen.new_ones(seen.shape[1:]).tril()).all()))
        if not any(plain):
            return cfg
    return page.config()


def candidates(page: Any) -> Iterator[Any]:
    from dataclasses import asdict

    from regard.testing.mask import odd_settings

    own = page.config()
    for small in SMALL:
        large = {
            name: small for name, value in asdict(own).items() if type(value) is int and value > ALONE // 3
        }
        with suppress(ValueError):
            yield page.config(**large)
    for settings in (*page.test_settings, *odd_settings(page)):
        yield page.config(**settings)


def example(page: Any, cfg: Any) -> "tuple[Tensor, Roles | None]":
    """Who sees whom among a few labelled tokens, [H, n, n], one head where all are alike; and the labels."""
    from regard.testing.mask import example_roles

    mask = page.build(cfg)
    n = ALONE if mask.heads in (None, 1) else BESIDE
    roles = example_roles(mask.needs, n, cfg)
    seen = mask.dense(n, roles=roles)[0]
    return seen[:1] if bool((seen == seen[:1]).all()) else seen, roles


def first_row(labels: "Tensor") -> "Tensor":
    return labels[0] if labels.dim() == 2 else labels


def write(picture: MaskPicture, path: Path) -> None:
    """SVG or PNG, by the name's end."""
    from regard.core import require

    kind = path.suffix.lower()
    require(kind in (".svg", ".png"), "a picture is a .svg or a .png file", path=str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(picture) if kind == ".png" else svg(picture).encode())
