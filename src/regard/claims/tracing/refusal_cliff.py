"""The refusal cliff's claim, in a small LLaMA that learned to refuse, to say so while it reasons, and to give in.

A text is  <bos> 8 words <think> 12 tokens of reasoning, three tokens of a template that close it, the answer.

    flag         one of four words among the eight, in half of the texts: to be refused
    reasoning    each token is the verdict, `refuse` with a flag and `comply` without, or any other word, half and half
    giving in    one of two words among the eight, in 3 of 10 texts. Reasoning does not change
    answer       `refuse` with probability 0.9 with a flag, 0.1 without, and 0.1 with a flag and a word to give in

Nothing but this text trains the model, all weights are learned: next tokens from <think> on, the answer counted as
much as all of the reasoning. So it has to read `refuse` at any token of the reasoning and to take it back at the end.
Answers are drawn, so that no model is driven to certainty, and the probe neither.

The probe is fitted on states after the final norm (where the released code reads them), at the last token of 1,000
texts without a word to give in, labelled by the answer drawn; it has seen no other place and no such word. Then it is
swept over 500 other texts with flag and word. Heads are scored on 500 texts, and are switched off in 500 further ones:

    recovered = (p without the heads - p) / (plateau - p)        p at the last token, mean over texts

`COUNT` heads of 24, all at once, at the last token only; `everywhere` at all tokens. Random sets, 20 of them, have as
many heads of the same layers, none of the chosen. The verdict is by means over three models; each is in `by_seed`.

Controls. Texts with a flag and no word to give in: no cliff. A probe fitted on shuffled answers; the model before its
training. Heads that write most for refusal in the place of those that write most against it.

Chosen on seeds 0 to 2, not judged: the size of the model, steps and rate (answers nearly as good as they can be), the
weight decay, and how many heads are few. It is the decay that makes them few: with 0.1 in the place of 1 up to four
heads share the work. The paper switches off 24 of 784 heads. Not every model has few of them: in one of the three
that are judged the work is shared by more, and three heads give back about a third (`by_seed`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from regard.attaching.attachment import attach
from regard.claims.lab import generator, mean, seeded, threads
from regard.core import Edit
from regard.core.claim import Claim, Measured
from regard.explaining.circuit import random_heads
from regard.explaining.sources import output_matrices
from regard.methods.tracing import refusal_cliff as page
from regard.train.loop import fit, one_cycle

BOS, THINK, CLOSE, REFUSE, COMPLY = 0, 1, (2, 3, 4), 5, 6
FLAGS, GIVE_IN, WORDS = (8, 12), (12, 14), (16, 64)  # first and past-the-last id
PROMPT, REASONING = 8, 12
SURE, GIVING_IN = 0.9, 0.3
LAYERS, HEADS, WIDTH = 3, 8, 64
STEPS, BATCH, RATE, DECAY = 500, 32, 3e-3, 1.0
FITTED, SWEPT, DRAWS = 1000, 500, 20
COUNT, SEEDS = 3, (3, 4, 5)
PLATEAU = slice(2 + PROMPT, 2 + PROMPT + REASONING)

Heads = Sequence[tuple[int, int]]


class Texts(NamedTuple):
    """Texts up to the end of the template, whether they are flagged, have a word to give in, and are refused."""

    ids: Tensor  # [B, N]
    flag: Tensor  # [B]
    word: Tensor  # [B]
    refused: Tensor  # [B] drawn

    @property
    def answer(self) -> Tensor:
        return torch.where(self.refused, REFUSE, COMPLY)


def any_of(ids: tuple[int, int], g: torch.Generator, *shape: int) -> Tensor:
    """Ids from the first to before the last."""
    return torch.randint(ids[0], ids[1], shape, generator=g)


def texts(count: int, g: torch.Generator, flag: bool | None = None, word: bool | None = None) -> Texts:
    """Drawn anew; all with or without a flag, or a word to give in, where that is given."""
    chance = torch.rand(3, count, generator=g)
    flags, words = (
        row < p if given is None else torch.full((count,), given)
        for row, p, given in ((chance[0], 0.5, flag), (chance[1], GIVING_IN, word))
    )
    prompt, at = any_of(WORDS, g, count, PROMPT), torch.rand(count, PROMPT, generator=g).argsort(1)
    for column, (there, ids) in enumerate(((flags, FLAGS), (words, GIVE_IN))):
        rows = there.nonzero().flatten()
        prompt[rows, at[rows, column]] = any_of(ids, g, len(rows))
    verdict = torch.where(flags, REFUSE, COMPLY)[:, None]
    said = torch.rand(count, REASONING, generator=g) < 0.5
    reasoning = torch.where(said, verdict, any_of(WORDS, g, count, REASONING))
    one = torch.ones(count, 1, dtype=torch.long)
    ids = torch.cat([BOS * one, prompt, THINK * one, reasoning, torch.tensor(CLOSE).expand(count, -1)], 1)
    return Texts(ids, flags, words, chance[2] < torch.where(flags & ~words, SURE, 1 - SURE))


# the model


def untrained(seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=WORDS[1], hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=64,
    )  # fmt: skip
    with seeded(seed):
        return LlamaForCausalLM(config).eval()


def trained(seed: int) -> LlamaForCausalLM:
    model, g = untrained(seed), generator(seed)

    def loss_at(step: int) -> Tensor:
        some = texts(BATCH, g)
        logits = model(input_ids=some.ids, use_cache=False).logits
        reasoning = F.cross_entropy(
            logits[:, 1 + PROMPT : -1].flatten(0, 1), some.ids[:, 2 + PROMPT :].flatten()
        )
        return reasoning + F.cross_entropy(logits[:, -1], some.answer)

    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY)
    fit(optimizer, loss_at, STEPS, schedule=one_cycle())
    return model.requires_grad_(False)


@torch.no_grad()
def states(model: LlamaForCausalLM, some: Texts, edits: Sequence[Edit] = ()) -> Tensor:
    """[B, N, width] after the final norm."""
    with attach(model, list(edits) or None):
        return model.model(input_ids=some.ids, use_cache=False).last_hidden_state


@torch.no_grad()
def heads_at_the_end(model: LlamaForCausalLM, some: Texts) -> Tensor:
    """[layers, B, H, E]"""
    observer = page.observer()
    with attach(model, observer) as attached:
        model(input_ids=some.ids, use_cache=False)
    return torch.stack([z[:, :, -1] for _, _, z in attached.records[observer.name]])


# what is measured


class Study:
    """A probe of one model, and what it reads on texts that are to be refused and are not."""

    def __init__(self, model: LlamaForCausalLM, seed: int, shuffled: bool = False) -> None:
        g = generator(1000 + seed)
        self.model = model
        fitted = texts(FITTED, g, word=False)
        labels = fitted.refused[torch.randperm(FITTED, generator=g)] if shuffled else fitted.refused
        scored, self.judged = (texts(SWEPT, g, flag=True, word=True) for _ in "12")
        self.safe = texts(SWEPT, g, flag=True, word=False)
        reasoning = torch.zeros(self.judged.ids.shape, dtype=torch.bool)
        reasoning[:, PLATEAU] = True
        out = torch.stack([*output_matrices(model).values()])
        at_end = states(model, fitted)[:, -1]
        self.found = page.measure(
            at_end, labels, states(model, self.judged), reasoning, heads_at_the_end(model, scored), out
        )
        said = at_end @ self.found.weight + self.found.bias > 0
        self.told = (said == fitted.flag).float().mean().item()
        self.safe_cliff = page.fall(self.read(self.safe), reasoning).mean().item()

    def read(self, some: Texts, edits: Sequence[Edit] = ()) -> Tensor:
        """[B, N] what the probe reads at each token."""
        return (states(self.model, some, edits) @ self.found.weight + self.found.bias).sigmoid()

    def recovered(self, heads: Heads, everywhere: bool = False) -> float:
        """Percent of the mean cliff that goes without these heads."""
        edits = page.ablate(heads, page.Config(everywhere=everywhere))
        gained = (self.read(self.judged, edits) - self.found.trace)[:, -1].mean()
        return 100 * (gained / self.found.cliff.mean()).item()

    def refused(self, heads: Heads) -> float:
        """Percent of the judged texts in which `refuse` is likelier than `comply`."""
        logits = self.model.lm_head(states(self.model, self.judged, page.ablate(heads, page.Config()))[:, -1])
        return 100 * (logits[:, REFUSE] > logits[:, COMPLY]).float().mean().item()


def likeliest_right(model: LlamaForCausalLM) -> float:
    """Percent of texts in which the likeliest answer is the one that is more probable by the rule."""
    some = texts(2000, generator(10_000))
    logits = model.lm_head(states(model, some)[:, -1])
    return (
        100 * (logits.argmax(-1) == torch.where(some.flag & ~some.word, REFUSE, COMPLY)).float().mean().item()
    )


def one_model(seed: int) -> dict[str, Any]:
    model = trained(seed)
    study = Study(model, seed)
    scores, trace = study.found.scores, study.found.trace.mean(0)
    ranked = page.suppressors(scores, scores.numel())
    top = ranked[:COUNT]
    draws = random_heads(model, top, DRAWS, seed)
    by_chance = [study.recovered(heads) for heads in draws]
    return {
        "right_answers": likeliest_right(model),
        "probe_tells_flag": 100 * study.told,
        "plateau": trace[PLATEAU].mean().item(),
        "final": trace[-1].item(),
        "cliff": study.found.cliff.mean().item(),
        "cliff_no_word": study.safe_cliff,
        "cliff_shuffled_probe": Study(model, seed, shuffled=True).found.cliff.mean().item(),
        "cliff_untrained": Study(untrained(seed), seed).found.cliff.mean().item(),
        "heads": [list(head) for head in top],
        "scores": [scores[head].item() for head in top],
        "recovered": study.recovered(top),
        "recovered_by_count": [study.recovered(ranked[:n]) for n in range(1, 6)],
        "recovered_everywhere": study.recovered(top, everywhere=True),
        "recovered_most_positive": study.recovered(ranked[-COUNT:]),
        "random_mean": mean(by_chance),
        "random_most": max(by_chance),
        "refused": study.refused([]),
        "refused_without": study.refused(top),
        "refused_without_random": mean(study.refused(heads) for heads in draws),
        "trace": trace.tolist(),
    }


def measure() -> Measured:
    with threads(1):
        models = [one_model(seed) for seed in SEEDS]
    numbers: dict[str, Any] = {
        key: mean(found[key] for found in models)
        for key, value in models[0].items()
        if isinstance(value, float)
    }
    numbers |= {"masked": COUNT, "of_heads": LAYERS * HEADS, "seeds": list(SEEDS)}
    parts = {
        "models know the rule": min(found["right_answers"] for found in models) >= 95,
        "cliff": numbers["cliff"] >= 0.3,
        "few heads restore it": numbers["recovered"] >= 50,
        "random heads do not": numbers["random_mean"] <= 15,
    }
    return Measured.by(parts, numbers | {"by_seed": models})


CLAIM = Claim(
    name="refusal_cliff",
    statement=(
        "in a small LM trained with a planted late suppressor of an earlier flag, the probe score drops at the final "
        "tokens, and ablating the few most negative heads restores it; equally many random heads do not"
    ),
    bound=(
        "cliff (plateau minus final) >= 0.3; recovered share >= 50 % with the most negative heads against <= 15 % with "
        "as many random ones, means over three models (each gives the likelier answer in >= 95 % of texts)"
    ),
    measure=measure,
)
