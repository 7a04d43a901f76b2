"""The tower of a vision-language model: how its patches become the decoder's visual tokens, what it attended to.

A token's scores are the mean over the patches that the projector makes it of. Which these are is known for the families
below, from their own code: others are refused by name.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regard.attaching.actors import AttentionCall
from regard.attaching.sites import VISION
from regard.core import Unreachable, Unsupported, require
from regard.core.errors import present
from regard.ops import masked_softmax, row_blocks, scores

CLASS_TOKENS = ("class_embedding", "cls_token", "class_token")
ONE_GRID = (
    "clip_vision_model",
    "siglip_vision_model",
)  # towers of pictures of one size, their patches in raster order


@dataclass(frozen=True, eq=False)
class Layout:
    """One image: the row of the tower's batch that holds it, members [P, m] of its tokens in that row's sequence."""

    row: int
    members: Tensor
    grid: tuple[int, int] | None
    class_token: int | None = None  # where it stands in the sequence

    @property
    def tokens(self) -> int:
        return len(self.members)


@dataclass
class Tower:
    """What the tower computed in one forward: queries and keys by layer, in the order of its calls."""

    calls: dict[int, list[tuple[Tensor, Tensor, float]]] = field(default_factory=dict)

    def clear(self) -> None:
        self.calls.clear()

    def note(self, call: AttentionCall) -> None:
        scaling = call.options.get("scaling")
        scale = call.q.shape[-1] ** -0.5 if scaling is None else scaling
        self.calls.setdefault(call.site.layer, []).append((call.q.detach(), call.k.detach(), scale))

    @property
    def layers(self) -> int:
        return len(self.calls)

    def at(self, layer: int) -> list[tuple[Tensor, Tensor, float]]:
        rule = "a layer of the tower"
        require(-self.layers <= layer < self.layers, rule, layer=layer, layers=self.layers)
        return self.calls[sorted(self.calls)[layer]]

    def class_attention(self, layer: int, at: Layout) -> Tensor:
        """[H, P] weights of the class token's query."""
        if at.class_token is None:
            raise Unsupported(
                "this tower has no class token, whose attention is asked for; rank by the mean received attention "
                "where the method has a setting for it (without_class='received')"
            )
        (q, k, scale), *_ = self.at(layer)
        row, own = slice(at.row, at.row + 1), slice(at.class_token, at.class_token + 1)
        w = masked_softmax(scores(q[row, :, own], k[row], scale), None)
        return w[0, :, 0][:, at.members].mean(-1)

    def received(self, layer: int, at: Layout) -> Tensor:
        """[H, P] mean weight of each patch over the queries of its image, or of its window."""
        parts = []
        for q, k, scale in self.at(layer):
            row = slice(at.row, at.row + 1)
            total = torch.zeros(q.shape[1], k.shape[2], device=q.device)
            for rows in row_blocks(q.shape[2], q.shape[1] * k.shape[2]):
                total += masked_softmax(scores(q[row, :, rows], k[row], scale), None)[0].sum(1)
            parts.append(total / q.shape[2])
        return torch.cat(parts, 1)[:, at.members].mean(-1)

    def keys(self, layer: int, at: Layout) -> Tensor:
        """[P, H·D] keys of the patches, as attention reads them."""
        parts = [k[at.row].transpose(0, 1).flatten(1) for _, k, _ in self.at(layer)]
        return torch.cat(parts)[at.members].mean(1)


def image_token(model: PreTrainedModel) -> int:
    """The id that stands for a visual token in a prompt."""
    for name in ("image_token_id", "image_token_index"):
        found = getattr(model.config, name, None)
        if isinstance(found, int):
            return found
    raise Unreachable(
        f"{type(model).__name__} has no image_token_id in its configuration: it reads no images, or says not where"
    )


def vision_module(model: PreTrainedModel) -> nn.Module:
    """The tower: the outermost module whose name says that it is one."""
    for name, module in model.named_modules():
        if VISION.search(name):
            return module
    raise Unreachable(f"{type(model).__name__} has no vision tower")


def class_token_of(tower: nn.Module) -> int | None:
    names = [name.rsplit(".", 1)[-1] for name, _ in tower.named_parameters()]
    return 0 if any(name in CLASS_TOKENS for name in names) else None


