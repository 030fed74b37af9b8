#include "expert_ffn.h"

#include <algorithm>
#include <atomic>
#include <cstring>
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
              __builtin_cpu_supports("avx512bf16");
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

// Pointers to `count` consecutive blocks that start at `offset` of a record. From block `valid` on the
// last valid pointer repeats: only prefetches follow those.
void fill_blocks(const PagedBytes& bytes, int64_t offset, int64_t block_bytes, int64_t count, int64_t valid,
                 const uint8_t** out) {
  valid = std::min(valid, count);
  for (int64_t i = 0; i < valid;) {
    const uint8_t* p = bytes.at(offset);
    const int64_t in_page = (bytes.page_bytes - offset % bytes.page_bytes) / block_bytes;
    const int64_t end = std::min(i + in_page, valid);
    offset += (end - i) * block_bytes;
    for (; i < end; ++i, p += block_bytes) out[i] = p;
  }
  for (int64_t i = valid; i < count; ++i) out[i] = out[valid - 1];
}

// One matrix of one expert, tile by tile.
class MatrixWalk {
 public:
  MatrixWalk(const ExpertGeometry& geometry, const ExpertView& expert, int m)
      : geometry_(geometry), expert_(expert), m_(m), shape_(geometry.matrix(m)) {
    blocks_per_plane_ = shape_.col_blocks() + kLookahead;
    pointers_.resize(blocks_per_plane_ * num_planes(expert.level) + shape_.groups());
  }

  // Fills all of `args` but the rows.
  void tile(int64_t n, TileArgs& args) {
    const int64_t first = n * shape_.col_blocks();
    args.level = expert_.level;
    args.exact_dtype = geometry_.exact_dtype;
    args.col_blocks = shape_.col_blocks();
    for (int plane = 0; plane < num_planes(expert_.level); ++plane) {
      const int record = expert_.level == Level::exact ? 4 : plane;
      const int64_t block_bytes = geometry_.block_bytes(record);
      const uint8_t** out = pointers_.data() + plane * blocks_per_plane_;
      fill_blocks(expert_.records[record], geometry_.blocks_offset(record, m_) + first * block_bytes,
                  block_bytes, blocks_per_plane_, shape_.num_blocks() - first, out);
      args.blocks[plane] = out;
    }
    if (expert_.level == Level::exact) return;
    const uint8_t** params = pointers_.data() + num_planes(expert_.level) * blocks_per_plane_;
    fill_blocks(expert_.records[0], geometry_.params_offset(m_) + n * shape_.groups() * kParamsBytes,
                kParamsBytes, shape_.groups(), shape_.groups(), params);
    args.params = params;
    args.header =
        reinterpret_cast<const MatrixHeader*>(expert_.records[0].at(geometry_.header_offset(m_)));
  }

  // Biases of the tile's 16 rows (those past the end are undefined).
  void bias(int64_t n, const Kernels& kernels, float* out) const {
    if (expert_.level == Level::exact) {
      const int64_t size = dtype_bytes(geometry_.exact_dtype);
      kernels.load(expert_.records[4].at(geometry_.exact_bias_offset(m_) + n * kBlockRows * size),
                   geometry_.exact_dtype, kBlockRows, out);
    } else {
      kernels.load(expert_.records[0].at(geometry_.bias_offset(m_) + n * kBlockRows * 4), DType::fp32,
                   kBlockRows, out);
    }
  }

 private:
  const ExpertGeometry& geometry_;
  const ExpertView& expert_;
  int m_;
  MatrixGeometry shape_;
  int64_t blocks_per_plane_;
  std::vector<const uint8_t*> pointers_;
};

// ---- expert_ffn -------------------------------------------------------------------------------

