// The default cache policy: an expert is worth as much as its next use is near. What it computes,
// and why, is in comoe/policy/next_use.py, the reference that this must equal.
#pragma once

#include <cstdint>
#include <vector>

namespace comoe {

struct NextUseConfig {
  double half_life = 96, recent_half_life = 3;  // tokens
  double recent_share = 0.4;
};

class NextUse {
 public:
  NextUse(const std::vector<int64_t>& num_experts, const NextUseConfig& config);

  int num_layers() const { return static_cast<int>(layers_.size()); }
  int64_t num_experts(int layer) const {
    return static_cast<int64_t>(layers_.at(layer).uses.size());
  }
  // A layer ran: experts [n], each once.
  void note(int layer, const int32_t* experts, int64_t n);
  // They will likely be used when `layer` runs next, each with chances [n].
  void predicted(int layer, const int32_t* experts, const double* chances, int64_t n);
  // The worth of keeping an expert.
  float value(int layer, int64_t expert) const {
    return static_cast<float>(layers_[layer].values[expert] + static_cast<double>(base_));
  }

 private:
  struct Layer {
    double tokens = 0;
    std::vector<double> uses, recent, chance, values;  // [E]
  };
  int64_t tick(int layer) const;
  // values[e] = -(run + (1 - named[e]) L / chance[e])
  void expect(Layer& layer, int64_t run, const std::vector<double>& named);

  double fade_, recent_fade_, share_;
  int64_t now_ = -1, base_ = 0;
  std::vector<Layer> layers_;
  std::vector<double> named_, others_;  // scratch
};

}  // namespace comoe
