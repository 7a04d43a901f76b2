"""The memory a run will take, before it starts: what it says is measured against peaks in tests/test_memory.py.

    a worker  =  the process  +  weights  +  keys and values  +  activations of a prompt  +  logits

Workers of one machine have in common the libraries' code and weights that are mapped from their file, as
`models.shipped.load` does: these count once. Methods are taken to keep half as much again as full attention.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils.hub import cached_file

from regard import catalog
from regard.bench.cell import Cell
from regard.bench.executor import Executor, InProcess, LocalProcesses, Ray, Submitit
from regard.bench.executors.base import memory_bytes
from regard.bench.timed import STEPS
from regard.core.spec import parse_spec
from regard.models.shipped import SHIPPED, pretrained, shipped_name
from regard.tasks.perplexity import CONTINUATION

# measured with torch 2.13 and transformers 5.23 on Linux, without a GPU: a process that has imported them, what is its
# own and what it maps of the libraries' files
PROCESS, LIBRARIES = 330 * 2**20, 140 * 2**20
# tokens of an answer that is a code or a word, of all turns; of one that is generated freely
ANSWER = {"exact": 16, "recall": 64}
OWN_TOKENS = 1024  # taken for a question of one's own, which is not counted before a tokenizer is there
# bytes a logit takes in float32: full attention's, a method's, and its again while its steps are put together
LOGIT = 12
# and of one sample at a time, in float64, as two runs are compared: log-probabilities of both and the terms of KL
# (bench/quality.divergence)
COMPARED = 40
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Weights:
    """Bytes as they are loaded; `mapped`: they stay in the file's pages, which all processes of a machine share."""

    bytes: int
    mapped: bool


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker by what they are for, and of all; `free` is None where they run on other machines."""

    workers: int
    process: int
    weights: int
    keys_and_values: int
    activations: int
    logits: int
    common: int  # of the above, what workers of one machine have once
    device: str
    free: int | None
    asked: int | None  # of each job or actor, where the executor's settings say so

    @property
    def worker(self) -> int:
        return self.process + self.weights + self.keys_and_values + self.activations + self.logits

    @property
    def total(self) -> int:
        """Of all workers, where they are on this machine; of one, where each has a machine of its own."""
        return self.of(self.workers) if self.free is not None else self.worker

    @property
    def fits(self) -> bool | None:
        """None where nobody knows what there is."""
        room = self.asked if self.free is None else self.free
        return None if room is None else self.total <= room

    def of(self, workers: int) -> int:
        return self.common + workers * (self.worker - self.common)

    def text(self) -> str:
        """One line; where it will not fit, with what would."""
        if self.free is None:
            asked = "" if self.asked is None else f", of {size(self.asked)} asked"
            end = "; that will not fit: ask for more with mem=" if self.fits is False else ""
            return f"memory: about {size(self.worker)} in each worker{asked}{end}"
        many = f"{self.workers} worker" + "s" * (self.workers > 1)
        line = f"memory: about {size(self.total)} in {many}; {size(self.free)} free"
        if self.fits:
            return line
        fitting = max((n for n in range(1, self.workers) if self.of(n) <= self.free), default=None)
        would = "shorter --lengths or fewer --samples"
        if fitting is not None:
            would = f"--workers {fitting} takes about {size(self.of(fitting))}"
        return f"{line}: that will not fit; {would}"

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "worker": self.worker,
            "total": self.total,
            "fits": self.fits,
            "text": self.text(),
        }


def estimate(
    cells: Sequence[Cell],
    model: Any,
    executor: Executor,
    device: str | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """The memory of a run, as run.json has it: bytes by what they are for, and one line as `text`.

    Nothing is refused here: where the model's config or weights are not to be read, `text` says so and no more.
    """
    try:
        config, weights = described(model, dtype)
    except (OSError, ValueError, KeyError) as error:
        return {"text": f"memory: not estimated, {str(error).splitlines()[0][:120]}"}
    return memory(cells, config, weights, executor, device_of(model, device)).to_dict()


def memory(cells: Sequence[Cell], config: Any, weights: Weights, executor: Executor, device: str) -> Memory:
    gpu, (workers, here, asked) = device.startswith("cuda"), place(executor)
    mapped = weights.mapped and not gpu
    free = None if not here else free_on_gpu(device) if gpu else free_here()
    return Memory(
        workers=min(workers, len(cells)),
        process=0 if gpu else PROCESS + LIBRARIES,
        weights=weights.bytes,
        keys_and_values=max(kept(c, config, weights) for c in cells),
        activations=max(activations(c, config) for c in cells),
        logits=max(logits(c, config) for c in cells),
        common=(0 if gpu else LIBRARIES) + (weights.bytes if mapped else 0),
        device=device,
        free=free,
        asked=asked,
    )


def place(executor: Executor) -> tuple[int, bool, int | None]:
    """(workers, whether they are on this machine, the bytes that each asks for) of an executor."""
    if isinstance(executor, InProcess):
        return 1, True, None
    if isinstance(executor, LocalProcesses):
        return executor.workers, True, None
    if isinstance(executor, Submitit | Ray):
        asked = None if executor.mem is None else memory_bytes(executor.mem)
        if isinstance(executor, Submitit):
            return executor.jobs, executor.cluster == "local", asked
        return executor.workers, executor.where is None, asked
    return 1, False, None  # somebody's own: nothing is known of its machines


def kept(cell: Cell, config: Any, weights: Weights) -> int:
    """Bytes of keys and values of a batch under full attention, and half as much again for what methods keep."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * width * item_size(config)
    return int(1.5 * batch(cell) * (tokens(cell) + answer(cell)) * token)


