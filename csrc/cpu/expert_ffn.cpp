#include "expert_ffn.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace comoe {
namespace {

// ---- instruction sets -------------------------------------------------------------------------

// Best first. __builtin_cpu_supports asks the operating system too (xgetbv).
struct Candidate {
  const Kernels* kernels;
  bool (*supported)();
};
const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {&kVnniKernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
              __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("gfni");
     }},
    {&kAvx512Kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
    {&kAvx2Kernels,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
#endif
    {&kPortableKernels, [] { return true; }},
};

const Kernels* best_kernels() {
  for (const Candidate& c : kCandidates)
    if (c.supported()) return c.kernels;
  return &kPortableKernels;
}

std::atomic<const Kernels*>& current_kernels() {
  static std::atomic<const Kernels*> kernels{best_kernels()};
  return kernels;
}

// ---- walking the pages ------------------------------------------------------------------------

// Blocks that are fetched ahead of those being computed: 32 KiB at 4 bits, in a second-level cache
// of 512 KiB or more. They are fetched plane by plane, since the hardware's own prefetcher keeps up
// with one long stream much better than with several that alternate (measured: 53 GB/s against 30).
constexpr int64_t kPrefetchBlocks = 128;

// A place in a record, moved on block by block.
struct Cursor {
  const uint8_t* const* page = nullptr;
  int64_t page_bytes = 0, offset = 0;  // offset within the page
  Cursor() = default;
  Cursor(const PagedBytes& bytes, int64_t at)
      : page(bytes.pages + at / bytes.page_bytes),
        page_bytes(bytes.page_bytes),
        offset(at % bytes.page_bytes) {}
  const uint8_t* get() const { return *page + offset; }
  int64_t left() const { return page_bytes - offset; }
  void advance(int64_t bytes) {  // bytes <= left()
    offset += bytes;
    if (offset == page_bytes) {
      ++page;
      offset = 0;
    }
  }
};

// A place among the blocks of one matrix, in all of its planes.
struct Position {
  int num_planes = 0;
  int64_t blocks_left = 0;
  int64_t block_bytes[4] = {};
  Cursor planes[4];

  // The next blocks in chunks, plane by plane in each chunk, and moves past them.
  void append_prefetch(int64_t blocks, std::vector<Prefetch>* out) {
    blocks_left -= blocks;
    for (int64_t done = 0; done < blocks; done += kPrefetchBlocks) {
      const int64_t n = std::min(kPrefetchBlocks, blocks - done);
      for (int p = 0; p < num_planes; ++p)
        for (int64_t bytes = n * block_bytes[p]; bytes > 0;) {
          const int64_t piece = std::min(bytes, planes[p].left());
          if (out) out->push_back({planes[p].get(), planes[p].get() + piece});
          planes[p].advance(piece);
          bytes -= piece;
        }
    }
  }

  void append_segments(int64_t blocks, std::vector<Segment>& out) {
    blocks_left -= blocks;
    for (int64_t k = 0; k < blocks;) {
      Segment segment{k, {}};
      int64_t run = blocks - k;
      for (int p = 0; p < num_planes; ++p) {
        segment.base[p] = planes[p].get() - k * block_bytes[p];
        run = std::min(run, planes[p].left() / block_bytes[p]);
      }
      for (int p = 0; p < num_planes; ++p) planes[p].advance(run * block_bytes[p]);
      out.push_back(segment);
      k += run;
    }
    out.push_back({std::numeric_limits<int64_t>::max(), {}});
  }
};

// What the RunArgs of a walk point to. One per thread: allocating for each of the short runs of a
// small H took 5% of the time.
struct RunBuffers {
  std::vector<Segment> segments;
  std::vector<Prefetch> prefetch;
  std::vector<uint8_t> params;
};
thread_local RunBuffers run_buffers;

// Row tiles of one matrix of one expert, from `first_tile` upwards.
class MatrixWalk {
 public:
  MatrixWalk(const ExpertGeometry& geometry, const ExpertView& expert, int m, int64_t first_tile)
      : level_(expert.level), exact_dtype_(geometry.exact_dtype), shape_(geometry.matrix(m)) {
    const int64_t block = first_tile * shape_.col_blocks();
    at_.num_planes = num_planes(level_);
    at_.blocks_left = shape_.num_blocks() - block;
    for (int p = 0; p < at_.num_planes; ++p) {
      const int record = level_ == Level::exact ? 4 : p;
      at_.block_bytes[p] = geometry.block_bytes(record);
      at_.planes[p] = Cursor(expert.records[record],
                             geometry.blocks_offset(record, m) + block * at_.block_bytes[p]);
    }
    if (level_ == Level::exact) return;
    header_ =
        reinterpret_cast<const MatrixHeader*>(expert.records[0].at(geometry.header_offset(m)));
    params_bytes_ = shape_.groups() * kParamsBytes;
    params_ = Cursor(expert.records[0], geometry.params_offset(m) + first_tile * params_bytes_);
  }

  // Fills all of `args` but the rows with the next tiles, and moves on. Its pointers hold until
  // this thread's next call, of any walk. `then`: what will be read after them, or null.
  void take(int64_t num_tiles, const MatrixWalk* then, RunArgs& args) {
    args.level = level_;
    args.exact_dtype = exact_dtype_;
    args.num_tiles = num_tiles;
    args.col_blocks = shape_.col_blocks();
    const int64_t end = num_tiles * args.col_blocks;

    // While one chunk is computed the next is fetched; the first was fetched by the run before.
    auto& [segments, prefetch, params] = run_buffers;
    prefetch.clear();
    Position ahead = at_;
    const int64_t lag = std::min(kPrefetchBlocks, end);
    ahead.append_prefetch(lag, nullptr);
    ahead.append_prefetch(end - lag, &prefetch);
    if (then) {
      ahead = then->at_;
      ahead.append_prefetch(std::min(kPrefetchBlocks, ahead.blocks_left), &prefetch);
      for (int64_t at = 0; at < then->params_bytes_; at += 64)
        __builtin_prefetch(then->params_.get() + at);
    }
    prefetch.push_back({});
    args.prefetch = prefetch.data();

    segments.clear();
    at_.append_segments(end, segments);
    args.segments = segments.data();
    args.header = header_;
    if (header_) args.params = take_params(num_tiles, params);
  }

 private:
  // The tiles' group parameters in one piece: where they lie, or a copy if they cross into another
  // page.
  const uint8_t* take_params(int64_t num_tiles, std::vector<uint8_t>& copy) {
    const int64_t bytes = num_tiles * params_bytes_;
    if (bytes <= params_.left()) {
      const uint8_t* here = params_.get();
      params_.advance(bytes);
      return here;
    }
    copy.resize(bytes);
    for (int64_t done = 0; done < bytes;) {
      const int64_t n = std::min(bytes - done, params_.left());
      std::memcpy(copy.data() + done, params_.get(), n);
      params_.advance(n);
      done += n;
    }
    return copy.data();
  }

  Level level_;
  DType exact_dtype_;
  MatrixGeometry shape_;
  Position at_;
  const MatrixHeader* header_ = nullptr;
  int64_t params_bytes_ = 0;  // of one tile
  Cursor params_;
};

// Biases of the 16 rows of tile n (those past the end are undefined).
void tile_bias(const ExpertGeometry& geometry, const ExpertView& expert, int m, int64_t n,
               const Kernels& kernels, float* out) {
  const int64_t row = n * kBlockRows;
  if (expert.level == Level::exact) {
    const int64_t at = geometry.exact_bias_offset(m) + row * dtype_bytes(geometry.exact_dtype);
    kernels.load(expert.records[4].at(at), geometry.exact_dtype, kBlockRows, out);
  } else {
    kernels.load(expert.records[0].at(geometry.bias_offset(m) + row * 4), DType::fp32, kBlockRows,
                 out);
  }
}

// ---- expert_ffn -------------------------------------------------------------------------------

// Rows whose gate and up outputs of one group are held at a time (64 KB of scratch per thread).
constexpr int kChunkRows = 64;
// Row tiles of the down projection per work item, at most.
constexpr int64_t kDownTiles = 16;

struct Item {
  int32_t task, piece;
};

struct Call {
  const FfnSpec& spec;
  const Kernels& kernels;
  const FfnTask* tasks;
  const void* x;
  DType x_dtype;
  int64_t x_stride;
  float* pair_out;
  std::vector<RowLayout> x_layout, a_layout;  // by form
  std::vector<uint8_t*> x_rows;               // [form] -> prepared rows of x
  std::vector<int32_t> slot;                  // token -> prepared row
  std::vector<uint8_t*> a_rows;               // [task] -> prepared rows of the intermediate
  int64_t down_tiles;                         // row tiles of down per item

  Form form(const FfnTask& task) const {
    return row_form(task.expert->level, spec.geometry.exact_dtype, x_dtype, kernels.bf16_dot);
  }

  void prepare_x(Form form, int32_t token, int32_t row) const {
    const RowLayout& layout = x_layout[static_cast<int>(form)];
    const int64_t H = spec.geometry.hidden, size = dtype_bytes(x_dtype);
    const auto* src = static_cast<const uint8_t*>(x) + token * x_stride * size;
    uint8_t* dst = x_rows[static_cast<int>(form)] + row * layout.bytes();
    alignas(64) float group[kGroupCols];
    for (int64_t g = 0; g < layout.groups; ++g) {
      const int64_t n = std::min(H - g * kGroupCols, kGroupCols);
      kernels.load(src + g * kGroupCols * size, x_dtype, n, group);
      std::fill(group + n, group + kGroupCols, 0.0f);
      kernels.prepare_group(group, layout, g, dst);
    }
  }

  // Multiplies the next `num_tiles` of a walk with rows [begin, end) of a task; out[i * stride ...]
  // gets row begin + i. Up to kMaxRows rows take the tiles in one run; more take them two by two,
  // so that the weights stay in the first-level cache.
  template <class RowOf>
  void run(MatrixWalk& walk, const MatrixWalk* then, int64_t num_tiles, const RowLayout& layout,
           int begin, int end, float* out, int64_t stride, RowOf&& row_of) const {
    const int64_t step = end - begin <= kMaxRows ? num_tiles : 2;
    for (int64_t n = 0; n < num_tiles; n += step) {
      RunArgs args;
      args.layout = layout;
      walk.take(std::min(step, num_tiles - n), n + step < num_tiles ? &walk : then, args);
      for (int i = begin; i < end; i += kMaxRows) {
        args.num_rows = std::min(end - i, kMaxRows);
        for (int j = 0; j < args.num_rows; ++j) {
          args.rows[j] = row_of(i + j);
          args.out[j] = out + (i - begin + j) * stride + n * kBlockRows;
        }
        kernels.multiply(args);
      }
    }
  }

  // Exact experts of a 16-bit model round where transformers' own experts do (after each product,
  // bias included, and after the activation), so that greedy decoding seldom meets a different near
  // tie.
  bool rounds(const FfnTask& task) const {
    return task.expert->level == Level::exact && x_dtype != DType::fp32;
  }
  void round(float* values, int64_t n) const {
    uint16_t narrow[kGroupCols];
    for (int64_t i = 0; i < n; i += kGroupCols) {
      const int64_t m = std::min(n - i, kGroupCols);
      kernels.store(values + i, m, narrow, x_dtype);
      kernels.load(narrow, x_dtype, m, values + i);
    }
  }
  void activate(const FfnTask& task, const float* gate, const float* up, int64_t n,
                float* out) const {
    if (!gate || !rounds(task) || spec.activation == Activation::swigluoai) {
      kernels.activate(spec, gate, up, n, out);
    } else {
      kernels.activate(spec, nullptr, gate, n, out);
      round(out, n);
      for (int64_t i = 0; i < n; ++i) out[i] *= up[i];
    }
    if (rounds(task)) round(out, n);
  }

  // Phase 1: 128 rows of gate and up (a whole group of the intermediate, so that it can be
  // quantised here) for all rows of the task.
  MatrixWalk gate_up_walk(const Item& item) const {
    const ExpertGeometry& g = spec.geometry;
    return MatrixWalk(g, *tasks[item.task].expert, g.gated ? 1 : 0, item.piece * kGroupTiles);
  }
  void gate_up(const Item& item, const MatrixWalk* then) const {
    const ExpertGeometry& g = spec.geometry;
    const FfnTask& task = tasks[item.task];
    const int64_t group = item.piece;
    const int f = static_cast<int>(form(task));
    const RowLayout &layout = x_layout[f], &a_lay = a_layout[f];
    alignas(64) float buffer[2][kChunkRows * kGroupCols];
    const int64_t first = group * kGroupTiles;
    const int64_t num_tiles = std::min(kGroupTiles, g.matrix(0).row_tiles() - first);
    const int64_t valid = std::min(kGroupCols, g.intermediate - group * kGroupCols);
    auto row_of = [&](int i) { return x_rows[f] + slot[task.token[i]] * layout.bytes(); };
    auto add_bias = [&](int m, int num_rows, float* out) {
      float bias[kGroupCols];
      for (int64_t n = 0; n < num_tiles; ++n)
        tile_bias(g, *task.expert, m, first + n, kernels, bias + n * kBlockRows);
      for (int i = 0; i < num_rows; ++i)
        for (int64_t r = 0; r < num_tiles * kBlockRows; ++r) out[i * kGroupCols + r] += bias[r];
    };
    for (int begin = 0; begin < task.num_rows; begin += kChunkRows) {
      const int end = std::min(begin + kChunkRows, task.num_rows);
      MatrixWalk up = gate_up_walk(item);
      if (g.gated) {
        MatrixWalk gate(g, *task.expert, 0, first);
        run(up, &gate, num_tiles, layout, begin, end, buffer[0], kGroupCols, row_of);
        run(gate, then, num_tiles, layout, begin, end, buffer[1], kGroupCols, row_of);
        if (g.biased) add_bias(0, end - begin, buffer[1]);
      } else {
        run(up, then, num_tiles, layout, begin, end, buffer[0], kGroupCols, row_of);
      }
      if (g.biased) add_bias(g.gated ? 1 : 0, end - begin, buffer[0]);
      if (rounds(task))
        for (int m = 0; m < (g.gated ? 2 : 1); ++m) round(buffer[m], (end - begin) * kGroupCols);
      for (int i = 0; i < end - begin; ++i) {
        alignas(64) float a_group[kGroupCols];
        const int64_t at = i * kGroupCols;
        activate(task, g.gated ? buffer[1] + at : nullptr, buffer[0] + at, num_tiles * kBlockRows,
                 a_group);
        std::fill(a_group + valid, a_group + kGroupCols, 0.0f);
        kernels.prepare_group(a_group, a_lay, group,
                              a_rows[item.task] + (begin + i) * a_lay.bytes());
      }
    }
  }

  // Phase 2: a few row tiles of down.
  MatrixWalk down_walk(const Item& item) const {
    const ExpertGeometry& g = spec.geometry;
    return MatrixWalk(g, *tasks[item.task].expert, g.num_matrices() - 1, item.piece * down_tiles);
  }
  void down(const Item& item, const MatrixWalk* then) const {
    const ExpertGeometry& g = spec.geometry;
    const FfnTask& task = tasks[item.task];
    const int m = g.num_matrices() - 1;
    const RowLayout& layout = a_layout[static_cast<int>(form(task))];
    alignas(64) float buffer[kMaxRows * kDownTiles * kBlockRows];
    float bias[kDownTiles * kBlockRows] = {};
    const int64_t first = item.piece * down_tiles;
    const int64_t num_tiles = std::min(down_tiles, g.matrix(m).row_tiles() - first);
    const int64_t stride = num_tiles * kBlockRows;
    const int64_t valid = std::min(stride, g.hidden - first * kBlockRows);
    if (g.biased)
      for (int64_t n = 0; n < num_tiles; ++n)
        tile_bias(g, *task.expert, m, first + n, kernels, bias + n * kBlockRows);
    for (int begin = 0; begin < task.num_rows; begin += kMaxRows) {
      const int end = std::min(begin + kMaxRows, task.num_rows);
      MatrixWalk walk = down_walk(item);
      run(walk, then, num_tiles, layout, begin, end, buffer, stride,
          [&](int i) { return a_rows[item.task] + i * layout.bytes(); });
      for (int i = begin; i < end; ++i) {
        float* out = pair_out + task.pair[i] * g.hidden + first * kBlockRows;
        for (int64_t r = 0; r < valid; ++r) out[r] = buffer[(i - begin) * stride + r] + bias[r];
        if (rounds(task)) round(out, valid);
      }
    }
  }
};

// Runs work(item, next item or null) for all items. A thread claims its next item before it
// computes the present one, so that the tail of one can prefetch the head of the next.
template <class Work>
void for_items(const std::vector<Item>& items, Work&& work) {
  struct Context {
    const std::vector<Item>* items;
    Work* work;
    std::atomic<size_t> next{0};
    const Item* claim() {
      const size_t i = next.fetch_add(1, std::memory_order_relaxed);
      return i < items->size() ? items->data() + i : nullptr;
    }
  } context{&items, &work};
  auto body = [](void* raw, int, int) {
    auto& c = *static_cast<Context*>(raw);
    const Item* item = c.claim();
    while (item) {
      const Item* next = c.claim();
      (*c.work)(*item, next);
      item = next;
    }
  };
  if (items.size() == 1 || Parallel::instance().num_threads() == 1) return body(&context, 0, 1);
  Parallel::instance().run(body, &context);
}

// Not a vector, which would fill it with zeros: every byte that is read is written first.
struct Scratch {
  std::unique_ptr<uint8_t[]> bytes;
  explicit Scratch(int64_t n) : bytes(new uint8_t[n + 64]) {}
  uint8_t* aligned() const {
    return bytes.get() + (64 - reinterpret_cast<uintptr_t>(bytes.get()) % 64) % 64;
  }
};

}  // namespace

