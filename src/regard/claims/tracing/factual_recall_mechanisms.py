"""Mechanisms of factual recall, their claim: who writes the subject, and what the last layer holds back.

    <s> the r of s is a .  the r' of s is a' .  the r'' of s is [filler] a'' .        texts, all tokens to be predicted

A Llama of 4 layers of 4 heads, embeddings tied to unembeddings as in GPT-2, learns 40 subjects x 4 relations by heart.
In three sentences of ten one of four fillers stands before the answer, so that a model without error gives an answer
70 % after `is`: there is something to be confident of, and something to hold back. Asked is `<s> the r of s is`.

subject    What each of the 16 heads writes at the last token along the unembedding of the subject, less the mean of all
           unembeddings, through the final norm of frozen scale. The two heads that write most are chosen on one half
           of the subjects; on the other half their share of all that heads write for the subject is measured, heads
           that write against it left out of the sum. Control: the same along the unembedding of another subject.
MLPs       Each layer's MLP regressed on the layer's heads, as the page has it: reported, not bounded. One number a head
           accounts for 4 % of what MLPs add at most, and MLPs of all layers write against the subject.
last       A component of the last layer (four heads, the MLP) holds back what is right where it writes against log p,
           the direction u_answer - Σ_v p_v u_v, in the mean over the first half: a filler's logit that is raised more
           than the answer's counts. The one that does so most is removed on the second half, in a real forward with
           the norm at its own scale: p(correct) less p(correct) before, with its interval over prompts. Where no
           component writes against the answer there is nothing to remove and the claim fails.

Three models are trained, from three seeds: the share is the mean of theirs, and the interval that of all their prompts;
the numbers of each stand beside them. What is measured, rate and steps were chosen on three other seeds, where after
800 steps the share was 0.60, 0.56 and 0.68. On them the direction of the answer's logit alone was tried for the last
layer: no component wrote against it on one seed, though p(correct) rose without three of its heads.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from regard.claims.lab import generator, mean, threads
from regard.claims.small_lm import small_llama, taught
from regard.core import Edit, Site
from regard.core.claim import Claim, Measured
from regard.explaining.effects import bootstrap
from regard.explaining.pairs import Batch
from regard.explaining.runs import Values, capture, forward
from regard.explaining.sources import output_matrices
from regard.methods.tracing.factual_recall_mechanisms import Config, regressed, written

LAYERS, HEADS, WIDTH, STEPS, RATE, BATCH, SEEDS = 4, 4, 64, 350, 4e-3, 64, (3, 4, 5)
SUBJECTS, RELATIONS, ANSWERS, FILLERS, SENTENCES, FILLED = 40, 4, 10, 4, 3, 0.3
# numbers of tokens
BEGIN, THE, OF, IS, STOP, FILLER = 0, 1, 2, 3, 4, 5
RELATION = FILLER + FILLERS
SUBJECT = RELATION + RELATIONS
ANSWER = SUBJECT + SUBJECTS
VOCABULARY = ANSWER + RELATIONS * ANSWERS
TOP = 2


# texts


def facts(seed: int) -> Tensor:
    """[SUBJECTS, RELATIONS] tokens of the answers, of ten for each relation."""
    drawn = torch.randint(ANSWERS, (SUBJECTS, RELATIONS), generator=generator(1000 + seed))
    return ANSWER + drawn + ANSWERS * torch.arange(RELATIONS)


def lesson(table: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids and labels of three sentences on one subject."""
    subject = torch.randint(SUBJECTS, (BATCH,), generator=g)
    relations = torch.rand(BATCH, RELATIONS, generator=g).argsort(1)[:, :SENTENCES]
    sign = lambda token: torch.full((BATCH, SENTENCES), token)  # noqa: E731
    filler = torch.randint(FILLER, RELATION, (BATCH, SENTENCES), generator=g)
    filled = torch.rand(BATCH, SENTENCES, generator=g) < FILLED
    parts = [sign(THE), RELATION + relations, sign(OF), SUBJECT + subject[:, None].expand(-1, SENTENCES), sign(IS),
             filler.where(filled, -100), table[subject[:, None], relations], sign(STOP)]  # fmt: skip
    text = torch.cat([torch.full((BATCH, 1), BEGIN), torch.stack(parts, 2).flatten(1)], 1)
    text = text.gather(1, (text < 0).int().argsort(dim=1, stable=True))  # what is not there goes to the end
    return text.clamp(min=0), torch.cat([text[:, 1:], torch.full((BATCH, 1), -100)], 1)


