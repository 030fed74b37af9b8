"""Compiled decode steps: the same tokens, one graph, and everything that goes on between tokens."""

import shutil
import warnings

import pytest
import torch
from tiny_lm import qwen3_moe

import comoe
import comoe_kernels.attend as attention
import comoe_kernels.coded_linear as coded
from comoe.hf.compiled import CompiledDecode, is_static

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler",
)
MEMORY = "900MB"


@pytest.fixture(scope="module")
def models():
    """The same model twice, plain and compiled; its dense layers coded, so that these are in the graph."""
    pair = []
    for compiled in (False, True):
        model = qwen3_moe(hidden_size=128, head_dim=64, num_key_value_heads=1, num_experts=8)
        pair.append(comoe.offload(model, MEMORY, dense="bits8", compile=compiled))
    yield pair
    for model in pair:
        model.comoe.close()


def generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, **options)


@pytest.fixture
def graphs():
    """Graphs compiled so far, and no break among them."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    yield counters
    assert not counters["graph_break"]


def test_same_tokens_in_one_graph_with_padding_and_batches(models, graphs):
    plain, compiled = models
    assert isinstance(compiled.forward, CompiledDecode)
    steps = compiled.comoe._step
    threads = torch.get_num_threads()
    ids = torch.arange(1, 10)[None] * 11 % 257
    assert torch.equal(generate(plain, ids), generate(compiled, ids))
    assert graphs["stats"]["unique_graphs"] == 1
    assert compiled.comoe._step - steps == 12  # every pass was announced, compiled ones too
    assert torch.get_num_threads() == threads
    assert not compiled.forward.failed
    two = torch.stack([ids[0], ids[0].flip(0)])
    mask = torch.ones_like(two)
    mask[1, :4] = 0
    want = generate(plain, two, attention_mask=mask)
    assert torch.equal(want, generate(compiled, two, attention_mask=mask))
    assert not compiled.forward.failed


def test_the_graph_joins_coded_layers_and_uses_the_native_attention(models):
    _, compiled = models
    ids = torch.arange(1, 10)[None]
    generate(compiled, ids)  # compiled for this length now
    cache = generate(compiled, ids, return_dict_in_generate=True).past_key_values
    assert is_static(cache)
    counted = []

    class Counting:
        def __init__(self, module):
            self.module = module

        def __getattr__(self, name):
            if name == "attend":
                counted.append("attend")
            return getattr(self.module, name)

        def coded_linear(self, targets, *rest):
            counted.append(len(targets))
            return self.module.coded_linear(targets, *rest)

    native = attention._C
    attention._C = coded._C = Counting(native)
    try:
        generate(compiled, ids)
    finally:
        attention._C = coded._C = native
    layers = compiled.config.num_hidden_layers
    assert counted.count("attend") == 11 * layers
    assert counted.count(3) == 11 * layers  # q, k and v


def test_memory_changes_between_tokens(models):
    plain, compiled = models
    ids = torch.arange(30, 40)[None]
    sizes = iter(["700MB", "1.2GB"] * 6)

    class Change:
        def put(self, value):
            compiled.comoe.set_memory(next(sizes, "900MB"))

        def end(self):
            pass

    assert torch.equal(generate(plain, ids), generate(compiled, ids, streamer=Change()))


def test_other_passes_and_closed_models(models):
    plain, compiled = models
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        assert torch.equal(plain(ids).logits, compiled(ids).logits)
    want = generate(plain, ids, cache_implementation="dynamic")
    assert torch.equal(want, generate(compiled, ids, cache_implementation="dynamic"))


def test_without_a_compiler_it_says_so_and_runs(monkeypatch):
    import comoe.hf.compiled as module

    def none():
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(module, "get_cpp_compiler", none)
    model = qwen3_moe()
    with pytest.warns(UserWarning, match=r"found no C\+\+ compiler .*; running without"):
        comoe.offload(model, "300MB", compile=True)
    assert generate(model, torch.arange(1, 5)[None]).shape == (1, 16)
    model.comoe.close()


def test_what_the_compiler_cannot_take_runs_without(monkeypatch):
    model = comoe.offload(qwen3_moe(), "300MB", compile=True)
    step = model.forward

    def refuse(*args, **kwargs):
        raise torch._dynamo.exc.Unsupported("something new")

    monkeypatch.setattr(step, "compiled", refuse)
    with pytest.warns(UserWarning, match=r"cannot take this model \(something new\)"):
        generate(model, torch.arange(1, 5)[None])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        generate(model, torch.arange(1, 5)[None])
    model.comoe.close()
