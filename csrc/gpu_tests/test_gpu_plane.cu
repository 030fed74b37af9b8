// The data plane on a real GPU: what tests/test_device.cpp shows on a thread, with the CUDA driver,
// the kernels and captured graphs. `make test-gpu` runs it, also under compute-sanitizer. Without a
// GPU it says so and ends well. Then a few times that belong to no other benchmark, as CSV lines.
#include <cuda_runtime.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <thread>

#include "../cuda/check.h"
#include "../cuda/driver.h"
#include "../cuda/gate_prefetch.h"
#include "../device/miss_server.h"
#include "../tests/engine_store.h"

using namespace comoe;

namespace {

constexpr int kLayers = 4, kExperts = 24, kTop = 4, kHidden = 96, kTokens = 3;
constexpr uint64_t kPatience = uint64_t{1} << 24;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class T>
T* device_array(size_t count) {
  void* at = nullptr;
  COMOE_CUDA_CHECK(cudaMalloc(&at, count * sizeof(T)));
  COMOE_CUDA_CHECK(cudaMemset(at, 0, count * sizeof(T)));
  return static_cast<T*>(at);
}

// In place of an expert kernel. Grid: items. Each block compares every byte of its expert's records
// with the truth: counts[0] bytes, [1] wrong ones, [2] items that are missing.
__global__ void check_pages(const Plane plane, const GateArgs a, const uint8_t* truth,
                            const int64_t* truth_at, const int64_t* bytes, int64_t page_bytes,
                            unsigned long long* counts) {
  const int e = a.items[blockIdx.x];
  if (e < 0) return;
  const int level = a.levels[blockIdx.x];
  if (level < 0) {
    if (threadIdx.x == 0) atomicAdd(counts + 2, 1ull);
    return;
  }
  const int64_t expert = a.routers[0].first_expert + e;
  for (int r = 0; r < plane.records_per_expert; ++r) {
    if ((plane.level_masks[level] >> r & 1) == 0) continue;
    const int32_t record = plane.expert_records[expert * plane.records_per_expert + r];
    unsigned long long wrong = 0;
    for (int64_t i = threadIdx.x; i < bytes[record]; i += blockDim.x) {
      const auto* page =
          reinterpret_cast<const volatile uint8_t*>(record_page(plane, record, i / page_bytes));
      wrong += page[i % page_bytes] != truth[truth_at[record] + i];
    }
    if (wrong) atomicAdd(counts + 1, wrong);
    if (threadIdx.x == 0) atomicAdd(counts, static_cast<unsigned long long>(bytes[record]));
  }
}

struct Model {
  Store store{kLayers * kExperts, {200000, 70000, 65536, 130000, 600000}};
  std::unique_ptr<DeviceApi> device;
  DeviceBackend* backend;
  std::unique_ptr<Engine> engine;
  std::unique_ptr<MissServer> server;
  cudaStream_t stream;
  std::vector<GateLaunch> layers;
  std::vector<std::vector<float>> router;  // host copies of the weights
  float* x;
  uint8_t* truth;
  int64_t *truth_at, *bytes;
  unsigned long long* counts;
  int64_t page_bytes;

