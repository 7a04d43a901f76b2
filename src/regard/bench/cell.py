"""One cell of a comparison: a method at a budget on a task at a length. Data that can be pickled, and its measuring."""

import hashlib
import json
import math
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from regard import catalog
from regard.attaching.attachment import attach
from regard.attaching.converted import Converted, configured
from regard.attaching.knob import calibrate
from regard.bench.prefill import crossing_row, first_token_parts, leaves_unread, unread
from regard.core import require
from regard.core.deprecation import moved
from regard.ops.blocks import clocked
from regard.ops.budget import Budget, parse_budget
from regard.tasks import Sample, Source

FULL = "full"
# how often method and full attention take turns on one sequence
TIMED = 2


@dataclass(frozen=True)
class Cell:
    """What one worker is asked to measure. `settings` are the method's own beside the budget.

    `text` is where a worker reads it; what it reads there, the model and pages of one's own are told apart by their
    content, in `revisions`.
    """

    method: str
    task: str
    length: int
    budget: Budget | None = None
    settings: dict = field(default_factory=dict)
    seed: int = 0
    samples: int = 8
    batch_tokens: int = 8192
    text: str | None = None
    chat: bool | None = None
    revisions: dict[str, str] = field(default_factory=dict)
    what: str = "cell"  # or "crossing": from which length on, up to `length`, its first token comes sooner

    def __post_init__(self) -> None:
        if self.budget is not None:
            object.__setattr__(self, "budget", parse_budget(self.budget))

    @property
    def key(self) -> str:
        """A name that is the same in every run of the same cell."""
        facts = asdict(self)
        if facts["what"] == "cell":
            del facts["what"]
        if not facts["revisions"]:
            del facts["revisions"]
        elif self.text is not None:
            facts["text"] = None  # its content counts, not where it lies
        identity = json.dumps(facts, sort_keys=True, default=str)
        return f"{self.method}-{self.task}-{self.length}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"

    @property
    def label(self) -> str:
        settings = ", ".join(f"{k}={v}" for k, v in self.settings.items())
        return f"{self.method}({settings})" if settings else self.method

    def row(self, **facts: Any) -> dict:
        """The row of a result for this cell."""
        fields = {k: getattr(self, k) for k in ("key", "method", "label", "task", "length", "seed")}
        fields["budget"] = None if self.budget is None else self.budget.value
        return {
            "kind": self.what,
            **fields,
            "metric": catalog.task(self.task).metric,
            "status": "ok",
            "error": "",
            **facts,
        }


@dataclass
class Pass:
    """One pass of a model over a batch: logits at the answer's positions, times, bytes."""

    logits: Tensor  # [B, T, V]
    prefill: float
    steps: list[float]
    held: int
    kept: int
    read: float
    parts: dict[str, float] = field(default_factory=dict)  # seconds of the prefill by what they went to
    selection: list[dict] = field(default_factory=list)  # what was read in it, by layer


