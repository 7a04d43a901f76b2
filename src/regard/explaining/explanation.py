"""`regard.explain(model, tokenizer, prompt, target=..., foil=...)`: what in this model caused this output.

Which heads, MLPs and source tokens carried the answer: screened by gradients, the largest verified exactly, with
intervals over variations of the prompt, beside controls, on any model that an attachment reaches.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard.explaining.asking import answered, corrupted_enough
from regard.explaining.attribution import attribute
from regard.explaining.circuit import faithfulness, nodes_of, random_directions, random_heads, together
from regard.explaining.edges import as_graph, edges, edges_fit
from regard.explaining.effects import Effects, finite
from regard.explaining.kept import Kept, content_of
from regard.explaining.pairs import Pairs
from regard.explaining.patching import patch
from regard.explaining.questions import Asked, Question, ids_of
from regard.explaining.runs import forward
from regard.explaining.settings import Effort, Settings
from regard.explaining.sources import carried, last_rows, parts_of
from regard.explaining.why import why
from regard.models.revision import of_loaded
from regard.ops.machine import trim_memory
from regard.ops.ranks import rank_correlation
from regard.report.explanation import explanation_page, explanation_snippet, explanation_text

Watch = Callable[[str, int, int], Any]  # stage, done, of how many


@dataclass(frozen=True)
class Explanation:
    """What was found, as data; pages and texts are drawn from it."""

    found: Mapping[str, Any]

    def to_html(self) -> str:
        """One self-contained page."""
        return explanation_page(dict(self.found))

    def text(self, width: int = 80) -> str:
        return explanation_text(dict(self.found), width)

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        path.write_text(self.to_html(), encoding="utf8")
        return path

    def _repr_html_(self) -> str:
        """A notebook's display: no script, nothing fetched."""
        return explanation_snippet(dict(self.found))


@dataclass
class Work:
    """One explanation being made: every stage is kept as it ends."""

    model: PreTrainedModel
    question: Asked
    settings: Effort
    kept: Kept
    watch: Watch | None
    folder: Path | None
    tested: list[str] = field(default_factory=list)

    def stage(self, name: str, measure: Callable[[], Any]) -> Any:
        """What a stage found, now or in an earlier start, and what is said of it."""
        if name not in self.kept.rows:
            before = len(self.tested)
            found = measure()
            self.kept.add(name, {"found": found, "tested": self.tested[before:]})
            del self.tested[before:]
        trim_memory()
        row = self.kept.rows[name]
        self.tested += row["tested"]
        return row["found"]

    def progress(self, name: str) -> Callable[[int, int], Any] | None:
        return None if self.watch is None else lambda done, total: self.watch(name, done, total)  # type: ignore[misc]

    @property
    def pairs(self) -> Pairs:
        return self.question.pairs


def explain(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str | Sequence[int] | Sequence[Question],
    *,
    target: str | None = None,
    foil: str | None = None,
    corrupt: str | None = None,
    images: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
    variations: int | None = None,
    chat: bool = False,
    settings: Settings | None = None,
    folder: str | Path | None = None,
    progress: Watch | None = None,
    name: str = "",
) -> Explanation:
    """What in this model caused this output.

    prompt      a text, its tokens, or several questions; the first one's tokens are shown
    target      the answer that is explained, one token; None: the token that the model finds likeliest
    foil        another answer; the metric is then the difference of both logits, else the target's log probability
    corrupt     a prompt of equally many tokens that should not be answered so; None: made from the prompt
    images      what a processor made of the images of the clean and the corrupted prompt (pixel_values, ...); the
                prompt then has its image tokens
    variations  how many variations of each prompt the intervals come from; None: 8, of more than 1,024 tokens 4
    settings    how much is measured; what is left open goes by the length of the prompt
    folder      stages and cells are kept here as they end; the same call goes on

    >>> from regard import load_shipped
    >>> model, tokenizer = load_shipped("lm")
    >>> few = Settings(verify=2, draws=2, removals=4, edges=2)
    >>> prompt = "<s>The code of warning is 16122. Question: the code of warning is "
    >>> found = explain(model, tokenizer, prompt, target="1", foil="7", variations=2, settings=few).found
    >>> len(found["effects"]["mean"]), len(found["effects"]["mean"][0])
    (4, 6)

    Raises ValueError for answers of several tokens, prompts of unequal length, a metric that does not tell both prompts
    apart; Unreachable for a model whose residual is not reached.
    """
    start = perf_counter()
    several = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Question)
    questions = list(prompt) if several else [Question(prompt, target, foil, corrupt)]  # type: ignore[arg-type]
    questions = [answered(model, tokenizer, q, chat, images) for q in questions]
    by_image = images is not None and images[0] is not images[1]
    longest = max(len(ids_of(tokenizer, q.prompt, chat)) for q in questions)
    effort = (settings or Settings()).for_length(longest, variations)
    how = dict(variations=effort.variations, chat=chat, by_image=by_image)
    question, note = corrupted_enough(model, tokenizer, questions, images, how)
    kept = Kept.open(folder, lambda: header_of(model, question, effort))
    work = Work(model, question, effort, kept, progress, None if folder is None else Path(folder), note)
    found = {**facts(work, name), **everything(work)}
    return Explanation({**found, "tested": work.tested, "seconds": round(perf_counter() - start, 1)})


