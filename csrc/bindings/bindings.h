// What the Python module comoe._C consists of: one function per file of this folder.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "../runtime/moe_op.h"

namespace comoe {

namespace py = pybind11;

// A type of its own, so that Python passes it on without looking into it.
struct AheadList {
  std::vector<Ahead> layers;
};

void bind_codec(py::module_& m);
void bind_rounding(py::module_& m);
void bind_engine(py::module_& m);
void bind_cpu(py::module_& m);
void bind_moe(py::module_& m);
void bind_policy(py::module_& m);
void bind_device(py::module_& m);
void bind_plane(py::module_& m);

}  // namespace comoe
