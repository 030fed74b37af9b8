// Launches of the data plane. Every call is one kernel, does not synchronise and can be captured.
#pragma once

#include <cstdint>

#include "../device/gate.h"

namespace comoe {

// How a router's weights and the hidden state lie in memory.
struct GateMatrix {
  const void* weight;  // [E, H], row-major, of dtype
  const void* bias;    // [E] of dtype, or null
};

struct GateLaunch {
  GateArgs args;  // logits, keys, chosen, weights, items, levels: device memory
  GateMatrix matrices[1 + kMaxAhead];  // matrices[0] unused where args.given
  const void* x;                       // [T, H] of dtype
  int64_t x_stride;                    // elements
  int32_t H;
  RoundTo dtype;          // of x, weights and biases
  uint32_t* blocks_done;  // one word, zero at first; the kernel leaves it zero
};

// `stream`: a cudaStream_t. Throws std::runtime_error with CUDA's text.
void gate_prefetch(const Plane& plane, const GateLaunch& launch, void* stream);
// Until what the last gate_prefetch missed has come, then its levels. `patience`: polls before it
// gives up by itself; the host's watchdog is quicker.
void visit_wait(const Plane& plane, const GateArgs& args, uint64_t patience, void* stream);
// The end of a step: its last visit reads pages no more.
void step_end(const Plane& plane, void* stream);
// Loads the kernels, so that no first launch waits for a lock while another one spins.
void load_kernels();

}  // namespace comoe
