// CUDA devices, when built with CUDA.
#include <string>
#include <vector>

#ifdef COMOE_CUDA
#include "../cuda/device.h"
#endif

#include "bindings.h"

namespace comoe {

// (devices as dicts, why there are none). Without CUDA in the build the functions are there all the
// same.
static py::tuple list_devices() {
  py::list devices;
  std::string why = "comoe was built without CUDA";
#ifdef COMOE_CUDA
  std::vector<CudaDevice> found;
  {
    py::gil_scoped_release release;
    found = cuda_devices(&why);
  }
  for (const CudaDevice& d : found) {
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

static double copy_bandwidth(int index, int64_t num_bytes, int repeats) {
#ifdef COMOE_CUDA
  py::gil_scoped_release release;
  return cuda_copy_bandwidth(index, num_bytes, repeats);
#else
  throw std::runtime_error(
      "cuda_copy_bandwidth: comoe was built without CUDA; put nvcc on PATH and build again");
#endif
}

void bind_device(py::module_& m) {
#ifdef COMOE_CUDA
  m.attr("cuda_built") = true;
#else
  m.attr("cuda_built") = false;
#endif
  m.def("cuda_devices", &list_devices);
  m.def("cuda_copy_bandwidth", &copy_bandwidth, py::arg("index"), py::arg("num_bytes") = 256 << 20,
        py::arg("repeats") = 5);
}

}  // namespace comoe
