"""Attention-output SAEs on any model that attaches: train one, say what makes its features, put them into the model.

    sae = fit_sae(model, 5, ids.split(8))                            of layer 5, on ids [rows, N]
    parts = attribute(model, sae, prompt, [17], rows=[-1])           which heads and tokens make feature 17 there
    with regard.attach(model, Splice(sae, {17: 0.0})):               the model without feature 17
        model.generate(...)

The mathematics is the page methods/tracing/attention_output_sae.py.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from regard.attaching.actors import Actor, AttentionCall
from regard.attaching.attachment import attach
from regard.core import Edit, NeverFired, Observer, Site, require
from regard.core.errors import present
from regard.explaining.sae_training import train
from regard.methods.tracing.attention_output_sae import Config, Dictionary, decode, encode, measure
from regard.ops import View
from regard.train.loop import Schedule, linear_to

FORMAT = "regard-sae-1"
Batch = Tensor | Mapping[str, Tensor]  # ids [B, N], or what the model is called with


@dataclass(frozen=True)
class SAE:
    """A dictionary of the head outputs of one layer, and what its training came to."""

    dictionary: Dictionary
    layer: int
    heads: int
    report: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        (count, width), parts = self.dictionary.w_enc.shape, tuple(self.dictionary)
        wanted = [(count, width), (count,), (count, width), (width,)]
        require(
            [p.shape for p in parts] == wanted,
            "w_enc [F, D], b_enc [F], w_dec [F, D], b_dec [D]",
            parts=parts,
        )
        require(width % self.heads == 0, "D is a multiple of the heads", width=width, heads=self.heads)

    def encode(self, z: Tensor) -> Tensor:
        """[B, N, F] features of head outputs z [B, H, N, E]."""
        return encode(self.dictionary, z.transpose(1, 2).flatten(2).to(self.dictionary.b_dec.dtype))

    def decode(self, features: Tensor) -> Tensor:
        """[B, H, N, E] of features [B, N, F]."""
        return self.split(decode(self.dictionary, features))

    def split(self, flat: Tensor) -> Tensor:
        """[B, H, N, E] of [B, N, H·E]."""
        return flat.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def save(self, path: str | Path) -> None:
        """One safetensors file, which `load_sae` reads."""
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.dictionary._asdict().items()}
        facts = {"layer": self.layer, "heads": self.heads, "report": dict(self.report)}
        save_file(tensors, str(path), metadata={"format": FORMAT, "facts": json.dumps(facts)})


def load_sae(path: str | Path, device: str = "cpu") -> SAE:
    """What `SAE.save` wrote."""
    with safe_open(str(path), "pt", device=device) as file:
        facts = file.metadata() or {}
        require(
            facts.get("format") == FORMAT,
            f"a file of the format {FORMAT}",
            path=str(path),
            has=facts.get("format"),
        )
        dictionary = Dictionary(*(file.get_tensor(name) for name in Dictionary._fields))
    return SAE(dictionary, **json.loads(facts["facts"]))


# reading a layer


def site(layer: int) -> Site:
    return Site("z", layers=layer, tower="text")


def inputs_of(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """What the model is called with."""
    named = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    return {name: x.to(model.device) for name, x in named.items()} | {"use_cache": False}


def real_tokens(inputs: Mapping[str, Tensor]) -> Tensor:
    """[B, N] bool: no padding."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


@torch.no_grad()
def head_outputs(model: PreTrainedModel, layer: int, batches: Iterable[Batch]) -> Tensor:
    """[tokens, H, E] in float32: what the heads of a layer give at every token that is not padding."""
    rows, looking = [], Observer("z", site(layer), name="z")
    for batch in batches:
        inputs = inputs_of(model, batch)
        with attach(model, looking) as attached:
            model.base_model(**inputs)
        require(attached.records["z"], "the text model has attention in this layer", layer=layer)
        [(_, _, z)] = attached.records["z"]
        rows.append(z.transpose(1, 2)[real_tokens(inputs)].float())
    require(rows, "one batch or more", batches=len(rows))
    return torch.cat(rows)


class Sources(Actor):
    """Writes down what a layer does at these rows: outputs [B, H, R, E], weights [B, H, R, M], values [B, G, M, E]."""

    name = "sources"
    touches_rows = True

    def __init__(self, layer: int, rows: Sequence[int] | None = None) -> None:
        self.layer, self.rows = layer, rows
        self.found: tuple[Tensor, Tensor, Tensor] | None = None

    def acts_on(self, call: AttentionCall) -> bool:
        return call.site.layer == self.layer and call.site.tower == "text"

    def observe(self, call: AttentionCall, view: View, out: Tensor) -> None:
        rows = range(view.new) if self.rows is None else [range(view.new)[row] for row in self.rows]
        weights = torch.cat([call.weights(view, slice(row, row + 1)) for row in rows], 2)
        self.found = out[:, :, list(rows)].float(), weights.float(), view.v.float()


