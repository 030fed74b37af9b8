#include "coded_linear.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace comoe {
namespace {

// Blocks fetched ahead of those computed, plane by plane; see expert_ffn.cpp.
constexpr int64_t kPrefetchBlocks = 128;
// Blocks of a work item: at 8 bits 128 KiB, a few microseconds, so that the threads end together.
constexpr int64_t kItemBlocks = 256;

// Where the parts of the record lie.
struct Places {
  const MatrixHeader* header;
  const uint8_t* params;  // [row_tiles, groups, 32]
  int planes;
  const uint8_t* blocks[kNumPlanes];

  explicit Places(const CodedMatrix& W) : planes(num_planes(W.level)) {
    CodedLayout layout;
    layout.count = 1;
    layout.matrices[0] = W.shape;
    header = reinterpret_cast<const MatrixHeader*>(W.record + layout.header_offset(0));
    params = W.record + layout.params_offset(0);
    for (int p = 0; p < planes; ++p) blocks[p] = W.record + layout.plane_offset(0, p, 0);
  }
};

// One run of tiles, as the kernels take it.
struct Run {
  RunArgs args{};
  Segment segments[2];

  Run(const CodedMatrix& W, const Places& places, int64_t tile, int64_t num_tiles) {
    const int64_t first = tile * W.shape.col_blocks();
    args.level = W.level;
    args.header = places.header;
    args.params = places.params + tile * W.shape.groups() * kParamsBytes;
    args.num_tiles = num_tiles;
    args.col_blocks = W.shape.col_blocks();
    segments[0] = {0, {}};
    for (int p = 0; p < places.planes; ++p)
      segments[0].base[p] = places.blocks[p] + first * kPlaneBlockBytes[p];
    segments[1] = {std::numeric_limits<int64_t>::max(), {}};
    args.segments = segments;
  }
  Run(const Run&) = delete;  // args points into it
};

// Appends blocks [begin, end) of all planes.
void append_prefetch(const Places& places, int64_t begin, int64_t end, std::vector<Prefetch>& to) {
  for (; begin < end; begin += kPrefetchBlocks) {
    const int64_t n = std::min(kPrefetchBlocks, end - begin);
    for (int p = 0; p < places.planes; ++p) {
      const uint8_t* at = places.blocks[p] + begin * kPlaneBlockBytes[p];
      to.push_back({at, at + n * kPlaneBlockBytes[p]});
    }
  }
}

struct Target {
  const CodedTarget& to;
  Places places;
  int64_t tiles_per_item, first_item;
  int64_t num_items() const { return ceil_div(to.W.shape.row_tiles(), tiles_per_item); }
};

struct Call {
  const Kernels& kernels;
  const RowLayout layout;
  const DType dtype;
  std::vector<Target> targets;
  int64_t num_items = 0;
  std::vector<uint8_t> rows;  // prepared, of the rows of x at hand
  int64_t first_row = 0, num_rows = 0;
  std::atomic<int64_t> next{0};  // item

  Call(const CodedTarget* given, int count, const Kernels& kernels, DType dtype)
      : kernels(kernels),
        layout(row_form(given[0].W.level, ExactType::fp32, dtype, false), given[0].W.shape.cols),
        dtype(dtype) {
    const int64_t threads = Parallel::instance().num_threads();
    for (int i = 0; i < count; ++i) {
      const MatrixGeometry& shape = given[i].W.shape;
      const int64_t tiles =
          std::min(kItemBlocks / shape.col_blocks(), ceil_div(shape.row_tiles(), 4 * threads));
      targets.push_back({given[i], Places(given[i].W), std::max<int64_t>(tiles, 1), num_items});
      num_items += targets.back().num_items();
    }
  }

  uint8_t* row(int64_t i) {
    auto at = reinterpret_cast<uintptr_t>(rows.data());
    return rows.data() + (64 - at % 64) % 64 + i * layout.bytes();
  }

  // A row takes less than a microsecond: a few are not worth sharing out.
  void prepare(const void* x, int64_t x_stride) {
    rows.resize(num_rows * layout.bytes() + 64);
    alignas(64) float group[kGroupCols];
    for (int64_t i = 0; i < num_rows; ++i)
      for (int64_t g = 0; g < layout.groups; ++g) {
        const int64_t n = std::min(layout.cols - g * kGroupCols, kGroupCols);
        const int64_t at = (first_row + i) * x_stride + g * kGroupCols;
        kernels.load(element_at(x, dtype, at), dtype, n, group);
        std::fill(group + n, group + kGroupCols, 0.0f);
        kernels.prepare_group(group, layout, g, row(i));
      }
  }

  // Row tiles [tile, tile + count) of a matrix.
  struct Item {
    const Target* target;
    int64_t tile, count;
  };
  Item item(int64_t number) const {
    const Target* t = targets.data();
    while (number >= t->first_item + t->num_items()) ++t;
    const int64_t tile = (number - t->first_item) * t->tiles_per_item;
    return {t, tile, std::min(t->tiles_per_item, t->to.W.shape.row_tiles() - tile)};
  }

