"""Every MoE family of the installed transformers gives eager's results with comoe under its experts.

docs/families.md is written from the same list: `python tests/test_families.py --write-docs`.
"""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path

import moe_families
import pytest
import torch
import transformers
from packaging.version import Version

import comoe
from comoe.hf.blocks import UnsupportedModelError, discover
from comoe.hf.layouts import InterfaceLayout
from comoe.hf.quantized import FP8_SINCE
from comoe.hf.routers import find_gate
from comoe.hf.sizes import experts_per_token

DOCS = Path(__file__).parents[1] / "docs" / "families.md"
FAMILIES = moe_families.families()
# The tiny configurations are made for this version; under another, a family on which eager itself fails
# is skipped.
VERSION = re.search(r"for transformers (\S+);", DOCS.read_text())[1] if DOCS.exists() else ""
NEW_TOKENS = 5
# Models on which eager's own float32 run is 1e-4 from its float64 run: another draw of weights.
SEEDS = {"qwen3_next": 1}
# The first minor version of transformers with which a family works, where that is not the oldest that
# comoe takes: found by running discover() under each. DBRX's own router was wrong before.
OLDEST = "5.7"
SINCE = {
    "aria": "5.18",
    "axk1": "5.15",
    "axk2": "5.15",
    "bailing_hybrid": "5.20",
    "beam": "5.21",
    "cohere2_moe": "5.9",
    "dbrx": "5.15",
    "deepseek_ocr2": "5.10",
    "deepseek_v32": "5.11",
    "deepseek_v4": "5.8",
    "diffusion_gemma": "5.15",
    "dots3_note": "5.23",
    "flint": "5.21",
    "glm5_next": "5.17",
    "granitemoe": "5.13",
    "granitemoe_swa": "5.15",
    "granitemoehybrid": "5.13",
    "granitemoeshared": "5.13",
    "hy_v4": "5.17",
    "inkling": "5.14",
    "inkling2": "5.23",
    "kimi_linear": "5.17",
    "kolibri1": "5.20",
    "mellum": "5.10",
    "mimo_v2_flash": "5.13",
    "minimax_m3_vl": "5.12",
    "mistral_large4": "5.22",
    "muse_spark": "5.20",
    "qwen4_exp": "5.16",
    "step3p7": "5.16",
    "unlimited_ocr": "5.20",
    "zaya": "5.13",
}
NOTES = {
    "nllb_moe": "transformers 5.23 runs experts 0 and 1 whatever the router says; comoe gives the same",
}


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompt(model) -> dict[str, torch.Tensor]:
    """Two rows, the second left-padded by three tokens."""
    ids = torch.randint(3, 130, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    ids[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Logits (or last hidden states) at the positions that are not padding."""
    inputs = prompt(model)
    keep = inputs["attention_mask"].bool()
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, 3:]
        keep = keep[:, 3:]
    out = model(**inputs, use_cache=False)
    out = out.logits if hasattr(out, "logits") else out[0]
    return out[keep].float()


@torch.no_grad()
def greedy(model) -> torch.Tensor | None:
    """New tokens of both rows; None for a model that does not generate."""
    if not model.can_generate():
        return None
    return model.generate(
        **prompt(model), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )


def eager_results(model, run):
    try:
        return run()
    except Exception as error:
        if transformers.__version__ == VERSION:
            raise
        pytest.skip(
            f"eager {type(model).__name__} of transformers {transformers.__version__}: {error}"
        )


@contextlib.contextmanager
def taken_over(model):
    """`model` on its exact weights in comoe's store."""
    comoe.offload(model, memory="4GB", exact=True)
    try:
        yield model
    finally:
        model.comoe.close()


def supported(family: str) -> bool:
    return why_not(family) is None


def why_not(family: str) -> str | None:
    """The reason why a family cannot work, in the words of the error its users get."""
    try:
        discover(moe_families.build_meta(family))
    except UnsupportedModelError as error:
        return str(error)
    return None


@pytest.mark.parametrize("family", FAMILIES)
def test_same_as_eager(family):
    reason = why_not(family)
    if reason is not None:
        pytest.skip(f"listed in docs/families.md: {reason}")
    seed = SEEDS.get(family, 0)
    model = moe_families.build(family, seed=seed)
    want, want_tokens = eager_results(model, lambda: (logits(model), greedy(model)))
    assert want.abs().max() > 0.05, "a model of nothing proves nothing"
    with taken_over(model):
        torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-4)
        if want_tokens is not None:
            assert torch.equal(greedy(model), want_tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_no_further_from_fp32_than_eager(family):
    if not supported(family):
        pytest.skip("listed in docs/families.md")
    # Rounding may flip an expert at a near tie in a router, which moves logits far more than it moves
    # the experts' results (transformers' own implementations part there, too): another draw is taken.
    for seed in range(8):
        ours, theirs, same_routing = errors(family, seed)
        if same_routing:
            assert ours <= 2 * theirs + 5e-6, f"rms error {ours:.2e}, eager's own {theirs:.2e}"
            return
    pytest.fail("in eight draws of weights the routing was never eager's")


def errors(family: str, seed: int) -> tuple[float, float, bool]:
    """Rms distance to eager's float32 run of comoe and of eager in bf16, and whether both route alike."""
    model = moe_families.build(family, torch.bfloat16, seed=seed)
    eager, eager_routes = eager_results(model, lambda: routed_logits(model))
    with taken_over(model):
        got, routes = routed_logits(model)
    model = moe_families.build(family, torch.bfloat16, seed=seed).float()
    want = logits(model)
    same = all(torch.equal(a, b) for a, b in zip(routes, eager_routes, strict=True))
    ours, theirs = ((x - want).square().mean().sqrt().item() for x in (got, eager))
    return ours, theirs, same


def routed_logits(model) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and what each call of an experts module was told of the routing."""
    routes = []

    def note(module, args):
        told = args[1].sort(-1).values if len(args) > 1 else args[0].ne(0).any(-1)
        routes.append(told)

    experts = [m for m in model.modules() if hasattr(m, "_comoe")]
    experts = experts or [block.module for block in discover(model)]
    hooks = [module.register_forward_pre_hook(note) for module in experts]
    try:
        return logits(model), routes
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_canonical_matrices_rebuild_the_tensors(family):
    if not supported(family):
        pytest.skip("listed in docs/families.md")
    for block in discover(moe_families.build(family)):
        rebuilt = block.assemble(list(block.experts()))
        assert set(rebuilt) == set(block.parameter_names)
        for name, tensor in rebuilt.items():
            original = block.module.get_parameter(name)[: len(tensor)]
            read = slice(None)
            if family == "longcat_flash" and name == "gate_up_proj":
                read = slice(
                    block.spec.num_experts
                )  # the rows of identity experts are read by nothing
            assert torch.equal(tensor[read], original[read]), f"{block.name}.{name}"


def promised() -> dict[str, str]:
    """family -> the oldest transformers, of the families that docs/families.md says work."""
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {row[0]: row[3] for row in cells if row[2] in ("interface", "adapter")}


@pytest.mark.parametrize("family", FAMILIES)
def test_works_since(family):
    oldest = promised().get(family)
    if oldest is None or Version(transformers.__version__) < Version(oldest):
        pytest.skip(f"docs/families.md: needs transformers {oldest}" if oldest else "not promised")
    assert why_not(family) is None


def rows() -> list[tuple[str, ...]]:
    out = []
    for family in FAMILIES:
        model = moe_families.build(family)
        name = type(model).__name__
        try:
            blocks = discover(model)
        except UnsupportedModelError as error:
            out.append((family, name, "no", "", "", "", re.sub(r"^discover: ", "", str(error))))
            continue
        kinds = dict.fromkeys(block.spec.activation or "its own, in torch" for block in blocks)
        where = ", ".join(kinds)
        if blocks[0].spec.post_norm is not None:
            where += ", then a norm in torch"
        gates = [find_gate(model, block, experts_per_token(model)) for block in blocks]
        call = "interface" if type(blocks[0].layout) is InterfaceLayout else "adapter"
        notes = [NOTES[family]] if family in NOTES else []
        if not model.can_generate():
            notes.append("text stack alone is tested")
        ahead = "yes" if all(gates) else "no"
        oldest = SINCE.get(family, OLDEST)
        out.append((family, name, call, oldest, where, ahead, "; ".join(notes)))
    return out


def document() -> str:
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows())
    return f"""# Model families

Written by `python tests/test_families.py --write-docs` for transformers {transformers.__version__};
a test fails when it is out of date. Every family that transformers has and that holds experts is here.
The test runs a tiny random model of each: with the original weights (`exact`) in float32 the greedy
tokens are those of transformers' eager experts and logits differ by less than 1e-4; in bfloat16 the
distance from the float32 run is at most twice eager's own.

- *experts*: `interface` is transformers' ExpertsInterface, where a new family needs nothing of comoe;
  `adapter` is one of the classes in `comoe/hf/layouts.py`; `no` is a family that cannot work, with the reason.
- *since*: the first transformers with which the family works, of {OLDEST} and later.
- *activation*: the name under which comoe's kernels compute it, or where it runs instead. Activations in
  torch give the same results, more slowly.
- *prefetch*: whether the next layer's router is understood, so that its experts are read ahead.

Whole models are packed from bf16, fp16, fp32, FP8 (`fp8`, e4m3 with scales per block or tensor; transformers {FP8_SINCE} or
later) and MXFP4 (`mxfp4`, as GPT-OSS) checkpoints. Of the last two `exact` holds the experts' own codes and scales, and
computes with the weights that transformers gets with `dequantize=True`, bit for bit; dense weights are
stored dequantised. FP8 experts keep their codes where each block is a multiple of 16 rows and 128 columns or the
whole matrix, in families on the interface that are neither transposed nor interleaved; others are
dequantised to the model's type first, and so are codes of other kinds under `fp8`. Checkpoints of other methods
(GPTQ, AWQ, bitsandbytes and so on) are refused with a message: save a dequantised copy with
transformers first. `exact` then means the bits of that copy.

| family | class tested | experts | since | activation | prefetch | note |
|---|---|---|---|---|---|---|
{body}
"""


def test_docs_are_up_to_date():
    if transformers.__version__ != VERSION:
        pytest.skip(f"docs/families.md is for transformers {VERSION}")
    assert DOCS.read_text() == document(), "run: python tests/test_families.py --write-docs"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write-docs"]:
        sys.exit("usage: python tests/test_families.py --write-docs")
    DOCS.parent.mkdir(exist_ok=True)
    DOCS.write_text(document())
