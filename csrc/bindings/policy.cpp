// What is decided per layer. Tensors come as addresses, as in moe.cpp; comoe/runtime checks them.
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../runtime/moe_policy.h"
#include "bindings.h"

namespace comoe {
namespace {

template <class T>
using Table = py::array_t<T, py::array::c_style>;

template <class T>
std::vector<T> values_of(const Table<T>& table) {
  return {table.data(), table.data() + table.size()};
}

template <class T>
Table<T> array_of(const std::vector<T>& values) {
  return Table<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

DType dtype_of(int dtype) {
  if (dtype < 0 || dtype > 2)
    throw std::invalid_argument("MoePolicy: dtype must be 0 (fp32), 1 (bf16) or 2 (fp16)");
  return static_cast<DType>(dtype);
}

MoeInput routing(uintptr_t expert_idx, uintptr_t weights, int64_t T, int64_t K) {
  MoeInput input{};
  input.expert_idx = reinterpret_cast<const int64_t*>(expert_idx);
  input.weights = reinterpret_cast<const float*>(weights);
  input.T = T;
  input.K = K;
  return input;
}

std::unique_ptr<MoePolicy> make_policy(Engine& engine, MoeOp& op, bool caches,
                                       double profile_decay) {
  std::unique_ptr<CacheValues> cache;
  if (caches) {
    std::vector<int64_t> num_experts;
    for (int l = 0; l < op.num_layers(); ++l) num_experts.push_back(op.layer(l).num_experts());
    cache = std::make_unique<CacheValues>(engine, num_experts, NextUseConfig{});
  }
  return std::make_unique<MoePolicy>(engine, op, std::move(cache), profile_decay);
}

CacheValues& cache_of(MoePolicy& policy) {
  if (!policy.cache()) throw std::invalid_argument("MoePolicy: it was made without a cache");
  return *policy.cache();
}

LeastCost make_rule(const Table<double>& loss, const Table<double>& bytes,
                    const Table<double>& steps, double price, double bandwidth, double latency) {
  if (loss.ndim() != 2) throw std::invalid_argument("LeastCost: loss: expected [experts, levels]");
  return LeastCost(static_cast<int>(loss.shape(1)), values_of(loss), values_of(bytes),
                   values_of(steps), price, bandwidth, latency);
}

// (later layer, its likely experts or None, its gate (weight, bias or 0, dtype, k) or None)
using PyGate = std::tuple<uintptr_t, uintptr_t, int, int64_t>;
using PyGuess = std::tuple<int, std::optional<Table<int64_t>>, std::optional<PyGate>>;

LinearGate gate_of(const PyGate& gate) {
  const auto [weight, bias, dtype, k] = gate;
  return {reinterpret_cast<const void*>(weight), reinterpret_cast<const void*>(bias),
          dtype_of(dtype), k};
}

std::vector<Guess> guesses_of(const std::vector<PyGuess>& guesses) {
  std::vector<Guess> out;
  for (const auto& [later, experts, gate] : guesses) {
    Guess guess;
    guess.later = later;
    if (experts) guess.experts.assign(experts->data(), experts->data() + experts->size());
    if (gate) guess.gate = gate_of(*gate);
    out.push_back(std::move(guess));
  }
  return out;
}

// For tests against the references.
Table<int64_t> decide_levels(const LeastCost& rule, const Table<int64_t>& experts,
                             const Table<double>& weights, const Table<int64_t>& resident,
                             const Table<int64_t>& low) {
  const py::ssize_t n = experts.size();
  if (weights.size() != n || resident.size() != n || low.size() != n)
    throw std::invalid_argument("LeastCost.decide: expected arrays of one length");
  std::vector<MissingExpert> missing(n);
  for (py::ssize_t i = 0; i < n; ++i) {
    const int64_t x = experts.data()[i], here = resident.data()[i], aimed = low.data()[i];
    if (x < 0 || x >= rule.experts() || here < -1 || here >= rule.levels() || aimed < 0 ||
        aimed >= rule.levels())
      throw std::invalid_argument("LeastCost.decide: no such expert or level");
    missing[i].expert = x;
    missing[i].square = weights.data()[i] * weights.data()[i];
    missing[i].resident = static_cast<int>(here);
    missing[i].low = static_cast<int>(aimed);
  }
  rule.decide(missing);
  std::vector<int64_t> decided;
  for (const MissingExpert& m : missing) decided.push_back(m.decided);
  return array_of(decided);
}

Table<float> logits_of(uintptr_t weight, uintptr_t bias, int dtype, int64_t E, int64_t H,
                       uintptr_t x, int x_dtype) {
  std::vector<float> out(E);
  router_logits(reinterpret_cast<const void*>(weight), reinterpret_cast<const void*>(bias),
                dtype_of(dtype), E, H, reinterpret_cast<const void*>(x), dtype_of(x_dtype),
                out.data());
  return array_of(out);
}

void step(MoePolicy& policy, const MoeOp& op, int layer_idx, uintptr_t x, int x_dtype,
          int64_t x_stride, uintptr_t expert_idx, uintptr_t weights, int64_t T, int64_t K,
          uintptr_t out, bool round_products, int64_t part,
          const std::optional<Table<uint8_t>>& low, const std::vector<PyGuess>& guesses,
          const std::optional<PyGate>& own) {
  MoeInput input = routing(expert_idx, weights, T, K);
  input.x = reinterpret_cast<const void*>(x);
  input.x_dtype = dtype_of(x_dtype);
  input.x_stride = x_stride;
  input.round_products = round_products;
  if (part < 1) throw std::invalid_argument("MoePolicy.step: part: expected at least one token");
  if (low && low->size() != op.layer(layer_idx).num_experts())
    throw std::invalid_argument("MoePolicy.step: low: expected one level per expert");
  std::vector<Guess> known = guesses_of(guesses);
  const LinearGate router = own ? gate_of(*own) : LinearGate{};
  const uint8_t* levels = low ? low->data() : nullptr;
  py::gil_scoped_release release;
  policy.step(layer_idx, input, reinterpret_cast<void*>(out), part, levels, std::move(known),
              router);
}

py::object decide(MoePolicy& policy, int layer_idx, uintptr_t expert_idx, uintptr_t weights,
                  int64_t T, int64_t K) {
  const MoeInput input = routing(expert_idx, weights, T, K);
  std::unique_ptr<Decided> decided;
  {
    py::gil_scoped_release release;
    decided = policy.decide(layer_idx, input);
  }
  if (!decided) return py::none();
  return py::make_tuple(array_of(decided->index).reshape({T, K}), array_of(decided->low));
}

AheadList read_ahead(MoePolicy& policy, int layer_idx, const std::vector<PyGuess>& guesses) {
  std::vector<Guess> known = guesses_of(guesses);
  for (const Guess& guess : known)
    if (guess.gate.weight)
      throw std::invalid_argument("MoePolicy.read_ahead: expected experts, got a gate");
  return {policy.read_ahead(layer_idx, known, MoeInput{})};
}

py::dict counters(const MoePolicy& policy) {
  const PolicyCounters c = policy.counters();
  py::dict out;
  out["uses"] = c.uses;
  out["bits"] = c.bits;
  out["guessed"] = c.guessed;
  out["guessed_used"] = c.guessed_used;
  out["used"] = c.used;
  out["waited"] = c.waited;
  out["coarser"] = c.coarser;
  out["skipped"] = c.skipped;
  out["replaced"] = c.replaced;
  return out;
}

}  // namespace

void bind_policy(py::module_& m) {
  py::class_<LeastCost>(m, "LeastCost", "comoe.policy.misses.LeastCost, natively.")
      .def(py::init(&make_rule), py::arg("loss"), py::arg("bytes"), py::arg("steps"),
           py::arg("price"), py::arg("bandwidth"), py::arg("latency"),
           "loss float [X, L] per squared gate weight, inf: no such level; bytes [X, L]; steps [X, "
           "L, L].")
      .def("decide", &decide_levels, py::arg("experts"), py::arg("weights"), py::arg("resident"),
           py::arg("low"), "Levels int64 [n], -1: left out; all arguments [n].");
  py::class_<NextUse>(m, "NextUse", "comoe.policy.next_use.NextUse, natively.")
      .def(py::init([](const std::vector<int64_t>& num_experts) {
             return NextUse(num_experts, NextUseConfig{});
           }),
           py::arg("num_experts"))
      .def(
          "note",
          [](NextUse& policy, int layer_idx, const Table<int32_t>& experts) {
            policy.note(layer_idx, experts.data(), experts.size());
          },
          py::arg("layer_idx"), py::arg("experts"))
      .def(
          "predicted",
          [](NextUse& policy, int layer_idx, const Table<int32_t>& experts,
             const Table<double>& chances) {
            if (chances.size() != experts.size())
              throw std::invalid_argument("NextUse.predicted: expected a chance for each expert");
            policy.predicted(layer_idx, experts.data(), chances.data(), experts.size());
          },
          py::arg("layer_idx"), py::arg("experts"), py::arg("chances"))
      .def(
          "values",
          [](const NextUse& policy, int layer_idx) {
            std::vector<float> values;
            for (int64_t e = 0; e < policy.num_experts(layer_idx); ++e)
              values.push_back(policy.value(layer_idx, e));
            return array_of(values);
          },
          py::arg("layer_idx"));
  m.def("router_logits", &logits_of, py::arg("weight"), py::arg("bias"), py::arg("dtype"),
        py::arg("E"), py::arg("H"), py::arg("x"), py::arg("x_dtype"),
        "weight [E, H] @ x [H] + bias [E] (0: none), given as addresses: float32 [E].");
  py::class_<MoePolicy>(m, "MoePolicy",
                        "What is decided for every layer of every step, and the step itself.")
      .def(py::init(&make_policy), py::arg("engine"), py::arg("op"), py::arg("caches"),
           py::arg("profile_decay"), py::keep_alive<1, 2>(), py::keep_alive<1, 3>(),
           "After the last add_layer of `op`. caches: records get their values from NextUse.")
      .def(
          "set_plan",
          [](MoePolicy& policy, bool reads, const LeastCost* rule, bool follows) {
            policy.set_plan(reads, rule ? std::make_unique<LeastCost>(*rule) : nullptr, follows);
          },
          py::arg("reads"), py::arg("rule"), py::arg("follows"),
          "reads: records are read while computing.  rule: about what is missing, None: wait.  "
          "follows: routing is noted.")
      .def(
          "set_losses",
          [](MoePolicy& policy, const Table<double>& per_square, const Table<double>& nothing) {
            policy.set_losses(values_of(per_square), values_of(nothing));
          },
          py::arg("per_square"), py::arg("nothing"),
          "What the rule and the account go by: nats of a use per squared gate weight, float [X, "
          "L], "
          "inf: no such level; of a use that is left out, [X].")
      .def("set_loss_limit", &MoePolicy::set_loss_limit, py::arg("limit"), py::arg("most"),
           "Nats per token that may be lost, 0: no limit; time is priced at most `most` times as "
           "the "
           "rule says.")
      .def(
          "account",
          [](const MoePolicy& policy) {
            const LossAccount::Figures account = policy.account();
            py::dict out;
            out["taken"] = account.taken;
            out["caution"] = account.caution;
            out["passes"] = account.passes;
            return out;
          },
          "taken: nats per token, fading.  caution: what time is worth now over the rule's price.  "
          "passes: counted.")
      .def(
          "set_bits",
          [](MoePolicy& policy, int layer_idx, const Table<double>& bits) {
            policy.set_bits(layer_idx, values_of(bits));
          },
          py::arg("layer_idx"), py::arg("bits"), "float64 [E, levels], per weight.")
      .def(
          "hold",
          [](MoePolicy& policy, int layer_idx, const Table<int32_t>& ids,
             const Table<int32_t>& offsets, const Table<int32_t>& experts) {
            cache_of(policy).hold(layer_idx, values_of(ids), values_of(offsets),
                                  values_of(experts));
          },
          py::arg("layer_idx"), py::arg("ids"), py::arg("offsets"), py::arg("experts"),
          "The records of a layer whose values are the cache's: ids[i] is needed by "
          "experts[offsets[i]:offsets[i + 1]].")
      .def("step", &step, py::arg("op"), py::arg("layer_idx"), py::arg("x"), py::arg("x_dtype"),
           py::arg("x_stride"), py::arg("expert_idx"), py::arg("weights"), py::arg("T"),
           py::arg("K"), py::arg("out"), py::arg("round_products"), py::arg("part"), py::arg("low"),
           py::arg("guesses"), py::arg("own") = py::none(),
           "Computes a layer. low: uint8 [E] or None: as the rule decides.  guesses: of later "
           "layers, "
           "nearest first: (layer, likely experts int64 or None, else gate (weight, bias or 0, "
           "dtype, "
           "k)).  own: the layer's own gate, for set_tolerance.")
      .def("set_tolerance", &MoePolicy::set_tolerance, py::arg("tolerance"),
           "Cache-aware routing: what is missing gives way to resident experts whose score is at "
           "most "
           "so much lower; 0: never.")
      .def(
          "note_routing",
          [](MoePolicy& policy, int layer_idx, uintptr_t expert_idx, uintptr_t weights, int64_t T,
             int64_t K) { policy.note_routing(layer_idx, routing(expert_idx, weights, T, K)); },
          py::arg("layer_idx"), py::arg("expert_idx"), py::arg("weights"), py::arg("T"),
          py::arg("K"))
      .def(
          "decide", &decide, py::arg("layer_idx"), py::arg("expert_idx"), py::arg("weights"),
          py::arg("T"), py::arg("K"),
          "(index int64 [T, K], low uint8 [E]): what is left out has index E, compute may start at "
          "`low`; None: as planned.")
      .def("read_ahead", &read_ahead, py::arg("layer_idx"), py::arg("guesses"),
           "What to read ahead for guesses of experts as in `step`.")
      .def(
          "ran",
          [](MoePolicy& policy, int layer_idx, const Table<uint8_t>& used) {
            policy.ran(layer_idx, values_of(used));
          },
          py::arg("layer_idx"), py::arg("used"), "uint8 [E]: level used + 1.")
      .def(
          "used",
          [](py::object self) {
            auto& used = self.cast<MoePolicy&>().used();
            return py::array_t<uint8_t>({static_cast<py::ssize_t>(used.size())}, {1}, used.data(),
                                        self);
          },
          "uint8 [X], not a copy: of all layers the finest level used + 1; to be cleared by its "
          "reader.")
      .def(
          "profile",
          [](const MoePolicy& policy) {
            const RoutingProfile profile = policy.profile();
            return py::make_tuple(array_of(profile.seen), array_of(profile.squares),
                                  array_of(profile.tokens));
          },
          "(uses float [X], squared gate weights [X], tokens [layers]), fading.")
      .def("counters", &counters);
}

}  // namespace comoe
