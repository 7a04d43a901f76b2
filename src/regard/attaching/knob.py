"""A target instead of a setting: how sparse, or how much of the attention, and the setting of each layer that gives it.

    converted = regard.calibrate(model, tokenizer, "block_topk", target="mass:0.95")
    converted.save("runs/topk95")
    with regard.attach(model, converted): ...

A page that chooses blocks names its knob, one of its settings, and values of it from those that read few keys to those
that read all. On prompts of a text every layer tries them on its own queries and keys, under full attention before it,
and keeps the first that meets the target.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regard import catalog
from regard.attaching.actors import AttentionCall
from regard.attaching.attachment import attach
from regard.attaching.converted import Converted
from regard.attaching.function import native
from regard.attaching.sparse import SparsePrefill, is_sparse, token_mask
from regard.attaching.unrotated import unrotated
from regard.core import Method, Unsupported, require
from regard.kinds.mechanism import run
from regard.ops import View
from regard.ops.blocks import Blocks, captured_mass, read_by_head
from regard.tasks import Source

KINDS = ("mass", "sparsity")


@dataclass(frozen=True)
class Target:
    """What is asked of every layer: at least this share of the attention mass, or at least this share of keys unread.

    >>> Target.parse("mass:0.95")
    Target(kind='mass', value=0.95)
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "a target is mass:SHARE or sparsity:SHARE", kind=self.kind)
        fits = 0 < self.value <= 1 if self.kind == "mass" else 0 <= self.value < 1
        rule = "0 < mass <= 1" if self.kind == "mass" else "0 <= sparsity < 1"
        require(fits, rule, **{self.kind: self.value})

    @classmethod
    def parse(cls, text: "str | Target") -> "Target":
        if isinstance(text, Target):
            return text
        kind, _, value = str(text).partition(":")
        try:
            number = float(value)
        except ValueError:
            require(False, "a target is mass:SHARE or sparsity:SHARE", target=text)
        return cls(kind.strip(), number)

    def met(self, kept: float, mass: float) -> bool:
        return mass >= self.value if self.kind == "mass" else 1 - kept >= self.value


@dataclass
class Trial:
    """What one layer reached with one value of the knob: means over prompts, by head."""

    kept: list[Tensor] = field(default_factory=list)
    mass: list[Tensor] = field(default_factory=list)

    def row(self, layer: int, value: Any) -> dict[str, Any]:
        kept, mass = (torch.stack(x).mean(0) for x in (self.kept, self.mass))
        return {"layer": layer, "value": value, "kept": kept.tolist(), "mass": mass.tolist()}


class Turning(SparsePrefill):
    """Every value of the knob tried on a prompt; the model goes on with its own attention."""

    def __init__(self, converted: Converted) -> None:
        super().__init__(converted)
        self.trials: dict[int, dict[Any, Trial]] = {}

    def attend(self, call: AttentionCall, view: View) -> Tensor | None:
        self.acted += 1
        name, values = self.method.page.knob
        q, mask = call.scaled(), token_mask(self.name, call, view)
        raw = unrotated(self.name, call, view.k, view.index) if self.needs_rotary else None
        trials = self.trials.setdefault(call.site.layer, {value: Trial() for value in values})
        for value, trial in trials.items():
            method = self.method.with_settings(**{name: value})
            _, _, aux = run(method, q, view.k, view.v, mask=mask, params=self.params_of(call), unrotated=raw)
            lists = (aux["blocks"],) if isinstance(aux["blocks"], Blocks) else aux["blocks"]
            trial.kept.append(read_by_head(lists, len(q), q.shape[1], q.shape[2], view.k.shape[2], mask))
            trial.mass.append(captured_mass(q, view.k, aux["lse"], mask).mean(0))
        return native(call)[0].transpose(1, 2)


@torch.no_grad()
def calibrate(
    model: PreTrainedModel, tokenizer: Any, method: str | Method | Converted, target: str | Target, *,
    length: int = 2048, samples: int = 4, seed: int = 0, source: Source | None = None,
) -> Converted:  # fmt: skip
    """The method with a setting for each layer that meets the target, on `samples` prompts of `length` tokens.

    method    a name, a method, or a conversion of this model that learned a page's parts
    target    "mass:0.95", at least so much of full attention's weight, the mean over heads and prompts; or
              "sparsity:0.9", at least so much of the keys unread
    source    the text of the prompts; None: the held-out text that comes with regard

    The report of what is returned says what was reached, by layer and head. Raises ValueError for a target out of range
    or one that no value of the knob meets, Unsupported for a page without a knob.
    """
    target = Target.parse(target)
    method = catalog.method(method) if isinstance(method, str) else method
    converted = method if isinstance(method, Converted) else Converted(method)
    method = converted.method
    if not is_sparse(method) or method.page.knob is None:
        raise Unsupported(
            f"{method.name} has no knob to calibrate: it is no page that chooses blocks by a setting"
        )
    task = catalog.task("perplexity")
    turning = Turning(converted)
    with attach(model, turning):
        for sample in task.samples(tokenizer, length, samples, seed, source=source, chat=False):
            model(torch.tensor([sample.prompt], device=model.device), use_cache=False)
    reached = [chosen(layer, trials, target, method) for layer, trials in sorted(turning.trials.items())]
    by_layer = {row["layer"]: {method.page.knob[0]: row["value"]} for row in reached}
    report = {"target": f"{target.kind}:{target.value:g}", "length": length, "samples": samples, "seed": seed,
              "model": getattr(model, "name_or_path", ""), "reached": reached}  # fmt: skip
    return replace(converted, report={**converted.report, **report}, by_layer=by_layer)


def chosen(layer: int, trials: Mapping[Any, Trial], target: Target, method: Method) -> dict[str, Any]:
    """The value that meets the target: of a share of mass the sparsest one, of a sparsity the densest."""
    rows = [trial.row(layer, value) for value, trial in trials.items()]
    met = [row for row in rows if target.met(fmean(row["kept"]), fmean(row["mass"]))]
    best = max(rows, key=lambda row: fmean(row["mass"]) if target.kind == "mass" else 1 - fmean(row["kept"]))
    nearest = fmean(best["mass"]) if target.kind == "mass" else 1 - fmean(best["kept"])
    rule = f"a value of {method.name}'s {method.page.knob[0]} meets the target at every layer"
    require(met, rule, target=f"{target.kind}:{target.value:g}", layer=layer, nearest=round(nearest, 4))
    return met[0] if target.kind == "mass" else met[-1]