def layouts(model: PreTrainedModel, tower: Tower, inputs: dict[str, Any]) -> list[Layout]:
    """A layout for each image of a forward, in the order in which the tower, and so the prompt, has them."""
    require(bool(tower.calls), "a prompt with an image, which the tower reads", images=0)
    kind = str(getattr(model.config, "model_type", ""))
    if kind not in FAMILIES:
        raise Unsupported(
            f"{type(model).__name__} ({kind}): how its patches become visual tokens is not known here; known: "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[kind](model, tower, inputs)


def same_for_all(
    tower: Tower, members: Tensor, grid: tuple[int, int] | None, token: int | None
) -> list[Layout]:
    q = tower.at(0)[0][0]
    members = members.to(q.device)
    return [Layout(row, members, grid, token) for row in range(q.shape[0])]


def square(patches: int) -> tuple[int, int]:
    side = math.isqrt(patches)
    require(side * side == patches, "patches of a square picture", patches=patches)
    return side, side


def llava(model: Any, tower: Tower, inputs: dict[str, Any]) -> list[Layout]:
    """A token for each patch, in raster order; the class token is left out."""
    config, module = model.config, vision_module(model)
    kind = str(getattr(config.vision_config, "model_type", ""))
    token, length = class_token_of(module), tower.at(0)[0][0].shape[2]
    if kind not in ONE_GRID:
        raise Unsupported(f"a {kind} tower under {type(model).__name__}; known: {', '.join(ONE_GRID)}")
    if token is not None and config.vision_feature_select_strategy != "default":
        strategy = config.vision_feature_select_strategy
        raise Unsupported(f"vision_feature_select_strategy={strategy!r}: the class token is a visual token")
    first = 0 if token is None else 1
    patches = torch.arange(first, length)
    return same_for_all(tower, patches[:, None], square(length - first), token)


def gemma3(model: Any, tower: Tower, inputs: dict[str, Any]) -> list[Layout]:
    """Square blocks of patches, averaged."""
    rows, columns = square(tower.at(0)[0][0].shape[2])
    side = math.isqrt(model.config.mm_tokens_per_image)
    blocks = torch.arange(rows * columns).view(side, rows // side, side, columns // side)
    return same_for_all(tower, blocks.transpose(1, 2).reshape(side * side, -1), (side, side), None)


def shuffled(
    model: Any, tower: Tower, inputs: dict[str, Any], shuffle: Callable, token: int | None
) -> list[Layout]:
    """Blocks of patches beside each other: which ones the model's own shuffle says, asked with their numbers."""
    first = 0 if token is None else 1
    rows, columns = square(tower.at(0)[0][0].shape[2] - first)
    members = shuffle(torch.arange(rows * columns, dtype=torch.float64)[None, :, None], rows)
    side = math.isqrt(members.shape[1])
    return same_for_all(tower, members[0].long() + first, (side, side), token)


def idefics(model: Any, tower: Tower, inputs: dict[str, Any]) -> list[Layout]:
    connector = model.model.connector
    shuffle = lambda x, rows: connector.pixel_shuffle(x, connector.scale_factor)  # noqa: E731
    return shuffled(model, tower, inputs, shuffle, None)


def internvl(model: Any, tower: Tower, inputs: dict[str, Any]) -> list[Layout]:
    inner, ratio = model.model, model.config.downsample_ratio

    def shuffle(x: Tensor, rows: int) -> Tensor:
        # as get_image_features does; the shuffle wants a width that the ratio divides twice
        wide = x.view(1, rows, -1, 1).expand(-1, -1, -1, 1)
        out = inner.pixel_shuffle(wide.contiguous(), scale_factor=ratio)
        return out.reshape(1, -1, out.shape[-1])

    return shuffled(model, tower, inputs, shuffle, class_token_of(vision_module(model)))


def qwen(model: Any, tower: Tower, inputs: dict[str, Any]) -> list[Layout]:
    """Groups of merge x merge patches that follow each other, all images in one sequence, perhaps by windows."""
    grids = present(inputs.get("image_grid_thw"), "pixels come with image_grid_thw")
    merge = model.config.vision_config.spatial_merge_size
    place = torch.arange(int(grids.prod(-1).sum()) // merge**2)
    if getattr(model.config.vision_config, "window_size", None):
        place = window_order(model, grids).argsort().cpu()
    found, start = [], 0
    for t, h, w in grids.tolist():
        groups = place[start : start + t * h * w // merge**2]
        members = groups[:, None] * merge**2 + torch.arange(merge**2)
        grid = (h // merge, w // merge) if t == 1 else None
        found.append(Layout(0, members.to(tower.at(0)[0][0].device), grid))
        start += len(groups)
    return found


def window_order(model: Any, grids: Tensor) -> Tensor:
    """Which group of patches stands at each place of the tower's sequence."""
    from transformers.vision_utils import get_vision_window_index

    tower, config = vision_module(model), model.config.vision_config
    found = get_vision_window_index(grids, config.spatial_merge_size, config.window_size, tower.patch_size)
    return found[0]


FAMILIES: dict[str, Callable[[Any, Tower, dict[str, Any]], list[Layout]]] = {
    "llava": llava, "gemma3": gemma3, "idefics3": idefics, "smolvlm": idefics, "internvl": internvl,
    "qwen2_vl": qwen, "qwen2_5_vl": qwen, "qwen3_vl": qwen,
}  # fmt: skip


def padding_of(pixels: Tensor, at: Layout) -> Tensor | None:
    """[P] share of each token's pixels [3, H, W] that lies in border rows or columns of one colour; None: no such."""
    if at.grid is None or pixels.dim() != 3:
        return None
    corner = pixels[:, :1, :1]
    same = (pixels == corner).all(0)
    rows, columns = same.all(1), same.all(0)
    if bool(rows.all()) or not bool(rows.any() | columns.any()):
        return None
    blank = (border(rows)[:, None] | border(columns)[None]).float()[None, None]
    share = torch.nn.functional.adaptive_avg_pool2d(blank, at.grid)
    return share.flatten() if bool(share.any()) else None


def border(blank: Tensor) -> Tensor:
    """Of [n] bool those that hang together with an end."""
    return blank.cumprod(0).bool() | blank.flip(0).cumprod(0).flip(0).bool()


def class_attention_of(model: Any, tower: Tower, inputs: dict[str, Any], layer: int) -> Tensor:
    """[B, H, P] of the class token on each text's visual tokens: one image a text, of one size."""
    images, ids = layouts(model, tower, inputs), inputs.get("input_ids")
    require(ids is not None and len(images) == len(ids), "one image in each text", images=len(images))
    return torch.stack([tower.class_attention(layer, at) for at in images])