const char* isa_name() { return current_kernels().load()->name; }

std::vector<const char*> isa_names() {
  std::vector<const char*> names;
  for (const Candidate& c : kCandidates)
    if (c.supported()) names.push_back(c.kernels->name);
  return names;
}

void force_isa(const char* name) {
  if (std::string(name) == "auto") {
    current_kernels() = best_kernels();
    return;
  }
  std::string usable = "auto";
  for (const Candidate& c : kCandidates) {
    if (!c.supported()) continue;
    if (std::string(name) == c.kernels->name) {
      current_kernels() = c.kernels;
      return;
    }
    usable += std::string(", ") + c.kernels->name;
  }
  throw std::invalid_argument("force_isa: this CPU cannot run '" + std::string(name) +
                              "'; use one of " + usable);
}

void expert_ffn(const FfnSpec& spec, const FfnTask* tasks, int num_tasks, const void* x,
                DType x_dtype, int64_t x_stride, float* pair_out) {
  const ExpertGeometry& g = spec.geometry;
  if (spec.activation == Activation::swigluoai && !g.gated)
    throw std::invalid_argument("expert_ffn: activation swigluoai needs gated experts");
  const Kernels& kernels = *current_kernels().load();
  Call call{spec, kernels, tasks, x, x_dtype, x_stride, pair_out, {}, {}, {}, {}, {}, 1};

  constexpr int kForms = 4;
  for (int f = 0; f < kForms; ++f) {
    call.x_layout.emplace_back(static_cast<Form>(f), g.hidden);
    call.a_layout.emplace_back(static_cast<Form>(f), g.intermediate);
  }
  // Each token that some task reads is prepared once per form that some task needs.
  bool used[kForms] = {};
  std::vector<int32_t> tokens;
  std::vector<int64_t> a_offset;
  int64_t a_bytes = 0;
  std::vector<Item> gate_up_items, down_items;
  const int64_t tiles = g.matrix(g.num_matrices() - 1).row_tiles();
  const int num_threads = Parallel::instance().num_threads();
  // Long runs read memory faster; eight items per thread are enough to balance.
  call.down_tiles =
      std::min(std::max<int64_t>(num_tasks * tiles / (8 * num_threads), 1), kDownTiles);
  const int64_t down_pieces = ceil_div(tiles, call.down_tiles);
  for (int t = 0; t < num_tasks; ++t) {
    const FfnTask& task = tasks[t];
    const int f = static_cast<int>(call.form(task));
    a_offset.push_back(a_bytes);
    if (task.num_rows == 0) continue;
    used[f] = true;
    a_bytes += task.num_rows * call.a_layout[f].bytes();
    for (int i = 0; i < task.num_rows; ++i) {
      const int32_t token = task.token[i];
      if (token >= static_cast<int32_t>(call.slot.size())) call.slot.resize(token + 1, -1);
      if (call.slot[token] >= 0) continue;
      call.slot[token] = static_cast<int32_t>(tokens.size());
      tokens.push_back(token);
    }
    for (int64_t i = 0; i < call.a_layout[f].groups; ++i)
      gate_up_items.push_back({t, static_cast<int32_t>(i)});
    for (int64_t i = 0; i < down_pieces; ++i) down_items.push_back({t, static_cast<int32_t>(i)});
  }
  if (tokens.empty()) return;

  const auto num_tokens = static_cast<int64_t>(tokens.size());
  int64_t x_bytes = 0, x_offset[kForms];
  for (int f = 0; f < kForms; ++f) {
    x_offset[f] = x_bytes;
    if (used[f]) x_bytes += num_tokens * call.x_layout[f].bytes();
  }
  const Scratch x_buffer(x_bytes), a_buffer(a_bytes);
  for (int f = 0; f < kForms; ++f) call.x_rows.push_back(x_buffer.aligned() + x_offset[f]);
  for (int t = 0; t < num_tasks; ++t) call.a_rows.push_back(a_buffer.aligned() + a_offset[t]);

  // A row takes about a microsecond: a few are not worth waking another thread for.
  parallel_for(num_tokens, 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      for (int f = 0; f < kForms; ++f)
        if (used[f]) call.prepare_x(static_cast<Form>(f), tokens[i], static_cast<int32_t>(i));
  });
  for_items(gate_up_items, [&](const Item& item, const Item* next) {
    if (!next) return call.gate_up(item, nullptr);
    const MatrixWalk then = call.gate_up_walk(*next);
    call.gate_up(item, &then);
  });
  for_items(down_items, [&](const Item& item, const Item* next) {
    if (!next) return call.down(item, nullptr);
    const MatrixWalk then = call.down_walk(*next);
    call.down(item, &then);
  });
}