def activations(cell: Cell, config: Any) -> int:
    """Bytes that one layer holds while a prompt is read: six rows of the model's width, three of its MLP's."""
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    return batch(cell) * tokens(cell) * (6 * hidden + 3 * inner) * item_size(config)


def logits(cell: Cell, config: Any) -> int:
    return answer(cell) * config.vocab_size * (cell.samples * LOGIT + COMPARED)


def batch(cell: Cell) -> int:
    return min(cell.samples, max(1, cell.batch_tokens // tokens(cell)))


def tokens(cell: Cell) -> int:
    """Tokens of a prompt."""
    return cell.length or OWN_TOKENS


def answer(cell: Cell) -> int:
    """Tokens of an answer, as far as the task's metric and settings tell."""
    if cell.what == "timing":
        return STEPS
    scored = parse_spec(cell.task)[1].get("continuation", CONTINUATION)
    return ANSWER.get(catalog.task(cell.task).metric, scored)


def item_size(config: Any) -> int:
    dtype = getattr(config, "dtype", None)
    return 4 if dtype is None else dtype.itemsize


def described(model: Any, dtype: str | None = None) -> tuple[Any, Weights]:
    """A model's text config, with the dtype it is loaded in, and its weights, without loading them."""
    if isinstance(model, tuple):
        held = sum(p.numel() * p.element_size() for p in model[0].parameters())
        return model[0].config.get_text_config(), Weights(held, False)
    name = shipped_name(model)
    path = model if name is None else SHIPPED[name] if name in SHIPPED else pretrained(name)
    whole = AutoConfig.from_pretrained(path)
    config = whole.get_text_config()
    if name is not None:
        config.dtype = torch.float32  # what load_shipped asks for
    elif dtype is not None:
        config.dtype = getattr(torch, dtype)
    elif config.dtype is None:
        config.dtype = whole.dtype
    return config, stored(folder_of(path), config.dtype)


def folder_of(path: str | Path) -> Path:
    """Where a model's files lie; FileNotFoundError, with its name, where its weights are not on this machine yet."""
    folder = Path(path) if Path(path).is_dir() else Path(cached_file(str(path), "config.json")).parent
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"the weights of {str(path)!r} are not on this machine yet")
    return folder


def stored(folder: Path, dtype: torch.dtype | None) -> Weights:
    """Bytes of the weights in `dtype`, from the headers of their files; None: as they are stored."""
    total, mapped = 0, True
    for tensor in (t for file in folder.glob("*.safetensors") for t in tensors(file)):
        first, last = tensor["data_offsets"]
        held = FLOATS.get(tensor["dtype"])
        if held is None or dtype is None:
            total += last - first
        else:
            total += (last - first) // held.itemsize * dtype.itemsize
            mapped &= held == dtype
    return Weights(total, mapped)


def tensors(file: Path) -> list[dict[str, Any]]:
    """What a safetensors file says of its tensors: the first 8 bytes are the length of the JSON that follows."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return [tensor for name, tensor in header.items() if name != "__metadata__"]


def device_of(model: Any, device: str | None) -> str:
    """Where the model goes, as `loader` and `load` decide it."""
    if isinstance(model, tuple):
        return str(model[0].device)
    if device is not None:
        return device
    return "cpu" if shipped_name(model) is not None or not torch.cuda.is_available() else "cuda"


def free_on_gpu(device: str) -> int:
    return torch.cuda.mem_get_info(torch.device(device))[0]


def free_here() -> int:
    """Bytes that processes can still take: what the system has, or what the control group leaves, if that is less."""
    return min([available(Path("/proc/meminfo")), *(left for left in groups())])


def available(meminfo: Path) -> int:
    """MemAvailable; on a system without /proc, all of the machine's memory."""
    if not meminfo.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    line = next(x for x in meminfo.read_text().splitlines() if x.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


# (folder, limit, usage, the line of memory.stat that counts pages of files, which are given back) of both versions
VERSIONS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def groups(membership: Path = Path("/proc/self/cgroup"), versions: Any = VERSIONS) -> Iterator[int]:
    """What the limits of this process's control groups leave, of the group itself and all above it."""
    if not membership.exists():
        return
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for (root, limit, usage, inactive), wanted in zip(versions, ("", "memory")):
            if wanted == controllers or wanted in controllers.split(","):
                inside = Path(root) / path.lstrip("/")
                for folder in (inside, *inside.parents):
                    if folder.is_relative_to(root) and (folder / limit).exists():
                        yield from left_of(folder, limit, usage, inactive)


def left_of(folder: Path, limit: str, usage: str, inactive: str) -> Iterator[int]:
    """Bytes between a group's limit and what it uses; nothing where it has no limit."""
    most = (folder / limit).read_text().strip()
    if most == "max":
        return
    lines = (folder / "memory.stat").read_text().splitlines()
    files = next((int(x.split()[1]) for x in lines if x.split()[0] == inactive), 0)
    yield max(0, int(most) - int((folder / usage).read_text()) + files)


def size(number: int) -> str:
    """Bytes in words.

    >>> size(1_900_000_000), size(12_400_000_000), size(340_000_000)
    ('1.9 GB', '12 GB', '340 MB')
    """
    return f"{number / 1e9:.{1 if number < 1e10 else 0}f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
