// Walks through every interleaving of events of small configurations of the engine's core: sessions
// that open, take, finish or give up their needs; reads that end well, fail or come back damaged;
// prefetches, upgrades, cancellations, evictions, budgets that shrink and grow, steps of a device.
// In every state:
//   - no page belongs to two records, none is lost, the budget holds (Core::check_invariants)
//   - nothing is written, moved or unmapped that a step may read               (FakeBackend)
//   - what a session holds is whole, undamaged, and stays where it is          (World::check_held)
//   - a session that waits has nothing to be woken for (World::check_sleepers)
//   - while a session is unfinished, something can happen that is bound to     (explore: no
//   deadlock)
#include <chrono>
#include <cstdio>
#include <functional>
#include <unordered_set>

#include "../engine/core.h"
#include "check.h"
#include "fake_backend.h"

using namespace comoe;

namespace {

struct Scenario {
  const char* name;
  std::vector<uint32_t> level_masks;
  std::vector<int> record_pages;  // one per record
  // [experts, records per expert] ids, -1 for none; empty: experts of records one after the other
  std::vector<int32_t> experts;
  int pages_per_slab, max_slabs, target_slabs;
  std::vector<std::vector<Need>> sessions;
  int64_t slack_pages = 0, speculation_pages = 4;
  // How often each of these may happen.
  int fails = 0, corruptions = 0, steps = 0, give_ups = 0, evictions = 0, cancels = 0;
  std::vector<std::pair<int32_t, Priority>> requests;  // in this order
  std::vector<int> targets;                            // budgets set, in this order
  std::vector<std::pair<int32_t, bool>> pins;          // in this order
  std::vector<std::pair<int32_t, float>> values;       // from the start
  int refuse_memory_at = -1;  // the system refuses slabs from this budget change on
};

// A step takes ten times as long under a sanitizer, thirty times under an emulator. Both see every
// code path in fewer states; that all states are good is shown once, where it is fast.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t kMostStates = 20000;
#elif !defined(__x86_64__)
constexpr size_t kMostStates = 5000;
#else
constexpr size_t kMostStates = 3000000;
#endif

struct World {
  const Scenario* scenario;
  FakeBackend backend;
  Core core;
  struct Held {
    Ready ready;
    std::vector<int32_t> pages;
  };
  struct User {
    int32_t session = -1;
    bool waiting = false, must_finish = false, ended = false, failed = false;
    std::vector<Held> held;
    int given = 0;
  };
  std::vector<User> users;
  int fails, corruptions, steps, give_ups, evictions, cancels;
  size_t requests = 0, targets = 0, pins = 0;
  int64_t trace = -1;  // last event that led here, in Explorer::traces

  explicit World(const Scenario& s)
      : scenario(&s),
        backend(s.pages_per_slab, s.max_slabs),
        core({1, s.pages_per_slab, s.level_masks, s.slack_pages, s.speculation_pages}, &backend),
        users(s.sessions.size()),
        fails(s.fails),
        corruptions(s.corruptions),
        steps(s.steps),
        give_ups(s.give_ups),
        evictions(s.evictions),
        cancels(s.cancels) {
    std::vector<RecordInfo> infos;
    for (int pages : s.record_pages) infos.push_back({0, 0, pages, 0});
    core.add_records(infos.data(), static_cast<int64_t>(infos.size()));
    std::vector<int32_t> table = s.experts;
    for (int32_t r = 0; s.experts.empty() && r < core.num_records(); ++r) table.push_back(r);
    core.add_experts(table.data(), static_cast<int64_t>(table.size()) / core.records_per_expert());
    for (const auto& [record, value] : s.values) core.set_value(record, value);
    core.values_changed();
    set_target(s.target_slabs);
  }
  World(const World& o)
      : scenario(o.scenario),
        backend(o.backend),
        core(o.core),
        users(o.users),
        fails(o.fails),
        corruptions(o.corruptions),
        steps(o.steps),
        give_ups(o.give_ups),
        evictions(o.evictions),
        cancels(o.cancels),
        requests(o.requests),
        targets(o.targets),
        pins(o.pins),
        trace(o.trace) {
    core.set_backend(&backend);
  }