void combine_pairs(const float* pair_out, const float* weights, const int64_t* expert_idx,
                   int64_t num_experts, int64_t T, int64_t K, int64_t H, void* out, DType out_dtype,
                   bool round_products) {
  const Kernels& kernels = *current_kernels().load();
  const int64_t row_bytes = H * dtype_bytes(out_dtype);
  parallel_for(T, 16, [&](int64_t begin, int64_t end, int) {
    constexpr int64_t kPiece = 512;
    alignas(64) float sum[kPiece], product[kPiece];
    uint16_t narrow[kPiece];
    for (int64_t t = begin; t < end; ++t)
      for (int64_t h = 0; h < H; h += kPiece) {
        const int64_t n = std::min(kPiece, H - h);
        std::fill(sum, sum + n, 0.0f);
        for (int64_t k = 0; k < K; ++k) {
          const int64_t e = expert_idx[t * K + k];
          if (e < 0 || e >= num_experts) continue;
          const float weight = weights[t * K + k];
          const float* row = pair_out + (t * K + k) * H + h;
          if (round_products) {
            for (int64_t i = 0; i < n; ++i) product[i] = weight * row[i];
            kernels.store(product, n, narrow, out_dtype);
            kernels.load(narrow, out_dtype, n, product);
            for (int64_t i = 0; i < n; ++i) sum[i] += product[i];
          } else {
            for (int64_t i = 0; i < n; ++i) sum[i] += weight * row[i];
          }
        }
        kernels.store(sum, n,
                      static_cast<uint8_t*>(out) + t * row_bytes + h * dtype_bytes(out_dtype),
                      out_dtype);
      }
  });
}

