// The MoE operator: one call computes a layer's chosen experts while the missing ones load.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../cpu/expert_ffn.h"
#include "../engine/engine.h"

namespace comoe {

// One MoE layer as the operator sees it. The planner rewrites the levels between calls.
struct MoeLayer {
  FfnSpec spec;
  int32_t first_record = 0;         // record r of expert e is first_record + e * kNumRecords + r
  std::vector<uint8_t> min_level;   // [E] compute may start at this level ...
  std::vector<uint8_t> want_level;  // [E] ... and uses the best complete one up to this
};

// Routing of one call. Indices outside [0, E) count as "no expert".
struct MoeInput {
  const void* x;  // [T, H] of x_dtype, row stride x_stride elements
  DType x_dtype;
  int64_t x_stride;
  const int64_t* expert_idx;  // [T, K], contiguous
  const float* weights;       // [T, K], contiguous
  int64_t T, K;
  bool round_products = false;  // the router's weights are of x_dtype, 16 bits: see combine_pairs
};

class MoeOp {
 public:
  explicit MoeOp(Engine& engine) : engine_(engine) {}

  int add_layer(MoeLayer layer);
  MoeLayer& layer(int layer_idx) { return layers_.at(layer_idx); }
  const MoeLayer& layer(int layer_idx) const { return layers_.at(layer_idx); }

  // out[t, :] = sum_k weights[t, k] * expert(expert_idx[t, k])(x[t, :]).  out: [T, H] of x_dtype.
  // Hits are computed while misses load; what does not fit at once is computed in waves.
  // `used` (may be null): [E], set to the level used + 1 for each expert that was computed.
  // `ahead`: records to prefetch, asked for once the layer's own demand is queued.
  void forward(int layer_idx, const MoeInput& input, void* out, uint8_t* used,
               const std::vector<int32_t>& ahead);

  // A session over `experts` of a layer at their planned levels, for callers that compute
  // themselves. What was asked ahead for this layer and is not among them is cancelled.
  std::unique_ptr<Session> session(int layer_idx, const std::vector<int32_t>& experts,
                                   const std::vector<int32_t>& ahead);

  // The view of one resident, pinned expert at `level`.
  ExpertView view(int layer_idx, int64_t expert, Level level) const;

 private:
  Engine& engine_;
  void cancel_wrong_guesses(const MoeLayer& layer, const std::vector<int32_t>& experts);

  std::vector<MoeLayer> layers_;
  std::vector<int32_t> asked_ahead_;  // records, of layers that have not been computed since
  std::vector<float> pair_out_;       // [T * K, H], kept between calls of the same size or less
};

}  // namespace comoe