// Rows whose gate and up outputs of one group are held at a time (64 KB of scratch per thread).
constexpr int kChunkRows = 64;
// Row tiles of the down projection per work item.
constexpr int64_t kDownTiles = 4;

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

  // 16 rows of matrix output for rows [begin, end) of the task; out[i * stride] gets row begin + i.
  template <class RowOf>
  void run_tile(TileArgs& args, int begin, int end, float* out, int64_t stride, RowOf&& row_of) const {
    for (int i = begin; i < end; i += kMaxTileRows) {
      args.num_rows = std::min(end - i, kMaxTileRows);
      for (int j = 0; j < args.num_rows; ++j) {
        args.rows[j] = row_of(i + j);
        args.out[j] = out + (i - begin + j) * stride;
      }
      kernels.tile(args);
    }
  }

  // Phase 1: 128 rows of gate and up (a whole group of the intermediate, so that it can be quantised
  // here) for all rows of the task.
  void gate_up(const FfnTask& task, uint8_t* a, int64_t group) const {
    const ExpertGeometry& g = spec.geometry;
    const Form f = form(task);
    const RowLayout& layout = x_layout[static_cast<int>(f)];
    const RowLayout& a_lay = a_layout[static_cast<int>(f)];
    const uint8_t* rows = x_rows[static_cast<int>(f)];
    alignas(64) float buffer[2][kChunkRows * kGroupCols];
    MatrixWalk gate(g, *task.expert, 0), up(g, *task.expert, g.gated ? 1 : 0);
    MatrixWalk* walks[2] = {&up, g.gated ? &gate : nullptr};
    const int64_t first = group * kGroupTiles;
    const int64_t num_tiles = std::min(kGroupTiles, g.matrix(0).row_tiles() - first);
    for (int begin = 0; begin < task.num_rows; begin += kChunkRows) {
      const int end = std::min(begin + kChunkRows, task.num_rows);
      for (int64_t n = 0; n < num_tiles; ++n)
        for (int m = 0; m < 2; ++m) {
          if (!walks[m]) continue;
          TileArgs args{};
          args.layout = layout;
          walks[m]->tile(first + n, args);
          float* out = buffer[m] + n * kBlockRows;
          run_tile(args, begin, end, out, kGroupCols,
                   [&](int i) { return rows + slot[task.token[i]] * layout.bytes(); });
          if (!g.biased) continue;
          float bias[kBlockRows];
          walks[m]->bias(first + n, kernels, bias);
          for (int i = 0; i < end - begin; ++i)
            for (int r = 0; r < kBlockRows; ++r) out[i * kGroupCols + r] += bias[r];
        }
      const int64_t valid = std::min(kGroupCols, g.intermediate - group * kGroupCols);
      for (int i = 0; i < end - begin; ++i) {
        alignas(64) float a_group[kGroupCols];
        const int64_t at = i * kGroupCols;
        kernels.activate(spec, g.gated ? buffer[1] + at : nullptr, buffer[0] + at, num_tiles * kBlockRows,
                         a_group);
        std::fill(a_group + valid, a_group + kGroupCols, 0.0f);
        kernels.prepare_group(a_group, a_lay, group, a + (begin + i) * a_lay.bytes());
      }
    }
  }

  // Phase 2: a few row tiles of down.
  void down(const FfnTask& task, const uint8_t* a, int64_t piece) const {
    const ExpertGeometry& g = spec.geometry;
    const int m = g.num_matrices() - 1;
    const RowLayout& layout = a_layout[static_cast<int>(form(task))];
    alignas(64) float buffer[kMaxTileRows * kBlockRows];
    MatrixWalk walk(g, *task.expert, m);
    const int64_t last = std::min((piece + 1) * kDownTiles, g.matrix(m).row_tiles());
    for (int64_t n = piece * kDownTiles; n < last; ++n) {
      TileArgs args{};
      args.layout = layout;
      walk.tile(n, args);
      float bias[kBlockRows] = {};
      if (g.biased) walk.bias(n, kernels, bias);
      const int64_t valid = std::min(kBlockRows, g.hidden - n * kBlockRows);
      for (int begin = 0; begin < task.num_rows; begin += kMaxTileRows) {
        const int end = std::min(begin + kMaxTileRows, task.num_rows);
        run_tile(args, begin, end, buffer, kBlockRows, [&](int i) { return a + i * layout.bytes(); });
        for (int i = begin; i < end; ++i) {
          float* out = pair_out + task.pair[i] * g.hidden + n * kBlockRows;
          for (int64_t r = 0; r < valid; ++r) out[r] = buffer[(i - begin) * kBlockRows + r] + bias[r];
        }
      }
    }
  }
};

uint8_t* align64(std::vector<uint8_t>& buffer) {
  return buffer.data() + (64 - reinterpret_cast<uintptr_t>(buffer.data()) % 64) % 64;
}

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
  throw std::invalid_argument("force_isa: this CPU cannot run '" + std::string(name) + "'; use one of " + usable);
}

