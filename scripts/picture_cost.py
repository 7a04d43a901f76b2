"""What methods on visual tokens cost: the prompt with a quarter of them after layer 2, and tokens under steering.

    python scripts/picture_cost.py            # both, on one thread: ratios in one process, sides in turns

The prompt: a LLaVA with random weights, a decoder of 8 layers, 2,048 tokens of which 1,536 are visual. Tokens: the
same, 1,024 wide, 16 of them after 512 of which 256 are visual; passes beside the main one, edits of one layer.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from regard import catalog
from regard.attaching.attachment import attach
from regard.core import Card, Method
from regard.kinds.steering import SteeringPage

TOKENS, VISUAL, WIDTH, LAYERS, STEPS = 2048, 1536, 512, 8, 16


def ratios(
    sides: dict[str, Callable[[], Any]], base: str, turns: int
) -> dict[str, tuple[float, float, float]]:
    """Median and range of each side's time over the base's, in turns."""
    for side in sides.values():
        side()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(turns):
        took = {}
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            took[name] = getattr(side, "took", time.perf_counter() - start)
        for name in sides:
            found[name].append(took[name] / took[base])
    return {name: (statistics.median(x), min(x), max(x)) for name, x in found.items()}


def said(title: str, found: dict[str, tuple[float, float, float]]) -> None:
    print(title)
    for name, (middle, low, high) in found.items():
        print(f"  {name:34} {middle:.3f}  ({low:.3f} to {high:.3f})")


def wide_model(width: int, tokens: int, visual: int) -> tuple[Any, dict]:
    """Visual tokens are pictures of 16 x 16 patches: 1,536 are six of them."""
    torch.manual_seed(0)
    side = 16  # 256 patches a picture, 6 pictures
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, image_size=4 * side,
        patch_size=4, projection_dim=32,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=4096, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=250, image_seq_length=side**2,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    pictures = visual // side**2
    words = torch.randint(3, 240, (1, tokens - visual))
    ids = torch.cat([words[:, :32], torch.full((1, visual), 250), words[:, 32:]], 1)
    return model, dict(input_ids=ids, pixel_values=torch.randn(pictures, 3, 4 * side, 4 * side))


def prompt(turns: int) -> None:
    model, inputs = wide_model(WIDTH, TOKENS, VISUAL)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights, {TOKENS} tokens, {VISUAL} of them visual"
    )

    def run(method: Any) -> Callable[[], Any]:
        def side() -> None:
            with torch.no_grad(), nullcontext() if method is None else attach(model, method):
                model(**inputs, use_cache=True, logits_to_keep=1)

        return side

    sides = {
        "as it is": run(None), "the bare machinery": run([]),
        "fastv, a quarter after layer 2": run(catalog.method("fastv", keep=0.25, layer=2, queries="last")),
        "fastv, mean over all queries": run(catalog.method("fastv", keep=0.25, layer=2, queries="all")),
        "fastervlm, a quarter": run(catalog.method("fastervlm", keep=0.25)),
        "divprune, a quarter": run(catalog.method("divprune", keep=0.25)),
        "random, a quarter": run(catalog.method("random_tokens", keep=0.25)),
    }  # fmt: skip
    said("prefill, scoring included, over the model as it is", ratios(sides, "as it is", turns))


def one_layer(at: Any, cfg: Any) -> bool:
    return at.layer == 3


def louder(at: Any, w: torch.Tensor, cfg: Any) -> torch.Tensor:
    image = at.role("image")[:, None, None]
    w = torch.where(image, 1.5 * w, w)
    return w / w.sum(-1, keepdim=True)


def decode(turns: int) -> None:
    model, inputs = wide_model(2 * WIDTH, TOKENS // 4, VISUAL // 6)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights, {inputs['input_ids'].shape[1]} tokens"
    )
    page = SteeringPage(
        config=catalog.get("vcd").config, acts=one_layer, weights=louder, rows="last",
        card=Card(title="one layer", paper="none", year=2026, idea=""),
    )  # fmt: skip

    def run(method: Any) -> Callable[[], Any]:
        def side() -> None:
            with torch.no_grad(), nullcontext() if method is None else attach(model, method):
                cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
                start, token = time.perf_counter(), torch.tensor([[7]])
                for _ in range(STEPS):
                    model(input_ids=token, past_key_values=cache, use_cache=True)
                side.took = time.perf_counter() - start

        return side

    sides = {
        "as it is": run(None), "the bare machinery": run([]),
        "weights of one layer edited": run(Method("one_layer", page, page.config())),
        **{name: run(catalog.method(name)) for name in ("vcd", "damro", "vista", "vhd_vhr", "var", "pai")},
    }  # fmt: skip
    said("a token after the prompt, over the model as it is", ratios(sides, "as it is", turns))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("prompt", "decode"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only != "decode":
        prompt(args.turns)
    if args.only != "prompt":
        decode(args.turns)


if __name__ == "__main__":
    main()
