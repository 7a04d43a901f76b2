"""lm-eval's Hugging Face model, with likelihoods and texts that come through the cache.

One forward over a context and its continuation never decodes, so a cache policy never acts in it, and every likelihood
task would score full attention. Here a context and its continuation are parted:

    prefill    the context without its last token; what is attached acts on it, and evicts
    one by one the context's last token and the continuation without its last: each gives the logits of the next token

Words, stop sequences, prefix tokens and windows of long texts are lm-eval's own, so that with nothing attached, or
under neutral settings, every document scores as it does there.
"""

import copy
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from regard.attaching.hybrid_layer import has_states, holds_no_keys
from regard.bench.passes import own_bytes
from regard.core import Unsupported, require

NEEDS = ("lm_eval", "accelerate")
INSTALL = "pip install 'regard[eval]'"


def refuse_missing() -> None:
    """ValueError with what to install, where lm-eval or what its Hugging Face model needs is not there."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    require(not missing, f"lm-eval is installed: {INSTALL}", missing=missing)


@dataclass
class Text:
    """Tokens that are fed alike for one request, or for several whose continuations differ in the last token alone."""

    prompt: list[int]  # fed in one forward
    fed: list[int]  # fed one by one; each gives the logits of the next token
    answers: list[tuple[int, list[int]]] = field(default_factory=list)  # (which request, its continuation)


@dataclass
class Meter:
    """Bytes behind the caches at the end of each batch, and those that each decode step read."""

    attached: Any = None  # None: the model's own attention and cache
    held: int = 0
    kept: int = 0
    read: int = 0
    steps: int = 0
    cache: Any = None

    def after_forward(self, module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        self.cache = getattr(output, "past_key_values", None)
        if ids is not None and ids.shape[1] == 1 and self.cache is not None:
            self.steps += 1
            self.read += own_bytes(self.cache) if self.attached is None else self.attached.bytes_read()

    def close(self) -> None:
        """A batch has ended: count what it holds, and let go of it."""
        if self.cache is not None:
            own = self.attached is None
            self.held += own_bytes(self.cache) if own else self.attached.bytes_held()
            self.kept += own_bytes(self.cache) if own else self.attached.bytes_stored()
        self.cache = None

    def facts(self) -> dict[str, float | None]:
        """The sum over batches of what is held at their end, and the mean over decode steps of what is read."""
        read = self.read / self.steps if self.steps else None
        return {"bytes_held": self.held, "bytes_kept": self.kept, "bytes_read": read}


class ThroughCache:
    """What an lm-eval model does otherwise here. Mixed into HFLM by `language_model`.

    at_once    score texts without a context (loglikelihood_rolling) in one forward: for what acts on prompts
    advanced   called with the number of requests that each batch has answered
    """

    at_once: bool = False
    advanced: Callable[[int], None] = staticmethod(lambda requests: None)
    meter: Meter = Meter()
    asked: Sequence[Any] = ()

    model: Any
    tokenizer: Any
    max_length: int
    max_gen_toks: int
    batch_size: Any
    tok_encode: Callable[..., list[int]]

    @contextmanager
    def metered(self, attached: Any = None) -> Iterator[Meter]:
        """Within the block, bytes that are held and read are counted."""
        self.meter = Meter(attached)
        hook = self.model.register_forward_hook(self.meter.after_forward, with_kwargs=True)
        try:
            yield self.meter
        finally:
            hook.remove()
            self.meter = Meter()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self.asked = requests
        try:
            return super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]
        finally:
            self.asked = ()

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        return super().loglikelihood_rolling(requests, disable_tqdm=True)  # type: ignore[misc]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of each continuation, whether it is the greedy one), in the order of the requests."""
        for i, (_, context, continuation) in enumerate(requests):
            require(context and continuation, "a context and a continuation of at least one token",
                    **self._where(i), context=len(context), continuation=len(continuation))  # fmt: skip
            self._refuse_long(i, len(context) + len(continuation) - 1)
        rolling = bool(requests) and requests[0][0] is None
        found: list[Any] = [None] * len(requests)
        for batch in batches(texts(requests), int(self.batch_size), equal_lengths(self.model)):
            for request, *answer in scored(self.model, batch, self._pad(), rolling and self.at_once):
                found[request] = tuple(answer)
            self.meter.close()
            self.advanced(sum(len(text.answers) for text in batch))
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        from lm_eval.models.utils import normalize_gen_kwargs

        self.asked = requests
        try:
            for i, request in enumerate(requests):
                context, options = request.args
                most = normalize_gen_kwargs(options, self.max_gen_toks)["max_gen_toks"]
                self._refuse_long(i, len(self.tok_encode(context)) + most, generated=most)
            return super().generate_until(requests, disable_tqdm=True)  # type: ignore[misc]
        finally:
            self.asked = ()

    def _model_generate(self, context: Tensor, *args: Any, **options: Any) -> Tensor:
        made = super()._model_generate(context, *args, **options)  # type: ignore[misc]
        self.meter.close()
        self.advanced(len(context))
        return made

    def _pad(self) -> int:
        return self.tokenizer.pad_token_id or 0

    def _where(self, i: int) -> dict[str, Any]:
        """Whose request this is, for an error."""
        request = self.asked[i] if i < len(self.asked) else None
        return {} if request is None else {"task": request.task_name, "document": request.doc_id}

    def _refuse_long(self, i: int, tokens: int, **facts: int) -> None:
        rule = "a context with what follows it fits the model; nothing is cut off"
        require(
            tokens <= self.max_length, rule, **self._where(i), tokens=tokens, limit=self.max_length, **facts
        )


