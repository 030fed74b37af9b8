// The MoE operator: one call computes a layer's chosen experts while the missing ones load.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "../cpu/expert_ffn.h"
#include "../engine/engine.h"
#include "level_parts.h"

namespace comoe {

// One MoE layer as the operator sees it. The planner rewrites the levels between calls.
struct MoeLayer {
  FfnSpec spec;
  int32_t first_expert = 0;         // expert e is first_expert + e in the engine
  int num_records = 0;              // R, of each expert
  std::vector<int32_t> records;     // [E, R] ids in the engine, or -1
  std::vector<RecordMeta> metas;    // [E, R]
  std::vector<uint8_t> min_level;   // [E] compute may start at this level ...
  std::vector<uint8_t> want_level;  // [E] ... and uses the best complete one up to this
  int64_t num_experts() const { return static_cast<int64_t>(records.size()) / num_records; }
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

// Experts of a later layer to read ahead, the most wanted first. It runs `distance` layers from
// now.
struct Ahead {
  int layer, distance;
  std::vector<int32_t> experts;
};

class MoeOp {
 public:
  // level_masks: as given to the engine.
  MoeOp(Engine& engine, std::vector<uint32_t> level_masks)
      : engine_(engine), level_masks_(std::move(level_masks)) {}

  // Checks that every level that an expert has makes sense, and that its records have the sizes
  // that kernels rely on. Returns the layer's index.
  int add_layer(MoeLayer layer);
  int num_layers() const { return static_cast<int>(layers_.size()); }
  int num_levels() const { return static_cast<int>(level_masks_.size()); }
  // Of each expert. In force from the next call on; from any thread.
  struct Levels {
    std::vector<uint8_t> min, want;
  };
  Levels levels(int layer_idx) const;
  void set_levels(int layer_idx, std::vector<uint8_t> min_level, std::vector<uint8_t> want_level);
  const MoeLayer& layer(int layer_idx) const { return layers_.at(layer_idx); }

  // out[t, :] = sum_k weights[t, k] * expert(expert_idx[t, k])(x[t, :]).  out: [T, H] of x_dtype.
  // Hits are computed while misses load; what does not fit at once is computed in waves.
  // `used` (may be null): [E], set to the level used + 1 for each expert that was computed.
  // `ahead`: what to prefetch, nearest layer first, asked for once the layer's own demand is
  // queued. Of these layers what was asked before and is not among it is cancelled. `low` (may be
  // null): [E], instead of the planned min_level in this call.
  void forward(int layer_idx, const MoeInput& input, void* out, uint8_t* used,
               const std::vector<Ahead>& ahead, const uint8_t* low = nullptr);

  // A session over `experts` of a layer at their planned levels, for callers that compute
  // themselves. What was asked ahead for this layer and is not among them is cancelled.
  std::unique_ptr<Session> session(int layer_idx, const std::vector<int32_t>& experts,
                                   const std::vector<Ahead>& ahead, const uint8_t* low = nullptr);

  // The view of one resident, pinned expert at `level`.
  ExpertView view(int layer_idx, int64_t expert, int level) const;

 private:
  // Experts whose records are alike share one table of parts.
  struct Parts {
    std::vector<int32_t> kind_of_expert;                 // [E]
    std::vector<std::vector<LevelParts>> parts_of_kind;  // [kinds][levels]
    std::pair<int32_t, int32_t> ids{0, 0};               // the layer's records: [first, end)
  };

  // Ids of what experts of a layer need at their planned least levels.
  std::vector<int32_t> planned_records(int layer_idx, const std::vector<int32_t>& experts) const;
  void cancel_wrong_guesses(int layer_idx, const std::vector<int32_t>& experts);

  Engine& engine_;
  std::vector<uint32_t> level_masks_;
  std::vector<MoeLayer> layers_;
  mutable std::mutex levels_;  // min_level and want_level of all layers
  std::vector<Parts> parts_;
  std::vector<int32_t> asked_ahead_;  // records, of layers that have not been computed since
  std::vector<float> pair_out_;       // [T * K, H], kept between calls of the same size or less
};

}  // namespace comoe
