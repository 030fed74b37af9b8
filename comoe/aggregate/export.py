"""Writes a merged model as a plain transformers checkpoint with fewer experts.

The router gets one row per group. A softmax router gives a group the sum of its members' probabilities when
the group's logit is log(sum(exp(members' logits))); a row has no such freedom, so it is the linear function of
the layer's inputs that comes nearest to it on the calibration rows. Other per-expert vectors (biases that
only choose) become their members' means. An architecture that this cannot express is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comoe.aggregate.calibration import LayerRecord
from comoe.aggregate.errors import AggregateError
from comoe.aggregate.experts import ExpertWeights
from comoe.aggregate.merging import Merge, members
from comoe.aggregate.published import published

COUNT_FIELDS = (  # how configurations name E
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_moe_experts",
)
RIDGE = 1e-3  # towards the members' mean row, in units of the inputs' mean square
MAX_ROWS = 16_384  # of calibration, for one router


def export(
    packed: str | os.PathLike,
    merges: Sequence[Merge],
    records: Sequence[LayerRecord],
    out: str | os.PathLike,
    *,
    memory: str | int | None = None,
) -> Path:
    """Writes the new folder `out`, layer by layer, and returns it; `AutoModel...from_pretrained(out)` loads it.

    merges, records: of every layer (comoe.aggregate.merging, Calibration.layer). memory: as for comoe.load,
    since the dense weights are read through a loaded model.

    Raises AggregateError for an architecture without such a checkpoint: layers that keep different numbers of
    experts, experts chosen in groups, or routers that are not one linear layer.
    """
    import comoe
    from comoe.hf.blocks import discover
    from comoe.hf.checkpoint import meta_model, read_config

    packed, out = Path(packed), Path(os.path.abspath(out))
    if out.exists():
        raise AggregateError(f"export: {out} exists; choose another folder")
    weights = ExpertWeights.open(packed)
    config = read_config(packed)
    _reduce(config, merges, packed)
    smaller = meta_model(config)
    blocks = discover(smaller)
    _check_shapes(smaller, blocks, weights, merges)

    with published(out, "export") as part:
        _copy_small_files(packed, part)
        model = comoe.load(packed, memory=memory, exact=True)
        try:
            dense = _dense(model, smaller, blocks, merges, records)
        finally:
            model.comoe.close()
        _write(part, dense, blocks, weights, merges)
        config.save_pretrained(part)
    return out


def _reduce(config: Any, merges: Sequence[Merge], packed: Path) -> None:
    """Sets the number of experts in `config`, and takes comoe's own entry out."""
    counts = {len(merge.experts) for merge in merges}
    if len(counts) != 1:
        raise AggregateError(
            f"export: layers keep {sorted(counts)} experts, but a transformers config has one number for all; "
            "use a method with the same number in every layer, such as hc-smoe"
        )
    text, (count,) = config.get_text_config(), counts
    fields = [name for name in COUNT_FIELDS if isinstance(getattr(text, name, None), int)]
    if not fields:
        raise AggregateError(
            f"export: {type(config).__name__} does not say how many experts it has in any of {COUNT_FIELDS}; "
            "the packed store can be merged, a plain checkpoint cannot be written"
        )
    if (getattr(text, "n_group", None) or 1) > 1:
        raise AggregateError(
            f"export: {type(config).__name__} chooses experts in {text.n_group} groups of equal size, which merged "
            "experts do not have; the packed store can be merged, a plain checkpoint cannot be written"
        )
    for name in fields:
        setattr(text, name, count)
    k = getattr(text, "num_experts_per_tok", None)
    if isinstance(k, int) and k > count:
        raise AggregateError(
            f"export: a token uses {k} experts, but only {count} would be left; keep at least {k}"
        )
    del config.quantization_config


def _check_shapes(
    smaller: Any, blocks: Sequence[Any], weights: ExpertWeights, merges: Sequence[Merge]
) -> None:
    have = [(b.name, b.spec.num_experts) for b in blocks]
    want = [(s.name, len(m.experts)) for s, m in zip(weights.specs, merges, strict=True)]
    if have != want:
        raise AggregateError(
            f"export: {type(smaller).__name__} with the new number of experts has layers {have}, expected {want}"
        )