def language_model(model: Any, tokenizer: Any, batch_size: int = 1) -> Any:
    """An lm-eval model around a transformers model, whatever is attached to it.

        lm = language_model(model, tokenizer)
        with regard.attach(model, "snapkv", budget=0.25):
            lm_eval.simple_evaluate(lm, tasks=["arc_easy"])

    batch_size   rows of a batch; they may have unequal lengths

    Raises ValueError where lm-eval is not installed, or the model has an encoder.
    """
    refuse_missing()
    require(
        not model.config.is_encoder_decoder,
        "lm-eval's tasks are asked of a decoder",
        model=type(model).__name__,
    )
    require(batch_size >= 1, "batch_size >= 1", batch_size=batch_size)
    from lm_eval.models.huggingface import HFLM

    kind = type("AttachedLM", (ThroughCache, HFLM), {"__doc__": ThroughCache.__doc__})
    # lm-eval gives the tokenizer a padding token where it has none: a copy, not the caller's
    return kind(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size)


def texts(requests: Sequence[tuple[Any, list[int], list[int]]]) -> list[Text]:
    """The texts to be fed: one for all requests that feed the same tokens, parted at the same place.

    >>> [len(text.answers) for text in texts([(None, [1, 2], [3]), (None, [1, 2], [4]), (None, [1], [2, 3])])]
    [2, 1]
    """
    made: dict[tuple, Text] = {}
    for i, (_, context, continuation) in enumerate(requests):
        key = len(context), *context, *continuation[:-1]
        text = made.setdefault(key, Text(context[:-1], [*context[-1:], *continuation[:-1]]))
        text.answers.append((i, continuation))
    return list(made.values())


def batches(texts: Sequence[Text], size: int, equal: bool = False) -> Iterator[list[Text]]:
    """Longest prompts first. Rows without a prompt stand apart; with `equal` all whose prompts have unequal lengths."""
    batch: list[Text] = []
    for text in sorted(texts, key=lambda t: (-len(t.prompt), -len(t.fed), t.prompt, t.fed)):
        alike = not batch or bool(text.prompt) == bool(batch[0].prompt)
        if equal and batch:
            alike = len(text.prompt) == len(batch[0].prompt)
        if batch and (len(batch) == size or not alike):
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def equal_lengths(model: Any) -> bool:
    """Whether the rows of a batch have prompts of one length: a recurrence would run over padding to their left."""
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return any(has_states(layer) or holds_no_keys(layer) for layer in layers)


