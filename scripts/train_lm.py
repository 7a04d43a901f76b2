"""Train the small language model that regard ships, from nothing, on two CPU cores or an accelerator.

A LLaMA-type decoder that can retrieve from its context. Three kinds of sequences are mixed: running text
(prose and code), pages of facts with questions about them (regard.tasks.recall, the same wording), and
random tokens that repeat, which make induction heads. Sequences grow from 128 to 2,048 tokens; each begins
with <s>, on which attention sinks form. Every step draws from its own seeded generator, so a run that is
stopped and resumed sees what the run that was not stopped sees.

    python scripts/train_lm.py --out runs/lm --tokens 30e6 --seed 0
    python scripts/train_lm.py --out runs/lm --tokens 30e6 --seed 0 --resume

The commands that made the shipped model are in its CARD.md. Recall reaches as far as the sequences: it stays
near nothing for 5 M tokens, then rises within 3 M, and each longer stage takes 1 M and more to follow.
"""

import argparse
import json
import math
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import lm_corpus
import torch
from lm_model import build_tokenizer, new_model, optimizers, save
from torch.nn.functional import cross_entropy

from regard.catalog import task
from regard.tasks.base import encode
from regard.tasks.recall import Fact, near_keys, weave, words

# (share of the tokens, length): until this share, sequences have this length
STAGES = ((0.40, 128), (0.55, 256), (0.70, 512), (0.85, 1024), (1.0, 2048))
BATCH_TOKENS, WARM_UP, EVERY = 8192, 50, 100
# weight of a token in the loss, on a page of facts and in running text
FACT, TEXT = 0.3, 1.0
# after this share of the tokens, facts and questions have no weight, so that free text does not break into them
SPOKEN = 0.3


