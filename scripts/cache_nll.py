"""What each cache page costs a pretrained model: nll of steps after a prompt of held-out text, under one budget.

    python scripts/cache_nll.py MODEL [--gguf FILE] [--budget 128] [--prompt 500] [--steps 60] [--texts 2]

MODEL is a folder or a name; --gguf a file in it (needs gguf and accelerate). One line a method, then a row of JSON.
"""

import argparse
import json

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import regard
from regard.tasks.corpus import held_out

APART = 2500  # tokens from the beginning of one excerpt to that of the next


def excerpts(tokenizer, length: int, count: int) -> list[Tensor]:
    """[1, length] ids each, with the model's first token if it has one."""
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer(held_out().text[:60_000], add_special_tokens=False).input_ids
    return [torch.tensor([(first + ids[i * APART :])[:length]]) for i in range(count)]


@torch.no_grad()
def nll(model, text: Tensor, prompt: int) -> list[float]:
    """Of every token after the prompt, fed one by one."""
    cache, losses = DynamicCache(config=model.config), []
    logits = model(text[:, :prompt], past_key_values=cache, logits_to_keep=1).logits
    for token in text[0, prompt:]:
        losses.append(-logits[0, -1].float().log_softmax(-1)[token].item())
        logits = model(token.view(1, 1), past_key_values=cache).logits
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--gguf")
    for name, default in (("budget", 128), ("prompt", 500), ("steps", 60), ("texts", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model, gguf_file=args.gguf)
    model = AutoModelForCausalLM.from_pretrained(args.model, gguf_file=args.gguf).eval()
    texts, result = excerpts(tokenizer, args.prompt + args.steps, args.texts), {}
    for name in ("full", *regard.list_methods(kind="cache")):
        method = None if name == "full" else regard.method(name, budget=args.budget)
        with regard.attach(model, method):
            losses = [loss for text in texts for loss in nll(model, text, args.prompt)]
        result[name] = sum(losses) / len(losses)
        print(f"{name:<20} {result[name]:.3f}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
