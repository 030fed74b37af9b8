// The one place where Python meets the native code. Sections: ladder codec, engine, CPU kernels, device.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

// ---- ladder codec ---------------------------------------------------------------------------------------------
static void bind_codec(py::module_& m) {}

// ---- engine ---------------------------------------------------------------------------------------------------
static void bind_engine(py::module_& m) {}

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