void unpack_matrix(const ExpertGeometry& geometry, const ExpertView& expert, int m, void* out,
                   DType out_dtype, int64_t ld) {
  const Kernels& kernels = *current_kernels().load();
  const MatrixGeometry shape = geometry.matrix(m);
  parallel_for(shape.row_tiles(), 4, [&](int64_t begin, int64_t end, int) {
    MatrixWalk walk(geometry, expert, m, begin);
    for (int64_t n = begin; n < end; ++n) {
      RunArgs args;
      walk.take(1, nullptr, args);
      const int64_t row = n * kBlockRows;
      kernels.unpack_tile(args, std::min(kBlockRows, shape.rows - row), shape.cols,
                          static_cast<uint8_t*>(out) + row * ld * dtype_bytes(out_dtype), out_dtype,
                          ld);
    }
  });
}

void unpack_bias(const ExpertGeometry& geometry, const ExpertView& expert, int m, float* out) {
  const Kernels& kernels = *current_kernels().load();
  const MatrixGeometry shape = geometry.matrix(m);
  for (int64_t n = 0; n < shape.row_tiles(); ++n) {
    float bias[kBlockRows];
    tile_bias(geometry, expert, m, n, kernels, bias);
    const int64_t row = n * kBlockRows;
    std::copy(bias, bias + std::min(kBlockRows, shape.rows - row), out + row);
  }
}

}  // namespace comoe
