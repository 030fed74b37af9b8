"""What dense layers in 8 or 4 bits cost the bundled model: perplexity and KL against exact, on held-out text.

    python bench/dense_quality.py [--tokens 8000] [--write]

Experts are held at 8 bits or better, so that what is seen comes from the dense layers; the row "source" shows
what of it does not. Held-out text is the running Python's own (comoe/heldout.py): compare rows of one version.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from harness import write_rows

import comoe
from comoe.config import DENSE_BITS
from comoe.evaluate import evaluate
from comoe.heldout import held_out_text

DEMO = Path(comoe.__file__).parent / "demo_model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument(
        "--write", action="store_true", help="append bench/results/dense_quality.csv"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        packed = Path(root) / "packed"
        comoe.pack(DEMO, packed)
        tokenizer = comoe.load_tokenizer(packed)
        for dense in DENSE_BITS:

            def load(exact: bool, dense: str = dense):
                if exact:
                    return comoe.load(packed, exact=True)
                model = comoe.load(packed, "1GB", dense=dense)
                model.comoe.wait_ready()
                return model

            found = evaluate(load, tokenizer, held_out_text(), max_tokens=args.tokens)
            row = {
                "dense": dense, "dense_bytes": found["stats"]["dense_bytes"],
                "perplexity": round(found["perplexity"], 4),
                "perplexity_exact": round(found["perplexity_exact"], 4),
                "worse_percent": round(100 * (found["perplexity"] / found["perplexity_exact"] - 1), 3),
                "kl": round(found["kl"], 6), "top1_agreement": round(found["top1_agreement"], 4),
                "expert_bits": round(found["stats"]["bits_per_weight"], 2), "tokens": found["tokens"],
            }  # fmt: skip
            print(row, flush=True)
            if args.write:
                write_rows("dense_quality", [row])


if __name__ == "__main__":
    main()
