#include "core.h"

#include <algorithm>
#include <limits>

namespace comoe {
namespace {

constexpr uint64_t kNever = std::numeric_limits<uint64_t>::max();
constexpr float kHottest = std::numeric_limits<float>::infinity();

std::string pages_text(int64_t pages, int64_t page_bytes) {
  return std::to_string(pages) + " pages (" + std::to_string(pages * page_bytes) + " bytes)";
}

}  // namespace

Core::Core(CoreConfig config, Backend* backend)
    : config_(std::move(config)),
      backend_(backend),
      pool_(config_.pages_per_slab, backend->max_slabs()) {
  uint32_t all = 0;
  for (uint32_t mask : config_.level_masks) all |= mask;
  while (uint64_t{all} >> records_per_expert_) ++records_per_expert_;
}

int32_t Core::add_records(const RecordInfo* infos, int64_t count) {
  const int32_t first = num_records();
  for (int64_t i = 0; i < count; ++i) {
    Record r;
    r.info = infos[i];
    r.num_pages =
        static_cast<int32_t>((infos[i].bytes + config_.page_bytes - 1) / config_.page_bytes);
    if (r.num_pages == 0) r.state = RecordState::resident;  // nothing to read, never evicted
    records_.push_back(std::move(r));
  }
  queue_.resize(num_records());
  return first;
}

int32_t Core::add_experts(const int32_t* table, int64_t count) {
  const int32_t first = num_experts();
  const int num_levels = static_cast<int>(config_.level_masks.size());
  for (int64_t e = 0; e < count; ++e) {
    uint32_t has = 0, levels = 0;
    for (int r = 0; r < records_per_expert_; ++r) {
      const int32_t record = table[e * records_per_expert_ + r];
      if (record < -1 || record >= num_records())
        throw std::invalid_argument("add_experts: record " + std::to_string(r) + " of expert " +
                                    std::to_string(e) + ": expected -1 or a record in [0, " +
                                    std::to_string(num_records()) + "), got " +
                                    std::to_string(record));
      if (record >= 0) has |= uint32_t{1} << r;
    }
    for (int l = 0; l < num_levels; ++l)
      if ((config_.level_masks[l] & ~has) == 0) levels |= uint32_t{1} << l;
    expert_levels_.push_back(levels);
  }
  expert_records_.insert(expert_records_.end(), table, table + count * records_per_expert_);
  return first;
}

template <class F>
void Core::for_records(int32_t expert, uint32_t mask, F&& f) const {
  for (; mask; mask &= mask - 1) f(record_of(expert, __builtin_ctz(mask)));
}

// The least level that the need may start at and the expert has; -1 if there is none.
int Core::lowest_level(const Need& need) const {
  for (int l = need.min_level; l <= need.want_level; ++l)
    if (has_level(need.expert, l)) return l;
  return -1;
}

Core::Coldness Core::coldness(int32_t record) const {
  return {records_[record].value, records_[record].recency(), record};
}

int64_t Core::capacity_pages() const { return int64_t{target_slabs_} * config_.pages_per_slab; }

// What speculation leaves alone: all that was used or has come since the oldest open session began;
// with no session open, what was fetched ahead since the last one began and is still to be used.
bool Core::is_protected(const Record& record) const {
  if (!sessions_.empty()) return record.recency() >= sessions_.begin()->second.tick;
  return record.speculative && record.recency() >= clock_;
}

int64_t Core::need_pages(int32_t expert, uint32_t mask) const {
  int64_t pages = 0;
  for_records(expert, mask, [&](int32_t r) { pages += records_[r].num_pages; });
  return pages;
}

// Of all levels up to max_level; where an expert has none of these, of its lowest.
int64_t Core::largest_need_pages(int max_level) const {
  const int num_levels = static_cast<int>(config_.level_masks.size());
  int64_t largest = 0;
  for (int32_t e = 0; e < num_experts(); ++e) {
    bool any = false;
    for (int l = 0; l < num_levels && (l <= max_level || !any); ++l) {
      if (!has_level(e, l)) continue;
      any = true;
      largest = std::max(largest, need_pages(e, config_.level_masks[l]));
    }
  }
  return largest;
}

void Core::forget_largest_need() {
  demand_reserve_pages_ = 0;
  for (const auto& [id, session] : sessions_)
    for (const NeedEntry& n : session.needs)
      if (n.state == NeedState::waiting)
        demand_reserve_pages_ =
            std::max(demand_reserve_pages_,
                     need_pages(n.need.expert, config_.level_masks[lowest_level(n.need)]));
}

std::vector<int32_t> Core::take_woken() {
  std::vector<int32_t> woken;
  woken.swap(woken_);
  return woken;
}

// ---- Sessions ----------------------------------------------------------------------------------

int32_t Core::open_session(const Need* needs, int64_t count) {
  int64_t reserve = demand_reserve_pages_;
  for (int64_t i = 0; i < count; ++i) {
    const Need& n = needs[i];
    const int num_levels = static_cast<int>(config_.level_masks.size());
    if (n.min_level > n.want_level || n.want_level >= num_levels)
      throw std::invalid_argument(
          "session: need " + std::to_string(i) + ": expected min_level <= want_level < " +
          std::to_string(num_levels) + ", got min_level " + std::to_string(n.min_level) +
          ", want_level " + std::to_string(n.want_level));
    if (n.expert < 0 || n.expert >= num_experts())
      throw std::invalid_argument("session: need " + std::to_string(i) +
                                  ": expected an expert in [0, " + std::to_string(num_experts()) +
                                  "), got " + std::to_string(n.expert));
    const int lowest = lowest_level(n);
    if (lowest < 0)
      throw std::invalid_argument("session: need " + std::to_string(i) + ": expert " +
                                  std::to_string(n.expert) + " has no level from " +
                                  std::to_string(n.min_level) + " to " +
                                  std::to_string(n.want_level) + "; plan a level that it has");
    reserve = std::max(reserve, need_pages(n.expert, config_.level_masks[lowest]));
  }
  demand_reserve_pages_ = reserve;

  const int32_t id = next_session_++;
  SessionEntry& session = sessions_[id];
  session.tick = ++clock_;
  speculation_blocked_ = false;  // what the last session used is not protected any more
  session.needs.resize(count);
  // What is here is pinned first, so that no miss of this session pushes it out.
  for (int32_t i = 0; i < count; ++i) {
    session.needs[i].need = needs[i];
    const int level = best_resident_level(needs[i]);
    if (level >= 0) {
      ++(level == needs[i].want_level ? stats_.hits : stats_.partial_hits);
      pin_level(id, i, level);
      make_ready(id, i);
      continue;
    }
    session.waiting.push_back(i);
    bool all_on_their_way = true;
    for_records(needs[i].expert, config_.level_masks[level_to_load(needs[i])], [&](int32_t r) {
      if (records_[r].state == RecordState::absent) all_on_their_way = false;
      records_[r].last_use =
          session.tick;  // the halves that are here should not be evicted for others
    });
    ++(all_on_their_way ? stats_.joined : stats_.misses);
  }
  settle();
  return id;
}

Next Core::peek(int32_t id) const {
  const SessionEntry& session = sessions_.at(id);
  if (!session.error.empty()) return Next::failed;
  if (!session.ready.empty()) return Next::ready;
  if (session.num_loading > 0) return Next::wait;
  if (!session.blocked()) return Next::end;
  return session.num_handed > 0 ? Next::hold : Next::wait;
}

Next Core::next(int32_t id, std::vector<Ready>& ready) {
  ready.clear();
  const Next result = peek(id);
  if (result != Next::ready) return result;
  SessionEntry& session = sessions_.at(id);
  for (int32_t i : session.ready) {
    // More may have come since the need became ready.
    const int level = best_resident_level(session.needs[i].need);
    if (level > session.needs[i].level) {
      unpin_level(id, i);
      pin_level(id, i, level);
    }
    session.needs[i].state = NeedState::handed;
    ready.push_back({i, session.needs[i].level});
  }
  session.num_handed += static_cast<int32_t>(session.ready.size());
  session.ready.clear();
  return Next::ready;
}

void Core::done(int32_t id, int32_t need) {
  SessionEntry& session = sessions_.at(id);
  if (need < 0 || need >= static_cast<int32_t>(session.needs.size()) ||
      session.needs[need].state != NeedState::handed)
    throw std::invalid_argument(
        "session.done: need: expected one that next() has handed out and that is "
        "not done yet, got " +
        std::to_string(need));
  release(id, need);
  settle();
}

void Core::close_session(int32_t id) {
  SessionEntry& session = sessions_.at(id);
  for (size_t i = 0; i < session.needs.size(); ++i) release(id, static_cast<int32_t>(i));
  sessions_.erase(id);
  speculation_blocked_ = false;  // its records are not protected any more
  settle();
}

int Core::best_resident_level(const Need& need) const {
  for (int l = need.want_level; l >= need.min_level; --l) {
    if (!has_level(need.expert, l)) continue;
    bool resident = true;
    for_records(need.expert, config_.level_masks[l], [&](int32_t r) {
      if (records_[r].state != RecordState::resident) resident = false;
    });
    if (resident) return l;
  }
  return -1;
}

// The level that needs least: fewest pages to read, then fewest to wait for.
int Core::level_to_load(const Need& need) const {
  const int lowest = lowest_level(need);
  int best = lowest;
  std::pair<int64_t, int64_t> least{std::numeric_limits<int64_t>::max(), 0};
  for (int l = lowest; l <= need.want_level; ++l) {
    const uint32_t mask = config_.level_masks[l];
    if (!has_level(need.expert, l) ||
        (l > lowest && need_pages(need.expert, mask) > capacity_pages()))
      continue;
    std::pair<int64_t, int64_t> cost{0, 0};
    for_records(need.expert, mask, [&](int32_t r) {
      const Record& record = records_[r];
      if (record.state == RecordState::absent) cost.first += record.num_pages;
      if (record.state == RecordState::loading) cost.second += record.num_pages;
    });
    if (cost < least) {
      least = cost;
      best = l;
    }
  }
  return best;
}

void Core::pin_level(int32_t id, int32_t need, int level) {
  SessionEntry& session = sessions_.at(id);
  NeedEntry& n = session.needs[need];
  n.level = static_cast<uint8_t>(level);
  for_records(n.need.expert, mask_of(n), [&](int32_t r) {
    ++records_[r].pins;
    used(r, session.tick);
  });
}

void Core::unpin_level(int32_t id, int32_t need) {
  const NeedEntry& n = sessions_.at(id).needs[need];
  for_records(n.need.expert, mask_of(n), [&](int32_t r) {
    Record& record = records_[r];
    --record.pins;
    const auto it = std::find(record.waiters.begin(), record.waiters.end(), Waiter{id, need});
    if (it != record.waiters.end()) record.waiters.erase(it);
  });
}

void Core::make_ready(int32_t id, int32_t need) {
  SessionEntry& session = sessions_.at(id);
  session.needs[need].state = NeedState::ready;
  session.ready.push_back(need);
  woken_.push_back(id);
}

void Core::release(int32_t id, int32_t need) {
  SessionEntry& session = sessions_.at(id);
  NeedEntry& n = session.needs[need];
  if (n.state == NeedState::loading) --session.num_loading;
  if (n.state == NeedState::handed) --session.num_handed;
  if (n.state != NeedState::waiting && n.state != NeedState::released) unpin_level(id, need);
  n.state = NeedState::released;
}

// Whatever was not handed out yet is let go at once; what was, stays valid until `done`.
void Core::fail_session(int32_t id, const std::string& error) {
  SessionEntry& session = sessions_.at(id);
  if (!session.error.empty()) return;
  session.error = error;
  for (size_t i = 0; i < session.needs.size(); ++i)
    if (session.needs[i].state != NeedState::handed) release(id, static_cast<int32_t>(i));
  session.ready.clear();
  session.waiting.clear();
  session.waiting_at = 0;
  woken_.push_back(id);
}

void Core::settle() {
  drain();
  admit();
  pump();
}

// First come, first served, over all sessions: the first need that finds no room keeps what is
// free, so it cannot starve. Only it waits for pages, and it holds none meanwhile.
void Core::admit() {
  for (auto& [id, session] : sessions_) {
    while (session.blocked()) {
      const Admission admission = try_admit(id, session.waiting[session.waiting_at]);
      if (admission == Admission::blocked) return;
      if (admission == Admission::failed) break;  // fail_session has emptied the list
      ++session.waiting_at;
    }
  }
}

Core::Admission Core::try_admit(int32_t id, int32_t need) {
  SessionEntry& session = sessions_.at(id);
  NeedEntry& n = session.needs[need];
  const int resident_level = best_resident_level(n.need);
  if (resident_level >= 0) {  // came while it waited
    pin_level(id, need, resident_level);
    make_ready(id, need);
    return Admission::admitted;
  }
  const int level = level_to_load(n.need);
  const uint32_t mask = config_.level_masks[level];
  int64_t missing = 0, pinned_by_user = 0;
  for_records(n.need.expert, mask, [&](int32_t r) {
    if (records_[r].state == RecordState::absent) missing += records_[r].num_pages;
    if (records_[r].user_pinned) pinned_by_user += records_[r].num_pages;
  });
  const int64_t whole = need_pages(n.need.expert, mask);
  const int64_t reachable = capacity_pages() - (user_pinned_pages_ - pinned_by_user);
  if (whole > reachable) {
    std::string error = "session: need " + std::to_string(need) + " takes " +
                        pages_text(whole, config_.page_bytes) + ", but the budget leaves " +
                        pages_text(std::max<int64_t>(reachable, 0), config_.page_bytes);
    if (user_pinned_pages_ > 0)
      error +=
          "; " + pages_text(user_pinned_pages_, config_.page_bytes) + " are pinned: unpin some";
    error +=
        map_failed_
            ? "; the system refused memory for more slabs: free some, then set the budget again"
            : "; raise the budget (see minimum_budget) or ask for a lower level";
    session.budget_error = true;
    fail_session(id, error);
    return Admission::failed;
  }

  pin_level(id, need, level);  // so that making room does not push out its own records
  const Coldness any{kHottest, kNever, -1};
  if (!make_room(missing, any, Room::demand)) {
    unpin_level(id, need);
    n.level = 0;
    if (!n.counted_wave) ++stats_.waves;
    n.counted_wave = true;
    return Admission::blocked;
  }
  for_records(n.need.expert, mask, [&](int32_t r) {
    Record& record = records_[r];
    if (record.state == RecordState::resident) return;
    if (record.state == RecordState::absent) {
      queue_.erase(r);
      start_read(r, Priority::demand);
    } else if (record.transfer != Priority::demand && record.waiters.empty()) {
      backend_->promote_read(r);
    }
    record.waiters.push_back({id, need});
    ++n.missing;
  });
  n.state = NeedState::loading;
  ++session.num_loading;
  return Admission::admitted;
}

// ---- Room --------------------------------------------------------------------------------------

// A need has asked for it.
void Core::used(int32_t r, uint64_t tick) {
  Record& record = records_[r];
  record.last_use = std::max(record.last_use, tick);
  if (!record.speculative) return;
  record.speculative = false;
  (record.state == RecordState::resident ? stats_.prefetch_used_bytes
                                         : stats_.prefetch_joined_bytes) += record.info.bytes;
}

void Core::push_heap(int32_t record) {
  const auto hotter = [](const Coldness& a, const Coldness& b) { return b < a; };
  Coldness entry = coldness(record);
  entry.entry = records_[record].heap_entry = ++heap_entries_;
  heap_.push_back(entry);
  std::push_heap(heap_.begin(), heap_.end(), hotter);
  if (heap_.size() <= 64 + 2 * records_.size()) return;
  heap_.erase(
      std::remove_if(heap_.begin(), heap_.end(),
                     [&](const Coldness& e) { return records_[e.record].heap_entry != e.entry; }),
      heap_.end());
  std::make_heap(heap_.begin(), heap_.end(), hotter);
}

Core::Coldness Core::pop_heap() {
  std::pop_heap(heap_.begin(), heap_.end(),
                [](const Coldness& a, const Coldness& b) { return b < a; });
  const Coldness top = heap_.back();
  heap_.pop_back();
  return top;
}

void Core::set_value(int32_t r, float value) {
  Record& record = records_[r];
  const bool lowered = value < record.value;
  record.value = value;
  if (lowered && record.heap_entry != 0) push_heap(r);
}

void Core::values_changed() {
  speculation_blocked_ = false;
  settle();
}

bool Core::map_one_slab() {
  if (pool_.mapped_slabs() >= target_slabs_) return false;
  const int slab = pool_.slab_to_map();
  if (slab < 0) return false;
  if (!backend_->map_slab(slab)) {
    map_failed_ = true;
    target_slabs_ = pool_.mapped_slabs();  // until the budget is set again
    return false;
  }
  pool_.map(slab);
  const size_t pages = static_cast<size_t>(slab + 1) * config_.pages_per_slab;
  if (page_owner_.size() < pages) page_owner_.resize(pages, -1);
  return true;
}

// Makes `pages` pages free: maps slabs, then evicts records colder than `limit`. True if that many
// are free now. Demand takes what it gets; all others evict only if it is enough, and speculation
// spares what is protected.
bool Core::make_room(int64_t pages, const Coldness& limit, Room room) {
  while (pool_.free_pages() < pages && map_one_slab()) {
  }
  int64_t missing = pages - pool_.free_pages();
  // Not those that the running step reads: it may be the one that waits for this room.
  for (const Reclaim& reclaim : reclaiming_)
    if (!pool_.is_draining(pool_.slab_of(reclaim.page)) &&
        backend_->reuse(reclaim.step) != Reuse::held)
      --missing;
  std::vector<int32_t> victims, kept;
  while (missing > 0 && !heap_.empty()) {
    if (!(heap_.front() < limit)) break;
    const Coldness entry = pop_heap();
    const Record& record = records_[entry.record];
    if (record.heap_entry != entry.entry) continue;
    if (entry < coldness(entry.record)) {
      push_heap(entry.record);  // it was used since
    } else if (record.pins > 0 || record.user_pinned ||
               (room == Room::speculation && is_protected(record))) {
      kept.push_back(entry.record);
    } else {
      victims.push_back(entry.record);
      for (int32_t page : record.pages)
        if (!pool_.is_draining(pool_.slab_of(page))) --missing;
    }
  }
  if (missing > 0 && room != Room::demand) {
    kept.insert(kept.end(), victims.begin(), victims.end());
    victims.clear();
  }
  for (int32_t r : kept) push_heap(r);
  for (int32_t r : victims) evict_record(r);
  return pool_.free_pages() >= pages;
}

void Core::evict_record(int32_t r) {
  Record& record = records_[r];
  backend_->publish(r, nullptr);
  record.state = RecordState::absent;
  record.heap_entry = 0;
  resident_bytes_ -= record.info.bytes;
  if (record.speculative) stats_.wasted_prefetch_bytes += record.info.bytes;
  record.speculative = false;
  ++stats_.evictions;
  stats_.evicted_bytes += record.info.bytes;
  for (int32_t page : record.pages) retire_page(page);
  record.pages.clear();
  record.addresses.clear();
}

// The record's residency has been cleared; a step that was launched before may still read the page.
void Core::retire_page(int32_t page) {
  page_owner_[page] = -1;
  const uint64_t step = backend_->launched();
  if (backend_->reuse(step) == Reuse::now)
    pool_.free(page);
  else
    reclaiming_.push_back({page, step});
}

void Core::step_passed() {
  auto still = std::partition(reclaiming_.begin(), reclaiming_.end(), [&](const Reclaim& r) {
    return backend_->reuse(r.step) != Reuse::now;
  });
  for (auto it = still; it != reclaiming_.end(); ++it) pool_.free(it->page);
  reclaiming_.erase(still, reclaiming_.end());
  speculation_blocked_ = false;
  settle();
}

int64_t Core::evict(int32_t r) {
  Record& record = records_[r];
  if (record.state != RecordState::resident || record.num_pages == 0 || record.pins > 0 ||
      record.user_pinned)
    return 0;
  evict_record(r);
  speculation_blocked_ = false;
  settle();
  return record.num_pages;
}

void Core::pin(int32_t r, bool pinned) {
  Record& record = records_[r];
  if (record.user_pinned == pinned) return;
  if (pinned && user_pinned_pages_ + record.num_pages + demand_reserve_pages_ > capacity_pages())
    throw BudgetError(
        "pin: record " + std::to_string(r) + " takes " +
        pages_text(record.num_pages, config_.page_bytes) + ", " +
        pages_text(user_pinned_pages_, config_.page_bytes) + " are pinned already and " +
        pages_text(demand_reserve_pages_, config_.page_bytes) +
        " must stay for the largest need, of a budget of " +
        pages_text(capacity_pages(), config_.page_bytes) + "; raise the budget or unpin others");
  record.user_pinned = pinned;
  user_pinned_pages_ += pinned ? record.num_pages : -record.num_pages;
  if (!pinned) speculation_blocked_ = false;
  settle();
}

// ---- Slabs -------------------------------------------------------------------------------------

void Core::set_target_slabs(int slabs) {
  target_slabs_ = std::min(slabs, pool_.max_slabs());
  map_failed_ = false;
  speculation_blocked_ = false;
  auto in_use = [&] { return pool_.mapped_slabs() - pool_.draining_slabs(); };
  while (in_use() > target_slabs_) {  // the emptiest slabs go, of equal ones the highest
    int emptiest = -1;
    for (int s = 0; s < pool_.num_slabs(); ++s)
      if (pool_.is_mapped(s) && !pool_.is_draining(s) &&
          (emptiest < 0 || pool_.used_pages(s) <= pool_.used_pages(emptiest)))
        emptiest = s;
    pool_.set_draining(emptiest, true);
  }
  for (int s = 0; s < pool_.num_slabs() && in_use() < target_slabs_; ++s)
    if (pool_.is_draining(s)) pool_.set_draining(s, false);
  settle();
}

// Empties draining slabs of what may be moved, and gives the empty ones back. Pinned and loading
// pages stay; they are looked at again after every event.
void Core::drain() {
  if (pool_.draining_slabs() == 0) return;
  for (int s = pool_.num_slabs() - 1; s >= 0; --s) {
    if (!pool_.is_draining(s)) continue;
    for (int32_t page = s * config_.pages_per_slab; page < (s + 1) * config_.pages_per_slab;
         ++page) {
      const int32_t owner = page_owner_[page];
      if (owner < 0) continue;
      const Record& record = records_[owner];
      if (record.state == RecordState::resident && record.pins == 0 && !relocate(owner) &&
          !record.user_pinned)
        evict_record(owner);
    }
    if (pool_.used_pages(s) > 0) continue;
    backend_->unmap_slab(s);
    pool_.unmap(s);
  }
}

// Moves a record's pages out of draining slabs, at the cost of colder records only.
bool Core::relocate(int32_t r) {
  Record& record = records_[r];
  std::vector<size_t> moving;
  for (size_t i = 0; i < record.pages.size(); ++i)
    if (pool_.is_draining(pool_.slab_of(record.pages[i]))) moving.push_back(i);
  const Coldness any{kHottest, kNever, -1};
  if (!make_room(static_cast<int64_t>(moving.size()), record.user_pinned ? any : coldness(r),
                 Room::relocation))
    return false;
  std::vector<int32_t> to;
  pool_.allocate(static_cast<int64_t>(moving.size()), to);
  std::vector<int32_t> old;
  for (size_t i = 0; i < moving.size(); ++i) {
    old.push_back(record.pages[moving[i]]);
    backend_->copy_page(old.back(), to[i]);
    record.pages[moving[i]] = to[i];
    record.addresses[moving[i]] = backend_->page_address(to[i]);
    page_owner_[to[i]] = r;
  }
  backend_->publish(r, &record.addresses);
  for (int32_t page : old) retire_page(page);
  stats_.relocated_pages += static_cast<int64_t>(old.size());
  return true;
}

// ---- Transfers ---------------------------------------------------------------------------------

void Core::start_read(int32_t r, Priority priority) {
  Record& record = records_[r];
  pool_.allocate(record.num_pages, record.pages);
  for (int32_t page : record.pages) {
    page_owner_[page] = r;
    record.addresses.push_back(backend_->page_address(page));
  }
  record.state = RecordState::loading;
  record.transfer = priority;
  record.speculative = priority != Priority::demand;
  if (record.speculative) speculation_loading_pages_ += record.num_pages;
  ++num_loading_;
  backend_->start_read({r, record.info, record.addresses.data(), priority == Priority::demand});
}

void Core::read_done(int32_t r, ReadStatus status, const std::string& error) {
  Record& record = records_[r];
  --num_loading_;
  if (record.transfer != Priority::demand) speculation_loading_pages_ -= record.num_pages;
  std::vector<Waiter> waiters;
  waiters.swap(record.waiters);
  if (status == ReadStatus::ok) {
    ++stats_.reads;
    stats_.bytes_read += record.info.bytes;
    int64_t* const counts[3][2] = {{&stats_.demand_reads, &stats_.demand_bytes},
                                   {&stats_.prefetch_reads, &stats_.prefetch_bytes},
                                   {&stats_.upgrade_reads, &stats_.upgrade_bytes}};
    ++*counts[static_cast<int>(record.transfer)][0];
    *counts[static_cast<int>(record.transfer)][1] += record.info.bytes;
    record.state = RecordState::resident;
    if (record.speculative && record.transfer == Priority::upgrade) record.last_use = clock_;
    if (record.speculative && record.expected > 0) record.expected = clock_;
    resident_bytes_ += record.info.bytes;
    push_heap(r);
    backend_->publish(r, &record.addresses);
    for (const Waiter& w : waiters) {
      SessionEntry& session = sessions_.at(w.session);
      if (--session.needs[w.need].missing > 0) continue;
      --session.num_loading;
      make_ready(w.session, w.need);
    }
  } else {
    ++(status == ReadStatus::corrupt ? stats_.corrupt_reads : stats_.failed_reads);
    if (waiters.empty()) ++stats_.failed_prefetches;
    give_up_read(r);
    for (const Waiter& w : waiters) fail_session(w.session, error);
  }
  settle();
}

// Its pages were never published, so no step can have seen them.
void Core::give_up_read(int32_t r) {
  Record& record = records_[r];
  for (int32_t page : record.pages) {
    page_owner_[page] = -1;
    pool_.free(page);
  }
  record.pages.clear();
  record.addresses.clear();
  record.state = RecordState::absent;
  record.speculative = false;
  speculation_blocked_ = false;
}

void Core::request(int32_t r, Priority priority, int32_t distance) {
  Record& record = records_[r];
  if (priority == Priority::prefetch) record.expected = clock_;  // keep it, if it is here
  if (record.state == RecordState::resident) return;
  if (record.state == RecordState::loading || !queue_.push(r, priority, distance))
    ++stats_.coalesced;
  if (queue_.contains(r) && queue_.front() == r) speculation_blocked_ = false;
}

// A record that was expected in vain is as cold as its last real use, so that the next wrong guess
// takes its place and not that of a record in use. With a cache that holds nearly all that is
// needed (bench/bench_offload.py) 1 expert per token is waited for; without this it was 5.
void Core::cancel(int32_t r, Priority priority) {
  Record& record = records_[r];
  if (priority == Priority::prefetch && record.expected > 0) {
    record.expected = 0;
    if (record.heap_entry != 0) push_heap(r);
  }
  if (queue_.contains(r)) {
    if (queue_.priority(r) != priority) return;
    if (queue_.front() == r) speculation_blocked_ = false;
    queue_.erase(r);
    ++stats_.cancelled;
  } else if (record.state == RecordState::loading && record.speculative &&
             record.transfer == priority && backend_->cancel_read(r)) {
    --num_loading_;
    speculation_loading_pages_ -= record.num_pages;
    give_up_read(r);
    ++stats_.cancelled;
    settle();
  }
}

void Core::cancel_all(Priority priority) {
  stats_.cancelled += queue_.erase_all(priority);
  speculation_blocked_ = false;
}

void Core::pump() {
  for (const auto& entry : sessions_)
    if (entry.second.blocked()) return;  // demand waits for pages: speculation yields
  while (!queue_.empty() && !speculation_blocked_) {
    const int32_t r = queue_.front();
    const int64_t pages = records_[r].num_pages;
    if (pages + demand_reserve_pages_ > capacity_pages() - user_pinned_pages_) {
      queue_.erase(r);  // can never be read without endangering demand
      ++stats_.dropped;
      continue;
    }
    if (speculation_loading_pages_ > 0 &&
        (speculation_loading_pages_ + pages > config_.speculation_pages ||
         speculation_loading_pages_ + pages + demand_reserve_pages_ >
             capacity_pages() - user_pinned_pages_))
      return;
    if (start_speculation(r)) continue;
    if (sessions_.empty() && reclaiming_.empty()) {
      queue_.erase(r);  // nothing is about to make room, so it would only grow stale
      ++stats_.dropped;
    } else {
      speculation_blocked_ = true;
    }
  }
}

// A prefetch may push out what is worth no more and was not used in this step; an upgrade, which is
// not known to be used soon, only what is worth less.
bool Core::start_speculation(int32_t r) {
  const Record& record = records_[r];
  const Priority priority = queue_.priority(r);
  const Coldness limit = priority == Priority::prefetch
                             ? Coldness{record.value, kNever, -1}
                             : Coldness{record.value, 0, std::numeric_limits<int32_t>::max()};
  if (!make_room(record.num_pages + config_.slack_pages, limit, Room::speculation)) return false;
  queue_.erase(r);
  start_read(r, priority);
  return true;
}

// ---- Checks ------------------------------------------------------------------------------------

void Core::check_invariants() const {
  auto require = [](bool condition, const char* what) {
    if (!condition) throw std::logic_error(std::string("Core: ") + what);
  };
  std::vector<int32_t> owner(page_owner_.size(), -1);
  std::vector<int32_t> pins(records_.size(), 0);
  int64_t loading = 0, speculation = 0, used = 0, free_pages = 0, resident_bytes = 0;
  for (int32_t r = 0; r < num_records(); ++r) {
    const Record& record = records_[r];
    const bool holds = record.state != RecordState::absent;
    require(record.pages.size() == (holds ? static_cast<size_t>(record.num_pages) : 0),
            "a record holds pages exactly while it is loading or resident");
    for (size_t i = 0; i < record.pages.size(); ++i) {
      const int32_t page = record.pages[i];
      require(pool_.is_mapped(pool_.slab_of(page)), "a page in use lies in a mapped slab");
      require(!pool_.is_free(page), "a page in use is not free");
      require(owner[page] < 0, "no page belongs to two records");
      require(page_owner_[page] == r, "the page's owner is the record");
      require(record.addresses[i] == backend_->page_address(page), "the page's address is right");
      owner[page] = r;
      ++used;
    }
    loading += record.state == RecordState::loading;
    if (record.state == RecordState::loading && record.transfer != Priority::demand)
      speculation += record.num_pages;
    require(
        (record.heap_entry != 0) == (record.state == RecordState::resident && record.num_pages > 0),
        "a record can be found for eviction exactly while it is resident");
    if (record.state == RecordState::resident) resident_bytes += record.info.bytes;
    require(record.waiters.empty() || record.state == RecordState::loading,
            "needs wait only for records that are on their way");
    require(!queue_.contains(r) || record.state == RecordState::absent,
            "only absent records are queued");
  }
  for (size_t page = 0; page < owner.size(); ++page)
    require(page_owner_[page] == owner[page], "a page without record has no owner");
  for (const Reclaim& reclaim : reclaiming_) {
    require(owner[reclaim.page] < 0 && !pool_.is_free(reclaim.page),
            "a page being reclaimed is unused");
    require(backend_->reuse(reclaim.step) != Reuse::now,
            "a page is free as soon as its step has passed");
    ++used;
  }
  for (int s = 0; s < pool_.num_slabs(); ++s)
    if (pool_.is_mapped(s) && !pool_.is_draining(s))
      free_pages += config_.pages_per_slab - pool_.used_pages(s);
  require(free_pages == pool_.free_pages(), "free pages are counted right");
  int64_t total_used = 0;
  for (int s = 0; s < pool_.num_slabs(); ++s)
    if (pool_.is_mapped(s)) total_used += pool_.used_pages(s);
  require(used == total_used, "no page is lost");
  require(pool_.mapped_slabs() - pool_.draining_slabs() <= target_slabs_,
          "the budget bounds what is used");
  require(loading == num_loading_, "reads are counted right");
  require(resident_bytes == resident_bytes_, "resident bytes are counted right");
  std::vector<int> entries(records_.size(), 0);
  for (const Coldness& entry : heap_)
    if (records_[entry.record].heap_entry == entry.entry) {
      ++entries[entry.record];
      require(!(coldness(entry.record) < entry), "no entry is hotter than its record");
    }
  for (int32_t r = 0; r < num_records(); ++r)
    require(entries[r] == (records_[r].heap_entry != 0), "one valid entry per resident record");
  require(speculation == speculation_loading_pages_, "speculative pages are counted right");
  for (const auto& [id, session] : sessions_) {
    int32_t num_loading = 0, num_handed = 0;
    for (int32_t i = 0; i < static_cast<int32_t>(session.needs.size()); ++i) {
      const NeedEntry& n = session.needs[i];
      if (n.state == NeedState::waiting || n.state == NeedState::released) continue;
      num_loading += n.state == NeedState::loading;
      num_handed += n.state == NeedState::handed;
      int32_t missing = 0;
      require(has_level(n.need.expert, n.level), "a need is at a level that its expert has");
      for_records(n.need.expert, mask_of(n), [&](int32_t id_of) {
        ++pins[id_of];
        const Record& record = records_[id_of];
        require(record.state != RecordState::absent, "what a need relies on is here or on its way");
        require(n.state == NeedState::loading || record.state == RecordState::resident,
                "what was handed out is resident");
        if (record.state == RecordState::loading) {
          ++missing;
          require(std::count(record.waiters.begin(), record.waiters.end(), Waiter{id, i}) == 1,
                  "a need waits for each of its records once");
        }
      });
      require(n.state != NeedState::loading || (missing == n.missing && missing > 0),
              "missing records are counted right");
    }
    require(num_loading == session.num_loading && num_handed == session.num_handed,
            "needs are counted right");
  }
  for (int32_t r = 0; r < num_records(); ++r)
    require(records_[r].pins == pins[r], "pins are counted right");
}

std::string Core::fingerprint() const {
  std::string f;
  auto add = [&f](auto value) { f.append(reinterpret_cast<const char*>(&value), sizeof(value)); };
  // Times of last use matter by their order only.
  std::vector<uint64_t> times{clock_};
  for (const Record& r : records_) {
    times.push_back(r.last_use);
    times.push_back(r.expected);
  }
  for (const auto& entry : sessions_) times.push_back(entry.second.tick);
  std::sort(times.begin(), times.end());
  times.erase(std::unique(times.begin(), times.end()), times.end());
  auto rank = [&](uint64_t t) {
    return static_cast<uint8_t>(std::lower_bound(times.begin(), times.end(), t) - times.begin());
  };
  for (const Record& r : records_) {
    add(r.state);
    add(r.transfer);
    add(r.speculative);
    add(r.user_pinned);
    add(r.value);
    add(rank(r.last_use));
    add(r.expected > 0);
    add(rank(r.expected));
    for (int32_t page : r.pages) add(page);
    add('|');
    for (const Waiter& w : r.waiters) add(w);
    add('|');
  }
  for (int32_t r : queue_.records()) add(r);
  add('|');
  for (const auto& [id, s] : sessions_) {
    add(id);
    add(rank(s.tick));
    add(s.error.empty());
    add(s.waiting_at);
    for (int32_t i : s.ready) add(i);
    add('|');
    for (const NeedEntry& n : s.needs) {
      add(n.state);
      add(n.level);
      add(n.missing);
    }
    add('|');
  }
  std::vector<std::pair<int32_t, uint64_t>> reclaiming;
  for (const Reclaim& r : reclaiming_) reclaiming.emplace_back(r.page, r.step);
  std::sort(reclaiming.begin(), reclaiming.end());
  for (const auto& r : reclaiming) {
    add(r.first);
    add(r.second - backend_->completed());
  }
  add('|');
  for (int s = 0; s < pool_.num_slabs(); ++s) {
    add(pool_.is_mapped(s));
    add(pool_.is_mapped(s) && pool_.is_draining(s));
  }
  add(rank(clock_));
  add(target_slabs_);
  add(demand_reserve_pages_);
  add(speculation_blocked_);
  add(map_failed_);
  for (int32_t id : woken_) add(id);
  return f;
}

}  // namespace comoe
