"""AF1's claim, on decoders trained here: whether all of a + b - c mod 7 can be computed at the last token.

A Llama of six layers is trained on 80 % of all 343 prompts "BOS a + b - c =", on the answer alone. A start that ends
with fewer than 95 % of the held-out prompts right begins anew from other weights, at most STARTS times; `starts` says
how many it took. Nothing else is looked at for that. Means are over the trained prompts, and the window (wait,
transfer), transfer at most three layers, is chosen on them too: the one that keeps most, of equal ones the shortest.
What it keeps, as a share of the model's own accuracy, and what the worst window of equal size loses, in points, are of
the 20 % that were held out. Numbers that decide are means over three models (seeds 30 to 32, of which nothing was seen
before); steps and weight decay were chosen on seeds 100 to 103, by the held-out accuracy alone.

Beside these: no layer in which the last token sees others (what is left without any transfer), all six, and the best
window that waits at least one layer.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from regard.attaching.attachment import attach
from regard.claims.lab import generator, mean, seeded, threads
from regard.core.claim import Claim, Measured
from regard.explaining.pairs import Batch
from regard.explaining.runs import capture
from regard.methods.tracing import af1_cama_abp as page
from regard.train.loop import fit, one_cycle

P, LAYERS, WIDTH, STEPS, BATCH, RATE, DECAY = 7, 6, 32, 1600, 128, 3e-3, 1.0
SEEDS, STARTS, LEARNED = (30, 31, 32), 3, 0.95
HALF = LAYERS // 2


class Trained:
    """A decoder of one seed, its prompts [343, 7] in random order, their answers, and which are held out.

    Another start has other weights and batches; the same prompts are held out.
    """

    def __init__(self, seed: int, start: int = 0) -> None:
        g = generator(seed)
        digits = torch.arange(P)
        a, b, c = torch.cartesian_prod(digits, digits, digits)[torch.randperm(P**3, generator=g)].T
        bos, plus, minus, equal = (torch.full_like(a, P + i) for i in range(4))
        self.prompts = torch.stack([bos, a, plus, b, minus, c, equal], 1)
        self.answers = (a + b - c) % P
        count = P**3 * 8 // 10
        self.parts = {"train": slice(0, count), "test": slice(count, None)}
        with seeded(seed + 1000 * start):
            self.model = LlamaForCausalLM(config())
        optimizer = torch.optim.AdamW(self.model.parameters(), RATE, weight_decay=DECAY, betas=(0.9, 0.98))
        batches = generator(seed + 1000 * start)

        def loss(step: int) -> Tensor:
            at = torch.randint(count, (BATCH,), generator=batches)
            return F.cross_entropy(self.logits(self.prompts[at]), self.answers[at])

        fit(optimizer, loss, STEPS, schedule=one_cycle())
        self.model.eval()
        known = self.prompts[self.parts["train"]]
        self.acts = capture(self.model, Batch(known, torch.ones_like(known)), ["resid_post"])[1]["resid_post"]

    def logits(self, prompts: Tensor) -> Tensor:
        return self.model(input_ids=prompts, use_cache=False, logits_to_keep=1).logits[:, -1]

    @torch.no_grad()
    def accuracy(self, part: str, cfg: page.Config | None = None) -> float:
        """Of the model, or of its subgraph."""
        prompts, answers = self.prompts[self.parts[part]], self.answers[self.parts[part]]
        with attach(self.model, self.edits(prompts, cfg) if cfg else None):
            return (self.logits(prompts).argmax(-1) == answers).double().mean().item()

    def edits(self, prompts: Tensor, cfg: page.Config) -> list:
        blocked = page.abp(prompts.shape[1], LAYERS, cfg)
        if cfg.wait == 0:
            return [*blocked]
        acts = self.acts[cfg.wait - 1][:, 0]
        values = page.measure(acts, self.prompts[self.parts["train"]], prompts)
        return [*page.cama(values, cfg), *blocked]


def config() -> LlamaConfig:
    return LlamaConfig(vocab_size=P + 4, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
                       num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=16,
                       tie_word_embeddings=False)  # fmt: skip


def learned(seed: int) -> tuple[Trained, int]:
    """The first start that learned, or the last, and the number of starts."""
    for start in range(STARTS):
        one = Trained(seed, start)
        if one.accuracy("test") >= LEARNED:
            break
    return one, start + 1


@cache
def of_seed(seed: int) -> dict[str, float]:
    one, starts = learned(seed)
    windows = [page.Config(w, t) for t in range(1, HALF + 1) for w in range(LAYERS - t + 1)]
    kept = {cfg: one.accuracy("train", cfg) for cfg in windows}
    best = max(windows, key=lambda cfg: kept[cfg])
    worst = min((c for c in windows if c.transfer == best.transfer), key=lambda cfg: kept[cfg])
    late = max((c for c in windows if c.wait), key=lambda cfg: kept[cfg])
    base = one.accuracy("test")
    return {
        "starts": starts, "train": one.accuracy("train"), "test": base, "wait": best.wait, "transfer": best.transfer,
        "kept": one.accuracy("test", best) / base, "kept_on_train": kept[best] / one.accuracy("train"),
        "worst_wait": worst.wait, "lost": base - one.accuracy("test", worst),
        "kept_with_no_transfer": one.accuracy("test", page.Config(0, 0)) / base,
        "kept_with_six_layers": one.accuracy("test", page.Config(0, LAYERS)) / base,
        "kept_if_it_waits": one.accuracy("test", late) / base,
    }  # fmt: skip


def measure() -> Measured:
    with threads(1):
        found = [of_seed(seed) for seed in SEEDS]
    numbers = {key: [one[key] for one in found] for key in found[0]}
    return Measured.by(
        bounds(found), {**{f"mean_{key}": mean(numbers[key]) for key in ("kept", "lost")}, **numbers}
    )


def bounds(found: list[dict[str, float]]) -> dict[str, bool]:
    """What is kept and lost on average; each model has learned its task, else nothing is tested."""
    kept, lost = (mean(one[key] for one in found) for key in ("kept", "lost"))
    learned = all(one["test"] >= LEARNED for one in found)
    return {"learned": learned, "the best window keeps": kept >= 0.9, "the worst loses": lost >= 0.3}


CLAIM = Claim(
    name="af1_cama_abp",
    statement=(
        "a decoder trained on a + b - c mod 7 keeps its accuracy when tokens flow to the last one in a few layers "
        "only; the same window elsewhere destroys it"
    ),
    bound=(
        "best window of at most half the layers keeps >= 90 % of held-out accuracy; the worst window of equal size "
        "loses >= 30 points; means of three models, each right on >= 95 % of held-out prompts"
    ),
    measure=measure,
    fails=("the best window keeps",),
    contradicted=(
        "three models that are right on 97, 99 and 99 % of held-out prompts keep 31, 85 and 12 %: 43 on average "
        "(chance is 14). Losing is easy (83 points). It varies from model to model: three more (seeds 40 to 42) keep "
        "16, 93 and 100 %, 56 on average of the six. Trained for half as long, with a weight decay of 0.1 (up to "
        "three starts each for 95 % held out), these six seeds keep 97, 84, 100, 43, 86 and 91 %, 84 on average: "
        "above the bound on the first three (94), below it on the last (73), which were run because of that. Of 26 "
        "models of this size right on 95 % or more, whatever the steps and the decay, 10 keep 90 %; two trained for "
        "4000 steps 16 and 44. So it is not for lack of learning, and a decoder that does it all at the last token is "
        "one of several that training finds. Where less is kept, tokens before the last one compute: with all six "
        "layers for the last token, only the others kept apart, the three keep 9, 100 and 18 %. Windows that keep 90 "
        "% begin at layer 0, but for one model (93 %) that waits one layer. Before: mod 11 and width 64, right on 95 "
        "and 99.6 %: 49 and 80; trained on every token, right on 84 and 90 %: 14 and 18. Not tried: prompts of "
        "several forms and lengths, where a token does not know what it is a part of"
    ),
)
