#include "bindings.h"

namespace comoe {

void bind_moe(py::module_& m) {}

}  // namespace comoe
