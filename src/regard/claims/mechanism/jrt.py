"""Just-read-twice's claim: a model of fixed state gains from reading its context twice, softmax attention does not.

The task is the paper's own synthetic one: two sets of words, a long one and a short one, and the word that is in both
is to be given. Whoever reads the long set first must keep all of it; whoever knows the short one can look for three
words. The prompt stands there once and then a second time, and the answer is asked for after each. Half of the texts
begin with the long set, half with the short one; the score is the mean over both orders.

    long a b c .. x   short Q R b   ?  -> b        the same again   ?  -> b

Both models are two layers of width 64 with a short convolution on q, k and v; the recurrent one is the page jrt without
its prefix term, second-order Taylor features of 8 channels on values of 16; softmax attention has the same values. Both
are trained on doubled prompts, at the better of two learning rates.

The setting was chosen among six of this task tried at one seed, in which the gain was 2.7 to 11.1 points; seeds here
are fresh. On key-value recall with context and questions repeated, about ten settings were tried, and the recurrent
model never gained more than 2 points: at this size it does not learn to use the second reading. The prefix form itself
(prompt read at once, then token by token) is held to its sums in the tests of the page; here in float32 as well.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard import catalog
from regard.claims.lab import difference, generator, right_answers, seeded, sweep, threads, trained
from regard.core.call import Call
from regard.core.claim import Claim, Measured

WORDS, LONG, SHORT = 48, 24, 3
WIDTH, FEATURES, VALUE = 64, 8, 16
STEPS, BATCH, TESTED, RATES, SEED = 1200, 64, 1024, (5e-3, 1e-2), 1
ORDERS = ("long first", "short first")


def texts(count: int, seed: int, order: str | None = None) -> tuple[Tensor, Tensor]:
    """Doubled prompts [count, N] and labels: the word that both sets hold, at the end of each reading, else -100."""
    g = generator(seed)
    drawn = torch.rand(count, WORDS, generator=g).argsort(1)
    long, short = drawn[:, :LONG], drawn[:, LONG : LONG + SHORT].clone()
    rows = torch.arange(count)
    answer = long[rows, torch.randint(LONG, (count,), generator=g)]
    short[rows, torch.randint(SHORT, (count,), generator=g)] = answer
    # words of the short set are written differently
    short, ask = short + WORDS, torch.full((count, 1), 2 * WORDS)
    forms = torch.cat([long, short, ask], 1), torch.cat([short, long, ask], 1)
    first = torch.rand(count, 1, generator=g) < 0.5
    inputs = torch.where(first, *forms) if order is None else forms[ORDERS.index(order)]
    inputs = torch.cat([inputs, inputs], 1)
    labels = torch.full_like(inputs, -100)
    labels[:, inputs.shape[1] // 2 - 1] = labels[:, -1] = answer
    return inputs, labels


class Layer(nn.Module):
    """x + out(mix(conv(qkv(norm x)))); the mixer is Taylor linear attention or softmax attention."""

    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        self.recurrent, key = recurrent, FEATURES if recurrent else WIDTH
        self.sizes = [key, key, VALUE]
        self.norm, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, sum(self.sizes))
        self.short = nn.Conv1d(sum(self.sizes), sum(self.sizes), 3, padding=2, groups=sum(self.sizes))
        self.out = nn.Linear(VALUE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(self.norm(x))
        y = y + self.short(y.mT)[..., : x.shape[1]].mT
        q, k, v = (t[:, None] for t in y.split(self.sizes, dim=-1))
        if self.recurrent:
            page = catalog.method("jrt").page
            mixed = page.fast(q, k, v, page.configure(prefix=0), Call())[0]
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed[:, 0])


def learned(recurrent: bool, rate: float) -> nn.Module:
    with seeded(SEED):
        body = [nn.Embedding(2 * WORDS + 1, WIDTH), Layer(recurrent), Layer(recurrent)]
        model = nn.Sequential(*body, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS))
    inputs, labels = texts(BATCH * STEPS, SEED)
    return trained(model, list(zip(inputs.split(BATCH), labels.split(BATCH), strict=True)), rate)


def accuracies(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Order -> (after one reading, after two)."""
    by_order = {}
    for order in ORDERS:
        inputs, labels = texts(TESTED, 10**6 + SEED, order)
        right = right_answers(model, inputs, labels, batch=128)
        once, twice = right[:, inputs.shape[1] // 2 - 1], right[:, -1]
        by_order[order] = (once.float().mean().item(), twice.float().mean().item())
    return by_order


def readings(recurrent: bool) -> dict:
    """The better rate by accuracy after two readings: means over the orders, and both orders by themselves."""
    runs = sweep(RATES, lambda rate: accuracies(learned(recurrent, rate)))
    rate = max(runs, key=lambda r: sum(twice for _, twice in runs[r].values()))
    once, twice = (sum(pair[i] for pair in runs[rate].values()) / len(ORDERS) for i in (0, 1))
    return {
        "rate": rate,
        "once": once,
        "twice": twice,
        "gain_points": 100 * (twice - once),
        "by_order": runs[rate],
    }


def parallel_against_recurrent() -> float:
    """Largest |difference| in float32 of jrt with its prefix: all at once, and a prompt then token by token."""
    page, n, prompt = catalog.method("jrt").page, 96, 64
    cfg = page.configure(prefix=48)
    with seeded(0):
        dims = {"heads": 2, "kv_heads": 2, "key": 16, "value": 16, "width": 32}
        params, x = page.init(cfg, dims), torch.randn(1, n, 32)
        q, k, v = (torch.randn(1, 2, n, 16) / 2 for _ in range(3))
    whole = page.fast(q, k, v, cfg, Call(params=params, x=x))[0]
    state, rows, cuts = None, [], [slice(0, prompt), *(slice(t, t + 1) for t in range(prompt, n))]
    for cut in cuts:
        part = (t[:, :, cut] for t in (q, k, v))
        out, state = page.fast(*part, cfg, Call(params=params, x=x[:, cut], initial_state=state))
        rows.append(out)
    return difference(torch.cat(rows, 2), whole)


def measure() -> Measured:
    with threads(1):  # the matrices are small
        recurrent, softmax = readings(True), readings(False)
    apart = parallel_against_recurrent()
    numbers = {f"{kind}_{name}": value for kind, results in (("recurrent", recurrent), ("softmax", softmax))
               for name, value in results.items()}  # fmt: skip
    parts = {
        "the recurrent model gains": recurrent["gain_points"] >= 10,
        "softmax little": softmax["gain_points"] <= 3,
        "prefill is decode": apart < 1e-5,
    }
    return Measured.by(parts, {**numbers, "parallel_against_recurrent": apart})


CLAIM = Claim(
    name="jrt",
    statement=(
        "on prompts that ask for recall a fixed-state linear-attention model gains from reading the context twice, a "
        "softmax model of the same size little; parallel prefill and recurrent decode agree"
    ),
    bound="gain of the recurrent model >= 10 points, of softmax <= 3; prefill against decode max |Δ| < 1e-5 in float32",
    measure=measure,
    fails=("the recurrent model gains", "softmax little"),
    contradicted=(
        "with fresh seeds the recurrent model gains 8.6 points (84 to 92 % over both orders: 17 where the short set "
        "comes first, 0.5 where the long one does), under the bound of 10. Softmax attention of equal values is at 43 "
        "and 52 % after these 1,200 steps and still learning, so its gain of 9.3 says little; on key-value recall "
        "it has 100 % and gains -0.4, and there the recurrent model gains 2 at most (12 to 39 pairs, 2 to 8 feature "
        "channels, with and without MLP, rates 5e-3 and 1e-2). Prefill and decode agree (5e-7)"
    ),
)