def padded(rows: Sequence[list[int]], pad: int, device: Any, left: bool) -> tuple[Tensor, Tensor]:
    """Tokens [B, N] and which of them are real [B, N]."""
    width = max(map(len, rows))
    filled = [[pad] * (width - len(r)) + r if left else r + [pad] * (width - len(r)) for r in rows]
    real = [[i >= width - len(r) if left else i < len(r) for i in range(width)] for r in rows]
    return torch.tensor(filled, device=device), torch.tensor(real, device=device)


def scored(model: Any, batch: Sequence[Text], pad: int, at_once: bool) -> list[tuple[int, float, bool]]:
    """(request, log-likelihood in nats, is greedy) of every answer. Softmax in float32, sums in float64."""
    device = model.device
    rows = torch.tensor([b for b, text in enumerate(batch) for _ in text.answers], device=device)
    asked = [answer for text in batch for answer in text.answers]
    targets, real = padded([continuation for _, continuation in asked], 0, device, left=at_once)  # [R, T]
    total = torch.zeros(len(asked), dtype=torch.float64, device=device)
    greedy = torch.ones(len(asked), dtype=torch.bool, device=device)
    with torch.inference_mode():
        for t, logits in enumerate((whole if at_once else stepwise)(model, batch, pad)):
            logs, target = logits.float().log_softmax(-1), targets[:, t]
            best = logs.argmax(-1)[rows]
            logs = logs[rows, target]
            total += torch.where(real[:, t], logs.double(), 0.0)
            greedy &= (best == target) | ~real[:, t]
    return [(i, *answer) for (i, _), answer in zip(asked, zip(total.tolist(), greedy.tolist()), strict=True)]


def stepwise(model: Any, batch: Sequence[Text], pad: int) -> Iterator[Tensor]:
    """Logits [B, V] after each token that is fed; rows that have ended are fed padding."""
    fed, real = padded([text.fed for text in batch], pad, model.device, left=False)
    mask, cache = real[:, :0], None
    if batch[0].prompt:
        prompt, mask = padded([text.prompt for text in batch], pad, model.device, left=True)
        cache = cache_of(forward(model, prompt, mask, None), model)
    for t in range(fed.shape[1]):
        mask = torch.cat([mask, real[:, t : t + 1]], 1)
        out = forward(model, fed[:, t : t + 1], mask, cache)
        cache = cache_of(out, model)
        yield out.logits[:, -1]


def whole(model: Any, batch: Sequence[Text], pad: int) -> Iterator[Tensor]:
    """Logits [B, V] at the last places of the texts, which end together, from one forward over all of them."""
    tokens, mask = padded([text.prompt + text.fed for text in batch], pad, model.device, left=True)
    logits = forward(model, tokens, mask, None, keep=max(len(text.fed) for text in batch)).logits
    yield from logits.unbind(1)


def cache_of(output: Any, model: Any) -> Any:
    """The cache that a forward gives back, under which the next goes on."""
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        name = type(model).__name__
        raise Unsupported(
            f"{name} gives no past_key_values back, under which a continuation could follow its prompt"
        )
    return cache


def forward(model: Any, tokens: Tensor, mask: Tensor, cache: Any, keep: int = 1) -> Any:
    """One forward over new tokens [B, n] of texts [B, N], positions counted from the first real token of each row."""
    places: dict[str, Tensor] = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        places["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    return model(
        input_ids=tokens, attention_mask=mask.long(), past_key_values=cache, use_cache=True, logits_to_keep=keep,
        **places,
    )  # fmt: skip
