#include "moe_policy.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace comoe {
namespace {

// Chance from which on something is read two layers ahead: with 0.5 the disk, kept busy, read 4 %
// less in vain than with 0, and stood still less than with 0.65.
constexpr double kLikely = 0.5;

std::vector<int64_t> experts_before(const MoeOp& op) {
  std::vector<int64_t> first{0};
  for (int l = 0; l < op.num_layers(); ++l)
    first.push_back(first.back() + op.layer(l).num_experts());
  return first;
}

}  // namespace

MoePolicy::MoePolicy(Engine& engine, MoeOp& op, std::unique_ptr<CacheValues> cache,
                     double profile_decay)
    : engine_(engine),
      op_(op),
      cache_(std::move(cache)),
      first_(experts_before(op)),
      profile_(first_, profile_decay),
      account_(first_, op.num_levels()),
      bits_(op.num_layers()),
      used_(first_.back(), 0),
      predicted_(op.num_layers()) {}

void MoePolicy::set_plan(bool reads, std::unique_ptr<const LeastCost> rule, bool follows) {
  if (rule && (rule->experts() != first_.back() || rule->levels() != op_.num_levels()))
    throw std::invalid_argument("MoePolicy.set_plan: the rule is about " +
                                std::to_string(rule->experts()) + " experts, expected " +
                                std::to_string(first_.back()));
  std::lock_guard<std::mutex> lock(mutex_);
  reads_ = reads;
  rule_ = std::move(rule);
  follows_ = follows;
}

void MoePolicy::set_losses(std::vector<double> per_square, std::vector<double> nothing) {
  std::lock_guard<std::mutex> lock(mutex_);
  account_.set_losses(per_square, std::move(nothing));
  if (rule_) rule_ = std::make_shared<const LeastCost>(rule_->with_loss(std::move(per_square)));
}

void MoePolicy::set_loss_limit(double limit, double most) {
  std::lock_guard<std::mutex> lock(mutex_);
  account_.set_limit(limit, most);
}

void MoePolicy::set_tolerance(double tolerance) {
  if (!(tolerance >= 0))
    throw std::invalid_argument("MoePolicy.set_tolerance: expected a number of at least 0");
  std::lock_guard<std::mutex> lock(mutex_);
  tolerance_ = tolerance;
}

void MoePolicy::set_bits(int layer, std::vector<double> bits) {
  if (static_cast<int64_t>(bits.size()) != count(layer) * op_.num_levels())
    throw std::invalid_argument("MoePolicy.set_bits: expected [E, levels]");
  bits_.at(layer) = std::move(bits);
}

void MoePolicy::note_routing(int layer, const MoeInput& in) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (follows_) profile_.note(layer, in.expert_idx, in.weights, in.T, in.K);
  }
  ask(layer, in);
}

void MoePolicy::ask(int layer, const MoeInput& in) {
  asked_.assign(count(layer), 0);
  asked_tokens_ = in.T;
  for (int64_t p = 0; p < in.T * in.K; ++p) {
    const int64_t e = in.expert_idx[p];
    if (e >= 0 && e < count(layer)) asked_[e] += static_cast<double>(in.weights[p]) * in.weights[p];
  }
}

std::unique_ptr<Decided> MoePolicy::decide(int layer_idx, const MoeInput& in) {
  std::shared_ptr<const LeastCost> rule;
  double caution;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    rule = rule_;
    caution = account_.figures().caution;
  }
  const int64_t num_experts = count(layer_idx), num_pairs = in.T * in.K;
  if (!rule) return nullptr;
  const MoeOp::Levels levels = op_.levels(layer_idx);
  const int32_t first_expert = op_.layer(layer_idx).first_expert;
  std::vector<int32_t> slot(num_experts, -1);
  std::vector<MissingExpert> chosen;
  std::vector<Need> needs;
  for (int64_t p = 0; p < num_pairs; ++p) {
    const int64_t e = in.expert_idx[p];
    if (e < 0 || e >= num_experts) continue;
    if (slot[e] < 0) {
      slot[e] = static_cast<int32_t>(chosen.size());
      MissingExpert missing;
      missing.expert = first_[layer_idx] + e;
      missing.low = levels.min[e];
      chosen.push_back(missing);
      needs.push_back({first_expert + static_cast<int32_t>(e), 0, levels.want[e]});
    }
    chosen[slot[e]].square += static_cast<double>(in.weights[p]) * in.weights[p];
  }
  const std::vector<int> resident = engine_.resident_levels(needs);
  bool missing = false;
  for (size_t i = 0; i < chosen.size(); ++i) {
    chosen[i].resident = resident[i];
    missing = missing || resident[i] < chosen[i].low;
  }
  if (!missing) return nullptr;
  rule->decide(chosen, caution);
  bool changed = false;
  auto decided = std::make_unique<Decided>();
  decided->low = levels.min;
  decided->index.assign(in.expert_idx, in.expert_idx + num_pairs);
  std::vector<bool> skipped(num_experts, false);
  PolicyCounters more;
  for (size_t i = 0; i < chosen.size(); ++i) {
    const MissingExpert& x = chosen[i];
    const int64_t e = x.expert - first_[layer_idx];
    changed = changed || x.decided != x.low;
    if (x.decided < 0) {
      skipped[e] = true;
      ++more.skipped;
      continue;
    }
    decided->low[e] = static_cast<uint8_t>(x.decided);
    if (x.decided > x.resident) ++more.waited;
    if (x.decided < x.low) ++more.coarser;
  }
  for (int64_t& e : decided->index)
    if (e >= 0 && e < num_experts && skipped[e]) e = num_experts;
  std::lock_guard<std::mutex> lock(mutex_);
  counters_.waited += more.waited;
  counters_.coarser += more.coarser;
  counters_.skipped += more.skipped;
  return changed ? std::move(decided) : nullptr;
}

