"""What sparse prefill gives a pretrained model: time to the first token over its own, nll, keys read.

    python scripts/first_token.py MODEL [--length 4096] [--methods block_topk:top_k=12,quest]

MODEL is smollm2, a folder, a name or a GGUF file. One line a method, then a row of JSON.
"""

import argparse
import json

import torch
from torch.nn import functional as F

import regard
from regard.attaching.converted import configured
from regard.bench.prefill import point
from regard.core.spec import parse_spec, split_specs
from regard.models.shipped import load_any
from regard.tasks.corpus import held_out

SCORED = 256  # tokens of the prompt's end whose likelihood is compared


@torch.no_grad()
def nll_and_kept(model, text: torch.Tensor, method) -> tuple[float, float]:
    """Of the last tokens of the prompt, and the mean share of keys read; 1 where a layer reads all."""
    with regard.attach(model, method) as attached:
        logits = model(text, use_cache=True, logits_to_keep=SCORED).logits[0, :-1].float()
        rows = [] if method is None else attached.selection()
    kept = [sum(row["kept"]) / len(row["kept"]) if "kept" in row else 1.0 for row in rows]
    return F.cross_entropy(logits, text[0, 1 - SCORED :]).item(), sum(kept) / len(kept) if kept else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--methods", default="block_topk:top_k=12,quest,xattention:threshold=0.8")
    args = parser.parse_args()
    model, tokenizer = load_any(args.model)
    ids = held_out().ids(tokenizer)[: args.length]
    text = torch.tensor([ids])
    result = {"full": {"nll": nll_and_kept(model, text, None)[0]}}
    print(f"{'full':<32} nll {result['full']['nll']:.3f}", flush=True)
    for spec in split_specs(args.methods) or []:
        method = configured(*parse_spec(spec))
        nll, kept = nll_and_kept(model, text, method)
        result[spec] = {"nll": nll, "kept": kept, **point(model, method, ids)}
        print(
            f"{spec:<32} nll {nll:.3f}  {result[spec]['ratio']:.2f} of the time  {kept:.0%} read", flush=True
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
