"""Circuit reuse's claim: two templates for one thing, finding what is of a kind in a list, and the heads that do it.

    first     <s1> a b c d           ? kind -> the one of a, b, c, d that is of this kind
    second    <s2> a , b , c , d ,   what kind : -> the same; no word of the first template is in it

A Llama of 4 layers of 8 heads ("toy") is trained on both, half and half. Each template has four kinds of 12 words; a
list has one word of each kind in random order, drawn anew for every prompt. A corrupted prompt is another one of the
same template. m is the logit of the right word less that of another word of the list. Templates, rate and steps were
chosen on another seed by the accuracy on both tasks alone: looking up pairs in a list is not learned within 700 steps,
nor is naming the label of what fits a question within 800 (28 % of four).

SmolLM2 has tasks in words. As in the paper's code the corrupted prompt asks for the other answer, which is the foil:

    names     When Mary and John went to the store, John gave a drink to -> Mary
              corrupted: Mary gave
    colours   On the table there is a red pencil, a white pen and a green cup. So the pencil is red, the cup is green
              and the pen is -> white
              corrupted: the pen is white, the cup is green and the pencil

The other colours are told because SmolLM2 does not bind a colour to an object. Of 48 prompts of the paper's template
("What color is the pen?") it prefers the right colour to the foil in 42, 60 and 67 % with no, one and two examples
before them, and in 38 to 84 % of 32 in other forms that ask for it. What is left over it names: so both tasks ask for
what was not said again, and share more than the paper's do. Templates, and colours without blue, which it names
unasked, were chosen on other seeds by the accuracy alone (94 and 97 %).

Heads are ranked by path patching to the logits at the last token, MLPs free to answer as in the paper's code (frozen
ones are reported too). The top 10 % are 3 of 32 heads, 27 of 270; the shared ones are those in both tops. They are
ablated on other prompts than those they were found on, by what they had on the corrupted prompt, at all tokens; by
their mean over the clean prompts it is reported. Controls are draws of as many other heads from any layer, and from the
same layers, where there are as many (`heads_same_layers`); the larger mean loss of the two counts. Of the toy a second
step asks which heads reach the queries, keys and values of each task's top 3, and all is asked before training too.

Of SmolLM2 two things are reported beside. The tops of a third task, going on with 20 random tokens that repeat, tell
how far any task shares these heads (`overlap_with_repeats`). Induction heads are sought (`regard.claims.induction`):
few score above 0.4, without them most of the gain on repeated tokens is lost, and two of them are among the shared.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard.claims import induction
from regard.claims.lab import generator, mean, threads
from regard.claims.shipped_lm import shipped
from regard.claims.small_lm import padded, small_llama, taught
from regard.core.claim import TOY, Claim, Measured
from regard.explaining.circuit import Ablation, ablated, ablating, random_heads
from regard.explaining.pairs import Batch, Pairs, batch_of, make_pairs
from regard.explaining.paths import LOGITS, Node, Paths, as_grid, path_patch
from regard.explaining.runs import Values, forward
from regard.methods.tracing.circuit_component_reuse import Config, Reuse, measure, ranked

LAYERS, HEADS, WIDTH, STEPS, RATE, SEED = 4, 8, 64, 300, 4e-3, 1
KINDS, WORDS, TURNS, BATCH, SHARE = 4, 12, 4, 32, 0.1
# of each model: prompts of a task on which heads are found, and on which they are ablated; draws of other heads
PAIRS, DRAWS = {TOY: 64, "smollm2": 24}, {TOY: 20, "smollm2": 5}
CUTS = (3, 9, 18, 27, 54, 81, 135, 189, 270)  # of SmolLM2's 270 heads, of which the curve is reported
# numbers of tokens; of each template its kinds, then the words of each kind
BEGIN, ASK, IS, COMMA, WHAT, FIRST = (1, 2), 3, 4, 5, 6, 8
TOKENS = KINDS * (1 + WORDS)
VOCABULARY = FIRST + 2 * TOKENS
# one token of SmolLM2 each, after a space
NAMES, PLACES, GIFTS, SURFACES, OBJECTS, COLOURS = (
    words.split()
    for words in (
        "Mary John Tom James Martin Amy Sarah David Michael Robert Alice Jack Peter Paul Anna Emma Laura Kate Lisa "
        "Susan Daniel George Henry William Charles Edward Frank Alex Chris Andrew Kevin Brian Steven Jason Eric Adam "
        "Simon Richard Thomas Joseph Rachel Jane Helen Emily Lucy Julia Karen Linda Maria Sam Ben",
        "store park school office station hospital restaurant garden house",
        "drink book ring gift letter key ball card basket",
        "table desk floor",
        "pencil notebook pen cup plate jug puzzle textbook necklace bottle ball envelope lighter bowl",
        "red green yellow purple black white",
    )
)
Head = tuple[int, int]
Prompts = tuple[str, str, str, str]  # clean and corrupted, target and foil


# texts of the toy


def drawn(task: int, count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """(lists [B, N] as text, words [B, KINDS] of the kinds 0, 1, ...)."""
    first = FIRST + task * TOKENS + KINDS
    words = first + WORDS * torch.arange(KINDS) + torch.randint(WORDS, (count, KINDS), generator=g)
    listed = words.gather(1, torch.rand(count, KINDS, generator=g).argsort(1))
    parts = [listed] if task == 0 else [listed, torch.full_like(listed, COMMA)]
    return torch.cat([torch.full((count, 1), BEGIN[task]), torch.stack(parts, 2).flatten(1)], 1), words


def asked(task: int, kind: Tensor) -> Tensor:
    """[..., n] what asks for the word of a kind."""
    sign = lambda token: torch.full_like(kind, token)  # noqa: E731
    name = FIRST + task * TOKENS + kind
    return torch.stack([sign(ASK), name] if task == 0 else [sign(WHAT), name, sign(IS)], -1)


def lesson(task: int, count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and labels: a list, and some of its kinds asked for."""
    text, words = drawn(task, count, g)
    kind = torch.randint(KINDS, (count, TURNS), generator=g)
    right = words.gather(1, kind)
    turns = torch.cat([asked(task, kind), right[..., None]], -1)  # [B, TURNS, n]
    labels = torch.full_like(turns, -100)
    labels[..., -2] = right
    blank = torch.full_like(text, -100)
    return torch.cat([text, turns.flatten(1)], 1), torch.cat([blank, labels.flatten(1)], 1)


