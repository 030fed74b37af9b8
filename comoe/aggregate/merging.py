"""Merging the experts of one layer: which ones belong together, and what stands for them.

Pure functions on one layer's statistics and weights. Groups are an int array [E]: expert -> group, numbered
from 0 in order of each group's first expert. E experts, S sampled rows, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform

from comoe.aggregate.errors import AggregateError
from comoe.aggregate.experts import Expert, expert_forward, intermediate
from comoe.aggregate.statistics import LayerStatistics

RIDGE = 1e-2  # of the mean of the diagonal, in least squares
HUNGARIAN = 2048  # neurons that are assigned exactly


def renumbered(labels: np.ndarray) -> np.ndarray:
    """The same groups, numbered in order of first appearance."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def members(groups: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(groups == g) for g in range(int(groups.max()) + 1)]


# ---- which experts are alike ------------------------------------------------------------------------


def router_similarity(logits: torch.Tensor) -> np.ndarray:
    """M-SMoE (arXiv 2310.01334): (cos + 1) / 2 between columns of router logits [S, E] -> [E, E]."""
    columns = torch.nn.functional.normalize(logits.float(), dim=0)
    return ((columns.T @ columns + 1) / 2).double().numpy()


def output_distance(outputs: torch.Tensor) -> np.ndarray:
    """HC-SMoE (arXiv 2410.08589): Euclidean distance of mean outputs; outputs [E, S, H] -> [E, E]."""
    return torch.cdist(outputs.mean(1).double(), outputs.mean(1).double()).numpy()


def ream_similarity(logits: torch.Tensor, outputs: torch.Tensor, gates: torch.Tensor) -> np.ndarray:
    """REAM (arXiv 2604.04356): cosine of gate logits [S, E] plus cosine of gated outputs -> [E, E].

    outputs [E, S, H], gates [S, E]: all experts' gates, so a softmax of the logits where the router's own
    are zero but for the chosen.
    """
    columns = torch.nn.functional.normalize(logits.float(), dim=0)
    gram = torch.zeros(outputs.shape[0], outputs.shape[0])
    for f, g in zip(outputs.split(64, 1), gates.split(64), strict=True):
        gated = (f * g.T[..., None]).flatten(1)
        gram += gated @ gated.T
    norms = gram.diagonal().sqrt().clamp_min(1e-30)
    return (columns.T @ columns + gram / norms[:, None] / norms).double().numpy()


def squared_distance(outputs: torch.Tensor, gates: torch.Tensor) -> np.ndarray:
    """[E, E]: mean of ||f_i(x) - f_j(x)||^2 over the sampled tokens that use i or j, weighted by
    (g_i + g_j)^2; over all sampled tokens where none does. outputs [E, S, H], gates [S, E]."""
    num = outputs.shape[0]
    by_token = outputs.transpose(0, 1)  # [S, E, H]
    weighted, weight = torch.zeros(num, num), torch.zeros(num, num)
    plain = torch.zeros(num, num)
    for f, g in zip(by_token.split(64), gates.split(64), strict=True):
        d = torch.cdist(f, f).square()  # [s, E, E]
        w = (g[:, :, None] + g[:, None, :]).square()
        weighted += (w * d).sum(0)
        weight += w.sum(0)
        plain += d.sum(0)
    found = torch.where(weight > 0, weighted / weight.clamp_min(1e-30), plain / len(gates))
    found.fill_diagonal_(0)
    return found.double().numpy()


