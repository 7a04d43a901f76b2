"""Diff-QuickFix's claim: the closed-form write is the ridge optimum, meets its keys, and moves nothing orthogonal.

    optimum        W' - (what descent on Σ ‖Wk - v‖² + λ‖W - W₀‖² ends at), over W'
    edited keys    ‖W'k - v‖ / ‖v‖ over all keys;  what is left is λ(λ + KKᵀ)⁻¹ of what W₀ missed
    orthogonal     ‖W'q - W₀q‖ / ‖W₀q‖ of q without a part in the span of the keys, W' kept in float32

At the width of the encoder of Stable Diffusion, 768. Keys are random directions of length one (1, 8, 64, and 291, as
many as the released notebook writes), values what W₀ makes of other random directions; and what the first
self-attention of a random CLIP text encoder gives at the last tokens of four prompts, with values from four others.
Descent is Nesterov's, with the step 1/L and the momentum of its condition number, from the zero matrix, so that the
directions that no key touches have to be found too. Each of the 768 outputs is a problem of its own: descent solves
the first 96.

Controls: keys that are not orthogonal do move (`moved_random`), λ = 10 leaves the edited keys unmet (`error_at_10`),
and the paper's own form, a system of 768 equations whatever the number of keys, is timed beside the one of the page.
"""

from math import ceil
from statistics import median

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from regard.claims.lab import generator, median_time, seeded, threads
from regard.core.claim import Claim, Measured
from regard.explaining.quickfix import edit_output_projection
from regard.methods.tracing.diffquickfix import Config, edited
from regard.train.loop import fit

WIDTH, COUNTS, SEEDS = 768, (1, 8, 64, 291), 3
STRENGTH, STRONG = Config.strength, 10.0
SOLVED, FALLS = (
    96,
    16,
)  # outputs that descent solves; at a condition number κ its error falls by e every √κ steps
ROUNDS = 5

Write = tuple[Tensor, Tensor, Tensor]  # weight [E, D], keys [K, D], values [K, E]


def random_write(count: int, seed: int) -> Write:
    g = generator(seed)
    weight = torch.randn(WIDTH, WIDTH, generator=g) / WIDTH**0.5
    keys, others = (nn.functional.normalize(torch.randn(count, WIDTH, generator=g), dim=-1) for _ in "12")
    return weight, keys, others @ weight.mT