@dataclass
class Bench:
    """A loaded model with what cells share: samples and full attention's logits of the latest task and length."""

    model: Any
    tokenizer: Any
    memo: dict = field(default_factory=dict)
    targets: dict = field(default_factory=dict)  # methods that were calibrated to a target on this model

    def method_of(self, cell: Cell) -> Any:
        """What is attached for a cell: None for full attention; where its settings name a target, calibrated to it."""
        if cell.method == FULL:
            return None
        settings = dict(cell.settings)
        target = settings.pop("target", None)
        budget = {} if cell.budget is None else {"budget": cell.budget}
        method = configured(cell.method, {**budget, **settings}, self.model.device)
        if target is None:
            return method
        key = (cell.label, cell.length, cell.seed, cell.text)
        if key not in self.targets:
            source = None if cell.text is None else text_of(cell)
            self.targets[key] = calibrate(
                self.model,
                self.tokenizer,
                method,
                target,
                length=cell.length,
                samples=2,
                seed=cell.seed,
                source=source,
            )
        return self.targets[key]

    def shared(self, cell: Cell) -> tuple[list[Sample], list[Pass]]:
        """Samples of a cell and full attention's passes over them, made once for all methods."""
        key = (cell.task, cell.length, cell.seed, cell.samples, cell.text, cell.chat)
        if key not in self.memo:
            chat = bool(getattr(self.tokenizer, "chat_template", None)) if cell.chat is None else cell.chat
            source = None if cell.text is None else text_of(cell)
            samples = catalog.task(cell.task).samples(
                self.tokenizer, cell.length, cell.samples, cell.seed, source=source, chat=chat
            )
            self.memo = {key: (samples, [self.run(b, None) for b in batches(samples, cell)])}
        return self.memo[key]

    def run(self, batch: list[Sample], method: Any, weigh: bool = False) -> Pass:
        """A pass under a method; None: the model as it is, with its own attention and its own cache, windows included.

        `weigh`: measure the share of attention mass that a method captures which leaves keys of the prompt unread.

        Prefill all but the last token of the prompts, then feed it and the answers one token at a time.

        The logits that predict answer[t] come from a decode step in every case, so that a method which acts on
        decoding alone is seen in each of them. Feeding the right answer gives the same exact-match score as free
        greedy generation: an answer is generated exactly if and only if every step's best token is the right one.
        """
        device = self.model.device
        prompt = torch.tensor([s.prompt for s in batch], device=device)
        answer = torch.tensor([s.answer for s in batch], device=device)
        tokens = torch.cat([prompt[:, -1:], answer[:, :-1]], dim=1)
        logits, steps, reads = [], [], []
        with (
            torch.inference_mode(),
            nullcontext() if method is None else attach(self.model, method) as attached,
        ):
            chooses = attached if leaves_unread(method) else None
            if chooses is not None:
                chooses.selection(mass=weigh)
            start = now(device)
            with clocked() as parts:
                cache = self.model(prompt[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
            prefill = now(device) - start
            chosen = [] if chooses is None else chooses.selection()
            for t in range(tokens.shape[1]):
                start = now(device)
                out = self.model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
                steps.append(now(device) - start)
                logits.append(out.logits[:, -1].float())
                reads.append(own_bytes(cache) if attached is None else attached.bytes_read())
            held = kept = own_bytes(cache)
            if attached is not None:
                held, kept = attached.bytes_held(), attached.bytes_stored()
        return Pass(torch.stack(logits, 1), prefill, steps, held, kept, float(np.mean(reads)), parts, chosen)


def text_of(cell: Cell) -> Source:
    """The text of one's own, as it was when the run began."""
    source, wanted = Source.from_path(cell.text or ""), cell.revisions.get("text")
    require(
        wanted in (None, source.revision),
        "the text is the one the run began with; run it again",
        text=cell.text,
    )
    return source


def own_bytes(cache: Cache) -> int:
    """Bytes of the keys and values in a cache of the model's own; a sliding layer's are those of its window."""
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def batches(samples: list[Sample], cell: Cell) -> list[list[Sample]]:
    size = max(1, cell.batch_tokens // cell.length)
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def measure(cell: Cell, bench: Bench) -> dict:
    """The row of one cell: quality, fidelity to full attention, paired times, bytes."""
    if cell.what == "crossing":
        return crossing_row(cell, bench)
    start = time.perf_counter()
    with peak_memory(bench.model.device) as peak:
        samples, full = bench.shared(cell)
        method = bench.method_of(cell)
        runs = full if method is None else [bench.run(b, method, weigh=True) for b in batches(samples, cell)]
        timed = paired_times(samples[:1], method, bench)
    facts = {
        **quality(cell, samples, runs, full, bench.tokenizer),
        **fidelity(runs, full),
        **timed,
        **unread(runs),
    }
    facts |= dict(
        bytes_held=sum(r.held for r in runs), bytes_kept=sum(r.kept for r in runs),
        bytes_full=sum(r.held for r in full), bytes_read=sum(r.read for r in runs),
        bytes_read_full=sum(r.read for r in full), peak_bytes=peak[0],
    )  # fmt: skip
    if isinstance(method, Converted) and "reached" in method.report:
        facts["target"] = method.report["reached"]
    return cell.row(**facts, seconds=time.perf_counter() - start)


def paired_times(samples: list[Sample], method: Any, bench: Bench) -> dict:
    """Method and full attention in turns on the same sequence; ratios with their spread."""
    full, ours = [], []
    for _ in range(TIMED):
        full.append(bench.run(samples, None))
        ours.append(bench.run(samples, method) if method is not None else full[-1])
    steps = [np.median(r.steps) for r in ours], [np.median(r.steps) for r in full]
    prefills = [r.prefill for r in ours], [r.prefill for r in full]
    facts = {}
    for name, (mine, theirs) in (("decode", steps), ("prefill", prefills)):
        ratios = np.array(mine) / np.array(theirs)
        facts |= {
            f"{name}_ms": 1e3 * float(np.median(mine)),
            f"{name}_ratio": float(np.exp(np.log(ratios).mean())),
            f"{name}_spread": float((ratios.max() - ratios.min()) / 2),
        }
    if method is not None and leaves_unread(method):
        facts |= first_token_parts(ours)
    return facts


def quality(cell: Cell, samples: list[Sample], runs: list[Pass], full: list[Pass], tokenizer: Any) -> dict:
    """Score in [0, 1] with a bootstrap interval: share of exact answers, or perplexity of full over the method's."""
    answer = torch.tensor([s.answer for s in samples])
    best = torch.cat([r.logits for r in runs]).argmax(-1).cpu()
    nll, base = (nlls(r, answer) for r in (runs, full))
    if catalog.task(cell.task).metric == "exact":
        scores = (best == answer).all(-1).double().numpy()
        value = lambda pick: scores[pick].mean()  # noqa: E731
    else:
        scores = (base - nll).exp().numpy()
        value = lambda pick: float(np.exp((base - nll).numpy()[pick].mean()))  # noqa: E731
    draws = np.random.default_rng(0).integers(0, len(samples), (1000, len(samples)))
    spread = [value(pick) for pick in draws]
    shown = [
        dict(
            depth=s.depth if s.evidence[1] else None,
            score=float(c),
            answer=tokenizer.decode(s.answer),
            generated=generated_text(b, s, tokenizer),
        )
        for s, c, b in zip(samples, scores, best)
    ]
    return dict(
        quality=float(value(np.arange(len(samples)))), quality_low=float(np.quantile(spread, 0.025)),
        quality_high=float(np.quantile(spread, 0.975)), nll=float(nll.mean()), samples=shown,
        chance=chance_of(catalog.task(cell.task).metric, samples, base, runs[0].logits.shape[-1]),
    )  # fmt: skip


def chance_of(metric: str, samples: list[Sample], base: Tensor, vocabulary: int) -> float:
    """The score of guessing: how often a guess is right, or full attention's perplexity over the vocabulary's size."""
    if metric == "exact":
        return float(np.mean([s.chance for s in samples]))
    return min(1.0, math.exp(float(base.mean()) - math.log(vocabulary)))


def nlls(runs: list[Pass], answer: Tensor) -> Tensor:
    """[samples] mean negative log-likelihood of each answer."""
    logits = torch.cat([r.logits for r in runs]).double().cpu()
    return -logits.log_softmax(-1).gather(-1, answer[..., None]).squeeze(-1).mean(-1)


def generated_text(best: Tensor, sample: Sample, tokenizer: Any) -> str:
    """What greedy generation says up to its first departure from the answer."""
    wrong = (best != torch.tensor(sample.answer)).nonzero()
    stop = int(wrong[0]) + 1 if len(wrong) else len(best)
    return tokenizer.decode(best[:stop].tolist()) + ("…" if stop < len(best) else "")


def fidelity(runs: list[Pass], full: list[Pass]) -> dict:
    """Agreement of the next token with full attention, and KL(full || method) with its interval over samples."""
    ours, theirs = (torch.cat([r.logits for r in x]).double().log_softmax(-1) for x in (runs, full))
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean(-1).cpu().numpy()
    draws = np.random.default_rng(0).integers(0, len(kl), (1000, len(kl)))
    low, high = np.quantile(kl[draws].mean(1), (0.025, 0.975))
    agree = (ours.argmax(-1) == theirs.argmax(-1)).double().mean()
    return dict(agreement=float(agree), kl=float(kl.mean()), kl_low=float(low), kl_high=float(high))


@contextmanager
def peak_memory(device: torch.device):
    """A list that holds, afterwards, the peak bytes of the block: of the GPU, or of the process where Linux tells."""
    peak = [0]
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif clear.exists():
        clear.write_text("5")
    yield peak
    if device.type == "cuda":
        peak[0] = torch.cuda.max_memory_allocated(device)
    elif status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        peak[0] = int(line.split()[1]) * 1024


__getattr__ = moved(__name__, {"Run": "regard.bench.cell:Pass"})
