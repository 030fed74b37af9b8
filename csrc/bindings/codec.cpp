// The ladder codec, and the geometry of an expert.
#include "../ladder/codec.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"

namespace comoe {

static ExactType exact_dtype_of(int value) {
  if (value < 0 || value >= kNumExactTypes)
    throw std::invalid_argument(
        "exact_dtype must be 0 (fp32), 1 (bf16), 2 (fp16), 3 (fp8) or 4 (mxfp4), got " +
        std::to_string(value));
  return static_cast<ExactType>(value);
}

static ExpertGeometry geometry_of(int64_t hidden, int64_t intermediate, bool gated, bool biased,
                                  int exact_dtype) {
  // The upper limit keeps every product of sizes far inside 64 bits, whatever a file claims.
  for (int64_t size : {hidden, intermediate})
    if (size < 1 || size > int64_t{1} << 24)
      throw std::invalid_argument("Geometry: hidden and intermediate must be in 1..2**24, got " +
                                  std::to_string(size));
  return {hidden, intermediate, gated, biased, exact_dtype_of(exact_dtype)};
}

static int check_below(int value, int limit, const char* what) {
  if (value < 0 || value >= limit)
    throw std::invalid_argument(std::string("Geometry: ") + what + " must be in 0.." +
                                std::to_string(limit - 1) + ", got " + std::to_string(value));
  return value;
}

// A C-contiguous array of elements of `bits`: float32, uint16 (bf16 and fp16 travel as their bits)
// or uint8 (fp8 codes, or two mxfp4 codes).
static py::array source_array(py::handle given, int64_t bits, const char* what) {
  if (!py::isinstance<py::array>(given))
    throw py::type_error(std::string("encode_expert: ") + what + " must be numpy arrays");
  auto array = py::reinterpret_borrow<py::array>(given);
  const bool fits = bits == 32   ? array.dtype().is(py::dtype::of<float>())
                    : bits == 16 ? array.dtype().is(py::dtype::of<uint16_t>())
                                 : array.dtype().is(py::dtype::of<uint8_t>());
  if (!fits)
    throw py::type_error(std::string("encode_expert: ") + what + " must be " +
                         (bits == 32   ? "float32"
                          : bits == 16 ? "uint16 (the bits of bf16 or fp16; use .view(np.uint16))"
                                       : "uint8 (the bits of the codes)") +
                         " for this exact_dtype, got " + std::string(py::str(array.dtype())));
  return py::array::ensure(array, py::array::c_style);
}

static std::string shape_text(const py::array& array) {
  return py::str(py::tuple(array.attr("shape")));
}

// `array`, which stands for argument `what`, must be [rows, cols].
static void check_shape(const py::array& array, const std::string& what, int64_t rows, int64_t cols,
                        const char* why) {
  if (array.ndim() != 2 || array.shape(0) != rows || array.shape(1) != cols)
    throw std::invalid_argument("encode_expert: " + what + " must be [" + std::to_string(rows) +
                                ", " + std::to_string(cols) + "] " + why + ", got " +
                                shape_text(array));
}

// One expert to the payloads of its records; see codec.h.
static py::list encode_expert_py(const py::list& matrices, const py::list& biases, int exact_dtype,
                                 bool gated, const py::object& out, const py::list& scales) {
  const ExactType type = exact_dtype_of(exact_dtype);
  const int64_t codes_per_byte = type == ExactType::mxfp4 ? 2 : 1;
  const size_t count = gated ? 3 : 2;
  if (matrices.size() != count)
    throw std::invalid_argument(
        "encode_expert: matrices must be " +
        std::string(gated ? "[gate, up, down]" : "[up, down] when not gated") + ", got " +
        std::to_string(matrices.size()) + " arrays");
  if (!biases.empty() && biases.size() != count)
    throw std::invalid_argument("encode_expert: biases must be empty or one per matrix (" +
                                std::to_string(count) + "), got " + std::to_string(biases.size()));
  if (scales.size() != (is_coded(type) ? count : 0))
    throw std::invalid_argument("encode_expert: scales must be one per matrix of codes (" +
                                std::to_string(is_coded(type) ? count : 0) + "), got " +
                                std::to_string(scales.size()));
  std::vector<py::array> held;
  ExpertSource source;
  for (size_t i = 0; i < count; ++i) {
    held.push_back(source_array(matrices[i], exact_bits(type), "matrices"));
    source.matrices[i] = held.back().data();
    if (held.back().ndim() != 2)
      throw std::invalid_argument("encode_expert: matrices must be [rows, cols], got shape " +
                                  shape_text(held.back()));
  }
  const ExpertGeometry g = geometry_of(held[0].shape(1) * codes_per_byte, held[0].shape(0), gated,
                                       !biases.empty(), exact_dtype);
  for (size_t i = 0; i < count; ++i) {
    const MatrixGeometry want = g.matrix(static_cast<int>(i));
    if (want.cols % codes_per_byte)
      throw std::invalid_argument("encode_expert: mxfp4 needs an even intermediate size, got " +
                                  std::to_string(want.cols));
    check_shape(held[i], "matrix " + std::to_string(i), want.rows, want.cols / codes_per_byte,
                "to fit matrix 0");
  }
  for (size_t i = 0; i < scales.size(); ++i) {
    const MatrixGeometry shape = g.matrix(static_cast<int>(i));
    const bool fp8 = type == ExactType::fp8;
    held.push_back(source_array(scales[i], fp8 ? 32 : 8, "scales"));
    source.scales[i] = held.back().data();
    check_shape(held.back(), "scales " + std::to_string(i), fp8 ? shape.row_tiles() : shape.rows,
                fp8 ? shape.groups() : shape.col_blocks(),
                fp8 ? "(16 rows x 128 columns each)" : "(32 columns each)");
  }
  for (size_t i = 0; i < biases.size(); ++i) {
    held.push_back(source_array(biases[i], 8 * dtype_bytes(g.exact_bias_dtype()), "biases"));
    source.biases[i] = held.back().data();
    const int64_t rows = g.matrix(static_cast<int>(i)).rows;
    if (held.back().ndim() != 1 || held.back().shape(0) != rows)
      throw std::invalid_argument("encode_expert: bias " + std::to_string(i) + " must be [" +
                                  std::to_string(rows) + "], got " + shape_text(held.back()));
  }
  py::list payloads;
  uint8_t* to[kNumRecords];
  if (!out.is_none() && py::len(out) != kNumRecords)
    throw std::invalid_argument("encode_expert: out must hold " + std::to_string(kNumRecords) +
                                " arrays, got " + std::to_string(py::len(out)));
  for (int r = 0; r < kNumRecords; ++r) {
    if (out.is_none()) {
      payloads.append(py::array_t<uint8_t>(g.record_bytes(r)));
    } else {
      payloads.append(out[py::int_(r)]);
    }
    if (!py::isinstance<py::array_t<uint8_t, py::array::c_style>>(payloads[r]) ||
        py::cast<py::array>(payloads[r]).size() != g.record_bytes(r))
      throw std::invalid_argument("encode_expert: out[" + std::to_string(r) +
                                  "] must be a contiguous uint8 array of " +
                                  std::to_string(g.record_bytes(r)) + " bytes");
    to[r] = static_cast<uint8_t*>(py::cast<py::array>(payloads[r]).mutable_data());
  }
  py::gil_scoped_release release;
  encode_expert(g, source, to);
  return payloads;
}

static int planes_of(int bits, const char* what) {
  const int depth = depth_of_bits(bits);
  if (depth < 0)
    throw std::invalid_argument(std::string(what) + ": bits must be 0, 2, 3, 4 or 8, got " +
                                std::to_string(bits));
  return depth;
}

static int set_planes_of(int bits, const char* what) {
  const int planes = planes_of(bits, what);
  if (planes == 0)
    throw std::invalid_argument(std::string(what) + ": bits must be 2, 3, 4 or 8, got 0");
  return planes;
}

static int64_t coded_bytes(const ExpertGeometry& g, int from_bits, int to_bits) {
  const int first = planes_of(from_bits, "coded_bytes"), end = planes_of(to_bits, "coded_bytes");
  if (first >= end) throw std::invalid_argument("coded_bytes: from_bits must be less than to_bits");
  return coded_layout(g).record_bytes(first, end);
}

static CodedLayout low_rank_layout_of(const ExpertGeometry& g, const std::vector<int>& ranks) {
  if (static_cast<int>(ranks.size()) != g.num_matrices())
    throw std::invalid_argument("low rank: expected one rank per matrix (" +
                                std::to_string(g.num_matrices()) + "), got " +
                                std::to_string(ranks.size()));
  uint16_t checked[kMaxMatrices] = {};
  for (int m = 0; m < g.num_matrices(); ++m) {
    const int64_t most = round_up(std::min(g.matrix(m).rows, g.matrix(m).cols), kBlockCols);
    if (ranks[m] < 0 || ranks[m] > std::min<int64_t>(most, kMaxRank))
      throw std::invalid_argument("low rank: rank of matrix " + std::to_string(m) + " [" +
                                  std::to_string(g.matrix(m).rows) + ", " +
                                  std::to_string(g.matrix(m).cols) + "] must be in 0.." +
                                  std::to_string(std::min<int64_t>(most, kMaxRank)) + ", got " +
                                  std::to_string(ranks[m]));
    checked[m] = static_cast<uint16_t>(ranks[m]);
  }
  return low_rank_layout(g, checked);
}

// fp32 matrices of any shapes to one record that begins a code set; see codec.h.
static py::array_t<uint8_t> encode_coded_py(
    const std::vector<py::array_t<float, py::array::c_style>>& matrices,
    const std::vector<py::array_t<float, py::array::c_style>>& biases, int bits) {
  const auto fail = [](const std::string& text) {
    throw std::invalid_argument("encode_coded: " + text);
  };
  const int planes = set_planes_of(bits, "encode_coded");
  if (matrices.empty() || matrices.size() > kMaxCodedMatrices)
    fail("expected 1 to " + std::to_string(kMaxCodedMatrices) + " matrices, got " +
         std::to_string(matrices.size()));
  if (!biases.empty() && biases.size() != matrices.size())
    fail("biases must be empty or one per matrix (" + std::to_string(matrices.size()) + "), got " +
         std::to_string(biases.size()));
  CodedLayout layout;
  layout.count = static_cast<int>(matrices.size());
  layout.biased = !biases.empty();
  std::vector<const float*> sources, bias_sources;
  for (size_t m = 0; m < matrices.size(); ++m) {
    if (matrices[m].ndim() != 2)
      fail("matrices must be [rows, cols], got shape " + shape_text(matrices[m]));
    layout.matrices[m] = {matrices[m].shape(0), matrices[m].shape(1)};
    sources.push_back(matrices[m].data());
    if (!layout.biased) continue;
    if (biases[m].ndim() != 1 || biases[m].shape(0) != matrices[m].shape(0))
      fail("bias " + std::to_string(m) + " must be [" + std::to_string(matrices[m].shape(0)) +
           "], got " + shape_text(biases[m]));
    bias_sources.push_back(biases[m].data());
  }
  py::array_t<uint8_t> payload(layout.record_bytes(0, planes));
  uint8_t* to = payload.mutable_data();
  py::gil_scoped_release release;
  encode_coded(layout, sources.data(), bias_sources.data(), planes, to);
  return payload;
}

void bind_codec(py::module_& m) {
  py::class_<ExpertGeometry>(
      m, "Geometry", "Shape of an expert's ladder: bytes and offsets in its records' payloads.")
      .def(py::init(&geometry_of), py::arg("hidden"), py::arg("intermediate"), py::arg("gated"),
           py::arg("biased"), py::arg("exact_dtype"))
      .def_readonly("hidden", &ExpertGeometry::hidden)
      .def_readonly("intermediate", &ExpertGeometry::intermediate)
      .def_readonly("gated", &ExpertGeometry::gated)
      .def_readonly("biased", &ExpertGeometry::biased)
      .def_property_readonly(
          "exact_dtype", [](const ExpertGeometry& g) { return static_cast<int>(g.exact_dtype); })
      .def_property_readonly("num_matrices", &ExpertGeometry::num_matrices)
      .def_property_readonly("num_weights", &ExpertGeometry::num_weights)
      .def("record_bytes",
           [](const ExpertGeometry& g, int record) {
             return g.record_bytes(check_below(record, kNumRecords, "record"));
           })
      .def("header_offset",
           [](const ExpertGeometry& g, int matrix) {
             return g.header_offset(check_below(matrix, g.num_matrices(), "matrix"));
           })
      .def("bias_offset",
           [](const ExpertGeometry& g, int matrix) {
             return g.bias_offset(check_below(matrix, g.num_matrices(), "matrix"));
           })
      .def("params_offset",
           [](const ExpertGeometry& g, int matrix) {
             return g.params_offset(check_below(matrix, g.num_matrices(), "matrix"));
           })
      .def("exact_bias_offset",
           [](const ExpertGeometry& g, int matrix) {
             return g.exact_bias_offset(check_below(matrix, g.num_matrices(), "matrix"));
           })
      .def("exact_scales_offset",
           [](const ExpertGeometry& g, int matrix) {
             return g.exact_scales_offset(check_below(matrix, g.num_matrices() + 1, "matrix"));
           })
      .def("blocks_offset",
           [](const ExpertGeometry& g, int record, int matrix) {
             return g.blocks_offset(check_below(record, kNumRecords, "record"),
                                    check_below(matrix, g.num_matrices(), "matrix"));
           })
      .def("coded_bytes", &coded_bytes, py::arg("from_bits"), py::arg("to_bits"),
           "Payload of a coded record that takes the code from from_bits known bits to to_bits.")
      .def(
          "low_rank_bytes",
          [](const ExpertGeometry& g, const std::vector<int>& ranks, int bits) {
            return low_rank_layout_of(g, ranks).record_bytes(0,
                                                             set_planes_of(bits, "low_rank_bytes"));
          },
          py::arg("ranks"), py::arg("bits") = 8)
      .def(
          "low_rank_params_bytes",
          [](const ExpertGeometry& g, const std::vector<int>& ranks) {
            return low_rank_layout_of(g, ranks).plane_offset(0, 0, 0);
          },
          py::arg("ranks"))
      .def_property_readonly("mean_bytes", &mean_bytes);
  m.attr("MAX_RANK") = kMaxRank;
  m.def("encode_coded", &encode_coded_py, py::arg("matrices"), py::arg("biases"), py::arg("bits"),
        "Payload of one record that begins a code set of `bits` bits, of float32 matrices.");
  m.attr("NUM_RECORDS") = kNumRecords;
  m.def("encode_expert", &encode_expert_py, py::arg("matrices"), py::arg("biases"),
        py::arg("exact_dtype"), py::arg("gated"), py::arg("out") = py::none(),
        py::arg("scales") = py::list(),
        "Payloads of one expert's records, as uint8 arrays: those of `out`, or new ones.");
}

}  // namespace comoe
