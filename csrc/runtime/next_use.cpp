#include "next_use.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace comoe {
namespace {

constexpr double kLeast =
    0.25;  // of the layer's mean chance: what was not seen for long comes back

double sum(const std::vector<double>& v) { return std::accumulate(v.begin(), v.end(), 0.0); }

}  // namespace

NextUse::NextUse(const std::vector<int64_t>& num_experts, const NextUseConfig& config)
    : fade_(std::pow(0.5, 1 / config.half_life)),
      recent_fade_(std::pow(0.5, 1 / config.recent_half_life)),
      share_(config.recent_share) {
  for (int64_t count : num_experts) {
    if (count < 1) throw std::invalid_argument("NextUse: expected at least one expert per layer");
    Layer layer;
    layer.uses.assign(count, 0);
    layer.recent.assign(count, 0);
    layer.chance.assign(count, 1.0 / static_cast<double>(count));
    layer.values.assign(count, 0);
    layers_.push_back(std::move(layer));
  }
}

// The clock at the next run of `layer`; one layer's run is one tick.
int64_t NextUse::tick(int layer) const {
  const int64_t L = num_layers();
  return now_ + 1 + ((layer - now_ - 1) % L + L) % L;
}

void NextUse::note(int layer_idx, const int32_t* experts, int64_t n) {
  Layer& layer = layers_.at(layer_idx);
  now_ = tick(layer_idx);
  // Float32 tells ticks apart up to 2^24.
  if (layer_idx == num_layers() - 1 && now_ - base_ >= int64_t{1} << 22) base_ = now_;
  for (double& uses : layer.uses) uses *= fade_;
  for (double& recent : layer.recent) recent *= recent_fade_;
  for (int64_t i = 0; i < n; ++i) {
    layer.uses.at(experts[i]) += 1;
    layer.recent[experts[i]] += 1 - recent_fade_;
  }
  layer.tokens = layer.tokens * fade_ + 1;
  const double often = (1 - share_) / layer.tokens;
  const size_t E = layer.uses.size();
  for (size_t e = 0; e < E; ++e) layer.chance[e] = often * layer.uses[e] + share_ * layer.recent[e];
  const double least = kLeast * std::max(sum(layer.chance) / static_cast<double>(E), 1e-6);
  for (double& chance : layer.chance) chance = std::max(chance, least);
  expect(layer, now_ + num_layers(), layer.chance);
}

void NextUse::predicted(int layer_idx, const int32_t* experts, const double* chances, int64_t n) {
  Layer& layer = layers_.at(layer_idx);
  const size_t E = layer.chance.size();
  named_.assign(E, 0);
  others_ = layer.chance;
  for (int64_t i = 0; i < n; ++i) {
    named_.at(experts[i]) = chances[i];
    others_[experts[i]] = 0;
  }
  const double left = std::max(sum(layer.chance) - sum(named_), 0.0);
  const double share = left / std::max(sum(others_), 1e-9);
  for (size_t e = 0; e < E; ++e) named_[e] = std::min(named_[e] + others_[e] * share, 1.0);
  expect(layer, tick(layer_idx), named_);
}

void NextUse::expect(Layer& layer, int64_t run, const std::vector<double>& named) {
  const double L = num_layers();
  for (size_t e = 0; e < named.size(); ++e)
    layer.values[e] = -(static_cast<double>(run) + (1 - named[e]) * L / layer.chance[e]);
}

}  // namespace comoe
