"""Reading checkpoint folders: every layer as transformers would load it, and clear errors for bad ones."""

from __future__ import annotations

import json
import shutil

import moe_families
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from comoe.hf.blocks import UnsupportedModelError, discover
from comoe.hf.checkpoint import Checkpoint
from comoe.hf.safetensors_io import CheckpointError, TensorEntry, read_header, write_file


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A Mixtral of three shards."""
    folder = tmp_path_factory.mktemp("mixtral")
    moe_families.build("mixtral", torch.bfloat16).save_pretrained(folder, max_shard_size="500KB")
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    return folder


@pytest.fixture
def copy(mixtral, tmp_path):
    return shutil.copytree(mixtral, tmp_path / "copy")


@pytest.fixture
def single(tmp_path):
    """A Mixtral in one file."""
    moe_families.build("mixtral", torch.bfloat16).save_pretrained(tmp_path / "single")
    return tmp_path / "single"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "family", ["mixtral", "gpt_oss", "switch_transformers", "nllb_moe", "ernie4_5_vl_moe", "dbrx"]
)
def test_blocks_are_the_models_own_bits(family, dtype, tmp_path):
    model = moe_families.build(family).to(dtype)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    blocks = discover(model)
    assert [b.name for b in checkpoint.blocks] == [b.name for b in blocks]
    for i, block in reversed(list(enumerate(blocks))):  # any order, as a resumed pack needs
        assert checkpoint.block_dtype(i) == dtype
        tensors = checkpoint.load_block(i)
        for name in block.parameter_names:
            assert tensors[name].dtype == dtype
            assert torch.equal(tensors[name], block.module.get_parameter(name))
    experts = {f"{b.name}.{n}" for b in blocks for n in b.parameter_names}
    assert not any(t.device.type != "meta" for t in checkpoint.model.parameters())
    assert (
        checkpoint.dense_bytes
        < sum(p.nbytes for n, p in model.named_parameters() if n not in experts)
        + sum(b.nbytes for b in model.buffers())
        + 1
    )


def test_reads_one_block_at_a_time(mixtral, monkeypatch):
    checkpoint = Checkpoint(mixtral)
    read = []
    original = TensorEntry.read
    monkeypatch.setattr(
        TensorEntry, "read", lambda self: (read.append(self.name), original(self))[1]
    )
    checkpoint.load_block(2)
    assert len(read) == 3 * 8
    assert all(name.startswith("model.layers.2.") for name in read)


def test_tensor_unknown_to_the_model_is_left_out(single):
    path = single / "model.safetensors"
    save_file({**load_file(path), "model.layers.9.mtp.weight": torch.zeros(3)}, path)
    assert Checkpoint(single).unused == ["model.layers.9.mtp.weight"]


def test_wider_of_two_types_is_kept(tmp_path):
    moe_families.build("gpt_oss", torch.bfloat16).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    biases = [n for n in tensors if n.endswith("experts.down_proj_bias")]
    save_file({n: t.float() if n in biases else t for n, t in tensors.items()}, path)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.block_dtype(0) == torch.float32
    assert {t.dtype for t in checkpoint.load_block(0).values()} == {torch.float32}


def test_fingerprint_follows_the_files(copy):
    before = Checkpoint(copy).fingerprint()
    assert Checkpoint(copy).fingerprint() == before
    shard = next(copy.glob("model-*.safetensors"))
    shard.write_bytes(shard.read_bytes())
    assert Checkpoint(copy).fingerprint() != before


# ---- what is wrong with a folder ------------------------------------------------------------------


def fails(folder, match, error=CheckpointError):
    with pytest.raises(error, match=match):
        Checkpoint(folder)


def test_no_folder(tmp_path):
    fails(tmp_path / "none", "not a folder")


def test_no_config(copy):
    (copy / "config.json").unlink()
    fails(copy, r"no config\.json")


def test_config_is_not_json(copy):
    (copy / "config.json").write_text("{")
    fails(copy, "cannot be read")


def test_no_weights(copy):
    for path in copy.glob("model*"):
        path.unlink()
    fails(copy, r"no model\.safetensors")
    (copy / "pytorch_model.bin").write_bytes(b"x")
    fails(copy, "save the model again")


def test_missing_shard(copy):
    sorted(copy.glob("model-*.safetensors"))[1].unlink()
    fails(copy, r"1 of \d shards missing: model-00002-of-")


def test_missing_index(copy):
    (copy / "model.safetensors.index.json").unlink()
    fails(copy, r"index\.json is missing")


def test_tensor_missing_in_shard(copy):
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.0.lost"] = "model-00001-of-00003.safetensors"
    index["weight_map"]["model.layers.0.lost"] = sorted(copy.glob("model-*.safetensors"))[0].name
    path.write_text(json.dumps(index))
    fails(copy, r"1 tensors are not in the shards it names, e\.g\. model\.layers\.0\.lost")


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": 3}'])
def test_damaged_index(copy, text):
    (copy / "model.safetensors.index.json").write_text(text)
    fails(copy, "not an index of shards")


def test_index_may_not_leave_the_folder(copy):
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["x"] = "../other.safetensors"
    path.write_text(json.dumps(index))
    fails(copy, "not a plain file name")


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_truncated_shard(single, cut):
    path = single / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    fails(single, "not a whole safetensors file")


def test_hostile_header(single):
    path = single / "model.safetensors"
    for header in (
        b"\xff\xfe",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 99]}}',
        b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
    ):
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            read_header(path)
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_header(path)


def test_file_cut_while_it_is_read(single):
    checkpoint = Checkpoint(single)
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-200_000])
    with pytest.raises(CheckpointError, match="cut short"):
        for i in range(len(checkpoint.blocks)):
            checkpoint.load_block(i)


def test_lost_expert(single):
    path = single / "model.safetensors"
    tensors = load_file(path)
    del tensors[next(n for n in tensors if "layers.1." in n and ".experts.5.w2" in n)]
    save_file(tensors, path)
    checkpoint = Checkpoint(single)
    checkpoint.load_block(0)
    with pytest.raises(CheckpointError, match=r"layers\.1\..*checkpoint has \(7, "):
        checkpoint.load_block(1)


def test_layer_without_experts(single):
    path = single / "model.safetensors"
    tensors = {
        n: t for n, t in load_file(path).items() if not ("layers.1." in n and ".experts." in n)
    }
    save_file(tensors, path)
    fails(single, r"no weights for model\.layers\.1\.mlp\.experts\.gate_up_proj \(MixtralExperts\)")


def test_config_of_another_model(single):
    path = single / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "intermediate_size": 96}))
    checkpoint = Checkpoint(single)
    with pytest.raises(CheckpointError, match="does not belong to these weights"):
        checkpoint.load_block(0)


def test_dense_model(tmp_path):
    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=32)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    fails(tmp_path, "not a Mixture-of-Experts model", UnsupportedModelError)


def test_unsupported_family(tmp_path):
    moe_families.build("jetmoe").save_pretrained(tmp_path)
    fails(tmp_path, "JetMoeParallelExperts.*no adapter", UnsupportedModelError)


def test_code_in_the_checkpoint(copy):
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config |= {"model_type": "made_up", "auto_map": {"AutoConfig": "configuration_x.X"}}
    path.write_text(json.dumps(config))
    fails(copy, "'made_up' needs code from the checkpoint", UnsupportedModelError)


def test_unknown_model_type(copy):
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "made_up"}))
    fails(copy, "transformers cannot read it", UnsupportedModelError)


def test_quantised_source(copy):
    path = copy / "config.json"
    quantization = {"quant_method": "gptq", "bits": 4}
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "quantization_config": quantization})
    )
    fails(copy, r"quantised \(gptq\)")


def test_written_files_are_safetensors(tmp_path):
    tensors = {
        "a": torch.arange(7, dtype=torch.int64),
        "b": torch.randn(3, 5).bfloat16(),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }
    write_file(tmp_path / "x.safetensors", tensors.items())
    loaded = load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[n], t) for n, t in tensors.items())
    entries = read_header(tmp_path / "x.safetensors")
    write_file(tmp_path / "y.safetensors", entries.items())
    assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()
    assert all(torch.equal(entries[n].read(), t) for n, t in tensors.items())
