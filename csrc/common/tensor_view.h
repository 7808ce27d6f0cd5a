// A tensor as kernels see it: pointer, shape, strides, dtype, device.  Nothing here knows of Python.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>

namespace viops {

enum class DType : uint8_t { float32, float64, bfloat16, float16, int16, int64, other };

enum class Device : uint8_t { cpu, cuda, other };

// An argument of the wrong type; Python sees TypeError.  std::invalid_argument becomes ValueError.
struct TypeMismatch : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

constexpr int kMaxRank = 8;

struct TensorView {
  const char* name = "";
  void* data = nullptr;
  int rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};  // in elements
  DType dtype = DType::other;
  Device device = Device::other;
  int32_t device_index = 0;

  // The checks raise with the argument's name, what came and what is accepted.  `axes` names the
  // axes for the message, as in "B N C".
  void check_rank(int expected, const char* axes) const;
  void check_shape(std::initializer_list<int64_t> expected, const char* axes) const;
  void check_floating() const;
  void check_dtype(DType expected) const;
  void check_same_dtype(const TensorView& other) const;
  void check_on_cpu() const;
  void check_contiguous() const;
};

const char* name_of(DType dtype);

}  // namespace viops
