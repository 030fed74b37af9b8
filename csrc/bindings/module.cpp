#include "bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native half of comoe.";
  comoe::bind_codec(m);
  comoe::bind_rounding(m);
  comoe::bind_engine(m);
  comoe::bind_cpu(m);
  comoe::bind_moe(m);
  comoe::bind_policy(m);
  comoe::bind_device(m);
  comoe::bind_plane(m);
}
