"""Which mechanisms are learned on a trained model, and how: judged by their pages, without a model."""

from regard.core import Method, Unsupported, near, require
from regard.kinds.mechanism import TRANSFERS

FINETUNES = ("auto", "lora", "full", None)


def check(method: Method, finetune: str | None, target: str | None) -> None:
    """Refuse what a conversion cannot learn, and ways to learn it that there are not."""
    if method.page.kind != "mechanism":
        raise Unsupported(f"{method.name} is a {method.page.kind} page; convert takes mechanisms")
    if method.page.init is None:
        raise Unsupported(f"{method.name} has nothing to learn: regard.attach(model, {method.name!r}) is all")
    known = [name for name in FINETUNES if name is not None]
    rule = f"finetune is one of {FINETUNES}; {near(str(finetune), known)}"
    require(finetune in FINETUNES, rule, finetune=finetune)
    require(
        target in (*TRANSFERS, None),
        f"target is one of {TRANSFERS}, or None: as the page says",
        target=target,
    )
    for own in ("blocks", "routes"):
        alike = target is None or (target == own) == (method.page.transfer == own)
        require(alike, f'only a page with transfer="{own}" has this target, and no other', target=target)
    normalized = target != "weights" or not method.page.needs_norm
    require(normalized, "weights are matched where they sum to one", target=target)
