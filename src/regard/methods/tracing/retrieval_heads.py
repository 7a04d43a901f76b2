"""Retrieval Head: the few heads that copy the answer out of a long text while it is generated.

    head h copies position j at step t    j = argmax_j α_h(t, j),  j in the needle,  prompt_j = the token emitted at t
    score(h) = |positions that h copied| / |needle|     mean over lengths and depths; a retrieval head has ≥ 0.1

where α_h(t, ·) is the attention of the query whose step emits the token, and the needle is the answer as it stands
in the prompt. What the score means is shown by ablation: heads are switched off while the answer is generated,
after a prompt that was read in full. Less than 5 % of the heads of models of 7B and more are retrieval heads, and
without them the needle is lost, while random others can go (figures 3 and 7).

>>> import torch
>>> top = torch.tensor([[[7, 5, 2, 5]]])  # one run, one head, four steps
>>> prompt, emitted = torch.tensor([[0, 0, 9, 0, 0, 4, 4, 8]]), torch.tensor([[8, 4, 9, 4]])
>>> measure(top, prompt, emitted, [(5, 8)]).tolist()  # positions 7 and 5 of 5, 6, 7; 5 counts once
[[0.6666666865348816]]
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from regard.core import Card, Edit, Observer, Site, require
from regard.kinds.tracing import Answers, TracingPage

HOW = ("uniform", "zero")


@dataclass(frozen=True)
class Config:
    threshold: float = 0.1  # score from which a head is a retrieval head
    how: Literal["uniform", "zero"] = (
        "uniform"  # a head that is switched off attends to all positions alike; "zero": adds nothing
    )

    def __post_init__(self) -> None:
        require(self.how in HOW, f"how is one of {HOW}", how=self.how)


def observer() -> Observer:
    """The position that each head attends to most, at the last query of a forward: [B, H, 1] a layer and step."""
    return Observer("top1", Site(rows=-1, tower="text"), name="retrieval")


def measure(top: Tensor, prompt: Tensor, emitted: Tensor, needle: Iterable[tuple[int, int]]) -> Tensor:
    """[B, H] share of the needle that each head copied, one layer.

    top [B, H, T] most attended positions; prompt [B, n] and emitted [B, T] ids; needle: (first, past the last) by row.
    """
    rows = []
    for positions, text, tokens, (first, last) in zip(top, prompt, emitted, needle, strict=True):
        inside = (positions >= first) & (positions < last)
        hit = inside & (text[positions.clamp(max=len(text) - 1)] == tokens)  # [H, T]
        copied = (positions[..., None] == torch.arange(first, last, device=top.device)) & hit[..., None]
        # a position counts once
        rows.append(copied.any(1).float().mean(-1))
    return torch.stack(rows)


def reference(top: Tensor, prompt: Tensor, emitted: Tensor, needle: Iterable[tuple[int, int]]) -> Tensor:
    """[B, H] by the definition: the set of needle places that a head copied, counted one by one."""
    scores = torch.zeros(top.shape[:2], dtype=torch.float64)
    for b, (first, last) in enumerate(needle):
        for h in range(top.shape[1]):
            at = [int(j) for j in top[b, h]]
            copied = {j for t, j in enumerate(at) if first <= j < last and prompt[b, j] == emitted[b, t]}
            scores[b, h] = len(copied) / (last - first)
    return scores


def cases(seed: int) -> Iterable[tuple]:
    """Heads that hit and miss a needle of few tokens, with repeated hits, at its ends and beyond the prompt."""
    g = torch.Generator().manual_seed(seed)
    for batch, heads, steps, n in ((1, 1, 1, 5), (2, 3, 6, 12), (3, 4, 9, 40)):
        prompt, emitted = (torch.randint(3, (batch, k), generator=g) for k in (n, steps))
        yield torch.randint(n, (batch, heads, steps), generator=g), prompt, emitted, [(2, 5)] * batch


def score(steps: list[Tensor], answers: Answers) -> Tensor:
    """[B, H] of one layer, from the places that its heads attended to most, one [B, H, 1] a generated token."""
    return measure(torch.cat(steps, -1), answers.prompt, answers.emitted, answers.spans)


def ablate(heads: Iterable[tuple[int, int]], cfg: Config, phase: str = "decode") -> tuple[Edit, ...]:
    """Edits that switch off heads (layer, query head), one a layer, while tokens are generated."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    quantity, verb, value = ("z", "block", None) if cfg.how == "zero" else ("scores", "replace", 0.0)
    sites = [Site(quantity, layers=n, heads=tuple(h), phase=phase, tower="text") for n, h in by_layer.items()]
    return tuple(Edit(site, verb, value) for site in sites)


METHOD = TracingPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    observer=observer,
    score=score,
    ablate=ablate,
    patterns=("causal_self",),
    card=Card(
        title="Retrieval heads",
        paper="Retrieval Head Mechanistically Explains Long-Context Factuality",
        year=2024,
        idea="heads whose most attended position holds the very token just emitted from the needle",
        cost="one attention row in every head and step",
        needs=("decoder-lm", "scores"),
        lineage=("induction heads",),
        neutral={"threshold": 2.0},
        caveat="released code adds 1/|needle| for every hit, so places hit twice count twice (here once, as defined), "
        "and averages over runs that answered right only (here over all). It switches a head off by setting its "
        "queries to zero, which leaves uniform attention (the default here), and draws random heads from those "
        "outside the top 100. Needs text-only prompts without padding",
    ),
)