  void set_target(int slabs) {
    backend.slab_limit = slabs;
    core.set_target_slabs(slabs);
  }

  std::string fingerprint() const {
    std::string f = core.fingerprint() + backend.fingerprint();
    for (const User& u : users) {
      f += static_cast<char>(u.session) + std::string(u.waiting ? "w" : "") +
           (u.must_finish ? "m" : "") + (u.ended ? "e" : "") + (u.failed ? "f" : "");
      for (const Held& h : u.held) f += static_cast<char>(h.ready.need);
      f += '|';
    }
    for (int n : {fails, corruptions, steps, give_ups, evictions, cancels,
                  static_cast<int>(requests), static_cast<int>(targets), static_cast<int>(pins)})
      f += static_cast<char>(n);
    return f;
  }

  void take(User& u) {
    std::vector<Ready> ready;
    const Next next = core.next(u.session, ready);
    const auto& needs = scenario->sessions[&u - users.data()];
    for (const Ready& r : ready) {
      const Need& need = needs.at(r.need);
      FakeBackend::require(r.level >= need.min_level && r.level <= need.want_level,
                           "level out of range");
      Held held{r, {}};
      const uint32_t mask = scenario->level_masks[r.level];
      for (int i = 0; mask >> i; ++i)
        if (mask >> i & 1)
          for (int32_t page : core.page_list(core.record_of(need.expert, i)))
            held.pages.push_back(page);
      u.held.push_back(held);
      ++u.given;
    }
    u.waiting = next == Next::wait;
    u.must_finish = next == Next::hold;
    if (next == Next::hold) FakeBackend::require(!u.held.empty(), "hold, but nothing is held");
    if (next == Next::failed) u.failed = true;
    if (next == Next::end)
      FakeBackend::require(u.given == static_cast<int>(needs.size()),
                           "it ended, and needs are left");
    if ((next == Next::end || next == Next::failed) && u.held.empty()) close(u);
    if (next == Next::end && !u.held.empty()) u.must_finish = true;
  }
  void close(User& u) {
    core.close_session(u.session);
    u.held.clear();
    u.waiting = false;
    u.ended = true;
  }

  void check() {
    core.check_invariants();
    std::vector<int32_t> woken = core.take_woken();
    for (int32_t id : woken)
      for (User& u : users)
        if (u.session == id) u.waiting = false;
    check_sleepers();
    check_held();
  }
  void check_sleepers() {
    for (User& u : users) {
      if (!u.waiting) continue;
      FakeBackend::require(core.peek(u.session) == Next::wait, "a wake-up was lost");
    }
  }
  void check_held() {
    for (size_t i = 0; i < users.size(); ++i)
      for (const Held& h : users[i].held) {
        const Need& need = scenario->sessions[i][h.ready.need];
        const uint32_t mask = scenario->level_masks[h.ready.level];
        size_t at = 0;
        for (int r = 0; mask >> r; ++r) {
          if (!(mask >> r & 1)) continue;
          const int32_t record = core.record_of(need.expert, r);
          const auto& pages = core.page_list(record);
          FakeBackend::require(core.state(record) == RecordState::resident,
                               "held, but not resident");
          for (size_t k = 0; k < pages.size(); ++k, ++at) {
            FakeBackend::require(at < h.pages.size() && h.pages[at] == pages[k],
                                 "a held page was moved");
            FakeBackend::require(
                backend.tag(pages[k]) == FakeBackend::Tag{record, static_cast<int32_t>(k), true},
                "a held page has other bytes");
          }
        }
      }
  }