  // `then`: the item whose head is fetched meanwhile, or null.
  void compute(const Item& item, const Item* then) {
    thread_local std::vector<Prefetch> prefetch;
    thread_local std::vector<float> sums;
    const CodedTarget& to = item.target->to;
    const int64_t col_blocks = to.W.shape.col_blocks();
    const int64_t first = item.tile * col_blocks, end = first + item.count * col_blocks;
    Run run(to.W, item.target->places, item.tile, item.count);
    prefetch.clear();
    append_prefetch(item.target->places, std::min(first + kPrefetchBlocks, end), end, prefetch);
    if (then) {
      const int64_t blocks = then->target->to.W.shape.col_blocks();
      append_prefetch(then->target->places, then->tile * blocks,
                      then->tile * blocks + std::min(kPrefetchBlocks, then->count * blocks),
                      prefetch);
    }
    prefetch.push_back({});
    run.args.prefetch = prefetch.data();
    run.args.layout = layout;
    run.args.num_rows = static_cast<int>(num_rows);
    const int64_t width = item.count * kBlockRows;
    sums.resize((num_rows + 1) * width);
    for (int64_t i = 0; i < num_rows; ++i) {
      run.args.rows[i] = row(i);
      run.args.out[i] = sums.data() + i * width;
    }
    kernels.multiply(run.args);
    const int64_t all = to.W.shape.rows, at = item.tile * kBlockRows;
    const int64_t valid = std::min(width, all - at);
    float* bias = sums.data() + num_rows * width;
    if (to.bias) kernels.load(element_at(to.bias, to.bias_dtype, at), to.bias_dtype, valid, bias);
    for (int64_t i = 0; i < num_rows; ++i) {
      float* sum = sums.data() + i * width;
      if (to.bias)
        for (int64_t r = 0; r < valid; ++r) sum[r] += bias[r];
      kernels.store(sum, valid, element_at(to.out, dtype, (first_row + i) * all + at), dtype);
    }
  }

  // A thread claims its next item before it computes the present one, so that the tail of one can
  // fetch the head of the next.
  void work() {
    const auto claim = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
    for (int64_t number = claim(); number < num_items;) {
      const int64_t after = claim();
      const Item now = item(number);
      if (after < num_items) {
        const Item then = item(after);
        compute(now, &then);
      } else {
        compute(now, nullptr);
      }
      number = after;
    }
  }
};

}  // namespace

int64_t coded_matrix_bytes(const MatrixGeometry& shape, Level level) {
  CodedLayout layout;
  layout.count = 1;
  layout.matrices[0] = shape;
  return layout.record_bytes(0, num_planes(level));
}

void coded_linear(const CodedTarget* targets, int count, const void* x, DType dtype, int64_t T,
                  int64_t x_stride) {
  if (count == 0) return;
  Call call(targets, count, kernels_in_use(), dtype);
  for (int64_t t = 0; t < T; t += kMaxRows) {
    call.first_row = t;
    call.num_rows = std::min<int64_t>(T - t, kMaxRows);
    call.prepare(x, x_stride);
    call.next = 0;
    Parallel::instance().run([](void* raw, int, int) { static_cast<Call*>(raw)->work(); }, &call);
  }
}

namespace {

// Unpacks rows of a matrix, which need not begin with a tile.
class RowReader {
 public:
  RowReader(const CodedMatrix& W, const Places& places, DType dtype)
      : W_(W), places_(places), kernels_(kernels_in_use()), dtype_(dtype) {}

  // Rows [first, end) of the tile that holds `first`; they end with it.
  void read(int64_t first, int64_t end, void* out) {
    const int64_t cols = W_.shape.cols, tile = first / kBlockRows, skip = first % kBlockRows;
    Run run(W_, places_, tile, 1);
    const Prefetch none{};
    run.args.prefetch = &none;
    if (skip == 0) return kernels_.unpack_tile(run.args, end - first, cols, out, dtype_, cols);
    const int64_t row_bytes = cols * dtype_bytes(dtype_), rows = end - tile * kBlockRows;
    tile_.resize(rows * row_bytes);
    kernels_.unpack_tile(run.args, rows, cols, tile_.data(), dtype_, cols);
    std::memcpy(out, tile_.data() + skip * row_bytes, (end - first) * row_bytes);
  }

 private:
  const CodedMatrix& W_;
  const Places& places_;
  const Kernels& kernels_;
  DType dtype_;
  std::vector<uint8_t> tile_;
};

}  // namespace

void coded_rows(const CodedMatrix& W, int64_t first, int64_t count, void* out, DType dtype) {
  const Places places(W);
  const int64_t end = first + count, first_tile = first / kBlockRows;
  parallel_for(ceil_div(end, kBlockRows) - first_tile, 4, [&](int64_t a, int64_t b, int) {
    RowReader reader(W, places, dtype);
    for (int64_t tile = first_tile + a; tile < first_tile + b; ++tile) {
      const int64_t from = std::max(tile * kBlockRows, first);
      reader.read(from, std::min((tile + 1) * kBlockRows, end),
                  element_at(out, dtype, (from - first) * W.shape.cols));
    }
  });
}

void coded_gather(const CodedMatrix& W, const int64_t* ids, int64_t n, void* out, DType dtype) {
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] < 0 || ids[i] >= W.shape.rows)
      throw std::out_of_range("coded_gather: row " + std::to_string(ids[i]) + " is outside 0.." +
                              std::to_string(W.shape.rows - 1));
  const Places places(W);
  parallel_for(n, 4, [&](int64_t a, int64_t b, int) {
    RowReader reader(W, places, dtype);
    for (int64_t i = a; i < b; ++i)
      reader.read(ids[i], ids[i] + 1, element_at(out, dtype, i * W.shape.cols));
  });
}

}  // namespace comoe
