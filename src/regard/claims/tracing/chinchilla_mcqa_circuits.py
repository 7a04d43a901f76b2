"""Circuits of multiple choice, their claim: few heads write the letter, and how many axes their labels need.

    <s> question  label text  label text  label text  label text  answer: -> label of the right text
    <s> question  text: -> right text                                        the knowledge by itself

A GPT-2 of 4 layers of 8 heads (of width 8) is trained on 24 questions, each with one right text of 24. Labels are A, B,
C, D in half of the prompts and four of 26 letters at random in the other half: else it could not be asked with those.
A prompt's texts, their order and its letters are drawn anew; the knowledge is asked for by itself too.

heads     Five heads with the largest direct effect on logit(right letter) - mean logit(the other three) are chosen on
          one draw of A-D prompts; on another their effects are summed, over the difference of logits of the model.
          Patched together into resampled prompts they tell whether they are a cause, beside others of their layers.
axes      The queries of these heads at the last token and their keys at the four labels are projected, each head's onto
          three axes of its own found on the first draw of A-D prompts, in the run itself, so that later heads see what
          earlier ones did. Accuracy on the second draw, and on prompts of random letters with the same axes. Controls:
          three random axes; axes found on random letters; one, two and five axes.

Rate and steps were chosen on another seed by the accuracy on all kinds of prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from regard.claims.lab import generator, mean, threads
from regard.claims.small_lm import padded, small_gpt2, taught
from regard.core import Edit, Observer, Site
from regard.core.claim import Claim, Measured
from regard.explaining.circuit import random_heads, together
from regard.explaining.pairs import Batch, Pairs
from regard.explaining.runs import capture, forward
from regard.explaining.sources import output_matrices
from regard.methods.tracing.chinchilla_mcqa_circuits import Axes, axes_of, direct_effects

LAYERS, HEADS, WIDTH, STEPS, RATE, BATCH, SEED = 4, 8, 64, 700, 4e-3, 64, 1
LETTERS, QUESTIONS, TEXTS, CHOICES, ASKED = 26, 24, 24, 4, 512
RANK, TOP, RANKS, DRAWS = 3, 5, (1, 2, 3, 5), 10
# numbers of tokens
BEGIN, ANSWER, TEXT, LETTER = 0, 1, 2, 4
QUESTION = LETTER + LETTERS
FIRST = QUESTION + QUESTIONS
VOCABULARY = FIRST + TEXTS
TOKENS = 3 + 2 * CHOICES
LABELS = tuple(range(2, 2 + 2 * CHOICES, 2))  # where labels stand
Head = tuple[int, int]


# texts


@dataclass(frozen=True)
class Choice:
    """Prompts [B, N], the right letters [B], the letters of all choices [B, 4], the number of the right one [B]."""

    ids: Tensor
    right: Tensor
    letters: Tensor
    place: Tensor

    @property
    def batch(self) -> Batch:
        return Batch(self.ids, torch.ones_like(self.ids))

    @property
    def wrong(self) -> Tensor:
        """[B, 3]"""
        return self.letters[self.letters != self.right[:, None]].view(len(self.ids), CHOICES - 1)


def knowledge(seed: int) -> Tensor:
    """[QUESTIONS] the number of the right text of each."""
    return torch.randperm(TEXTS, generator=generator(1000 + seed))[:QUESTIONS]


def choices(known: Tensor, count: int, g: torch.Generator, any_letters: bool) -> Choice:
    question = torch.randint(QUESTIONS, (count,), generator=g)
    right = known[question]
    drawn = torch.rand(count, TEXTS, generator=g).scatter(1, right[:, None], -1.0)
    options = drawn.argsort(1)[:, :CHOICES]  # the right one first
    order = torch.rand(count, CHOICES, generator=g).argsort(1)
    options, place = options.gather(1, order), order.argmin(1)
    letters = torch.rand(count, LETTERS, generator=g).argsort(1)[:, :CHOICES]
    letters = LETTER + (letters if any_letters else torch.arange(CHOICES).expand(count, -1))
    sign = lambda token: torch.full((count, 1), token)  # noqa: E731
    listed = torch.stack([letters, FIRST + options], 2).flatten(1)
    ids = torch.cat([sign(BEGIN), QUESTION + question[:, None], listed, sign(ANSWER)], 1)
    return Choice(ids, letters.gather(1, place[:, None])[:, 0], letters, place)


def lessons(known: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and labels: A-D, random letters, and questions for the text, half as many."""
    asked = [(c.ids, c.right) for c in (choices(known, BATCH, g, kind) for kind in (False, True))]
    asked.append(by_text(known, torch.randint(QUESTIONS, (BATCH // 2,), generator=g)))
    blank = [torch.full_like(ids, -100) for ids, _ in asked]
    for labels, (_, wanted) in zip(blank, asked, strict=True):
        labels[:, -1] = wanted
    return padded([(ids, labels) for (ids, _), labels in zip(asked, blank, strict=True)], pad=BEGIN)


def by_text(known: Tensor, question: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts [B, 3] and their texts [B]."""
    sign = lambda token: torch.full_like(question, token)  # noqa: E731
    return torch.stack([sign(BEGIN), QUESTION + question, sign(TEXT)], 1), FIRST + known[question]


# heads


@torch.no_grad()
def effects(model: GPT2LMHeadModel, asked: Choice) -> tuple[Tensor, Tensor, Tensor]:
    """(direct effects of heads [B, layers x heads], of MLPs [B, layers], the model's difference of logits [B])."""
    _, values = capture(model, asked.batch, ("z", "mlp", "resid_post"))
    table, matrices, norm = model.lm_head.weight, output_matrices(model), model.transformer.ln_f
    heads = [torch.einsum("bhe,hew->bhw", values["z"][n][:, :, -1], matrices[n]) for n in range(LAYERS)]
    mlps = torch.stack([values["mlp"][n][:, 0, -1] for n in range(LAYERS)], 1)
    residual = values["resid_post"][LAYERS - 1][:, 0, -1]
    how = residual, table[asked.right], table[asked.wrong], norm.weight, "layer", norm.eps
    each, other, whole = (direct_effects(x, *how) for x in (torch.cat(heads, 1), mlps, residual[:, None]))
    return each, other, whole[:, 0]


def letter_heads(model: GPT2LMHeadModel, asked: Choice) -> list[Head]:
    found = effects(model, asked)[0].mean(0).topk(TOP).indices
    return [(int(i) // HEADS, int(i) % HEADS) for i in found]


def shares(model: GPT2LMHeadModel, asked: Choice, heads: Sequence[Head]) -> dict[str, Any]:
    """Of the difference of logits in the mean: what these heads hold, all heads, the MLP of each layer."""
    each, mlps, whole = (x.mean(0) for x in effects(model, asked))
    chosen = each[[n * HEADS + h for n, h in heads]] / whole
    return {
        "share": chosen.sum().item(),
        "share_of_each": chosen.tolist(),
        "share_of_all_heads": (each.sum() / whole).item(),
        "share_of_mlps": (mlps / whole).tolist(),
    }


def restored(model: GPT2LMHeadModel, asked: Choice, other: Choice, heads: Sequence[Head]) -> dict[str, float]:
    """What is restored in resampled prompts by these heads, and by as many others of their layers in the mean."""
    foil = asked.wrong[:, 0]
    pairs = Pairs(asked.batch, other.batch, asked.right, foil).at(range(128))
    sets = [heads, *random_heads(model, heads, DRAWS, SEED)]
    found = together(model, pairs, sets).mean
    return {"restored_by_top": found[0].item(), "restored_by_others": found[1:].mean().item()}


@torch.no_grad()
def read_by(model: GPT2LMHeadModel, asked: Choice, heads: Sequence[Head]) -> dict[str, list[float]]:
    """The weight of the last token on the right label, on the right text and on all labels, head by head."""
    look = Observer("last_row", Site(tower="text"), name="row")
    rows = {n: x for n, _, x in forward(model, asked.batch, [look])[1].records["row"]}
    at = (LABELS[0] + 2 * asked.place)[:, None]
    each = [rows[n][:, h] for n, h in heads]
    return {
        "weight_on_right_label": [x.gather(1, at).mean().item() for x in each],
        "weight_on_right_text": [x.gather(1, at + 1).mean().item() for x in each],
        "weight_on_labels": [x[:, list(LABELS)].sum(1).mean().item() for x in each],
    }


# axes

Spaces = Mapping[tuple[str, int, int], Axes]  # of "q" or "k", layer, head


@torch.no_grad()
def spaces(model: GPT2LMHeadModel, asked: Choice, heads: Sequence[Head], rank: int) -> Spaces:
    """The axes of each head's queries at the last token and keys at labels."""
    values = capture(model, asked.batch, ("q", "k"))[1]
    at = {"q": [-1], "k": list(LABELS)}
    return {(q, n, h): axes_of(values[q][n][:, h, rows], rank) for q, rows in at.items() for n, h in heads}


def at_random(known: Spaces, seed: int) -> Spaces:
    """As many axes in random directions through the same means."""
    g = generator(seed)
    return {
        key: Axes(space.mean, torch.linalg.qr(torch.randn(space.axes.shape, generator=g))[0])
        for key, space in known.items()
    }


def projecting(known: Spaces) -> list[Edit]:
    """What lies outside of the axes becomes what the mean has there."""
    edits = []
    for (q, layer, head), space in known.items():
        rank = space.axes.shape[1]
        outside = torch.linalg.qr(space.axes, mode="complete")[0][:, rank:]
        site = Site(q, layers=layer, heads=head, rows=LABELS if q == "k" else -1, tower="text")
        edits.append(Edit(site, "project", outside, source=space.mean.view(1, 1, 1, -1)))
    return edits


@torch.no_grad()
def accuracy(model: GPT2LMHeadModel, batch: Batch, right: Tensor, edits: Sequence[Edit] = ()) -> float:
    """In %."""
    return 100 * (forward(model, batch, edits)[0].argmax(-1) == right).double().mean().item()


def drop(model: GPT2LMHeadModel, asked: Choice, known: Spaces) -> float:
    """Points of accuracy that projected queries and keys cost."""
    sides = (accuracy(model, asked.batch, asked.right, edits) for edits in ([], projecting(known)))
    return next(sides) - next(sides)


def lost(model: GPT2LMHeadModel, drawn: Mapping[str, Choice], heads: Sequence[Head]) -> dict[str, Any]:
    """Drops on A-D and on random letters."""
    by_rank = {r: spaces(model, drawn["fit"], heads, r) for r in RANKS}
    on = {"a_to_d": drawn["a_to_d"], "random": drawn["random"]}
    found: dict[str, Any] = {f"drop_{kind}": drop(model, asked, by_rank[RANK]) for kind, asked in on.items()}
    blind = [at_random(by_rank[RANK], seed) for seed in range(DRAWS)]
    again = spaces(model, drawn["fit_random"], heads, RANK)
    for kind, asked in on.items():
        found[f"drop_{kind}_random_axes"] = mean(drop(model, asked, space) for space in blind)
        found[f"drop_{kind}_axes_of_random_letters"] = drop(model, asked, again)
        found[f"drop_{kind}_by_rank"] = [drop(model, asked, by_rank[r]) for r in RANKS]
    return {"ranks": list(RANKS), **found}


def findings(model: GPT2LMHeadModel, known: Tensor) -> dict[str, Any]:
    kinds = {"fit": False, "a_to_d": False, "fit_random": True, "random": True, "other": False}
    drawn = {
        name: choices(known, ASKED, generator(50 + i), kind) for i, (name, kind) in enumerate(kinds.items())
    }
    heads = letter_heads(model, drawn["fit"])
    ids, texts = by_text(known, torch.arange(QUESTIONS))
    return {
        "accuracy_a_to_d": accuracy(model, drawn["a_to_d"].batch, drawn["a_to_d"].right),
        "accuracy_random": accuracy(model, drawn["random"].batch, drawn["random"].right),
        "accuracy_text": accuracy(model, Batch(ids, torch.ones_like(ids)), texts),
        "top_heads": [list(head) for head in heads],
        **shares(model, drawn["a_to_d"], heads),
        "share_random_letters": shares(model, drawn["random"], heads)["share"],
        **restored(model, drawn["a_to_d"], drawn["other"], heads),
        **read_by(model, drawn["a_to_d"], heads),
        **lost(model, drawn, heads),
    }


def trained(seed: int) -> tuple[GPT2LMHeadModel, float]:
    """The model and the mean loss of its last 20 steps."""
    model, known = small_gpt2(VOCABULARY, LAYERS, HEADS, WIDTH, TOKENS, seed), knowledge(seed)
    return model, mean(taught(model, lambda g: lessons(known, g), STEPS, RATE, seed)[-20:])


def measure() -> Measured:
    with threads(1):
        model, loss = trained(SEED)
        numbers = {"loss": loss, **findings(model, knowledge(SEED))}
    few = numbers["share"] >= 0.8
    kept = numbers["drop_a_to_d"] <= 2
    return Measured(few and kept and numbers["drop_random"] >= numbers["drop_a_to_d"] + 5, numbers)


CLAIM = Claim(
    name="chinchilla_mcqa_circuits",
    statement=(
        "in a tiny language model trained on multiple choice few heads carry the logit of the answer; with queries and "
        "keys on three axes it keeps its accuracy on the labels A to D and loses more on random letters"
    ),
    bound=(
        "the top 5 of 32 heads hold >= 80 % of the difference of logits; accuracy falls by <= 2 points on A to D, and "
        "by at least 5 points more on random letters"
    ),
    measure=measure,
    contradicted=(
        "a GPT-2 that answers every kind of prompt (100 %) holds 37 % of the difference of logits in its top five "
        "heads, 56 % in all 32 and the rest in the MLPs of the later layers; 53 % in five on the seed that settings "
        "were chosen on. Three axes of queries and keys at labels keep all accuracy on A to D and on random letters "
        "too, and so does one; three random axes lose nothing on A to D and 1.4 points (8.7 on the other seed) on "
        "random letters. A model this small, which learns positions and saw random letters in half of its prompts, "
        "tells labels by their number alone, and other heads do in part what the five do. With rotary positions "
        "900 steps teach 45 % on A to D"
    ),
)
