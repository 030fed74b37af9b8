#include "expert_ffn.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "parts.h"

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
          // Field by field: a pair made of two pointers and copied as one vector would wait for
          // both stores (1% of the time of small experts).
          if (out) {
            out->emplace_back();
            out->back().begin = planes[p].get();
            out->back().end = planes[p].get() + piece;
          }
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
  MatrixWalk(const MatrixView& view, int64_t first_tile)
      : level_(view.level), exact_dtype_(view.exact_dtype), shape_(view.shape) {
    const int64_t block = first_tile * shape_.col_blocks();
    at_.num_planes = num_planes(level_);
    at_.blocks_left = shape_.num_blocks() - block;
    for (int p = 0; p < at_.num_planes; ++p) {
      at_.block_bytes[p] = view.block_bytes[p];
      at_.planes[p] = Cursor(view.planes[p], view.blocks_at[p] + block * view.block_bytes[p]);
    }
    params_bytes_ = view.params_bytes;
    if (params_bytes_)
      params_ = Cursor(view.planes[0], view.params_at + first_tile * params_bytes_);
    if (level_ != Level::exact)
      header_ = reinterpret_cast<const MatrixHeader*>(view.planes[0].at(view.header_at));
  }

  // Fills all of `args` but rows and value_dtype with the next tiles, and moves on. Its pointers
  // hold until this thread's next call, of any walk. `then`: what will be read after them, or null.
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
    args.params = params_bytes_ ? take_params(num_tiles, params) : nullptr;
  }

 private:
  // The tiles' group parameters, or scales of codes, in one piece: where they lie, or a copy if
  // they cross into another page.
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
  ExactType exact_dtype_;
  MatrixGeometry shape_;
  Position at_;
  const MatrixHeader* header_ = nullptr;
  int64_t params_bytes_ = 0;  // of one tile
  Cursor params_;
};

// Biases of the 16 rows of tile n (those past the end are undefined).
void tile_bias(const MatrixView& view, int64_t n, const Kernels& kernels, float* out) {
  const int64_t at = view.bias_at + n * kBlockRows * dtype_bytes(view.bias_dtype);
  kernels.load(view.planes[0].at(at), view.bias_dtype, kBlockRows, out);
}

// Where the blocks of a matrix lie is the same in every part of a level in the ladder of packing,
// and is remembered: with small experts, finding it anew for each took a tenth of the time.
class LadderViews {
 public:
  MatrixView view(const ExpertGeometry& g, const PartView& part, int m) {
    constexpr uint8_t kLadder[kNumPlanes] = {0, 1, 2, 3};
    if (std::memcmp(part.first_plane, kLadder, sizeof(kLadder)) != 0)
      return matrix_view(g, part, m);
    if (g.hidden != of_.hidden || g.intermediate != of_.intermediate || g.gated != of_.gated ||
        g.biased != of_.biased || g.exact_dtype != of_.exact_dtype) {
      of_ = g;
      for (auto& level : views_)
        for (MatrixView& view : level) view.shape.rows = 0;
    }
    MatrixView& known = views_[static_cast<int>(part.level)][m];
    if (known.shape.rows == 0) known = matrix_view(g, part, m);
    MatrixView view = known;
    std::copy_n(part.planes, kNumPlanes, view.planes);
    return view;
  }

 private:
  ExpertGeometry of_;
  MatrixView views_[5][kMaxMatrices] = {};
};
thread_local LadderViews ladder_views;

// ---- expert_ffn -------------------------------------------------------------------------------

// Rows whose gate and up outputs of one group are held at a time (64 KB of scratch per thread).
constexpr int kChunkRows = 64;
// Row tiles of the down projection per work item, at most.
constexpr int64_t kDownTiles = 16;
// Tokens per work item that prepares rows of x. A row takes less than a microsecond: a few are not
// worth sharing out.
constexpr int64_t kTokens = 8;

