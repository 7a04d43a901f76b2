"""A search of a page's own in the place of generate's: what it may ask of the model, step by step.

A page gives `search(run, cfg) -> ids [1, T]`, the tokens that follow a prompt. `run` reads the prompt for as many beams
as are asked for, feeds a token to each, looks ahead without keeping what it saw, changes the order of the beams, and
takes tokens back. What is taken back is gone from the cache and from what was written down.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from regard.attaching.actors import AttentionCall
from regard.attaching.streams_beside import OF_TOKENS
from regard.core import Unsupported, require
from regard.core.errors import present
from regard.ops import View

# settings of generate() that a search reads, or that are checked elsewhere; others are refused
READ = (
    "max_new_tokens", "max_length", "num_beams", "eos_token_id", "pad_token_id", "bos_token_id", "use_cache",
    "do_sample", "return_dict_in_generate", "transformers_version", "output_logits",
)  # fmt: skip


@dataclass(eq=False)
class SearchRun:
    """The model under a search of one text; R beams.

    prompt      [1, N] ids      tokens  how many may follow      ends  ids that end a text
    fed         tokens that were fed since the prompt, T
    attention   [R, T, T] of the last layer: what each of them attends to among these, the maximum over heads, of rows
                that sum to 1 over all keys; zeros above the diagonal
    """

    steering: Any
    inputs: dict[str, Tensor]
    tokens: int
    ends: tuple[int, ...]
    cache: Any = None
    rows: list[Tensor] = field(default_factory=list)  # of each token that was fed: [R, its number]
    first: Tensor | None = None  # [1, V] logits of the first token

    @property
    def fed(self) -> int:
        return len(self.rows)

    @property
    def prompt(self) -> Tensor:
        return self.inputs["input_ids"]

    def begin(self, beams: int) -> Tensor:
        """[R, V] logits of the first token, for so many beams."""
        self.cache = DynamicCache(config=self.steering.model.config)
        out = self.steering.model(**self.inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        self.cache.batch_repeat_interleave(beams)
        self.rows, self.first = [], out.logits[:, -1].float()
        return self.first.repeat_interleave(beams, 0)

    def feed(self, tokens: Tensor) -> Tensor:
        """[R, V] logits after a token [R] for each row, which is kept."""
        logits, seen = self._forward(self.cache, tokens)
        self.rows.append(seen)
        return logits

    def look(self, candidates: Tensor) -> Tensor:
        """[R, c, T + 1] what each of candidates [R, c], fed as the next token, attends to; nothing is kept."""
        count = candidates.shape[1]
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(count)
        _, seen = self._forward(cache, candidates.flatten())
        return seen.unflatten(0, (-1, count))

    def _forward(self, cache: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the last layer's attention of the new token to what was fed since the prompt, itself included.

        No text has padding here, so there is no mask: from one Qwen-VL would make positions for all that is stored.
        """
        steering = self.steering
        steering.fed, steering.seen = len(self.rows) + 1, None
        out = steering.model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True)
        return out.logits[:, -1].float(), steering.seen

    def reorder(self, rows: Tensor) -> None:
        """Put the state of row rows[i] in the place of row i."""
        self.cache.reorder_cache(rows)
        self.rows = [seen[rows] for seen in self.rows]

    def take_back(self, count: int) -> None:
        """Forget the newest `count` tokens."""
        require(0 <= count <= len(self.rows), "as many tokens as were fed", count=count, fed=len(self.rows))
        if count:
            self.cache.crop(-count)
            self.rows = self.rows[:-count]

    @property
    def attention(self) -> Tensor:
        fed = len(self.rows)
        padded = [torch.nn.functional.pad(seen, (0, fed - seen.shape[-1])) for seen in self.rows]
        return torch.stack(padded, 1)


