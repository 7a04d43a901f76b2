"""Prompts in pairs: a clean one that the model answers, and a corrupted one of the same form that it answers otherwise.

    m(x) = logit(target) - logit(foil), or the log probability of the target, at the last token of x

A pair is batched with padding to the left. Tokens of the two prompts belong together column by column where they are
equally long; else `align` says which token of the clean prompt each one of the corrupted stands for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from regard.core import require

Metric = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # logits [B, V], target, foil [B] -> [B]
Align = Sequence[tuple[int, int]] | Literal["start", "end"]
CONSTANT = 1e-6  # a metric that differs by no more between all clean and corrupted prompts has no effects


@dataclass(frozen=True)
class Batch:
    """Prompts [B, N] with padding to the left; `mask` [B, N] is 1 at tokens.

    image   what a processor makes of one text's images (pixel_values, ...), which all texts of the batch share
    """

    ids: Tensor
    mask: Tensor
    image: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(-1)

    def inputs(self) -> dict[str, Tensor]:
        """What a model is given; positions count the tokens of each text."""
        images = {name: x.repeat(len(self), *[1] * (x.dim() - 1)) for name, x in self.image.items()}
        if bool(self.mask.all()):
            return {"input_ids": self.ids, **images}
        rule = (
            "prompts beside an image are equally long: positions of image tokens are not counted one by one"
        )
        require(not images, rule, tokens=self.lengths.tolist())
        places = (self.mask.cumsum(-1) - 1).clamp(min=0)
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": places}

    def at(self, texts: Sequence[int]) -> "Batch":
        """These texts, without the padding that all of them have."""
        ids, mask = self.ids[list(texts)], self.mask[list(texts)]
        first = ids.shape[1] - int(mask.sum(-1).max())
        return Batch(ids[:, first:], mask[:, first:], self.image)

    def repeated(self, times: int) -> "Batch":
        """The texts, `times` over."""
        return Batch(self.ids.repeat(times, 1), self.mask.repeat(times, 1), self.image)

    def to(self, device: Any) -> "Batch":
        images = {name: x.to(device) for name, x in self.image.items()}
        return Batch(self.ids.to(device), self.mask.to(device), images)


def batch_of(texts: Sequence[Sequence[int]], pad: int = 0) -> Batch:
    require(
        len(texts) > 0 and all(len(t) > 0 for t in texts), "prompts have tokens", lengths=[*map(len, texts)]
    )
    width = max(map(len, texts))
    ids = torch.tensor([[pad] * (width - len(t)) + list(t) for t in texts])
    mask = torch.tensor([[0] * (width - len(t)) + [1] * len(t) for t in texts])
    return Batch(ids, mask)


@dataclass(frozen=True)
class Pairs:
    """Clean and corrupted prompts, the token that is right and the one that is not.

    target, foil   [B] token ids; foil None: the metric looks at the target alone
    align          [B, M] the column of the clean batch for each column of the corrupted one, -1: none; None: the same
    """

    clean: Batch
    corrupt: Batch
    target: Tensor
    foil: Tensor | None = None
    align: Tensor | None = None
    metric: Metric = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        sizes = {len(self.clean), len(self.corrupt), len(self.target)}
        require(len(sizes) == 1, "a corrupted prompt and a target for each clean one", sizes=sorted(sizes))
        if self.metric is None:
            object.__setattr__(self, "metric", logprob if self.foil is None else logit_diff)

    def __len__(self) -> int:
        return len(self.target)

    def at(self, pairs: Sequence[int]) -> "Pairs":
        """These pairs; of those that are aligned the padding stays."""
        chosen = list(pairs)
        pick = lambda b: b.at(chosen) if self.align is None else Batch(b.ids[chosen], b.mask[chosen], b.image)  # noqa: E731
        foil = None if self.foil is None else self.foil[chosen]
        align = None if self.align is None else self.align[chosen]
        return replace(self, clean=pick(self.clean), corrupt=pick(self.corrupt), target=self.target[chosen],
                       foil=foil, align=align)  # fmt: skip

    def to(self, device: Any) -> "Pairs":
        move = lambda x: None if x is None else x.to(device)  # noqa: E731
        return replace(self, clean=self.clean.to(device), corrupt=self.corrupt.to(device),
                       target=move(self.target), foil=move(self.foil), align=move(self.align))  # fmt: skip

    def swapped(self) -> "Pairs":
        """The other way round: what is corrupted is clean."""
        require(self.align is None, "aligned prompts of unequal length are patched one way")
        return replace(self, clean=self.corrupt, corrupt=self.clean)

    def score(self, logits: Tensor) -> Tensor:
        """[n B] the metric of logits [n B, V], the pairs `n` times over."""
        times = len(logits) // len(self)
        foil = None if self.foil is None else self.foil.repeat(times)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return self.metric(wide, self.target.repeat(times), foil)

    def donor(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B, H, N, E] of clean prompts at the columns of the corrupted, and which [B, M] have one (None: all)."""
        if self.align is None:
            return x, None
        at = self.align.clamp(min=0)[:, None, :, None]
        return x.take_along_dim(at, 2), self.align >= 0


