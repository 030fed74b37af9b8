// The device's routing, on the CPU: the same text that gate_prefetch runs, for its tests.
#include <string>
#include <vector>

#include "../device/gate.h"
#include "bindings.h"

namespace comoe {

static RoundTo round_to(const std::string& name, const char* argument) {
  if (name == "float32") return RoundTo::fp32;
  if (name == "bfloat16") return RoundTo::bf16;
  if (name == "float16") return RoundTo::fp16;
  throw std::invalid_argument(std::string("route: ") + argument +
                              ": expected float32, bfloat16 or float16, got " + name);
}

static py::tuple route_tokens(const py::array_t<float>& logits, const std::string& kind, int k,
                              bool normalise, int num_groups, int top_groups, float scale,
                              const py::object& choice_bias, const std::string& round_logits,
                              const std::string& round_weights) {
  if (logits.ndim() != 2)
    throw std::invalid_argument("route: logits: expected float32 [T, E], got " +
                                std::to_string(logits.ndim()) + " dimensions");
  const int T = static_cast<int>(logits.shape(0)), E = static_cast<int>(logits.shape(1));
  RouterSpec spec;
  if (kind == "softmax")
    spec.kind = RouterKind::softmax;
  else if (kind == "top_softmax")
    spec.kind = RouterKind::top_softmax;
  else if (kind == "sigmoid")
    spec.kind = RouterKind::sigmoid;
  else
    throw std::invalid_argument("route: kind: expected softmax, top_softmax or sigmoid, got " +
                                kind);
  if (E < 1 || E > kMaxExperts || k < 1 || k > E)
    throw std::invalid_argument("route: expected 1 to " + std::to_string(kMaxExperts) +
                                " experts and k from 1 to their number, got " + std::to_string(E) +
                                " and " + std::to_string(k));
  if (num_groups < 1 || num_groups > kMaxGroups || E % num_groups != 0 || top_groups < 1 ||
      top_groups > num_groups)
    throw std::invalid_argument("route: num_groups: expected a divisor of " + std::to_string(E) +
                                " up to " + std::to_string(kMaxGroups) +
                                " and top_groups from 1 to it, got " + std::to_string(num_groups) +
                                " and " + std::to_string(top_groups));
  spec.normalise = normalise;
  spec.num_experts = E;
  spec.k = k;
  spec.num_groups = num_groups;
  spec.top_groups = top_groups;
  spec.scale = scale;
  spec.round_logits = round_to(round_logits, "round_logits");
  spec.round_weights = round_to(round_weights, "round_weights");
  py::array_t<float> bias;
  if (!choice_bias.is_none()) {
    bias = py::array_t<float, py::array::c_style | py::array::forcecast>(choice_bias);
    if (bias.ndim() != 1 || bias.size() != E)
      throw std::invalid_argument("route: choice_bias: expected float32 [" + std::to_string(E) +
                                  "]");
    spec.choice_bias = bias.data();
  }
  py::array_t<int32_t> chosen({T, k});
  py::array_t<float> weights({T, k});
  std::vector<float> scores(E);
  std::vector<uint32_t> keys(E), group_keys(kMaxGroups);
  for (int t = 0; t < T; ++t) {
    for (int e = 0; e < E; ++e) scores[e] = logits.at(t, e);
    route(OneLane(), spec, scores.data(), keys.data(), group_keys.data(), chosen.mutable_data(t, 0),
          weights.mutable_data(t, 0));
  }
  return py::make_tuple(chosen, weights);
}

static py::array_t<float> round_values(const py::array_t<float>& values, const std::string& to) {
  py::array_t<float> out(values.size());
  for (py::ssize_t i = 0; i < values.size(); ++i)
    out.mutable_at(i) = rounded(values.at(i), round_to(to, "to"));
  return out;
}

void bind_plane(py::module_& m) {
  m.def("round_values", &round_values, py::arg("values"), py::arg("to"));
  m.def("route", &route_tokens, py::arg("logits"), py::arg("kind"), py::arg("k"),
        py::arg("normalise") = false, py::arg("num_groups") = 1, py::arg("top_groups") = 1,
        py::arg("scale") = 1.0f, py::arg("choice_bias") = py::none(),
        py::arg("round_logits") = "float32", py::arg("round_weights") = "float32");
}

}  // namespace comoe
