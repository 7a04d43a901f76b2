"""`regard bench caches`: what each cache method adds to a prompt, what a step that reads a part takes, true bytes.

A model of random weights whose layers are those of SmolLM2-135M, four of them, in float32. Rows are those of the other
benchmarks. A prompt's ratio is the time with the method over the time without: at most 1.25.

Of a method that reads a part there are two rows. `a step of 4 layers` is the whole model's: with what is no attention,
with layers that the method reads whole, and, on the other side, the copy that transformers' cache makes of all keys.
`attention of a layer` is one call of the attention function in a layer that is read in part: choosing, reading and
attention, against attention to all keys.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from regard import catalog
from regard.attaching.attachment import attach
from regard.attaching.packed import PackedGroup
from regard.attaching.slots import Group
from regard.bench.sparse import at_most
from regard.bench.timing import paired, row, seconds
from regard.core import Method

READING = ("quest", "quest_cache", "double_sparsity", "loki", "infllm")
MOST = 1.25  # how much longer a prompt may take under a method that scores its tokens
# what a page that reads a prompt again is asked with, without a tokenizer
WORDS = {"whole": (5, 9), "part": (5, 11, 7), "answer": (4,)}


@dataclass(frozen=True)
class Sizes:
    prompt: int = 2_048
    kept: int = 512
    context: int = 32_768  # of a step that reads a part
    share: float = 0.05
    layers: int = 4
    repeats: int = 3


QUICK = Sizes(prompt=256, kept=64, context=2_048, layers=2, repeats=1)


def rows(quick: bool = False, progress: Callable[[str], None] | None = None) -> list[dict]:
    """Everything that this benchmark measures. Say what is being measured through `progress`."""
    sizes, progress = QUICK if quick else Sizes(), progress or (lambda text: None)
    results: list[dict] = []
    with torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        for part in (prompts, steps, sizes_of_bytes):
            for one in part(sizes):
                results.append(one)
                progress(f"{one['case']}: {one['ratio']:.2f} (target {one['target']:g}) {one['note']}")
    return results


@cache
def model_of(layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=65_536,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def scoring(sizes: Sizes) -> list[Method]:
    """The methods that score a prompt's tokens and let some go, at one budget; those laid over others too."""
    found = []
    for name in catalog.list_methods(kind="cache"):
        method = catalog.method(name)
        if method.page.keep is not None or method.page.score is not None:
            words = WORDS if method.page.reread is not None else {}
            found.append(method.with_settings(budget=sizes.kept, **words))
    return found


def prompts(sizes: Sizes) -> Iterator[dict]:
    """A prompt under each method over the same prompt without any."""
    model, tokens = model_of(sizes.layers), torch.randint(3, 250, (1, sizes.prompt))
    plain = lambda: seconds(lambda: model(tokens, use_cache=True, logits_to_keep=1))  # noqa: E731
    for method in scoring(sizes):
        with attach(model, method):  # what is measured on the model is measured once, before
            pass

        def under(method: Method = method) -> float:
            with attach(model, method):
                return seconds(lambda: model(tokens, use_cache=True, logits_to_keep=1))

        times = paired(plain, under, sizes.repeats)  # ratio: with the method over without
        said = f"{method.name}: prompt of {sizes.prompt}"
        if method.page.reread is not None:
            yield row(f"{said}, read twice", times, None, 0.0, "no target")
            continue
        yield {**row(said, times, None, MOST), "holds": times["ratio"] <= MOST}


