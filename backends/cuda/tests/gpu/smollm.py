"""Makes smollm.json: greedy answers of the demo model by transformers in float32, and how close each choice was.

python backends/cuda/tests/gpu/smollm.py    (needs torch, transformers and accelerate)
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from polyradix.engine.tokenizer import load_tokenizer
from polyradix.graph.checkpoint import fetch_demo, open_checkpoint

FILE = Path(__file__).with_suffix(".json")
COUNT = 64
QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain how a bicycle stays upright.",
    "List five prime numbers and say why each is prime.",
    "Translate to French: The weather is fine today.",
    "Tell me a story about a dragon who was afraid of fire.",
    "def fibonacci(n):",
    "Summarise the causes of the First World War in three sentences.",
)


def answer(model: transformers.PreTrainedModel, prompt: list[int]) -> dict[str, list[int] | list[float]]:
    """COUNT greedy tokens, and `gaps`: each one's logit less the second best."""
    fed, cache = prompt, transformers.DynamicCache(config=model.config)
    tokens: list[int] = []
    gaps: list[float] = []
    while len(tokens) < COUNT:
        out = model(torch.tensor([fed]), None, None, cache, use_cache=True)
        best = out.logits[0, -1].topk(2)
        gaps.append(round(float(best.values[0] - best.values[1]), 4))
        tokens.append(int(best.indices[0]))
        fed = tokens[-1:]
    return {"prompt": prompt, "tokens": tokens, "gaps": gaps}


@torch.inference_mode()
def main() -> None:
    path = fetch_demo()
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = load_tokenizer(open_checkpoint(str(path)))
    chats = (tokenizer.chat_prompt([{"role": "user", "content": text}]) for text in QUESTIONS)
    answers = [answer(model, tokenizer.encode(chat, add_special=False)) for chat in chats]
    FILE.write_text("[\n" + ",\n".join(json.dumps(a) for a in answers) + "\n]\n")
    print(f"{FILE}: smallest gap {min(min(a['gaps']) for a in answers)}")


if __name__ == "__main__":
    main()
