#include "bindings.h"

namespace comoe {

void bind_engine(py::module_& m) {}

}  // namespace comoe
