"""The pointer network's claim: trained to sort 5 to 10 numbers it sorts 15, which no fixed dictionary can address.

Both models read uniform numbers by an LSTM and write the positions of the sorted ones by another, which begins with the
encoder's last state and takes the number that was chosen last. Both ask the encoder states by the page; what differs:

    pointer           the page's weights are the distribution of the next position
    fixed vocabulary  the page's output, the encoder states blended, and the decoder state go through a linear map to
                      the ten positions that training has shown: the sequence-to-sequence model with input attention

Training is teacher forcing, a batch of one length at a time, gradients clipped at 2.0 as in the paper, with Adam and
64 units in place of plain SGD and 256 to 512. Each is decoded greedily, from its own choices, with no input masked, so
that naming one twice is an error too. Accuracy is the share of places with the right position. Of 15 places 10 at most
could be right with ten positions. The fixed vocabulary learns more slowly and gets twice the steps.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.catalog import method
from regard.claims.lab import generator, mean, seeded, threads
from regard.core.call import Call
from regard.core.claim import Claim, Measured
from regard.train.loop import fit, one_cycle

SHORTEST, LONGEST, LONG = 5, 10, 15
WIDTH, BATCH, RATE, SEEDS, TESTED = 64, 64, 5e-3, (0, 1, 2), 500
STEPS = {"pointer": 1500, "fixed": 3000}


class Sorter(nn.Module):
    """Numbers [B, n] and the positions named so far -> log probabilities of the next positions, [B, steps, choices]."""

    def __init__(self, points: bool) -> None:
        super().__init__()
        self.page, self.points = method("pointer_network").page, points
        self.number, self.start = nn.Linear(1, WIDTH), nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.encoder, self.decoder = (nn.LSTM(WIDTH, WIDTH, batch_first=True) for _ in range(2))
        dims = {"heads": 1, "kv_heads": 1, "key": WIDTH, "value": WIDTH, "width": WIDTH}
        self.learned = nn.ParameterDict(self.page.init(self.page.config(), dims))
        self.choose = None if points else nn.Linear(2 * WIDTH, LONGEST)

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        """Teacher forcing: the positions before each place are the right ones."""
        numbers = self.number(x[..., None])
        states, last = self.encoder(numbers)
        before = [self.start.expand(len(x), 1, -1), chosen(numbers, order[:, :-1])]
        return self.next(self.decoder(torch.cat(before, dim=1), last)[0], states)

    def next(self, decoded: Tensor, states: Tensor) -> Tensor:
        call, memory = Call("cross", params=dict(self.learned.items())), states[:, None]
        out, _, aux = self.page.fast(decoded[:, None], memory, memory, self.page.config(), call)
        if self.points:
            return aux["weights"][:, 0].clamp(min=1e-9).log()
        return self.choose(torch.cat([decoded, out[:, 0]], dim=-1)).log_softmax(-1)

    @torch.no_grad()
    def sort(self, x: Tensor) -> Tensor:
        """Positions [B, n], each the likeliest after those that it has named itself."""
        numbers = self.number(x[..., None])
        states, memory = self.encoder(numbers)
        named, token = [], self.start.expand(len(x), 1, -1)
        for _ in range(x.shape[1]):
            decoded, memory = self.decoder(token, memory)
            named.append(self.next(decoded, states).argmax(-1))
            token = chosen(numbers, named[-1])
        return torch.cat(named, dim=1)


def chosen(numbers: Tensor, positions: Tensor) -> Tensor:
    return numbers.gather(1, positions[..., None].expand(-1, -1, numbers.shape[2]))


def trained(name: str, seed: int) -> Sorter:
    with seeded(seed):
        model = Sorter(points=name == "pointer")
    g = generator(1000 + seed)

    def loss_at(step: int) -> Tensor:
        n = int(torch.randint(SHORTEST, LONGEST + 1, (), generator=g))
        x = torch.rand(BATCH, n, generator=g)
        order = x.argsort(1)
        return F.nll_loss(model(x, order).flatten(0, 1), order.flatten())

    fit(torch.optim.Adam(model.parameters(), RATE), loss_at, STEPS[name], schedule=one_cycle(), clip=2.0)
    return model


def sorted_right(model: Sorter, n: int) -> tuple[float, int]:
    """(share of places that are right, the largest position that is named, counted from 1)."""
    x = torch.rand(TESTED, n, generator=generator(7))
    named = model.sort(x)
    return (named == x.argsort(1)).float().mean().item(), int(named.max()) + 1


def measure() -> Measured:
    numbers: dict[str, Any] = {}
    with threads(1):
        for name in STEPS:
            models = [trained(name, seed) for seed in SEEDS]
            for n in (LONGEST, LONG):
                shares, largest = zip(*(sorted_right(model, n) for model in models), strict=True)
                numbers |= {f"{name}_{n}": mean(shares), f"{name}_{n}_by_seed": list(shares)}
                numbers[f"{name}_{n}_largest_position"] = max(largest)
    pointer, fixed = numbers[f"pointer_{LONG}"], numbers[f"fixed_{LONG}"]
    within = numbers[f"fixed_{LONG}_largest_position"] <= LONGEST
    numbers["lower_by"] = pointer - fixed
    parts = {
        "the pointer sorts longer": pointer >= 0.7,
        "the fixed vocabulary less": pointer - fixed >= 0.2,
        "within its vocabulary": within,
    }
    return Measured.by(parts, numbers)


CLAIM = Claim(
    name="pointer_network",
    statement=(
        "trained on sequences of 5 to 10 numbers, the pointer decoder still sorts 15, which a sequence-to-sequence "
        "model with a fixed vocabulary cannot address"
    ),
    bound=(
        "share of right places at n = 15 >= 0.7, mean of three seeds; the fixed vocabulary's lower by >= 0.2, and it "
        "never names a position > 10"
    ),
    measure=measure,
)