// In the order in which an expert's items depend on each other: an item needs all of the phases
// before its own of its task, and all of `prepare`.
enum class Phase : uint8_t { prepare, shrink_x, gate_up, shrink_a, down };
constexpr int kPhases = 5;

struct Item {
  Phase phase;
  int32_t task, piece;  // prepare: first row; down: first row tile; else group of 128 rows
  int32_t detail = 0;   // shrinks: index; down: number of row tiles
};

// How many items of each phase of each task are left, so that the threads need not meet between the
// phases: the one that ended first idled for half an item, with nothing being read.
class Progress {
 public:
  explicit Progress(int num_tasks) : left_(new std::atomic<int32_t>[1 + num_tasks * kPhases]()) {}
  void add(const Item& item) { of(item)->fetch_add(1, std::memory_order_relaxed); }
  void done(const Item& item) { of(item)->fetch_sub(1, std::memory_order_release); }
  // Cannot wait for ever where items are claimed in the order of their phases: the first one that
  // is not done waits for nothing, and its thread has nothing else to do first.
  void wait(const Item& item) const {
    if (item.phase == Phase::prepare) return;
    wait_for_zero(left_[0]);
    for (int p = 1; p < static_cast<int>(item.phase); ++p)
      wait_for_zero(left_[1 + item.task * kPhases + p]);
  }

 private:
  std::atomic<int32_t>* of(const Item& item) {
    const int p = static_cast<int>(item.phase);
    return &left_[p == 0 ? 0 : 1 + item.task * kPhases + p];
  }
  static void wait_for_zero(const std::atomic<int32_t>& left) {
    for (int i = 0; left.load(std::memory_order_acquire) != 0; ++i)
      i < kSpins ? pause_cpu() : std::this_thread::yield();
  }
  static constexpr int kSpins = 256;  // a few microseconds; then its thread may be off its core
  std::unique_ptr<std::atomic<int32_t>[]> left_;
};

// Most products that add up to the rows of one matrix: one per record, at most.
constexpr int kMaxTerms = 32;

// One product that adds to the rows of a matrix of an expert: with x, with the activated
// intermediate `a`, or with t = V x or V a of a low-rank delta.
struct Term {
  MatrixView view;
  RowLayout layout;  // of the prepared rows that it takes
  bool of_x;         // rows of x, by token; else row i of the task, in the scratch
  bool biased;
  int shrink;       // of U: index of what makes its t; else -1
  int64_t rows_at;  // in the scratch
};

// t = V x or V a, prepared for U.
struct Shrink {
  Term term;
  RowLayout layout;  // of t
  int64_t rows_at;   // of t, in the scratch
};

// What is to be computed for a task: all terms of its matrices, matrix by matrix.
struct Expert {
  int32_t first[kMaxMatrices + 1] = {};  // terms of matrix m: [first[m], first[m + 1])
  int64_t a_at[kForms] = {};             // prepared rows of the intermediate, by form
  bool a_used[kForms] = {};
  std::vector<float> mean;  // [H] or empty
  bool computes() const { return first[kMaxMatrices] > first[0]; }
  bool has(int m) const { return first[m + 1] > first[m]; }
};

struct Product {
  const Term* term;
  float* out;
  bool adds;  // to what is in `out`
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
  std::vector<Expert> experts;                // [task]
  std::vector<Term> terms;                    // of all of them: one allocation, not three a task
  std::vector<Shrink> shrinks;
  std::vector<int32_t> tokens;  // the reverse
  bool used[kForms] = {};       // forms of x that some task needs
  uint8_t* scratch = nullptr;   // prepared rows of tasks

