// The MoE operator. Tensors come as addresses, since torch's bf16 has no numpy type; comoe/runtime
// checks them.
#include <string>
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

static int add_layer(MoeOp& op, const ExpertGeometry& geometry, const std::string& activation,
                     float alpha, float limit, int32_t first_expert, int64_t num_experts) {
  if (num_experts < 1)
    throw std::invalid_argument("MoeOp.add_layer: num_experts must be at least 1");
  MoeLayer layer;
  layer.spec = {geometry, activation_of(activation), alpha, limit};
  layer.first_expert = first_expert;
  layer.min_level.assign(num_experts, 0);
  layer.want_level.assign(num_experts, 0);
  return op.add_layer(std::move(layer));
}

static void set_levels(MoeOp& op, int layer_idx, uint8_t min_level, uint8_t want_level) {
  if (min_level > want_level || want_level > 4)
    throw std::invalid_argument("MoeOp.set_levels: expected min <= want <= 4");
  MoeLayer& layer = op.layer(layer_idx);
  layer.min_level.assign(layer.min_level.size(), min_level);
  layer.want_level.assign(layer.want_level.size(), want_level);
}

static void forward(MoeOp& op, int layer_idx, uintptr_t x, int x_dtype, int64_t x_stride,
                    uintptr_t expert_idx, uintptr_t weights, int64_t T, int64_t K, uintptr_t out,
                    bool round_products, py::array_t<uint8_t, py::array::c_style> used,
                    const py::array_t<int32_t, py::array::c_style>& ahead) {
  if (x_dtype < 0 || x_dtype > 2)
    throw std::invalid_argument("MoeOp.forward: dtype must be 0 (fp32), 1 (bf16) or 2 (fp16)");
  if (used.size() != static_cast<py::ssize_t>(op.layer(layer_idx).min_level.size()))
    throw std::invalid_argument("MoeOp.forward: used needs one entry per expert");
  const MoeInput input{reinterpret_cast<const void*>(x),
                       static_cast<DType>(x_dtype),
                       x_stride,
                       reinterpret_cast<const int64_t*>(expert_idx),
                       reinterpret_cast<const float*>(weights),
                       T,
                       K,
                       round_products};
  const std::vector<int32_t> ids = ids_of(ahead);
  uint8_t* used_out = used.mutable_data();
  py::gil_scoped_release release;
  op.forward(layer_idx, input, reinterpret_cast<void*>(out), used_out, ids);
}

void bind_moe(py::module_& m) {
  py::class_<MoeOp>(m, "MoeOp",
                    "Computes MoE layers from the engine's pages, loading what is missing.")
      .def(py::init<Engine&>(), py::arg("engine"), py::keep_alive<1, 2>())
      .def("add_layer", &add_layer, py::arg("geometry"), py::arg("activation"), py::arg("alpha"),
           py::arg("limit"), py::arg("first_expert"), py::arg("num_experts"),
           "Returns the layer's index.")
      .def("set_levels", &set_levels, py::arg("layer_idx"), py::arg("min_level"),
           py::arg("want_level"), "For all experts of a layer; in force from the next call on.")
      .def("forward", &forward, py::arg("layer_idx"), py::arg("x"), py::arg("x_dtype"),
           py::arg("x_stride"), py::arg("expert_idx"), py::arg("weights"), py::arg("T"),
           py::arg("K"), py::arg("out"), py::arg("round_products"), py::arg("used"),
           py::arg("ahead"))
      .def(
          "session",
          [](MoeOp& op, int layer_idx, const py::array_t<int32_t, py::array::c_style>& experts,
             const py::array_t<int32_t, py::array::c_style>& ahead) {
            const std::vector<int32_t> chosen = ids_of(experts), ids = ids_of(ahead);
            py::gil_scoped_release release;
            return op.session(layer_idx, chosen, ids);
          },
          py::arg("layer_idx"), py::arg("experts"), py::arg("ahead"),
          "An engine session over experts of a layer at their planned levels.")
      .def(
          "expert",
          [](const MoeOp& op, int layer_idx, int64_t expert, int level) {
            return PagedExpert(op.layer(layer_idx).spec.geometry,
                               op.view(layer_idx, expert, static_cast<Level>(level)));
          },
          py::arg("layer_idx"), py::arg("expert"), py::arg("level"),
          "An expert that a session holds, valid until the session is done with it.");
}

}  // namespace comoe