def questions(table: Tensor, half: int) -> tuple[Batch, Tensor, Tensor]:
    """(prompts, tokens of their subjects, of their answers), of the subjects of even or of odd number."""
    subject = torch.arange(half, SUBJECTS, 2).repeat_interleave(RELATIONS)
    relation = torch.arange(RELATIONS).repeat(SUBJECTS // 2)
    sign = lambda token: torch.full_like(subject, token)  # noqa: E731
    ids = torch.stack([sign(BEGIN), sign(THE), RELATION + relation, sign(OF), SUBJECT + subject, sign(IS)], 1)
    return Batch(ids, torch.ones_like(ids)), SUBJECT + subject, table[subject, relation]


# what is written


def in_residual(model: LlamaForCausalLM, values: Values) -> Tensor:
    """[B, layers, heads, width] what each head adds to the residual at the last token."""
    matrices = output_matrices(model)
    return torch.stack(
        [torch.einsum("bhe,hew->bhw", values["z"][n][:, :, -1], matrices[n]) for n in range(LAYERS)], 1
    )


def last(values: Values, quantity: str) -> Tensor:
    """[B, layers, width] of the last token."""
    return torch.stack([values[quantity][n][:, 0, -1] for n in range(LAYERS)], 1)


def along(
    model: LlamaForCausalLM, writes: Tensor, residual: Tensor, tokens: Tensor, p: Tensor | None = None
) -> Tensor:
    """[B, C] what writes [B, C, width] add to the logits of these tokens, less the mean of all logits, or that by p."""
    table = model.lm_head.weight
    mean_of = table.mean(0) if p is None else p @ table
    cfg = Config(eps=model.config.rms_norm_eps)
    return written(writes, residual, table[tokens] - mean_of, model.model.norm.weight, cfg)


@torch.no_grad()
def looked_at(model: LlamaForCausalLM, table: Tensor, half: int) -> dict[str, Tensor]:
    """What heads write for the subject and another one, the last layer for the answer, and the probabilities."""
    batch, subject, answer = questions(table, half)
    logits, values = capture(model, batch, ("z", "mlp", "resid_post"))
    heads, mlp, residual = in_residual(model, values), last(values, "mlp"), last(values, "resid_post")[:, -1]
    other = SUBJECT + (subject - SUBJECT + 2) % SUBJECTS
    flat = heads.flatten(1, 2)
    ends = torch.cat([heads[:, -1], mlp[:, -1:]], 1)  # of the last layer
    p = logits.softmax(-1)
    return {
        "heads": heads, "mlps": mlp, "answer": answer, "p": p.gather(1, answer[:, None])[:, 0],
        "right": (logits.argmax(-1) == answer).double(), "filler": p[:, FILLER:RELATION].sum(-1),
        "of_subject": along(model, flat, residual, subject), "of_other": along(model, flat, residual, other),
        "last_for_logit": along(model, ends, residual, answer),
        "last_for_logp": along(model, ends, residual, answer, p),
        "mlps_for_subject": along(model, mlp, residual, subject),
        "logit_of_subject": along(model, residual[:, None], residual, subject),
    }  # fmt: skip


def subject_heads(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Any]:
    chosen = first["of_subject"].mean(0).topk(TOP).indices
    each, other = (second[name].mean(0) for name in ("of_subject", "of_other"))
    return {
        "top_heads": [[int(i) // HEADS, int(i) % HEADS] for i in chosen],
        "share_of_subject": (each[chosen].sum() / each.clamp(min=0).sum()).item(),
        "share_net": (each[chosen].sum() / each.sum()).item(),
        "top_write_of_subject": each[chosen].sum().item(),
        "top_write_of_another": other[chosen].sum().item(),
        "mlps_write_of_subject": second["mlps_for_subject"].mean(0).tolist(),
        "logit_of_subject": second["logit_of_subject"].mean().item(),
    }


def regressions(first: dict[str, Tensor]) -> dict[str, Any]:
    found = [regressed(first["heads"][:, n].double(), first["mlps"][:, n].double()) for n in range(LAYERS)]
    return {
        "mlp_on_heads": [[round(x, 3) for x in c.tolist()] for c, _, _ in found],
        "mlp_explained": [share.item() for _, _, share in found],
    }


# what is held back


def component(number: int) -> Site:
    """Of the last layer: a head, or the MLP behind them."""
    at = dict(layers=LAYERS - 1, tower="text")
    return Site("z", heads=number, **at) if number < HEADS else Site("mlp", **at)  # type: ignore[arg-type]


@torch.no_grad()
def gain(model: LlamaForCausalLM, table: Tensor, half: int, number: int, factor: float = 0.0) -> Tensor:
    """[B] what p(correct) becomes more by where a component of the last layer is scaled."""
    batch, _, answer = questions(table, half)
    p = [
        forward(model, batch, edits)[0].softmax(-1).gather(1, answer[:, None])[:, 0]
        for edits in ([], [Edit(component(number), "scale", factor)])
    ]
    return (p[1] - p[0]).double()


def held_back(model: LlamaForCausalLM, table: Tensor, first: dict[str, Tensor]) -> dict[str, Any]:
    each = first["last_for_logp"].mean(0)
    worst = int(each.argmin())
    gains = [gain(model, table, 1, n) for n in range(HEADS + 1)]
    return {
        "last_layer_for_logp": each.tolist(),
        "last_layer_for_logit": first["last_for_logit"].mean(0).tolist(),
        "suppresses": bool(each[worst] < 0),
        "component": "mlp" if worst == HEADS else f"head {worst}",
        "gain_by_prompt": gains[worst],
        "gain_at_half": gain(model, table, 1, worst, 0.5).mean().item(),
        "gain_of_each": [x.mean().item() for x in gains],
    }


def findings(model: LlamaForCausalLM, table: Tensor) -> dict[str, Any]:
    first, second = (looked_at(model, table, half) for half in (0, 1))
    known = {name: second[name].mean().item() for name in ("right", "p", "filler")}
    return {
        **known,
        **subject_heads(first, second),
        **regressions(first),
        **held_back(model, table, first),
    }


def blank_of(seed: int) -> LlamaForCausalLM:
    return small_llama(VOCABULARY, LAYERS, HEADS, WIDTH, seed, tied=True)


def one(seed: int) -> dict[str, Any]:
    """What is found in the model of one seed, and beside it before its training."""
    model, table = blank_of(seed), facts(seed)
    before = subject_heads(*(looked_at(model, table, half) for half in (0, 1)))
    losses = taught(model, lambda g: lesson(table, g), STEPS, RATE, seed)
    untrained = {"share_of_subject_untrained": before["share_of_subject"]}
    return {"loss": mean(losses[-20:]), **findings(model, table), **untrained}


def measure() -> Measured:
    with threads(1):
        found = [one(seed) for seed in SEEDS]
    removed = torch.cat([f.pop("gain_by_prompt") for f in found])
    low, high = bootstrap(removed[:, None], torch.ones(len(removed)).double())
    shares = [f["share_of_subject"] for f in found]
    numbers: dict[str, Any] = {
        "share_of_subject_mean": mean(shares),
        "gain": removed.mean().item(),
        "gain_low": low.item(),
        "gain_high": high.item(),
        "gain_by_seed": [x.mean().item() for x in removed.chunk(len(SEEDS))],
        **{key: [f[key] for f in found] for key in found[0]},
    }
    parts = {
        "two heads write the subject": numbers["share_of_subject_mean"] >= 0.6,
        "a component holds it back": all(numbers["suppresses"]),
        "more probable without it": numbers["gain_low"] > 0,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="factual_recall_mechanisms",
    statement=(
        "in a tiny language model that learned synthetic facts by heart few heads write the subject's unembedding, and "
        "without the component of the last layer that holds it back the right answer has a higher probability"
    ),
    bound=(
        "the top 2 of 16 heads hold >= 60 % of what heads write for the subject's logit, in the mean of three models; "
        "mean gain of p(correct) > 0, its 95 % interval without 0"
    ),
    measure=measure,
)
