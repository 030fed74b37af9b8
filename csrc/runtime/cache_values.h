// Tells the engine what keeping each record is worth, as NextUse sees the experts that need it.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "../engine/engine.h"
#include "next_use.h"

namespace comoe {

// How likely a prediction is right, learnt from those before: by the layer it is about, by how far
// ahead it was made, and by its rank. As RankChances in comoe/policy/predictor.py.
class RankChances {
 public:
  // The first n ranks; valid until the next call.
  std::vector<double>& of(int layer, int ahead, int64_t n);
  void note(int layer, int ahead, const std::vector<int32_t>& guess,
            const std::vector<uint8_t>& used);  // used: [E], not 0: it was

 private:
  std::map<std::pair<int, int>, std::vector<double>> chances_;
};

// May be called from any thread.
class CacheValues {
 public:
  CacheValues(Engine& engine, const std::vector<int64_t>& num_experts, const NextUseConfig& config)
      : engine_(engine), policy_(num_experts, config), layers_(num_experts.size()) {}

  // Which records of a layer are the policy's, all others keep their values. Record ids[i] is
  // needed by experts [offsets[i], offsets[i + 1]); it is worth what it is to the one that values
  // it most.
  void hold(int layer, std::vector<int32_t> ids, std::vector<int32_t> offsets,
            std::vector<int32_t> experts);
  // A layer ran; used: [E], not 0 for what was computed.
  void note(int layer, const std::vector<uint8_t>& used);
  // The layer runs `ahead` layers from now and will likely use `experts`, the most likely first.
  void predicted(int layer, int ahead, const std::vector<int32_t>& experts);
  // Of these, those that will be used with a chance of at least `least`.
  std::vector<int32_t> likely(int layer, int ahead, const std::vector<int32_t>& experts,
                              double least);
  // What was predicted of a layer, and what it used.
  void judge(int layer, int ahead, const std::vector<int32_t>& guess,
             const std::vector<uint8_t>& used);

 private:
  struct Held {
    std::vector<int32_t> ids, offsets, experts;
  };
  void tell(int layer);

  Engine& engine_;
  std::mutex mutex_;
  NextUse policy_;
  RankChances chances_;
  std::vector<Held> layers_;
  std::vector<int32_t> experts_;  // scratch
  std::vector<float> values_;
  int64_t tokens_ = 0;
};

}  // namespace comoe