void expert_ffn(const FfnSpec& spec, const FfnTask* tasks, int num_tasks, const void* x, DType x_dtype,
                int64_t x_stride, float* pair_out) {
  const ExpertGeometry& g = spec.geometry;
  if (spec.activation == Activation::swigluoai && !g.gated)
    throw std::invalid_argument("expert_ffn: activation swigluoai needs gated experts");
  const Kernels& kernels = *current_kernels().load();
  Call call{spec, kernels, tasks, x, x_dtype, x_stride, pair_out, {}, {}, {}, {}, {}};

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
  const int64_t down_pieces = ceil_div(g.matrix(g.num_matrices() - 1).row_tiles(), kDownTiles);
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
  std::vector<uint8_t> x_buffer(x_bytes + 64), a_buffer(a_bytes + 64);
  for (int f = 0; f < kForms; ++f) call.x_rows.push_back(align64(x_buffer) + x_offset[f]);
  for (int t = 0; t < num_tasks; ++t) call.a_rows.push_back(align64(a_buffer) + a_offset[t]);

  // A row takes about a microsecond: a few are not worth waking another thread for.
  parallel_for(num_tokens, 8, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      for (int f = 0; f < kForms; ++f)
        if (used[f]) call.prepare_x(static_cast<Form>(f), tokens[i], static_cast<int32_t>(i));
  });
  parallel_for(static_cast<int64_t>(gate_up_items.size()), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const Item item = gate_up_items[i];
      call.gate_up(tasks[item.task], call.a_rows[item.task], item.piece);
    }
  });
  parallel_for(static_cast<int64_t>(down_items.size()), 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const Item item = down_items[i];
      call.down(tasks[item.task], call.a_rows[item.task], item.piece);
    }
  });
}

void combine_pairs(const float* pair_out, const float* weights, const int64_t* expert_idx, int64_t num_experts,
                   int64_t T, int64_t K, int64_t H, void* out, DType out_dtype) {
  const Kernels& kernels = *current_kernels().load();
  const int64_t row_bytes = H * dtype_bytes(out_dtype);
  parallel_for(T, 16, [&](int64_t begin, int64_t end, int) {
    constexpr int64_t kPiece = 512;
    alignas(64) float sum[kPiece];
    for (int64_t t = begin; t < end; ++t)
      for (int64_t h = 0; h < H; h += kPiece) {
        const int64_t n = std::min(kPiece, H - h);
        std::fill(sum, sum + n, 0.0f);
        for (int64_t k = 0; k < K; ++k) {
          const int64_t e = expert_idx[t * K + k];
          if (e < 0 || e >= num_experts) continue;
          const float weight = weights[t * K + k];
          const float* row = pair_out + (t * K + k) * H + h;
          for (int64_t i = 0; i < n; ++i) sum[i] += weight * row[i];
        }
        kernels.store(sum, n, static_cast<uint8_t*>(out) + t * row_bytes + h * dtype_bytes(out_dtype),
                      out_dtype);
      }
  });
}

void unpack_matrix(const ExpertGeometry& geometry, const ExpertView& expert, int m, void* out, DType out_dtype,
                   int64_t ld) {
  const Kernels& kernels = *current_kernels().load();
  const MatrixGeometry shape = geometry.matrix(m);
  parallel_for(shape.row_tiles(), 4, [&](int64_t begin, int64_t end, int) {
    MatrixWalk walk(geometry, expert, m);
    for (int64_t n = begin; n < end; ++n) {
      TileArgs args{};
      walk.tile(n, args);
      const int64_t row = n * kBlockRows;
      kernels.unpack_tile(args, std::min(kBlockRows, shape.rows - row), shape.cols,
                          static_cast<uint8_t*>(out) + row * ld * dtype_bytes(out_dtype), out_dtype, ld);
    }
  });
}

void unpack_bias(const ExpertGeometry& geometry, const ExpertView& expert, int m, float* out) {
  const Kernels& kernels = *current_kernels().load();
  MatrixWalk walk(geometry, expert, m);
  const MatrixGeometry shape = geometry.matrix(m);
  for (int64_t n = 0; n < shape.row_tiles(); ++n) {
    float bias[kBlockRows];
    walk.bias(n, kernels, bias);
    const int64_t row = n * kBlockRows;
    std::copy(bias, bias + std::min(kBlockRows, shape.rows - row), out + row);
  }
}

}  // namespace comoe