  using Event = std::pair<std::string, std::function<void(World&)>>;  // name, effect
  // Events that are bound to happen by themselves, and events that may or may not.
  void events(std::vector<Event>& bound, std::vector<Event>& optional) const {
    for (size_t i = 0; i < users.size(); ++i) {
      const User& u = users[i];
      const std::string who = "user" + std::to_string(i);
      if (u.ended) continue;
      if (u.session < 0) {
        bound.emplace_back(who + ".open", [i](World& w) {
          const auto& needs = w.scenario->sessions[i];
          w.users[i].session =
              w.core.open_session(needs.data(), static_cast<int64_t>(needs.size()));
        });
        continue;
      }
      if (!u.waiting && !u.must_finish && !(u.failed && !u.held.empty()))
        bound.emplace_back(who + ".next", [i](World& w) { w.take(w.users[i]); });
      // A thread that waits in next() cannot call done().
      for (size_t h = 0; h < u.held.size() && !u.waiting; ++h)
        bound.emplace_back(who + ".done", [i, h](World& w) {
          User& user = w.users[i];
          w.core.done(user.session, user.held[h].ready.need);
          user.held.erase(user.held.begin() + static_cast<std::ptrdiff_t>(h));
          user.must_finish = false;
        });
      if (give_ups > 0)
        optional.emplace_back(who + ".give_up", [i](World& w) {
          --w.give_ups;
          w.close(w.users[i]);
        });
    }
    for (const auto& entry : backend.running) {
      const int32_t r = entry.first;
      const std::string what = "read" + std::to_string(r);
      bound.emplace_back(what + ".ok", [r](World& w) {
        w.backend.fill(r, true);
        w.core.read_done(r, ReadStatus::ok, "");
      });
      if (fails > 0)
        optional.emplace_back(what + ".fails", [r](World& w) {
          --w.fails;
          w.backend.fill(r, false);
          w.core.read_done(r, ReadStatus::failed, "read error");
        });
      if (corruptions > 0)
        optional.emplace_back(what + ".corrupt", [r](World& w) {
          --w.corruptions;
          w.backend.fill(r, false);
          w.core.read_done(r, ReadStatus::corrupt, "wrong checksum");
        });
    }
    if (!backend.steps.empty())
      bound.emplace_back("step.completes", [](World& w) {
        w.backend.complete_step();
        w.core.step_passed();
      });
    if (steps > 0)
      optional.emplace_back("step.launches", [](World& w) {
        --w.steps;
        w.backend.launch_step();
      });
    if (requests < scenario->requests.size())
      optional.emplace_back("request", [](World& w) {
        const auto& [record, priority] = w.scenario->requests[w.requests++];
        w.core.request(record, priority, 0);
        w.core.pump();
      });
    for (size_t i = 0; cancels > 0 && i < requests; ++i)
      for (bool late : {false, true})
        optional.emplace_back((late ? "withdraw" : "cancel") + std::to_string(i),
                              [i, late](World& w) {
                                --w.cancels;
                                w.backend.reads_begin_late = late;
                                const auto& [record, priority] = w.scenario->requests[i];
                                w.core.cancel(record, priority);
                                w.core.pump();
                              });
    for (int32_t r = 0; evictions > 0 && r < core.num_records(); ++r)
      if (core.state(r) == RecordState::resident)
        optional.emplace_back("evict" + std::to_string(r), [r](World& w) {
          --w.evictions;
          w.core.evict(r);
        });
    // The engine refuses a budget that leaves no room beside what is pinned.
    if (targets < scenario->targets.size() &&
        scenario->targets[targets] * scenario->pages_per_slab >=
            core.user_pinned_pages() + core.demand_reserve_pages())
      optional.emplace_back("budget", [](World& w) {
        if (static_cast<int>(w.targets) == w.scenario->refuse_memory_at)
          w.backend.refuse_memory = true;
        w.set_target(w.scenario->targets[w.targets++]);
      });
    if (pins < scenario->pins.size())
      optional.emplace_back("pin", [](World& w) {
        const auto& [record, pinned] = w.scenario->pins[w.pins++];
        try {
          w.core.pin(record, pinned);
        } catch (const BudgetError&) {  // too little would be left: nothing has changed
        }
      });
  }
};

struct Explorer {
  struct Trace {
    int64_t before;
    std::string event;
  };
  struct Hash {  // 128 bits: with 10^7 states a collision has a chance below 10^-24
    uint64_t a, b;
    bool operator==(const Hash& o) const { return a == o.a && b == o.b; }
  };
  struct HashOfHash {
    size_t operator()(const Hash& h) const { return h.a; }
  };

