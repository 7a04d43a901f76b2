"""The picture of a mask, or of who reads whom on an image: which settings, tokens and heads are drawn."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.report.drawn import Picture, png, svg
from regard.report.grid_picture import GridPicture, PlaceMap
from regard.report.mask_picture import MaskPicture

if TYPE_CHECKING:
    from torch import Tensor

    from regard.core.roles import Roles

# tokens, where all heads are alike and where they are not
ALONE, BESIDE, MOST_HEADS = 24, 16, 4
READ = 48  # tokens of the text of which a page that chooses blocks is shown
IMAGE = 14  # rows and columns of the image on which places are drawn
# what stands for a number that is large beside so few tokens
SMALL = (4, 3, 2, 6)


def has_mask(page: Any) -> bool:
    """Mask pages, and position pages that have a mask."""
    return getattr(page, "build", None) is not None


def chooses_blocks(page: Any) -> bool:
    """Pages that choose blocks of keys and learn nothing: what they read of an example is drawn."""
    from regard.ops.blocks import BlockSettings

    return page.kind == "mechanism" and isinstance(page.config(), BlockSettings) and page.init is None


def drawable(page: Any) -> bool:
    """Pages that have a mask, choose blocks and learn nothing, or mix the places of an image."""
    return has_mask(page) or chooses_blocks(page) or on_grid(page)


def on_grid(page: Any) -> bool:
    # imported for such pages alone: trained backbones and transformers come with it
    if page.kind != "mechanism" or page.grid is None:
        return False
    from regard.explaining.places import is_on_grid

    return is_on_grid(page)


def places_of(name: str, page: Any, settings: dict[str, Any]) -> GridPicture:
    """Whom a middle and a corner place of a small image read, under these settings or small ones."""
    from dataclasses import fields

    from regard.core import Method
    from regard.explaining.places import page_maps

    cfg, side = fitting(page, settings)
    at = {"a place in the middle": (side // 2, side // 2), "a place at the border": (side // 2 + 1, 0)}
    maps = page_maps(Method(name, page, cfg), (side, side), [y * side + x for y, x in at.values()])
    default = page.config()
    changed = (
        f"{f.name}={getattr(cfg, f.name)}"
        for f in fields(cfg)
        if getattr(cfg, f.name) != getattr(default, f.name)
    )
    shown = tuple(
        PlaceMap(label, place, found.abs().mean(0).tolist())
        for (label, place), found in zip(at.items(), maps, strict=True)
    )
    title = ":".join(filter(None, (name, ",".join(changed))))
    also = "; what it reads of the layer's input is not drawn" if page.reads_x(cfg) else ""
    return GridPicture(title, shown, GridPicture.note + also)


def fitting(page: Any, settings: dict[str, Any]) -> tuple[Any, int]:
    """(settings, side of a square image that they go with): those that are given, or the first that do."""
    tried = [settings] if settings else [{}, *page.test_settings]
    for options in tried:
        cfg = page.configure(**options)
        for side in (IMAGE, IMAGE - 2, IMAGE + 2, *range(IMAGE - 6, 2 * IMAGE)):
            with suppress(ValueError):
                page.grid.fits(cfg, (side, side))
                return cfg, side
    page.grid.fits(page.configure(**tried[0]), (IMAGE, IMAGE))
    raise ValueError(f"no image of {IMAGE - 6} to {2 * IMAGE} places a side goes with {settings}")


def chosen_of(name: str, page: Any, settings: dict[str, Any]) -> MaskPicture:
    """What two heads read of a text whose queries and keys change slowly, under these settings or small ones."""
    from dataclasses import fields

    cfg = page.configure(**settings) if settings else page.configure(**(page.test_settings or ({},))[0])
    grids = tuple(head.tolist() for head in read_keys(name, page, cfg))
    given = ",".join(
        f"{f.name}={value}" for f in fields(cfg) if (value := getattr(cfg, f.name)) not in (0, ())
    )
    return MaskPicture(
        f"{name}:{given}", grids, len(grids), {}, "filled = the key is in a block that the query reads"
    )


def read_keys(name: str, page: Any, cfg: Any) -> "Tensor":
    """[H, n, n] bool."""
    import torch

    from regard.core import Method, require
    from regard.kinds.mechanism import run
    from regard.ops.blocks import Blocks

    drawn = torch.Generator().manual_seed(0)
    # steps that add up and fade: neighbours are alike
    steps = torch.randn(3, 1, 2, READ, 8, generator=drawn)
    fade = (
        0.8 ** (torch.arange(READ)[:, None] - torch.arange(READ)).clamp(min=0).tril()
        * torch.ones(READ, READ).tril()
    )
    q, k, v = (fade @ steps).unbind()
    aux = run(Method(name, page, cfg), q, k, v, pattern=page.patterns[-1])[2]
    require("blocks" in aux, "what a page reads is drawn where it says which blocks it reads", page=name)
    lists = (aux["blocks"],) if isinstance(aux["blocks"], Blocks) else aux["blocks"]
    read = torch.zeros(2, READ, READ, dtype=torch.bool)
    for blocks in lists:
        part = blocks.map(-(-READ // blocks.block_k)).repeat_interleave(blocks.block_q, 2)
        read = read | part.repeat_interleave(blocks.block_k, 3)[0, :, :READ, :READ]
    return read.tril() if page.patterns[-1] == "causal_self" else read


def picture_of(name: str, page: Any, settings: dict[str, Any]) -> Picture:
    """The places that are read on an image, or the mask; without settings under the first ones that show what it is."""
    from dataclasses import fields

    if on_grid(page):
        return places_of(name, page, settings)
    if not has_mask(page):
        return chosen_of(name, page, settings)
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
    from regard.testing.labels import example_roles

    mask = page.build(cfg)
    n = ALONE if mask.heads in (None, 1) else BESIDE
    roles = example_roles(mask.needs, n, cfg)
    seen = mask.dense(n, roles=roles)[0]
    return seen[:1] if bool((seen == seen[:1]).all()) else seen, roles


def first_row(labels: "Tensor") -> "Tensor":
    return labels[0] if labels.dim() == 2 else labels


def write(picture: Picture, path: Path) -> None:
    """SVG or PNG, by the name's end."""
    from regard.core import require

    kind = path.suffix.lower()
    require(kind in (".svg", ".png"), "a picture is a .svg or a .png file", path=str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(picture) if kind == ".png" else svg(picture).encode())
