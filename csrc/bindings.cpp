// The one place where Python meets the native code. Sections: ladder codec, engine, CPU kernels, device.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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
static void bind_cpu(py::module_& m) {}

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
