"""Plain transformers on a packed folder: loading, generating, and what cannot be done."""

from __future__ import annotations

import gc
import json
import shutil

import moe_families
import pytest
import torch
from test_families import eager_results, few_threads, logits  # noqa: F401
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import comoe
from comoe.hf.blocks import discover
from comoe.hf.quantizer import CoMoEQuantizationConfig, register
from comoe.packing import pack

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer")
FAMILIES = ("mixtral", "gpt_oss", "deepseek_v3", "switch_transformers", "jamba", "llama4", "dbrx")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Maker of (source, packed) folders of a family, made once."""
    root = tmp_path_factory.mktemp("families")

    def folder(family):
        if not (root / family).exists():
            model = moe_families.build(family)
            model.generation_config.pad_token_id = 0
            model.save_pretrained(root / family / "src")
            pack(root / family / "src", root / family / "dst")
        return root / family / "src", root / family / "dst"

    return folder


@pytest.fixture(scope="module")
def mixtral(folders):
    return folders("mixtral")


def eager(src, auto=AutoModelForCausalLM):
    return auto.from_pretrained(src, experts_implementation="eager")


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained(family, folders):
    src, dst = folders(family)
    comoe.register()
    auto = AutoModelForSeq2SeqLM if family == "switch_transformers" else AutoModelForCausalLM
    want = eager_results(auto, lambda: logits(eager(src, auto)))
    model, info = auto.from_pretrained(dst, output_loading_info=True)
    assert not any(info.values()), info
    names = [name for block in discover_stripped(model) for name in block]
    assert names == []
    # Without a budget every expert is resident, but not at once: exact is not asked for here.
    model.comoe.close()
    model = comoe.load(dst, memory="1GB", exact=True)
    assert type(model) is type(eager(src, auto))
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-4)
    model.comoe.close()


def discover_stripped(model):
    """Parameters that are left in each experts module (a norm may be, weights may not)."""
    for name, module in model.named_modules():
        if hasattr(module, "_comoe"):
            yield [f"{name}.{n}" for n, p in module.named_parameters() if p.dim() > 1]


def test_generate_as_transformers_does(mixtral):
    src, dst = mixtral
    plain, model = eager(src), comoe.load(dst, memory="1GB", exact=True)
    ids = torch.randint(3, 130, (3, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for options in (
        {"do_sample": False},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": True, "top_k": 5},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "cache_implementation": "static"},
    ):
        tokens = []
        for m in (plain, model):
            torch.manual_seed(3)
            tokens.append(m.generate(ids, attention_mask=mask, max_new_tokens=6, **options))
        assert torch.equal(*tokens), options
    model.comoe.close()


def test_seq2seq_beams(folders):
    src, dst = folders("switch_transformers")
    plain = eager(src, AutoModelForSeq2SeqLM)
    model = comoe.load(dst, memory="1GB", exact=True)
    ids = torch.randint(3, 130, (2, 9), generator=torch.Generator().manual_seed(5))
    options = {"num_beams": 2, "do_sample": False, "max_new_tokens": 6}
    assert torch.equal(plain.generate(ids, **options), model.generate(ids, **options))
    model.comoe.close()


def test_gradients_stop_at_the_experts(mixtral):
    model = comoe.load(mixtral[1], memory="1GB", exact=True)
    out = model(torch.tensor([[5, 6, 7]])).logits  # without no_grad
    assert torch.isfinite(out).all()
    model.comoe.close()


def test_register_twice():
    register()
    register()
    comoe.register()
    assert "comoe" in ALL_EXPERTS_FUNCTIONS


def test_other_models_are_left_alone(mixtral):
    """A config shared by two models must not carry one's runtime to the other."""
    src, _ = mixtral
    config = eager(src).config
    torch.manual_seed(0)
    first = AutoModelForCausalLM.from_config(config).eval()
    second = AutoModelForCausalLM.from_config(config).eval()
    want = logits(second)
    comoe.offload(first, memory="1GB", exact=True)
    torch.testing.assert_close(logits(second), want, rtol=0, atol=1e-5)
    assert config._experts_implementation != "comoe"
    first.comoe.close()


def test_experts_function_without_a_runtime(mixtral):
    comoe.register()
    model = AutoModelForCausalLM.from_pretrained(mixtral[0], experts_implementation="comoe")
    with pytest.raises(RuntimeError, match=r"no comoe runtime is attached.*comoe\.load"):
        logits(model)


