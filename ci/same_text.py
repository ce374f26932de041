"""Asks two running servers the same 20 prompts, greedily, and exits with 1 where their texts differ.

python ci/same_text.py http://127.0.0.1:30000 http://127.0.0.1:30001 [--tokens 24]
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village,",
    "def fibonacci(n):",
    "The three primary colours are",
    "In 1969, the first humans",
    "Dear Sir or Madam,",
    "To make a good cup of tea, first",
    "1, 2, 4, 8, 16,",
    "The opposite of hot is",
    "SELECT name FROM users WHERE",
    "Photosynthesis is the process by which",
    "The quick brown fox",
    "Q: What is the largest planet?\nA:",
    "Bonjour, je m'appelle",
    "Monday, Tuesday, Wednesday,",
    "The sun rises in the",
    "A triangle has three sides. A square has",
    "My favourite book is about",
    "for (int i = 0; i < n; i++) {",
)


def ask(url: str, prompt: str, tokens: int) -> str:
    """The server's greedy text."""
    with urlopen(f"{url}/v1/models", timeout=60) as answer:
        model = json.load(answer)["data"][0]["id"]
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=900) as answer:
        text: str = json.load(answer)["choices"][0]["text"]
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("urls", nargs=2, metavar="URL")
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    with ThreadPoolExecutor(2 * len(PROMPTS)) as pool:
        ours, theirs = ([pool.submit(ask, url, p, args.tokens) for p in PROMPTS] for url in args.urls)
        texts = [(a.result(), b.result()) for a, b in zip(ours, theirs, strict=True)]
    for prompt, (a, b) in zip(PROMPTS, texts, strict=True):
        print(f"{'same' if a == b else 'DIFFERENT':9} {prompt!r} -> {a!r}" + ("" if a == b else f"\n{'':9} but {b!r}"))
    same = sum(a == b for a, b in texts)
    print(f"{same} of {len(texts)} texts are the same, {len(set(texts))} of them distinct")
    return 0 if same == len(texts) else 1


if __name__ == "__main__":
    sys.exit(main())
