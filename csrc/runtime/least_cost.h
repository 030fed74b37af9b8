// What to do about experts of which something is missing: the level with the least gate-weighted
// loss + price * time. The rule is LeastCost in comoe/policy/misses.py, which this must equal.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace comoe {

struct MissingExpert {
  int64_t expert = 0;  // of all layers
  double square = 0;   // sum over tokens of its squared gate weight
  int resident = -1;   // finest complete level, -1: none
  int low = 0;         // the level that the plan aims at
  int decided = 0;     // out: compute may start at this level; waited for where above `resident`
};

class LeastCost {
 public:
  // X experts, L levels. loss: [X, L] per squared gate weight, infinity: no such level.  bytes: [X,
  // L].  steps: [X, L, L], what level j needs beside the records of level i.
  LeastCost(int levels, std::vector<double> loss, std::vector<double> bytes,
            std::vector<double> steps, double price, double bandwidth, double latency);

  int levels() const { return levels_; }
  int64_t experts() const { return static_cast<int64_t>(loss_->size()) / levels_; }
  // The same with other losses per squared gate weight, [X, L].
  LeastCost with_loss(std::vector<double> loss) const;
  // caution: time is worth that many times the rule's price.
  void decide(std::vector<MissingExpert>& experts, double caution = 1) const;

 private:
  int levels_;
  std::shared_ptr<const std::vector<double>> loss_, bytes_, steps_;  // copies share them
  double seconds_price_, wait_price_;  // of a byte, and of waiting at all
};

}  // namespace comoe
