"""LAWCAT's claim: distilled at length L, with convolution and normaliser, a linear model finds a passkey at 4L and 8L.

The teacher is a softmax model of two layers, trained here on texts of 64 tokens: random words, in them once a mark and
a key of three different digits, at the end the mark again and the key to be given.

    w w w w M 7 2 9 w w w w ... w M -> 7 2 9

Three times it is converted, each by 100 steps of transfer (attention outputs) and 200 of low-rank fine-tuning on texts
of 64 tokens: as the paper has it, without the normaliser (a gain per head in its place), and without the convolution.
A passkey counts when its three digits are all right; 256 texts at each of 64, 256 and 512 tokens. The model has no
positions, as rotary ones beyond the lengths seen are a second reason to fail, and not the one that is asked about (with
rotary positions in the first layer no variant found more than 1 in 10 at 2L, the full one the most). With keys of two
digits, which all variants learn at L, one run gave 0.95 (full), 0.47 (no normaliser) and 0.94 (no convolution) at 4L:
the convolution matters where a group of tokens has to be found. Without the normaliser three digits are not learnt at
L either in these steps.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel, SmolLM3Config, SmolLM3ForCausalLM

from regard.attaching.actors import AttentionCall
from regard.attaching.attachment import attach
from regard.attaching.converted import Converted
from regard.attaching.replacement import MechanismReplacement
from regard.claims.lab import difference, generator, seeded, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.train.convert import convert, language_loss
from regard.train.loop import cosine_to, fit
from regard.train.teachers import layer_input

LENGTH, KEY, BATCH, TESTED, SEEDS = 64, 3, 32, 256, (0, 1, 2)
# digits are the ids 4 to 23, words those from 24 on
BEGIN, MARK, DIGITS, WORDS, VOCAB = 1, 2, 4, 24, 64
TEXT = 0.02  # weight of a word in the loss, against 1 for a digit of the answer
VARIANTS = {"full": {}, "no_norm": {"normalise": False}, "no_conv": {"kernel": 1}}
STEPS = dict(batch=16, steps=100, rate=1e-2, finetune="lora", finetune_steps=200, finetune_rate=5e-3)
TEACHER_STEPS, TEACHER_RATE = 1200, 3e-3


def texts(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """(ids [count, length], weights in the loss): the answer is the last three."""
    g = generator(seed)
    ids = torch.randint(WORDS, VOCAB, (count, length), generator=g)
    ids[:, 0] = BEGIN
    key = DIGITS + torch.rand(count, WORDS - DIGITS, generator=g).argsort(-1)[:, :KEY]
    passage = torch.cat([torch.full((count, 1), MARK), key], 1)
    start = torch.randint(1, length - 2 * (KEY + 1), (count, 1), generator=g)
    ids.scatter_(1, start + torch.arange(KEY + 1), passage)
    ids[:, -KEY - 1 :] = passage
    weights = torch.full(ids.shape, TEXT)
    weights[:, -KEY:] = 1
    return ids, weights


def teacher() -> PreTrainedModel:
    config = SmolLM3Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=8 * LENGTH, pad_token_id=0, bos_token_id=BEGIN, eos_token_id=0,
        no_rope_layers=[0, 0], tie_word_embeddings=False,
    )  # fmt: skip
    with seeded(0):
        model = SmolLM3ForCausalLM(config)

    def loss_at(step: int) -> Tensor:
        ids, weights = texts(BATCH, LENGTH, 1000 + step)
        return language_loss(model(ids, use_cache=False).logits, ids, weights)

    optimizer = torch.optim.AdamW(model.parameters(), TEACHER_RATE)
    fit(optimizer, loss_at, TEACHER_STEPS, schedule=cosine_to(0.05, rise=20))
    return model.eval()


def accuracy(model: PreTrainedModel, method: Converted | None, length: int) -> float:
    """Share of keys whose three digits are all the most likely ones."""
    ids, _ = texts(TESTED, length, 7)
    with torch.inference_mode(), attach(model, method):
        rows = [model(part, use_cache=False).logits[:, -KEY - 1 : -1].argmax(-1) for part in ids.split(BATCH)]
    return (torch.cat(rows) == ids[:, -KEY:]).all(-1).float().mean().item()


class Apart(MechanismReplacement):
    """A converted mechanism that runs each call a second time, token by token from the state, and compares."""

    worst = 0.0

    def compute(self, call: AttentionCall) -> Tensor:
        page, cfg, params = self.method.page, self.method.config, self.converted.params[call.name]
        rows, state = [], None
        for t in range(call.q.shape[2]):
            q, k, v = (x[:, :, t : t + 1] for x in (call.scaled(), call.k, call.v))
            out, state = page.fast(
                q, k, v, cfg, Call(params=params, x=layer_input(call)[:, t : t + 1], initial_state=state)
            )
            rows.append(out)
        whole = super().compute(call)
        self.worst = max(self.worst, difference(torch.cat(rows, 2), whole))
        return whole


def recurrent_against_parallel(
    model: PreTrainedModel, converted: Converted, length: int
) -> tuple[float, float]:
    """Largest differences in float32, token by token against all at once: of a layer's outputs, of the logits."""
    ids, beside = texts(2, length, 8)[0], Apart(converted)
    with torch.inference_mode(), attach(model, beside):
        model(ids, use_cache=False)
    with torch.inference_mode(), attach(model, converted):
        whole, cache, rows = model(ids, use_cache=False).logits, None, []
        for token in ids.split(1, dim=1):
            out = model(token, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits)
    return beside.worst, difference(torch.cat(rows, 1), whole)


def measure() -> Measured:
    with threads(1):  # two threads that share small matrices are slower than one
        model = teacher()
        accuracies: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
        for seed in SEEDS:
            ids, weights = texts(4000, LENGTH, 100 + seed)
            for name, settings in VARIANTS.items():
                converted = convert(
                    model,
                    mechanism="lawcat",
                    ids=ids,
                    weights=weights,
                    seed=seed,
                    **STEPS,
                    **settings,
                )
                accuracies[name].append([accuracy(model, converted, n * LENGTH) for n in (1, 4, 8)])
                if name == "full" and seed == SEEDS[0]:
                    apart, logits_apart = recurrent_against_parallel(model, converted, 4 * LENGTH)
        before = [accuracy(model, None, n * LENGTH) for n in (1, 4, 8)]
    means = {name: torch.tensor(rows).mean(0).tolist() for name, rows in accuracies.items()}
    numbers = {"teacher_L_4L_8L": before, "recurrent_against_parallel": apart}
    numbers["logits_recurrent_against_parallel"] = logits_apart
    for name, mean in means.items():
        numbers |= {f"{name}_L": mean[0], f"{name}_4L": mean[1], f"{name}_8L": mean[2]}
        numbers[f"{name}_4L_by_seed"] = [row[1] for row in accuracies[name]]
    best = means["full"][1]
    parts = {
        "better than without normaliser": best > means["no_norm"][1],
        "better than without convolution": best > means["no_conv"][1],
        "recurrent as parallel": apart < 1e-5,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="lawcat",
    statement=(
        "distilled at length L, LAWCAT with convolution and normaliser retrieves a passkey at 4L better than without "
        "either; recurrent and parallel forms agree"
    ),
    bound=(
        "passkey accuracy at 4L: full > no normaliser and full > no convolution, means of 3 seeds; recurrent against "
        "parallel max |Δ| < 1e-5"
    ),
    measure=measure,
)
