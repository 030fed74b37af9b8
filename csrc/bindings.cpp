// The one place where Python meets the native code. Sections: ladder codec, engine, CPU kernels, device.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cpu/expert_ffn.h"
#include "cpu/parallel.h"
#include "ladder/codec.h"
#include "storage/crc32c.h"

namespace py = pybind11;
using namespace comoe;

// ---- ladder codec
// ---------------------------------------------------------------------------------------------
static DType exact_dtype_of(int value) {
  if (value < 0 || value > 2)
    throw std::invalid_argument("exact_dtype must be 0 (fp32), 1 (bf16) or 2 (fp16), got " +
                                std::to_string(value));
  return static_cast<DType>(value);
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

// A C-contiguous array of the dtype that holds `dtype` in numpy (bf16 and fp16 travel as uint16).
static py::array source_array(py::handle given, DType dtype, const char* what) {
  if (!py::isinstance<py::array>(given))
    throw py::type_error(std::string("encode_expert: ") + what + " must be numpy arrays");
  auto array = py::reinterpret_borrow<py::array>(given);
  const bool fp32 = dtype == DType::fp32;
  if (!array.dtype().is(fp32 ? py::dtype::of<float>() : py::dtype::of<uint16_t>()))
    throw py::type_error(
        std::string("encode_expert: ") + what + " must be " +
        (fp32 ? "float32" : "uint16 (the bits of bf16 or fp16; use .view(np.uint16))") +
        " for this exact_dtype, got " + std::string(py::str(array.dtype())));
  return py::array::ensure(array, py::array::c_style);
}

static std::string shape_text(const py::array& array) {
  return py::str(py::tuple(array.attr("shape")));
}

// One expert to the payloads of its records; see codec.h.
static py::list encode_expert_py(const py::list& matrices, const py::list& biases, int exact_dtype,
                                 bool gated) {
  const DType dtype = exact_dtype_of(exact_dtype);
  const size_t count = gated ? 3 : 2;
  if (matrices.size() != count)
    throw std::invalid_argument(
        "encode_expert: matrices must be " +
        std::string(gated ? "[gate, up, down]" : "[up, down] when not gated") + ", got " +
        std::to_string(matrices.size()) + " arrays");
  if (!biases.empty() && biases.size() != count)
    throw std::invalid_argument("encode_expert: biases must be empty or one per matrix (" +
                                std::to_string(count) + "), got " + std::to_string(biases.size()));
  std::vector<py::array> held;
  ExpertSource source;
  for (size_t i = 0; i < count; ++i) {
    held.push_back(source_array(matrices[i], dtype, "matrices"));
    source.matrices[i] = held.back().data();
    if (held.back().ndim() != 2)
      throw std::invalid_argument("encode_expert: matrices must be [rows, cols], got shape " +
                                  shape_text(held.back()));
  }
  const ExpertGeometry g =
      geometry_of(held[0].shape(1), held[0].shape(0), gated, !biases.empty(), exact_dtype);
  for (size_t i = 0; i < count; ++i) {
    const MatrixGeometry want = g.matrix(static_cast<int>(i));
    if (held[i].shape(0) != want.rows || held[i].shape(1) != want.cols)
      throw std::invalid_argument("encode_expert: matrix " + std::to_string(i) + " must be [" +
                                  std::to_string(want.rows) + ", " + std::to_string(want.cols) +
                                  "] to fit matrix 0, got " + shape_text(held[i]));
  }
  for (size_t i = 0; i < biases.size(); ++i) {
    held.push_back(source_array(biases[i], dtype, "biases"));
    source.biases[i] = held.back().data();
    const int64_t rows = g.matrix(static_cast<int>(i)).rows;
    if (held.back().ndim() != 1 || held.back().shape(0) != rows)
      throw std::invalid_argument("encode_expert: bias " + std::to_string(i) + " must be [" +
                                  std::to_string(rows) + "], got " + shape_text(held.back()));
  }
  py::list out;
  uint8_t* payloads[kNumRecords];
  for (int r = 0; r < kNumRecords; ++r) {
    py::array_t<uint8_t> payload(g.record_bytes(r));
    payloads[r] = payload.mutable_data();
    out.append(std::move(payload));
  }
  py::gil_scoped_release release;
  encode_expert(g, source, payloads);
  return out;
}

static void bind_codec(py::module_& m) {
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
      .def("blocks_offset", [](const ExpertGeometry& g, int record, int matrix) {
        return g.blocks_offset(check_below(record, kNumRecords, "record"),
                               check_below(matrix, g.num_matrices(), "matrix"));
      });
  m.attr("NUM_RECORDS") = kNumRecords;
  m.def("encode_expert", &encode_expert_py, py::arg("matrices"), py::arg("biases"),
        py::arg("exact_dtype"), py::arg("gated"),
        "Payloads of one expert's records, as uint8 arrays.");
  m.def(
      "crc32c",
      [](const py::buffer& buffer, uint32_t seed) {
        const py::buffer_info info = buffer.request();
        if (info.size > 0 && !PyBuffer_IsContiguous(info.view(), 'C'))
          throw std::invalid_argument("crc32c: buffer must be C-contiguous");
        py::gil_scoped_release release;
        return crc32c(info.ptr, static_cast<size_t>(info.size) * info.itemsize, seed);
      },
      py::arg("buffer"), py::arg("seed") = 0,
      "CRC-32C of a buffer's bytes, continuing from `seed`.");
}

// ---- engine ---------------------------------------------------------------------------------------------------
static void bind_engine(py::module_& m) {}

// ---- CPU kernels ----------------------------------------------------------------------------------------------
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// An expert whose records lie in numpy arrays, page by page in any order. Tests, benchmarks and the
// unpack operators use it; the engine builds ExpertView from its own pages.
struct PagedExpert {
  comoe::ExpertGeometry geometry;
  comoe::ExpertView view;
  std::vector<std::vector<const uint8_t*>> pages;
  std::vector<py::object> owners;

  PagedExpert(int64_t hidden, int64_t intermediate, bool gated, bool biased, int exact_dtype, int level,
              const std::map<int, std::pair<Array<uint8_t>, Array<int64_t>>>& records, int64_t page_bytes) {
    auto fail = [](const std::string& text) { throw std::invalid_argument("PagedExpert: " + text); };
    if (hidden < 1 || intermediate < 1) fail("hidden and intermediate must be at least 1");
    if (exact_dtype < 0 || exact_dtype > 2) fail("exact_dtype must be 0 (fp32), 1 (bf16) or 2 (fp16)");
    if (level < 0 || level > 4) fail("level must be 0..4, got " + std::to_string(level));
    if (page_bytes < 4096 || page_bytes % 4096)
      fail("page_bytes must be a multiple of 4096, got " + std::to_string(page_bytes));
    geometry.hidden = hidden;
    geometry.intermediate = intermediate;
    geometry.gated = gated;
    geometry.biased = biased;
    geometry.exact_dtype = static_cast<comoe::DType>(exact_dtype);
    view.level = static_cast<comoe::Level>(level);
    pages.resize(comoe::kNumRecords);
    for (int r = 0; r < comoe::kNumRecords; ++r) {
      const bool needed = level == 4 ? r == 4 : r <= level;
      if (!needed) continue;
      const auto found = records.find(r);
      if (found == records.end())
        fail("level " + std::to_string(level) + " needs record " + std::to_string(r));
      const auto& [arena, offsets] = found->second;
      const int64_t expected = comoe::ceil_div(geometry.record_bytes(r), page_bytes);
      if (offsets.ndim() != 1 || offsets.size() != expected)
        fail("record " + std::to_string(r) + " needs " + std::to_string(expected) + " pages, got " +
             std::to_string(offsets.size()));
      for (int64_t i = 0; i < expected; ++i) {
        const int64_t offset = offsets.data()[i];
        // The last page may end with the record.
        const int64_t last = geometry.record_bytes(r) - (expected - 1) * page_bytes;
        if (offset < 0 || offset + (i + 1 < expected ? page_bytes : last) > arena.size())
          fail("record " + std::to_string(r) + ": page " + std::to_string(i) + " lies outside its array");
        const uint8_t* page = arena.data() + offset;
        if (reinterpret_cast<uintptr_t>(page) % 64)
          fail("record " + std::to_string(r) + ": page " + std::to_string(i) + " is not aligned to 64 bytes");
        pages[r].push_back(page);
      }
      view.records[r] = {pages[r].data(), page_bytes};
      owners.push_back(arena);
    }
  }
};

void check_dtype(const char* op, int dtype) {
  if (dtype < 0 || dtype > 2)
    throw std::invalid_argument(std::string(op) + ": dtype must be 0 (fp32), 1 (bf16) or 2 (fp16)");
}

void bind_expert_ffn(const std::vector<const PagedExpert*>& experts, const std::vector<Array<int32_t>>& tokens,
                     const std::vector<Array<int32_t>>& pairs, int activation, float alpha, float limit,
                     uintptr_t x, int x_dtype, int64_t num_tokens, int64_t x_stride, uintptr_t out,
                     int64_t num_pairs) {
  auto fail = [](const std::string& text) { throw std::invalid_argument("expert_ffn: " + text); };
  if (experts.empty()) return;
  check_dtype("expert_ffn", x_dtype);
  if (activation < 0 || activation > 6) fail("unknown activation " + std::to_string(activation));
  if (tokens.size() != experts.size() || pairs.size() != experts.size())
    fail("expected one array of tokens and of pairs per expert (" + std::to_string(experts.size()) + "), got " +
         std::to_string(tokens.size()) + " and " + std::to_string(pairs.size()));
  comoe::FfnSpec spec{experts[0]->geometry, static_cast<comoe::Activation>(activation), alpha, limit};
  if (x_stride < spec.geometry.hidden && num_tokens > 1)
    fail("x: row stride " + std::to_string(x_stride) + " is less than H");
  std::vector<comoe::FfnTask> tasks;
  for (size_t t = 0; t < experts.size(); ++t) {
    const comoe::ExpertGeometry &a = experts[t]->geometry, &b = spec.geometry;
    if (a.hidden != b.hidden || a.intermediate != b.intermediate || a.gated != b.gated ||
        a.biased != b.biased || a.exact_dtype != b.exact_dtype)
      fail("expert " + std::to_string(t) + " has another geometry than expert 0");
    if (tokens[t].size() != pairs[t].size())
      fail("expert " + std::to_string(t) + ": " + std::to_string(tokens[t].size()) + " tokens but " +
           std::to_string(pairs[t].size()) + " pairs");
    for (int64_t i = 0; i < tokens[t].size(); ++i) {
      if (tokens[t].data()[i] < 0 || tokens[t].data()[i] >= num_tokens)
        fail("token index " + std::to_string(tokens[t].data()[i]) + " is outside x with T = " +
             std::to_string(num_tokens));
      if (pairs[t].data()[i] < 0 || pairs[t].data()[i] >= num_pairs)
        fail("pair index " + std::to_string(pairs[t].data()[i]) + " is outside out with " +
             std::to_string(num_pairs) + " rows");
    }
    tasks.push_back(
        {&experts[t]->view, tokens[t].data(), pairs[t].data(), static_cast<int32_t>(tokens[t].size())});
  }
  py::gil_scoped_release release;
  comoe::expert_ffn(spec, tasks.data(), static_cast<int>(tasks.size()), reinterpret_cast<const void*>(x),
                    static_cast<comoe::DType>(x_dtype), x_stride, reinterpret_cast<float*>(out));
}

}  // namespace

