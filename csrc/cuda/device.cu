#include <algorithm>
#include <stdexcept>

#include "check.h"
#include "device.h"

namespace comoe {
namespace {

// Frees what a measurement took, also when a later step of it throws. Their own errors are dropped:
// there is nothing to do about them, and the first error is the one to report.
struct CopyBuffers {
  void* host = nullptr;
  void* device = nullptr;
  cudaStream_t stream = nullptr;
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  int previous_device = 0;

  ~CopyBuffers() {
    if (begin) (void)cudaEventDestroy(begin);
    if (end) (void)cudaEventDestroy(end);
    if (stream) (void)cudaStreamDestroy(stream);
    if (device) (void)cudaFree(device);
    if (host) (void)cudaFreeHost(host);
    (void)cudaSetDevice(previous_device);
  }
};

}  // namespace

std::vector<CudaDevice> cuda_devices(std::string* why) {
  if (why) why->clear();
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
    (void)cudaGetLastError();
    if (why) *why = cudaGetErrorString(status);
    return {};
  }
  COMOE_CUDA_CHECK(status);

  std::vector<CudaDevice> devices;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    COMOE_CUDA_CHECK(cudaGetDeviceProperties(&properties, i));
    CudaDevice device;
    device.index = i;
    device.name = properties.name;
    device.capability_major = properties.major;
    device.capability_minor = properties.minor;
    device.num_sms = properties.multiProcessorCount;
    device.total_bytes = static_cast<int64_t>(properties.totalGlobalMem);
    device.unified_memory = properties.integrated != 0;
    devices.push_back(device);
  }
  return devices;
}

double cuda_copy_bandwidth(int index, int64_t bytes, int repeats) {
  int count = 0;
  COMOE_CUDA_CHECK(cudaGetDeviceCount(&count));
  if (index < 0 || index >= count) {
    throw std::invalid_argument("cuda_copy_bandwidth: index: expected 0 <= index < " +
                                std::to_string(count) + ", got " + std::to_string(index));
  }
  if (bytes <= 0 || repeats <= 0) {
    throw std::invalid_argument("cuda_copy_bandwidth: expected bytes > 0 and repeats > 0, got " +
                                std::to_string(bytes) + " and " + std::to_string(repeats));
  }

  CopyBuffers buffers;
  COMOE_CUDA_CHECK(cudaGetDevice(&buffers.previous_device));
  COMOE_CUDA_CHECK(cudaSetDevice(index));
  COMOE_CUDA_CHECK(cudaMallocHost(&buffers.host, static_cast<size_t>(bytes)));
  COMOE_CUDA_CHECK(cudaMalloc(&buffers.device, static_cast<size_t>(bytes)));
  COMOE_CUDA_CHECK(cudaStreamCreateWithFlags(&buffers.stream, cudaStreamNonBlocking));
  COMOE_CUDA_CHECK(cudaEventCreate(&buffers.begin));
  COMOE_CUDA_CHECK(cudaEventCreate(&buffers.end));

  std::vector<double> seconds;
  for (int i = 0; i <= repeats; ++i) {
    COMOE_CUDA_CHECK(cudaEventRecord(buffers.begin, buffers.stream));
    COMOE_CUDA_CHECK(cudaMemcpyAsync(buffers.device, buffers.host, static_cast<size_t>(bytes),
                                     cudaMemcpyHostToDevice, buffers.stream));
    COMOE_CUDA_CHECK(cudaEventRecord(buffers.end, buffers.stream));
    COMOE_CUDA_CHECK(cudaEventSynchronize(buffers.end));
    float milliseconds = 0.0f;
    COMOE_CUDA_CHECK(cudaEventElapsedTime(&milliseconds, buffers.begin, buffers.end));
    if (i > 0) seconds.push_back(milliseconds * 1e-3);
  }
  std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
  return static_cast<double>(bytes) / seconds[seconds.size() / 2];
}

}  // namespace comoe
