#include "moe_op.h"

#include <algorithm>
#include <limits>
#include <map>
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
  const size_t num_experts = layer.min_level.size(), R = static_cast<size_t>(layer.num_records);
  if (layer.want_level.size() != num_experts || num_experts == 0)
    throw std::invalid_argument("add_layer: min_level and want_level need one entry per expert");
  if (layer.records.size() != num_experts * R || layer.metas.size() != num_experts * R || R < 1 ||
      R > 32)
    throw std::invalid_argument("add_layer: records need [E, R] entries, R at most 32");
  Parts parts;
  std::map<std::string, int32_t> kinds;
  for (size_t e = 0; e < num_experts; ++e) {
    const RecordMeta* metas = &layer.metas[e * R];
    std::string key;
    uint32_t present = 0;
    for (size_t r = 0; r < R; ++r) {
      const RecordMeta& m = metas[r];
      for (int v : {static_cast<int>(m.kind), static_cast<int>(m.bits), static_cast<int>(m.present),
                    static_cast<int>(m.parent), static_cast<int>(m.ranks[0]),
                    static_cast<int>(m.ranks[1]), static_cast<int>(m.ranks[2])})
        key += std::to_string(v) + ",";
      if (!m.present) continue;
      present |= uint32_t{1} << r;
      const int32_t id = layer.records[e * R + r];
      const int64_t expected = record_bytes(layer.spec.geometry, metas, static_cast<int>(r));
      const int64_t got = id < 0 ? 0 : engine_.record_bytes(id);
      if (got != expected)
        throw std::invalid_argument("add_layer: record " + std::to_string(r) + " of expert " +
                                    std::to_string(e) + ": expected " + std::to_string(expected) +
                                    " bytes, got " + std::to_string(got) +
                                    "; the store does not fit the layer's shape");
    }
    const auto [found, fresh] = kinds.try_emplace(key, static_cast<int32_t>(kinds.size()));
    parts.kind_of_expert.push_back(found->second);
    if (!fresh) continue;
    std::vector<LevelParts> by_level(level_masks_.size());
    for (size_t l = 0; l < level_masks_.size(); ++l)
      if ((level_masks_[l] & ~present) == 0)
        by_level[l] = level_parts(metas, static_cast<int>(R), level_masks_[l]);
    parts.parts_of_kind.push_back(std::move(by_level));
  }
  int32_t first = std::numeric_limits<int32_t>::max(), last = -1;
  for (int32_t id : layer.records) {
    if (id < 0) continue;
    first = std::min(first, id);
    last = std::max(last, id);
  }
  if (last >= 0) parts.ids = {first, last + 1};
  layers_.push_back(std::move(layer));
  parts_.push_back(std::move(parts));
  return static_cast<int>(layers_.size()) - 1;
}

ExpertView MoeOp::view(int layer_idx, int64_t expert, int level) const {
  const MoeLayer& layer = layers_.at(layer_idx);
  const Parts& kinds = parts_.at(layer_idx);
  const LevelParts& parts =
      kinds.parts_of_kind[kinds.kind_of_expert.at(expert)].at(static_cast<size_t>(level));
  const int64_t row = expert * layer.num_records;
  auto paged = [&](int r) {
    const uint8_t* const* pages = engine_.pages(layer.records[row + r]);
    if (pages == nullptr)
      throw std::logic_error("MoeOp: expert " + std::to_string(expert) +
                             " is not resident at level " + std::to_string(level) +
                             "; take it from a session");
    return PagedBytes{pages, engine_.page_bytes()};
  };
  ExpertView view;
  for (const LevelParts::Coded& coded : parts.coded) {
    PartView part;
    if (coded.num_planes == 0) {
      part.level = Level::exact;
      part.planes[0] = paged(kExactRecord);
    } else {
      part.level = static_cast<Level>(coded.num_planes - 1);
      for (int p = 0; p < coded.num_planes; ++p) {
        const bool same = p > 0 && coded.record[p] == coded.record[p - 1];
        part.planes[p] = same ? part.planes[p - 1] : paged(coded.record[p]);
        part.first_plane[p] = coded.first_plane[p];
      }
    }
    view.parts.push_back(part);
  }
  for (int r : parts.low_rank) {
    const RecordMeta& meta = layer.metas[row + r];
    LowRankView low_rank;
    low_rank.level = static_cast<Level>(depth_of_bits(meta.bits) - 1);
    low_rank.record = paged(r);
    std::copy(meta.ranks, meta.ranks + kMaxMatrices, low_rank.ranks);
    view.low_rank.push_back(low_rank);
  }
  for (int r : parts.means) view.means.push_back(paged(r));
  return view;
}

