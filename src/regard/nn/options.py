"""What Hugging Face's callers ask of a forward beside its named arguments: what is accepted is used, all else refused.

Texts that are packed into one row, as DataCollatorWithFlattening does it, are told by `position_ids` that start again,
by `seq_idx`, or by `cu_seq_lens_q`; where several are given they have to agree.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.core import Unsupported, near, require
from regard.ops import at_least_float32
from regard.ops.packed import borders

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
IGNORED = -100  # labels that are not scored
SINGLE = "position_ids count the tokens of a text; where they start again, at the value of the first, a text begins"


@dataclass(frozen=True)
class Options:
    """num_items_in_batch  labels of the whole batch that a step accumulates, by which the summed loss is divided
    hidden              whether the states between layers are returned
    packed              the arguments of packed texts that were given"""

    num_items_in_batch: Tensor | int | None
    hidden: bool
    packed: Mapping[str, Any]


def read_options(config: Any, given: dict[str, Any], *, packs: bool) -> Options:
    """The options among `given`; None asks for nothing. Unsupported with the name for whatever is not among them."""
    given = {name: value for name, value in given.items() if value is not None}
    segments = given.pop("token_type_ids", None)
    if segments is not None and bool(segments.any()):
        raise Unsupported("token_type_ids that differ: these models know no segments")
    if given.pop("output_attentions", config.output_attentions):
        raise Unsupported("output_attentions: a mechanism gives its output, and builds no weights")
    hidden = given.pop("output_hidden_states", config.output_hidden_states)
    items = given.pop("num_items_in_batch", None)
    packed = {name: given.pop(name) for name in PACKED if packs and name in given}
    known = ("num_items_in_batch", "output_hidden_states", "return_dict", *(PACKED if packs else ()))
    for name in given:
        raise Unsupported(f"forward takes no {name!r}; {near(name, known)}")
    return Options(items, bool(hidden), packed)


def packed_texts(
    batch: int, n: int, position_ids: Tensor | None, seq_idx: Tensor | None, options: Options,
    token_mask: Tensor | None, attention_mask: Tensor | None, seen: int,
) -> list[int] | None:  # fmt: skip
    """The lengths of the texts that [batch, n] tokens hold, row after row, or None where a row is one text."""
    if torch.compiler.is_compiling() and not (
        position_ids is None and seq_idx is None and not options.packed
    ):
        raise Unsupported("the borders of packed texts are numbers: torch.compile cannot trace them")
    found = {}
    if position_ids is not None:
        ids = by_row("position_ids", position_ids, batch, n)
        if seen or token_mask is not None:
            check_counted(ids, token_mask, attention_mask, seen)
        else:
            found["position_ids"] = starts_of(ids)
    if seq_idx is not None:
        ids = by_row("seq_idx", seq_idx, batch, n)
        found["seq_idx"] = ids.new_ones(batch, 1, dtype=torch.bool), ids[:, 1:] != ids[:, :-1]
    lengths = {name: lengths_between(torch.cat(parts, 1)) for name, parts in found.items()}
    if options.packed:
        lengths["cu_seq_lens_q"] = flash_lengths(batch * n, options.packed)
    require(len({tuple(x) for x in lengths.values()}) <= 1, "what is said of packed texts agrees", **lengths)
    texts = next(iter(lengths.values()), None)
    if texts is None or texts == [n] * batch:
        return None
    if seen or token_mask is not None:
        raise Unsupported(
            "packed texts beside padding or past_key_values: pack tokens only, and from their beginning"
        )
    return texts


def by_row(name: str, ids: Tensor, batch: int, n: int) -> Tensor:
    fits = ids.dim() == 2 and ids.shape[0] in (1, batch) and ids.shape[1] == n
    require(fits, f"{name} is [B, N]", B=batch, N=n, **{name: ids})
    return ids.expand(batch, n)


def starts_of(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where a text begins, [B, 1] and [B, N - 1]."""
    again = ids[:, 1:] != ids[:, :-1] + 1
    require(bool((ids[:, 1:] == ids[:, :1])[again].all()), SINGLE, position_ids=ids.tolist())
    return again.new_ones(len(ids), 1), again


def check_counted(ids: Tensor, token_mask: Tensor | None, attention_mask: Tensor | None, seen: int) -> None:
    """Position ids of tokens beside padding, or after a cache, are those that the layers count."""
    n = ids.shape[1]
    if attention_mask is None:
        counted = torch.arange(seen, seen + n, device=ids.device).expand_as(ids)
    else:
        counted = (attention_mask.long().cumsum(1) - 1)[:, -n:]
    wrong = (ids != counted) if token_mask is None else (ids != counted) & token_mask
    require(not bool(wrong.any()), "position_ids count the tokens of a text, padding left out",
            position_ids=ids.tolist(), counted=counted.tolist())  # fmt: skip


def lengths_between(starts: Tensor) -> list[int]:
    at = starts.flatten().nonzero()[:, 0].tolist()
    return [b - a for a, b in zip(at, [*at[1:], starts.numel()])]


def flash_lengths(tokens: int, packed: Mapping[str, Any]) -> list[int]:
    """Of the arguments that FlashAttention takes; queries and keys are the same tokens here."""
    require("cu_seq_lens_q" in packed, "cu_seq_lens_q says where packed texts begin", given=list(packed))
    lengths = borders(packed["cu_seq_lens_q"], tokens, "cu_seq_lens_q")
    if "cu_seq_lens_k" in packed:
        keys = borders(packed["cu_seq_lens_k"], tokens, "cu_seq_lens_k")
        require(keys == lengths, "a text asks itself: cu_seq_lens_k is cu_seq_lens_q", q=lengths, k=keys)
    for name in ("max_length_q", "max_length_k"):
        longest = int(packed.get(name, max(lengths)))
        require(
            longest >= max(lengths),
            f"{name} is that of the longest text",
            longest=max(lengths),
            **{name: longest},
        )
    return [length for length in lengths if length]


def next_labels(labels: Tensor, texts: list[int] | None) -> Tensor:
    """The label of the token after each, none after the last token of a text."""
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    if texts is not None:
        ends = torch.tensor(texts, device=labels.device).cumsum(0) - 1
        following = following.flatten().index_fill(0, ends, IGNORED).view_as(labels)
    return following


def token_loss(logits: Tensor, labels: Tensor, options: Options) -> Tensor:
    """The mean cross-entropy of the labels, or their sum over num_items_in_batch, as steps that accumulate need it."""
    require(labels.shape == logits.shape[:2], "labels stand under the tokens", labels=labels, logits=logits)
    total = F.cross_entropy(
        at_least_float32(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    count = options.num_items_in_batch
    count = (labels != IGNORED).sum().clamp(min=1) if count is None else count
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)
