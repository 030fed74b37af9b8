// The device's half of the engine without a device: a thread takes the place of the kernels and
// runs the same text as they do (device/protocol.h, device/gate.h), another that of the copy
// stream (fake_device.h). What it computes is a check of every byte that it may read, before and
// after a pause, so that a page that is reused too early is seen; under ThreadSanitizer also where
// the bytes happen to be right.
#include <atomic>
#include <chrono>
#include <functional>
#include <thread>

#include "../device/gate.h"
#include "../device/miss_server.h"
#include "engine_store.h"

using namespace comoe;

namespace {

constexpr int kLayers = 3, kLayerExperts = 6, kTop = 2;

// A model on the fake device: kLayers layers of kLayerExperts experts, each expert 5 records.
struct Rig {
  Store store{kLayers * kLayerExperts, {9000, 4097, 4096, 8000, 20000}};
  FakeDevice device;
  DeviceBackend* backend;
  std::unique_ptr<Engine> engine;
  std::unique_ptr<MissServer> server;

  explicit Rig(int slabs, double timeout = 20, bool unified = false, uint32_t ring = 64,
               uint32_t reserve = 16)
      : device(int64_t{64} << 20, unified) {
    const EngineConfig config = Store::config(slabs);
    DeviceConfig d;
    d.host_bytes = 6 * config.slab_bytes;
    d.ring_capacity = ring;
    d.ring_reserve = reserve;
    auto owned = std::make_unique<DeviceBackend>(config, d, &device);
    backend = owned.get();
    engine = std::make_unique<Engine>(config, std::move(owned));
    store.add_to(*engine);
    backend->make_plane(store.infos, store.rows());
    server = std::make_unique<MissServer>(engine.get(), backend, timeout);
  }
  ~Rig() {
    server.reset();
    engine.reset();
  }
  const Plane& plane() const { return backend->plane(); }
  uint64_t completed() const { return load_acquire(&plane().mailbox->completed); }
};

// One launch of a layer, with its constants baked in as a captured graph has them; what changes
// from step to step (the tokens) lies in memory, here `logits`.
struct Layer {
  int layer = 0, T = 1;
  std::vector<float> logits, scores, later_logits;
  std::vector<uint32_t> keys;
  std::vector<int32_t> chosen, later_chosen, items, levels;
  std::vector<float> weights, later_weights;

  void prepare(int number, int tokens) {
    layer = number;
    T = tokens;
    logits.assign(T * kLayerExperts, 0);
    scores = later_logits = logits;
    keys.assign(T * kLayerExperts, 0);
    chosen.assign(T * kTop, 0);
    items = levels = later_chosen = chosen;
    weights.assign(T * kTop, 0);
    later_weights = weights;
  }
};

struct Kernel {
  const Store* store;
  Plane plane;
  std::atomic<int64_t> bytes_checked{0}, wrong{0}, missing{0};