// Tensors come as addresses: torch's bf16 has no numpy type. The wrappers in comoe_kernels check them.
static void bind_cpu(py::module_& m) {
  py::class_<PagedExpert>(m, "PagedExpert")
      .def(py::init<int64_t, int64_t, bool, bool, int, int,
                    const std::map<int, std::pair<Array<uint8_t>, Array<int64_t>>>&, int64_t>(),
           py::arg("hidden"), py::arg("intermediate"), py::arg("gated"), py::arg("biased"),
           py::arg("exact_dtype"), py::arg("level"), py::arg("records"), py::arg("page_bytes"))
      .def_property_readonly("hidden", [](const PagedExpert& e) { return e.geometry.hidden; })
      .def_property_readonly("intermediate", [](const PagedExpert& e) { return e.geometry.intermediate; })
      .def_property_readonly("gated", [](const PagedExpert& e) { return e.geometry.gated; })
      .def_property_readonly("biased", [](const PagedExpert& e) { return e.geometry.biased; })
      .def_property_readonly("exact_dtype",
                             [](const PagedExpert& e) { return static_cast<int>(e.geometry.exact_dtype); })
      .def_property_readonly("level", [](const PagedExpert& e) { return static_cast<int>(e.view.level); })
      .def_property_readonly("num_matrices", [](const PagedExpert& e) { return e.geometry.num_matrices(); });
  m.def("expert_ffn", &bind_expert_ffn, py::arg("experts"), py::arg("tokens"), py::arg("pairs"),
        py::arg("activation"), py::arg("alpha"), py::arg("limit"), py::arg("x"), py::arg("x_dtype"),
        py::arg("num_tokens"), py::arg("x_stride"), py::arg("out"), py::arg("num_pairs"));
  m.def(
      "combine_pairs",
      [](uintptr_t pair_out, uintptr_t weights, uintptr_t expert_idx, int64_t num_experts, int64_t T, int64_t K,
         int64_t H, uintptr_t out, int out_dtype) {
        check_dtype("combine_pairs", out_dtype);
        py::gil_scoped_release release;
        comoe::combine_pairs(reinterpret_cast<const float*>(pair_out), reinterpret_cast<const float*>(weights),
                             reinterpret_cast<const int64_t*>(expert_idx), num_experts, T, K, H,
                             reinterpret_cast<void*>(out), static_cast<comoe::DType>(out_dtype));
      },
      py::arg("pair_out"), py::arg("weights"), py::arg("expert_idx"), py::arg("num_experts"), py::arg("T"),
      py::arg("K"), py::arg("H"), py::arg("out"), py::arg("out_dtype"));
  m.def(
      "unpack_matrix",
      [](const PagedExpert& expert, int matrix, uintptr_t out, int out_dtype, int64_t ld) {
        check_dtype("unpack_matrix", out_dtype);
        if (matrix < 0 || matrix >= expert.geometry.num_matrices())
          throw std::invalid_argument("unpack_matrix: the expert has no matrix " + std::to_string(matrix));
        if (ld < expert.geometry.matrix(matrix).cols)
          throw std::invalid_argument("unpack_matrix: out: row stride " + std::to_string(ld) +
                                      " is less than the number of columns");
        py::gil_scoped_release release;
        comoe::unpack_matrix(expert.geometry, expert.view, matrix, reinterpret_cast<void*>(out),
                             static_cast<comoe::DType>(out_dtype), ld);
      },
      py::arg("expert"), py::arg("matrix"), py::arg("out"), py::arg("out_dtype"), py::arg("ld"));
  m.def(
      "unpack_bias",
      [](const PagedExpert& expert, int matrix, uintptr_t out) {
        if (matrix < 0 || matrix >= expert.geometry.num_matrices() || !expert.geometry.biased)
          throw std::invalid_argument("unpack_bias: the expert has no bias " + std::to_string(matrix));
        comoe::unpack_bias(expert.geometry, expert.view, matrix, reinterpret_cast<float*>(out));
      },
      py::arg("expert"), py::arg("matrix"), py::arg("out"));
  m.def("isa_name", &comoe::isa_name);
  m.def("isa_names", &comoe::isa_names);
  m.def("force_isa", &comoe::force_isa, py::arg("name"));
  m.def(
      "set_num_threads", [](int n) { comoe::Parallel::instance().set_num_threads(n); }, py::arg("num_threads"));
  m.def("num_threads", [] { return comoe::Parallel::instance().num_threads(); });
  m.def(
      "use_gomp", [](uintptr_t f) { comoe::Parallel::instance().use_gomp(reinterpret_cast<void*>(f)); },
      py::arg("gomp_parallel"));
}

