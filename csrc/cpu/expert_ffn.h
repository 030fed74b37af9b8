// Expert feed-forward networks over paged records, at any level of the ladder, on the CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "../ladder/coded.h"
#include "../ladder/layout.h"

namespace comoe {

// a = activation(gate) * up when gated, else activation(up). `alpha` and `limit` belong to
// swigluoai: gate' = min(gate, limit), up' = clamp(up, -limit, limit), a = gate' * sigmoid(alpha *
// gate') * (up' + 1).
enum class Activation : uint8_t { silu, gelu, gelu_tanh, relu, relu2, quick_gelu, swigluoai };

struct FfnSpec {
  ExpertGeometry geometry;
  Activation activation = Activation::silu;
  float alpha = 0.0f;
  float limit = 0.0f;
};

// A code set of which some planes are known, or the exact weights.
struct PartView {
  Level level = Level::bits2;
  PagedBytes
      planes[kNumPlanes];  // plane p: the record that holds it; [0] has the headers. exact: [0]
  uint8_t first_plane[kNumPlanes] = {0, 1, 2, 3};  // ... and the plane with which it begins
};

// Factors V [rank, cols], U [rows, rank] of each matrix in one record (see low_rank_layout).
struct LowRankView {
  Level level = Level::bits8;
  PagedBytes record;
  uint16_t ranks[kMaxMatrices] = {};
};

// One expert as it is now: its matrices are the sum of the parts and of all U V, its biases the sum
// of the parts', and the means, fp32 [hidden], are added to its output. Exact weights are the only
// part.
struct ExpertView {
  std::vector<PartView> parts;
  std::vector<LowRankView> low_rank;
  std::vector<PagedBytes> means;

  ExpertView() = default;
  // The ladder of packing at `level`; of `records` those that the level needs.
  ExpertView(Level level, const PagedBytes* records) {
    PartView part;
    part.level = level;
    if (level == Level::exact) part.planes[0] = records[4];
    for (int p = 0; level != Level::exact && p <= static_cast<int>(level); ++p)
      part.planes[p] = records[p];
    parts.push_back(part);
  }
  bool is_exact() const { return parts.size() == 1 && parts[0].level == Level::exact; }
};

// The rows of one expert: row i reads x[token[i]] and writes pair_out[pair[i]].
struct FfnTask {
  const ExpertView* expert;
  const int32_t* token;  // [num_rows]
  const int32_t* pair;   // [num_rows]
  int32_t num_rows;
};

// pair_out[pair, :] = down(a(up(x[token, :]))) for all rows of all tasks, biases included, not yet
// times the router's weight. Deterministic: the result of a row does not depend on the other rows,
// the order of tasks or the number of threads. A low-rank delta is never multiplied out: t = V x,
// then U t is added.
//   x: [T, H] of `x_dtype`, row stride x_stride elements.  pair_out: fp32 [num_pairs, H].
void expert_ffn(const FfnSpec& spec, const FfnTask* tasks, int num_tasks, const void* x,
                DType x_dtype, int64_t x_stride, float* pair_out);

// round_products (16-bit out only): each product is rounded to out_dtype first, as where the
// router's weights have that dtype. out[t, :] = sum over k of weight[t, k] * pair_out[t * K + k,
// :], in the order of k, skipping pairs whose expert index is outside [0, E).  out: [T, H] of
// out_dtype, contiguous.
void combine_pairs(const float* pair_out, const float* weights, const int64_t* expert_idx,
                   int64_t num_experts, int64_t T, int64_t K, int64_t H, void* out, DType out_dtype,
                   bool round_products = false);

// Matrix m of one expert, row-major [rows, cols] with row stride `ld` elements, as fp32, bf16 or
// fp16 (rounded to nearest even; bit for bit at `exact` when out_dtype is the source's dtype, or
// the source is coded).
void unpack_matrix(const ExpertGeometry& geometry, const ExpertView& expert, int m, void* out,
                   DType out_dtype, int64_t ld);
// Its bias as fp32 [rows].
void unpack_bias(const ExpertGeometry& geometry, const ExpertView& expert, int m, float* out);
// What is added to its output, fp32 [hidden]; zeros without a mean.
void unpack_mean(const ExpertGeometry& geometry, const ExpertView& expert, float* out);

// A linear router's scores: out[e] = W[e, :] @ x (+ bias[e]).  W: [E, H] of dtype, contiguous.
// bias: [E] of dtype, or null.  x: [H] of x_dtype.  In fp32.
void router_logits(const void* W, const void* bias, DType dtype, int64_t E, int64_t H,
                   const void* x, DType x_dtype, float* out);

// Name of the instruction set in use: "portable", "avx2", "avx512", "avx512_vnni_bf16". `force_isa`
// takes one of these (for tests; throws if the CPU lacks it), or "auto".
const char* isa_name();
void force_isa(const char* name);
// Those that this CPU can run, best first.
std::vector<const char*> isa_names();

}  // namespace comoe