  const Scenario& scenario;
  std::unordered_set<Hash, HashOfHash> seen;
  std::vector<Trace> traces;
  int64_t transitions = 0, ends = 0, failed_ends = 0;
  std::string failure;

  explicit Explorer(const Scenario& s) : scenario(s) {}

  static Hash hash(const std::string& text) {
    Hash h{0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F};
    for (unsigned char c : text) {
      h.a = (h.a ^ c) * 0x100000001B3;
      h.a ^= h.a >> 29;
      h.b = (h.b + c) * 0xD6E8FEB86659FD93;
      h.b ^= h.b >> 32;
    }
    return h;
  }
  std::string story(int64_t trace) const {
    std::string text;
    for (; trace >= 0; trace = traces[trace].before) text = " " + traces[trace].event + text;
    return " after" + text;
  }

  void run() {
    std::vector<World> stack;
    stack.emplace_back(scenario);
    seen.insert(hash(stack.back().fingerprint()));
    while (!stack.empty() && seen.size() < kMostStates) {
      const World world = std::move(stack.back());
      stack.pop_back();
      std::vector<World::Event> bound, optional;
      world.events(bound, optional);
      if (bound.empty()) {
        bool all_ended = true, any_failed = false;
        for (const World::User& u : world.users) {
          all_ended &= u.ended;
          any_failed |= u.failed;
        }
        ++ends;
        failed_ends += any_failed;
        if (!all_ended) failure = "deadlock";
        if (!world.core.target_reached()) failure = "memory above the budget was not given back";
        if (!failure.empty()) {
          failure += story(world.trace);
          return;
        }
      }
      for (std::vector<World::Event>* events : {&bound, &optional})
        for (const World::Event& event : *events) {
          World next(world);
          ++transitions;
          try {
            event.second(next);
            next.check();
          } catch (const std::exception& error) {
            failure = error.what() + story(world.trace) + " " + event.first;
            return;
          }
          if (!seen.insert(hash(next.fingerprint())).second) continue;
          next.trace = static_cast<int64_t>(traces.size());
          traces.push_back({world.trace, event.first});
          stack.push_back(std::move(next));
        }
    }
  }
};

std::vector<Scenario> scenarios() {
  const Priority prefetch = Priority::prefetch, upgrade = Priority::upgrade;
  std::vector<Scenario> all;
  Scenario s;

  s = {};
  s.name = "waves: two sessions need more than fits";
  s.level_masks = {1};
  s.record_pages = {2, 2, 2};
  s.pages_per_slab = 2, s.max_slabs = 2, s.target_slabs = 2;
  s.sessions = {{{0, 0, 0}, {1, 0, 0}, {2, 0, 0}}, {{2, 0, 0}, {0, 0, 0}}};
  s.fails = 1, s.give_ups = 1;
  all.push_back(s);

  s.name = "waves with prefetch, cancel, evict";
  s.give_ups = 0, s.fails = 0, s.evictions = 1, s.cancels = 1;
  s.requests = {{1, prefetch}, {2, upgrade}};
  all.push_back(s);

  s.name = "a prefetch that is joined, fails or is damaged";
  s.sessions = {{{0, 0, 0}, {1, 0, 0}}, {{1, 0, 0}}};
  s.requests = {{1, prefetch}, {0, upgrade}, {1, prefetch}};
  s.evictions = 0, s.cancels = 1, s.fails = 1, s.corruptions = 1;
  all.push_back(s);

  s = {};
  s.name = "budget shrinks and grows under two sessions";
  s.level_masks = {1};
  s.record_pages = {2, 2, 2};
  s.pages_per_slab = 1, s.max_slabs = 5, s.target_slabs = 5;
  s.sessions = {{{0, 0, 0}, {1, 0, 0}}, {{2, 0, 0}, {0, 0, 0}}};
  s.targets = {2, 4, 1};
  s.requests = {{2, prefetch}};
  s.fails = 1;
  all.push_back(s);

  s.name = "pages move while records are pinned and unpinned";
  s.pages_per_slab = 2, s.max_slabs = 3, s.target_slabs = 3;
  s.targets = {2, 1, 3};
  s.pins = {{0, true}, {1, true}, {0, false}};
  s.requests = {};
  s.fails = 0;
  all.push_back(s);

  s.name = "the system refuses memory";
  s.pins = {};
  s.targets = {1, 3};
  s.refuse_memory_at = 1;
  all.push_back(s);

  s = {};
  s.name = "ladder: levels, upgrades, partial hits";
  s.level_masks = {1, 3, 4};
  s.record_pages = {1, 1, 2, 1, 1, 2};
  s.pages_per_slab = 1, s.max_slabs = 4, s.target_slabs = 4;
  s.sessions = {{{0, 0, 2}, {1, 1, 1}}, {{0, 1, 2}, {1, 0, 1}}};
  s.requests = {{2, prefetch}, {1, upgrade}};
  s.values = {{0, 2.0f}, {1, 1.0f}, {3, 2.0f}, {4, 1.0f}};
  s.evictions = 1;
  all.push_back(s);

  s.name = "ladder under a shrinking budget, a damaged record";
  s.evictions = 0;
  s.corruptions = 1;
  s.requests = {{2, prefetch}};
  s.sessions = {{{0, 0, 2}, {1, 1, 1}}, {{0, 1, 2}}};
  s.targets = {2, 3};
  all.push_back(s);

  // Record 0 is the base of experts 0 and 1; expert 2 has one level only.
  s = {};
  s.name = "a base shared by two experts, levels that are absent";
  s.level_masks = {1, 3, 4};
  s.record_pages = {2, 1, 1, 2};
  s.experts = {0, 1, -1, 0, 2, 3, -1, -1, 3};
  s.pages_per_slab = 1, s.max_slabs = 4, s.target_slabs = 4;
  s.sessions = {{{0, 0, 1}, {2, 0, 2}}, {{1, 0, 1}, {0, 1, 1}}};
  s.requests = {{2, upgrade}, {0, prefetch}};
  s.evictions = 1, s.give_ups = 1;
  all.push_back(s);

  s.name = "a shared base that is damaged, and a budget that shrinks";
  s.evictions = 0, s.give_ups = 0, s.corruptions = 1;
  s.requests = {{0, prefetch}};
  s.targets = {3, 4};
  all.push_back(s);

  s = {};
  s.name = "device: pages wait for steps";
  s.level_masks = {1};
  s.record_pages = {2, 2, 2};
  s.pages_per_slab = 1, s.max_slabs = 5, s.target_slabs = 5;
  s.sessions = {{{0, 0, 0}, {1, 0, 0}, {2, 0, 0}}, {{1, 0, 0}}};
  s.steps = 3, s.evictions = 1, s.slack_pages = 1;
  s.requests = {{2, prefetch}};
  all.push_back(s);

  s.name = "device: budget shrinks while steps run";
  s.evictions = 0;
  s.steps = 2;
  s.targets = {3, 2, 4};
  s.sessions = {{{0, 0, 0}, {1, 0, 0}}, {{2, 0, 0}}};
  all.push_back(s);
  return all;
}

}  // namespace

int main() {
  int64_t states = 0;
  for (const Scenario& scenario : scenarios()) {
    const auto begin = std::chrono::steady_clock::now();
    Explorer explorer(scenario);
    explorer.run();
    states += static_cast<int64_t>(explorer.seen.size());
    std::printf("%-52s %8zu states %9lld transitions %6lld ends (%lld failed) %.1f s\n",
                scenario.name, explorer.seen.size(), static_cast<long long>(explorer.transitions),
                static_cast<long long>(explorer.ends), static_cast<long long>(explorer.failed_ends),
                std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    std::fflush(stdout);
    if (!explorer.failure.empty()) std::fprintf(stderr, "  %s\n", explorer.failure.c_str());
    CHECK(explorer.failure.empty());
    CHECK(explorer.ends > 0);
    if (scenario.fails + scenario.corruptions > 0) CHECK(explorer.failed_ends > 0);
  }
  std::printf("%lld states\n", static_cast<long long>(states));
  return check_failures != 0;
}
