"""regard: a catalogue and workbench of attention for transformer models.

    out, state, aux = regard.attend(q, k, v, "softmax", pattern="causal_self")
    with regard.attach(model, "streaming_llm", sinks=4, window=512):
        model.generate(**inputs)

Names are imported when they are first used; `import regard` changes nothing in torch or transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

WHERE = {
    "attend": "regard.api",
    "attach": "regard.attaching.attachment",
    "calibrate": "regard.attaching.knob",
    "compare": "regard.bench.compare",
    "doctor": "regard.models.doctor",
    "evaluate": "regard.bench.evaluate",
    "explain": "regard.explaining.explanation",
    "find": "regard.catalog",
    "list_methods": "regard.catalog",
    "register": "regard.catalog",
    "trace": "regard.explaining.tracing",
    "load_cache": "regard.attaching.store",
    "load_converted": "regard.attaching.converted",
    "load_shipped": "regard.models.shipped",
    "method": "regard.catalog",
    "pages": "regard.catalog",
    "read_converted": "regard.attaching.converted",
    "save_cache": "regard.attaching.store",
    "Edit": "regard.core",
    "Mask": "regard.core.mask",
    "Observer": "regard.core",
    "Site": "regard.core",
}
# imported when first asked for, as `torch.nn` is there after `import torch`
ROOMS = ("bench", "catalog", "core", "explaining", "kinds", "nn", "ops", "testing", "train")

if TYPE_CHECKING:
    from regard.api import attend
    from regard.attaching.attachment import attach
    from regard.attaching.converted import load_converted, read_converted
    from regard.attaching.knob import calibrate
    from regard.attaching.store import load_cache, save_cache
    from regard.bench.compare import compare
    from regard.bench.evaluate import evaluate
    from regard.catalog import find, list_methods, method, pages, register
    from regard.core import Edit, Observer, Site
    from regard.core.mask import Mask
    from regard.explaining.explanation import explain
    from regard.explaining.tracing import trace
    from regard.models.doctor import doctor
    from regard.models.shipped import load_shipped

__all__ = [
    "Edit",
    "Mask",
    "Observer",
    "Site",
    "attach",
    "attend",
    "calibrate",
    "compare",
    "doctor",
    "evaluate",
    "explain",
    "find",
    "list_methods",
    "load_cache",
    "load_converted",
    "load_shipped",
    "method",
    "pages",
    "read_converted",
    "register",
    "save_cache",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name in ROOMS:
        return import_module(f"regard.{name}")
    if name not in WHERE:
        raise AttributeError(
            f"module 'regard' has no attribute {name!r}; it has {', '.join(sorted([*WHERE, *ROOMS]))}"
        )
    return getattr(import_module(WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*WHERE, *ROOMS, "__version__"])