// A token's missing experts, the heaviest first, each take the best resident expert that the token
// has not chosen. Gate weights: scores are logits of a softmax, so what replaces an expert weighs
// exp(score' - score) times as much; then the token's weights are scaled to the sum that they had.
std::unique_ptr<MoePolicy::Routing> MoePolicy::among_resident(int layer_idx, const MoeInput& in,
                                                              const LinearGate& own) {
  double tolerance;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    tolerance = reads_ ? tolerance_ : 0;
  }
  if (tolerance <= 0 || own.weight == nullptr) return nullptr;
  const int64_t E = count(layer_idx), H = op_.layer(layer_idx).spec.geometry.hidden;
  const MoeOp::Levels levels = op_.levels(layer_idx);
  std::vector<Need> needs;
  for (int64_t e = 0; e < E; ++e)
    needs.push_back({op_.layer(layer_idx).first_expert + static_cast<int32_t>(e), levels.min[e],
                     levels.want[e]});
  const std::vector<int> resident = engine_.resident_levels(needs);  // -1: not at the plan's level
  std::unique_ptr<Routing> routing;
  std::vector<float> logits(E);
  std::vector<bool> taken(E);
  std::vector<int64_t> order(in.K);
  int64_t replaced = 0;
  for (int64_t t = 0; t < in.T; ++t) {
    const int64_t* index = in.expert_idx + t * in.K;
    const float* weights = in.weights + t * in.K;
    const auto missing = [&](int64_t e) { return e >= 0 && e < E && resident[e] < 0; };
    if (std::none_of(index, index + in.K, missing)) continue;
    router_logits(own.weight, own.bias, own.dtype, E, H,
                  element_at(in.x, in.x_dtype, t * in.x_stride), in.x_dtype, logits.data());
    std::fill(taken.begin(), taken.end(), false);
    for (int64_t k = 0; k < in.K; ++k)
      if (index[k] >= 0 && index[k] < E) taken[index[k]] = true;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return weights[a] > weights[b]; });
    double before = 0, after = 0;
    bool changed = false;
    std::vector<float> scaled(weights, weights + in.K);
    std::vector<int64_t> chosen(index, index + in.K);
    for (int64_t k : order) {
      before += weights[k];
      if (missing(index[k])) {
        int64_t best = -1;
        for (int64_t e = 0; e < E; ++e)
          if (!taken[e] && resident[e] >= 0 && (best < 0 || logits[e] > logits[best])) best = e;
        if (best >= 0 && logits[best] >= logits[index[k]] - tolerance) {
          taken[best] = true;
          chosen[k] = best;
          scaled[k] *= std::exp(std::min(logits[best] - logits[index[k]], 0.0f));
          changed = true;
          ++replaced;
        }
      }
      after += scaled[k];
    }
    if (!changed) continue;
    if (!routing) {
      routing = std::make_unique<Routing>();
      routing->index.assign(in.expert_idx, in.expert_idx + in.T * in.K);
      routing->weights.assign(in.weights, in.weights + in.T * in.K);
    }
    const auto scale = static_cast<float>(before / std::max(after, 1e-30));
    for (int64_t k = 0; k < in.K; ++k) {
      routing->index[t * in.K + k] = chosen[k];
      routing->weights[t * in.K + k] = scaled[k] * scale;
    }
  }
  std::lock_guard<std::mutex> lock(mutex_);
  counters_.replaced += replaced;
  return routing;
}

