"""One row of bench/switch_base_128.py in a process of its own: loads the model one way and does what lines of JSON on its
standard input say, one answer per line, until it is told to finish."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import switch_methods
import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.utils import logging

from comoe import memory

PROMPT = 128  # tokens for the encoder


def read_bytes() -> int:
    """What this process has had read from disk, as the kernel counts it; faults on mapped files included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def tokens(vocab: int, count: int, seed: int) -> torch.Tensor:
    """[1, count], drawn evenly; 0 and 1 are padding and the end."""
    return torch.randint(2, vocab, (1, count), generator=torch.Generator().manual_seed(seed))


class Forced(LogitsProcessor):
    """Makes `generate` say what is given, and notes when each token's logits were ready."""

    def __init__(self, ids: torch.Tensor, keep: int):
        self.ids, self.keep = ids[0].tolist(), keep
        self.times: list[float] = []
        self.logits: list[np.ndarray] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        at = len(self.times) - 1
        if at < self.keep:
            self.logits.append(scores[0].float().numpy().copy())
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.ids[at]] = 0
        return forced


class MoEClock:
    """Seconds inside the MoE blocks, router included."""

    def __init__(self, model, decoding: bool = False):
        """decoding: passes of one token only."""
        self.seconds = self.began = 0.0
        self.decoding = decoding
        for module in model.modules():
            if type(module).__name__.endswith(("SparseMLP", "SparseMoeBlock")):
                module.register_forward_pre_hook(self.begin)
                module.register_forward_hook(self.end)

    def begin(self, module, args) -> None:
        self.began = time.perf_counter()

    def end(self, module, args, out) -> None:
        if not self.decoding or args[0].shape[1] == 1:
            self.seconds += time.perf_counter() - self.began


class Worker:
    def __init__(self, method: str, folder: str, budget: int | None, options: dict):
        begin = time.perf_counter()
        self.method = getattr(switch_methods, method)(Path(folder), budget, **options)
        self.method.settle()
        self.loaded = time.perf_counter() - begin
        self.model = self.method.model
        self.vocab = self.model.config.vocab_size
        self.clock = MoEClock(self.model)

    def load(self) -> dict:
        return {"load_s": self.loaded, "about": self.method.about}

    def encode(self, seed: int, out: str | None = None) -> dict:
        ids = tokens(self.vocab, PROMPT, seed)
        before, moe = read_bytes(), self.clock.seconds
        begin = time.perf_counter()
        hidden = self.model.get_encoder()(input_ids=ids).last_hidden_state
        seconds = time.perf_counter() - begin
        if out:
            np.save(out, hidden[0].float().numpy())
        return {
            "s": seconds,
            "moe_s": self.clock.seconds - moe,
            "bytes_read": read_bytes() - before,
        }

    def generate(self, seed: int, count: int, keep: int = 0, out: str | None = None) -> dict:
        ids = tokens(self.vocab, PROMPT, seed)
        encoded = self.model.get_encoder()(input_ids=ids)
        encoded.router_logits = None  # generate asks for it, and it is not there unless collected
        forced = Forced(tokens(self.vocab, count, seed + 500), keep)
        marks = self.method.marks()
        before, moe, first = read_bytes(), self.clock.seconds, time.perf_counter()
        self.model.generate(
            encoder_outputs=encoded,
            attention_mask=torch.ones_like(ids),
            decoder_input_ids=torch.zeros((1, 1), dtype=torch.int64),
            max_new_tokens=count,
            do_sample=False,
            logits_processor=LogitsProcessorList([forced]),
        )
        if out:
            np.save(out, np.stack(forced.logits))
        after = self.method.marks()
        return {
            "first_s": forced.times[0] - first,
            "s": np.diff(forced.times).tolist(),
            "moe_s": (self.clock.seconds - moe) / count,
            "bytes_read": (read_bytes() - before) / count,
            "marks": {name: after[name] - marks[name] for name in after},
        }

    def finish(self) -> dict:
        return {**self.method.finish(), "peak_rss": memory.peak_rss()}


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    asked = json.loads(sys.stdin.readline())
    with torch.inference_mode():
        worker = Worker(**asked)
        for line in itertools.chain(['{"do": "load"}'], iter(sys.stdin.readline, "")):
            command = json.loads(line)
            answer = getattr(worker, command.pop("do"))(**command)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        main()
