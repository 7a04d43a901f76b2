"""Which tokens and steering methods reach which family of vision-language models: tried, on tiny ones of each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from regard import catalog
from regard.core import Method, Unreachable, Unsupported
from regard.testing.pictures import FAMILIES, batch
from regard.testing.steering import ROLES, Words
from regard.testing.tokens import answers

TITLES = {
    "llava": "LLaVA (CLIP)", "qwen25vl": "Qwen2.5-VL", "qwen3vl": "Qwen3-VL", "gemma3mm": "Gemma 3",
    "smolvlm": "SmolVLM, Idefics3", "internvl": "InternVL",
}  # fmt: skip
KINDS = ("tokens", "steering")
REACHED = "reached"


@dataclass(frozen=True)
class Reach:
    """Of one method: family -> "reached", or why it is refused."""

    method: str
    kind: str
    by_family: dict[str, str]


def methods() -> list[str]:
    """The pages of both kinds that act on models."""
    found = [name for kind in KINDS for name in catalog.list_methods(kind=kind)]
    return [name for name in found if getattr(catalog.get(name), "acts_on_models", True)]


def survey(names: list[str]) -> Iterator[Reach]:
    """Each method under its test settings on a padded batch of two prompts with an image."""
    logging.disable_progress_bar()
    for name in names:
        page = catalog.get(name)
        settings = dict(page.test_settings[0]) if page.test_settings else {}
        method = Method(name, page, page.config(**settings))
        yield Reach(name, page.kind, {family: tried(method, *batch(family)) for family in FAMILIES})


def tried(method: Method, model: Any, inputs: dict) -> str:
    """ "reached", or the reason of a refusal by name; anything else that goes wrong is raised."""
    try:
        if method.page.kind == "tokens":
            answers(method, model, inputs, "remove", 2)
        else:
            generate(method, model, inputs)
    except (Unsupported, Unreachable) as refusal:
        return str(refusal)
    return REACHED


def generate(method: Method, model: Any, inputs: dict) -> None:
    from regard.attaching.attachment import attach

    with torch.no_grad(), attach(model, method, roles=ROLES, tokenizer=Words()):
        model.generate(**inputs, max_new_tokens=2, pad_token_id=0, eos_token_id=2)


def markdown(found: list[Reach], version: str, day: str) -> str:
    """docs/vision.md: a table, and the reasons of the refusals below it."""
    reasons: dict[str, int] = {}
    lines = [
        "# Tokens and steering methods on vision-language models", "",
        f"Tried on tiny models with random weights, transformers {version}, {day}: `regard doctor --pictures "
        "--markdown`. A method is attached to a padded batch of two prompts with an image and generates; its laws are "
        "in `regard.testing.tokens` and `regard.testing.steering`.", "",
        f"| method | kind | {' | '.join(TITLES[f] for f in FAMILIES)} |", f"|---|---|{'---|' * len(FAMILIES)}",
    ]  # fmt: skip
    for reach in found:
        cells = []
        for family in FAMILIES:
            said = reach.by_family[family]
            number = 0 if said == REACHED else reasons.setdefault(said, len(reasons) + 1)
            cells.append("yes" if number == 0 else f"no ({number})")
        lines.append(f"| {reach.method} | {reach.kind} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{n}. {reason}" for reason, n in reasons.items()), ""])
