"""Merging: a model whose experts truly are clusters is recovered, and each formula does what it says."""

import numpy as np
import pytest
import tiny_lm
import torch

import comoe
from comoe.aggregate import merging
from comoe.aggregate.calibrate import calibrate
from comoe.aggregate.errors import AggregateError
from comoe.aggregate.experts import Expert, ExpertWeights, expert_forward
from comoe.aggregate.statistics import LayerStatistics

CLUSTERS = np.array([0, 1, 2, 1, 0, 2, 2, 1])  # of 8 experts; groups in order of first appearance


def same_groups(a, b):
    return (merging.renumbered(np.asarray(a)) == merging.renumbered(np.asarray(b))).all()


@pytest.fixture(scope="module")
def clustered(tmp_path_factory):
    """Experts are copies of 3 prototypes, neurons permuted, with small deltas of their own; routers of a
    cluster's members are alike but not equal."""
    folder = tmp_path_factory.mktemp("clustered")
    model = tiny_lm.qwen3_moe(seed=3, num_experts=8, num_hidden_layers=1)
    generator = torch.Generator().manual_seed(0)
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        first, down, gate = mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate.weight
        prototypes, outs, centres = first[:3].clone(), down[:3].clone(), gate[:3].clone()
        for e, cluster in enumerate(CLUSTERS):
            order = torch.randperm(32, generator=generator)
            both = torch.cat([order, order + 32])
            noise = [torch.randn(t[0].shape, generator=generator) for t in (first, down, gate)]
            first[e] = prototypes[cluster][both] + 0.002 * noise[0]
            down[e] = outs[cluster][:, order] + 0.002 * noise[1]
            gate[e] = centres[cluster] + 0.1 * noise[2]
    model.save_pretrained(folder / "model")
    packed = comoe.pack(folder / "model", folder / "packed")
    ids = np.random.default_rng(0).integers(1, 257, 4096)
    found = calibrate(packed, {"a": ids}, tokens=4096, window=64, memory="200MB")
    return LayerStatistics(ExpertWeights.open(packed), found, 0)


def relative_error(statistics, merge):
    experts = range(statistics.spec.num_experts)
    error = sum(statistics.gated_error(e, merge.experts[merge.groups[e]]) for e in experts)
    return error / sum(statistics.gated_energy(e) for e in experts)


def test_true_clusters_are_recovered(clustered):
    distance = merging.squared_distance(clustered.outputs(), clustered.sample_gates())
    tree = merging.gated_tree(clustered.gate_moments, distance)
    energy = sum(clustered.gated_energy(e) for e in range(8))
    assert merging.natural_count(tree, energy) == 3
    for name, merge in {
        "gated": merging.gated(clustered, 3),
        "gated, average": merging.gated(clustered, 3, least_squares=False),
        "hc-smoe": merging.hc_smoe(clustered, 3),
        "m-smoe": merging.m_smoe(clustered, np.array([0, 1, 2])),
    }.items():
        assert same_groups(merge.groups, CLUSTERS), name
        assert relative_error(clustered, merge) < 0.002, name
    two = merging.gated(clustered, 2)
    assert relative_error(clustered, two) > 0.02, "one cluster too few must cost"


def test_without_alignment_permuted_copies_are_lost(clustered):
    groups = merging.renumbered(CLUSTERS)
    merge = merging.merge(clustered, groups, clustered.use, align=False)
    assert relative_error(clustered, merge) > 0.1


def test_cost_is_the_least_error_of_a_pair():
    """Against a search over a: f = a f_i + (1 - a) f_j for random gates and constant outputs."""
    rng = np.random.default_rng(1)
    g = rng.uniform(0, 1, (500, 2)) * (rng.uniform(0, 1, (500, 2)) < 0.6)
    gap = 3.0  # ||f_i - f_j||
    cost = merging.gated_cost(g.T @ g / 500, np.array([[0, gap**2], [gap**2, 0]]))[0, 1]

    def error(a):  # g_i f_i + g_j f_j - (g_i + g_j) f, with f_i = gap, f_j = 0
        return np.mean((g[:, 0] * gap - g.sum(1) * a * gap) ** 2)

    searched = min(error(a) for a in np.linspace(0, 1, 2001))
    assert cost == pytest.approx(searched, rel=1e-4)
    total, share = g.sum(1), g[:, 0] / np.maximum(g.sum(1), 1e-30)
    mean = np.average(share, weights=total**2)
    variance = np.average((share - mean) ** 2, weights=total**2)
    assert cost == pytest.approx(np.mean(total**2) * variance * gap**2)
    constant = np.stack([g[:, 0], 2 * g[:, 0]], 1)
    assert merging.gated_cost(constant.T @ constant, np.ones((2, 2)))[0, 1] == pytest.approx(0)
    assert merging.gated_cost(np.zeros((2, 2)), np.ones((2, 2)))[0, 1] == 0, "never used"


def test_tree_predicts_the_error_of_merged_outputs():
    """Constant outputs: what the tree says is what the best constants per group leave."""
    rng = np.random.default_rng(2)
    gates = rng.uniform(0, 1, (300, 5)) * (rng.uniform(0, 1, (300, 5)) < 0.5)
    outputs = rng.normal(size=(5, 4))
    distance = np.square(outputs[:, None] - outputs[None]).sum(-1)
    tree = merging.gated_tree(gates.T @ gates / 300, distance)
    assert merging.predicted(tree, 5) == 0
    heights = [merging.predicted(tree, n) for n in range(5, 0, -1)]
    assert heights == sorted(heights)
    groups = merging.cut(tree, 4)  # one merge: exact
    (i, j) = next(np.flatnonzero(groups == g) for g in range(4) if (groups == g).sum() == 2)
    target = gates[:, [i, j]] @ outputs[[i, j]]
    total = gates[:, [i, j]].sum(1, keepdims=True)
    best = np.linalg.lstsq(total, target, rcond=None)[0]
    assert heights[1] == pytest.approx(np.square(target - total @ best).sum(1).mean())


