#include "common/tensor_view.h"

#include <algorithm>
#include <string>

namespace viops {
namespace {

std::string list(const int64_t* values, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

std::string named(const TensorView& view) { return std::string(view.name) + ": "; }

}  // namespace

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::float32: return "float32";
    case DType::float64: return "float64";
    case DType::bfloat16: return "bfloat16";
    case DType::float16: return "float16";
    case DType::int16: return "int16";
    case DType::int64: return "int64";
    default: return "another dtype";
  }
}

void TensorView::check_rank(int expected, const char* axes) const {
  if (rank != expected) {
    throw std::invalid_argument(named(*this) + "expected [" + axes + "], got shape " + list(shape, rank));
  }
}

void TensorView::check_shape(std::initializer_list<int64_t> expected, const char* axes) const {
  const int expected_rank = static_cast<int>(expected.size());
  if (rank != expected_rank || !std::equal(expected.begin(), expected.end(), shape)) {
    throw std::invalid_argument(named(*this) + "expected [" + axes + "] = " +
                                list(expected.begin(), expected_rank) + ", got shape " + list(shape, rank));
  }
}

void TensorView::check_floating() const {
  if (dtype == DType::int16 || dtype == DType::int64 || dtype == DType::other) {
    throw TypeMismatch(named(*this) + "expected float32, float64, bfloat16 or float16, got " +
                       name_of(dtype));
  }
}

void TensorView::check_dtype(DType expected) const {
  if (dtype != expected) {
    throw TypeMismatch(named(*this) + "expected " + name_of(expected) + ", got " + name_of(dtype));
  }
}

void TensorView::check_same_dtype(const TensorView& other) const {
  if (dtype != other.dtype) {
    throw TypeMismatch(named(*this) + "dtype " + name_of(dtype) + " differs from " + other.name + "'s " +
                       name_of(other.dtype));
  }
}

void TensorView::check_on_cpu() const {
  if (device != Device::cpu) {
    throw std::invalid_argument(named(*this) + "expected a tensor on the CPU, got one on another device");
  }
}

void TensorView::check_contiguous() const {
  int64_t expected = 1;
  bool contiguous = true;
  for (int axis = rank - 1; axis >= 0; --axis) {
    if (shape[axis] == 0) return;
    contiguous = contiguous && (shape[axis] == 1 || stride[axis] == expected);
    expected *= shape[axis];
  }
  if (!contiguous) {
    throw std::invalid_argument(named(*this) + "expected a contiguous tensor, got strides " +
                                list(stride, rank) + " for shape " + list(shape, rank));
  }
}

}  // namespace viops
