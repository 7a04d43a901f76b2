"""AF1's claim, on decoders trained here: whether all of a + b - c mod 7 can be computed at the last token.

A Llama of six layers is trained on 80 % of all 343 prompts "BOS a + b - c =", on the answer alone. Means are over
these prompts, and the window (wait, transfer), transfer at most three layers, is chosen on them too: the one that
keeps most, of equal ones the shortest. What it keeps, as a share of the model's own accuracy, and what the worst window
of equal size loses, in points, are of the 20 % that were held out. Numbers that decide are means over three models
(seeds 20 to 22); the experiment was written and looked at on seeds 0, 1 and 10.

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

P, LAYERS, WIDTH, STEPS, BATCH, RATE = 7, 6, 32, 800, 128, 3e-3
SEEDS = (20, 21, 22)
HALF = LAYERS // 2


class Trained:
    """A decoder of one seed, its prompts [343, 7] in random order, their answers, and which are held out."""

    def __init__(self, seed: int) -> None:
        g = generator(seed)
        digits = torch.arange(P)
        a, b, c = torch.cartesian_prod(digits, digits, digits)[torch.randperm(P**3, generator=g)].T
        bos, plus, minus, equal = (torch.full_like(a, P + i) for i in range(4))
        self.prompts = torch.stack([bos, a, plus, b, minus, c, equal], 1)
        self.answers = (a + b - c) % P
        count = P**3 * 8 // 10
        self.parts = {"train": slice(0, count), "test": slice(count, None)}
        with seeded(seed):
            self.model = LlamaForCausalLM(config())
        optimizer = torch.optim.AdamW(self.model.parameters(), RATE, weight_decay=0.1, betas=(0.9, 0.98))

        def loss(step: int) -> Tensor:
            at = torch.randint(count, (BATCH,), generator=g)
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


@cache
def of_seed(seed: int) -> dict[str, float]:
    one = Trained(seed)
    windows = [page.Config(w, t) for t in range(1, HALF + 1) for w in range(LAYERS - t + 1)]
    kept = {cfg: one.accuracy("train", cfg) for cfg in windows}
    best = max(windows, key=lambda cfg: kept[cfg])
    worst = min((c for c in windows if c.transfer == best.transfer), key=lambda cfg: kept[cfg])
    late = max((c for c in windows if c.wait), key=lambda cfg: kept[cfg])
    base = one.accuracy("test")
    return {
        "train": one.accuracy("train"), "test": base, "wait": best.wait, "transfer": best.transfer,
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
    kept, lost, right = (mean(numbers[key]) for key in ("kept", "lost", "test"))
    holds = right >= 0.9 and kept >= 0.9 and lost >= 0.3
    return Measured(holds, {"mean_kept": kept, "mean_lost": lost, "mean_accuracy": right, **numbers})


CLAIM = Claim(
    name="af1_cama_abp",
    statement=(
        "a decoder trained on a + b - c mod 7 keeps its accuracy when tokens flow to the last one in a few layers "
        "only; the same window elsewhere destroys it"
    ),
    bound=(
        "best window of at most half the layers keeps >= 90 % of held-out accuracy; the worst window of equal size "
        "loses >= 30 points; means of three models, which are right on >= 90 % of held-out prompts"
    ),
    measure=measure,
    contradicted=(
        "two of three models meet the bound (0.97 and 0.99 kept), one does not (0.43; it is right on 77 % of held-out "
        "prompts only): 0.80 on average. The best window begins at layer 0 in all three, so none is in the middle, and "
        "one that waits a single layer leaves chance: these models begin to sum at once. Being right is not enough "
        "either. On the seeds looked at before, models right on 94, 91 and 100 % kept 66, 86 and 96 %; of width 64 "
        "one right on 99 % kept 90 % (another was right on 39 %); with weight decay of 1 97 %: 15; mod 11 (width 64) "
        "95 and 99.6 %: 49 and 80. Where less is kept, tokens before the last one compute: with all six layers for the "
        "last token these kept 43 (the third), 83, 94, 63, 65 and 90 %. Trained on every token, models right on 84 "
        "and 90 % kept 14 and 18 %. Not tried: longer training, until every model is right on what is held out"
    ),
)
