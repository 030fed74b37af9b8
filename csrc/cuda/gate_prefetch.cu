// One launch: scores of this layer's router and of the next layers', then (in the last block to
// end) routing, guesses, look-up, list and guesses into the ring. What a block does after the
// scores is device/gate.h, which the host's tests run as well.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "check.h"
#include "gate_prefetch.h"

namespace comoe {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTokens = 4;  // tokens of one pass over a row: their sums stay in registers

__device__ float to_float(float v) { return v; }
__device__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ float to_float(__half v) { return __half2float(v); }

// A warp as the group of device/routing.h.
struct Warp {
  __device__ int lane() const { return threadIdx.x % 32; }
  __device__ int lanes() const { return 32; }
  __device__ void sync() const { __syncwarp(); }
  __device__ uint64_t max(uint64_t v) const {
    for (int d = 16; d > 0; d /= 2) {
      const uint64_t other = __shfl_xor_sync(~0u, v, d);
      v = other > v ? other : v;
    }
    return v;
  }
  __device__ float max(float v) const {
    for (int d = 16; d > 0; d /= 2) {
      const float other = __shfl_xor_sync(~0u, v, d);
      v = other > v || other != other ? other : v;  // NaN stays
    }
    return v;
  }
  __device__ float sum(float v) const {
    for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
    return v;
  }
};

struct Block {
  __device__ int lane() const { return threadIdx.x; }
  __device__ int lanes() const { return kThreads; }
  __device__ void sync() const { __syncthreads(); }
  __device__ bool any(bool v) const { return __syncthreads_or(v) != 0; }
  __device__ void set_bit(uint32_t* words, int i) const {
    atomicOr(words + i / 32, 1u << (i % 32));
  }
};

// Row e of a router times tokens t .. t + n: a warp reads 16 bytes per lane and pass.
template <class T>
__device__ void row_times_tokens(const T* row, const T* x, int64_t x_stride, int H, int n,
                                 float (&sums)[kTokens]) {
  constexpr int kVector = 16 / sizeof(T);
  const int lane = threadIdx.x % 32;
  const bool whole = H % kVector == 0 && x_stride % kVector == 0 &&
                     (reinterpret_cast<uintptr_t>(row) | reinterpret_cast<uintptr_t>(x)) % 16 == 0;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) sums[i] = 0.0f;
  if (whole) {
    for (int h = lane * kVector; h < H; h += 32 * kVector) {
      union Vector {
        int4 raw;
        T values[kVector];
      } w, v;
      w.raw = __ldg(reinterpret_cast<const int4*>(row + h));
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        if (i >= n) break;
        v.raw = *reinterpret_cast<const int4*>(x + i * x_stride + h);
#pragma unroll
        for (int j = 0; j < kVector; ++j) sums[i] += to_float(w.values[j]) * to_float(v.values[j]);
      }
    }
  } else {
    for (int h = lane; h < H; h += 32) {
      const float w = to_float(row[h]);
#pragma unroll
      for (int i = 0; i < kTokens; ++i)
        if (i < n) sums[i] += w * to_float(x[i * x_stride + h]);
    }
  }
  const Warp warp;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) sums[i] = warp.sum(sums[i]);
}

