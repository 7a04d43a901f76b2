"""Measure the shipped language model and write its CARD.md: recall, text loss, n-grams, attention sinks.

python scripts/lm_card.py src/regard/models/lm --command "python scripts/train_lm.py ..." [--command ...]
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import lm_corpus
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from regard.catalog import task
from regard.kinds.task import Task
from regard.tasks import Source, held_out

LENGTHS = (256, 512, 1024, 2048)
QUESTIONS, WINDOW, SINKS = 128, 256, 4


@torch.no_grad()
def generated(model, tokenizer, questions: Task, length: int) -> float:
    """Share of the answers that greedy generation gives exactly."""
    samples, right = questions.samples(tokenizer, length, QUESTIONS, seed=2), 0
    for group in (samples[i : i + 8] for i in range(0, QUESTIONS, 8)):
        ids = torch.tensor([s.prompt for s in group])
        size = len(group[0].answer)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=size,
            min_new_tokens=size,
            do_sample=False,
        )
        right += sum(output[i, length:].tolist() == s.answer for i, s in enumerate(group))
    return right / QUESTIONS


def windows(ids: torch.Tensor, first: int, length: int) -> torch.Tensor:
    """[rows, length]: the text in pieces, each behind the first token."""
    rows = len(ids) // (length - 1)
    pieces = ids[: rows * (length - 1)].view(rows, length - 1)
    return torch.cat([torch.full((rows, 1), first), pieces], 1)


@torch.no_grad()
def text_loss(model, rows: torch.Tensor, mask: torch.Tensor | None = None, skip: int = 0) -> float:
    """Nats per token; `mask` [length, length] says who sees whom, `skip` leaves the first predictions out."""
    total, count = 0.0, 0
    for ids in rows.split(max(1, 4096 // rows.shape[1])):
        seen = None if mask is None else mask.expand(len(ids), 1, *mask.shape)
        logits = model(ids, attention_mask=seen).logits[:, skip:-1]
        wanted = ids[:, skip + 1 :]
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), reduction="sum"
        ).item()
        count += wanted.numel()
    return total / count


def window_mask(length: int, sinks: int) -> torch.Tensor:
    """Who sees whom in a sliding window of WINDOW keys, the first `sinks` tokens always among them."""
    q, k = torch.arange(length)[:, None], torch.arange(length)
    return (k <= q) & ((q - k < WINDOW - sinks) | (k < sinks))


def ngrams(train: torch.Tensor, held: torch.Tensor, size: int) -> tuple[float, float]:
    """Nats per held-out token: the unigram (plus one), and the bigram interpolated with it (Witten-Bell)."""
    single = torch.bincount(train, minlength=size).double()
    unigram = (single + 1) / (single.sum() + size)
    pairs = torch.bincount(train[:-1] * size + train[1:], minlength=size * size).view(size, size).double()
    seen, kinds = pairs.sum(1, keepdim=True), (pairs > 0).sum(1, keepdim=True)
    bigram = (pairs + kinds * unigram) / (seen + kinds).clamp(min=1)
    bigram = torch.where(seen > 0, bigram, unigram)
    return -unigram[held[1:]].log().mean().item(), -bigram[held[:-1], held[1:]].log().mean().item()


@torch.no_grad()
def sink_mass(model, rows: torch.Tensor) -> list[list[float]]:
    """Layer by head: the mean weight that the second half of the queries gives to the first token."""
    model.set_attn_implementation("eager")
    weights = model(rows, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    half = rows.shape[1] // 2
    return [[round(x, 3) for x in w[:, :, half:, 0].mean((0, 2)).tolist()] for w in weights]


def measure(model, tokenizer, show: Callable = print) -> dict:
    held = torch.tensor(held_out().ids(tokenizer))
    prose = torch.tensor(Source("prose", lm_corpus.assemble().prose).ids(tokenizer))
    first, numbers = tokenizer.bos_token_id, {"held_out_tokens": len(held)}
    numbers["unigram"], numbers["bigram"] = ngrams(prose, held, len(tokenizer))
    for length in (512, 2048):
        numbers[f"loss_{length}"] = text_loss(model, windows(held, first, length))
    long = windows(held, first, 2048)[:16]
    numbers["full"] = text_loss(model, long, skip=WINDOW)
    for name, sinks in (("window", 0), ("window_and_sinks", SINKS), ("window_and_first", 1)):
        numbers[name] = text_loss(model, long, window_mask(2048, sinks), skip=WINDOW)
    numbers["sink_mass"] = sink_mass(model, windows(held, first, 512)[:16])
    show(numbers)
    for name, settings in (("needle", {}), ("recall", {"values": "words"})):
        for length in LENGTHS:
            numbers[f"{name}_{length}"] = generated(model, tokenizer, task(name, **settings), length)
            show(name, length, numbers[f"{name}_{length}"])
    numbers["recall_of_32"] = crowded(model, tokenizer)
    return numbers


def crowded(model, tokenizer) -> float:
    """Recall at 2,048 tokens among more facts than the task has by default."""
    return generated(model, tokenizer, task("recall", most_facts=32, values="words"), 2048)


CARD = """# A small language model that can retrieve

