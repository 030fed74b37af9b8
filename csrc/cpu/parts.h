// The matrices of an expert's parts as they lie in pages, whatever the part: what MatrixWalk reads.
#pragma once

#include "../ladder/coded.h"
#include "expert_ffn.h"

namespace comoe {

struct MatrixView {
  Level level;
  ExactType exact_dtype;
  MatrixGeometry shape;
  PagedBytes planes[kNumPlanes];  // exact: [0]
  int64_t blocks_at[kNumPlanes];  // in them
  int64_t block_bytes[kNumPlanes];
  // In planes[0]: MatrixHeader (not at `exact`); group parameters, or scales of exact codes;
  // biases.
  int64_t header_at, params_at, bias_at;
  int64_t params_bytes;  // of one row tile
  DType bias_dtype;
};

inline MatrixView coded_view(const CodedLayout& layout, const PartView& part, int m) {
  MatrixView view{};
  view.level = part.level;
  view.shape = layout.matrices[m];
  for (int p = 0; p <= static_cast<int>(part.level); ++p) {
    view.planes[p] = part.planes[p];
    view.blocks_at[p] = layout.plane_offset(part.first_plane[p], p, m);
    view.block_bytes[p] = kPlaneBlockBytes[p];
  }
  view.header_at = layout.header_offset(m);
  view.params_at = layout.params_offset(m);
  view.params_bytes = view.shape.groups() * kParamsBytes;
  view.bias_at = layout.biased ? layout.bias_offset(m) : 0;
  view.bias_dtype = DType::fp32;
  return view;
}

inline MatrixView matrix_view(const ExpertGeometry& g, const PartView& part, int m) {
  if (part.level != Level::exact) return coded_view(coded_layout(g), part, m);
  MatrixView view{};
  view.level = Level::exact;
  view.exact_dtype = g.exact_dtype;
  view.shape = g.matrix(m);
  view.planes[0] = part.planes[0];
  view.blocks_at[0] = g.blocks_offset(4, m);
  view.block_bytes[0] = g.block_bytes(4);
  view.params_at = g.exact_scales_offset(m);
  view.params_bytes = g.exact_scales_bytes(m);
  view.bias_at = g.exact_bias_offset(m);
  view.bias_dtype = g.exact_bias_dtype();
  return view;
}

// Factor V (i = 0) or U (i = 1) of matrix m.
inline MatrixView factor_view(const ExpertGeometry& g, const LowRankView& low_rank, int m, int i) {
  PartView part;
  part.level = low_rank.level;
  for (int p = 0; p < kNumPlanes; ++p) {
    part.planes[p] = low_rank.record;
    part.first_plane[p] = 0;
  }
  return coded_view(low_rank_layout(g, low_rank.ranks), part, 2 * m + i);
}

}  // namespace comoe
