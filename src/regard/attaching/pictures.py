"""A page that puts another picture in the place of the prompt's: what it may ask of the model before.

Each text of a batch is asked alone, with its own picture. `attention` lets the model answer, greedily, the prompt as it
is or another instruction about the same picture, and gives what each answer token attended to on the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from regard.attaching.actors import AttentionCall
from regard.attaching.steered_calls import role_of
from regard.attaching.towers import image_token, layouts
from regard.core import Unsupported, require
from regard.core.errors import present
from regard.ops import View

ASIDE = "aside"  # the name of the stream in which a picture is asked about
LONGEST = 32  # answer tokens whose attention is read


@dataclass(eq=False)
class PictureRun:
    """One text and its picture.

    pixels  [1, C, H, W] as the tower is given them      grid  (rows, columns) of the visual tokens
    """

    steering: Any
    ids: Tensor
    pixels: Tensor
    grid: tuple[int, int] = (0, 0)

    def attention(self, instruction: str | Sequence[int] | None = None) -> Tensor:
        """[steps, layers, P] mean over heads of what each answer token attends to on the image.

        `instruction`, a text or its ids, takes the place of what follows the image; None: the prompt as it is.
        """
        model, steering = self.steering.model, self.steering
        ids, found = self.ids if instruction is None else self.asked(instruction), []
        cache, new, pixels = DynamicCache(config=model.config), ids[None], {"pixel_values": self.pixels}
        ends = {*ends_of(model)}
        for _ in range(LONGEST):
            steering.captured = {}
            out = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1, **pixels)
            new, pixels = out.logits[:, -1:].argmax(-1), {}
            weights = torch.stack([steering.captured[i] for i in sorted(steering.captured)])
            # a model may say the image's token too: that one is not of the picture
            found.append(weights[:, : found[0].shape[-1]] if found else weights)
            if int(new) in ends:
                break
        return torch.stack(found)

    def asked(self, instruction: str | Sequence[int]) -> Tensor:
        """The prompt with another text behind its image."""
        last = int((self.ids == image_token(self.steering.model)).nonzero().max())
        return torch.cat([self.ids[: last + 1], self.ids.new_tensor(self.tokens_of(instruction))])

    def tokens_of(self, instruction: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(instruction, str):
            return instruction
        tokenizer = present(
            self.steering.context.tokenizer,
            f"{self.steering.name} asks an instruction of its own: attach(..., tokenizer=...) gives its tokens",
        )
        return tokenizer(instruction, add_special_tokens=False)["input_ids"]


def ends_of(model: Any) -> tuple[int, ...]:
    end = model.generation_config.eos_token_id
    return () if end is None else tuple(end) if isinstance(end, list | tuple) else (end,)


def other_pictures(steering: Any, given: dict[str, Any]) -> Tensor:
    """The pixel values that the page gives, text by text."""
    ids, pixels = given.get("input_ids"), given.get("pixel_values")
    ok = ids is not None and isinstance(pixels, Tensor) and pixels.dim() == 4 and len(pixels) == len(ids)
    if not ok:
        raise Unsupported(
            f"{steering.name}: one picture [C, H, W] in each text; here they are packed otherwise"
        )
    mask, made = given.get("attention_mask"), []
    for text, (row, picture) in enumerate(zip(given["input_ids"], given["pixel_values"], strict=True)):
        own = row if mask is None else row[mask[text, -len(row) :].bool()]
        run = PictureRun(steering, own, picture[None])
        run.grid = grid_of(steering, run)
        made.append(steering.page.images(run, steering.config))
        require(made[-1].shape == run.pixels.shape, "a picture of the same size", given=tuple(made[-1].shape))
    return torch.cat(made).to(given["pixel_values"])


def grid_of(steering: Any, run: PictureRun) -> tuple[int, int]:
    """The rows and columns of a picture's visual tokens, from a forward of the prompt up to its image."""
    last = int((run.ids == image_token(steering.model)).nonzero().max())
    steering.model(
        input_ids=run.ids[None, : last + 1], pixel_values=run.pixels, use_cache=False, logits_to_keep=1
    )
    found = layouts(steering.model, steering.tower, {})
    if len(found) != 1 or found[0].grid is None:
        raise Unsupported(f"{steering.name}: one picture in each text, whose tokens lie on a grid")
    return found[0].grid


def capture(steering: Any, call: AttentionCall, view: View) -> None:
    """Note the newest token's attention to the image, the mean over heads, of one text; zero beyond a window."""
    w = view.weights(slice(view.new - 1, view.new))[0, :, 0].mean(0)
    label = role_of(call, "image")[0]
    whole = w.new_zeros(len(label)).scatter_(
        0, view.index[0, 0], w
    )  # what a window has left behind gets nothing
    steering.captured[call.site.layer] = whole[label]
