"""One measurement of transformers, accelerate or comoe in a process of its own, for bench/peers.py.

    python bench/peers_worker.py JOB     JOB: a JSON object; the last line of standard output is the result, as JSON

The same ids are fed to every peer: a prompt, then one token at a time that the job names, so that all compute the
same and nothing is sampled. The times within MoE blocks (router included) are taken in a pass of their own.
"""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any


def main() -> None:
    job = json.loads(sys.argv[1])
    result_to, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(run(job)), file=result_to, flush=True)


def run(job: dict[str, Any]) -> dict[str, Any]:
    from comoe import memory
    from comoe.baseline import warm_up

    baseline = warm_up()
    model, ran = LOADERS[job["system"]](job)
    result = {"ran": ran, "baseline": baseline}
    if "text_ids" in job:
        result["perplexity"] = perplexity(model, job)
    else:
        result |= speed(model, job)
    if hasattr(model, "comoe"):
        stats = model.comoe.stats()
        result["ran"] = f"{ran}; {stats['plan']}".removeprefix("; ")
        names = ("memory", "dense_bytes", "bits_per_weight", "hits", "misses", "expert_bytes")
        result["comoe"] = {name: stats[name] for name in names} | {
            "decided": stats["decided"],
            "bytes_read": stats["bytes_read"],
        }
        model.comoe.close()
    return result | {"rss_peak": memory.peak_rss()}


# The compiler's modules and what it keeps; with less, the budget takes them from the experts.
COMPILER_BYTES = 600_000_000


# ---- how each peer is loaded: (model, what really runs) --------------------------------------------------------


def load_transformers(job: dict[str, Any]):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=torch.bfloat16, experts_implementation=job["experts"]
    ).eval()
    # safetensors maps lazily: without a look at each weight, the peak would be that of the experts in use.
    for tensor in model.parameters():
        tensor.flatten()[:: 4096 // tensor.element_size()].sum()
    return model, f"experts {model.config._experts_implementation}"


def load_accelerate(job: dict[str, Any]):
    """Experts on disk, all else in memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    layers = AutoConfig.from_pretrained(job["folder"]).num_hidden_layers
    device_map: dict[str, Any] = {"model.embed_tokens": "cpu", "model.norm": "cpu"}
    device_map |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    for i in range(layers):
        block = f"model.layers.{i}"
        for name in ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate"):
            device_map[f"{block}.{name}"] = "cpu"
        device_map[f"{block}.mlp.experts"] = "disk"
    model = AutoModelForCausalLM.from_pretrained(
        job["folder"],
        dtype=torch.bfloat16,
        device_map=device_map,
        offload_folder=job["scratch"],
    ).eval()
    return model, f"experts on disk, {model.config._experts_implementation}"


def load_comoe(job: dict[str, Any]):
    import comoe
    from comoe.baseline import warm_up

    options = dict(job["options"])
    if "text_ids" in job:
        options.pop(
            "compile", None
        )  # whole passes are not compiled, and the compiler would take memory
    if job.get("cap"):
        from comoe.runtime.budget import memory_within

        # What is left of the limit beside the interpreter, with room for the promise's tolerance.
        options["memory"] = memory_within(job["cap"] - warm_up())
    model = comoe.load(job["folder"], **options)
    runtime = model.comoe
    if "level" in job:
        # Every expert at this level, and no more memory than that takes.
        level = runtime.store_sizes.levels.names.index(job["level"])
        pool = runtime.store_sizes.total(level)
        more = COMPILER_BYTES if options.get("compile") else 0
        runtime.set_memory(runtime.budget.least(0) + int(pool * 1.03) + more)
    if "share" in job:
        pool = runtime.store_sizes.total(runtime.store_sizes.levels.names.index("4"))
        runtime.set_memory(runtime.budget.least(0) + int(pool * job["share"]))
    runtime.wait_ready()
    return model, ", ".join(f"{k}={v}" for k, v in sorted(options.items()) if k != "memory")


LOADERS = {"transformers": load_transformers, "accelerate": load_accelerate, "comoe": load_comoe}


# ---- what is measured ------------------------------------------------------------------------------------------


def speed(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of the prompt and of decoding, and seconds per token within MoE blocks."""
    import torch
    from peers_timing import timed_decode
    from transformers import DynamicCache, StaticCache

    prompt = torch.tensor([job["prompt"]])
    compiled = job.get("options", {}).get("compile", False)
    cache = None

    @torch.inference_mode()
    def prefill() -> float:
        nonlocal cache
        if compiled:
            cache = StaticCache(config=model.config, max_cache_len=job["context_tokens"])
        else:
            cache = DynamicCache()
        start = time.perf_counter()
        model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start

    @torch.inference_mode()
    def feed(token: int) -> float:
        ids = torch.tensor([[token]])
        start = time.perf_counter()
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        return time.perf_counter() - start

    prefill()  # makes code, and fills caches
    result = {"prefill_tokens_per_second": prompt.shape[1] / prefill()}
    result |= timed_decode(feed, job)
    if not job["blocks"]:
        return result
    tokens = job["block_steps"]
    times = BlockTimes(model, compiled)
    feed(tokens[0])
    times.reset()
    for token in tokens[1:]:
        feed(token)
    return result | {name: t.seconds / (len(tokens) - 1) for name, t in times.parts.items()}


class Stopwatch:
    def __init__(self) -> None:
        self.seconds = self._begun = 0.0

    def begin(self, *_) -> None:
        self._begun = time.perf_counter()

    def end(self, *_) -> None:
        self.seconds += time.perf_counter() - self._begun


class BlockTimes:
    """Seconds within MoE blocks, and within their experts alone; of compiled steps only the latter."""

    def __init__(self, model: Any, compiled: bool):
        self.parts = {"experts_seconds_per_token": Stopwatch()}
        runtime = getattr(model, "comoe", None)
        if runtime is not None:
            self._around_experts(runtime)
        if not compiled:
            self.parts["moe_seconds_per_token"] = Stopwatch()
            for layer in model.model.layers:
                self._hook(layer.mlp, "moe_seconds_per_token")
                if runtime is None:
                    self._hook(layer.mlp.experts, "experts_seconds_per_token")

    def _hook(self, module: Any, part: str) -> None:
        module.register_forward_pre_hook(self.parts[part].begin)
        module.register_forward_hook(self.parts[part].end)

    def _around_experts(self, runtime: Any) -> None:
        watch, forward = self.parts["experts_seconds_per_token"], runtime.experts_forward

        def timed(*args):
            watch.begin()
            out = forward(*args)
            watch.end()
            return out

        runtime.experts_forward = timed

    def reset(self) -> None:
        for watch in self.parts.values():
            watch.seconds = 0.0


def perplexity(model: Any, job: dict[str, Any]) -> float:
    from comoe.evaluate import plan_windows, score

    ids = job["text_ids"]
    scored = score(model, ids, plan_windows(len(ids), job["window"], job["context"]))
    return math.exp(scored.nats / scored.tokens)


if __name__ == "__main__":
    main()