def lessons(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return padded([lesson(task, BATCH, g) for task in (0, 1)], pad=0)


def pairs_of(task: int, seed: int) -> Pairs:
    """Questions for one kind, and others of the same template; the foil is another word of the list."""
    g, sides, count = generator(seed), [], PAIRS[TOY]
    for _ in range(2):
        text, words = drawn(task, count, g)
        kind = torch.rand(count, KINDS, generator=g).argsort(1)[:, :2]
        value, other = words.gather(1, kind).unbind(1)
        sides.append((torch.cat([text, asked(task, kind[:, 0])], 1), value, other))
    (clean, target, foil), (corrupt, _, _) = sides
    return Pairs(batch_of(clean.tolist()), batch_of(corrupt.tolist()), target, foil)


# texts of SmolLM2


def an(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def names(rng: random.Random) -> Prompts:
    """To whom something was given."""
    both, place, gift = rng.sample(NAMES, 2), rng.choice(PLACES), an(rng.choice(GIFTS))
    giver, other = rng.sample(both, 2)
    start = f"When {both[0]} and {both[1]} went to the {place},"
    clean, corrupt = (f"{start} {name} gave {gift} to" for name in (giver, other))
    return clean, corrupt, other, giver


def colours(rng: random.Random) -> Prompts:
    """The colour of the object that is left over."""
    things, hues = rng.sample(OBJECTS, 3), rng.sample(COLOURS, 3)
    one, two, three = (f"{an(hue)} {thing}" for hue, thing in zip(hues, things, strict=True))
    start = f"On the {rng.choice(SURFACES)} there is {one}, {two} and {three}."

    def without(i: int) -> str:
        told = [f"the {things[j]} is {hues[j]}" for j in range(3) if j != i]
        return f"{start} So {told[0]}, {told[1]} and the {things[i]} is"

    i, other = rng.sample(range(3), 2)
    return without(i), without(other), hues[i], hues[other]


def worded(task: int, seed: int) -> Pairs:
    rng, draw = random.Random(seed), (names, colours)[task]
    clean, corrupt, target, foil = zip(*(draw(rng) for _ in range(PAIRS["smollm2"])), strict=True)
    answers = ([f" {word}" for word in words] for words in (target, foil))
    return make_pairs(shipped("smollm2").tokenizer, clean, corrupt, *answers)


# what heads do


def scores(model: PreTrainedModel, pairs: Pairs, mlps: str, into: Sequence[Head] = ()) -> Tensor:
    """[layers, heads] by path patching: to the logits, or to the queries, keys and values of these heads."""
    rows = None if into else -1
    to = {"receivers": [Node(q, *head) for head in into for q in ("q", "k", "v")]} if into else {}
    found = as_grid(path_patch(model, pairs, rows=rows, mlps=mlps, **to), model)  # type: ignore[arg-type]
    return found.nan_to_num(0.0).double()


@torch.no_grad()
def direct(model: PreTrainedModel, pairs: Pairs, mlps: str) -> Tensor:
    """[layers, heads] the same to the logits: while heads are frozen the last token alone changes, and it alone is run.

    For models whose positions are known to attention alone, and prompts without padding.
    """
    whole = Paths.of(model, pairs, (LOGITS,), None, mlps)
    clean, corrupt = (Batch(x.ids[:, -1:], x.mask[:, -1:]) for x in (pairs.clean, pairs.corrupt))
    ends = replace(pairs, clean=clean, corrupt=corrupt)
    last = replace(whole, pairs=ends, clean=at_last(whole.clean), corrupt=at_last(whole.corrupt))
    by_layer = [
        last.through([Node("z", n, h) for h in range(z.shape[1])]).double().mean(0)
        for n, z in sorted(whole.clean["z"].items())
    ]
    return torch.stack(by_layer) / whole.span.double().mean()


def at_last(values: Values) -> Values:
    return {q: {n: x[:, :, -1:] for n, x in by_layer.items()} for q, by_layer in values.items()}


def top(found: Tensor) -> list[Head]:
    """The best share of the heads, as many as `measure(...).at(SHARE)` counts."""
    heads = found.shape[1]
    return [(int(i) // heads, int(i) % heads) for i in ranked(found)[: round(SHARE * found.numel())]]


@torch.no_grad()
def accuracies(
    model: PreTrainedModel, pairs: Pairs, sets: Sequence[Sequence[Head]], how: Ablation = "resample"
) -> list[float]:
    """In %, of clean prompts, without each set of heads: they have what they had on corrupted ones, or their mean."""
    given, texts, found = ablated(model, pairs, how), tuple(range(len(pairs))), []
    for heads in sets:
        logits, _ = forward(model, pairs.clean, ablating([Node("z", *head) for head in heads], given, texts))
        found.append(100 * (logits.argmax(-1) == pairs.target).double().mean().item())
    return found


def from_any_layer(target: Sequence[Head], size: torch.Size, draws: int) -> list[list[Head]]:
    """Draws of as many heads that are not in the target."""
    rng = random.Random(SEED)
    others = [(n, h) for n in range(size[0]) for h in range(size[1]) if (n, h) not in target]
    return [rng.sample(others, len(target)) for _ in range(draws)]


def losses(
    model: PreTrainedModel, shared: Sequence[Head], tasks: Sequence[Pairs], size: torch.Size, draws: int
) -> dict[str, Any]:
    """What both tasks lose without the shared heads, and without others; without any shared heads nothing is lost."""
    same = random_heads(model, shared, draws, SEED) if shared else [[]] * draws
    sets = [[], shared, *same, *from_any_layer(shared, size, draws)]
    found: dict[str, Any] = {"heads_same_layers": len(same[0])}
    for pairs in tasks:
        full, *rest = accuracies(model, pairs, sets)
        lost = [full - accuracy for accuracy in rest]
        by_set = {
            "accuracy": full,
            "drop_shared": lost[0],
            "drop_same_layers": mean(lost[1 : draws + 1]),
            "drop_any_layer": mean(lost[draws + 1 :]),
            "drop_shared_mean": full - accuracies(model, pairs, [shared], "mean")[0],
        }
        for name, value in by_set.items():
            found.setdefault(name, []).append(value)
    return found


def summary(prefix: str, reuse: Reuse) -> dict[str, float]:
    return {f"{prefix}{name}": value for name, value in reuse.at(SHARE).items() if name != "heads"}


def findings(
    on: str, model: PreTrainedModel, free: Sequence[Tensor], frozen: Sequence[Tensor], tried: Sequence[Pairs]
) -> dict[str, Any]:
    """Of the scores of both tasks, MLPs free and frozen, and of prompts on which heads are ablated."""
    reuse, still = measure(*free), measure(*frozen)
    tops = [top(x) for x in free]
    shared = sorted({*tops[0]} & {*tops[1]})
    cuts = torch.arange(free[0].numel()) if on == TOY else torch.tensor(CUTS) - 1
    return {
        **summary("", reuse),
        **summary("frozen_", still),
        **summary("within_layers_", measure(free[0], free[1], Config(within="layer"))),
        "top_heads": [[list(head) for head in heads] for heads in tops],
        "shared": len(shared),
        "shared_heads": [list(head) for head in shared],
        "curve": [round(x, 3) for x in reuse.overlap[cuts].tolist()],
        "curve_p": [round(x, 5) for x in reuse.p[cuts].tolist()],
        "curve_frozen": [round(x, 3) for x in still.overlap[cuts].tolist()],
        **losses(model, shared, tried, free[0].shape, DRAWS[on]),
    }


def trained(seed: int) -> tuple[PreTrainedModel, float]:
    """The toy and the mean loss of its last 20 steps."""
    model = small_llama(VOCABULARY, LAYERS, HEADS, WIDTH, seed)
    return model, mean(taught(model, lessons, STEPS, RATE, seed)[-20:])


def on_toy() -> dict[str, Any]:
    model, loss = trained(SEED)
    blank = small_llama(VOCABULARY, LAYERS, HEADS, WIDTH, SEED)
    found_on, tried = ([pairs_of(task, seed + task) for task in (0, 1)] for seed in (100, 200))
    free, frozen, untrained = (
        [scores(of, pairs, mlps) for pairs in found_on]
        for of, mlps in ((model, "free"), (model, "frozen"), (blank, "free"))
    )
    before = [scores(model, pairs, "free", top(x)) for pairs, x in zip(found_on, free, strict=True)]
    return {
        "loss": loss,
        **findings(TOY, model, free, frozen, tried),
        **summary("second_step_", measure(*before)),
        **summary("untrained_", measure(*untrained)),
    }


def on_smollm2() -> dict[str, Any]:
    model = shipped("smollm2").model
    found_on, tried = ([worded(task, seed + task) for task in (0, 1)] for seed in (100, 200))
    free, frozen = ([direct(model, pairs, mlps) for pairs in found_on] for mlps in ("free", "frozen"))
    found = findings("smollm2", model, free, frozen, tried)
    third = direct(model, induction.pairs(model, PAIRS["smollm2"]), "free")
    repeats = induction.findings(model, [(n, h) for n, h in found["shared_heads"]])
    return {
        **found,
        "curve_at": list(CUTS),
        "overlap_with_repeats": [measure(x, third).at(SHARE)["overlap"] for x in free],
        **{f"induction_{name}": value for name, value in repeats.items()},
    }


def measured(on: str) -> Measured:
    with threads(1):
        numbers = on_toy() if on == TOY else on_smollm2()
    overlap = numbers["overlap"] >= 2 * numbers["chance"] and numbers["p"] < 0.05
    hurt = min(numbers["drop_shared"]) >= 20
    spared = max(*numbers["drop_same_layers"], *numbers["drop_any_layer"]) <= 5
    return Measured.by({"overlap": overlap, "both tasks lose": hurt, "others are free": spared}, numbers)


CLAIM = Claim(
    name="circuit_component_reuse",
    statement=(
        "in a small language model that does two templated tasks of shared structure the top heads by path patching "
        "are the same more often than by chance, and ablating the shared ones hurts both tasks"
    ),
    bound=(
        "overlap of the top 10 % of the heads >= 2 x its permutation mean, p < 0.05; without the shared heads both "
        "tasks lose >= 20 points, without as many random others <= 5 in the mean"
    ),
    measure=measured,
    models=(TOY, "smollm2"),
    fails={TOY: ("others are free",)},
    contradicted={
        TOY: (
            "two of the top three heads are the same (chance 0.09, p = 0.018), and without them the tasks lose 31 and "
            "47 points; other heads are not free, though: two from any layer cost 0.5 and 5.5 points in the mean, two "
            "of the same layer 8 and 20. All heads that write the answer lie in the first layer and share the work, "
            "so among heads of one layer the overlap is no more than chance (p = 0.29); on another seed, from smaller "
            "matrices, one head of three is shared. The curve is above chance from 6 to 23 heads (p < 0.05)"
        ),
    },
)
