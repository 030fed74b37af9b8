// What the Python module comoe._C consists of: one function per file of this folder.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace comoe {

namespace py = pybind11;

void bind_codec(py::module_& m);
void bind_rounding(py::module_& m);
void bind_engine(py::module_& m);
void bind_cpu(py::module_& m);
void bind_moe(py::module_& m);
void bind_policy(py::module_& m);
void bind_device(py::module_& m);

}  // namespace comoe
