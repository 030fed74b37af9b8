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
