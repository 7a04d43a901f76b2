"""VisionBackbone(mechanism=...): an image classifier around any mechanism or vision block, as a Hugging Face model.

    patches + positions -> stages of layers, between two of them 2 x 2 tokens become one -> norm -> mean -> logits
    layer: x + attention(norm x), then x + MLP(norm x); a block page is a whole layer by itself

>>> model = VisionBackbone(mechanism="fused_neighborhood_attention:window=3", image_size=8, patch_size=1,
...     num_channels=1, hidden_sizes=[16, 32], depths=[1, 1], num_labels=10).eval()
>>> model(torch.zeros(2, 1, 8, 8)).logits.shape
torch.Size([2, 10])
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, initialization
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import can_return_tuple

from regard.core import Method, Unsupported, near, require
from regard.core.roles import Roles
from regard.kinds.block import BlockPage, make_call
from regard.nn.attention import Attention
from regard.nn.initial import draw_parts
from regard.nn.layers import Learned
from regard.nn.vision_config import VisionConfig

__all__ = ["VisionBackbone", "VisionConfig", "register"]

KNOWN = ("output_hidden_states", "return_dict")


class VisionLayer(GradientCheckpointingLayer):
    """x + attention(norm x), then x + MLP(norm x)."""

    def __init__(self, config: VisionConfig, method: Method, width: int, heads: int) -> None:
        super().__init__()
        inner = int(config.mlp_ratio * width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = Attention(
            width, heads, method, "self", rope_theta=0.0, bias=True, dropout=config.dropout
        )
        self.mlp_norm, self.mlp = None, None
        if inner:
            self.mlp_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
            self.mlp = nn.Sequential(
                nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width), nn.Dropout(config.dropout)
            )

    def forward(self, x: Tensor, roles: Roles) -> Tensor:
        x = x + self.attention(self.norm(x), roles=roles)[0]
        return x if self.mlp is None else x + self.mlp(self.mlp_norm(x))


class VisionBlock(GradientCheckpointingLayer):
    """A block page as a layer: the page's own norms and residuals."""

    def __init__(self, config: VisionConfig, method: Method, width: int, heads: int) -> None:
        super().__init__()
        if config.dropout:
            raise Unsupported(f"dropout={config.dropout}: {method.name} is a whole layer, and has none")
        self.method = method
        self.params = Learned(method, {"width": width, "heads": heads})

    def forward(self, x: Tensor, roles: Roles) -> Tensor:
        page, cfg = self.method.page, self.method.config
        call = make_call(page, cfg, x, self.params.tensors(), roles=roles)
        return (page.fast or page.reference)(x, cfg, call)[0]


class Merge(nn.Module):
    """Four tokens become one: [B, N, C] -> [B, N / 4, C']."""

    def __init__(self, width: int, wider: int, eps: float) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(width, eps=eps), nn.Conv2d(width, wider, 2, 2)

    def forward(self, x: Tensor, sides: tuple[int, int]) -> Tensor:
        return self.reduce(self.norm(x).mT.unflatten(2, sides)).flatten(2).mT


