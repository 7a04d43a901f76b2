"""What a vision backbone is made of, as a Hugging Face configuration."""

from dataclasses import fields
from typing import Any

from transformers import PretrainedConfig

from regard import catalog
from regard.core import Method, Unsupported, require
from regard.core.spec import parse_spec
from regard.kinds.block import BlockPage
from regard.kinds.mechanism import Mechanism

POOLING = ("mean", "class", "places")
POSITIONS = ("learned", "none")
STEMS = ("patch", "overlap")


class VisionConfig(PretrainedConfig):
    """What a vision backbone is made of. Lists have one entry for each stage; a number or a name is that of all.

    image_size, patch_size  of one side, or (rows, columns)
    hidden_sizes, depths, num_attention_heads  of the stages; between two of them four tokens become one
    mechanism       a mechanism or a block page that does `self`, with settings as NAME:key=value
    settings        {name: {...}}, those of a page in all stages
    mlp_ratio       inner width of the channel mixer over the width; 0: none
    pooling         "mean" of the tokens, or "class", a token of its own: logits [B, labels]; "places": a score for each
                    place of the last stage, logits [B, N], to find something
    stem            "patch": every patch by itself; "overlap": a convolution that reads half of its neighbours too
    positions       "learned", added to the patches, or "none"
    dropout         share of what attention and channel mixer add, dropped in training
    """

    model_type = "regard_vision"

    def __init__(
        self, mechanism: str | list[str] = "softmax", image_size: int | list[int] = 32,
        patch_size: int | list[int] = 4, num_channels: int = 3, hidden_sizes: int | list[int] = 64,
        depths: int | list[int] = 4, num_attention_heads: int | list[int] = 2, mlp_ratio: float = 4.0,
        settings: dict[str, dict] | None = None, pooling: str = "mean", stem: str = "patch", positions: str = "learned",
        dropout: float = 0.0, initializer_range: float = 0.02, layer_norm_eps: float = 1e-6, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.image_size, self.patch_size = pair("image_size", image_size), pair("patch_size", patch_size)
        lists = {
            "mechanism": mechanism,
            "hidden_sizes": hidden_sizes,
            "depths": depths,
            "num_attention_heads": num_attention_heads,
        }
        count = max(len(x) if isinstance(x, list | tuple) else 1 for x in lists.values())
        for name, given in lists.items():
            setattr(self, name, by_stage(name, given, count))
        self.num_channels, self.mlp_ratio, self.settings = num_channels, mlp_ratio, settings or {}
        self.pooling, self.stem, self.positions, self.dropout = pooling, stem, positions, dropout
        self.initializer_range, self.layer_norm_eps = initializer_range, layer_norm_eps
        super().__init__(**kwargs)
        self.check()

    def check(self) -> None:
        """ValueError with the rule and the values for what goes not together."""
        require(self.pooling in POOLING, f"pooling is one of {POOLING}", pooling=self.pooling)
        require(self.stem in STEMS, f"stem is one of {STEMS}", stem=self.stem)
        require(self.positions in POSITIONS, f"positions is one of {POSITIONS}", positions=self.positions)
        require(0 <= self.dropout < 1, "0 <= dropout < 1", dropout=self.dropout)
        for name in ("hidden_sizes", "depths", "num_attention_heads"):
            require(min(getattr(self, name)) >= 1, f"{name} >= 1", **{name: getattr(self, name)})
        one = self.pooling != "class" or self.stages == 1
        require(
            one, "a class token is for one stage: it has no place when tokens are merged", stages=self.stages
        )
        self.grids(*self.image_size)

    @property
    def stages(self) -> int:
        return len(self.depths)

    def grids(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """The grid of the tokens of an image of this size in each stage."""
        for side, patch in zip((rows, columns), self.patch_size, strict=True):
            step = patch * 2 ** (self.stages - 1)
            rule = "the sides of an image are multiples of a patch, twice as many with every further stage"
            require(side >= step and side % step == 0, rule, side=side, patch=patch, multiple=step)
        first = rows // self.patch_size[0], columns // self.patch_size[1]
        return [(first[0] >> stage, first[1] >> stage) for stage in range(self.stages)]

    def methods(self) -> list[list[Method]]:
        """The configured page of every layer, by stage; pages that differ by depth are told `layer` and `layers`."""
        found, layer = [], 0
        for spec, depth in zip(self.mechanism, self.depths, strict=True):
            found.append([self.method(spec, layer + i) for i in range(depth)])
            layer += depth
        return found

    def method(self, spec: str, layer: int) -> Method:
        name, given = parse_spec(spec)
        page = catalog.get(name)
        if not isinstance(page, Mechanism | BlockPage):
            raise Unsupported(f"{name} is a {page.kind} page; a stage takes mechanisms and blocks")
        if "self" not in page.patterns:
            reason = f"it does {', '.join(page.patterns)}"
            raise Unsupported(f"{name} does not do self, as the tokens of an image need it: {reason}")
        if page.grid is not None and self.pooling == "class":
            raise Unsupported(f"pooling='class': {name} is for grids, on which a class token has no place")
        has = {f.name for f in fields(page.config)}
        depth = {"layer": layer, "layers": sum(self.depths)} if {"layer", "layers"} <= has else {}
        return catalog.method(name, **{**depth, **self.settings.get(name, {}), **given})


def pair(name: str, given: Any) -> list[int]:
    sides = [given] * 2 if isinstance(given, int) else list(given)
    require(
        len(sides) == 2 and min(sides) >= 1,
        f"{name} is a side, or rows and columns, of 1 or more",
        **{name: given},
    )
    return sides


def by_stage(name: str, given: Any, stages: int) -> list:
    found = list(given) if isinstance(given, list | tuple) else [given] * stages
    require(
        len(found) == stages, f"{name} is one for all stages, or one for each", stages=stages, **{name: given}
    )
    return found
