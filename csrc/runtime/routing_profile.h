// Which experts the text at hand uses: uses and squared gate weights, fading with the tokens. What
// is made of it: comoe/policy/profile.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace comoe {

class RoutingProfile {
 public:
  // first: [layers + 1], where each layer's experts begin among all.  decay: per token.
  RoutingProfile(std::vector<int64_t> first, double decay)
      : seen(first.back()),
        squares(first.back()),
        tokens(first.size() - 1),
        first_(std::move(first)),
        decay_(decay) {}

  // One call of a layer: experts and gate weights [T, K]; experts outside the layer count as none.
  void note(int layer, const int64_t* experts, const float* weights, int64_t T, int64_t K) {
    const int64_t begin = first_.at(layer), count = first_.at(layer + 1) - begin;
    const double fade = std::pow(decay_, static_cast<double>(T));
    for (int64_t e = begin; e < begin + count; ++e) {
      seen[e] *= fade;
      squares[e] *= fade;
    }
    for (int64_t p = 0; p < T * K; ++p) {
      if (experts[p] < 0 || experts[p] >= count) continue;
      seen[begin + experts[p]] += 1;
      squares[begin + experts[p]] += static_cast<double>(weights[p]) * weights[p];
    }
    tokens[layer] = tokens[layer] * fade + static_cast<double>(T);
  }

  std::vector<double> seen, squares;  // [experts of all layers]
  std::vector<double> tokens;         // [layers]

 private:
  std::vector<int64_t> first_;
  double decay_;
};

}  // namespace comoe
