// The MoE operator. Tensors come as addresses, since torch's bf16 has no numpy type; comoe/runtime
// checks them.
#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../runtime/moe_op.h"
#include "bindings.h"
#include "paged_expert.h"

namespace comoe {

static Activation activation_of(const std::string& name) {
  static const char* const names[] = {"silu",  "gelu",       "gelu_tanh", "relu",
                                      "relu2", "quick_gelu", "swigluoai"};
  for (int i = 0; i < 7; ++i)
    if (name == names[i]) return static_cast<Activation>(i);
  throw std::invalid_argument("MoeOp.add_layer: unknown activation '" + name + "'");
}

static std::vector<int32_t> ids_of(const py::array_t<int32_t, py::array::c_style>& array) {
  return {array.data(), array.data() + array.size()};
}

template <class T>
using Table = py::array_t<T, py::array::c_style>;

static int add_layer(MoeOp& op, const ExpertGeometry& geometry, const std::string& activation,
                     float alpha, float limit, int32_t first_expert, const Table<int32_t>& records,
                     const Table<uint8_t>& kinds, const Table<uint8_t>& bits,
                     const Table<int32_t>& parents, const Table<uint16_t>& ranks) {
  if (records.ndim() != 2 || records.shape(0) < 1)
    throw std::invalid_argument("MoeOp.add_layer: records must be [E, R] with E at least 1");
  const py::ssize_t E = records.shape(0), R = records.shape(1);
  for (const py::array& table : {py::array(kinds), py::array(bits), py::array(parents)})
    if (table.ndim() != 2 || table.shape(0) != E || table.shape(1) != R)
      throw std::invalid_argument("MoeOp.add_layer: kinds, bits and parents must be [E, R]");
  if (ranks.ndim() != 3 || ranks.shape(0) != E || ranks.shape(1) != R ||
      ranks.shape(2) != kMaxMatrices)
    throw std::invalid_argument("MoeOp.add_layer: ranks must be [E, R, 3]");
  MoeLayer layer;
  layer.spec = {geometry, activation_of(activation), alpha, limit};
  layer.first_expert = first_expert;
  layer.num_records = static_cast<int>(R);
  layer.records.assign(records.data(), records.data() + records.size());
  for (py::ssize_t i = 0; i < E * R; ++i) {
    if (records.data()[i] >= 0 && kinds.data()[i] > RecordMeta::alias)
      throw std::invalid_argument("MoeOp.add_layer: kind " + std::to_string(kinds.data()[i]) +
                                  " is unknown");
    RecordMeta meta{};
    meta.present = records.data()[i] >= 0;
    if (meta.present) {
      meta.kind = static_cast<RecordMeta::Kind>(kinds.data()[i]);
      meta.bits = bits.data()[i];
      meta.parent = parents.data()[i];
      std::copy_n(ranks.data() + i * kMaxMatrices, kMaxMatrices, meta.ranks);
    }
    layer.metas.push_back(meta);
  }
  const auto exact = static_cast<uint8_t>(op.num_levels() - 1);
  layer.min_level.assign(E, exact);
  layer.want_level.assign(E, exact);
  return op.add_layer(std::move(layer));
}

static void set_levels(MoeOp& op, int layer_idx, const Table<uint8_t>& min_levels,
                       const Table<uint8_t>& want_levels) {
  const auto E = static_cast<py::ssize_t>(op.layer(layer_idx).num_experts());
  if (min_levels.ndim() != 1 || min_levels.size() != E || want_levels.ndim() != 1 ||
      want_levels.size() != E)
    throw std::invalid_argument("MoeOp.set_levels: expected one level per expert (" +
                                std::to_string(E) + ")");
  for (py::ssize_t e = 0; e < E; ++e)
    if (min_levels.data()[e] > want_levels.data()[e] || want_levels.data()[e] >= op.num_levels())
      throw std::invalid_argument("MoeOp.set_levels: expert " + std::to_string(e) +
                                  ": expected min <= want < " + std::to_string(op.num_levels()));
  op.set_levels(layer_idx, {min_levels.data(), min_levels.data() + E},
                {want_levels.data(), want_levels.data() + E});
}

// [E] levels, or null for None.
static const uint8_t* low_levels(const MoeOp& op, int layer_idx,
                                 const std::optional<Table<uint8_t>>& low) {
  if (!low) return nullptr;
  const int64_t E = op.layer(layer_idx).num_experts();
  bool fits = low->ndim() == 1 && low->size() == E;
  for (py::ssize_t e = 0; fits && e < low->size(); ++e) fits = low->data()[e] < op.num_levels();
  if (!fits)
    throw std::invalid_argument("MoeOp: low: expected one level below " +
                                std::to_string(op.num_levels()) + " per expert (" +
                                std::to_string(E) + ")");
  return low->data();
}

static std::unique_ptr<Session> open_session(MoeOp& op, int layer_idx,
                                             const Table<int32_t>& experts, const AheadList& ahead,
                                             const std::optional<Table<uint8_t>>& low) {
  const std::vector<int32_t> chosen = ids_of(experts);
  const uint8_t* levels = low_levels(op, layer_idx, low);
  py::gil_scoped_release release;
  return op.session(layer_idx, chosen, ahead.layers, levels);
}

void bind_moe(py::module_& m) {
  py::class_<AheadList>(m, "AheadList", "What to read ahead, as MoePolicy.read_ahead says.")
      .def(py::init<>())
      .def(
          "experts",
          [](const AheadList& ahead) {
            std::vector<std::tuple<int, int, std::vector<int32_t>>> out;
            for (const Ahead& a : ahead.layers) out.emplace_back(a.layer, a.distance, a.experts);
            return out;
          },
          "[(layer, distance, experts)], nearest layer first.");
  py::class_<MoeOp>(m, "MoeOp",
                    "Computes MoE layers from the engine's pages, loading what is missing.")
      .def(py::init<Engine&, std::vector<uint32_t>>(), py::arg("engine"), py::arg("level_masks"),
           py::keep_alive<1, 2>())
      .def("add_layer", &add_layer, py::arg("geometry"), py::arg("activation"), py::arg("alpha"),
           py::arg("limit"), py::arg("first_expert"), py::arg("records"), py::arg("kinds"),
           py::arg("bits"), py::arg("parents"), py::arg("ranks"),
           "records [E, R]: ids in the engine, -1 for none; the others as in the store's table. "
           "Returns the layer's index.")
      .def("set_levels", &set_levels, py::arg("layer_idx"), py::arg("min_levels"),
           py::arg("want_levels"), "Of each expert, uint8 [E]; in force from the next call on.")
      .def(
          "session", &open_session, py::arg("layer_idx"), py::arg("experts"), py::arg("ahead"),
          py::arg("low") = py::none(),
          "An engine session over experts of a layer at their planned levels; low uint8 [E]: where "
          "compute may start instead.")
      .def(
          "expert",
          [](const MoeOp& op, int layer_idx, int64_t expert, int level) {
            return PagedExpert(op.layer(layer_idx).spec.geometry,
                               op.view(layer_idx, expert, level));
          },
          py::arg("layer_idx"), py::arg("expert"), py::arg("level"),
          "An expert that a session holds, valid until the session is done with it.");
}

}  // namespace comoe
