"""Which tokens of one prompt our cache pages keep, and which NVIDIA/kvpress keeps on the same model: a table.

    python scripts/kept_sets.py ours smollm2 /tmp/kept          # here: the model as a folder, the prompt, our sets
    PYTHON scripts/kept_sets.py theirs /tmp/kept   # pip install kvpress, in an environment of its own
    python scripts/kept_sets.py table /tmp/kept                 # Markdown

Tokens are told by their keys in the compressed cache. A prompt of 512 tokens, of which a quarter is kept.
"""

import sys
from pathlib import Path

import torch

TOKENS, KEPT = 512, 128
# our method -> (the press, its arguments, what is known to differ)
PAIRS = {
    "knorm": ("KnormPress", {}, ""),
    "keydiff": ("KeyDiffPress", {}, ""),
    "lagkv:sinks=4,lag=32": ("LagKVPress", {"n_sink": 4, "lag_size": 32}, "theirs breaks ties at random"),
    "leverage": ("LeverageScorePress", {}, "theirs draws a random sketch"),
    "non_causal_attention": ("NonCausalAttnPress", {}, ""),
    "compactor": ("CompactorPress", {}, "theirs draws a random sketch"),
    "cur": ("CURPress", {}, ""),
    "tova": ("TOVAPress", {}, ""),
    "observed_attention": ("ObservedAttentionPress", {}, ""),
    "expected_attention:epsilon=0.0": ("ExpectedAttentionPress", {}, ""),
    "snapkv:window=64,pool=5": ("SnapKVPress", {}, "theirs pools by the mean, ours by the maximum"),
    "snapkv:window=64,pool=1": ("SnapKVPress", {"kernel_size": 1}, ""),
    "streaming_llm:sinks=4,positions=text": ("StreamingLLMPress", {"n_sink": 4}, ""),
    "knorm+adakv": ("AdaKVPress", {"press": "KnormPress"}, ""),
    "snapkv:window=64,pool=1+adakv": ("AdaKVPress", {"press": "SnapKVPress", "kernel_size": 1}, ""),
    "knorm+criticalkv": ("CriticalKVPress", {"press": "KnormPress"}, ""),
    "snapkv:window=64,pool=1+criticalkv": (
        "CriticalKVPress",
        {"press": "SnapKVPress", "kernel_size": 1},
        "ours adds epsilon to sums, theirs to means",
    ),
    "knorm+chunkkv:chunk=20": ("ChunkKVPress", {"press": "KnormPress"}, "theirs keeps a share of the chunks"),
    "snapkv:window=64,pool=1+pyramidkv": ("PyramidKVPress", {"kernel_size": 1}, "other parts for each layer"),
}


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
    text = (Path(regard.__file__).parents[2] / "README.md").read_text(encoding="utf8")
    tokens = torch.tensor([tokenizer(text)["input_ids"][:TOKENS]])
    kept = {}
    for spec in PAIRS:
        if any(name not in catalog.pages() for name in parse_spec(spec)[0].split("+")):
            continue
        method = catalog.from_spec(spec).with_settings(budget=KEPT)
        with regard.attach(model, method) as attached, torch.no_grad():
            model(tokens, use_cache=True)
            kept[spec] = [held(layer) for layer in attached.cache.layers]
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


def theirs(folder: Path) -> None:
    """What kvpress keeps; runs where it is installed."""
    import kvpress
    from transformers import AutoModelForCausalLM

    saved = torch.load(folder / "ours.pt")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    kept, errors, whole = {}, {}, {}
    for how in ("sdpa", "eager"):  # keys are told by their numbers, which hang on how attention is computed
        model.set_attn_implementation(how)
        whole[how] = keys_after(model, saved["tokens"])
    for spec in saved["kept"]:
        name, arguments, _ = PAIRS[spec]
        try:
            press = press_of(kvpress, name, dict(arguments))
            implementation = "eager" if name == "ObservedAttentionPress" else "sdpa"
            model.set_attn_implementation(implementation)
            with press(model):
                after = keys_after(model, saved["tokens"], press=press)
            kept[spec] = [
                among(k, w, layer) for k, w, layer in zip(after, whole[implementation], model.model.layers)
            ]
        except Exception as error:  # a row of the table says why
            errors[spec] = f"{type(error).__name__}: {error}"
    torch.save({"kept": kept, "errors": errors, "version": kvpress_version()}, folder / "theirs.pt")


def kvpress_version() -> str:
    from importlib.metadata import version

    return f"kvpress {version('kvpress')}, transformers {version('transformers')}"


def press_of(kvpress, name: str, arguments: dict):
    ratio = 1 - KEPT / TOKENS
    inner = arguments.pop("press", None)
    if inner is None:
        return getattr(kvpress, name)(compression_ratio=ratio, **arguments)
    return getattr(kvpress, name)(press=getattr(kvpress, inner)(compression_ratio=ratio, **arguments))


def keys_after(model, tokens, press=None) -> list[torch.Tensor]:
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    with torch.no_grad():
        model.model(tokens, past_key_values=cache, use_cache=True)
    return [layer.keys[0] for layer in cache.layers]


def among(keys: torch.Tensor, whole: torch.Tensor, layer) -> torch.Tensor:
    """[G, n] bool: which of all keys are among those that were left."""
    masked = layer.self_attn.masked_key_indices
    if masked is not None:
        found = torch.ones(whole.shape[:2], dtype=torch.bool)
        _, heads, places = masked
        found[heads, places] = False
        return found
    return torch.stack([(torch.cdist(w.double(), k.double()) < 1e-6).any(-1) for w, k in zip(whole, keys)])


def table(folder: Path) -> None:
    saved, other = torch.load(folder / "ours.pt"), torch.load(folder / "theirs.pt")
    print(f"{saved['model']}, {TOKENS} tokens, {KEPT} kept; {other['version']}\n")
    print("| ours | theirs | heads with the same set | the same tokens | least of a head | what differs |")
    print("| --- | --- | ---: | ---: | ---: | --- |")
    for spec, mine in saved["kept"].items():
        name, arguments, known = PAIRS[spec]
        press = name + (f"({', '.join(f'{k}={v}' for k, v in arguments.items())})" if arguments else "")
        if spec in other["errors"]:
            print(f"| {spec} | {press} | | | | {other['errors'][spec][:80]} |")
            continue
        pairs = [(a, b) for x, y in zip(mine, other["kept"][spec]) for a, b in zip(x, y)]
        same = [bool((a == b).all()) for a, b in pairs]
        share = [float((a & b).sum() / b.sum().clamp(min=1)) for a, b in pairs]
        means = f"{100 * sum(share) / len(share):.1f} % | {100 * min(share):.0f} %"
        print(f"| {spec} | {press} | {sum(same)} of {len(same)} | {means} | {known} |")


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    {
        "ours": lambda m, f: ours(m, Path(f)),
        "theirs": lambda f: theirs(Path(f)),
        "table": lambda f: table(Path(f)),
    }[what](*rest)
