"""Circuits of multiple choice, their claim: few heads write the letter, and how many axes their labels need.

    toy      <s> question  label text  label text  label text  label text  answer: -> label of the right text
             <s> question  text: -> right text                                        the knowledge by itself
    smollm2  The car is red. Is the car blue (A), red (B), green (C), white (D)?
             Answer: red (                                            -> B            text first, then its letter

The toy is a GPT-2 of 4 layers of 8 heads (of width 8), trained on 24 questions, each with one right text of 24. Labels
are A, B, C, D in half of the prompts and four of 26 letters at random in the other half: else it could not be asked
with those. Rate and steps were chosen on another seed by the accuracy on all kinds of prompts. SmolLM2-135M answers at
chance, at most 31 %, in 15 forms where labels stand before texts (by itself, after 4 and 8 examples, in a chat): so
labels follow texts, and the right text is written out before its letter. Of 21 such forms the one answered best was
taken, on other prompts; examples before it make it worse. Texts, their order and letters are drawn anew for each
prompt, and the knowledge is asked for by itself too.

heads     Five heads with the largest direct effect on logit(right letter) - mean logit(the other three) are chosen on
          one draw of A-D prompts; on another their effects are summed, over the difference of logits of the model.
          Patched together into resampled prompts they tell whether they are a cause, beside others of their layers.
          Five of 32 heads are 42 of 270: what as large a share holds is told apart (`share_of_wide`).
axes      The queries of these heads at the last token and their keys at the four labels are projected, each head's onto
          three axes of its own found on the first draw of A-D prompts, in the run itself, so that later heads see what
          earlier ones did. Keys that several query heads share are projected once, for all of them. Accuracy, the best
          of the four letters, on the second draw, and on prompts of random letters with the same axes. Controls: three
          random axes; axes found on random letters; other numbers of axes. Where a letter follows its text its key has
          to tell which text that is: so SmolLM2 is also asked where the choices are always the same four colours, with
          axes of all labels and with axes of each label's own, around its own mean (`by_label`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel

from regard.claims.lab import generator, mean, threads
from regard.claims.multiple_choice import (
    CHOICES,
    TOKENS,
    VOCABULARY,
    Choice,
    choices,
    colours,
    knowledge,
    lessons,
)
from regard.claims.shipped_lm import shipped
from regard.claims.small_lm import small_gpt2, taught
from regard.core import Edit, Observer, Site
from regard.core.claim import TOY, Claim, Measured
from regard.explaining.circuit import random_heads, together
from regard.explaining.pairs import Batch, Pairs
from regard.explaining.runs import forward, heads_at
from regard.explaining.sources import output_matrices
from regard.methods.tracing.chinchilla_mcqa_circuits import Axes, axes_of, direct_effects

LAYERS, HEADS, WIDTH, STEPS, RATE, SEED = 4, 8, 64, 700, 4e-3, 1
RANK, TOP, SHARE = 3, 5, 5 / 32
RANKS = {TOY: (1, 2, 3, 5), "smollm2": (1, 3, 5, 12)}
# prompts of a draw, those that are patched, sets of other heads and of random axes
COUNTS = {TOY: (512, 128, 10), "smollm2": (100, 48, 2)}
Head = tuple[int, int]


# heads


def used(model: PreTrainedModel, batch: Batch, rows: Mapping[str, Any]) -> dict[str, dict[int, Tensor]]:
    """Quantity -> layer -> what the model used at these rows [B, heads, rows, width], of a layer [B, rows, width]."""
    look = [Observer("value", Site(q, rows=at, tower="text"), name=q) for q, at in rows.items()]
    records = forward(model, batch, look)[1].records
    return {q: {layer: x for layer, _, x in sorted(records[q], key=lambda r: r[0])} for q in rows}


@torch.no_grad()
def effects(model: PreTrainedModel, asked: Choice) -> tuple[Tensor, Tensor, Tensor]:
    """(direct effects of heads [B, layers x heads], of MLPs [B, layers], the model's difference of logits [B])."""
    values = used(model, asked.batch, dict.fromkeys(("z", "mlp", "resid_post"), -1))
    table, matrices = model.get_output_embeddings().weight, output_matrices(model)
    heads = [torch.einsum("bhe,hew->bhw", z[:, :, 0], matrices[n]) for n, z in values["z"].items()]
    mlps = torch.cat([*values["mlp"].values()], 1)
    residual = [*values["resid_post"].values()][-1][:, 0]
    how = residual, table[asked.right], table[asked.wrong], *last_norm(model)
    each, other, whole = (direct_effects(x, *how) for x in (torch.cat(heads, 1), mlps, residual[:, None]))
    return each, other, whole[:, 0]


def last_norm(model: Any) -> tuple[Tensor, str, float]:
    """Gain, kind and epsilon of the norm before the logits."""
    if isinstance(model, GPT2LMHeadModel):
        return model.transformer.ln_f.weight, "layer", model.transformer.ln_f.eps
    return model.model.norm.weight, "rms", model.model.norm.variance_epsilon


def letter_heads(model: PreTrainedModel, asked: Choice, count: int) -> list[Head]:
    found, heads = effects(model, asked)[0].mean(0).topk(count).indices, heads_at("z", model)
    return [(int(i) // heads, int(i) % heads) for i in found]


def shares(
    model: PreTrainedModel, asked: Choice, heads: Sequence[Head], wide: Sequence[Head]
) -> dict[str, Any]:
    """Of the mean difference of logits: what these heads hold, the wide set, all heads, the MLP of each layer."""
    each, mlps, whole = (x.mean(0) for x in effects(model, asked))
    of = lambda some: each[[n * heads_at("z", model) + h for n, h in some]] / whole  # noqa: E731
    return {
        "difference": whole.item(),
        "share": of(heads).sum().item(),
        "share_of_each": of(heads).tolist(),
        "share_of_wide": of(wide).sum().item(),
        "share_of_all_heads": (each.sum() / whole).item(),
        "share_of_mlps": (mlps / whole).tolist(),
    }


def restored(
    model: PreTrainedModel, asked: Choice, other: Choice, heads: Sequence[Head], wide: Sequence[Head],
    patched: int, draws: int,
) -> dict[str, float]:  # fmt: skip
    """What is restored in resampled prompts by these heads, and by as many others of their layers in the mean."""
    pairs = Pairs(asked.batch, other.batch, asked.right, asked.wrong[:, 0]).at(range(patched))
    sets = [heads, wide, *random_heads(model, heads, draws, SEED)]
    found = together(model, pairs, sets).mean
    return {
        "restored_by_top": found[0].item(),
        "restored_by_wide": found[1].item(),
        "restored_by_others": found[2:].mean().item(),
    }


@torch.no_grad()
def read_by(model: PreTrainedModel, asked: Choice, heads: Sequence[Head]) -> dict[str, list[float]]:
    """The weight of the last token on the right label, on the right text and on all labels, head by head."""
    look = Observer("last_row", Site(tower="text"), name="row")
    rows = {n: x for n, _, x in forward(model, asked.batch, [look])[1].records["row"]}
    at = torch.tensor(asked.labels)[asked.place][:, None]
    each = [rows[n][:, h] for n, h in heads]
    return {
        "weight_on_right_label": [x.gather(1, at).mean().item() for x in each],
        "weight_on_right_text": [x.gather(1, at + asked.to_text).mean().item() for x in each],
        "weight_on_labels": [x[:, list(asked.labels)].sum(1).mean().item() for x in each],
    }


# axes

Spaces = Mapping[tuple[str, int, int], Axes]  # of "q" or "k", layer, head


@torch.no_grad()
def spaces(
    model: PreTrainedModel, asked: Choice, heads: Sequence[Head], ranks: Sequence[int]
) -> list[Spaces]:
    """For each rank the axes of these heads' queries at the last token and keys at labels."""
    at = {"q": [-1], "k": list(asked.labels)}
    values = used(model, asked.batch, at)
    mine = {"q": [*heads], "k": key_heads(model, heads)}
    return [{(q, n, h): axes_of(values[q][n][:, h], r) for q in at for n, h in mine[q]} for r in ranks]


def key_heads(model: PreTrainedModel, heads: Sequence[Head]) -> list[Head]:
    """Those whose keys these heads read, each once."""
    shared = heads_at("q", model) // heads_at("k", model)
    return [*dict.fromkeys((n, h // shared) for n, h in heads)]


@torch.no_grad()
def by_label(model: PreTrainedModel, asked: Choice, heads: Sequence[Head], rank: int) -> list[Edit]:
    """Edits by which the keys of each label keep axes of that label alone, around its own mean."""
    values, edits = used(model, asked.batch, {"k": list(asked.labels)})["k"], []
    for i, row in enumerate(asked.labels):
        own: Spaces = {("k", n, h): axes_of(values[n][:, h, i], rank) for n, h in key_heads(model, heads)}
        edits += projecting(own, (row,))
    return edits


def at_random(known: Spaces, seed: int) -> Spaces:
    """As many axes in random directions through the same means."""
    g = generator(seed)
    return {
        key: Axes(space.mean, torch.linalg.qr(torch.randn(space.axes.shape, generator=g))[0])
        for key, space in known.items()
    }


def projecting(known: Spaces, labels: tuple[int, ...]) -> list[Edit]:
    """What lies outside of the axes becomes what the mean has there."""
    edits = []
    for (q, layer, head), space in known.items():
        rank = space.axes.shape[1]
        outside = torch.linalg.qr(space.axes, mode="complete")[0][:, rank:]
        site = Site(q, layers=layer, heads=head, rows=labels if q == "k" else -1, tower="text")
        edits.append(Edit(site, "project", outside, source=space.mean.view(1, 1, 1, -1)))
    return edits


@torch.no_grad()
def accuracy(model: PreTrainedModel, asked: Choice, edits: Sequence[Edit] = ()) -> tuple[float, float]:
    """(in %, the right letter is the best of the four; it is the best of all tokens)."""
    logits = forward(model, asked.batch, edits)[0]
    of_four = logits.gather(1, asked.letters).argmax(-1) == asked.place
    return 100 * of_four.double().mean().item(), 100 * (
        logits.argmax(-1) == asked.right
    ).double().mean().item()


@torch.no_grad()
def accuracy_text(model: PreTrainedModel, asked: Choice) -> float:
    assert asked.texts is not None
    ids, texts = asked.texts
    logits, _ = forward(model, Batch(ids, torch.ones_like(ids)))
    return 100 * (logits.argmax(-1) == texts).double().mean().item()


def lost(
    model: PreTrainedModel,
    drawn: Mapping[str, Choice],
    heads: Sequence[Head],
    ranks: Sequence[int],
    draws: int,
) -> dict[str, Any]:
    """Accuracy on A-D and on random letters, and the points of it that projected queries and keys cost."""
    by_rank = dict(zip(ranks, spaces(model, drawn["fit"], heads, ranks), strict=True))
    (again,) = spaces(model, drawn["fit_random"], heads, [RANK])
    blind = [at_random(by_rank[RANK], seed) for seed in range(draws)]
    found: dict[str, Any] = {"ranks": list(ranks)}
    for kind in ("a_to_d", "random"):
        asked = drawn[kind]
        right, best = accuracy(model, asked)
        drop = lambda known: right - accuracy(model, asked, projecting(known, asked.labels))[0]  # noqa: B023, E731
        drops = {r: drop(known) for r, known in by_rank.items()}
        found |= {
            f"accuracy_{kind}": right,
            f"accuracy_{kind}_of_all_tokens": best,
            f"drop_{kind}": drops[RANK],
            f"drop_{kind}_by_rank": [*drops.values()],
            f"drop_{kind}_queries_alone": drop({key: x for key, x in by_rank[RANK].items() if key[0] == "q"}),
            f"drop_{kind}_keys_alone": drop({key: x for key, x in by_rank[RANK].items() if key[0] == "k"}),
            f"drop_{kind}_axes_of_random_letters": drop(again),
            f"drop_{kind}_random_axes": mean(drop(known) for known in blind),
        }
    return found


Draw = Callable[[int, torch.Generator, bool], Choice]


def findings(model: PreTrainedModel, draw: Draw, on: str) -> dict[str, Any]:
    count, patched, draws = COUNTS[on]
    kinds = {"fit": False, "a_to_d": False, "fit_random": True, "random": True, "other": False}
    drawn = {name: draw(count, generator(50 + i), kind) for i, (name, kind) in enumerate(kinds.items())}
    every = heads_at("z", model) * model.config.num_hidden_layers
    wide = letter_heads(model, drawn["fit"], round(SHARE * every))
    heads = wide[:TOP]
    return {
        "accuracy_text": accuracy_text(model, drawn["a_to_d"]),
        "heads": every,
        "wide": len(wide),
        "top_heads": [list(head) for head in heads],
        **shares(model, drawn["a_to_d"], heads, wide),
        "share_of_another_draw": shares(model, drawn["other"], heads, wide)["share"],
        "share_random_letters": shares(model, drawn["random"], heads, wide)["share"],
        **restored(model, drawn["a_to_d"], drawn["other"], heads, wide, patched, draws),
        **read_by(model, drawn["a_to_d"], heads),
        **lost(model, drawn, heads, RANKS[on], draws),
    }


def of_four_texts(heads: Sequence[Head], count: int) -> dict[str, float]:
    """SmolLM2 where the same four colours are the choices of every prompt, in any order; the heads stay."""
    model, found = shipped("smollm2").model, {}
    fit, *tested = (
        colours(shipped("smollm2").tokenizer, count, generator(60 + i), kind, known=CHOICES)
        for i, kind in enumerate((False, False, True))
    )
    (known,) = spaces(model, fit, heads, [RANK])
    queries = projecting({key: space for key, space in known.items() if key[0] == "q"}, fit.labels)
    sides = {"": projecting(known, fit.labels), "_by_label": queries + by_label(model, fit, heads, RANK)}
    for kind, asked in zip(("a_to_d", "random"), tested, strict=True):
        right = found[f"accuracy_{kind}_of_four_texts"] = accuracy(model, asked)[0]
        for side, edits in sides.items():
            found[f"drop_{kind}_of_four_texts{side}"] = right - accuracy(model, asked, edits)[0]
    return found


def trained(seed: int) -> tuple[GPT2LMHeadModel, float]:
    """The model and the mean loss of its last 20 steps."""
    model, known = small_gpt2(VOCABULARY, LAYERS, HEADS, WIDTH, TOKENS, seed), knowledge(seed)
    return model, mean(taught(model, lambda g: lessons(known, g), STEPS, RATE, seed)[-20:])


def asked_of(on: str) -> tuple[PreTrainedModel, Draw, dict[str, float]]:
    """The model, its prompts, and the loss of one that is trained here."""
    if on == TOY:
        model, loss = trained(SEED)
        return model, lambda *how: choices(knowledge(SEED), *how), {"loss": loss}
    return shipped(on).model, lambda *how: colours(shipped(on).tokenizer, *how), {}


def measure(on: str) -> Measured:
    with threads(1):
        model, draw, loss = asked_of(on)
        numbers = {**loss, **findings(model, draw, on)}
        if on != TOY:
            numbers |= of_four_texts([(n, h) for n, h in numbers["top_heads"]], COUNTS[on][0])
    more = numbers["drop_random"] >= numbers["drop_a_to_d"] + 5
    few, kept = numbers["share"] >= 0.8, numbers["drop_a_to_d"] <= 2
    answers = numbers["accuracy_a_to_d"] >= 50
    parts = {"it answers": answers, "few heads": few, "A to D kept": kept, "random letters lose more": more}
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="chinchilla_mcqa_circuits",
    statement=(
        "in a language model that answers multiple choice few heads carry the logit of the letter; with queries and "
        "keys on three axes it keeps its accuracy on the labels A to D and loses more on random letters"
    ),
    bound=(
        "the model answers >= 50 % on A to D, where guessing is 25; the top 5 heads, of 32 of the toy and of 270 of "
        "SmolLM2, hold >= 80 % of the difference of logits; accuracy falls by <= 2 points on A to D, and by at least "
        "5 points more on random letters"
    ),
    measure=measure,
    models=(TOY, "smollm2"),
    fails={TOY: ("few heads", "random letters lose more"), "smollm2": ("A to D kept",)},
    contradicted={
        TOY: (
            "a GPT-2 that answers every kind of prompt (100 %) holds 40 % of the difference of logits in its top five "
            "heads (37 % where it was trained on another CPU), 67 % in all 32 and the rest in the MLPs of the later "
            "layers; 53 % in five on the seed that settings were chosen on. Three axes of queries and keys at labels "
            "keep all accuracy on A to D and on random letters too, and so does one; three random axes lose nothing "
            "on A to D and 0.8 points on random letters. A model this small, which learns positions and saw random "
            "letters in half of its prompts, tells labels by their number alone, and other heads do in part what the "
            "five do. With rotary positions 900 steps teach 45 % on A to D"
        ),
        "smollm2": (
            "five of 270 heads carry most of the letter, but the bound of 80 % lies among draws of 100 prompts: they "
            "hold 92 % of the difference of logits on A to D and 78 % on another draw, 83 % on random letters; patched "
            "into resampled prompts they restore 89 %, others of their layers 3 %. Three axes cost 32 points of 74 % "
            "on A to D, where guessing is 25 %, and 40 of 77 % on random letters, random axes 48 and 49. It is the "
            "keys (31 points alone, the queries 8). Twelve axes lose nothing on A to D and 13 points on random "
            "letters. With four colours three axes cost 38 points; with axes of each label's own around its own mean "
            "nothing on A to D and 6 points on random letters, a reading that was tried after the first and does not "
            "decide. SmolLM2 answers no letter that stands before its text (at most 31 % in 15 forms), and here, after "
            "its text, the letter may be found by induction, which is not the n-th item of an enumeration; keys are "
            "taken after rotary positions"
        ),
    },
)
