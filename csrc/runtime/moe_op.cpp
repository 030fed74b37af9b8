#include "moe_op.h"

#include <stdexcept>
#include <string>

namespace comoe {
namespace {

// Scratch above this is given back after the call, so that one prefill does not raise memory for
// good.
constexpr size_t kKeptScratchFloats = size_t{1} << 20;

// Pairs of each chosen expert, in ascending order of expert and pair (a counting sort).
struct PairsByExpert {
  std::vector<int32_t> expert;   // [num_chosen]
  std::vector<int32_t> offsets;  // [num_chosen + 1] into token and pair
  std::vector<int32_t> token, pair;
};

PairsByExpert group_pairs(const MoeInput& in, int64_t num_experts) {
  std::vector<int32_t> count(num_experts, 0);
  const int64_t num_pairs = in.T * in.K;
  for (int64_t p = 0; p < num_pairs; ++p) {
    const int64_t e = in.expert_idx[p];
    if (e >= 0 && e < num_experts) ++count[e];
  }
  PairsByExpert grouped;
  grouped.offsets.push_back(0);
  std::vector<int32_t> cursor(num_experts, 0);
  for (int64_t e = 0; e < num_experts; ++e) {
    if (count[e] == 0) continue;
    cursor[e] = grouped.offsets.back();
    grouped.expert.push_back(static_cast<int32_t>(e));
    grouped.offsets.push_back(cursor[e] + count[e]);
  }
  grouped.token.resize(grouped.offsets.back());
  grouped.pair.resize(grouped.offsets.back());
  for (int64_t p = 0; p < num_pairs; ++p) {
    const int64_t e = in.expert_idx[p];
    if (e < 0 || e >= num_experts) continue;
    const int32_t at = cursor[e]++;
    grouped.token[at] = static_cast<int32_t>(p / in.K);
    grouped.pair[at] = static_cast<int32_t>(p);
  }
  return grouped;
}

}  // namespace

int MoeOp::add_layer(MoeLayer layer) {
  if (layer.min_level.size() != layer.want_level.size() || layer.min_level.empty())
    throw std::invalid_argument("add_layer: min_level and want_level need one entry per expert");
  layers_.push_back(std::move(layer));
  return static_cast<int>(layers_.size()) - 1;
}

ExpertView MoeOp::view(int layer_idx, int64_t expert, Level level) const {
  const MoeLayer& layer = layers_.at(layer_idx);
  const int32_t first = layer.first_record + static_cast<int32_t>(expert) * kNumRecords;
  ExpertView view;
  view.level = level;
  for (int r = 0; r < kNumRecords; ++r) {
    const bool needed = level == Level::exact ? r == 4 : r <= static_cast<int>(level);
    if (!needed) continue;
    view.records[r] = {engine_.pages(first + r), engine_.page_bytes()};
    if (view.records[r].pages == nullptr)
      throw std::logic_error("MoeOp: expert " + std::to_string(expert) +
                             " is not resident at level " +
                             std::to_string(static_cast<int>(level)) + "; take it from a session");
  }
  return view;
}

std::unique_ptr<Session> MoeOp::session(int layer_idx, const std::vector<int32_t>& experts,
                                        const std::vector<int32_t>& ahead) {
  const MoeLayer& layer = layers_.at(layer_idx);
  std::vector<Need> needs;
  needs.reserve(experts.size());
  for (int32_t e : experts)
    needs.push_back(
        {layer.first_record + e * kNumRecords, layer.min_level.at(e), layer.want_level[e]});
  std::unique_ptr<Session> session =
      engine_.open_session(needs.data(), static_cast<int64_t>(needs.size()));
  cancel_wrong_guesses(layer, experts);
  if (!ahead.empty()) {
    engine_.request(ahead.data(), static_cast<int64_t>(ahead.size()), Priority::prefetch, 1);
    asked_ahead_.insert(asked_ahead_.end(), ahead.begin(), ahead.end());
  }
  return session;
}

void MoeOp::cancel_wrong_guesses(const MoeLayer& layer, const std::vector<int32_t>& experts) {
  const int32_t num_experts = static_cast<int32_t>(layer.min_level.size());
  std::vector<bool> chosen(num_experts, false);
  for (int32_t e : experts) chosen[e] = true;
  std::vector<int32_t> wrong, later;
  for (int32_t r : asked_ahead_) {
    const int32_t at = r - layer.first_record;
    if (at < 0 || at >= num_experts * kNumRecords)
      later.push_back(r);
    else if (!chosen[at / kNumRecords])
      wrong.push_back(r);
  }
  asked_ahead_.swap(later);
  if (!wrong.empty())
    engine_.cancel(Priority::prefetch, wrong.data(), static_cast<int64_t>(wrong.size()));
}

void MoeOp::forward(int layer_idx, const MoeInput& in, void* out, uint8_t* used,
                    const std::vector<int32_t>& ahead) {
  const MoeLayer& layer = layers_.at(layer_idx);
  const int64_t num_experts = static_cast<int64_t>(layer.min_level.size());
  const int64_t H = layer.spec.geometry.hidden;
  if (in.T == 0) return;
  const PairsByExpert grouped = group_pairs(in, num_experts);
  const size_t scratch = static_cast<size_t>(in.T * in.K * H);
  if (pair_out_.size() < scratch) pair_out_.resize(scratch);

  std::unique_ptr<Session> session = this->session(layer_idx, grouped.expert, ahead);
  std::vector<Ready> ready;
  std::vector<ExpertView> views;
  std::vector<FfnTask> tasks;
  while (session->next(ready)) {
    views.clear();
    tasks.clear();
    views.reserve(ready.size());
    for (const Ready& r : ready) {
      const int32_t e = grouped.expert[r.need];
      views.push_back(view(layer_idx, e, static_cast<Level>(r.level)));
      const int32_t begin = grouped.offsets[r.need];
      tasks.push_back({&views.back(), &grouped.token[begin], &grouped.pair[begin],
                       grouped.offsets[r.need + 1] - begin});
      if (used) used[e] = static_cast<uint8_t>(r.level + 1);
    }
    expert_ffn(layer.spec, tasks.data(), static_cast<int>(tasks.size()), in.x, in.x_dtype,
               in.x_stride, pair_out_.data());
    for (const Ready& r : ready) session->done(r.need);
  }
  combine_pairs(pair_out_.data(), in.weights, in.expert_idx, num_experts, in.T, in.K, H, out,
                in.x_dtype, in.round_products);
  if (pair_out_.capacity() > kKeptScratchFloats) std::vector<float>().swap(pair_out_);
}

}  // namespace comoe