  // What an expert kernel reads.
  void read(int32_t expert, int level) {
    for (int r = 0; r < kPerExpert; ++r) {
      if (!(kMasks[level] >> r & 1)) continue;
      const int32_t record = plane.expert_records[expert * plane.records_per_expert + r];
      const auto& payload = store->payloads[record];
      for (size_t at = 0; at < payload.size(); at += 4096) {
        const auto* page = reinterpret_cast<const uint8_t*>(record_page(plane, record, at / 4096));
        const size_t n = std::min<size_t>(4096, payload.size() - at);
        if (std::memcmp(page, payload.data() + at, n) != 0) ++wrong;
        bytes_checked += n;
      }
    }
  }
  // False: the wait failed.
  bool run(Layer& l, int ahead, int pause_us) {
    OneLane lane;
    GateScratch scratch;
    GateArgs args{};
    args.T = l.T;
    args.ahead = l.layer + ahead < kLayers ? ahead : kLayers - 1 - l.layer;
    l.scores = l.logits;
    const auto router = [&](GateRouter& r, int layer, float* scores, int32_t* chosen,
                            float* weights) {
      r.spec.num_experts = kLayerExperts;
      r.spec.k = kTop;
      r.spec.normalise = true;
      r.first_expert = layer * kLayerExperts;
      r.logits = scores;
      r.keys = l.keys.data();
      r.chosen = chosen;
      r.weights = weights;
      for (int t = 0; t < l.T; ++t)
        route(lane, r.spec, scores + t * kLayerExperts, r.keys + t * kLayerExperts,
              scratch.group_keys, chosen + t * kTop, weights + t * kTop);
    };
    router(args.routers[0], l.layer, l.scores.data(), l.chosen.data(), l.weights.data());
    for (int d = 1; d <= args.ahead; ++d) {
      l.later_logits = l.logits;  // its guess: the same experts one layer on
      router(args.routers[d], l.layer + d, l.later_logits.data(), l.later_chosen.data(),
             l.later_weights.data());
    }
    args.items = l.items.data();
    args.levels = l.levels.data();
    visit_open(lane, plane, args, scratch);
    const bool arrived = visit_wait(plane);
    visit_resolve(lane, plane, args);
    for (int pass = 0; pass < 2; ++pass) {
      for (size_t i = 0; i < l.items.size(); ++i) {
        if (l.items[i] < 0) continue;
        if (l.levels[i] < 0)
          ++missing;
        else
          read(l.layer * kLayerExperts + l.items[i], l.levels[i]);
      }
      if (pass == 0 && pause_us > 0)
        std::this_thread::sleep_for(std::chrono::microseconds(pause_us));
    }
    return arrived;
  }
  void end_step() { visit_end(plane, plane.state->begun); }
};

void choose(Layer& l, std::mt19937& random) {
  for (float& v : l.logits) v = static_cast<float>(random() % 1000) / 100.0f;
}

// A "graph": the launches of a step, captured once and replayed. Everything misses at first, then
// everything hits, then the tokens change, two replays in a row without a host in between.
void test_two_replays_in_a_row(bool unified) {
  Rig rig(40, 20, unified);
  Kernel kernel{&rig.store, rig.plane()};
  std::vector<Layer> layers(kLayers);
  std::vector<std::function<void()>> graph;
  for (int i = 0; i < kLayers; ++i) {
    layers[i].prepare(i, 2);
    graph.push_back([&kernel, &layers, i] { CHECK(kernel.run(layers[i], 0, 0)); });
  }
  graph.push_back([&kernel] { kernel.end_step(); });
  const auto set = [&](int a, int b) {
    for (Layer& l : layers) {
      std::fill(l.logits.begin(), l.logits.end(), 0.0f);
      for (int t = 0; t < 2; ++t) l.logits[t * 6 + a] = l.logits[t * 6 + b] = 5.0f;
    }
  };
  const auto replay = [&] {
    for (const auto& launch : graph) launch();
  };
  set(1, 3);
  replay();
  replay();
  CHECK(rig.server->wait_completed(6, 10));
  MissStats stats = rig.server->stats();
  CHECK(stats.misses == 2 * kLayers && stats.hits == 2 * kLayers);
  set(3, 4);
  replay();
  replay();
  CHECK(rig.server->wait_completed(12, 10));
  stats = rig.server->stats();
  CHECK(stats.visits == 12 && stats.misses == 3 * kLayers);
  CHECK(kernel.wrong == 0 && kernel.missing == 0 && kernel.bytes_checked > 0);
  rig.server->check();
}

// Decode with far less memory than the model, guesses ahead, prefetch, upgrades, eviction, a budget
// that moves, and a copy stream that lags: every byte read must be right, and nothing may hang.
void test_decode_in_little_memory(bool unified) {
  // One visit takes at most T * kTop = 2 experts of at most 20 pages in the finest case.
  Rig rig(8, 20, unified);
  rig.device.jitter_us = 40;
  Kernel kernel{&rig.store, rig.plane()};
  std::atomic<bool> stop{false};
  std::thread restless([&] {
    std::mt19937 random(11);
    const int32_t n = static_cast<int32_t>(rig.store.infos.size());
    while (!stop) {
      const int32_t record = static_cast<int32_t>(random() % n);
      switch (random() % 4) {
        case 0:
          rig.engine->request(&record, 1, Priority::prefetch, 1);
          break;
        case 1:
          rig.engine->request(&record, 1, Priority::upgrade);
          break;
        case 2:
          rig.engine->evict(&record, 1);
          break;
        default:
          try {
            rig.engine->set_budget((7 + random() % 3) * 8 * 4096, 0.01);
          } catch (const std::runtime_error&) {  // sessions hold pages: it goes on
          }
      }
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
    }
  });
  std::thread device([&] {
    std::mt19937 random(5);
    std::vector<Layer> layers(kLayers);
    for (int i = 0; i < kLayers; ++i) layers[i].prepare(i, 1);
    for (int step = 0; step < 60; ++step) {
      for (Layer& l : layers) {
        choose(l, random);
        CHECK(kernel.run(l, 2, static_cast<int>(random() % 200)));
      }
      kernel.end_step();
    }
  });
  device.join();
  stop = true;
  restless.join();
  CHECK(rig.server->wait_completed(60 * kLayers, 20));
  const MissStats stats = rig.server->stats();
  CHECK(stats.visits == 60 * kLayers && stats.misses > 0 && stats.guesses > 0);
  CHECK(kernel.wrong == 0 && kernel.missing == 0);
  rig.server->check();
  rig.engine->cancel_all(Priority::prefetch);
  rig.engine->cancel_all(Priority::upgrade);
  CHECK(rig.engine->wait_idle(20));
  std::vector<int32_t> all = rig.store.rows();
  rig.engine->evict(all.data(), static_cast<int64_t>(all.size()));
  for (int i = 0; i < 2000 && rig.engine->stats().pages_reclaiming > 0; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  const EngineStats engine = rig.engine->stats();
  CHECK(engine.pages_reclaiming == 0 && engine.sessions == 0);
  std::printf(
      "decode%s: %lld hits, %lld misses, %lld guesses, %lld evictions, %lld bytes checked\n",
      unified ? " unified" : "", static_cast<long long>(stats.hits),
      static_cast<long long>(stats.misses), static_cast<long long>(stats.guesses),
      static_cast<long long>(engine.core.evictions),
      static_cast<long long>(kernel.bytes_checked.load()));
}

// What a running visit reads stays, although it was evicted before the host knew of the visit; and
// room for its own misses is not waited for among these pages.
void test_evicted_under_a_visit() {
  Rig rig(8);
  Kernel kernel{&rig.store, rig.plane()};
  Layer l;
  l.prepare(0, 1);
  l.logits = {5, 4, 0, 0, 0, 0};
  CHECK(kernel.run(l, 0, 0));
  kernel.end_step();
  CHECK(rig.server->wait_completed(1, 10));
  // A visit that has looked up, but whose list has not been sent.
  visit_end(rig.plane(), 1);
  const uint64_t visit = visit_begin(rig.plane());
  CHECK(visit == 2 && resident_level(rig.plane(), 0, 0, 4) >= 0);
  int64_t freed = 0;
  std::vector<int32_t> mine{0, 1, 2, 3, 4};
  for (int i = 0; i < 2000 && freed == 0; ++i) {  // its session ends when the host has seen it
    freed = rig.engine->evict(mine.data(), 5);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  CHECK(freed > 0);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(rig.engine->stats().pages_reclaiming > 0);
  const uint64_t at = rig.plane().state->posted;
  ring_put(rig.plane(), at, {RingKind::hit, 0, 0, 0, 0});
  ring_put(rig.plane(), at + 1, {RingKind::miss, 4, 0, 4, 0});
  ring_put(rig.plane(), at + 2, {RingKind::end, 2, 0, 0, 0});
  rig.plane().state->posted = at + 3;
  rig.plane().state->wait_for = visit;
  CHECK(visit_wait(rig.plane()));
  CHECK(rig.engine->stats().pages_reclaiming > 0);  // still its own
  kernel.read(4, resident_level(rig.plane(), 4, 0, 4));
  visit_end(rig.plane(), visit);
  for (int i = 0; i < 2000 && rig.engine->stats().pages_reclaiming > 0; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  CHECK(rig.engine->stats().pages_reclaiming == 0);
  CHECK(kernel.wrong == 0);
  rig.server->check();
}

void test_lost_transfer_is_an_error() {
  Rig rig(40, 0.2);
  rig.device.stopped = true;
  Kernel kernel{&rig.store, rig.plane()};
  Layer l;
  l.prepare(0, 1);
  l.logits = {5, 4, 0, 0, 0, 0};
  CHECK(!kernel.run(l, 0, 0));
  kernel.end_step();
  CHECK(kernel.missing == 4);  // two experts, looked at twice
  CHECK(load_acquire(&rig.plane().mailbox->failed) == 1);
  CHECK_THROWS(rig.server->check(), ReadError, "2 of its 2 missing experts did not come within");
  rig.server->check();  // said once
  // The stream goes on: so does the model.
  rig.device.stopped = false;
  Layer later;
  later.prepare(1, 1);
  later.logits = {5, 4, 0, 0, 0, 0};
  CHECK(kernel.run(later, 0, 0));
  kernel.end_step();
  CHECK(kernel.wrong == 0);
}

void test_unreadable_record_is_an_error() {
  Rig rig(40);
  CHECK(truncate(rig.store.path.c_str(), 4096) == 0);
  Kernel kernel{&rig.store, rig.plane()};
  Layer l;
  l.prepare(2, 1);
  l.logits = {5, 4, 0, 0, 0, 0};
  CHECK(!kernel.run(l, 0, 0));
  kernel.end_step();
  CHECK_THROWS(rig.server->check(), ReadError, "visit 1: ");
}

void test_lost_device_is_an_error() {
  Rig rig(40);
  Kernel kernel{&rig.store, rig.plane()};
  Layer l;
  l.prepare(0, 1);
  l.logits = {5, 4, 0, 0, 0, 0};
  rig.device.lost = true;
  CHECK(!kernel.run(l, 0, 0));
  CHECK(!kernel.run(l, 0, 0));
  CHECK_THROWS(rig.server->check(), ReadError, "lost; restart");
}

void test_bad_configurations() {
  const EngineConfig config = Store::config(8);
  FakeDevice small(4 * config.slab_bytes);
  DeviceConfig d;
  d.host_bytes = 8 * config.slab_bytes;
  CHECK_THROWS(DeviceBackend(config, d, &small), BudgetError, "budget: expected at most the");
  FakeDevice device;
  DeviceConfig odd = d;
  odd.ring_capacity = 100;
  CHECK_THROWS(DeviceBackend(config, odd, &device), std::invalid_argument, "a power of two");
  odd = d;
  odd.host_bytes = 4096;
  CHECK_THROWS(DeviceBackend(config, odd, &device), BudgetError, "at least one slab");
}

void test_refused_pinning_is_said() {
  Rig rig(40);
  rig.device.most_pinned = 0;
  const int32_t record = 0;
  rig.engine->request(&record, 1, Priority::prefetch);
  const Need need{0, 0, 0};
  auto session = rig.engine->open_session(&need, 1);
  std::vector<Ready> ready;
  CHECK_THROWS(session->next(ready), ReadError, "pinning");
}

// A full ring drops guesses, never a list.
void test_full_ring_drops_guesses() {
  Rig rig(40, 20, false, 8, 4);
  rig.server.reset();  // nobody takes entries
  Plane plane = rig.plane();
  CHECK(ring_room(plane, 4, true));
  plane.state->posted = 4;
  CHECK(!ring_room(plane, 1, true));
  CHECK(ring_room(plane, 4, false));
  store_release(&plane.mailbox->taken, 3);
  CHECK(ring_room(plane, 3, true) && !ring_room(plane, 4, true));
}

void test_ring_words() {
  const RingEntry e{RingKind::guess, kMaxRingExpert, 31, 30, 15};
  const RingEntry u = ring_unpack(ring_pack(e, ring_lap(5, 8)));
  CHECK(u.kind == e.kind && u.expert == e.expert && u.min_level == 31 && u.want_level == 30 &&
        u.distance == 15);
  CHECK(ring_lap(7, 8) == 1 && ring_lap(8, 8) == 2);
  CHECK(ring_pack(e, 1) >> 40 == 1 && ring_lap(uint64_t{8} * 0xFFFFFF, 8) == 0);
}

void test_reclaimer() {
  Reclaimer r;
  const uint64_t a = r.retire(1), b = r.retire(2);
  CHECK(r.reuse(a) == Reuse::later);
  r.landed(a, 0);
  CHECK(r.reuse(a) == Reuse::now && r.reuse(b) == Reuse::later);
  r.landed(b, 1);  // visit 1 runs, its list is on its way
  CHECK(r.reuse(b) == Reuse::later);
  const uint64_t c = r.retire(3);
  r.landed(c, 1);
  r.received(1, {9, 3});
  CHECK(r.reuse(b) == Reuse::now && r.reuse(c) == Reuse::held);
  r.completed(1);
  CHECK(r.reuse(c) == Reuse::now);
}

}  // namespace

int main() {
  test_ring_words();
  test_reclaimer();
  test_bad_configurations();
  test_full_ring_drops_guesses();
  for (bool unified : {false, true}) {
    test_two_replays_in_a_row(unified);
    test_decode_in_little_memory(unified);
  }
  test_evicted_under_a_visit();
  test_refused_pinning_is_said();
  test_unreadable_record_is_an_error();
  test_lost_transfer_is_an_error();
  test_lost_device_is_an_error();
  return check_failures != 0;
}