  Form form(const MatrixView& view) const {
    return row_form(view.level, view.exact_dtype, x_dtype, kernels.bf16_dot);
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
      args.value_dtype = value_dtype(spec.geometry.exact_dtype, x_dtype);
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
    return task.expert->is_exact() && x_dtype != DType::fp32;
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

  const uint8_t* row_of(const Term& term, const FfnTask& task, int i) const {
    if (!term.of_x) return scratch + term.rows_at + i * term.layout.bytes();
    return x_rows[static_cast<int>(term.layout.form)] + slot[task.token[i]] * term.layout.bytes();
  }

  // All products over row tiles [first, first + num_tiles) and rows [begin, end) of a task; row i
  // goes to out[(i - begin) * stride ...]. `extra`: as large as the part of `out` that is written.
  void multiply(const Product* products, int count, const FfnTask& task, int64_t first,
                int64_t num_tiles, int begin, int end, int64_t stride, float* extra,
                const MatrixWalk* then) const {
    if (count == 0) return;
    MatrixWalk walk(products[0].term->view, first);
    for (int k = 0; k < count; ++k) {
      const Product& p = products[k];
      std::optional<MatrixWalk> next;
      if (k + 1 < count) next.emplace(products[k + 1].term->view, first);
      run(walk, next ? &*next : then, num_tiles, p.term->layout, begin, end, p.adds ? extra : p.out,
          stride, [&](int i) { return row_of(*p.term, task, i); });
      if (p.adds)
        for (int i = 0; i < end - begin; ++i)
          for (int64_t r = 0; r < num_tiles * kBlockRows; ++r)
            p.out[i * stride + r] += extra[i * stride + r];
      if (next) walk = std::move(*next);
    }
  }

  // Appends the products of matrix m, or clears `out` if there are none.
  void append_products(const Expert& expert, int m, float* out, int64_t floats, Product* products,
                       int& count) const {
    if (!expert.has(m)) std::fill(out, out + floats, 0.0f);
    for (int32_t t = expert.first[m]; t < expert.first[m + 1]; ++t)
      products[count++] = {&terms[t], out, t > expert.first[m]};
  }

  void add_bias(const Expert& expert, int m, int64_t first, int64_t num_tiles, int num_rows,
                float* out, int64_t stride) const {
    for (int32_t t = expert.first[m]; t < expert.first[m + 1]; ++t) {
      if (!terms[t].biased) continue;
      for (int64_t n = 0; n < num_tiles; ++n) {
        float bias[kBlockRows];
        tile_bias(terms[t].view, first + n, kernels, bias);
        for (int i = 0; i < num_rows; ++i)
          for (int64_t r = 0; r < kBlockRows; ++r) out[i * stride + n * kBlockRows + r] += bias[r];
      }
    }
  }

  // The first weights that an item reads, for the item before it to fetch.
  std::optional<MatrixWalk> head(const Item* item) const {
    if (item == nullptr || (item->phase != Phase::gate_up && item->phase != Phase::down))
      return std::nullopt;
    const bool down = item->phase == Phase::down;
    const int m = down ? spec.geometry.num_matrices() - 1 : spec.geometry.gated ? 1 : 0;
    if (!experts[item->task].has(m)) return std::nullopt;
    return MatrixWalk(terms[experts[item->task].first[m]].view,
                      item->piece * (down ? 1 : kGroupTiles));
  }

  // Each token that some task reads is prepared once per form that some task needs.
  void prepare(const Item& item) const {
    const int64_t end = std::min<int64_t>(item.piece + kTokens, tokens.size());
    for (int64_t i = item.piece; i < end; ++i)
      for (int f = 0; f < kForms; ++f)
        if (used[f]) prepare_x(static_cast<Form>(f), tokens[i], static_cast<int32_t>(i));
  }

  // 128 rows of V x (V a), a whole group of t, so that it can be prepared here.
  void shrink(const Item& item) const {
    const Shrink& s = shrinks[item.detail];
    const FfnTask& task = tasks[item.task];
    alignas(64) float buffer[kMaxRows * kGroupCols];
    const int64_t first = item.piece * kGroupTiles;
    const int64_t num_tiles = std::min(kGroupTiles, s.term.view.shape.row_tiles() - first);
    const int64_t valid = std::min(kGroupCols, s.term.view.shape.rows - item.piece * kGroupCols);
    const Product product{&s.term, buffer, false};
    for (int begin = 0; begin < task.num_rows; begin += kMaxRows) {
      const int end = std::min(begin + kMaxRows, task.num_rows);
      multiply(&product, 1, task, first, num_tiles, begin, end, kGroupCols, nullptr, nullptr);
      for (int i = begin; i < end; ++i) {
        float* t = buffer + (i - begin) * kGroupCols;
        std::fill(t + valid, t + kGroupCols, 0.0f);
        kernels.prepare_group(t, s.layout, item.piece, scratch + s.rows_at + i * s.layout.bytes());
      }
    }
  }

  // 128 rows of gate and up (a whole group of the intermediate, so that it can be
  // quantised here) for all rows of the task.
  void gate_up(const Item& item, const Item* next_item) const {
    const ExpertGeometry& g = spec.geometry;
    const FfnTask& task = tasks[item.task];
    const Expert& expert = experts[item.task];
    const int up = g.gated ? 1 : 0;
    const int64_t group = item.piece;
    alignas(64) float buffer[3][kChunkRows * kGroupCols];  // up, gate, what is added to them
    const int64_t first = group * kGroupTiles;
    const int64_t num_tiles = std::min(kGroupTiles, g.matrix(0).row_tiles() - first);
    const int64_t valid = std::min(kGroupCols, g.intermediate - group * kGroupCols);
    const std::optional<MatrixWalk> then = head(next_item);
    for (int begin = 0; begin < task.num_rows; begin += kChunkRows) {
      const int end = std::min(begin + kChunkRows, task.num_rows);
      Product products[2 * kMaxTerms];
      int count = 0;
      for (int i = 0; i <= up; ++i)
        append_products(expert, up - i, buffer[i], (end - begin) * kGroupCols, products, count);
      multiply(products, count, task, first, num_tiles, begin, end, kGroupCols, buffer[2],
               then ? &*then : nullptr);
      for (int i = 0; i <= up; ++i) {
        if (g.biased)
          add_bias(expert, up - i, first, num_tiles, end - begin, buffer[i], kGroupCols);
        if (rounds(task)) round(buffer[i], (end - begin) * kGroupCols);
      }
      for (int i = 0; i < end - begin; ++i) {
        alignas(64) float a_group[kGroupCols];
        const int64_t at = i * kGroupCols;
        activate(task, g.gated ? buffer[1] + at : nullptr, buffer[0] + at, num_tiles * kBlockRows,
                 a_group);
        std::fill(a_group + valid, a_group + kGroupCols, 0.0f);
        for (int f = 0; f < kForms; ++f)
          if (expert.a_used[f])
            kernels.prepare_group(a_group, a_layout[f], group,
                                  scratch + expert.a_at[f] + (begin + i) * a_layout[f].bytes());
      }
    }
  }

  // A few row tiles of down.
  void down(const Item& item, const Item* next_item) const {
    const ExpertGeometry& g = spec.geometry;
    const FfnTask& task = tasks[item.task];
    const Expert& expert = experts[item.task];
    const int m = g.num_matrices() - 1;
    alignas(64) float buffer[2][kMaxRows * kDownTiles * kBlockRows];
    const int64_t first = item.piece, num_tiles = item.detail;
    const int64_t stride = num_tiles * kBlockRows;
    const int64_t valid = std::min(stride, g.hidden - first * kBlockRows);
    const std::optional<MatrixWalk> then = head(next_item);
    for (int begin = 0; begin < task.num_rows; begin += kMaxRows) {
      const int end = std::min(begin + kMaxRows, task.num_rows);
      Product products[kMaxTerms];
      int count = 0;
      append_products(expert, m, buffer[0], (end - begin) * stride, products, count);
      multiply(products, count, task, first, num_tiles, begin, end, stride, buffer[1],
               then ? &*then : nullptr);
      if (g.biased) add_bias(expert, m, first, num_tiles, end - begin, buffer[0], stride);
      for (int i = begin; i < end; ++i) {
        float* out = pair_out + task.pair[i] * g.hidden + first * kBlockRows;
        std::copy_n(buffer[0] + (i - begin) * stride, valid, out);
        if (!expert.mean.empty())
          for (int64_t r = 0; r < valid; ++r) out[r] += expert.mean[first * kBlockRows + r];
        if (rounds(task)) round(out, valid);
      }
    }
  }

  void work(const Item& item, const Item* next) const {
    switch (item.phase) {
      case Phase::prepare:
        return prepare(item);
      case Phase::shrink_x:
      case Phase::shrink_a:
        return shrink(item);
      case Phase::gate_up:
        return gate_up(item, next);
      case Phase::down:
        return down(item, next);
    }
  }

  // Adds a task's terms and shrinks, and gives what its phases hand on a place in the scratch, from
  // `bytes` on; returns its end.
  int64_t add_expert(const FfnTask& task, int64_t bytes) {
    const ExpertGeometry& g = spec.geometry;
    const int down = g.num_matrices() - 1;
    experts.emplace_back();
    Expert& expert = experts.back();
    if (task.expert->parts.size() + task.expert->low_rank.size() > kMaxTerms)
      throw std::invalid_argument("expert_ffn: an expert of more than 32 parts");
    auto take = [&](const RowLayout& layout) {
      const int64_t at = bytes;
      bytes += task.num_rows * layout.bytes();
      return at;
    };
    // Of a product with x (of the token) or with the intermediate.
    auto input = [&](const MatrixView& view, int m, bool biased) {
      const int f = static_cast<int>(form(view));
      if (m < down) return Term{view, x_layout[f], true, biased, -1, 0};
      if (!expert.a_used[f]) expert.a_at[f] = take(a_layout[f]);
      expert.a_used[f] = true;
      return Term{view, a_layout[f], false, biased, -1, expert.a_at[f]};
    };
    for (int m = 0; m <= down; ++m) {
      expert.first[m] = static_cast<int32_t>(terms.size());
      for (const PartView& part : task.expert->parts)
        terms.push_back(input(ladder_views.view(g, part, m), m, g.biased));
      for (const LowRankView& low_rank : task.expert->low_rank) {
        if (low_rank.ranks[m] == 0) continue;
        const MatrixView u = factor_view(g, low_rank, m, 1);
        const RowLayout t(form(u), low_rank.ranks[m]);
        const int64_t at = take(t);
        terms.push_back({u, t, false, false, static_cast<int>(shrinks.size()), at});
        shrinks.push_back({input(factor_view(g, low_rank, m, 0), m, false), t, at});
      }
    }
    for (int m = down + 1; m <= kMaxMatrices; ++m)
      expert.first[m] = static_cast<int32_t>(terms.size());
    if (!task.expert->means.empty()) {
      expert.mean.resize(g.hidden);
      unpack_mean(g, *task.expert, expert.mean.data());
    }
    return bytes;
  }
};

// Runs all items, in the order of their phases. A thread claims its next item before it computes
// the present one, so that the tail of one can prefetch the head of the next.
void run_items(const Call& call, const std::vector<Item>& items, Progress& progress) {
  struct Context {
    const Call& call;
    const std::vector<Item>& items;
    Progress& progress;
    std::atomic<size_t> next{0};
    const Item* claim() {
      const size_t i = next.fetch_add(1, std::memory_order_relaxed);
      return i < items.size() ? items.data() + i : nullptr;
    }
  } context{call, items, progress};
  auto body = [](void* raw, int, int) {
    auto& c = *static_cast<Context*>(raw);
    const Item* item = c.claim();
    while (item) {
      const Item* next = c.claim();
      c.progress.wait(*item);
      c.call.work(*item, next);
      c.progress.done(*item);
      item = next;
    }
  };
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

const Kernels& kernels_in_use() { return *current_kernels().load(); }

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

void router_logits(const void* W, const void* bias, DType dtype, int64_t E, int64_t H,
                   const void* x, DType x_dtype, float* out) {
  const Kernels& kernels = *current_kernels().load();
  thread_local std::vector<float> wide;
  wide.resize(std::max(H, E));
  kernels.load(x, x_dtype, H, wide.data());
  kernels.project(W, dtype, E, H, wide.data(), out);
  if (!bias) return;
  kernels.load(bias, dtype, E, wide.data());
  for (int64_t e = 0; e < E; ++e) out[e] += wide[e];
}

void expert_ffn(const FfnSpec& spec, const FfnTask* tasks, int num_tasks, const void* x,
                DType x_dtype, int64_t x_stride, float* pair_out) {
  const ExpertGeometry& g = spec.geometry;
  if (spec.activation == Activation::swigluoai && !g.gated)
    throw std::invalid_argument("expert_ffn: activation swigluoai needs gated experts");
  const Kernels& kernels = *current_kernels().load();
  Call call{spec, kernels, tasks, x, x_dtype, x_stride, pair_out, {}, {}, {}, {}, {}, {}, {}, {}};

  for (int f = 0; f < kForms; ++f) {
    call.x_layout.emplace_back(static_cast<Form>(f), g.hidden);
    call.a_layout.emplace_back(static_cast<Form>(f), g.intermediate);
  }
  int64_t scratch_bytes = 0;
  std::vector<Item> items[kPhases];
  Progress progress(num_tasks);
  auto add_item = [&](Phase phase, int64_t task, int64_t piece, int64_t detail = 0) {
    auto& list = items[static_cast<int>(phase)];
    list.push_back({phase, static_cast<int32_t>(task), static_cast<int32_t>(piece),
                    static_cast<int32_t>(detail)});
    progress.add(list.back());
  };
  const int num_threads = Parallel::instance().num_threads();
  const int down = g.num_matrices() - 1;
  const int64_t tiles = g.matrix(down).row_tiles();
  int64_t tiles_left = 0;
  for (int t = 0; t < num_tasks; ++t) tiles_left += tasks[t].num_rows > 0 ? tiles : 0;
  call.experts.reserve(num_tasks);
  call.terms.reserve(num_tasks * kMaxMatrices);
  for (int t = 0; t < num_tasks; ++t) {
    const FfnTask& task = tasks[t];
    scratch_bytes = call.add_expert(task, scratch_bytes);
    if (task.num_rows == 0) continue;
    const Expert& expert = call.experts.back();
    for (int m = 0; m <= down; ++m)
      for (int32_t i = expert.first[m]; i < expert.first[m + 1]; ++i) {
        const Term& term = call.terms[i];
        const Term& with_x = term.shrink < 0 ? term : call.shrinks[term.shrink].term;
        if (with_x.of_x) call.used[static_cast<int>(with_x.layout.form)] = true;
        if (term.shrink < 0) continue;
        for (int64_t group = 0; group < term.layout.groups; ++group)
          add_item(m < down ? Phase::shrink_x : Phase::shrink_a, t, group, term.shrink);
      }
    for (int i = 0; i < task.num_rows; ++i) {
      const int32_t token = task.token[i];
      if (token >= static_cast<int32_t>(call.slot.size())) call.slot.resize(token + 1, -1);
      if (call.slot[token] >= 0) continue;
      call.slot[token] = static_cast<int32_t>(call.tokens.size());
      call.tokens.push_back(token);
    }
    if (expert.computes())
      for (int64_t group = 0; group < ceil_div(g.intermediate, kGroupCols); ++group)
        add_item(Phase::gate_up, t, group);
    // Long runs read memory faster; towards the end they get short, so that the threads end
    // together.
    for (int64_t tile = 0; tile < tiles;) {
      const int64_t fair = std::max<int64_t>(tiles_left / (4 * num_threads), 1);
      const int64_t n = std::min({fair, kDownTiles, tiles - tile});
      add_item(Phase::down, t, tile, n);
      tile += n;
      tiles_left -= n;
    }
  }
  if (call.tokens.empty()) return;

  const auto num_tokens = static_cast<int64_t>(call.tokens.size());
  for (int64_t i = 0; i < num_tokens; i += kTokens) add_item(Phase::prepare, 0, i);
  int64_t x_bytes = 0, x_offset[kForms];
  for (int f = 0; f < kForms; ++f) {
    x_offset[f] = x_bytes;
    if (call.used[f]) x_bytes += num_tokens * call.x_layout[f].bytes();
  }
  const Scratch x_buffer(x_bytes), scratch(scratch_bytes);
  for (int f = 0; f < kForms; ++f) call.x_rows.push_back(x_buffer.aligned() + x_offset[f]);
  call.scratch = scratch.aligned();

  std::vector<Item>& all = items[0];
  for (int p = 1; p < kPhases; ++p) all.insert(all.end(), items[p].begin(), items[p].end());
  run_items(call, all, progress);
}

void combine_pairs(const float* pair_out, const float* weights, const int64_t* expert_idx,
                   int64_t num_experts, int64_t T, int64_t K, int64_t H, void* out, DType out_dtype,
                   bool round_products) {
  const Kernels& kernels = *current_kernels().load();
  const int64_t row_bytes = H * dtype_bytes(out_dtype);
  parallel_for(T, 16, [&](int64_t begin, int64_t end, int) {
    constexpr int64_t kPiece = 512;
    // In float64, so that the order of the experts does not show: prompts with a disk behind add
    // them as they come (comoe/runtime/prefill.py), and must give the same bits.
    alignas(64) double sum[kPiece];
    alignas(64) float product[kPiece];
    uint16_t narrow[kPiece];
    for (int64_t t = begin; t < end; ++t)
      for (int64_t h = 0; h < H; h += kPiece) {
        const int64_t n = std::min(kPiece, H - h);
        std::fill(sum, sum + n, 0.0);
        for (int64_t k = 0; k < K; ++k) {
          const int64_t e = expert_idx[t * K + k];
          if (e < 0 || e >= num_experts) continue;
          const float weight = weights[t * K + k];
          const float* row = pair_out + (t * K + k) * H + h;
          for (int64_t i = 0; i < n; ++i) product[i] = weight * row[i];
          if (round_products) {
            kernels.store(product, n, narrow, out_dtype);
            kernels.load(narrow, out_dtype, n, product);
          }
          for (int64_t i = 0; i < n; ++i) sum[i] += product[i];
        }
        for (int64_t i = 0; i < n; ++i) product[i] = static_cast<float>(sum[i]);
        kernels.store(product, n,
                      static_cast<uint8_t*>(out) + t * row_bytes + h * dtype_bytes(out_dtype),
                      out_dtype);
      }
  });
}

namespace {

// Row tile n of a matrix, its first `num_rows` rows, as `dtype`.
void unpack_rows(const Kernels& kernels, MatrixWalk& walk, const MatrixView& view, int64_t num_rows,
                 void* out, DType dtype, int64_t ld) {
  RunArgs args;
  args.value_dtype = value_dtype(view.exact_dtype, dtype);
  walk.take(1, nullptr, args);
  kernels.unpack_tile(args, num_rows, view.shape.cols, out, dtype, ld);
}

template <class F>
void for_row_tiles(const MatrixView& view, F&& f) {
  parallel_for(view.shape.row_tiles(), 4, [&](int64_t begin, int64_t end, int) {
    MatrixWalk walk(view, begin);
    for (int64_t n = begin; n < end; ++n)
      f(walk, n * kBlockRows, std::min(kBlockRows, view.shape.rows - n * kBlockRows));
  });
}

// out [rows, cols] += the part's matrix.
void add_part(const Kernels& kernels, const MatrixView& view, float* out) {
  const int64_t cols = view.shape.cols;
  for_row_tiles(view, [&](MatrixWalk& walk, int64_t row, int64_t num_rows) {
    std::vector<float> tile(num_rows * cols);
    unpack_rows(kernels, walk, view, num_rows, tile.data(), DType::fp32, cols);
    for (int64_t i = 0; i < num_rows * cols; ++i) out[row * cols + i] += tile[i];
  });
}

// out [rows, cols] += U V.
void add_low_rank(const Kernels& kernels, const MatrixView& u, const MatrixView& v, float* out) {
  const int64_t cols = v.shape.cols, rank = v.shape.rows;
  std::vector<float> dense(rank * cols);
  add_part(kernels, v, dense.data());
  for_row_tiles(u, [&](MatrixWalk& walk, int64_t row, int64_t num_rows) {
    std::vector<float> tile(num_rows * rank);
    unpack_rows(kernels, walk, u, num_rows, tile.data(), DType::fp32, rank);
    for (int64_t i = 0; i < num_rows; ++i)
      for (int64_t k = 0; k < rank; ++k) {
        const float factor = tile[i * rank + k];
        float* to = out + (row + i) * cols;
        for (int64_t c = 0; c < cols; ++c) to[c] += factor * dense[k * cols + c];
      }
  });
}

}  // namespace

void unpack_matrix(const ExpertGeometry& geometry, const ExpertView& expert, int m, void* out,
                   DType out_dtype, int64_t ld) {
  const Kernels& kernels = *current_kernels().load();
  const MatrixGeometry shape = geometry.matrix(m);
  const int64_t size = dtype_bytes(out_dtype);
  if (expert.parts.size() == 1 && expert.low_rank.empty()) {
    const MatrixView view = matrix_view(geometry, expert.parts[0], m);
    for_row_tiles(view, [&](MatrixWalk& walk, int64_t row, int64_t num_rows) {
      unpack_rows(kernels, walk, view, num_rows, static_cast<uint8_t*>(out) + row * ld * size,
                  out_dtype, ld);
    });
    return;
  }
  // The sum is rounded once.
  std::vector<float> sum(shape.rows * shape.cols);
  for (const PartView& part : expert.parts)
    add_part(kernels, matrix_view(geometry, part, m), sum.data());
  for (const LowRankView& low_rank : expert.low_rank)
    if (low_rank.ranks[m] > 0)
      add_low_rank(kernels, factor_view(geometry, low_rank, m, 1),
                   factor_view(geometry, low_rank, m, 0), sum.data());
  parallel_for(shape.rows, 64, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r)
      kernels.store(sum.data() + r * shape.cols, shape.cols,
                    static_cast<uint8_t*>(out) + r * ld * size, out_dtype);
  });
}

void unpack_bias(const ExpertGeometry& geometry, const ExpertView& expert, int m, float* out) {
  const Kernels& kernels = *current_kernels().load();
  const MatrixGeometry shape = geometry.matrix(m);
  std::fill(out, out + shape.rows, 0.0f);
  for (const PartView& part : expert.parts) {
    const MatrixView view = matrix_view(geometry, part, m);
    for (int64_t n = 0; n < shape.row_tiles(); ++n) {
      float bias[kBlockRows];
      tile_bias(view, n, kernels, bias);
      const int64_t row = n * kBlockRows;
      for (int64_t r = row; r < std::min(row + kBlockRows, shape.rows); ++r)
        out[r] += bias[r - row];
    }
  }
}

void unpack_mean(const ExpertGeometry& geometry, const ExpertView& expert, float* out) {
  std::fill(out, out + geometry.hidden, 0.0f);
  for (const PagedBytes& mean : expert.means)
    for (int64_t h = 0; h < geometry.hidden; ++h) {
      float value;
      std::memcpy(&value, mean.at(h * 4), 4);
      out[h] += value;
    }
}

}  // namespace comoe