def logit_diff(logits: Tensor, target: Tensor, foil: Tensor | None) -> Tensor:
    """logit(target) - logit(foil) [B] of logits [B, V]."""
    require(foil is not None, "a difference of logits has a foil")
    return logits.gather(1, torch.stack([target, foil], 1)).diff(dim=1)[:, 0].neg()  # type: ignore[list-item]


def logprob(logits: Tensor, target: Tensor, foil: Tensor | None = None) -> Tensor:
    """log p(target) [B] of logits [B, V]."""
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]


def prob(logits: Tensor, target: Tensor, foil: Tensor | None = None) -> Tensor:
    """p(target) [B] of logits [B, V]."""
    return logprob(logits, target).exp()


def one_token(tokenizer: Any, text: str, what: str = "the target") -> int:
    """The id of a text that is one token; else an error that shows what it is."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts = [tokenizer.decode([i]) for i in ids]
    require(
        len(ids) == 1,
        f"{what} is one token of this model (a leading space may matter)",
        text=text,
        tokens=parts,
    )
    return int(ids[0])


def make_pairs(
    tokenizer: Any,
    clean: Sequence[str],
    corrupt: Sequence[str],
    target: Sequence[str],
    foil: Sequence[str] | None = None,
    align: Sequence[Align] | Align | None = None,
    metric: Metric | None = None,
) -> Pairs:
    """Pairs from texts. Prompts of unequal length need `align`.

    align   for each pair (clean token, corrupted token) by number, or "start" or "end": counted from there

    Raises ValueError where a target or foil is not one token, or lengths differ without an alignment.
    """
    texts = [[tokenizer.encode(t) for t in side] for side in (clean, corrupt)]
    require(len(clean) == len(corrupt) == len(target), "as many corrupted prompts and targets as clean ones",
            clean=len(clean), corrupt=len(corrupt), target=len(target))  # fmt: skip
    wanted = torch.tensor([one_token(tokenizer, t) for t in target])
    wrong = None if foil is None else torch.tensor([one_token(tokenizer, t, "the foil") for t in foil])
    pad = tokenizer.pad_token_id or 0
    sides = [batch_of(side, pad) for side in texts]
    return Pairs(sides[0], sides[1], wanted, wrong, aligned(sides[0], sides[1], align), metric)  # type: ignore[arg-type]


def aligned(clean: Batch, corrupt: Batch, align: Sequence[Align] | Align | None) -> Tensor | None:
    """[B, M] the clean column of each corrupted one; None where all prompts are equally long and nothing is said."""
    lengths, others = clean.lengths.tolist(), corrupt.lengths.tolist()
    if align is None:
        apart = {i: (n, m) for i, (n, m) in enumerate(zip(lengths, others, strict=True)) if n != m}
        rule = "clean and corrupted prompts are equally long, or `align` says which tokens belong together"
        require(not apart, rule, tokens=dict(list(apart.items())[:4]))
        return None
    each = [align] * len(lengths) if isinstance(align, str) or is_pairs(align) else list(align)
    require(len(each) == len(lengths), "an alignment for each pair", given=len(each), pairs=len(lengths))
    result = torch.full(corrupt.ids.shape, -1)
    for row, (given, n, m) in enumerate(zip(each, lengths, others, strict=True)):
        for i, j in tokens_of(given, n, m):
            require(
                0 <= i < n and 0 <= j < m, "aligned tokens are in their prompts", pair=(i, j), tokens=(n, m)
            )
            result[row, corrupt.ids.shape[1] - m + j] = clean.ids.shape[1] - n + i
    return result


def is_pairs(align: Any) -> bool:
    """Whether this is one alignment, and not one for each pair."""
    return bool(align) and all(len(p) == 2 and all(isinstance(i, int) for i in p) for p in align)


def tokens_of(align: Align, n: int, m: int) -> list[tuple[int, int]]:
    if align == "start":
        return [(i, i) for i in range(min(n, m))]
    if align == "end":
        return [(n - 1 - i, m - 1 - i) for i in range(min(n, m))]
    require(not isinstance(align, str), 'align is "start", "end" or pairs of numbers', align=align)
    return [(int(i), int(j)) for i, j in align]  # type: ignore[misc]