def test_closed_runtime(mixtral):
    model = comoe.load(mixtral[1], memory="1GB")
    model.comoe.close()
    model.comoe.close()
    with pytest.raises(RuntimeError, match="closed"):
        logits(model)


def test_saving_is_refused(mixtral, tmp_path):
    model = comoe.load(mixtral[1], memory="1GB")
    with pytest.raises(RuntimeError, match=r"save_pretrained: the expert weights.*copy the folder"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model.comoe.close()


def test_store_missing(mixtral, tmp_path):
    comoe.register()
    dst = shutil.copytree(mixtral[1], tmp_path / "dst", ignore=shutil.ignore_patterns("experts"))
    with pytest.raises(FileNotFoundError, match=r"no folder 'experts'.*comoe\.load"):
        AutoModelForCausalLM.from_pretrained(dst)


def test_store_of_another_model(folders, tmp_path):
    dst = shutil.copytree(folders("mixtral")[1], tmp_path / "dst")
    shutil.rmtree(dst / "experts")
    shutil.copytree(folders("gpt_oss")[1] / "experts", dst / "experts")
    with pytest.raises(ValueError, match="belongs to another model"):
        comoe.load(dst, memory="1GB")


def test_other_devices_are_refused(mixtral):
    comoe.register()
    with pytest.raises(ValueError, match="comoe computes on the CPU"):
        AutoModelForCausalLM.from_pretrained(mixtral[1], device_map={"": "meta"})


def test_unknown_fields_of_the_config():
    with pytest.raises(ValueError, match=r"unknown fields \['bits'\]"):
        CoMoEQuantizationConfig(bits=4)
    with pytest.raises(ValueError, match="format 2"):
        CoMoEQuantizationConfig(format=2)


def test_config_of_a_loaded_model_is_clean(mixtral):
    """The options of one load are not written into a config that is saved later."""
    model = comoe.load(mixtral[1], memory="1GB")
    saved = json.loads(model.config.to_json_string())["quantization_config"]
    assert saved == {"quant_method": "comoe", "format": 1, "options": {}}
    model.comoe.close()


def test_offload_keeps_the_model_when_the_disk_is_full(mixtral, monkeypatch):
    from comoe.store import StoreError, StoreWriter

    model = eager(mixtral[0])
    want = logits(model)

    def full(*args, **kwargs):
        raise StoreError("disk full")

    monkeypatch.setattr(StoreWriter, "finish", full)
    with pytest.raises(StoreError):
        comoe.offload(model, memory="1GB")
    assert torch.equal(logits(model), want)


def test_offload_removes_its_folder(mixtral):
    model = comoe.offload(eager(mixtral[0]), memory="1GB")
    folder = model.comoe.store.folder.parent
    assert folder.exists()
    model.comoe.close()
    assert not folder.exists()
    model = comoe.offload(eager(mixtral[0]), memory="1GB")
    folder = model.comoe.store.folder.parent
    del model
    gc.collect()
    assert not folder.exists()


def test_offload_to_a_given_folder(mixtral, tmp_path):
    model = comoe.offload(eager(mixtral[0]), memory="1GB", folder=tmp_path)
    model.comoe.close()
    assert (tmp_path / "experts" / "manifest.json").exists()


def test_offload_of_a_dense_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=32)
    with pytest.raises(ValueError, match="not a Mixture-of-Experts model"):
        comoe.offload(LlamaForCausalLM(config), memory="1GB")


def test_offload_twice(mixtral):
    model = comoe.offload(eager(mixtral[0]), memory="1GB")
    with pytest.raises(ValueError, match="already"):
        comoe.offload(model, memory="1GB")
    model.comoe.close()


def test_discover_is_the_same_on_meta():
    model = moe_families.build("gpt_oss")
    meta = moe_families.build_meta("gpt_oss")
    for a, b in zip(discover(model), discover(meta), strict=True):
        for field in (
            "name",
            "num_experts",
            "hidden",
            "intermediate",
            "gated",
            "biased",
            "activation",
        ):
            assert getattr(a.spec, field) == getattr(b.spec, field)
        assert (a.spec.alpha, a.spec.limit) == (b.spec.alpha, b.spec.limit) == (1.702, 7.0)