def note_newest(steering: Any, call: AttentionCall, view: View) -> None:
    """[R, fed] what the newest token attends to since the prompt: last layer, the maximum over heads, normalised."""
    if steering.fed and view.new == 1 and call.site.layer == steering.context.layers_of_text - 1:
        most = view.weights()[:, :, -1].amax(1)
        steering.seen = (most / most.sum(-1, keepdim=True))[:, -steering.fed :]


def generate_of(steering: Any) -> Any:
    """`generate` of the model while the page searches. Of output_logits it gives those of the first token alone."""

    @torch.no_grad()
    def generate(input_ids: Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        model = steering.model
        config = copy.deepcopy(generation_config or model.generation_config)
        unused = config.update(**kwargs)
        refuse_settings(steering, config)
        inputs = {"input_ids": input_ids, **unused} if input_ids is not None else dict(unused)
        refuse_objects(steering, inputs)
        inputs = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
        require(inputs.get("input_ids") is not None, "a search reads input_ids", inputs=sorted(inputs))
        most = config.max_new_tokens or (config.max_length or 20) - inputs["input_ids"].shape[1]
        end = config.eos_token_id
        ends = () if end is None else tuple(end) if isinstance(end, list | tuple) else (end,)
        pad = config.pad_token_id if config.pad_token_id is not None else (ends[0] if ends else 0)
        steering.acted += 1
        found, first = [], []
        for own in one_by_one(steering, inputs):
            run = SearchRun(steering, own, most, ends)
            found.append(steering.page.search(run, steering.config)[0])
            first.append(run.first)
            steering.fed = 0
        longest = max(len(ids) for ids in found)
        ids = [torch.nn.functional.pad(x, (0, longest - len(x)), value=int(pad)) for x in found]
        whole = torch.cat([inputs["input_ids"], torch.stack(ids)], 1)
        if not config.return_dict_in_generate:
            return whole
        logits = (torch.cat([present(x, "a search that began") for x in first]),)
        return GenerateDecoderOnlyOutput(sequences=whole, logits=logits if config.output_logits else None)

    return generate


def one_by_one(steering: Any, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The inputs of each text of a batch, without its padding."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if len(ids) == 1 and (mask is None or bool(mask.all())):
        return [inputs]
    packed = [n for n, x in inputs.items() if n not in OF_TOKENS and len(x) % len(ids)]
    if packed or ("image_grid_thw" in inputs and len(ids) > 1):
        raise Unsupported(
            f"{steering.name} searches one text after the other, and {packed or 'pixels'} are packed"
        )
    found = []
    for text in range(len(ids)):
        real = torch.ones_like(ids[text], dtype=torch.bool) if mask is None else mask[text].bool()
        found.append({
            n: x[text : text + 1][:, real] if n in OF_TOKENS else x.chunk(len(ids))[text] for n, x in inputs.items()
        })  # fmt: skip
    return found


def refuse_settings(steering: Any, config: GenerationConfig) -> None:
    """Raise for settings of generate() that the search would leave out."""
    default, own = GenerationConfig(), steering.model.generation_config
    asked = {k: v for k, v in config.to_diff_dict().items() if k not in READ and k[:1] != "_"}
    asked = {
        k: v for k, v in asked.items() if v and v not in (getattr(default, k, None), getattr(own, k, None))
    }
    if config.do_sample:
        asked["do_sample"] = True
    beams = getattr(steering.config, "beams", None)
    require(config.num_beams in (None, 1, beams), f"{steering.name} takes its beams from its settings",
            num_beams=config.num_beams, beams=beams)  # fmt: skip
    if asked:
        raise Unsupported(
            f"{steering.name} searches by itself and reads no {', '.join(sorted(asked))} of generate()"
        )


def refuse_objects(steering: Any, inputs: dict[str, Any]) -> None:
    """Raise for processors, criteria, streamers and caches: generate() reads them, and a search does not."""
    unread = [name for name, x in inputs.items() if x is not None and not isinstance(x, Tensor)]
    if unread:
        raise Unsupported(
            f"{steering.name} searches by itself and reads no {', '.join(unread)} of generate()"
        )
