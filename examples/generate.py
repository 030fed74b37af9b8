"""Generate under a budget, then halve the budget while the model stays loaded.

    python examples/generate.py PACKED --memory 1.2GB --prompt "The ladder has"

PACKED is a folder made by `comoe pack`; without it the bundled demo model is packed first.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import comoe
from comoe.config import format_bytes, parse_bytes
from comoe.demo import PROMPT, model_folder
from comoe.generate import generate_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packed", nargs="?", help="a packed folder; default: the bundled model")
    parser.add_argument("--memory", default="24MB")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-tokens", type=int, default=48)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        packed = args.packed or comoe.pack(model_folder(), Path(folder) / "packed")
        tokenizer = comoe.load_tokenizer(packed)
        model = comoe.load(packed, memory=args.memory)
        for memory in (parse_bytes(args.memory), parse_bytes(args.memory) // 2):
            print(f"--- {model.comoe.set_memory(memory)}")
            result = generate_text(model, tokenizer, args.prompt, max_tokens=args.max_tokens)
            stats = model.comoe.stats()
            print(result["text"])
            print(
                f"--- {result['tokens_per_second']:.1f} tokens/s, "
                f"{stats['bits_per_weight']:.2f} bits per expert weight, "
                f"{format_bytes(stats['bytes_read']['disk'])} read from disk so far"
            )
        model.comoe.close()


if __name__ == "__main__":
    main()