void MoePolicy::choose(int later, const MoeInput& in, Guess& guess) const {
  const int64_t E = count(later), H = op_.layer(later).spec.geometry.hidden;
  const int64_t k = std::min(guess.gate.k, E);
  std::vector<float> logits(E);
  std::vector<int32_t> order(E), votes(E, 0);
  for (int64_t t = 0; t < in.T; ++t) {
    router_logits(guess.gate.weight, guess.gate.bias, guess.gate.dtype, E, H,
                  element_at(in.x, in.x_dtype, t * in.x_stride), in.x_dtype, logits.data());
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](int32_t a, int32_t b) {
      return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    });
    for (int64_t i = 0; i < k; ++i) ++votes[order[i]];
  }
  if (in.T == 1) {
    guess.experts.assign(order.begin(), order.begin() + k);
    return;
  }
  for (int64_t e = 0; e < E; ++e)
    if (votes[e]) guess.experts.push_back(static_cast<int32_t>(e));
  std::stable_sort(guess.experts.begin(), guess.experts.end(),
                   [&](int32_t a, int32_t b) { return votes[a] > votes[b]; });
}

std::vector<Ahead> MoePolicy::read_ahead(int layer_idx, std::vector<Guess>& guesses,
                                         const MoeInput& in) {
  std::vector<Ahead> ahead;
  for (Guess& guess : guesses) {
    if (guess.later <= layer_idx || guess.later >= op_.num_layers())
      throw std::invalid_argument("MoePolicy.read_ahead: layer " + std::to_string(guess.later) +
                                  " does not come after layer " + std::to_string(layer_idx));
    if (guess.experts.empty() && guess.gate.weight) choose(guess.later, in, guess);
    for (int32_t e : guess.experts)
      if (e < 0 || e >= count(guess.later))
        throw std::invalid_argument("MoePolicy.read_ahead: layer " + std::to_string(guess.later) +
                                    " has no expert " + std::to_string(e));
    if (guess.experts.empty()) continue;
    predicted_[guess.later].push_back({layer_idx, guess.experts});
    if (cache_) cache_->predicted(guess.later, guess.later - layer_idx, guess.experts);
    const int distance = guess.later - layer_idx;
    // A layer that runs later is asked for again, nearer and better.
    if (cache_ && distance > 1)
      guess.experts = cache_->likely(guess.later, distance, guess.experts, kLikely);
    ahead.push_back({guess.later, distance, std::move(guess.experts)});
  }
  return ahead;
}

void MoePolicy::ran(int layer, const std::vector<uint8_t>& used) {
  std::vector<Predicted> predicted;
  predicted.swap(predicted_.at(layer));
  bool reads;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    reads = reads_;
    uint8_t* most = &used_[first_[layer]];
    const int levels = op_.num_levels();
    for (size_t e = 0; e < used.size(); ++e) {
      if (!used[e]) continue;
      most[e] = std::max(most[e], used[e]);
      ++counters_.uses;
      if (!bits_[layer].empty()) counters_.bits += bits_[layer][e * levels + used[e] - 1];
      if (!predicted.empty()) ++counters_.used;
    }
    if (!predicted.empty()) {
      counters_.guessed += static_cast<int64_t>(predicted.back().experts.size());
      for (int32_t e : predicted.back().experts)
        if (used[e]) ++counters_.guessed_used;
    }
    if (asked_.size() == used.size()) account_.note(layer, asked_, used, asked_tokens_);
    asked_.clear();
  }
  if (!cache_) return;
  for (const Predicted& guess : predicted)
    cache_->judge(layer, layer - guess.since, guess.experts, used);
  if (reads) cache_->note(layer, used);
}

void MoePolicy::step(int layer, const MoeInput& in, void* out, int64_t part, const uint8_t* low,
                     std::vector<Guess> guesses, const LinearGate& own) {
  note_routing(layer, in);
  MoeInput routed = in;
  const std::unique_ptr<Routing> near = among_resident(layer, in, own);
  if (near) {
    routed.expert_idx = near->index.data();
    routed.weights = near->weights.data();
    ask(layer, routed);
  }
  const int64_t* index = routed.expert_idx;
  std::unique_ptr<Decided> decided;
  if (!low) decided = decide(layer, routed);
  if (decided) {
    index = decided->index.data();
    low = decided->low.data();
  }
  std::vector<Ahead> ahead = read_ahead(layer, guesses, in);
  std::vector<uint8_t> used(count(layer), 0);
  const int64_t H = op_.layer(layer).spec.geometry.hidden;
  for (int64_t t = 0; t < in.T; t += part) {
    MoeInput some = in;
    some.x = element_at(in.x, in.x_dtype, t * in.x_stride);
    some.expert_idx = index + t * in.K;
    some.weights = routed.weights + t * in.K;
    some.T = std::min(part, in.T - t);
    op_.forward(layer, some, element_at(out, in.x_dtype, t * H), used.data(), ahead, low);
    ahead.clear();
  }
  ran(layer, used);
}

PolicyCounters MoePolicy::counters() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return counters_;
}

LossAccount::Figures MoePolicy::account() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return account_.figures();
}

RoutingProfile MoePolicy::profile() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return profile_;
}

}  // namespace comoe