LLaMA-type decoder, {layers} layers, width {width}, {heads} query heads on {kv} key-value heads,
{size:.2f} M weights (kept in half precision, opened in float32), vocabulary {vocab} (byte-level BPE,
digits one by one, `<s>` in front by default), context 2,048. Trained from nothing on {tokens:.1f} M
tokens in {minutes:.0f} minutes on two CPU cores that were shared with other work:

    {command}

Half of the tokens are documentation and source code that come with pinned Python packages
(`tasks/data/corpus.json` names versions and hash), the other half facts with questions about them and
random tokens that repeat. The held-out text, `tasks/data/heldout.txt`, shares no paragraph with the
training text. Every training sequence begins with `<s>`. The curve of the training is in `curve.jsonl`.

The texts are the documentation of Python (PSF licence) and of numpy, scipy, scikit-learn, statsmodels,
networkx, pandas and torch (BSD licences).

It is an instrument, not an assistant: it knows documentation's English and the one form of question of
its tasks.

## Measured (`scripts/lm_card.py`, float32, greedy generation, {questions} questions each)

| tokens | 256 | 512 | 1,024 | 2,048 |
|---|---|---|---|---|
| needle, exact match | {needle} |
| recall among similar keys, exact match | {recall} |

Facts per page of recall: 4, 8, 16, 24. With 32 facts at 2,048 tokens, for which `curve.jsonl` has the numbers:
{recall_of_32:.1%}.

| held-out text, {held_out_tokens:,} tokens | nats per token |
|---|---|
| unigram of the training prose | {unigram:.3f} |
| bigram, interpolated (Witten-Bell) | {bigram:.3f} |
| this model, windows of 512 | {loss_512:.3f} |
| this model, windows of 2,048 | {loss_2048:.3f} |

| windows of 2,048, predictions after the first 256 | nats per token |
|---|---|
| full attention | {full:.3f} |
| window of 256 keys | {window:.3f} |
| window of 256 keys, the first token among them | {window_and_first:.3f} |
| window of 256 keys, the first 4 tokens among them | {window_and_sinks:.3f} |

Mean attention of the heads to `<s>` on held-out text (queries 256 to 511):

{sinks}
"""


def card(numbers: dict, model, last: dict, command: str) -> str:
    config = model.config
    rows = {
        name: " | ".join(f"{numbers[f'{name}_{n}']:.1%}" for n in LENGTHS) for name in ("needle", "recall")
    }
    masses = [
        f"- layer {i}: {', '.join(f'{m:.2f}' for m in heads)}" for i, heads in enumerate(numbers["sink_mass"])
    ]
    return CARD.format(
        **numbers | rows,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        kv=config.num_key_value_heads,
        vocab=config.vocab_size,
        size=sum(p.numel() for p in model.parameters()) / 1e6,
        tokens=last["tokens"] / 1e6,
        minutes=last["seconds"] / 60,
        command=command,
        questions=QUESTIONS,
        sinks="\n".join(masses),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="directory of the checkpoint; CARD.md is written there")
    parser.add_argument("--command", action="append", default=[], help="a command that trained it, in order")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    numbers = measure(model, tokenizer)
    last = json.loads((args.model / "curve.jsonl").read_text().splitlines()[-1])
    (args.model / "CARD.md").write_text(
        card(numbers, model, last, "\n    ".join(args.command)), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