def encoder(seed: int) -> CLIPTextModel:
    with seeded(seed):
        config = CLIPTextConfig(
            vocab_size=1000, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2,
            num_attention_heads=12, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        return CLIPTextModel(config).eval()


def prompts(seed: int) -> Tensor:
    """[4, 77] ids: one concept of two tokens in its place after zero to three words, then marks of the end."""
    g = generator(seed)
    ids = torch.full((4, 77), 2)
    ids[:, 0] = 1
    concept = torch.randint(3, 1000, (2,), generator=g)
    for row in range(4):
        ids[row, 1 : 1 + row] = torch.randint(3, 1000, (row,), generator=g)
        ids[row, 1 + row : 3 + row] = concept
    return ids


def encoder_write(seed: int) -> tuple[Write, float]:
    """What the first self-attention is given and should give, and the seconds of the whole edit."""
    model, last = encoder(seed), [2, 3, 4, 5]
    weight = model.get_parameter("encoder.layers.0.self_attn.out_proj.weight")

    def edit() -> Write:
        with edit_output_projection(model, 0, prompts(2 * seed), prompts(2 * seed + 1), last, last) as fix:
            return weight.detach(), fix.keys, fix.values

    return edit(), median_time(edit, ROUNDS)


def by_descent(write: Write, strength: float) -> Tensor:
    """The first rows of W after Nesterov's descent from zero, in float64."""
    weight, keys, values = (t.double() for t in write)
    weight, values = weight[:SOLVED], values[:, :SOLVED]
    largest = strength + float(torch.linalg.matrix_norm(keys, 2)) ** 2
    root = (largest / strength) ** 0.5
    found = nn.Parameter(torch.zeros_like(weight))
    momentum = (root - 1) / (root + 1)
    optimizer = torch.optim.SGD([found], 1 / largest, momentum=momentum, nesterov=True)

    def loss_at(step: int) -> Tensor:
        missed, moved = found @ keys.mT - values.mT, found - weight
        return 0.5 * (missed.square().sum() + strength * moved.square().sum())

    fit(optimizer, loss_at, ceil(FALLS * root), clip=None)
    return found.detach()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float(torch.linalg.norm(found.double() - wanted.double()) / torch.linalg.norm(wanted.double()))


def orthogonal(keys: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """[64, D] random vectors in float64, and the same without their part in the span of the keys."""
    q = torch.randn(64, WIDTH, generator=generator(seed + 100), dtype=torch.float64)
    basis = torch.linalg.qr(keys.double().mT).Q
    return q, q - q @ basis @ basis.mT


def properties(write: Write, seed: int) -> dict[str, float]:
    weight, keys, values = write
    new, strong = (edited(weight, keys, values, Config(strength)) for strength in (STRENGTH, STRONG))
    q, apart = orthogonal(keys, seed)
    before, after = weight.double(), new.double()
    met = keys.double() @ after.mT
    return {
        "error": relative(met, values),
        "error_one_key": max(relative(x, v) for x, v in zip(met, values, strict=True)),
        "error_at_10": relative(keys @ strong.mT, values),
        "off_descent": relative(new[:SOLVED], by_descent(write, STRENGTH)),
        "moved_orthogonal": relative(apart @ after.mT, apart @ before.mT),
        "moved_random": relative(q @ after.mT, q @ before.mT),
    }


def papers_form(write: Write) -> Tensor:
    """(λW + Σ v kᵀ)(λI + Σ k kᵀ)⁻¹ as it stands, by a solve."""
    weight, keys, values = write
    right = STRENGTH * torch.eye(WIDTH) + keys.mT @ keys
    return torch.linalg.solve(right, STRENGTH * weight + values.mT @ keys, left=False)


def seconds(write: Write) -> dict[str, float]:
    return {
        "seconds": median_time(lambda: edited(*write, Config(STRENGTH)), ROUNDS),
        "seconds_papers_form": median_time(lambda: papers_form(write), ROUNDS),
    }


def measure() -> Measured:
    rows: dict[str, list[dict[str, float]]] = {}
    with threads(1):
        for seed in range(SEEDS):
            for count in COUNTS:
                write = random_write(count, seed)
                rows.setdefault(f"{count}_keys", []).append(properties(write, seed) | seconds(write))
            write, whole = encoder_write(seed)
            rows.setdefault("encoder", []).append(
                properties(write, seed) | seconds(write) | {"seconds_whole": whole}
            )
    every = [row for group in rows.values() for row in group]
    worst = {key: max(row.get(key, 0.0) for row in every) for key in rows["encoder"][0]}
    least = {key: min(row[key] for row in every) for key in ("moved_random", "error_at_10")}
    parts = {
        "keys are met": worst["error"] < 0.05,
        "the ridge optimum": worst["off_descent"] < 1e-4,
        "orthogonal keys stay": worst["moved_orthogonal"] < 1e-5,
        "time": max(worst["seconds"], worst["seconds_whole"]) < 1,
    }
    numbers = {f"{key}_worst": value for key, value in worst.items() if key not in least}
    numbers |= {f"{key}_least": value for key, value in least.items()}
    for name, group in rows.items():
        numbers |= {f"{name}_{key}": median(row[key] for row in group) for key in group[0]}
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="diffquickfix",
    statement=(
        "the closed-form update maps edited keys to target values, equals the ridge optimum found by gradient "
        "descent, leaves orthogonal keys unchanged, and takes under a second"
    ),
    bound=(
        "at d = 768 and λ = 0.01, in the worst case: relative error over all edited keys < 5 %; relative difference "
        "to the descent's optimum < 1e-4; orthogonal keys moved by < 1e-5 in float32; < 1 s for the update, and for "
        "the whole edit of an encoder of that width"
    ),
    measure=measure,
)
