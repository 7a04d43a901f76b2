"""What a training run is: its settings, as data, so that a run can go on later. They are judged without a model."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard import catalog
from regard.core import require, unknown
from regard.core.deprecation import moved, warn
from regard.tasks.corpus import Source
from regard.tasks.zoology_mqar import mqar
from regard.train.suits import HELD_OUT, IMAGES, SUITS, TEXTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OF_TEXTS = ("conv", "rope_theta", "length", "pairs", "vocab", "text")  # settings that mean nothing for images
POSITIVE = ("steps", "batch", "layers", "width", "heads", "length", "pairs", "vocab", "every", "tested")
KINDS = ("mechanism", "block")

__getattr__ = moved(__name__, {"TASKS": "regard.train.tasks:TASKS"})


@dataclass(frozen=True)
class Plan:
    """The settings of a run. `mechanisms` is one name for all layers, or one for each; of images, for each stage.

    `Plan.of(task, ...)` has the settings that suit the task where none are given. `text` is a file, or a folder of
    .txt and .md files, for the task "text"; None: Python's documentation.

    Batches are drawn from the seed and the number of the step, so a run that was stopped goes on as if it had not.
    `rates` are tried one after the other, each from the same start; the best on held-out data is kept.
    """

    task: str = "mqar"
    mechanisms: tuple[str, ...] = ("softmax",)
    settings: dict[str, dict] = field(default_factory=dict)
    rates: tuple[float, ...] = TEXTS["rates"]
    steps: int = TEXTS["steps"]
    batch: int = TEXTS["batch"]
    layers: int = TEXTS["layers"]
    width: int = TEXTS["width"]
    heads: int = TEXTS["heads"]
    mlp: int = TEXTS["mlp"]
    conv: int = 3
    rope_theta: float | None = None
    length: int = 128
    pairs: int = 16
    vocab: int = 64
    seed: int = 0
    every: int = 50
    tested: int = 512
    text: str | None = None
    source: Source | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        if self.task not in SUITS:
            raise unknown("training task", self.task, SUITS)
        check_names(self.mechanisms, self.settings)
        every = (1, self.layers) if not self.of_images else range(1, self.layers + 1)
        for name in POSITIVE:
            require(getattr(self, name) >= 1, f"{name} >= 1", **{name: getattr(self, name)})
        for name in ("mlp", "conv"):
            require(getattr(self, name) >= 0, f"{name} >= 0", **{name: getattr(self, name)})
        require(len(self.mechanisms) in every, "one mechanism, or one for every layer, of images for every stage",
                mechanisms=self.mechanisms, layers=self.layers)  # fmt: skip
        stages = len(self.mechanisms) if self.of_images else 1
        require(self.layers % stages == 0, "every stage has as many layers: a multiple of the mechanisms",
                layers=self.layers, mechanisms=self.mechanisms)  # fmt: skip
        require(self.width % self.heads == 0, "heads divide the width", width=self.width, heads=self.heads)
        require(
            len(self.rates) >= 1 and all(r > 0 for r in self.rates), "learning rates > 0", rates=self.rates
        )
        require(len(set(self.rates)) == len(self.rates), "every learning rate once", rates=self.rates)
        # read once: a run trains on the very text that its header names
        object.__setattr__(self, "source", own_text(self.text, self.task, self.length))
        for name in self.mechanisms:
            catalog.method(name, **self.settings.get(name, {}))
        if self.task == "mqar":
            mqar(self.vocab, self.length, self.pairs, 1, seed=self.seed)

    @property
    def label(self) -> str:
        return " + ".join(dict.fromkeys(self.mechanisms))

    @property
    def subject(self) -> str:
        """The task in words: which text, where it is one's own."""
        return self.task if self.text is None else f"{self.task} of {Path(self.text).name}"

    @classmethod
    def of(cls, task: str, **given: Any) -> "Plan":
        """The settings that suit a task, but for those that are given."""
        if task not in SUITS:
            raise unknown("training task", task, SUITS)
        return cls(task=task, **{**SUITS[task], **given})

    @property
    def of_images(self) -> bool:
        return SUITS[self.task] is IMAGES

    def model(self) -> "PreTrainedModel":
        """The model at its start: the same for every rate."""
        from regard.train.tasks import model_of

        return model_of(self)

    def to_dict(self) -> dict[str, Any]:
        """The settings as they stand in the run's header; what the task's data and pages of one's own hold as well."""
        from regard.train.tasks import TASKS

        known = {name: catalog.revision_of(name) for name in self.mechanisms}
        pages = {name: held for name, held in known.items() if held is not None}
        left = {"source"} | (set(OF_TEXTS) if self.of_images else {"text"} if self.text is None else set())
        own = {name: value for name, value in asdict(self).items() if name not in left}
        return {**own, **TASKS[self.task].source(self), **({"pages": pages} if pages else {})}

    def told(self) -> dict[str, Any]:
        warn("Plan.told()", "Plan.to_dict()")
        return self.to_dict()


def check_names(mechanisms: Sequence[str], settings: dict[str, dict]) -> None:
    """Refuse names that are no pages, and settings of what is in no layer; no page is imported."""
    known = catalog.pages()
    for name in mechanisms:
        if name not in known:
            raise unknown("mechanism", name, (n for n in known if catalog.kind_by_room(n) in (*KINDS, None)))
    for name in settings:
        if name not in mechanisms:
            raise unknown("mechanism of this run", name, mechanisms)


def own_text(path: str | None, task: str, length: int) -> Source | None:
    """The text of a plan, long enough to be trained on and to be held out in part; None for that of Python."""
    require(path is None or task == "text", "a text of one's own is for the task text", task=task, text=path)
    if path is None:
        return None
    source = Source.from_path(path)
    size = len(source.text.encode())
    need = int((length + 2) / HELD_OUT) + 1
    rule = f"a text of {need:,} bytes at least for sequences of {length}, a tenth of it held out"
    require(size >= need, rule, path=path, bytes=size, length=length)
    return source