// Grid: enough blocks for one row of a router per warp, all routers one after the other. Block 256.
// A warp owns a row and four tokens at a time; the last block to end owns everything after that:
// a warp routes a token, then the block looks up and posts.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)  // 128 registers: left alone, ptxas spills
    gate_prefetch_kernel(const Plane plane, const __grid_constant__ GateLaunch launch, int rows) {
  const GateArgs& a = launch.args;
  const int row = blockIdx.x * kWarps + threadIdx.x / 32;
  if (row < rows) {
    int e = row, router = a.given ? 1 : 0;
    while (e >= a.routers[router].spec.num_experts) e -= a.routers[router++].spec.num_experts;
    const GateRouter& r = a.routers[router];
    const GateMatrix& m = launch.matrices[router];
    const T* weight = static_cast<const T*>(m.weight) + int64_t{e} * launch.H;
    const float bias = m.bias != nullptr ? to_float(static_cast<const T*>(m.bias)[e]) : 0.0f;
    for (int t = 0; t < a.T; t += kTokens) {
      float sums[kTokens];
      row_times_tokens(weight, static_cast<const T*>(launch.x) + t * launch.x_stride,
                       launch.x_stride, launch.H, a.T - t, sums);
      if (threadIdx.x % 32 == 0)
#pragma unroll
        for (int i = 0; i < kTokens; ++i)
          if (t + i < a.T) r.logits[int64_t{t + i} * r.spec.num_experts + e] = sums[i] + bias;
    }
  }
  // The last block to come here sees what all have written.
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0)
    last = atomicInc(launch.blocks_done, gridDim.x - 1) == gridDim.x - 1;  // wraps to 0: replays
  __syncthreads();
  if (!last) return;
  __threadfence();

  __shared__ GateScratch scratch;
  __shared__ uint32_t group_keys[kWarps][kMaxGroups];
  const int warp = threadIdx.x / 32;
  for (int router = a.given ? 1 : 0; router <= a.ahead; ++router) {
    const GateRouter& r = a.routers[router];
    const int64_t E = r.spec.num_experts, k = r.spec.k;
    for (int t = warp; t < a.T; t += kWarps)
      route(Warp(), r.spec, r.logits + t * E, r.keys + t * E, group_keys[warp], r.chosen + t * k,
            r.weights + t * k);
  }
  __syncthreads();
  visit_open(Block(), plane, a, scratch);
}

// One block of one warp. It polls the flag, so it must run with nothing else to do.
__global__ void visit_wait_kernel(const Plane plane, const GateArgs a, uint64_t patience) {
  if (threadIdx.x == 0) visit_wait(plane, patience);
  __syncwarp();
  visit_resolve(Warp(), plane, a);
}

__global__ void step_end_kernel(const Plane plane) { visit_end(plane, plane.state->begun); }

}  // namespace

void gate_prefetch(const Plane& plane, const GateLaunch& launch, void* stream) {
  const GateArgs& a = launch.args;
  if (a.T <= 0) return;
  int rows = 0;
  for (int router = a.given ? 1 : 0; router <= a.ahead; ++router)
    rows += a.routers[router].spec.num_experts;
  const int blocks = rows == 0 ? 1 : (rows + kWarps - 1) / kWarps;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (launch.dtype) {
    case RoundTo::fp32:
      gate_prefetch_kernel<float><<<blocks, kThreads, 0, s>>>(plane, launch, rows);
      break;
    case RoundTo::bf16:
      gate_prefetch_kernel<__nv_bfloat16><<<blocks, kThreads, 0, s>>>(plane, launch, rows);
      break;
    case RoundTo::fp16:
      gate_prefetch_kernel<__half><<<blocks, kThreads, 0, s>>>(plane, launch, rows);
      break;
  }
  COMOE_CUDA_CHECK(cudaGetLastError());
}

void visit_wait(const Plane& plane, const GateArgs& args, uint64_t patience, void* stream) {
  visit_wait_kernel<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(plane, args, patience);
  COMOE_CUDA_CHECK(cudaGetLastError());
}

void step_end(const Plane& plane, void* stream) {
  step_end_kernel<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(plane);
  COMOE_CUDA_CHECK(cudaGetLastError());
}

void load_kernels() {
  cudaFuncAttributes attributes;
  COMOE_CUDA_CHECK(cudaFuncGetAttributes(&attributes, gate_prefetch_kernel<float>));
  COMOE_CUDA_CHECK(cudaFuncGetAttributes(&attributes, gate_prefetch_kernel<__nv_bfloat16>));
  COMOE_CUDA_CHECK(cudaFuncGetAttributes(&attributes, gate_prefetch_kernel<__half>));
  COMOE_CUDA_CHECK(cudaFuncGetAttributes(&attributes, visit_wait_kernel));
  COMOE_CUDA_CHECK(cudaFuncGetAttributes(&attributes, step_end_kernel));
}

}  // namespace comoe
