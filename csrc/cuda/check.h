// Every CUDA call is checked, and its error carries the driver's own text.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace comoe {

inline void cuda_check(cudaError_t status, const char* call, const char* file, int line) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // a sticky error is reported once, not by the next unrelated call
  throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ") at " + file + ":" + std::to_string(line));
}

}  // namespace comoe

#define COMOE_CUDA_CHECK(call) ::comoe::cuda_check((call), #call, __FILE__, __LINE__)
