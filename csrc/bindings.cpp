// The one place where Python meets the native code. Sections: ladder codec, engine, CPU kernels, device.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "storage/crc32c.h"

namespace py = pybind11;

// ---- ladder codec ---------------------------------------------------------------------------------------------
static void bind_codec(py::module_& m) {}

// ---- engine ---------------------------------------------------------------------------------------------------
static uint32_t crc32c_of(const py::buffer& buffer, uint32_t seed) {
  const py::buffer_info info = buffer.request();
  if (!PyBuffer_IsContiguous(info.view(), 'C'))
    throw std::invalid_argument("crc32c: buffer: expected contiguous memory, got a strided view; copy it first");
  py::gil_scoped_release release;
  return comoe::crc32c(info.ptr, static_cast<size_t>(info.size * info.itemsize), seed);
}

static void bind_engine(py::module_& m) {
  m.def("crc32c", &crc32c_of, py::arg("buffer"), py::arg("seed") = 0,
        "CRC-32C of a contiguous buffer; seed: the checksum of what comes before it.");
  m.def("crc32c_isa", &comoe::crc32c_isa);
}

// ---- CPU kernels ----------------------------------------------------------------------------------------------
static void bind_cpu(py::module_& m) {}

// ---- device (CUDA, when built with it) ------------------------------------------------------------------------
static void bind_device(py::module_& m) {}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native half of comoe.";
  bind_codec(m);
  bind_engine(m);
  bind_cpu(m);
  bind_device(m);
}