def test_cut_gives_every_granularity():
    rng = np.random.default_rng(0)
    points = torch.from_numpy(rng.normal(size=(7, 3, 5)))
    tree = merging.hc_tree(merging.output_distance(points))
    before = merging.cut(tree, 7)
    assert (before == np.arange(7)).all()
    for n in range(6, 0, -1):
        groups = merging.cut(tree, n)
        assert groups.max() + 1 == n == len(merging.members(groups))
        assert all(len(set(groups[before == g])) == 1 for g in range(n + 1)), "groups nest"
        before = groups
    for n in (0, 8):
        with pytest.raises(AggregateError, match="expected 1 to 7 groups"):
            merging.cut(tree, n)


def test_global_centres_differ_between_layers():
    uses = [np.array([0.5, 0.4, 0.05, 0.05]), np.array([0.25, 0.26, 0.25, 0.24])]
    found = merging.global_centres(uses, 5)
    assert found[0].tolist() == [0, 1] and found[1].tolist() == [0, 1, 2]
    assert [len(c) for c in merging.global_centres(uses, 2)] == [1, 1]
    with pytest.raises(AggregateError, match="expected 2 to 8 centres, got 1"):
        merging.global_centres(uses, 1)


def test_ream_leaves_many_single():
    rng = np.random.default_rng(0)
    similarity = rng.uniform(size=(8, 8))
    groups = merging.ream_groups(similarity, np.arange(8.0), 4, capacity=3)
    sizes = sorted(len(m) for m in merging.members(groups))
    assert sizes == [1, 1, 2, 4] and (groups[7] == groups).sum() == 4
    with pytest.raises(AggregateError, match="raise the capacity"):
        merging.ream_groups(similarity, np.arange(8.0), 2, capacity=1)


@pytest.mark.parametrize("exact", [2048, 3])
@pytest.mark.parametrize("gated", [True, False])
def test_alignment_undoes_a_permutation(gated, exact, monkeypatch):
    monkeypatch.setattr(merging, "HUNGARIAN", exact)
    generator = torch.Generator().manual_seed(0)
    shapes = [(11, 7)] * (2 if gated else 1) + [(7, 11)]
    expert = Expert(
        tuple(torch.randn(s, generator=generator) for s in shapes),
        tuple(torch.randn(s[0], generator=generator) for s in shapes),
    )
    order = torch.randperm(11, generator=generator).numpy()
    assert (order != np.arange(11)).any()
    back = merging.aligned(merging.permuted(expert, order), expert)
    for got, want in zip(back.matrices + back.biases, expert.matrices + expert.biases, strict=True):
        assert torch.equal(got, want)


def test_many_neurons_are_assigned_once_each(monkeypatch):
    gain = torch.rand(60, 60, generator=torch.Generator().manual_seed(0))
    exact = merging._assignment(gain)
    monkeypatch.setattr(merging, "HUNGARIAN", 5)
    near = merging._assignment(gain)
    assert sorted(near) == sorted(exact) == list(range(60))
    rows = np.arange(60)
    assert 0.95 < float(gain[rows, near].sum() / gain[rows, exact].sum()) <= 1


def test_ream_similarity_is_a_cosine():
    generator = torch.Generator().manual_seed(0)
    logits, outputs = (
        torch.randn(100, 3, generator=generator),
        torch.randn(3, 100, 4, generator=generator),
    )
    gates = logits.softmax(-1)
    whole = (outputs * gates.T[..., None]).flatten(1)
    want = torch.nn.functional.cosine_similarity(whole[0], whole[1], dim=0)
    want += torch.nn.functional.cosine_similarity(logits[:, 0], logits[:, 1], dim=0)
    found = merging.ream_similarity(logits, outputs, gates)
    assert found[0, 1] == pytest.approx(float(want), abs=1e-5) and found[2, 2] == pytest.approx(2)


def test_permuted_experts_compute_the_same(clustered):
    exact = clustered.weights.expert(0, 0)
    x = clustered.inputs(0, held_out=True)
    moved = merging.permuted(exact, np.random.default_rng(0).permutation(32))
    torch.testing.assert_close(
        expert_forward(x, moved, clustered.spec), expert_forward(x, exact, clustered.spec)
    )


def test_least_squares_beats_the_average(clustered):
    """On experts that are not alike, where averaging loses most."""
    group, shares = [0, 1, 2], np.ones(3)
    errors = [
        sum(
            clustered.gated_error(e, merging.merged(clustered, group, shares, **how)) for e in group
        )
        for how in ({}, {"least_squares": True})
    ]
    assert errors[1] < 0.99 * errors[0]


def test_an_unused_group_is_averaged(clustered):
    experts = [clustered.weights.expert(0, e) for e in (0, 4)]
    mean = merging.averaged(experts, np.zeros(2))
    torch.testing.assert_close(
        mean.matrices[0], (experts[0].matrices[0] + experts[1].matrices[0]) / 2
    )


def test_unknown_router(clustered, monkeypatch):
    import dataclasses

    blind = dataclasses.replace(clustered.record, logits=None)
    monkeypatch.setattr(clustered, "record", blind)
    with pytest.raises(AggregateError, match="m-smoe: .* use hc-smoe or gated"):
        merging.m_smoe(clustered, np.array([0]))