class VisionBackbone(PreTrainedModel):
    """pixel_values [B, channels, rows, columns] -> ImageClassifierOutput(loss, logits, hidden_states).

    `VisionBackbone(config)`, or the settings of a VisionConfig by name: VisionBackbone(mechanism="halonet").
    logits are [B, labels], or [B, N] a score for each place of the last stage (pooling="places"); labels [B] are
    numbers of one of them. Images of another size than the config's need interpolate_pos_encoding=True: positions are
    resized.
    """

    config_class = VisionConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisionLayer", "VisionBlock"]  # noqa: RUF012

    def __init__(self, config: VisionConfig | None = None, **settings: Any) -> None:
        require(config is None or not settings, "a config, or settings by name", settings=[*settings])
        config = VisionConfig(**settings) if config is None else config
        super().__init__(config)
        widths, patch = config.hidden_sizes, tuple(config.patch_size)
        kernel = patch if config.stem == "patch" else tuple(2 * side + side % 2 for side in patch)
        around = tuple((k - side) // 2 for k, side in zip(kernel, patch, strict=True))
        self.patches = nn.Conv2d(config.num_channels, widths[0], kernel, patch, around)
        self.grids = config.grids(*config.image_size)
        rows, columns = self.grids[0]
        learned = config.positions == "learned"
        self.places = nn.Parameter(torch.zeros(1, rows * columns, widths[0])) if learned else None
        self.class_token = nn.Parameter(torch.zeros(1, 1, widths[0])) if config.pooling == "class" else None
        self.stages = nn.ModuleList(
            nn.ModuleList(layer_of(config, method, width, heads) for method in methods)
            for methods, width, heads in zip(
                config.methods(), widths, config.num_attention_heads, strict=True
            )
        )
        self.merges = nn.ModuleList(Merge(a, b, config.layer_norm_eps) for a, b in pairwise(widths))
        self.norm = nn.LayerNorm(widths[-1], eps=config.layer_norm_eps)
        outputs = 1 if config.pooling == "places" else config.num_labels
        self.classifier = nn.Linear(widths[-1], outputs)
        # as from_pretrained makes it: what the checkpoint lacks has no values yet
        self.made_empty = self.classifier.weight.is_meta
        check_grids(self)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            initialization.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, VisionBackbone):
            for own in (module.places, module.class_token):
                if own is not None:
                    initialization.trunc_normal_(own, std=self.config.initializer_range)
        if self.made_empty:
            if isinstance(module, nn.LayerNorm):
                initialization.ones_(module.weight)
                initialization.zeros_(module.bias)
            draw_parts(module)

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> ImageClassifierOutput:  # fmt: skip
        hidden = self.options(kwargs)
        x, grids = self.embedded(pixel_values, interpolate_pos_encoding)
        between: list[Tensor] = []
        for i, sides in enumerate(grids):
            roles = self.roles(sides, x.device)
            x = x if i == 0 else self.merges[i - 1](x, grids[i - 1])
            for layer in self.stages[i]:  # type: ignore[attr-defined]
                between += [x] if hidden else []
                x = layer(x, roles)
        x = self.norm(x)
        logits = self.pooled(x)
        loss = None if labels is None else self.loss_of(logits, labels)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=(*between, x) if hidden else None
        )

    def options(self, given: dict[str, Any]) -> bool:
        """Whether the states between layers are asked for; Unsupported with the name for whatever is not known."""
        given = {name: value for name, value in given.items() if value is not None}
        if given.pop("output_attentions", self.config.output_attentions):
            raise Unsupported("output_attentions: a mechanism gives its output, and builds no weights")
        hidden = given.pop("output_hidden_states", self.config.output_hidden_states)
        for name in (name for name in given if name != "return_dict"):
            raise Unsupported(f"forward takes no {name!r}; {near(name, KNOWN)}")
        return bool(hidden)

    def embedded(self, pixels: Tensor, resize: bool) -> tuple[Tensor, list[tuple[int, int]]]:
        """(tokens [B, N, C], the grid of each stage)."""
        channels, size = self.config.num_channels, tuple(self.config.image_size)
        fits = pixels.dim() == 4 and pixels.shape[1] == channels
        require(fits, f"pixel_values is [B, {channels}, rows, columns]", pixel_values=pixels)
        same = tuple(pixels.shape[2:]) == size
        rule = "images have the size of the config; interpolate_pos_encoding=True for others"
        require(same or resize, rule, image=tuple(pixels.shape[2:]), image_size=size)
        grids = self.grids if same else self.config.grids(*pixels.shape[2:])
        x = self.patches(pixels).flatten(2).mT
        if self.places is not None:
            places = self.places
            if not same:
                places = places.mT.unflatten(2, self.grids[0])
                places = F.interpolate(places, grids[0], mode="bilinear", align_corners=False).flatten(2).mT
            x = x + places
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        return x, grids

    def roles(self, sides: tuple[int, int], device: torch.device) -> Roles:
        """Where the tokens of a stage stand; a class token stands nowhere."""
        roles = Roles.grid(*sides)
        if self.class_token is not None:
            roles = Roles(**{name: F.pad(at, (1, 0), value=-1) for name, at in roles.labels.items()})
        return roles if device.type == "cpu" else roles.to(device)

    def pooled(self, x: Tensor) -> Tensor:
        if self.config.pooling == "places":
            return self.classifier(x)[..., 0]
        return self.classifier(x[:, 0] if self.class_token is not None else x.mean(1))

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        whole = labels.dim() == 1 and len(labels) == len(logits) and not labels.is_floating_point()
        require(whole, "labels [B] are whole numbers, one for each image", labels=labels, logits=logits)
        return F.cross_entropy(logits.float(), labels)


def layer_of(config: VisionConfig, method: Method, width: int, heads: int) -> nn.Module:
    kind = VisionBlock if isinstance(method.page, BlockPage) else VisionLayer
    return kind(config, method, width, heads)


def check_grids(model: VisionBackbone) -> None:
    """ValueError at once, not with the first image, where a page does not go with the grid of its stage."""
    for methods, sides in zip(model.config.methods(), model.grids, strict=True):
        for method in methods:
            if method.page.grid is not None:
                if 2 not in method.page.grid.axes:
                    raise Unsupported(
                        f"{method.name} is for grids of {method.page.grid.axes} axes, not of an image's two"
                    )
                method.page.grid.fits(method.config, sides)


def register() -> None:
    """Make AutoConfig and AutoModelForImageClassification know this model. Nothing does so by itself."""
    AutoConfig.register(VisionConfig.model_type, VisionConfig, exist_ok=True)
    AutoModelForImageClassification.register(VisionConfig, VisionBackbone, exist_ok=True)
