"""One measurement of llama.cpp in a process of its own, for bench/peers.py. Runs in the environment that has
llama-cpp-python; needs nothing of comoe.

    python bench/peers_llama.py JOB     JOB: a JSON object; the last line of standard output is the result, as JSON

MoE blocks are timed by llama.cpp's evaluation callback in passes of their own: the graph is then computed in pieces that
end where a block (`ffn_norm-L`), or its experts (`ffn_moe_weights_norm-L`), begin and where both end (`ffn_moe_out-L`),
and the pieces that end with the latter are timed.
"""

from __future__ import annotations

import ctypes
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

FORMATS = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}


def main() -> None:
    job = json.loads(sys.argv[1])
    if "quantize" in job:
        quantize(job)
        return
    llama_cpp.llama_backend_init()
    peer = Peer(job)
    result = peer.perplexity() if "text_ids" in job else peer.speed()
    print(json.dumps(result | {"ran": peer.describe(), "rss_peak": peak_rss()}), flush=True)


def quantize(job: dict[str, Any]) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FORMATS[job["quantize"]]
    params.nthread = job["threads"]
    source, out = str(job["source"]).encode(), str(job["out"]).encode()
    if llama_cpp.llama_model_quantize(source, out, ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not quantize {job['source']} to {job['quantize']}")


class Peer:
    def __init__(self, job: dict[str, Any]):
        self.job = job
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_mmap = True
        self.model = llama_cpp.llama_model_load_from_file(job["file"].encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {job['file']}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def context(self, callback=None):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.job["context_tokens"]
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = self.job["threads"]
        params.no_perf = True
        if callback is not None:
            params.cb_eval = callback
        context = llama_cpp.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError("llama.cpp could not make a context")
        return context

    def describe(self) -> str:
        text = ctypes.create_string_buffer(200)
        llama_cpp.llama_model_desc(self.model, text, len(text))
        build = llama_cpp.llama_print_system_info().decode()
        on = re.findall(r"(\w+) = 1", build.split("CPU :")[-1])
        return f"{text.value.decode()}, mmap, llama-cpp-python {llama_cpp.__version__} ({' '.join(on)})"

    def feed(self, context, tokens: list[int]) -> float:
        """Seconds of one llama_decode."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        start = time.perf_counter()
        status = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_synchronize(context)
        seconds = time.perf_counter() - start
        if status:
            raise RuntimeError(f"llama_decode: status {status}")
        return seconds

    def speed(self) -> dict[str, Any]:
        from peers_timing import timed_decode

        job = self.job
        context = self.context()
        memory = llama_cpp.llama_get_memory(context)
        self.feed(context, job["prompt"])
        llama_cpp.llama_memory_clear(memory, True)
        seconds = self.feed(context, job["prompt"])
        result = {"prefill_tokens_per_second": len(job["prompt"]) / seconds}
        result |= timed_decode(lambda token: self.feed(context, [token]), job)
        llama_cpp.llama_free(context)
        if job["blocks"]:
            result["moe_seconds_per_token"] = self.seconds_after(b"ffn_norm-")
            result["experts_seconds_per_token"] = self.seconds_after(b"ffn_moe_weights_norm-")
        return result

    def seconds_after(self, begin: bytes) -> float:
        """Per token, from the nodes whose names begin so to the end of the MoE block."""
        job = self.job
        timer = BlockTimes(begin)
        context = self.context(timer.callback)
        timer.on = False
        self.feed(context, job["prompt"])
        tokens = job["block_steps"]
        self.feed(context, tokens[:1])
        timer.on, timer.seconds = True, 0.0
        for token in tokens[1:]:
            self.feed(context, [token])
        llama_cpp.llama_free(context)
        if not timer.pieces:
            raise RuntimeError(f"llama.cpp computed no piece between {begin!r} and ffn_moe_out")
        return timer.seconds / (len(tokens) - 1)

    def perplexity(self) -> dict[str, float]:
        """Windows as comoe.evaluate.plan_windows makes them (the job lists them): each target once."""
        ids, nats, count = self.job["text_ids"], 0.0, 0
        context = self.context()
        memory = llama_cpp.llama_get_memory(context)
        for begin, first, end in self.job["windows"]:
            llama_cpp.llama_memory_clear(memory, True)
            length = end - begin
            batch = llama_cpp.llama_batch_init(length, 0, 1)
            batch.n_tokens = length
            for i in range(length):
                batch.token[i], batch.pos[i] = ids[begin + i], i
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
            if llama_cpp.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            logits = np.ctypeslib.as_array(
                llama_cpp.llama_get_logits(context), shape=(length, self.vocab)
            ).astype(np.float64)
            rows = logits[first - 1 - begin : length - 1]
            top = rows.max(1, keepdims=True)
            logs = np.log(np.exp(rows - top).sum(1)) + top[:, 0]
            targets = np.array(ids[first:end])
            nats += float((logs - rows[np.arange(len(targets)), targets]).sum())
            count += len(targets)
            llama_cpp.llama_batch_free(batch)
        return {"perplexity": math.exp(nats / count)}


class BlockTimes:
    """Seconds of the pieces from `begin` to a block's end. What Python adds lies between pieces and is not counted."""

    def __init__(self, begin: bytes) -> None:
        self._begin, self.pieces = begin, 0
        # llama.cpp's library has brought it into this process.
        self._name = ctypes.CDLL("libggml-base.so.0").ggml_get_name
        self._name.restype, self._name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        self.seconds, self.on, self._asked = 0.0, True, 0.0
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._call)

    def _call(self, tensor, ask, data) -> bool:
        name = self._name(tensor)
        ends = name.startswith(b"ffn_moe_out-")
        if ask:
            if not self.on:
                return False
            if ends:
                self._asked = time.perf_counter()  # the piece up to here is computed next
            return ends or name.startswith(self._begin)
        if ends:
            self.pieces += 1
            self.seconds += time.perf_counter() - self._asked
        return True


def peak_rss() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)[1]) * 1024


if __name__ == "__main__":
    main()