def steps(sizes: Sizes) -> Iterator[dict]:
    """A step of decoding on a long cache, and the attention in it, full attention's over the method's."""
    model = model_of(sizes.layers)
    for name in [n for n in READING if n in catalog.list_methods(kind="cache")]:
        method, said = (
            catalog.method(name, budget=sizes.share),
            f"at {sizes.context} tokens, {sizes.share:.0%} read",
        )
        caches = filled(model, sizes.context), filled(model, sizes.context)
        whole = min(getattr(method.config, "full", 0), sizes.layers)
        note = f"{whole} of {sizes.layers} layers are read whole" if whole else ""
        # the first pair, which does not count, finds what is known of the tokens that are there
        times = paired(*steppings(stepping, model, method, caches), 4 * sizes.repeats)
        yield row(f"{name}: a step of {sizes.layers} layers {said}", times, None, 3.0, note)
        if whole < sizes.layers:
            times = paired(*steppings(attending, model, method, caches), 4 * sizes.repeats)
            yield row(f"{name}: attention of a layer {said}", times, None, 3.0)
    yield kivi_step(sizes)


def steppings(
    of: Callable, model: Any, method: Method, caches: tuple[Any, Any]
) -> tuple[Callable[[], float], Callable[[], float]]:
    """What is measured under the method and without it, each on a cache of its own."""
    return of(model, method, caches[0]), of(model, None, caches[1])


def kivi_step(sizes: Sizes) -> dict:
    """A step on codes over one on numbers: reported whatever it is."""
    model, method, length = model_of(sizes.layers), catalog.method("kivi"), sizes.prompt
    tokens, caches, held = torch.randint(3, 250, (1, length)), {}, {}
    for which, under in (("ours", method), ("own", None)):
        with attach(model, under) as attached:
            caches[which] = model(tokens, use_cache=True, logits_to_keep=1).past_key_values
            held[which] = attached.bytes_held()
    times = paired(
        stepping(model, method, caches["ours"]), stepping(model, None, caches["own"]), 2 * sizes.repeats
    )
    share = held["ours"] / held["own"]
    return row(
        f"kivi: a step at {length} tokens, {share:.0%} of float32's bytes held", times, None, 0.0, "no target"
    )


def stepping(model: Any, method: Method | None, cache: Any) -> Callable[[], float]:
    """Seconds of a step on a cache, under a method or without one."""
    token = torch.tensor([[5]])

    def step() -> float:
        with attach(model, method) if method is not None else nullcontext():
            return seconds(lambda: model(token, past_key_values=cache))

    return step


def attending(model: Any, method: Method | None, cache: Any) -> Callable[[], float]:
    """Seconds of the attention function in a step, in the last layer: the first ones may be read whole."""
    token = torch.tensor([[5]])

    def last() -> float:
        with attach(model, method) if method is not None else nullcontext(), clocked(model) as times:
            model(token, past_key_values=cache)
        return times[-1]

    return last


@contextmanager
def clocked(model: Any) -> Iterator[list[float]]:
    """Seconds of each call of the attention function that the model has, in order."""
    name, times = model.config._attn_implementation, list[float]()
    function = ALL_ATTENTION_FUNCTIONS[name]

    def timed(*args: Any, **kwargs: Any) -> Any:
        answers: list = []
        times.append(seconds(lambda: answers.append(function(*args, **kwargs))))
        return answers[0]

    AttentionInterface.register(name, timed)
    try:
        yield times
    finally:
        AttentionInterface.register(name, function)


def filled(model: Any, n: int) -> Any:
    """A cache of random keys and values."""
    held, config = DynamicCache(config=model.config), model.config
    shape = 1, config.num_key_value_heads, n, config.head_dim
    for layer in range(config.num_hidden_layers):
        held.update(torch.randn(shape), torch.randn(shape), layer)
    return held


def sizes_of_bytes(sizes: Sizes) -> Iterator[dict]:
    """Bytes of what is stored in fewer bits, over those of bfloat16, at heads of 64."""
    method = catalog.method("kivi")
    k = torch.randn(1, 1, sizes.context, 64).bfloat16()
    group = PackedGroup.of(Group((0,), k, k.clone(), sizes.context), method.page.codec(method.config))
    whole = group.stored_bytes()
    group.pack(None, {})
    yield at_most(f"kivi: bytes at {sizes.context} tokens, of bfloat16's", group.stored_bytes() / whole, 0.2)
