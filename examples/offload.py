"""Take a model that transformers has loaded, and move its experts out of memory in place.

python examples/offload.py [CHECKPOINT] --memory 24MB
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import comoe
from comoe.demo import PROMPT, model_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", default=str(model_folder()))
    parser.add_argument("--memory", default="24MB")
    parser.add_argument("--max-tokens", type=int, default=32)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype="auto").eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    before = model.generate(**inputs, max_new_tokens=args.max_tokens, do_sample=False)

    # exact: the original weights bit for bit, from a store in a temporary folder.
    comoe.offload(model, memory=args.memory, exact=True)
    print(model.comoe.describe())
    after = model.generate(**inputs, max_new_tokens=args.max_tokens, do_sample=False)
    print(tokenizer.decode(after[0], skip_special_tokens=True))
    same = before.tolist() == after.tolist()
    print(f"--- {'the same tokens' if same else 'other tokens'} as before the experts were moved")
    model.comoe.close()


if __name__ == "__main__":
    main()
