// What GPUs there are and how fast bytes reach them. Present only in builds with CUDA
// (COMOE_CUDA=1).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace comoe {

struct CudaDevice {
  int index = 0;
  std::string name;
  int capability_major = 0;
  int capability_minor = 0;
  int num_sms = 0;
  int64_t total_bytes = 0;
  bool unified_memory = false;  // the GPU computes in the host's own memory (Jetson)
};

// All GPUs that the driver shows. No driver or no GPU is an empty list and `why` says which; any
// other failure throws. Opens the driver on first use, creates no context.
std::vector<CudaDevice> cuda_devices(std::string* why = nullptr);

// Bytes per second of copies from pinned host memory to device `index`: the median of `repeats`
// copies of `bytes` after one that is not counted. Creates a context; takes 2 * bytes for its
// duration.
double cuda_copy_bandwidth(int index, int64_t bytes, int repeats);

}  // namespace comoe
