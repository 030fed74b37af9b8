from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from comoe.trace import Recorder, Trace, TraceError, record_text, recording, trace_of


def small(n=4, num_layers=2, k=2, num_experts=5) -> Trace:
    rng = np.random.default_rng(0)
    experts = rng.integers(0, num_experts, (n, num_layers, k)).astype(np.int16)
    experts[0, 1, -1] = -1
    weights = rng.random((n, num_layers, k)).astype(np.float32)
    weights[experts < 0] = 0
    return Trace(
        "tiny",
        tuple(f"layers.{i}" for i in range(num_layers)),
        np.full(num_layers, num_experts, np.int32),
        np.zeros(n, np.int32),
        np.arange(n, dtype=np.int32),
        np.arange(n, dtype=np.int32) + 7,
        experts,
        weights,
    )


@pytest.mark.parametrize("with_predictions", [False, True])
def test_written_then_read_is_the_same(tmp_path, with_predictions):
    trace = small()
    if with_predictions:
        trace = dataclasses.replace(trace, predicted=np.full((4, 2, 3), -1, np.int16))
    trace.write(tmp_path / "t.npz")
    again = Trace.read(tmp_path / "t.npz")
    assert (again.model, again.layers) == (trace.model, trace.layers)
    for name in ("num_experts", "sequence", "position", "token", "experts", "weights", "predicted"):
        expected, got = getattr(trace, name), getattr(again, name)
        if expected is None:
            assert got is None
        else:
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got, expected)
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"experts": np.full((4, 2, 2), 5, np.int16)},
            "experts: expected -1 <= expert < 5 in layer 0, got",
        ),
        ({"experts": np.full((4, 2, 2), -2, np.int16)}, "experts: expected -1 <= expert < 5"),
        ({"experts": np.zeros((4, 2), np.int16)}, r"experts: expected \[N, L, K\]"),
        (
            {"experts": np.zeros((4, 2, 2), np.float32)},
            "experts: expected whole numbers, got float32",
        ),
        ({"weights": np.zeros((4, 2, 3), np.float32)}, "weights: expected shape"),
        ({"weights": np.full((4, 2, 2), np.nan, np.float32)}, "weights: expected finite"),
        ({"weights": np.ones((4, 2, 2), np.float32)}, "0 where there is no expert"),
        ({"sequence": np.zeros(3, np.int32)}, "sequence: expected shape"),
        ({"token": np.zeros((4, 1), np.int32)}, "token: expected shape"),
        ({"layers": ("one",)}, "layers: expected 2 names, got 1"),
        ({"num_experts": np.array([5], np.int32)}, "num_experts: expected shape"),
        ({"predicted": np.zeros((4, 1, 2), np.int16)}, "predicted: expected"),
        ({"predicted": np.full((4, 2, 2), 9, np.int16)}, "predicted: expected -1 <= expert < 5"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(TraceError, match=message):
        dataclasses.replace(small(), **change)


def test_hostile_files_are_refused(tmp_path):
    path = tmp_path / "t.npz"
    small().write(path)
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 3):
        (tmp_path / "cut.npz").write_bytes(whole[:cut])
        with pytest.raises(TraceError, match="not a routing trace"):
            Trace.read(tmp_path / "cut.npz")
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(tmp_path / "v9.npz", **(arrays | {"format": np.int32(9)}))
    with pytest.raises(TraceError, match="format 9 is not known"):
        Trace.read(tmp_path / "v9.npz")
    del arrays["weights"]
    np.savez(tmp_path / "less.npz", **arrays)
    with pytest.raises(TraceError, match="has no weights"):
        Trace.read(tmp_path / "less.npz")
    # Pickled objects could run code: never loaded.
    np.savez(tmp_path / "pickled.npz", **(arrays | {"weights": np.array([{}], object)}))
    with pytest.raises(TraceError, match="not a routing trace"):
        Trace.read(tmp_path / "pickled.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(TraceError, match="a single array"):
        Trace.read(tmp_path / "one.npy")
    with pytest.raises(FileNotFoundError):
        Trace.read(tmp_path / "missing.npz")


def test_a_flipped_byte_is_refused_or_harmless(tmp_path):
    """Dates and the like may change; what is read must not."""
    trace = small()
    trace.write(tmp_path / "t.npz")
    whole = (tmp_path / "t.npz").read_bytes()
    refused = 0
    for position in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[position] ^= 0x10
        (tmp_path / "flip.npz").write_bytes(flipped)
        try:
            again = Trace.read(tmp_path / "flip.npz")
        except TraceError:
            refused += 1
        else:
            np.testing.assert_array_equal(again.experts, trace.experts)
            np.testing.assert_array_equal(again.weights, trace.weights)
    assert refused > len(whole) // 7 // 4


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    small().write(tmp_path / "t.npz")
    before = (tmp_path / "t.npz").read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="disk full"):
        small(n=5).write(tmp_path / "t.npz")
    assert (tmp_path / "t.npz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_recorder_numbers_sequences_positions_and_tokens():
    recorder = Recorder(2)
    recorder.new_sequences(batch=2)
    recorder.expect(np.array([[10, 11, 12], [20, 21, 22]]))
    for layer in range(2):
        recorder.note(layer, np.arange(12).reshape(6, 2) % 4, np.ones((6, 2)), 4)
    recorder.expect(np.array([[13], [23]]))  # a decode step of both
    for layer in range(2):
        recorder.note(layer, np.zeros((2, 2), int), np.ones((2, 2)), 4)
    recorder.new_sequences()
    recorder.expect(None)
    recorder.note(0, np.array([[3, 4]]), np.array([[0.5, 0.5]]), 4)  # index E: no expert
    trace = recorder.trace("m", ("a", "b"), np.array([4, 4]))
    assert trace.sequence.tolist() == [0, 0, 0, 1, 1, 1, 0, 1, 2]
    assert trace.position.tolist() == [0, 1, 2, 0, 1, 2, 3, 3, 0]
    assert trace.token.tolist() == [10, 11, 12, 20, 21, 22, 13, 23, -1]
    assert trace.experts[8].tolist() == [[3, -1], [-1, -1]]
    assert trace.weights[8].tolist() == [[0.5, 0], [0, 0]]


def test_encoder_and_decoder_tokens_get_rows_of_their_own():
    recorder = Recorder(4)  # layers 0, 1: encoder; 2, 3: decoder
    recorder.new_sequences()
    for layer, rows in ((0, 5), (1, 5), (2, 1), (3, 1), (2, 1), (3, 1)):
        recorder.note(layer, np.full((rows, 1), layer), np.ones((rows, 1)), 4)
    trace = recorder.trace("m", tuple("abcd"), np.full(4, 4))
    assert trace.experts[:, :, 0].tolist() == [[0, 1, -1, -1]] * 5 + [[-1, -1, 2, 3]] * 2


def test_nothing_recorded_is_an_error():
    with pytest.raises(TraceError, match="nothing was recorded"):
        Recorder(1).trace("m", ("a",), np.array([4]))


def test_entropy_is_1_when_even_and_0_when_always_the_same():
    experts = np.stack([np.arange(8) % 4, np.zeros(8, int)], axis=1)[:, :, None].astype(np.int16)
    trace = dataclasses.replace(
        small(n=8, k=1, num_experts=4), experts=experts, weights=np.ones((8, 2, 1), np.float32)
    )
    np.testing.assert_allclose(trace.entropy_share(), [1, 0], atol=1e-12)
    assert trace.summary()["least_entropy_share"] == pytest.approx(0)


class FakeRuntime:
    """Routes token t of layer l to experts (t + l) % 3 and 2."""

    def __init__(self):
        self.specs = [SimpleNamespace(name=f"layers.{i}", num_experts=3) for i in range(2)]

    def experts_forward(self, layer_idx, hidden, top_k_index, top_k_weights):
        return hidden * 2


class FakeModel:
    def __init__(self):
        self.comoe = FakeRuntime()

    def __call__(self, input_ids, **kwargs):
        hidden = torch.ones(input_ids.numel(), 4)
        for layer in range(2):
            index = torch.stack(
                [(input_ids.reshape(-1) + layer) % 3, torch.full((input_ids.numel(),), 2)], 1
            )
            hidden = self.comoe.experts_forward(
                layer, hidden, index, torch.full(index.shape, 0.25).bfloat16()
            )
        return hidden


def test_recording_a_text_leaves_the_model_as_it_was():
    model = FakeModel()
    recorder = record_text(model, [5, 6, 7, 8, 9], window=2)
    trace = trace_of(model, recorder, "fake")
    assert trace.sequence.tolist() == [0, 0, 1, 1, 2]
    assert trace.token.tolist() == [5, 6, 7, 8, 9]
    assert trace.experts[:, 0, 0].tolist() == [2, 0, 1, 2, 0]
    assert trace.experts[:, 1, 0].tolist() == [0, 1, 2, 0, 1]
    assert (trace.weights == 0.25).all()
    assert "experts_forward" not in vars(model.comoe)


def test_recording_ends_when_the_model_fails():
    model = FakeModel()
    with pytest.raises(ZeroDivisionError), recording(model):
        raise ZeroDivisionError
    assert "experts_forward" not in vars(model.comoe)


def test_a_model_without_comoe_is_refused():
    with (
        pytest.raises(TraceError, match="expected a model that comoe loaded"),
        recording(SimpleNamespace()),
    ):
        pass


class FakeGates:
    """Predicts the token's number plus how far ahead; knows nothing beyond two layers."""

    def choose(self, layer_idx, hidden, ahead):
        if layer_idx + ahead > 1:
            return None
        return torch.arange(len(hidden))[:, None] % 3 + torch.tensor([[0, ahead]])


def test_predictions_are_recorded_by_token_layer_and_distance():
    model = FakeModel()
    model.comoe.predictor = FakeGates()
    trace = trace_of(model, record_text(model, [5, 6, 7], window=3, depth=2), "fake")
    assert (trace.depth, trace.predicted.shape) == (2, (3, 2, 4))
    assert (trace.predicted[:, 0] == -1).all()
    # From layer 0 about layer 1; 3 is no expert of the model.
    assert trace.predicted[:, 1].tolist() == [[0, 1, -1, -1], [1, 2, -1, -1], [2, -1, -1, -1]]


def test_predictions_need_routers_that_are_understood():
    with pytest.raises(TraceError, match="record with depth 0"):
        record_text(FakeModel(), [5, 6, 7], depth=1)
    with pytest.raises(ValueError, match="depth: expected 0 or more"):
        record_text(FakeModel(), [5, 6, 7], depth=-1)


def test_depth_must_divide_what_was_predicted(tmp_path):
    trace = dataclasses.replace(small(), predicted=np.full((4, 2, 4), -1, np.int16), depth=2)
    trace.write(tmp_path / "t.npz")
    assert Trace.read(tmp_path / "t.npz").depth == 2
    for depth in (0, 3):
        with pytest.raises(TraceError, match="depth: expected a divisor of P = 4"):
            dataclasses.replace(trace, depth=depth)