// ---- device (CUDA, when built with it) ------------------------------------------------------------------------
#ifdef COMOE_CUDA
#include "cuda/device.h"
#endif

// (devices as dicts, why there are none). Without CUDA in the build the functions are there all the same.
static py::tuple cuda_devices() {
  py::list devices;
  std::string why = "comoe was built without CUDA";
#ifdef COMOE_CUDA
  std::vector<comoe::CudaDevice> found;
  {
    py::gil_scoped_release release;
    found = comoe::cuda_devices(&why);
  }
  for (const comoe::CudaDevice& d : found) {
    py::dict device;
    device["index"] = d.index;
    device["name"] = d.name;
    device["capability"] = py::make_tuple(d.capability_major, d.capability_minor);
    device["num_sms"] = d.num_sms;
    device["total_bytes"] = d.total_bytes;
    device["unified_memory"] = d.unified_memory;
    devices.append(device);
  }
#endif
  return py::make_tuple(devices, why);
}

static double cuda_copy_bandwidth(int index, int64_t num_bytes, int repeats) {
#ifdef COMOE_CUDA
  py::gil_scoped_release release;
  return comoe::cuda_copy_bandwidth(index, num_bytes, repeats);
#else
  throw std::runtime_error(
      "cuda_copy_bandwidth: comoe was built without CUDA; put nvcc on PATH and build again");
#endif
}

static void bind_device(py::module_& m) {
#ifdef COMOE_CUDA
  m.attr("cuda_built") = true;
#else
  m.attr("cuda_built") = false;
#endif
  m.def("cuda_devices", &cuda_devices);
  m.def("cuda_copy_bandwidth", &cuda_copy_bandwidth, py::arg("index"), py::arg("num_bytes") = 256 << 20,
        py::arg("repeats") = 5);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native half of comoe.";
  bind_codec(m);
  bind_engine(m);
  bind_cpu(m);
  bind_device(m);
}