void MoeOp::set_levels(int layer_idx, std::vector<uint8_t> min_level,
                       std::vector<uint8_t> want_level) {
  std::lock_guard<std::mutex> lock(levels_);
  MoeLayer& layer = layers_.at(layer_idx);
  layer.min_level = std::move(min_level);
  layer.want_level = std::move(want_level);
}

MoeOp::Levels MoeOp::levels(int layer_idx) const {
  std::lock_guard<std::mutex> lock(levels_);
  const MoeLayer& layer = layers_.at(layer_idx);
  return {layer.min_level, layer.want_level};
}

std::vector<int32_t> MoeOp::planned_records(int layer_idx,
                                            const std::vector<int32_t>& experts) const {
  std::vector<int32_t> ids;
  std::lock_guard<std::mutex> lock(levels_);
  const MoeLayer& layer = layers_.at(layer_idx);
  for (int32_t e : experts) {
    const uint32_t mask = level_masks_[layer.min_level.at(e)];
    for (int r = 0; r < layer.num_records; ++r) {
      const int32_t id = layer.records[static_cast<size_t>(e) * layer.num_records + r];
      if (id >= 0 && mask >> r & 1) ids.push_back(id);
    }
  }
  return ids;
}

std::unique_ptr<Session> MoeOp::session(int layer_idx, const std::vector<int32_t>& experts,
                                        const std::vector<Ahead>& ahead, const uint8_t* low) {
  const MoeLayer& layer = layers_.at(layer_idx);
  std::vector<Need> needs;
  needs.reserve(experts.size());
  {
    std::lock_guard<std::mutex> lock(levels_);
    for (int32_t e : experts) {
      const uint8_t want = layer.want_level.at(e);
      const uint8_t least = low ? std::min(low[e], want) : layer.min_level[e];
      needs.push_back({layer.first_expert + e, least, want});
    }
  }
  std::unique_ptr<Session> session =
      engine_.open_session(needs.data(), static_cast<int64_t>(needs.size()));
  cancel_wrong_guesses(layer_idx, experts);
  for (const Ahead& later : ahead) {
    cancel_wrong_guesses(later.layer, later.experts);
    const std::vector<int32_t> ids = planned_records(later.layer, later.experts);
    engine_.request(ids.data(), static_cast<int64_t>(ids.size()), Priority::prefetch,
                    later.distance);
    asked_ahead_.insert(asked_ahead_.end(), ids.begin(), ids.end());
  }
  return session;
}

void MoeOp::cancel_wrong_guesses(int layer_idx, const std::vector<int32_t>& experts) {
  if (asked_ahead_.empty()) return;
  const MoeLayer& layer = layers_.at(layer_idx);
  const auto [first, end] = parts_.at(layer_idx).ids;
  std::vector<bool> right(end - first, false);  // a shared record is right if one owner is chosen
  for (int32_t e : experts)
    for (int r = 0; r < layer.num_records; ++r) {
      const int32_t id = layer.records.at(static_cast<size_t>(e) * layer.num_records + r);
      if (id >= 0) right[id - first] = true;
    }
  std::vector<int32_t> wrong, later;
  for (int32_t r : asked_ahead_) {
    if (r < first || r >= end)
      later.push_back(r);
    else if (!right[r - first])
      wrong.push_back(r);
  }
  asked_ahead_.swap(later);
  if (!wrong.empty())
    engine_.cancel(Priority::prefetch, wrong.data(), static_cast<int64_t>(wrong.size()));
}

void MoeOp::forward(int layer_idx, const MoeInput& in, void* out, uint8_t* used,
                    const std::vector<Ahead>& ahead, const uint8_t* low) {
  const MoeLayer& layer = layers_.at(layer_idx);
  const int64_t num_experts = layer.num_experts();
  const int64_t H = layer.spec.geometry.hidden;
  if (in.T == 0) return;
  const PairsByExpert grouped = group_pairs(in, num_experts);
  const size_t scratch = static_cast<size_t>(in.T * in.K * H);
  if (pair_out_.size() < scratch) pair_out_.resize(scratch);

  std::unique_ptr<Session> session = this->session(layer_idx, grouped.expert, ahead, low);
  std::vector<Ready> ready;
  std::vector<ExpertView> views;
  std::vector<FfnTask> tasks;
  while (session->next(ready)) {
    views.clear();
    tasks.clear();
    views.reserve(ready.size());
    for (const Ready& r : ready) {
      const int32_t e = grouped.expert[r.need];
      views.push_back(view(layer_idx, e, r.level));
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
