// What is decided anew for every layer of every step, next to the operator that computes: what not
// to wait for, what to read ahead, and what the cache should think of it. The plan that it works
// under comes from Python (comoe/runtime/runtime.py).
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "../cpu/expert_ffn.h"
#include "../engine/engine.h"
#include "cache_values.h"
#include "least_cost.h"
#include "loss_account.h"
#include "moe_op.h"
#include "routing_profile.h"

namespace comoe {

// The router of a later layer, when it is the K largest of weight @ x + bias.
struct LinearGate {
  const void* weight = nullptr;  // [E, H] of dtype, contiguous
  const void* bias = nullptr;    // [E] of dtype, or null
  DType dtype = DType::fp32;
  int64_t k = 0;
};

// What a later layer will likely use: experts if they are known already, else the gate's choice.
struct Guess {
  int later = -1;  // the layer
  std::vector<int32_t> experts;
  LinearGate gate;
};

struct PolicyCounters {
  int64_t uses = 0;                                 // experts computed, once per layer call
  double bits = 0;                                  // per weight, summed over them
  int64_t guessed = 0, guessed_used = 0, used = 0;  // experts of layers that were predicted
  int64_t waited = 0, coarser = 0, skipped = 0;     // experts that the rule decided about
  int64_t replaced = 0;                             // ... for which a resident one was taken
};

// How the router's choice was changed: what is left out has index E.
struct Decided {
  std::vector<int64_t> index;  // [T, K]
  std::vector<uint8_t> low;    // [E] compute may start at this level
};

class MoePolicy {
 public:
  // cache: null: values are set by somebody else.
  MoePolicy(Engine& engine, MoeOp& op, std::unique_ptr<CacheValues> cache, double profile_decay);

  CacheValues* cache() { return cache_.get(); }

  // Under the plan in force: whether anything is read while computing, the rule about what is
  // missing (null: wait), and whether routing is noted.
  void set_plan(bool reads, std::unique_ptr<const LeastCost> rule, bool follows);
  // What uses lose, for the rule and for the account; see LossAccount.
  void set_losses(std::vector<double> per_square, std::vector<double> nothing);
  void set_loss_limit(double limit, double most);
  // Cache-aware routing: an expert of which something is missing gives way to a resident one whose
  // score is at most this much lower; 0: never.
  void set_tolerance(double tolerance);
  // Bits per weight of each expert at each level, [E, levels].
  void set_bits(int layer, std::vector<double> bits);

  // One layer: decides, reads ahead, computes at most `part` tokens at once, and takes note.
  // low: [E] instead of the rule's decision, or null.  own: the layer's router, for set_tolerance;
  // without a weight nothing is replaced.
  void step(int layer, const MoeInput& input, void* out, int64_t part, const uint8_t* low,
            std::vector<Guess> guesses, const LinearGate& own = {});

  // The pieces of it, for callers that compute themselves.
  void note_routing(int layer, const MoeInput& input);
  std::unique_ptr<Decided> decide(int layer, const MoeInput& input);  // null: nothing to change
  // What `layer` guesses, nearest layer first: takes note, and says what to read ahead.
  std::vector<Ahead> read_ahead(int layer, std::vector<Guess>& guesses, const MoeInput& input);
  void ran(int layer, const std::vector<uint8_t>& used);  // [E], level used + 1

  // Of all layers, the finest level + 1 since it was last cleared, one after the other [X].
  std::vector<uint8_t>& used() { return used_; }
  PolicyCounters counters() const;
  RoutingProfile profile() const;
  LossAccount::Figures account() const;

 private:
  struct Predicted {
    int since;  // the layer that guessed
    std::vector<int32_t> experts;
  };
  void choose(int later, const MoeInput& input, Guess& guess) const;
  struct Routing {
    std::vector<int64_t> index;  // [T, K]
    std::vector<float> weights;
  };
  // Null: nothing is missing, or nobody is close enough.
  std::unique_ptr<Routing> among_resident(int layer, const MoeInput& input, const LinearGate& own);
  int64_t count(int layer) const { return first_[layer + 1] - first_[layer]; }
  void ask(int layer, const MoeInput& input);

  Engine& engine_;
  MoeOp& op_;
  std::unique_ptr<CacheValues> cache_;
  std::vector<int64_t> first_;  // [layers + 1] experts before each layer

  mutable std::mutex mutex_;  // what set_plan changes, and what is counted
  std::shared_ptr<const LeastCost> rule_;
  bool reads_ = false, follows_ = false;
  double tolerance_ = 0;
  RoutingProfile profile_;
  LossAccount account_;
  PolicyCounters counters_;
  std::vector<std::vector<double>> bits_;  // [layers][E, levels]
  std::vector<uint8_t> used_;
  std::vector<std::vector<Predicted>> predicted_;  // of each layer, the nearest guess last
  // Of the layer that runs: each expert's sum of squared gate weights [E], of so many tokens.
  std::vector<double> asked_;
  int64_t asked_tokens_ = 0;
};

}  // namespace comoe