def header_of(model: PreTrainedModel, question: Asked, effort: Effort) -> dict[str, Any]:
    pairs = content_of(question.pairs)
    return {"settings": {"model": of_loaded(model, None), "pairs": pairs, **asdict(effort)}}


def facts(work: Work, name: str) -> dict[str, Any]:
    q, model = work.question, work.model
    clean, corrupt = (mean_score(model, q.pairs, side) for side in ("clean", "corrupt"))
    if clean <= 0 and q.foil is not None:
        work.tested.append(f"the model itself prefers {q.foil!r} to {q.target!r} here, by {-clean:.2f}")
    return {
        "model": name or type(model).__name__, "revision": of_loaded(model, None), "pairs": len(q.pairs),
        "tokens": q.tokens, "target": q.target, "foil": q.foil,
        "metric": "logit difference" if q.foil is not None else "log probability",
        "clean": clean, "corrupt": corrupt, "corruption": q.corruption, "direction": "denoise",
    }  # fmt: skip


@torch.no_grad()
def mean_score(model: PreTrainedModel, pairs: Pairs, side: str) -> float:
    pairs = pairs.to(model.device)
    return float(pairs.score(forward(model, getattr(pairs, side))[0]).mean())


def everything(work: Work) -> dict[str, Any]:
    """All stages, one after the other."""
    estimated = attribute(work.model, work.pairs, progress=work.progress("gradients"))
    trim_memory()
    heads, mlps = verified(work, estimated)
    top = [tuple(map(int, site)) for site in heads.top(work.settings.top)]
    return {
        "effects": shown_effects(heads, mlps, estimated["z"]),
        "heads": work.stage("heads", lambda: shown_heads(work, heads, top)),
        "controls": work.stage("controls", lambda: controls(work, top)),
        "sources": work.stage("sources", lambda: sources(work, top)),
        "graph": work.stage("graph", lambda: graph(work)),
        "faithfulness": work.stage("faithfulness", lambda: curve(work, estimated)),
    }