def gated_cost(gate_moments: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Least gated output error of putting one expert f = a f_i + (1 - a) f_j in the place of i and j.

        E[(g_i + g_j)^2] Var[g_i / (g_i + g_j)] E||f_i - f_j||^2

    with the variance taken under weights (g_i + g_j)^2. With A = E g_i^2, B = E g_j^2, C = E g_i g_j the first
    two factors are (A B - C^2) / (A + B + 2 C): zero if the gates' ratio is constant. gate_moments [E, E],
    distance [E, E] squared -> [E, E], 0 on the diagonal.
    """
    a, b, c = np.diag(gate_moments)[:, None], np.diag(gate_moments)[None, :], gate_moments
    total = a + b + 2 * c
    cost = np.where(total > 0, (a * b - c * c) / np.where(total > 0, total, 1), 0.0) * distance
    np.fill_diagonal(cost, 0)
    return np.maximum(cost, 0)


# ---- groups ------------------------------------------------------------------------------------------


def hc_tree(distance: np.ndarray) -> np.ndarray:
    """HC-SMoE: average linkage of [E, E]; one tree gives every granularity (`cut`)."""
    return linkage(squareform(distance, checks=False), "average")


def cut(tree: np.ndarray, num_groups: int) -> np.ndarray:
    """Groups of a tree of E - 1 merges (scipy's linkage matrix) at exactly `num_groups`."""
    num_experts = len(tree) + 1
    if not 1 <= num_groups <= num_experts:
        raise AggregateError(f"cut: expected 1 to {num_experts} groups, got {num_groups}")
    parent = np.arange(2 * num_experts - 1)
    for step in range(num_experts - num_groups):
        parent[int(tree[step, 0])] = parent[int(tree[step, 1])] = num_experts + step
    labels = np.arange(num_experts)
    while (parent[labels] != labels).any():
        labels = parent[labels]
    return renumbered(labels)


def gated_tree(gate_moments: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Merges again and again the two groups whose union costs least by `gated_cost`.

    A merged group acts as one expert a f_i + (1 - a) f_j with gate g_i + g_j, from which its moments and
    squared distances to others follow exactly; heights are summed costs, so `predicted` reads the loss off.
    """
    num = len(distance)
    moments, d = gate_moments.astype(float).copy(), distance.astype(float).copy()
    alive, numbers, sizes = list(range(num)), list(range(num)), [1] * num
    tree, spent = [], 0.0
    while len(alive) > 1:
        cost = gated_cost(moments[np.ix_(alive, alive)], d[np.ix_(alive, alive)])
        np.fill_diagonal(cost, np.inf)
        p, q = sorted(np.unravel_index(int(cost.argmin()), cost.shape))
        i, j = alive[p], alive[q]
        spent += cost[p, q]
        sizes[i] += sizes[j]
        tree.append([numbers[i], numbers[j], spent, sizes[i]])
        total = moments[i, i] + moments[j, j] + 2 * moments[i, j]
        a = (moments[i, i] + moments[i, j]) / total if total > 0 else 0.5
        d[i] = a * d[i] + (1 - a) * d[j] - a * (1 - a) * d[i, j]
        d[:, i], d[i, i] = d[i], 0.0
        moments[i] += moments[j]
        moments[:, i] += moments[:, j]
        numbers[i] = num + len(tree) - 1
        alive.remove(j)
    return np.array(tree)


def predicted(tree: np.ndarray, num_groups: int) -> float:
    """Gated output error that `gated_tree` expects with so many groups left."""
    merges = len(tree) + 1 - num_groups
    return float(tree[merges - 1, 2]) if merges else 0.0


def natural_count(tree: np.ndarray, energy: float, share: float = 0.01) -> int:
    """The fewest groups whose predicted error is at most `share` of the layer's gated energy."""
    counts = range(1, len(tree) + 2)
    return next(n for n in counts if predicted(tree, n) <= share * energy)


def global_centres(uses: Sequence[np.ndarray], total: int) -> list[np.ndarray]:
    """M-SMoE: the `total` most used experts of all layers are centres (each layer's most used always is), so
    layers keep different numbers. uses: [E] per layer, as shares of the layer's; -> experts per layer."""
    flat = [(-u, layer, e) for layer, use in enumerate(uses) for e, u in enumerate(use)]
    if not len(uses) <= total <= len(flat):
        raise AggregateError(
            f"global_centres: expected {len(uses)} to {len(flat)} centres, got {total}"
        )
    chosen = {(layer, int(np.argmax(use))) for layer, use in enumerate(uses)}
    for _, layer, e in sorted(flat):
        if len(chosen) == total:
            break
        chosen.add((layer, e))
    return [np.array(sorted(e for at, e in chosen if at == layer)) for layer in range(len(uses))]


def groups_around(centres: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    """M-SMoE: every expert joins the centre that it resembles most."""
    nearest = centres[similarity[:, centres].argmax(1)]
    nearest[centres] = centres
    return renumbered(nearest)


def ream_groups(
    similarity: np.ndarray, saliency: np.ndarray, num_groups: int, capacity: int
) -> np.ndarray:
    """REAM: the `num_groups` most salient experts are centres; in order of saliency each absorbs the up to
    `capacity` free experts most like it, until none is left, so that many centres stay single."""
    num = len(saliency)
    if not 1 <= num_groups <= num or num_groups * (capacity + 1) < num:
        raise AggregateError(
            f"ream_groups: expected 1 to {num} groups with room for {num} experts, got {num_groups} groups of "
            f"1 + {capacity}; raise the capacity"
        )
    order = np.argsort(-saliency, kind="stable")
    labels, free = np.full(num, -1), set(order[num_groups:].tolist())
    for centre in order[:num_groups]:
        labels[centre] = centre
        for expert in sorted(free, key=lambda e: -similarity[centre, e])[:capacity]:
            labels[expert] = centre
            free.remove(expert)
    return renumbered(labels)


# ---- one expert for several ---------------------------------------------------------------------------


def permuted(expert: Expert, order: np.ndarray) -> Expert:
    """The same function with its neurons in another order: rows of gate and up, columns of down."""
    index = torch.from_numpy(np.asarray(order)).long()
    *firsts, down = expert.matrices
    biases = tuple(b[index] for b in expert.biases[:-1]) + expert.biases[-1:]
    return Expert((*(w[index] for w in firsts), down[:, index]), biases)


def aligned(expert: Expert, reference: Expert) -> Expert:
    """`expert` with its neurons in the order that fits `reference` best: the assignment of largest summed inner
    product of rows of gate and up and columns of down (Git Re-Basin, arXiv 2209.04836; used by M-SMoE)."""
    gain = torch.zeros(expert.matrices[-1].shape[1], expert.matrices[-1].shape[1])
    pairs = list(zip(reference.matrices, expert.matrices, strict=True))
    for i, (ref, own) in enumerate(pairs):
        ref, own = (ref.T, own.T) if i == len(pairs) - 1 else (ref, own)
        # Each matrix counts alike, whatever its scale.
        gain += (ref @ own.T) / (ref.norm() * own.norm()).clamp_min(1e-30)
    return permuted(expert, _assignment(gain))


def _assignment(gain: torch.Tensor) -> np.ndarray:
    """For each row of gain [I, I] a column of its own, of large summed gain. Exact up to HUNGARIAN neurons, since
    the exact way is cubic; above, pairs that are each other's best are matched until so few are left."""
    chosen = torch.full((len(gain),), -1)
    rows, cols = torch.arange(len(gain)), torch.arange(len(gain))
    while len(rows) > HUNGARIAN:
        best = gain.argmax(1)
        mutual = gain.argmax(0)[best] == torch.arange(len(rows))  # the largest entry always is
        chosen[rows[mutual]] = cols[best[mutual]]
        free = torch.ones(len(cols), dtype=torch.bool)
        free[best[mutual]] = False
        gain, rows, cols = gain[~mutual][:, free], rows[~mutual], cols[free]
    chosen[rows] = cols[torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])]
    return chosen.numpy()


def averaged(experts: Sequence[Expert], shares: Sequence[float]) -> Expert:
    """sum(share * expert) / sum(shares); equal shares if all are 0."""
    shares = np.asarray(shares, float)
    shares = shares / shares.sum() if shares.sum() > 0 else np.full(len(shares), 1 / len(shares))

    def mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return sum(float(s) * t for s, t in zip(shares, tensors, strict=True))

    return Expert(
        tuple(mean(t) for t in zip(*(e.matrices for e in experts), strict=True)),
        tuple(mean(t) for t in zip(*(e.biases for e in experts), strict=True)),
    )


def merged(
    statistics: LayerStatistics,
    group: Sequence[int],
    shares: Sequence[float],
    *,
    align: bool = True,
    least_squares: bool = False,
) -> Expert:
    """One expert for the members of `group`, weighted by `shares` (frequency, saliency).

    align: neurons first take the order of the member with the largest share.
    least_squares: the down projection is then fitted on the members' rows (MergeMoE, arXiv 2510.14436).
    """
    experts = [statistics.weights.expert(statistics.layer_idx, e) for e in group]
    if len(experts) == 1:
        return experts[0]
    if align:
        reference = experts[int(np.argmax(shares))]
        experts = [e if e is reference else aligned(e, reference) for e in experts]
    found = averaged(experts, shares)
    return refitted(statistics, group, found) if least_squares else found


def refitted(statistics: LayerStatistics, group: Sequence[int], merged_expert: Expert) -> Expert:
    """`merged_expert` with the down projection of least gated error on the calibration rows of `group`:

        min_W  sum over members e and their rows of g^2 ||W a(x) + b - f_e(x)||^2 + ridge ||W - W0||^2

    a(x) [I]: what the merged down projection reads; W0, b: the merged ones.
    """
    spec, down = statistics.spec, merged_expert.matrices[-1].double()
    if spec.post_norm is not None:
        return merged_expert  # not linear in the down projection
    gram = torch.zeros(down.shape[1], down.shape[1], dtype=torch.float64)
    cross = torch.zeros(down.shape, dtype=torch.float64)
    for e in group:
        routed = statistics.routed(e, held_out=False)
        if not len(routed.rows):
            continue
        x = statistics.inputs(e, held_out=False)
        exact = statistics.weights.expert(statistics.layer_idx, e)
        weight = routed.gate.double().square() * routed.scale
        a = intermediate(x, merged_expert, spec).double()
        missing = expert_forward(x, exact, spec).double() - expert_forward(x, merged_expert, spec)
        gram += (a * weight[:, None]).T @ a
        cross += (missing * weight[:, None]).T @ a
    mean = float(gram.diagonal().mean())
    if mean == 0:
        return merged_expert
    gram.diagonal().add_(RIDGE * mean)
    change = torch.linalg.solve(gram, cross.T).T
    return Expert((*merged_expert.matrices[:-1], (down + change).float()), merged_expert.biases)


# ---- whole methods -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merge:
    """A layer with fewer experts: experts[groups[e]] stands for expert e."""

    groups: np.ndarray  # int [E]
    experts: list[Expert]


def merge(
    statistics: LayerStatistics,
    groups: np.ndarray,
    shares: np.ndarray,
    *,
    align: bool = True,
    least_squares: bool = False,
) -> Merge:
    experts = [
        merged(statistics, group, shares[group], align=align, least_squares=least_squares)
        for group in members(groups)
    ]
    return Merge(groups, experts)


def _known_logits(statistics: LayerStatistics, method: str) -> torch.Tensor:
    if statistics.record.logits is None:
        raise AggregateError(
            f"{method}: the router of {statistics.spec.name} is not understood, so its logits are unknown; use "
            "hc-smoe or gated, which do without"
        )
    return statistics.record.logits[statistics.sample].float()


def m_smoe(statistics: LayerStatistics, centres: np.ndarray) -> Merge:
    """M-SMoE of one layer; `centres` from `global_centres` over all layers' `use`."""
    similarity = router_similarity(_known_logits(statistics, "m-smoe"))
    return merge(statistics, groups_around(centres, similarity), statistics.use)


def hc_smoe(statistics: LayerStatistics, num_groups: int, *, align: bool = True) -> Merge:
    """HC-SMoE: average linkage on mean outputs, frequency-weighted. Its authors average neurons in their own
    order (`align=False`), which loses experts that are permuted copies, so ours are aligned first."""
    tree = hc_tree(output_distance(statistics.outputs()))
    return merge(statistics, cut(tree, num_groups), statistics.use, align=align)


def ream(statistics: LayerStatistics, num_groups: int, capacity: int | None = None) -> Merge:
    """REAM-style: saliency centres and weights, aligned, with a least-squares down projection."""
    logits = _known_logits(statistics, "ream")
    if capacity is None:
        capacity = max(2, -(-statistics.spec.num_experts // num_groups))
    similarity = ream_similarity(logits, statistics.outputs(), logits.softmax(-1))
    groups = ream_groups(similarity, statistics.saliency, num_groups, capacity)
    shares = statistics.saliency * statistics.use
    return merge(statistics, groups, shares, least_squares=True)


def gated(statistics: LayerStatistics, num_groups: int, *, least_squares: bool = True) -> Merge:
    """Groups of least gated output error; members weighted by E g^2, which is their part in that error."""
    distance = squared_distance(statistics.outputs(), statistics.sample_gates())
    groups = cut(gated_tree(statistics.gate_moments, distance), num_groups)
    shares = np.diag(statistics.gate_moments)
    return merge(statistics, groups, shares, least_squares=least_squares)
