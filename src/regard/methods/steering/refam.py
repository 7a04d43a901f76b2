"""RefAM: stop words put behind a prompt draw off attention that is nobody's; their maps are dropped.

    A^l_pw                 weight of patch p on word w, a softmax over the words, in layer l; magnets are among them
    s a sink in layer l    mean over p of A^l_ps >= σ, in the deep layers: suppressed, A_ps = 0, or redirected, its
                           weight shared equally among the magnets
    map_p = mean over layers, heads and content words that are no sink of A^l_pw,    point = argmax_p map_p

A patch must spend its whole attention on some word. Of the background, words of content get what is left over; magnets,
stop words that are appended, get it in their place. Stop words of the prompt itself are dropped likewise. Rows of a
suppressed sink add up to less than 1, so that no other word is given its weight.

>>> import torch
>>> a = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3], [0.1, 0.8, 0.1]])[None, None, None]  # cat, the, magnet
>>> cat, magnet = torch.tensor([[True, False, False]]), torch.tensor([[False, False, True]])
>>> found = measure(a, cat, magnet, Config())
>>> found.map, found.peak
(tensor([[0.9000, 0.2000, 0.1000]]), tensor([0]))
>>> handled(a[0], magnet, Config(sink=0.45, handle="redirect"))[0, 0]  # the mean of "the" is 0.47
tensor([[0.9000, 0.0000, 0.1000],
        [0.2000, 0.0000, 0.8000],
        [0.1000, 0.0000, 0.9000]])
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, require
from regard.kinds.steering import SteeringPage
from regard.ops.steered import Steered

HANDLE = ("suppress", "redirect", "keep")


@dataclass(frozen=True)
class Config:
    sink: float = 0.5  # σ, the share of all patches' attention from which on a word is a sink
    deep: float = 0.5  # sinks are looked for from this share of the layers on
    # sinks lose their weight; or magnets share it ("redirect"); or nothing is done ("keep")
    handle: str = "suppress"

    def __post_init__(self) -> None:
        require(0 < self.sink <= 1, "0 < sink <= 1", sink=self.sink)
        require(0 <= self.deep <= 1, "0 <= deep <= 1", deep=self.deep)
        require(self.handle in HANDLE, f"handle is one of {HANDLE}", handle=self.handle)


@dataclass(frozen=True)
class Found:
    """map [B, P] of the content words and its highest patch [B], the point that a segmenter is prompted with."""

    map: Tensor
    peak: Tensor


def sinks(w: Tensor, cfg: Config) -> Tensor:
    """[B, n] bool of weights [B, H, P, n] of one layer."""
    return w.float().mean((1, 2)) >= cfg.sink


def handled(w: Tensor, magnets: Tensor, cfg: Config) -> Tensor:
    """Weights [B, H, P, n] with sinks suppressed, or redirected to the magnets [B, n]; a text without any keeps its."""
    sink = sinks(w, cfg)[:, None, None]
    if cfg.handle == "suppress":
        return w.masked_fill(sink, 0)
    auxiliary = (magnets[:, None, None] & ~sink).expand_as(w)
    there = auxiliary.sum(-1, keepdim=True)
    taken = (w.float() * sink).sum(-1, keepdim=True) / there.clamp(min=1)
    turned = (w.float().masked_fill(sink, 0) + taken * auxiliary).to(w.dtype)
    return torch.where(there > 0, turned, w)


def acts(at: Steered, cfg: Config) -> bool:
    return cfg.handle != "keep" and at.layer >= cfg.deep * at.layers


def weights(at: Steered, w: Tensor, cfg: Config) -> Tensor:
    """While the model runs, at patches that attend to words; role: "magnet"."""
    if at.role("image").any():
        return w
    return handled(w, at.role("magnet"), cfg)


def measure(w: Tensor, content: Tensor, magnets: Tensor, cfg: Config) -> Found:
    """Of weights [L, B, H, P, n], which of the words [B, n] are content and which magnets; all others are dropped."""
    wide = w if w.dtype == torch.float64 else w.float()
    first = math.ceil(cfg.deep * len(w)) if cfg.handle != "keep" else len(w)
    counts = torch.stack([content & ~sinks(x, cfg) if n >= first else content for n, x in enumerate(w)])
    # a text whose every content word is a sink wherever it is looked at has no better map than theirs
    counts = torch.where(counts.any(-1).any(0)[:, None], counts, content)
    total = torch.einsum("lbpn,lbn->bp", wide.mean(2), counts.to(wide))
    found = total / counts.sum((0, 2))[:, None]
    return Found(found.to(w.dtype), found.argsort(dim=-1, descending=True, stable=True)[:, 0])


def reference(w: Tensor, content: Tensor, magnets: Tensor, cfg: Config) -> Found:
    """Text by text, word by word, layer by layer."""
    maps = []
    for b in range(w.shape[1]):
        layers = [(n, w[n, b].double()) for n in range(len(w))]
        words = [i for i, flag in enumerate(content[b].tolist()) if flag]
        seen = []
        for n, a in layers:
            looked = cfg.handle != "keep" and n >= cfg.deep * len(layers)
            seen += [a[:, :, i] for i in words if not (looked and a[:, :, i].float().mean() >= cfg.sink)]
        seen = seen or [a[:, :, i] for _, a in layers for i in words]
        patches = range(w.shape[3])
        maps.append(
            [math.fsum(x for a in seen for x in a[:, p].tolist()) / (len(seen) * w.shape[2]) for p in patches]
        )
    peaks = [max(range(len(row)), key=row.__getitem__) for row in maps]
    return Found(torch.tensor(maps, dtype=torch.float64), torch.tensor(peaks))


def cases(seed: int) -> Iterable[tuple]:
    """A sink among the words, every content word a sink, none handled, one patch, padding, float32, a tie of peaks."""
    g = torch.Generator().manual_seed(seed)

    def drawn(
        layers: int, batch: int, patches: int, words: int, dtype: torch.dtype = torch.float64
    ) -> list[Tensor]:
        scores = 2 * torch.randn(layers, batch, 2, patches, words, generator=g, dtype=dtype)
        scores[:, :, :, :, 1] += 3  # the second word gathers much
        content = torch.arange(words).expand(batch, -1) < 2
        return [scores.softmax(-1), content, torch.arange(words).expand(batch, -1) == words - 1]

    yield *drawn(4, 2, 6, 5), Config()
    yield *drawn(3, 2, 5, 4), Config(sink=0.6, deep=0.0, handle="redirect")
    yield *drawn(2, 1, 4, 3, torch.float32), Config(handle="keep")
    yield *drawn(2, 1, 1, 3), Config(deep=1.0)
    w, content, magnets = drawn(2, 2, 6, 4)
    yield w, torch.tensor([[False, True, False, False]]).expand(2, -1), magnets, Config(sink=0.1, deep=0.0)
    yield torch.full_like(w, 0.25), content, magnets, Config(sink=1.0)
    w[..., 3] = 0  # padding
    yield w / w.sum(-1, keepdim=True), content, torch.zeros_like(magnets), Config(handle="redirect")


METHOD = SteeringPage(
    config=Config,
    acts=acts,
    weights=weights,
    measure=measure,
    reference=reference,
    cases=cases,
    acts_on_models=False,
    card=Card(
        title="RefAM",
        paper="RefAM: Attention Magnets for Zero-Shot Referral Segmentation",
        year=2025,
        idea="appended stop words take the background's attention; maps of content words alone are averaged",
        cost="one pass of a diffusion transformer; a few words more in the prompt",
        needs=("diffusion", "a softmax over words"),
        lineage=("attention sinks",),
        neutral={"handle": "keep"},
        caveat="the released code could not be read. Which words are appended (stop words and one colour term, it is "
        "said), the layers and the time at which maps are read are the caller's; what makes a word a global sink is "
        "our reading, a share of the attention of all patches. Under a softmax over patches appended words change "
        "nothing in the layer where they are read",
    ),
)
