#include "cache_values.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace comoe {
namespace {

constexpr int kRefresh = 64;  // tokens after which all values are told anew: their origin may move
constexpr double kSmoothing = 0.02, kPrior = 0.5;  // of the chances of ranks

}  // namespace

std::vector<double>& RankChances::of(int layer, int ahead, int64_t n) {
  std::vector<double>& known = chances_[{layer, ahead}];
  if (static_cast<int64_t>(known.size()) < n) known.resize(n, kPrior);
  return known;
}

void RankChances::note(int layer, int ahead, const std::vector<int32_t>& guess,
                       const std::vector<uint8_t>& used) {
  if (guess.empty()) return;
  std::vector<double>& chances = of(layer, ahead, static_cast<int64_t>(guess.size()));
  for (size_t i = 0; i < guess.size(); ++i)
    chances[i] += kSmoothing * ((used.at(guess[i]) ? 1.0 : 0.0) - chances[i]);
}

void CacheValues::hold(int layer, std::vector<int32_t> ids, std::vector<int32_t> offsets,
                       std::vector<int32_t> experts) {
  std::lock_guard<std::mutex> lock(mutex_);
  Held& held = layers_.at(layer);
  bool fits = offsets.size() == ids.size() + 1 && offsets.front() == 0 &&
              offsets.back() == static_cast<int32_t>(experts.size());
  for (size_t i = 0; fits && i < ids.size(); ++i) fits = offsets[i] < offsets[i + 1];
  for (int32_t e : experts) fits = fits && e >= 0 && e < policy_.num_experts(layer);
  if (!fits)
    throw std::invalid_argument(
        "CacheValues.hold: expected rising offsets [n + 1] into experts of the layer, one or more "
        "for each of n records");
  held = {std::move(ids), std::move(offsets), std::move(experts)};
  tell(layer);
}

void CacheValues::note(int layer, const std::vector<uint8_t>& used) {
  std::lock_guard<std::mutex> lock(mutex_);
  experts_.clear();
  for (size_t e = 0; e < used.size(); ++e)
    if (used[e]) experts_.push_back(static_cast<int32_t>(e));
  policy_.note(layer, experts_.data(), static_cast<int64_t>(experts_.size()));
  tell(layer);
  if (layer == policy_.num_layers() - 1 && ++tokens_ % kRefresh == 0)
    for (int other = 0; other < policy_.num_layers(); ++other) tell(other);
}

void CacheValues::predicted(int layer, int ahead, const std::vector<int32_t>& experts) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto n = static_cast<int64_t>(experts.size());
  policy_.predicted(layer, experts.data(), chances_.of(layer, ahead, n).data(), n);
  tell(layer);
}

std::vector<int32_t> CacheValues::likely(int layer, int ahead, const std::vector<int32_t>& experts,
                                         double least) {
  std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<double>& chances =
      chances_.of(layer, ahead, static_cast<int64_t>(experts.size()));
  std::vector<int32_t> likely;
  for (size_t i = 0; i < experts.size(); ++i)
    if (chances[i] >= least) likely.push_back(experts[i]);
  return likely;
}

void CacheValues::judge(int layer, int ahead, const std::vector<int32_t>& guess,
                        const std::vector<uint8_t>& used) {
  std::lock_guard<std::mutex> lock(mutex_);
  chances_.note(layer, ahead, guess, used);
}

void CacheValues::tell(int layer) {
  const Held& held = layers_[layer];
  values_.resize(held.ids.size());
  for (size_t i = 0; i < held.ids.size(); ++i) {
    float most = -std::numeric_limits<float>::infinity();
    for (int32_t k = held.offsets[i]; k < held.offsets[i + 1]; ++k)
      most = std::max(most, policy_.value(layer, held.experts[k]));
    values_[i] = most;
  }
  if (!held.ids.empty())
    engine_.set_value(held.ids.data(), values_.data(), static_cast<int64_t>(held.ids.size()));
}

}  // namespace comoe