class Pieces:
    """A tokenizer that remembers the words it has seen: pages of facts are built from few of them."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.known = tokenizer, {}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = []
        for piece in re.findall(r"\s?\S+", text):
            if piece not in self.known:
                self.known[piece] = encode(self.tokenizer, piece)
            ids += self.known[piece]
        return ids


@dataclass
class Mix:
    """Draws training sequences and the weight of each token."""

    tokenizer: object
    prose: torch.Tensor
    code: torch.Tensor
    answer: float

    def __post_init__(self) -> None:
        self.pieces = Pieces(self.tokenizer)

    def batch(self, seed: int, step: int, length: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        rng = random.Random(f"{seed} {step}")
        rows = [self.sequence(rng, length - 1, share) for _ in range(max(2, BATCH_TOKENS // length))]
        first = self.tokenizer.bos_token_id
        ids = torch.tensor([[first, *ids] for ids, _ in rows])
        return ids, torch.tensor([[0.0, *weights] for _, weights in rows])

    def sequence(self, rng: random.Random, length: int, share: float) -> tuple[list[int], list[float]]:
        """Ids and weights; `share` of the training is done, 0 .. 1."""
        kind = rng.random()
        if kind < 0.45:
            return self.facts(rng, length, share)
        if kind < 0.60 - 0.10 * share:
            return self.repeated(rng, length)
        return self.text(rng, length), [TEXT] * length

    def text(self, rng: random.Random, length: int) -> list[int]:
        source = self.prose if rng.random() < 0.8 else self.code
        start = rng.randint(0, len(source) - length)
        return source[start : start + length].tolist()

    def repeated(self, rng: random.Random, length: int) -> tuple[list[int], list[float]]:
        period = rng.randint(8, length // 2)
        unit = [rng.randrange(3, len(self.tokenizer)) for _ in range(period)]
        return (unit * (length // period + 1))[:length], [0.0] * period + [1.0] * (length - period)

    def facts(self, rng: random.Random, length: int, share: float) -> tuple[list[int], list[float]]:
        """A page of facts: many and all asked (dense), or few in much text."""
        dense = rng.random() < max(0.3, 1 - 2 * share)
        number = rng.randint(1, max(1, length // 30)) if dense else rng.choice([1, 1, 2, 4, 8, 16, 32])
        number = min(number, max(1, length // 30), 64)
        facts = self.draw(rng, number)
        questioned = rng.sample(facts, number if dense else min(number, rng.randint(1, 4)))
        statements = [fact.statement(self.pieces) for fact in facts]
        questions = [(fact.question(self.pieces), fact.answer(self.pieces)) for fact in questioned]
        stop = encode(self.tokenizer, ".")
        room = length - sum(map(len, statements)) - sum(len(q) + len(a) + 1 for q, a in questions)
        if room < 0:
            return self.facts(rng, length, share)
        ids, starts = weave(rng, self.text(rng, room), statements)
        spoken = FACT if share < SPOKEN else 0.0
        weights = [FACT] * len(ids)
        for start, statement in zip(starts, statements, strict=True):
            weights[start : start + len(statement)] = [spoken] * len(statement)
        for question, answer in questions:
            ids += question + answer + stop
            weights += [spoken] * len(question) + [self.answer] * len(answer) + [FACT]
        return ids, weights

    def draw(self, rng: random.Random, number: int) -> list[Fact]:
        keys = rng.sample(words(), number) if rng.random() < 0.35 else near_keys(rng, number)
        if rng.random() < 0.5:
            values = [f" {rng.randint(100, 99999)}" for _ in keys]
        else:
            values = [" " + " ".join(rng.sample(words(), 2)) for _ in keys]
        return [Fact(key, value) for key, value in zip(keys, values, strict=True)]


@torch.no_grad()
def exact(model, questions, tokenizer, length: int, count: int, seed: int = 1) -> float:
    """Share of the questions whose whole answer is the most likely one, token by token."""
    right, device = 0, model.device
    samples = questions.samples(tokenizer, length, count, seed)
    for group in (samples[i : i + 8] for i in range(0, count, 8)):
        ids = torch.tensor([s.prompt + s.answer for s in group], device=device)
        size = len(group[0].answer)
        guess = model(ids).logits[:, -size - 1 : -1].argmax(-1)
        right += (guess == ids[:, -size:]).all(-1).sum().item()
    return right / count


@torch.no_grad()
def text_loss(model, ids: torch.Tensor, first: int, length: int = 512, rows: int = 32) -> float:
    """Mean negative log-likelihood in nats per token of held-out text, in windows that begin with <s>."""
    windows = ids[: rows * (length - 1)].view(rows, length - 1)
    windows = torch.cat([torch.full((rows, 1), first), windows], 1).to(model.device)
    losses = [model(w, labels=w).loss.item() for w in windows.split(8)]
    return sum(losses) / len(losses)


@dataclass
class Training:
    """A training under way: everything that a checkpoint holds."""

    model: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def keep(self, path: Path) -> None:
        state = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
        state |= {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def take_up(self, path: Path) -> None:
        state = torch.load(path, weights_only=True, map_location=self.model.device)
        self.model.load_state_dict(state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]

    def update(self, ids: torch.Tensor, weights: torch.Tensor, rate: float) -> float:
        device = self.model.device
        ids, weights = ids.to(device), weights[:, 1:].to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = self.model(ids).logits
        each = cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (each * weights.flatten()).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
            optimizer.step()
            optimizer.zero_grad()
        self.step, self.tokens = self.step + 1, self.tokens + ids.numel()
        return loss.item()


def rate(share: float, step: int) -> float:
    """The learning rate as a share of its peak: warm-up, then a cosine down to a twentieth."""
    return min(1.0, (step + 1) / WARM_UP) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))


def train(training: Training, mix: Mix, held: torch.Tensor, args: argparse.Namespace) -> None:
    began, before = time.monotonic(), training.seconds
    end = min(args.tokens, args.until)
    while training.tokens < end:
        share = training.tokens / args.tokens
        length = args.length or next(size for until, size in STAGES if share < until)
        loss = training.update(
            *mix.batch(args.seed, training.step, length, share), rate(share, training.step)
        )
        training.seconds = before + time.monotonic() - began
        bar = "#" * int(30 * training.tokens / args.tokens)
        print(
            f"\r[{bar:30}] {training.tokens / 1e6:6.2f} M tokens, loss {loss:.3f}, {training.seconds:.0f} s",
            end="",
            flush=True,
        )
        if training.step % EVERY == 0 or training.tokens >= end:
            report(training, mix.tokenizer, held, length, loss, args.out)
            training.keep(args.out / "checkpoint.pt")


def report(training: Training, tokenizer, held: torch.Tensor, length: int, loss: float, out: Path) -> None:
    training.model.eval()
    row = {
        "step": training.step,
        "tokens": training.tokens,
        "seconds": round(training.seconds),
        "length": length,
        "loss": round(loss, 4),
    }
    row["held_out"] = round(text_loss(training.model, held, tokenizer.bos_token_id), 4)
    for name, settings in (("needle", {}), ("recall", {"values": "words"})):
        row |= {
            f"{name}_{n}": round(exact(training.model, task(name, **settings), tokenizer, n, 32), 3)
            for n in (256, max(512, length))
        }
    training.model.train()
    with (out / "curve.jsonl").open("a") as curve:
        curve.write(json.dumps(row) + "\n")
    print("\n" + "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of checkpoint, curve and model")
    parser.add_argument("--tokens", type=float, default=30e6, help="training tokens (default 30e6)")
    parser.add_argument(
        "--until", type=float, default=math.inf, help="stop after this many of them, to resume"
    )
    parser.add_argument("--length", type=int, help="train at this length only (default: from 128 to 2,048)")
    parser.add_argument(
        "--answer-weight", type=float, default=3.0, help="weight of an answer's tokens in the loss"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--any-corpus", action="store_true", help="train although the corpus is not the manifest's"
    )
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    corpus = lm_corpus.assemble()
    if not args.any_corpus:
        lm_corpus.check(corpus)
    tokenizer = build_tokenizer(corpus.prose)
    prose, code, held = (
        torch.tensor(encode(tokenizer, text)) for text in (corpus.prose, corpus.code, corpus.held_out)
    )
    model = new_model(tokenizer).to("cuda" if torch.cuda.is_available() else "cpu")
    size = sum(p.numel() for p in model.parameters())
    print(f"tokens of prose {len(prose):,}, of code {len(code):,}; weights {size:,}", flush=True)
    training = Training(model, optimizers(model, args.optimizer))
    if args.resume:
        training.take_up(args.out / "checkpoint.pt")
    train(training, Mix(tokenizer, prose, code, args.answer_weight), held, args)
    save(model, tokenizer, args.out / "model")


if __name__ == "__main__":
    main()