  Model(int slabs, double timeout) : device(make_driver_device(load_driver(), 0)) {
    EngineConfig config = Store::config(1);
    config.page_bytes = page_bytes = 65536;
    config.slab_bytes = 2 << 20;
    config.budget_bytes = slabs * config.slab_bytes;
    DeviceConfig d;
    d.host_bytes = 16 * config.slab_bytes;
    auto owned = std::make_unique<DeviceBackend>(config, d, device.get());
    backend = owned.get();
    engine = std::make_unique<Engine>(config, std::move(owned));
    store.add_to(*engine);
    backend->make_plane(store.infos, store.rows());
    server = std::make_unique<MissServer>(engine.get(), backend, timeout);
    COMOE_CUDA_CHECK(cudaSetDevice(0));
    COMOE_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    load_kernels();
    cudaFuncAttributes attributes;
    COMOE_CUDA_CHECK(cudaFuncGetAttributes(&attributes, check_pages));

    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    x = device_array<float>(kTokens * kHidden);
    uint32_t* const blocks_done = device_array<uint32_t>(1);
    std::vector<float*> weights;
    for (int l = 0; l < kLayers; ++l) {
      std::vector<float> w(kExperts * kHidden);
      for (float& v : w) v = normal(random);
      weights.push_back(device_array<float>(w.size()));
      COMOE_CUDA_CHECK(
          cudaMemcpy(weights[l], w.data(), w.size() * sizeof(float), cudaMemcpyHostToDevice));
      router.push_back(std::move(w));
    }
    for (int l = 0; l < kLayers; ++l) {
      GateLaunch launch{};
      launch.args.T = kTokens;
      launch.args.ahead = std::min(2, kLayers - 1 - l);
      launch.args.items = device_array<int32_t>(kTokens * kTop);
      launch.args.levels = device_array<int32_t>(kTokens * kTop);
      for (int d2 = 0; d2 <= launch.args.ahead; ++d2) {
        GateRouter& r = launch.args.routers[d2];
        r.spec.num_experts = kExperts;
        r.spec.k = kTop;
        r.spec.normalise = true;
        r.first_expert = (l + d2) * kExperts;
        r.logits = device_array<float>(kTokens * kExperts);
        r.keys = device_array<uint32_t>(kTokens * kExperts);
        r.chosen = device_array<int32_t>(kTokens * kTop);
        r.weights = device_array<float>(kTokens * kTop);
        launch.matrices[d2] = {weights[l + d2], nullptr};
      }
      launch.x = x;
      launch.x_stride = kHidden;
      launch.H = kHidden;
      launch.dtype = RoundTo::fp32;
      launch.blocks_done = blocks_done;
      layers.push_back(launch);
    }
    std::vector<int64_t> at, size;
    int64_t total = 0;
    for (const auto& payload : store.payloads) {
      at.push_back(total);
      size.push_back(static_cast<int64_t>(payload.size()));
      total += size.back();
    }
    truth = device_array<uint8_t>(total);
    for (size_t r = 0; r < at.size(); ++r)
      COMOE_CUDA_CHECK(
          cudaMemcpy(truth + at[r], store.payloads[r].data(), size[r], cudaMemcpyHostToDevice));
    truth_at = device_array<int64_t>(at.size());
    bytes = device_array<int64_t>(at.size());
    COMOE_CUDA_CHECK(cudaMemcpy(truth_at, at.data(), at.size() * 8, cudaMemcpyHostToDevice));
    COMOE_CUDA_CHECK(cudaMemcpy(bytes, size.data(), size.size() * 8, cudaMemcpyHostToDevice));
    counts = device_array<unsigned long long>(3);
  }
  ~Model() {
    (void)cudaStreamSynchronize(stream);
    server.reset();
    engine.reset();
  }
  void launch_step() {
    for (const GateLaunch& l : layers) {
      gate_prefetch(backend->plane(), l, stream);
      visit_wait(backend->plane(), l.args, kPatience, stream);
      check_pages<<<kTokens * kTop, 256, 0, stream>>>(backend->plane(), l.args, truth, truth_at,
                                                      bytes, page_bytes, counts);
      COMOE_CUDA_CHECK(cudaGetLastError());
    }
    step_end(backend->plane(), stream);
  }
  cudaGraphExec_t capture() {
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    COMOE_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    launch_step();
    COMOE_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    COMOE_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
    COMOE_CUDA_CHECK(cudaGraphUpload(executable, stream));
    return executable;
  }
  std::vector<float> set_x(unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> values(kTokens * kHidden);
    for (float& v : values) v = normal(random);
    COMOE_CUDA_CHECK(cudaMemcpyAsync(x, values.data(), values.size() * sizeof(float),
                                     cudaMemcpyHostToDevice, stream));
    COMOE_CUDA_CHECK(cudaStreamSynchronize(stream));
    return values;
  }
  std::vector<unsigned long long> read_counts() {
    COMOE_CUDA_CHECK(cudaStreamSynchronize(stream));
    std::vector<unsigned long long> c(3);
    COMOE_CUDA_CHECK(cudaMemcpy(c.data(), counts, 24, cudaMemcpyDeviceToHost));
    return c;
  }
  // The device's choice against the same routing on the host.
  void check_routing(const std::vector<float>& values) {
    for (int l = 0; l < kLayers; ++l) {
      const GateRouter& r = layers[l].args.routers[0];
      std::vector<int32_t> chosen(kTokens * kTop), want(kTop);
      std::vector<float> weights(kTokens * kTop), want_weights(kTop), scores(kExperts);
      std::vector<uint32_t> keys(kExperts), group_keys(kMaxGroups);
      COMOE_CUDA_CHECK(
          cudaMemcpy(chosen.data(), r.chosen, chosen.size() * 4, cudaMemcpyDeviceToHost));
      COMOE_CUDA_CHECK(
          cudaMemcpy(weights.data(), r.weights, weights.size() * 4, cudaMemcpyDeviceToHost));
      for (int t = 0; t < kTokens; ++t) {
        for (int e = 0; e < kExperts; ++e) {
          double sum = 0;
          for (int h = 0; h < kHidden; ++h)
            sum += static_cast<double>(router[l][e * kHidden + h]) * values[t * kHidden + h];
          scores[e] = static_cast<float>(sum);
        }
        route(OneLane(), r.spec, scores.data(), keys.data(), group_keys.data(), want.data(),
              want_weights.data());
        for (int k = 0; k < kTop; ++k) {
          CHECK(chosen[t * kTop + k] == want[k]);
          CHECK(std::fabs(weights[t * kTop + k] - want_weights[k]) < 1e-4f);
        }
      }
    }
  }
};

// Misses, then hits; a graph, two replays in a row; less memory than the model, and a restless
// host.
void test_graph_replays() {
  Model m(24, 20);  // 48 MiB for 97 MiB of experts
  const cudaGraphExec_t graph = m.capture();
  uint64_t visits = 0;
  for (unsigned step = 0; step < 40; ++step) {
    const std::vector<float> values = m.set_x(step / 2);  // odd steps: all hits
    for (int replay = 0; replay < 2; ++replay) COMOE_CUDA_CHECK(cudaGraphLaunch(graph, m.stream));
    visits += 2 * kLayers;
    const auto counts = m.read_counts();
    CHECK(counts[1] == 0 && counts[2] == 0 && counts[0] > 0);
    m.check_routing(values);
  }
  CHECK(m.server->wait_completed(visits, 10));
  m.server->check();
  const MissStats stats = m.server->stats();
  CHECK(stats.visits == static_cast<int64_t>(visits) && stats.misses > 0 && stats.hits > 0);
  std::printf("graph: %lld hits, %lld misses, %lld guesses\n", static_cast<long long>(stats.hits),
              static_cast<long long>(stats.misses), static_cast<long long>(stats.guesses));
  std::atomic<bool> stop{false};
  std::thread restless([&] {
    std::mt19937 random(11);
    const int32_t n = static_cast<int32_t>(m.store.infos.size());
    while (!stop) {
      const int32_t record = static_cast<int32_t>(random() % n);
      if (random() % 2)
        m.engine->request(&record, 1, Priority::prefetch, 1);
      else
        m.engine->evict(&record, 1);
      try {
        if (random() % 8 == 0) m.engine->set_budget((20 + random() % 5) * (2 << 20), 0.01);
      } catch (const std::runtime_error&) {  // sessions hold pages: it goes on
      }
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
    }
  });
  for (unsigned step = 0; step < 200; ++step) {
    m.set_x(1000 + step);
    COMOE_CUDA_CHECK(cudaGraphLaunch(graph, m.stream));
    const auto counts = m.read_counts();
    CHECK(counts[1] == 0 && counts[2] == 0);
  }
  stop = true;
  restless.join();
  m.server->check();
  COMOE_CUDA_CHECK(cudaGraphExecDestroy(graph));
}

void test_unreadable_record_is_an_error() {
  Model m(40, 5);
  CHECK(truncate(m.store.path.c_str(), 4096) == 0);
  m.set_x(1);
  m.launch_step();
  COMOE_CUDA_CHECK(cudaStreamSynchronize(m.stream));  // it does not hang
  CHECK_THROWS(m.server->check(), ReadError, "visit 1: ");
}

// A transfer that never comes: the watchdog ends the wait.
void test_lost_transfer_is_an_error() {
  Model m(40, 0.0);  // no patience: whatever is not there at once is lost
  m.set_x(1);
  m.launch_step();
  COMOE_CUDA_CHECK(cudaStreamSynchronize(m.stream));
  CHECK_THROWS(m.server->check(), ReadError, "did not come within");
}

// Pinned host to device, through pages, against one large copy; and the layer's latency when
// everything is resident. CSV: what, value, unit, of the ceiling.
void measure() {
  const int64_t total = int64_t{256} << 20;
  auto device = make_driver_device(load_driver(), 0);
  COMOE_CUDA_CHECK(cudaSetDevice(0));
  void* const host = device->allocate_mapped(total);
  const uint64_t to = device->allocate(total);
  const auto rate = [&](int64_t run) {
    std::vector<DeviceCopy> copies;
    for (int64_t at = 0; at < total; at += run)
      copies.push_back(
          {to + (at * 7919) % total / run * run, reinterpret_cast<uint64_t>(host) + at, run});
    double best = 0;
    for (int i = 0; i < 5; ++i) {
      const double begin = now();
      device->copy(copies.data(), static_cast<int>(copies.size()));
      const uint64_t mark = device->mark();
      while (device->reached() < mark) {
      }
      best = std::max(best, total / (now() - begin));
    }
    return best / 1e9;
  };
  const double ceiling = rate(total);
  std::printf("csv,one copy of 256 MiB,%.2f,GB/s,1.00\n", ceiling);
  for (int64_t run : {1 << 20, 256 << 10, 64 << 10, 16 << 10, 4 << 10}) {
    const double r = rate(run);
    std::printf("csv,copies of %lld KiB,%.2f,GB/s,%.2f\n", static_cast<long long>(run >> 10), r,
                r / ceiling);
  }
  device->free(to);
  device->free_mapped(host);

  Model m(64, 20);
  const cudaGraphExec_t graph = m.capture();
  m.set_x(1);
  for (int i = 0; i < 3; ++i) COMOE_CUDA_CHECK(cudaGraphLaunch(graph, m.stream));
  COMOE_CUDA_CHECK(cudaStreamSynchronize(m.stream));
  cudaEvent_t begin, end;
  COMOE_CUDA_CHECK(cudaEventCreate(&begin));
  COMOE_CUDA_CHECK(cudaEventCreate(&end));
  const auto gates = [&](int count) {
    COMOE_CUDA_CHECK(cudaEventRecord(begin, m.stream));
    for (int i = 0; i < count; ++i) gate_prefetch(m.backend->plane(), m.layers[0], m.stream);
    COMOE_CUDA_CHECK(cudaEventRecord(end, m.stream));
    COMOE_CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    COMOE_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    return ms * 1e3 / count;
  };
  gates(10);
  std::printf("csv,gate_prefetch and two guesses (hits; launched one by one),%.2f,us,\n",
              gates(100));
  step_end(m.backend->plane(), m.stream);
  COMOE_CUDA_CHECK(cudaStreamSynchronize(m.stream));
  // From the launch's return to the list taken by the server's thread.
  std::vector<double> seen;
  for (int i = 0; i < 200; ++i) {
    const uint64_t taken = load_acquire(&m.backend->plane().mailbox->taken);
    const double at = now();
    gate_prefetch(m.backend->plane(), m.layers[0], m.stream);
    while (load_acquire(&m.backend->plane().mailbox->taken) == taken) {
    }
    seen.push_back(now() - at);
    step_end(m.backend->plane(), m.stream);
    COMOE_CUDA_CHECK(cudaStreamSynchronize(m.stream));
  }
  std::sort(seen.begin(), seen.end());
  std::printf("csv,launch to request seen (median of 200),%.2f,us,\n", seen[100] * 1e6);
  COMOE_CUDA_CHECK(cudaGraphExecDestroy(graph));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    make_driver_device(load_driver(), 0);
  } catch (const DeviceError& error) {
    std::printf("SKIPPED: %s\n", error.what());
    return 0;
  }
  test_unreadable_record_is_an_error();
  test_lost_transfer_is_an_error();
  test_graph_replays();
  if (argc > 1 && std::string(argv[1]) == "--measure") measure();
  std::printf(check_failures == 0 ? "all well\n" : "%d failures\n", check_failures);
  return check_failures != 0;
}
