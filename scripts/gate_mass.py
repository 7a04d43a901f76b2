"""What SeerAttention's claim measures, on a pretrained model: the attention mass that its distilled gates capture.

    python scripts/gate_mass.py [MODEL] [--steps 80] [--texts 2]

MODEL is smollm2, a folder, a name or a GGUF file. The claim quotes SmolLM2-135M by it (13 minutes on one core).
"""

import argparse

import torch

from regard.attaching.attachment import attach
from regard.claims.lab import mean
from regard.claims.mechanism.seer_attention import LENGTH, Weigh
from regard.models.shipped import load_any
from regard.tasks import held_out
from regard.train.convert import convert


def say(stage: str, step: int, steps: int, loss: float) -> None:
    print(f"{stage} {step} of {steps}: {loss:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--texts", type=int, default=2)
    args = parser.parse_args()
    model, tokenizer = load_any(args.model)
    settings = dict(steps=args.steps, batch=1, length=1024, width=64, rope_theta=1e5)
    learned = convert(model, tokenizer, "seer_attention", progress=say, **settings)
    weigh, ids = Weigh(learned), torch.tensor(held_out().ids(tokenizer))
    with torch.inference_mode(), attach(model, weigh):
        for text in ids[: args.texts * LENGTH].split(LENGTH):
            model(text[None], use_cache=False, logits_to_keep=1)
    print({name: round(mean(of_layers), 4) for name, of_layers in weigh.mass.items()})


if __name__ == "__main__":
    main()
