"""AttnAttrib: one head of the question-answering circuit says which sentence of the context each token came from.

    j_t    = argmax over context tokens j of α_h(t, j)                  sinks left out
    source = the sentence that holds j_t                                 for each generated token t, one forward
    effect = (m(corrupted, z_h from clean) - m(corrupted)) / (m(clean) - m(corrupted))

where α_h(t, ·) is the attention of the query whose step emits token t, and h the head of the largest mediated effect:
its output at the last token is put from a prompt that holds the answer into one that holds another, and m is the logit
of the answer less that of the other. Effects are measured on other prompts than those attributed: heads that carry the
answer over look at where it stands, so a forward that is needed anyway names the source.

>>> import torch
>>> weights = torch.tensor([[[0.6, 0.1, 0.0, 0.2, 0.1], [0.2, 0.3, 0.1, 0.3, 0.1]]])  # token 0 is a sink
>>> measure(weights, [[(1, 3), (3, 5)]], Config())  # 0.2 at token 3; 0.3 at token 1, before an equal one
tensor([[1, 0]])
>>> mediated(torch.tensor(4.0), torch.tensor(-2.0), torch.tensor(2.5))  # three quarters of the way from -2 to 4
tensor(0.7500)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regard.core import Card, Edit, Observer, Site, require
from regard.kinds.tracing import Answers, TracingPage

Spans = Sequence[tuple[int, int]]  # sentences: first and past-the-last token


@dataclass(frozen=True)
class Config:
    sinks: int = 1  # first tokens of a text, which draw attention whatever they say

    def __post_init__(self) -> None:
        require(self.sinks >= 0, "sinks >= 0", sinks=self.sinks)


def observer() -> Observer:
    """The weights of the last query of each forward: [B, H, n] a layer and step."""
    return Observer("last_row", Site(tower="text"), name="attribution")


def transplant(layer: int, head: int, z: Tensor) -> Edit:
    """This head's output at the last token becomes z [B, 1, 1, E], as it was in another forward."""
    return Edit(Site("z", layers=layer, heads=head, rows=-1, tower="text"), "replace", z)


def mediated(clean: Tensor, corrupted: Tensor, patched: Tensor) -> Tensor:
    """The share of the way from the corrupted measure to the clean one that a transplant makes up for; any shape."""
    return (patched - corrupted) / (clean - corrupted)


def measure(weights: Tensor, sentences: Sequence[Spans], cfg: Config) -> Tensor:
    """[B, T] number of the sentence that holds the context token with the most weight; -1: no weight on any.

    weights [B, T, n] of one head, or a mean of several, at the query that emits each of T tokens; sentences: those of
    each text's context, which need not cover it. Of equal weights the first token counts.
    """
    owner = torch.full((len(weights), weights.shape[-1]), -1, device=weights.device)
    for row, spans in zip(owner, sentences, strict=True):
        for i, (first, past) in enumerate(spans):
            require(
                0 <= first < past <= len(row),
                "sentences lie in the text",
                span=(first, past),
                tokens=len(row),
            )
            row[first:past] = i
    owner[:, : cfg.sinks] = -1
    inside = torch.where(owner[:, None] >= 0, weights, 0)  # [B, T, n]
    most, at = inside.max(-1)
    return torch.where(most > 0, owner.gather(1, at), -1)


def reference(weights: Tensor, sentences: Sequence[Spans], cfg: Config) -> Tensor:
    """[B, T] token by token."""
    result = torch.full(weights.shape[:2], -1)
    for b, spans in enumerate(sentences):
        for t, row in enumerate(weights[b].tolist()):
            best = 0.0
            for j, weight in enumerate(row):
                names = [i for i, (first, past) in enumerate(spans) if first <= j < past]
                if j >= cfg.sinks and names and weight > best:
                    best, result[b, t] = weight, names[0]
    return result


def cases(seed: int) -> Iterable[tuple]:
    """Gaps, ties, sinks inside a sentence, a context that gets no weight, texts cut differently, one token."""
    g = torch.Generator().manual_seed(seed)
    spans = [[(1, 4), (4, 5), (7, 9)], [(0, 2), (3, 9)], [(5, 6)]]
    for cfg in (Config(), Config(sinks=0), Config(sinks=4)):
        yield torch.rand(3, 6, 10, generator=g, dtype=torch.float64).softmax(-1), spans, cfg
        yield torch.randint(3, (3, 6, 10), generator=g) / 8, spans, cfg
    yield torch.zeros(1, 2, 5), [[(0, 3)]], Config(sinks=0)
    yield torch.ones(1, 1, 1), [[(0, 1)]], Config(sinks=0)


def score(steps: list[Tensor], answers: Answers) -> Tensor:
    """[B, H] of one layer: the share of generated tokens whose top token of the prompt lies in the answer."""
    hits = []
    for t, weights in enumerate(steps):  # the last n tokens, of a sliding layer
        first = answers.prompt.shape[1] + t - weights.shape[-1]
        places = torch.arange(first, first + weights.shape[-1], device=weights.device)
        context = (places >= Config().sinks) & (places < answers.prompt.shape[1])
        top = first + torch.where(context, weights, -1).argmax(-1)  # [B, H]
        inside = [(row >= span[0]) & (row < span[1]) for row, span in zip(top, answers.spans, strict=True)]
        hits.append(torch.stack(inside).float())
    return torch.stack(hits).mean(0)


METHOD = TracingPage(
    config=Config,
    measure=measure,
    reference=reference,
    cases=cases,
    observer=observer,
    score=score,
    patterns=("causal_self",),
    card=Card(
        title="AttnAttrib",
        paper="On Mechanistic Circuits for Extractive Question-Answering (arXiv:2502.08059)",
        year=2025,
        idea="the sentence that a mediation-selected head looks at most while it emits a token is the token's source",
        cost="one attention row of one head and step; to choose the head, a forward for each head",
        needs=("decoder-lm", "scores"),
        lineage=("retrieval_heads",),
        caveat="no official code is known, and how the paper corrupts a prompt and sets off sinks is unsure: here the "
        "other prompt states another answer in the same place, and the first tokens count as sinks. `score` ranks "
        "heads by where they look, without mediation. Steering, which puts the sentence back into the prompt, is "
        "not here. Needs text-only prompts without padding",
    ),
)
