"""What the verbs of an edit do to the numbers of a site: [texts, heads, rows, width or keys]."""

from typing import Any

import torch
from torch import Tensor

from regard.attaching.targets import Rows, heads_of
from regard.core import Edit, require
from regard.core.edit import HEADED, int_tuple
from regard.core.errors import present

Index = tuple[Tensor, Tensor, Tensor]


def texts_of(edit: Edit, batch: int) -> list[int]:
    """The texts of the batch that an edit's site names."""
    texts = int_tuple(edit.site.texts)
    if texts is None:
        return list(range(batch))
    require(all(0 <= t < batch for t in texts), "a site's texts are of the batch", texts=texts, batch=batch)
    return list(texts)


def value_at(
    value: Any, edit: Edit, like: Tensor, heads: list[int], rows: Rows, columns: list[int], of: int
) -> Tensor | None:
    """`value` for these heads and columns: a number, or [texts, heads, columns, width] of a tensor.

    `of`: how many heads the layer has; `like` [B, .., width] is the quantity. A tensor has an entry for each row of the
    site; of a layer as a whole it has no axis of heads.
    """
    if value is None:
        return None
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if value.dim() == 0:
        return value
    if edit.site.quantity not in HEADED and value.dim() == 3:
        value = value[:, None]
    texts, edit_heads = texts_of(edit, like.shape[0]), heads_of(edit.site, of)
    wanted = (len(texts), len(edit_heads), rows.count(), like.shape[-1])
    try:
        value = value.expand(wanted)
    except RuntimeError as error:
        rule = "a value broadcasts to [texts, heads, rows, width] of its site"
        raise ValueError(f"{rule}: {tuple(value.shape)}, not {wanted} ({edit})") from error
    value = value[:, [edit_heads.index(h) for h in heads]]
    at = [rows.columns.index(c) for c in columns]
    if rows.number is None:
        return value[:, :, at]
    return value.take_along_dim(rows.number[texts][:, at].clamp(min=0)[:, None, :, None], 2)


def changed(x: Tensor, edit: Edit, value: Tensor | None) -> Tensor:
    """x [texts, heads, rows, width] after a verb that looks at each of its numbers, or vectors, alone."""
    verb = edit.verb
    if verb in ("block", "zero"):
        hidden = verb == "block" and edit.site.quantity == "scores"
        return torch.full_like(x, -torch.inf if hidden else 0.0)
    value = present(value, f"{verb} takes a value")
    if verb == "scale":
        return x * value
    return x + value if verb == "add" else value.expand_as(x)


def projected(x: Tensor, edit: Edit, source: Tensor | None) -> Tensor:
    """x without its part in the space of `value` [width, r], or with that of the source."""
    basis = edit.value.to(dtype=x.dtype, device=x.device)
    ok = basis.dim() == 2 and basis.shape[0] == x.shape[-1]
    require(ok, "project takes orthonormal columns [width, r]", value=tuple(basis.shape), width=x.shape[-1])
    off = (basis.detach().mT @ basis.detach()).float() - torch.eye(basis.shape[1], device=x.device)
    require(
        float(off.abs().max()) <= 1e-2, "the columns of project are orthonormal", off=float(off.abs().max())
    )
    new = -x if source is None else source - x
    return x + new @ basis @ basis.mT


def averaged(x: Tensor, here: Tensor | None) -> Tensor:
    """The mean over the rows of each text, those that are `here` [texts, 1, rows, 1]."""
    if here is None:
        return x.mean(2, keepdim=True).expand_as(x)
    total = torch.where(here, x, 0).sum(2, keepdim=True)
    return (total / here.sum(2, keepdim=True).clamp(min=1)).expand_as(x)


def donors(edit: Edit, texts: list[int], batch: int) -> list[int]:
    """For each text of the site the text whose quantity it gets."""
    if edit.value is None:
        require(batch > 1, "resample takes another text of the batch: there are two or more", texts=batch)
        return [(t + 1) % batch for t in texts]
    given = list(int_tuple(edit.value) or ())
    given = given * len(texts) if len(given) == 1 else given
    ok = len(given) == len(texts) and all(0 <= t < batch for t in given)
    require(ok, "resample names a text of the batch for each one of its site", value=edit.value, batch=batch)
    return given


def spread(w: Tensor, keys: Tensor) -> Tensor:
    """Weights whose mass on these keys [.., n] lies evenly on them."""
    mass = torch.where(keys, w, 0).sum(-1, keepdim=True)
    return torch.where(keys, mass / keys.expand_as(w).sum(-1, keepdim=True).clamp(min=1), w)


def moved(w: Tensor, source: Tensor, to: Tensor, share: float) -> Tensor:
    """Take `share` of the mass on source and give it to `to`; a row that sees no `to` keeps its mass."""
    visible = to.expand_as(w)
    taken = torch.where(source, w * share, 0)
    mass = torch.where(visible, w, 0)
    even = visible / visible.sum(-1, keepdim=True).clamp(min=1)
    total = mass.sum(-1, keepdim=True)
    part = torch.where(total > 0, mass / total.clamp(min=1e-30), even.to(w.dtype))
    new = w - taken + taken.sum(-1, keepdim=True) * part
    return torch.where(visible.any(-1, keepdim=True), new, w)


def edited(x: Tensor, edit: Edit, heads: list[int], rows: Rows, real: Tensor | None) -> Tensor:
    """x [B, H, N, width] after an edit of vectors (q, k, v, z, a layer's stream) at these heads and rows.

    real [B, N]: which columns are of tokens and not of padding; None: all.
    """
    batch, of = x.shape[:2]
    texts, columns = texts_of(edit, batch), rows.columns
    at, here = index(texts, heads, columns), rows.here(columns)
    if here is None and real is not None:
        here = real[:, None, columns, None]
    here = None if here is None else here[texts]
    old = x[at]
    if edit.verb == "mean" and edit.value is None:
        new = averaged(old, here)
    elif edit.verb == "resample":
        new = resampled(x, edit, at, rows, real)
    elif edit.verb == "project":
        new = projected(old, edit, value_at(edit.source, edit, x, heads, rows, columns, of))
    else:
        new = changed(old, edit, value_at(edit.value, edit, x, heads, rows, columns, of))
    result = x.clone()
    result[at] = (new if here is None else torch.where(here, new, old)).to(x.dtype)
    return result


def resampled(x: Tensor, edit: Edit, at: Index, rows: Rows, real: Tensor | None) -> Tensor:
    """x [B, H, N, width] of the donors at the same rows, whatever padding lies before them."""
    texts = at[0].flatten().tolist()
    given = donors(edit, texts, x.shape[0])
    number = rows.number
    if number is None and real is not None:
        number = (real.cumsum(-1) - 1).masked_fill(~real, -1)[:, rows.columns]
    if number is None:
        return x[torch.tensor(given)[:, None, None], at[1], at[2]]
    same = number[texts][:, :, None] == number[given][:, None]  # [texts, columns, columns of the donor]
    there = bool((same.any(-1) | (number[texts] < 0)).all())
    require(there, "resample takes from a text that has the same rows", texts=texts, donors=given)
    column = torch.tensor(rows.columns)[same.to(torch.uint8).argmax(-1)][:, None]
    return x[torch.tensor(given)[:, None, None], at[1], column]


def index(texts: list[int], heads: list[int], columns: list[int]) -> Index:
    return torch.tensor(texts)[:, None, None], torch.tensor(heads)[:, None], torch.tensor(columns)[None]
