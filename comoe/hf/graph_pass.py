"""Changes the graph of a compiled decode step: products go to the native kernels.

- coded_linear of one input (q, k and v; gate and up) become one coded_linears;
- mm and addmm of at most MOST_ROWS rows with a large weight become dense_linear.
"""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from comoe_kernels.dense_linear import MOST_ROWS

# Weights of a product from which the native one is worth a call: a router's 65,536 took torch 140 us in
# a step of a cold cache, and the native kernel 20.
LARGE = 1 << 14


def _value(node: object) -> torch.Tensor | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def join_coded(graph: fx.Graph) -> None:
    """One op for all coded_linear of one x and one number of bits."""
    groups: dict[tuple, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target is torch.ops.comoe.coded_linear.default:
            x, _, _, _, bits = node.args
            groups.setdefault((x, bits), []).append(node)
    order = {node: number for number, node in enumerate(graph.nodes)}
    for (x, bits), nodes in groups.items():
        first = nodes[0]
        # Where the first stands, the others' records must be known: they are inputs of the graph.
        ready = [n for n in nodes if all(order[i] < order[first] for i in n.all_input_nodes)]
        if len(ready) < 2:
            continue
        with graph.inserting_before(first):
            records, biases, rows = zip(*(n.args[1:4] for n in ready), strict=True)
            joined = graph.call_function(
                torch.ops.comoe.coded_linears.default,
                (x, list(records), list(biases), list(rows), bits),
            )
            joined.meta["val"] = [n.meta["val"] for n in ready]
            for i, node in enumerate(ready):
                part = graph.call_function(getitem, (joined, i))
                part.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(part)
        for node in ready:
            graph.erase_node(node)


def _transposed_weight(node: object) -> fx.Node | None:
    """W of W.T, if that is what `node` is."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is torch.ops.aten.t.default:
        return node.args[0]
    if node.target is torch.ops.aten.permute.default and list(node.args[1]) == [1, 0]:
        return node.args[0]
    return None


def use_dense_linear(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.mm.default:
            (x, transposed), bias = node.args, None
        elif node.target is torch.ops.aten.addmm.default and not node.kwargs:
            bias, x, transposed = node.args
        else:
            continue
        weight = _transposed_weight(transposed)
        left, right, added = _value(x), _value(weight), _value(bias)
        if left is None or right is None or right.device.type != "cpu":
            continue
        if left.shape[0] > MOST_ROWS or right.numel() < LARGE or not right.is_contiguous():
            continue
        if bias is not None and (added is None or added.dim() != 1 or added.dtype != right.dtype):
            continue
        with graph.inserting_before(node):
            new = graph.call_function(torch.ops.comoe.dense_linear.default, (x, weight, bias))
            new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)
        graph.erase_node(node)


class DecodePass(CustomGraphPass):
    """For torch.compile's option post_grad_custom_pre_pass."""

    def __call__(self, graph: fx.Graph) -> None:
        join_coded(graph)
        use_dense_linear(graph)

    def uuid(self) -> bytes:
        # Compiled graphs are kept on disk under this name.
        return get_hash_for_files((__file__,))
