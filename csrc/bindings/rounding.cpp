// Rounding under second moments: see ladder/rounding.h.
#include "../ladder/rounding.h"

#include <optional>
#include <string>

#include "bindings.h"

namespace comoe {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
static const T* checked(const Array<T>& array, std::initializer_list<int64_t> shape,
                        const char* name) {
  bool fits = array.ndim() == static_cast<py::ssize_t>(shape.size());
  py::ssize_t i = 0;
  for (int64_t size : shape) fits = fits && array.shape(i++) == size;
  if (!fits) {
    std::string expected;
    for (int64_t size : shape) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
    throw std::invalid_argument(std::string("rounding: ") + name + " must have shape [" + expected +
                                "], got " + std::string(py::str(py::tuple(array.attr("shape")))));
  }
  return array.data();
}

static py::tuple round_columns_py(const Array<float>& values, const Array<float>& factor,
                                  const Array<float>& inverse, const Array<float>& scale,
                                  const Array<float>& zero, const Array<int32_t>& group_of,
                                  const Array<float>& table,
                                  const std::optional<Array<float>>& present,
                                  const std::optional<Array<uint8_t>>& lower, int width) {
  RoundColumns b;
  if (values.ndim() != 2 || scale.ndim() != 2)
    throw std::invalid_argument("round_columns: values and scale must be matrices");
  b.rows = values.shape(0);
  b.cols = values.shape(1);
  b.groups = scale.shape(1);
  b.entries = static_cast<int>(table.size());
  if (b.cols > kMaxRoundColumns || b.entries < 2 || b.entries > kMaxTable)
    throw std::invalid_argument("round_columns: at most " + std::to_string(kMaxRoundColumns) +
                                " columns and 2 to 16 table entries, got " +
                                std::to_string(b.cols) + " and " + std::to_string(b.entries));
  b.values = values.data();
  b.factor = checked(factor, {b.cols, b.cols}, "factor");
  b.inverse = checked(inverse, {b.cols}, "inverse");
  b.scale = checked(scale, {b.rows, b.groups}, "scale");
  b.zero = checked(zero, {b.rows, b.groups}, "zero");
  b.group_of = checked(group_of, {b.cols}, "group_of");
  b.table = checked(table, {b.entries}, "table");
  if (present) b.present = checked(*present, {b.rows, b.cols}, "present");
  if (lower) b.lower = checked(*lower, {b.rows, b.cols}, "lower");
  b.width = width;
  for (int64_t j = 0; j < b.cols; ++j)
    if (b.group_of[j] < 0 || b.group_of[j] >= b.groups)
      throw std::invalid_argument("round_columns: group_of must be below " +
                                  std::to_string(b.groups) + ", got " +
                                  std::to_string(b.group_of[j]));
  py::array_t<uint8_t> codes({b.rows, b.cols});
  py::array_t<float> errors({b.rows, b.cols});
  b.codes = codes.mutable_data();
  b.errors = errors.mutable_data();
  {
    py::gil_scoped_release release;
    round_columns(b);
  }
  return py::make_tuple(codes, errors);
}

static GroupedCodes grouped(int64_t rows, int64_t cols, int64_t group_cols,
                            const Array<float>& scale, const Array<float>& zero,
                            const Array<float>& table) {
  GroupedCodes c;
  c.rows = rows;
  c.cols = cols;
  c.group_cols = group_cols;
  c.entries = static_cast<int>(table.size());
  if (group_cols < 1 || c.entries < 2 || c.entries > kMaxTable)
    throw std::invalid_argument(
        "rounding: expected groups of at least one column and 2 to 16 table entries, got " +
        std::to_string(group_cols) + " and " + std::to_string(c.entries));
  c.scale = checked(scale, {rows, c.groups()}, "scale");
  c.zero = checked(zero, {rows, c.groups()}, "zero");
  c.table = checked(table, {c.entries}, "table");
  return c;
}

static GroupedCodes grouped(const Array<float>& weights, int64_t group_cols,
                            const Array<float>& scale, const Array<float>& zero,
                            const Array<float>& table, const Array<float>& diagonal) {
  if (weights.ndim() != 2) throw std::invalid_argument("rounding: weights must be a matrix");
  GroupedCodes c = grouped(weights.shape(0), weights.shape(1), group_cols, scale, zero, table);
  c.weights = weights.data();
  checked(diagonal, {c.cols}, "diagonal");
  return c;
}

static Array<float> group_errors_py(const Array<float>& weights, int64_t group_cols,
                                    const Array<float>& scale, const Array<float>& zero,
                                    const Array<float>& table, const Array<float>& diagonal) {
  const GroupedCodes c = grouped(weights, group_cols, scale, zero, table, diagonal);
  Array<float> errors({c.rows, c.groups()});
  float* out = errors.mutable_data();
  py::gil_scoped_release release;
  group_errors(c, diagonal.data(), out);
  return errors;
}

static py::tuple bin_sums_py(const Array<float>& weights, int64_t group_cols,
                             const Array<float>& scale, const Array<float>& zero,
                             const Array<float>& table, const Array<float>& diagonal, float unit) {
  const GroupedCodes c = grouped(weights, group_cols, scale, zero, table, diagonal);
  Array<double> count(c.entries), total(c.entries);
  double *counts = count.mutable_data(), *totals = total.mutable_data();
  {
    py::gil_scoped_release release;
    bin_sums(c, diagonal.data(), unit, counts, totals);
  }
  return py::make_tuple(count, total);
}

static Array<float> decode_codes_py(const Array<uint8_t>& codes, int64_t group_cols,
                                    const Array<float>& scale, const Array<float>& zero,
                                    const Array<float>& table) {
  if (codes.ndim() != 2) throw std::invalid_argument("decode_codes: codes must be a matrix");
  const GroupedCodes c = grouped(codes.shape(0), codes.shape(1), group_cols, scale, zero, table);
  Array<float> out({c.rows, c.cols});
  float* values = out.mutable_data();
  py::gil_scoped_release release;
  decode_codes(c, codes.data(), values);
  return out;
}

void bind_rounding(py::module_& m) {
  m.def("group_errors", &group_errors_py, py::arg("weights"), py::arg("group_cols"),
        py::arg("scale"), py::arg("zero"), py::arg("table"), py::arg("diagonal"),
        "float [rows, groups]: weighted squared error of rounding; see csrc/ladder/rounding.h.");
  m.def("bin_sums", &bin_sums_py, py::arg("weights"), py::arg("group_cols"), py::arg("scale"),
        py::arg("zero"), py::arg("table"), py::arg("diagonal"), py::arg("unit"),
        "Sums over the weights of each code, [entries] each; see csrc/ladder/rounding.h.");
  m.def("decode_codes", &decode_codes_py, py::arg("codes"), py::arg("group_cols"), py::arg("scale"),
        py::arg("zero"), py::arg("table"), "float [rows, cols] of codes below the table's size.");
  m.def("round_columns", &round_columns_py, py::arg("values"), py::arg("factor"),
        py::arg("inverse"), py::arg("scale"), py::arg("zero"), py::arg("group_of"),
        py::arg("table"), py::arg("present") = py::none(), py::arg("lower") = py::none(),
        py::arg("width") = 0,
        "Codes and errors, [rows, cols] each, of a block of columns; see csrc/ladder/rounding.h.");
}

}  // namespace comoe
