// CPU kernels and their threads.
#include <algorithm>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/attend.h"
#include "../cpu/coded_linear.h"
#include "../cpu/dense_linear.h"
#include "../cpu/expert_ffn.h"
#include "../cpu/parallel.h"
#include "../cpu/stream.h"
#include "../ladder/codec.h"
#include "bindings.h"
#include "paged_expert.h"

namespace comoe {

namespace {

void check_dtype(const char* op, int dtype) {
  if (dtype < 0 || dtype > 2)
    throw std::invalid_argument(std::string(op) + ": dtype must be 0 (fp32), 1 (bf16) or 2 (fp16)");
}

void bind_expert_ffn(const std::vector<const PagedExpert*>& experts,
                     const std::vector<Array<int32_t>>& tokens,
                     const std::vector<Array<int32_t>>& pairs, int activation, float alpha,
                     float limit, uintptr_t x, int x_dtype, int64_t num_tokens, int64_t x_stride,
                     uintptr_t out, int64_t num_pairs) {
  auto fail = [](const std::string& text) { throw std::invalid_argument("expert_ffn: " + text); };
  if (experts.empty()) return;
  check_dtype("expert_ffn", x_dtype);
  if (activation < 0 || activation > 6) fail("unknown activation " + std::to_string(activation));
  if (tokens.size() != experts.size() || pairs.size() != experts.size())
    fail("expected one array of tokens and of pairs per expert (" + std::to_string(experts.size()) +
         "), got " + std::to_string(tokens.size()) + " and " + std::to_string(pairs.size()));
  FfnSpec spec{experts[0]->geometry, static_cast<Activation>(activation), alpha, limit};
  if (x_stride < spec.geometry.hidden && num_tokens > 1)
    fail("x: row stride " + std::to_string(x_stride) + " is less than H");
  std::vector<FfnTask> tasks;
  for (size_t t = 0; t < experts.size(); ++t) {
    const ExpertGeometry &a = experts[t]->geometry, &b = spec.geometry;
    if (a.hidden != b.hidden || a.intermediate != b.intermediate || a.gated != b.gated ||
        a.biased != b.biased || a.exact_dtype != b.exact_dtype)
      fail("expert " + std::to_string(t) + " has another geometry than expert 0");
    if (tokens[t].size() != pairs[t].size())
      fail("expert " + std::to_string(t) + ": " + std::to_string(tokens[t].size()) +
           " tokens but " + std::to_string(pairs[t].size()) + " pairs");
    for (int64_t i = 0; i < tokens[t].size(); ++i) {
      if (tokens[t].data()[i] < 0 || tokens[t].data()[i] >= num_tokens)
        fail("token index " + std::to_string(tokens[t].data()[i]) +
             " is outside x with T = " + std::to_string(num_tokens));
      if (pairs[t].data()[i] < 0 || pairs[t].data()[i] >= num_pairs)
        fail("pair index " + std::to_string(pairs[t].data()[i]) + " is outside out with " +
             std::to_string(num_pairs) + " rows");
    }
    tasks.push_back({&experts[t]->view, tokens[t].data(), pairs[t].data(),
                     static_cast<int32_t>(tokens[t].size())});
  }
  py::gil_scoped_release release;
  expert_ffn(spec, tasks.data(), static_cast<int>(tasks.size()), reinterpret_cast<const void*>(x),
             static_cast<DType>(x_dtype), x_stride, reinterpret_cast<float*>(out));
}

// What a caller says of a matrix; the size of its record tells whether that is so.
CodedMatrix coded_matrix(const char* op, uintptr_t record, int64_t record_bytes, int64_t rows,
                         int64_t cols, int bits) {
  const auto fail = [&](const std::string& text) {
    throw std::invalid_argument(std::string(op) + ": " + text);
  };
  const int depth = depth_of_bits(bits);
  if (depth < 1) fail("bits must be 2, 3, 4 or 8, got " + std::to_string(bits));
  if (rows < 1 || cols < 1 || rows > int64_t{1} << 31 || cols > int64_t{1} << 31)
    fail("expected a matrix of at least one row and column, got [" + std::to_string(rows) + ", " +
         std::to_string(cols) + "]");
  const CodedMatrix W{
      static_cast<Level>(depth - 1), {rows, cols}, reinterpret_cast<const uint8_t*>(record)};
  const int64_t expected = coded_matrix_bytes(W.shape, W.level);
  if (record_bytes != expected)
    fail("record: expected " + std::to_string(expected) + " bytes for [" + std::to_string(rows) +
         ", " + std::to_string(cols) + "] at " + std::to_string(bits) + " bits, got " +
         std::to_string(record_bytes));
  if (record % 64) fail("record: expected an address that is a multiple of 64");
  return W;
}

void bind_coded_linear(py::module_& m) {
  m.def(
      "encode_coded_matrix",
      [](uintptr_t source, int dtype, int64_t rows, int64_t cols, int bits, uintptr_t record,
         int64_t record_bytes) {
        check_dtype("encode_coded_matrix", dtype);
        const CodedMatrix W =
            coded_matrix("encode_coded_matrix", record, record_bytes, rows, cols, bits);
        py::gil_scoped_release release;
        encode_coded_matrix(W.shape, reinterpret_cast<const void*>(source),
                            static_cast<DType>(dtype), static_cast<int>(W.level) + 1,
                            reinterpret_cast<uint8_t*>(record));
      },
      py::arg("source"), py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("bits"),
      py::arg("record"), py::arg("record_bytes"));
  m.def(
      "coded_linear",
      [](const std::vector<std::tuple<uintptr_t, int64_t, int64_t, uintptr_t, int, uintptr_t>>&
             targets,
         int64_t cols, int bits, uintptr_t x, int dtype, int64_t T, int64_t x_stride) {
        check_dtype("coded_linear", dtype);
        std::vector<CodedTarget> to;
        for (const auto& [record, record_bytes, rows, bias, bias_dtype, out] : targets) {
          check_dtype("coded_linear", bias_dtype);
          to.push_back({coded_matrix("coded_linear", record, record_bytes, rows, cols, bits),
                        reinterpret_cast<const void*>(bias), static_cast<DType>(bias_dtype),
                        reinterpret_cast<void*>(out)});
        }
        if (T > 1 && x_stride < cols)
          throw std::invalid_argument("coded_linear: x: row stride " + std::to_string(x_stride) +
                                      " is less than its " + std::to_string(cols) + " columns");
        py::gil_scoped_release release;
        coded_linear(to.data(), static_cast<int>(to.size()), reinterpret_cast<const void*>(x),
                     static_cast<DType>(dtype), T, x_stride);
      },
      py::arg("targets"), py::arg("cols"), py::arg("bits"), py::arg("x"), py::arg("dtype"),
      py::arg("T"), py::arg("x_stride"),
      "targets: (record, record_bytes, rows, bias, bias_dtype, out) of each matrix");
  m.def(
      "dense_linear",
      [](uintptr_t weight, int weight_dtype, int64_t rows, int64_t cols, uintptr_t x, int dtype,
         int64_t T, int64_t x_stride, uintptr_t bias, uintptr_t out) {
        check_dtype("dense_linear", dtype);
        check_dtype("dense_linear", weight_dtype);
        py::gil_scoped_release release;
        dense_linear(reinterpret_cast<const void*>(weight), static_cast<DType>(weight_dtype), rows,
                     cols, reinterpret_cast<const void*>(x), static_cast<DType>(dtype), T, x_stride,
                     reinterpret_cast<const void*>(bias), reinterpret_cast<void*>(out));
      },
      py::arg("weight"), py::arg("weight_dtype"), py::arg("rows"), py::arg("cols"), py::arg("x"),
      py::arg("dtype"), py::arg("T"), py::arg("x_stride"), py::arg("bias"), py::arg("out"));
  m.def(
      "attend",
      [](uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t mask, uintptr_t out, int dtype,
         const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, float scale) {
        check_dtype("attend", dtype);
        if (sizes.size() != 5 || strides.size() != 9)
          throw std::invalid_argument("attend: expected 5 sizes and 9 strides");
        AttendArgs args{reinterpret_cast<const void*>(q),
                        reinterpret_cast<const void*>(k),
                        reinterpret_cast<const void*>(v),
                        reinterpret_cast<const uint8_t*>(mask),
                        reinterpret_cast<void*>(out),
                        static_cast<DType>(dtype),
                        sizes[0],
                        sizes[1],
                        sizes[2],
                        sizes[3],
                        sizes[4],
                        {},
                        scale};
        std::copy(strides.begin(), strides.end(), args.strides);
        if (args.kv_heads < 1 || args.heads % args.kv_heads)
          throw std::invalid_argument(
              "attend: expected query heads in whole groups per KV head, got " +
              std::to_string(args.heads) + " for " + std::to_string(args.kv_heads));
        py::gil_scoped_release release;
        attend(args);
      },
      py::arg("q"), py::arg("k"), py::arg("v"), py::arg("mask"), py::arg("out"), py::arg("dtype"),
      py::arg("sizes"), py::arg("strides"), py::arg("scale"),
      "sizes: batch, heads, KV heads, positions, head size; strides: see AttendArgs");
  m.def(
      "coded_rows",
      [](uintptr_t record, int64_t record_bytes, int64_t rows, int64_t cols, int bits,
         int64_t first, int64_t count, uintptr_t out, int dtype) {
        check_dtype("coded_rows", dtype);
        const CodedMatrix W = coded_matrix("coded_rows", record, record_bytes, rows, cols, bits);
        if (first < 0 || count < 0 || first + count > rows)
          throw std::invalid_argument("coded_rows: rows " + std::to_string(first) + " to " +
                                      std::to_string(first + count) + " are outside " +
                                      std::to_string(rows));
        py::gil_scoped_release release;
        coded_rows(W, first, count, reinterpret_cast<void*>(out), static_cast<DType>(dtype));
      },
      py::arg("record"), py::arg("record_bytes"), py::arg("rows"), py::arg("cols"), py::arg("bits"),
      py::arg("first"), py::arg("count"), py::arg("out"), py::arg("dtype"));
  m.def(
      "coded_gather",
      [](uintptr_t record, int64_t record_bytes, int64_t rows, int64_t cols, int bits,
         uintptr_t ids, int64_t n, uintptr_t out, int dtype) {
        check_dtype("coded_gather", dtype);
        const CodedMatrix W = coded_matrix("coded_gather", record, record_bytes, rows, cols, bits);
        py::gil_scoped_release release;
        coded_gather(W, reinterpret_cast<const int64_t*>(ids), n, reinterpret_cast<void*>(out),
                     static_cast<DType>(dtype));
      },
      py::arg("record"), py::arg("record_bytes"), py::arg("rows"), py::arg("cols"), py::arg("bits"),
      py::arg("ids"), py::arg("n"), py::arg("out"), py::arg("dtype"));
  m.def(
      "coded_matrix_bytes",
      [](int64_t rows, int64_t cols, int bits) {
        const int depth = depth_of_bits(bits);
        if (depth < 1)
          throw std::invalid_argument("coded_matrix_bytes: bits must be 2, 3, 4 or 8, got " +
                                      std::to_string(bits));
        return coded_matrix_bytes({rows, cols}, static_cast<Level>(depth - 1));
      },
      py::arg("rows"), py::arg("cols"), py::arg("bits"));
}

}  // namespace

// Tensors come as addresses: torch's bf16 has no numpy type. The wrappers in comoe_kernels check
// them.
void bind_cpu(py::module_& m) {
  py::class_<PagedExpert>(m, "PagedExpert")
      .def(py::init<int64_t, int64_t, bool, bool, int, int,
                    const std::map<int, std::pair<Array<uint8_t>, Array<int64_t>>>&, int64_t>(),
           py::arg("hidden"), py::arg("intermediate"), py::arg("gated"), py::arg("biased"),
           py::arg("exact_dtype"), py::arg("level"), py::arg("records"), py::arg("page_bytes"))
      .def_property_readonly("hidden", [](const PagedExpert& e) { return e.geometry.hidden; })
      .def_property_readonly("intermediate",
                             [](const PagedExpert& e) { return e.geometry.intermediate; })
      .def_property_readonly("gated", [](const PagedExpert& e) { return e.geometry.gated; })
      .def_property_readonly("biased", [](const PagedExpert& e) { return e.geometry.biased; })
      .def_property_readonly(
          "exact_dtype",
          [](const PagedExpert& e) { return static_cast<int>(e.geometry.exact_dtype); })
      .def_property_readonly("level", &PagedExpert::level,
                             "0..4 of an expert of one part, -1 of several or of none")
      .def_property_readonly("has_matrices", &PagedExpert::has_matrices,
                             "False if the expert's output is its mean")
      .def_property_readonly("has_mean", [](const PagedExpert& e) { return !e.view.means.empty(); })
      .def_property_readonly("num_matrices",
                             [](const PagedExpert& e) { return e.geometry.num_matrices(); });
  m.def("expert_ffn", &bind_expert_ffn, py::arg("experts"), py::arg("tokens"), py::arg("pairs"),
        py::arg("activation"), py::arg("alpha"), py::arg("limit"), py::arg("x"), py::arg("x_dtype"),
        py::arg("num_tokens"), py::arg("x_stride"), py::arg("out"), py::arg("num_pairs"));
  m.def(
      "combine_pairs",
      [](uintptr_t pair_out, uintptr_t weights, uintptr_t expert_idx, int64_t num_experts,
         int64_t T, int64_t K, int64_t H, uintptr_t out, int out_dtype) {
        check_dtype("combine_pairs", out_dtype);
        py::gil_scoped_release release;
        combine_pairs(reinterpret_cast<const float*>(pair_out),
                      reinterpret_cast<const float*>(weights),
                      reinterpret_cast<const int64_t*>(expert_idx), num_experts, T, K, H,
                      reinterpret_cast<void*>(out), static_cast<DType>(out_dtype));
      },
      py::arg("pair_out"), py::arg("weights"), py::arg("expert_idx"), py::arg("num_experts"),
      py::arg("T"), py::arg("K"), py::arg("H"), py::arg("out"), py::arg("out_dtype"));
  m.def(
      "unpack_matrix",
      [](const PagedExpert& expert, int matrix, uintptr_t out, int out_dtype, int64_t ld) {
        check_dtype("unpack_matrix", out_dtype);
        if (matrix < 0 || matrix >= expert.geometry.num_matrices())
          throw std::invalid_argument("unpack_matrix: the expert has no matrix " +
                                      std::to_string(matrix));
        if (ld < expert.geometry.matrix(matrix).cols)
          throw std::invalid_argument("unpack_matrix: out: row stride " + std::to_string(ld) +
                                      " is less than the number of columns");
        py::gil_scoped_release release;
        unpack_matrix(expert.geometry, expert.view, matrix, reinterpret_cast<void*>(out),
                      static_cast<DType>(out_dtype), ld);
      },
      py::arg("expert"), py::arg("matrix"), py::arg("out"), py::arg("out_dtype"), py::arg("ld"));
  m.def(
      "unpack_bias",
      [](const PagedExpert& expert, int matrix, uintptr_t out) {
        if (matrix < 0 || matrix >= expert.geometry.num_matrices() || !expert.geometry.biased)
          throw std::invalid_argument("unpack_bias: the expert has no bias " +
                                      std::to_string(matrix));
        unpack_bias(expert.geometry, expert.view, matrix, reinterpret_cast<float*>(out));
      },
      py::arg("expert"), py::arg("matrix"), py::arg("out"));
  m.def(
      "unpack_mean",
      [](const PagedExpert& expert, uintptr_t out) {
        unpack_mean(expert.geometry, expert.view, reinterpret_cast<float*>(out));
      },
      py::arg("expert"), py::arg("out"));
  bind_coded_linear(m);
  m.def("isa_name", &isa_name);
  m.def("isa_names", &isa_names);
  m.def("force_isa", &force_isa, py::arg("name"));
  m.def(
      "stream_read",
      [](const Array<uint8_t>& data) {
        const py::gil_scoped_release release;
        return stream_read(data.data(), data.size() / 64 * 64);
      },
      py::arg("data"));
  m.def(
      "set_num_threads", [](int n) { Parallel::instance().set_num_threads(n); },
      py::arg("num_threads"));
  m.attr("SPIN_MICROSECONDS") = Parallel::kSpinMicroseconds;
  m.def("set_spin", [](int64_t us) { Parallel::instance().set_spin(us); }, py::arg("microseconds"));
  m.def("num_threads", [] { return Parallel::instance().num_threads(); });
  m.def(
      "use_gomp", [](uintptr_t f) { Parallel::instance().use_gomp(reinterpret_cast<void*>(f)); },
      py::arg("gomp_parallel"));
}

}  // namespace comoe
