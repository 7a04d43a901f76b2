"""Which tokens of one prompt our cache pages keep, and which NVIDIA/kvpress keeps on the same model: a table.

    python scripts/kept_sets.py ours smollm2 /tmp/kept          # here: the model as a folder, the prompt, our sets
    PYTHON scripts/kept_sets.py theirs /tmp/kept   # pip install kvpress, in an environment of its own
    python scripts/kept_sets.py table /tmp/kept [/tmp/other ...]  # Markdown, several models beside each other

Tokens are told by their keys in the compressed cache. A prompt of 512 tokens, of which a quarter is kept. Of each pair
the press is asked as it is, and once more without what is known to differ (scripts/kept_known.py).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from kept_known import Known, taken_out

TOKENS, KEPT = 512, 128
NEWEST = "the newest token stays here"


@dataclass(frozen=True)
class Pair:
    """A press and its arguments, what is known to differ in words, and by names of kept_known."""

    press: str
    arguments: dict = field(default_factory=dict)
    differs: str = ""
    without: tuple[str, ...] = ()
    always: tuple[str, ...] = ()  # what theirs cannot do without
    budget: bool = True  # whether both are asked for a quarter; else their settings say what stays
    after: dict = field(default_factory=dict)  # fields of the press that its constructor does not take

    def made(self, presses):
        arguments, ratio = (
            dict(self.arguments),
            {"compression_ratio": 1 - KEPT / TOKENS} if self.budget else {},
        )
        inner = arguments.pop("press", None)
        if inner is None:
            press = getattr(presses, self.press)(**ratio, **arguments)
        else:
            own = {name: arguments.pop(name) for name in ("kernel_size",) if name in arguments}
            press = getattr(presses, self.press)(press=getattr(presses, inner)(**ratio, **own), **arguments)
        for name, value in self.after.items():
            setattr(press, name, value)
        return press

    @property
    def label(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        return f"{self.press}({arguments})" if arguments else self.press


KNORM = f"{NEWEST}; equal in four digits is equal here, and the earlier stays"
ONE = {"press": "SnapKVPress", "kernel_size": 1}
PAIRS = {
    "knorm": Pair("KnormPress", {}, KNORM, ("digits", "newest", "ties")),
    "keydiff": Pair("KeyDiffPress", {}, NEWEST, ("newest",)),
    "lagkv:sinks=4,lag=32": Pair(
        "LagKVPress", {"n_sink": 4, "lag_size": 32}, "of equal ranks the earlier stays here; there any", ("ties",)
    ),
    "leverage": Pair(
        "LeverageScorePress", {}, f"theirs draws a random sketch, in float32; {KNORM}",
        ("sketch", "digits", "newest", "ties"),
    ),
    "non_causal_attention": Pair(
        "NonCausalAttnPress", {}, f"at the ends theirs takes a missing neighbour for 0; {NEWEST}", ("edges", "newest")
    ),
    "compactor:chunk=250": Pair(
        "CompactorPress", {"chunk_size": 250},
        "theirs draws a random sketch, weighs it by the share that goes, takes a missing neighbour for 0",
        ("sketch", "blend", "edges"),
    ),
    "cur": Pair("CURPress", {}, NEWEST, ("newest",)),
    "tova": Pair("TOVAPress"),
    "observed_attention": Pair("ObservedAttentionPress", {}, NEWEST, ("newest",)),
    "expected_attention:epsilon=0.0": Pair("ExpectedAttentionPress", {}, NEWEST, ("newest",)),
    "qfilter": Pair("QFilterPress", {}, f"{NEWEST}; directions are the prompt's in both", ("newest",), ("filters",)),
    "snapkv:window=64,pool=5": Pair(
        "SnapKVPress", {}, "theirs pools each query head by the mean, ours by the maximum; of equals the earlier stays",
        ("pooling", "ties"),
    ),
    "snapkv:window=64,pool=1": Pair("SnapKVPress", {"kernel_size": 1}),
    "finch:window=64": Pair(
        "FinchPress", {"rerotate_keys": False}, "theirs counts one token less for each query", ("itself",),
        after={"window_size": 64, "delimiter_token_id": -1},
    ),
    "streaming_llm:sinks=4,positions=text": Pair("StreamingLLMPress", {"n_sink": 4}),
    "simlayerkv:sinks=4,window=64,last=1,threshold=0.6": Pair(
        "SimLayerKVPress", {"n_initial": 4, "n_recent": 65, "lazy_threshold": 0.6},
        "theirs leaves the newest token's own weight out and asks for one token more than it keeps", ("recent",),
        budget=False,
    ),
    "duo_attention:sinks=4,window=60": Pair(
        "DuoAttentionPress", {"head_compression_ratio": 0.5}, "heads that stream are ours in both", (), ("streaming",),
        budget=False,
    ),
    "knorm+adakv": Pair("AdaKVPress", {"press": "KnormPress"}, KNORM, ("digits", "newest", "ties")),
    "snapkv:window=64,pool=1+adakv": Pair("AdaKVPress", ONE),
    "knorm+criticalkv": Pair("CriticalKVPress", {"press": "KnormPress"}, KNORM, ("digits", "newest", "earlier")),
    "snapkv:window=64,pool=1+criticalkv": Pair(
        "CriticalKVPress", ONE, "ours adds epsilon to sums, theirs to means", ("epsilon",)
    ),
    "knorm+chunkkv:chunk=16": Pair(
        "ChunkKVPress", {"press": "KnormPress", "chunk_length": 16},
        "the newest token stays here, out of the means, and that place is not the last chunk's",
        ("digits", "newest_beside"),
    ),
    "knorm+chunked:length=128": Pair(
        "ChunkPress", {"press": "KnormPress", "chunk_length": 128}, KNORM, ("digits", "newest", "ties")
    ),
    "snapkv:window=64,pool=1+pyramidkv": Pair(
        "PyramidKVPress", {"kernel_size": 1}, "other parts for each layer, and more in all", ("parts",)
    ),
    "snapkv:window=64,pool=1+key_rerotation": Pair("KeyRerotationPress", ONE, always=("in_place",)),
    "kvzip": Pair(
        "KVzipPress", {}, f"{NEWEST}, and the first four: theirs marks them and then scores them", ("marked",)
    ),
    "think:sparsity=0.4": Pair(
        "ThinKPress", {"key_channel_compression_ratio": 0.4}, "sets of channels", budget=False
    ),
}  # fmt: skip


def ours(model_name: str, folder: Path) -> None:
    """The model as a folder that any transformers loads, the prompt, and what our pages keep."""
    import regard
    from regard import catalog
    from regard.core.spec import parse_spec
    from regard.models.shipped import load_shipped

    model, tokenizer = load_shipped(model_name, "cpu")
    model = model.float().eval()
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / "model")
    tokenizer.chat_template = None  # the prompt is plain text
    tokenizer.save_pretrained(folder / "model")
    text = (Path(regard.__file__).parents[2] / "README.md").read_text(encoding="utf8")
    tokens = torch.tensor([tokenizer(text)["input_ids"][:TOKENS]])
    kept = {}
    for spec, pair in PAIRS.items():
        if any(name not in catalog.pages() for name in parse_spec(spec)[0].split("+")):
            continue
        method = catalog.from_spec(spec).with_settings(**({"budget": KEPT} if pair.budget else {}))
        with regard.attach(model, method, tokenizer=tokenizer) as attached, torch.no_grad():
            model(tokens, use_cache=True)
            read = channels if spec.startswith("think") else held
            kept[spec] = [read(layer) for layer in attached.cache.layers]
    torch.save({"tokens": tokens, "kept": kept, "model": model_name}, folder / "ours.pt")


def held(layer) -> torch.Tensor:
    """[G, n] bool of a ledger layer of one text."""
    heads = sum(len(group.heads) for group in layer.groups)
    found = torch.zeros(heads, TOKENS, dtype=torch.bool)
    for group in layer.groups:
        table = group.table()[0].expand(len(group.heads), -1)
        for head, index in zip(group.heads, table):
            found[head, index[index >= 0]] = True
    return found


def channels(layer) -> torch.Tensor:
    """[G, D] bool: the channels of old keys that are not left out."""
    return (layer.keys[0, :, : TOKENS // 2] != 0).any(1)


def theirs(folder: Path) -> None:
    """What kvpress keeps, as it is and without what is known to differ; runs where it is installed."""
    from transformers import AutoModelForCausalLM

    saved = torch.load(folder / "ours.pt")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    kept, without, errors, whole = {}, {}, {}, {}
    for how in ("sdpa", "eager"):  # keys are told by their numbers, which hang on how attention is computed
        model.set_attn_implementation(how)
        whole[how] = keys_after(model, saved["tokens"])
    for spec, mine in saved["kept"].items():
        pair = PAIRS[spec]
        how = "eager" if pair.press == "ObservedAttentionPress" else "sdpa"
        model.set_attn_implementation(how)
        try:
            kept[spec] = asked(model, saved["tokens"], pair, mine, whole[how], pair.always)
            if pair.without:
                names = pair.always + pair.without
                without[spec] = asked(model, saved["tokens"], pair, mine, whole[how], names)
        except Exception as error:  # a row of the table says why
            errors[spec] = f"{type(error).__name__}: {error}"
    facts = {"kept": kept, "without": without, "errors": errors, "version": kvpress_version()}
    torch.save(facts, folder / "theirs.pt")


def asked(model, tokens, pair: Pair, mine: list, whole: list, names: tuple[str, ...]) -> list[torch.Tensor]:
    """What a press keeps, [G, n] bool by layer, within the contexts of these names."""
    import kvpress

    press = pair.made(kvpress)
    with taken_out(names, Known(press, model.config, mine)), press(model):
        after = keys_after(model, tokens)
    if pair.press == "ThinKPress":
        return [(keys != 0).any(1) for keys in after]
    return [among(k, w, layer) for k, w, layer in zip(after, whole, model.model.layers)]


def kvpress_version() -> str:
    from importlib.metadata import version

    return f"kvpress {version('kvpress')}, transformers {version('transformers')}"


def keys_after(model, tokens) -> list[torch.Tensor]:
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    with torch.no_grad():
        model.model(input_ids=tokens, past_key_values=cache, use_cache=True)
    return [layer.keys[0] for layer in cache.layers]


def among(keys: torch.Tensor, whole: torch.Tensor, layer) -> torch.Tensor:
    """[G, n] bool: which of all keys are among those that were left."""
    masked = layer.self_attn.masked_key_indices
    if masked is not None:
        found = torch.ones(whole.shape[:2], dtype=torch.bool)
        _, heads, places = masked
        found[heads, places] = False
        return found
    # exact: by products, a long key is away from itself
    exact = "donot_use_mm_for_euclid_dist"
    apart = [torch.cdist(w.double(), k.double(), compute_mode=exact) for w, k in zip(whole, keys)]
    return torch.stack([(distance < 1e-6).any(-1) for distance in apart])


def table(*folders: Path) -> None:
    """Markdown, the models of these folders beside each other."""
    saved = [(torch.load(folder / "ours.pt"), torch.load(folder / "theirs.pt")) for folder in folders]
    names = [mine["model"] for mine, _ in saved]
    print(f"{' and '.join(names)}, {TOKENS} tokens, {KEPT} kept; {saved[0][1]['version']}\n")
    print(row("ours", "theirs", *names, "what differs", *(f"without it, {name}" for name in names)))
    print(row("---", "---", *("---:" for _ in names), "---", *("---:" for _ in names)))
    for spec in saved[0][0]["kept"]:
        pair = PAIRS[spec]
        errors = [other["errors"][spec][:80] for _, other in saved if spec in other["errors"]]
        as_it_is, without = (
            [equal(mine["kept"][spec], other[which].get(spec)) for mine, other in saved]
            for which in ("kept", "without")
        )
        print(row(spec, pair.label, *as_it_is, "; ".join([pair.differs, *errors]), *without))


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def equal(mine: list, other: list | None) -> str:
    """The heads whose sets are equal, and how far apart the others are, in words; "" where nothing was compared."""
    if other is None:
        return ""
    same, heads, most = compared(mine, other)
    return f"all {heads}" if same == heads else f"{same} of {heads}, {most} apart"


def compared(mine: list, other: list) -> tuple[int, int, int]:
    """(heads whose sets are equal, all heads, the most tokens of a head that one has and the other has not)."""
    pairs = [(a, b) for x, y in zip(mine, other, strict=True) for a, b in zip(x, y, strict=True)]
    apart = [max(int((a & ~b).sum()), int((b & ~a).sum())) for a, b in pairs]
    return apart.count(0), len(apart), max(apart)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    {
        "ours": lambda m, f: ours(m, Path(f)),
        "theirs": lambda f: theirs(Path(f)),
        "table": lambda *f: table(*map(Path, f)),
    }[what](*rest)