def _copy_small_files(packed: Path, part: Path) -> None:
    for path in packed.iterdir():
        weights = path.suffix == ".safetensors" or path.name.endswith(".index.json")
        if path.is_file() and not path.name.startswith(".") and not weights:
            shutil.copyfile(path, part / path.name)


def _dense(
    model: Any,
    smaller: Any,
    blocks: Sequence[Any],
    merges: Sequence[Merge],
    records: Sequence[LayerRecord],
) -> dict[str, torch.Tensor]:
    """All tensors that are not experts', those of routers reduced."""
    experts = {f"{b.name}.{n}" for b in blocks for n in b.parameter_names}
    shapes = {name: t.shape for name, t in smaller.state_dict().items() if name not in experts}
    found, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if name not in shapes or tensor.data_ptr() in seen:
            continue  # tied tensors are kept once
        if tensor.numel():
            seen.add(tensor.data_ptr())
        if tensor.shape != shapes[name]:
            layer = _owner(name, blocks)
            tensor = _reduced(name, tensor, merges[layer], records[layer], shapes[name])
        found[name] = tensor
    return found


def _owner(name: str, blocks: Sequence[Any]) -> int:
    """The layer whose experts lie beside the tensor."""
    for layer, block in enumerate(blocks):
        if name.startswith(block.name.rpartition(".")[0] + "."):
            return layer
    raise AggregateError(f"export: {name} depends on the number of experts, but lies beside none")


def _reduced(
    name: str, tensor: torch.Tensor, merge: Merge, record: LayerRecord, shape: torch.Size
) -> torch.Tensor:
    groups = members(merge.groups)
    if tensor.shape[0] != len(merge.groups) or shape[0] != len(groups) or tensor.dim() > 2:
        raise AggregateError(
            f"export: {name} has shape {tuple(tensor.shape)} and would need {tuple(shape)}, which is no router's "
            "that is understood; the packed store can be merged, a plain checkpoint cannot be written"
        )
    whole = tensor.float()
    mean = torch.stack([whole[torch.from_numpy(g)].mean(0) for g in groups])
    if tensor.dim() == 1:
        return mean.to(tensor.dtype)
    return router_rows(whole, mean, groups, record.inputs).to(tensor.dtype)


def router_rows(
    router: torch.Tensor, mean: torch.Tensor, groups: Sequence[np.ndarray], inputs: torch.Tensor
) -> torch.Tensor:
    """[G, H]: the rows R of least sum over inputs x of (R x - log sum exp of the group's logits)^2, drawn to
    the members' mean. router [E, H], mean [G, H], inputs [N, H]."""
    step = max(1, len(inputs) // MAX_ROWS)
    x = inputs[::step].float()
    logits = x @ router.T
    target = torch.stack([logits[:, torch.from_numpy(g)].logsumexp(1) for g in groups], 1)
    # One number added to all logits changes nothing, so none need be spent on their mean.
    missing = target - x @ mean.T
    missing = (missing - missing.mean(1, keepdim=True)).double()
    gram = x.double().T @ x.double()
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()) + 1e-30)
    return mean + torch.linalg.solve(gram, x.double().T @ missing).T.float()


def _write(
    part: Path,
    dense: dict[str, torch.Tensor],
    blocks: Sequence[Any],
    weights: ExpertWeights,
    merges: Sequence[Merge],
) -> None:
    from comoe.hf.layouts import Expert
    from comoe.hf.safetensors_io import write_file

    count, total, places = 1 + len(blocks), 0, {}

    def write(number: int, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        write_file(part / name, [(n, t.contiguous()) for n, t in tensors.items()])
        places.update(dict.fromkeys(tensors, name))
        total += sum(t.nbytes for t in tensors.values())

    write(0, dense)
    for layer, (block, merge) in enumerate(zip(blocks, merges, strict=True)):
        dtype = weights.dtype(layer)
        experts = [
            Expert(tuple(m.to(dtype) for m in e.matrices), tuple(b.to(dtype) for b in e.biases))
            for e in merge.experts
        ]
        tensors = block.assemble(experts)
        write(layer + 1, {f"{block.name}.{name}": tensor for name, tensor in tensors.items()})
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