@torch.no_grad()
def attribute(
    model: PreTrainedModel, sae: SAE, batch: Batch, features: Sequence[int], rows: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Which heads and source tokens make these features at these tokens (negative from the end; None: all).

    The page's `measure`: by_head [B, rows, features, H], by_source [B, rows, features, H, M], b_dec and b_enc
    [features], which together sum to the pre-activations. M are the tokens of the batch, padding included, with zeros.
    """
    sources = Sources(sae.layer, rows)
    with attach(model, sources):
        model.base_model(**inputs_of(model, batch))
    z, weights, values = present(sources.found, "the text model has attention in this layer", layer=sae.layer)
    return measure(Dictionary(*(x.float() for x in sae.dictionary)), z, weights, values, features)


class Splice(Actor):
    """Puts an SAE into its layer: z + W_dec (f' - f), where f' is what is made of the features f.

    change  {feature: value}, or a function of features [B, N, F] that gives new ones; None: f' = f
    error   True: what the SAE misses of z stays, so that without a change the model is the same to the last bit.
            False: the reconstruction takes the place of z
    """

    name = "sae"
    touches_rows = True

    def __init__(
        self,
        sae: SAE,
        change: Mapping[int, float] | Callable[[Tensor], Tensor] | None = None,
        error: bool = True,
    ) -> None:
        self.sae, self.error, self.acted = sae, error, 0
        self.change = as_function(change, len(sae.dictionary.b_enc))

    def acts_on(self, call: AttentionCall) -> bool:
        return call.site.layer == self.sae.layer and call.site.tower == "text"

    def check_fired(self, forwards: int) -> None:
        if self.acted == 0:
            raise NeverFired(f"the SAE of layer {self.sae.layer} never acted in {forwards} forwards")

    def edit(self, call: AttentionCall, view: View, out: Tensor) -> Tensor:
        self.acted += 1
        features = self.sae.encode(out)
        changed = self.change(features)
        require(changed.shape == features.shape, "as many features as before", got=changed, before=features)
        if not self.error:
            return self.sae.decode(changed).to(out.dtype)
        return out + self.sae.split((changed - features) @ self.sae.dictionary.w_dec).to(out.dtype)


def as_function(change: Any, count: int) -> Callable[[Tensor], Tensor]:
    """The function of features that a change is."""
    if change is None:
        return lambda features: features
    if callable(change):
        return change
    at = list(change)
    require(all(0 <= k < count for k in at), f"features from 0 to {count - 1}", features=at)

    def put(features: Tensor) -> Tensor:
        features = features.clone()
        features[..., at] = features.new_tensor([float(x) for x in change.values()])
        return features

    return put


@torch.no_grad()
def recovered(model: PreTrainedModel, sae: SAE, batches: Iterable[Batch]) -> dict[str, float]:
    """Cross-entropy in nats a token: the model's own, with the reconstruction in place of z ("sae"), and with zeros.

    "recovered" is (zero - sae) / (zero - model): the share of what zeros lose that the reconstruction keeps.
    """
    sums, count = {"model": 0.0, "sae": 0.0, "zero": 0.0}, 0
    for batch in batches:
        inputs = inputs_of(model, batch)
        real = real_tokens(inputs)
        wanted = inputs["input_ids"][:, 1:].masked_fill(~(real[:, 1:] & real[:, :-1]), -100)
        with attach(model, Observer("z", site(sae.layer), name="z")) as attached:
            sums["model"] += summed_loss(model, inputs, wanted)
        [(_, _, z)] = attached.records["z"]
        for name, value in (("sae", sae.decode(sae.encode(z))), ("zero", 0.0)):
            with attach(model, Edit(site(sae.layer), "replace", value)):
                sums[name] += summed_loss(model, inputs, wanted)
        count += int((wanted >= 0).sum())
    require(count, "one prediction or more", predictions=count)
    result = {name: total / count for name, total in sums.items()}
    return result | {"recovered": (result["zero"] - result["sae"]) / (result["zero"] - result["model"])}


def summed_loss(model: PreTrainedModel, inputs: dict[str, Any], wanted: Tensor) -> float:
    logits = model(**inputs).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum").item()


# training


def fit_sae(
    model: PreTrainedModel,
    layer: int,
    batches: Iterable[Batch],
    config: Config | None = None,
    *,
    steps: int = 1000,
    resamples: int = 4,
    schedule: Schedule | None = None,
    seed: int = 0,
) -> SAE:
    """Train an SAE on the head outputs of a layer, at every token of these batches, which are held in memory.

    config     of the page: l1, expansion, rate, betas, tokens a step
    resamples  how often, in the first half of the steps, features that did not fire since the last time begin anew
    schedule   of the rate; None: constant, and down to zero in a straight line

    z is trained on at a mean squared length of D, so that l1 and the rate mean the same for every layer; the factor is
    then folded into the dictionary. `report` says what the training came to.
    """
    z = head_outputs(model, layer, batches)
    heads, config = z.shape[1], config or Config()
    dictionary, report = train(z.flatten(1), config, steps, resamples, schedule or linear_to(0.0), seed)
    return SAE(dictionary, layer, heads, report)
