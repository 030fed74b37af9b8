// Attention of one new token per sequence over its KV cache.
#pragma once

#include <cstdint>

#include "../ladder/layout.h"

namespace comoe {

// out[b, h, :] = sum over positions l with mask[b, l] of softmax(scale * q[b, h, :] . k[b, g, l,
// :]) v[b, g, l, :], g = h / (heads / kv_heads). All in fp32; masked positions are not read. A
// sequence without any position gives zeros.
struct AttendArgs {
  const void* q;        // [batch, heads, head_dim]
  const void* k;        // [batch, kv_heads, positions, head_dim]
  const void* v;        // the same
  const uint8_t* mask;  // [batch, positions], bytes of 0 or 1; null: all
  void* out;            // [batch, heads, head_dim], contiguous
  DType dtype;          // of q, k, v and out; the last dimension is contiguous
  int64_t batch, heads, kv_heads, positions, head_dim;
  int64_t strides[9];  // elements: q batch, head; k batch, head, position; v the same; mask batch
  float scale;
};

void attend(const AttendArgs& args);

}  // namespace comoe
