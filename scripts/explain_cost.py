"""What explanations cost here: python scripts/explain_cost.py [scan] [edit] [memory]

scan    every head of the shipped model over 64 prompt pairs: seconds, and the largest difference to one site at a time
edit    an edit on the last row of one head at 2,048 tokens: its time over that of SDPA, paired, by verb
memory  peak memory of attribution at 8,192 tokens over that of the plain forward and backward, each in a process
"""

import json
import subprocess
import sys
import time

import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from regard import Edit, Site, attach, catalog, load_shipped
from regard.claims.lab import paired_ratios
from regard.explaining.attribution import attribute
from regard.explaining.pairs import Batch, Pairs, batch_of
from regard.explaining.patching import patch
from regard.ops.machine import resident
from regard.ops.ranks import rank_correlation

TOKENS = 8192
SCANS = {"z": ["z"], "z and mlp": ["z", "mlp"], "q, k with the QK correction": ["q", "k"]}


def needle_pairs(tokenizer, length: int, count: int) -> Pairs:
    """Prompts that ask for a code of digits, and the same with each digit one higher: target and foil are the first."""
    clean, corrupt, target, foil = [], [], [], []
    nine = tokenizer.convert_tokens_to_ids("9")
    for sample in catalog.task("needle").samples(tokenizer, length, count, seed=0):
        ids, answer = list(sample.prompt), sample.answer
        at = next(i for i in range(len(ids)) if ids[i : i + len(answer)] == answer)
        other = [answer[0], *(i + 1 if i < nine else i - 9 for i in answer[1:])]
        clean.append([*ids, answer[0]])
        corrupt.append([*ids[:at], *other, *ids[at + len(other) :], answer[0]])
        target.append(answer[1])
        foil.append(other[1])
    return Pairs(batch_of(clean), batch_of(corrupt), torch.tensor(target), torch.tensor(foil))


def scan() -> dict:
    model, tokenizer = load_shipped("lm")
    pairs = needle_pairs(tokenizer, 96, 64)
    start = time.perf_counter()
    whole = patch(model, pairs, "z")
    seconds = time.perf_counter() - start
    gaps = []
    for i in (0, 21, 63):
        for site in ((0, 1), (2, 1), (3, 4)):
            one = patch(model, pairs.at([i]), "z", sites=[site], batch=1)
            gaps.append(float((one.at(site) - whole.at(site)[i]).abs().max() / whole.span.mean()))
    screened = attribute(model, pairs, ["z"])["z"]
    agree = rank_correlation(screened.mean.flatten(), whole.mean.flatten())
    return {"heads": whole.exact.numel(), "pairs": len(pairs), "tokens": pairs.clean.ids.shape[1],
            "seconds": round(seconds, 1), "largest_difference_to_one_by_one": max(gaps),
            "spearman_of_screening": round(agree.item(), 3)}  # fmt: skip


def edit() -> dict:
    """Of one call of the attention function on one thread: 9 heads and 3 KV heads of width 64, 2,048 tokens."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=576, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=4096)  # fmt: skip
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(3, 60, (1, 2048))
    last = dict(layers=0, heads=4, rows=-1)
    edits = {
        "nothing": None,
        "scale z": Edit(Site("z", **last), "scale", 0.5),
        "replace q": Edit(Site("q", **last), "replace", 0.5),
        "block scores": Edit(Site("scores", **last, keys=(5, 9)), "block"),
        "move weights": Edit(Site("weights", **last, keys=0), "move", 0.5, to=(7,)),
    }
    return {name: edited_over_sdpa(model, ids, change) for name, change in edits.items()}


@torch.no_grad()
def edited_over_sdpa(model, ids, change) -> float:
    calls = []
    with attach(model, change):
        name = model.config._attn_implementation_internal
        function = ALL_ATTENTION_FUNCTIONS[name]
        AttentionInterface.register(name, lambda *a, **k: (calls.append((a, k)), function(*a, **k))[1])
        model(input_ids=ids, use_cache=False)
        ((module, q, k, v, *_), options) = calls[0]
        ours = lambda: function(*calls[0][0], **options)  # noqa: E731
        sdpa, given = ALL_ATTENTION_FUNCTIONS["sdpa"], {**options, "is_causal": True}
        plain = lambda: sdpa(module, q, k, v, None, **given)  # noqa: E731
        return round(paired_ratios(plain, ours, rounds=31, warm=3).median, 3)


def memory() -> dict:
    plain = peak("plain")
    ratios = {name: round(peak(name) / plain, 3) for name in SCANS}
    return {"plain_forward_and_backward_mb": round(plain), **ratios}


def peak(what: str) -> float:
    """MB that a process takes for this beyond the model."""
    result = subprocess.run(
        [sys.executable, __file__, "--in", what], capture_output=True, text=True, check=True
    )
    return float(result.stdout.split()[-1])


def in_process(what: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=2048, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
                         num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=TOKENS)  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    ids = torch.randint(3, 2000, (1, TOKENS))
    other = ids.clone()
    other[0, 100] = 5
    before = most_resident()
    if what == "plain":
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits[0, -1, 7].backward()
    else:
        mask = torch.ones_like(ids)
        pairs = Pairs(Batch(ids, mask), Batch(other, mask), torch.tensor([7]), torch.tensor([9]))
        attribute(model, pairs, SCANS[what], qk="QK" in what)
    print(most_resident() - before)


def most_resident() -> float:
    """MB that this process held at its height. Unlike ru_maxrss it does not begin with what the parent held."""
    return resident("VmHWM") / 1e6


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in"]:
        in_process(sys.argv[2])
    else:
        for name in sys.argv[1:] or ("scan", "edit", "memory"):
            print(json.dumps({name: {"scan": scan, "edit": edit, "memory": memory}[name]()}), flush=True)
