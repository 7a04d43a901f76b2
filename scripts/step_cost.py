"""What a step under a policy costs beyond the model's own, in ms a layer: the numbers of docs/log.md.

    python scripts/step_cost.py

30 layers of 9 heads and 3 KV heads, so narrow that little else takes time; 512 of 1,024 tokens held; one thread.
"""

import statistics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regard import catalog
from regard.bench.attached import OWN, run

LAYERS, PROMPT, BUDGET, STEPS, TURNS = 30, 1024, 512, 40, 5


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=72, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
    )  # fmt: skip
    model, prompt = LlamaForCausalLM(config).eval(), torch.randint(3, 250, (1, PROMPT))
    names = ("streaming_llm", "h2o", "snapkv", "tokenselect")
    methods = {"no method": None, **{name: catalog.method(name, budget=BUDGET) for name in names}}
    methods["a budget that covers everything"] = catalog.method("streaming_llm", budget=1.0)
    with torch.inference_mode():
        turns = [
            {name: run(model, prompt, m, STEPS)[1] for name, m in {OWN: OWN, **methods}.items()}
            for _ in range(TURNS)
        ]
    for name in methods:
        beyond = statistics.median(turn[name] - turn[OWN] for turn in turns)
        print(f"{name:32} {1e3 * beyond / LAYERS:.3f} ms a layer")


if __name__ == "__main__":
    main()