def verified(work: Work, estimated: dict[str, Effects]) -> tuple[Effects, Effects]:
    """Effects of heads and MLPs, the largest measured exactly."""
    result = []
    for q, count in (("z", work.settings.verify), ("mlp", max(1, work.settings.verify // 4))):
        folder = None if work.folder is None else work.folder / f"patching-{q}"
        exact = patch(work.model, work.pairs, q, sites=estimated[q].top(count), folder=folder,
                      progress=work.progress(f"patching {q}"))  # fmt: skip
        result.append(estimated[q].with_exact(exact))
    n, of = int(result[0].exact.sum()), result[0].exact.numel()
    work.tested.append(f"{n} of {of} heads exactly, by patching one at a time; the others by their gradients")
    return result[0], result[1]


def shown_effects(heads: Effects, mlps: Effects, estimated: Effects) -> dict[str, Any]:
    low, high = heads.interval()
    low_m, high_m = mlps.interval()
    exact = heads.exact
    agree = (
        finite(rank_correlation(estimated.mean[exact], heads.mean[exact])) if int(exact.sum()) > 2 else None
    )
    return {
        "layers": list(heads.coords["layer"]), "heads": len(heads.coords["head"]),
        "mean": finite(heads.mean), "low": finite(low), "high": finite(high), "exact": exact.tolist(),
        "mlp": {"mean": finite(mlps.mean), "low": finite(low_m), "high": finite(high_m), "exact": mlps.exact.tolist()}
        if mlps.coords["layer"] == heads.coords["layer"] else None,
        "normalised": True, "spearman": agree,
    }  # fmt: skip


def shown_heads(work: Work, effects: Effects, top: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
    """The heads that mattered, with the row of the last token, and why they attend where that is asked."""
    first = work.pairs.at([0]).clean.to(work.model.device)
    rows, (low, high) = last_rows(work.model, first), effects.interval()
    shown = []
    for layer, head in top:
        at = effects.index((layer, head))
        reasons = None
        if work.settings.why:
            reasons = why(work.model, first, layer, head, key=key_of(rows[layer][head])).top(6)
        row = {"query": len(work.question.tokens) - 1, "weights": rows[layer][head].tolist()}
        numbers = {"mean": finite(effects.mean[at]), "low": finite(low[at]), "high": finite(high[at])}
        shown.append({"layer": layer, "head": head, **numbers, "attention": row, "why": reasons})
    return shown


def key_of(row: Tensor) -> int:
    """The token that is attended to most, the first one, where a sink may be, left out."""
    return int(row[1:].argmax()) + 1 if len(row) > 1 else 0


def controls(work: Work, top: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
    """The top heads together, random heads of the same layers, random directions of the same norm."""
    target = [(n, h) for n, h in top]
    draws = random_heads(work.model, target, work.settings.draws, work.settings.seed)
    both = together(work.model, work.pairs, [target, *draws], progress=work.progress("controls"))
    directions = max(2, work.settings.draws // 3)
    noise = random_directions(work.model, work.pairs, target, directions, work.settings.seed,
                              work.progress("random directions"))  # fmt: skip
    names = (f"top {len(top)} heads together", f"as many random heads of the same layers, {len(draws)} draws",
             f"random changes of the same size at the top heads, {noise.values.shape[1]} draws")  # fmt: skip
    rest = Effects(
        both.values[:, 1:].mean(1, keepdim=True), ("set",), {"set": [1]}, both.span, both.exact[:1]
    )
    random = Effects(noise.values.mean(1, keepdim=True), ("set",), {"set": [1]}, noise.span, noise.exact[:1])
    work.tested.append(f"{names[0]} against {names[1]}, none of them among the top, and {names[2]}")
    only = Effects(both.values[:, :1], ("set",), {"set": [0]}, both.span, both.exact[:1])
    return [bar(n, e, i > 0) for i, (n, e) in enumerate(zip(names, (only, rest, random), strict=True))]


def bar(name: str, effects: Effects, control: bool) -> dict[str, Any]:
    low, high = effects.interval()
    return {
        "name": name,
        "mean": finite(effects.mean[0]),
        "low": finite(low[0]),
        "high": finite(high[0]),
        "control": control,
    }


def sources(work: Work, top: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
    spans = parts_of(work.question.tokens, work.settings.parts, keep=1)
    s = work.settings
    same = work.pairs.at(range(len(work.pairs) // work.question.questions))  # variations of the first prompt
    found = carried(work.model, same, spans, [(n, h) for n, h in top], samples=s.removals,
                    held=max(4, s.removals // 2), seed=s.seed, ks=s.removed,
                    progress=work.progress("removals"))  # fmt: skip
    work.tested.append(
        f"{len(found)} ways to say which of {len(spans)} parts of the prompt mattered, each by removal"
    )
    if not any(c.method == "surrogate" for c in found):
        work.tested.append("no sparse surrogate of removals: scikit-learn is not installed (regard[explain])")
    return [c.to_dict() for c in found]


def graph(work: Work) -> dict[str, Any] | None:
    """The largest edges, and the nodes that they join."""
    if not work.settings.edges or not edges_fit(work.model, work.pairs):
        work.tested.append("no graph of edges: the prompt is too long for it, or none was asked for")
        return None
    found = edges(work.model, work.pairs, progress=work.progress("edges"))
    drawn = as_graph(work.model, found, work.settings.edges)
    work.tested.append(f"{drawn['of']} edges by their gradients, of which the largest are drawn")
    return drawn


def curve(work: Work, estimated: dict[str, Effects]) -> dict[str, Any] | None:
    found = faithfulness(work.model, work.pairs, nodes_of(estimated), progress=work.progress("faithfulness"))
    work.tested.append(f"how much of the answer the best heads and MLPs keep alone, {found.nodes} in all")
    return found.to_dict()
