// Tensors from Python: through DLPack's C exchange API, or __dlpack__ where the framework lacks it.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>

#include "common/tensor_view.h"

namespace viops {

namespace py = pybind11;

// A view and what keeps its memory alive while it is used.
struct TensorArgument : TensorView {
  // Any framework's tensor; TypeError naming the argument where `object` is none.
  TensorArgument(const char* name, py::handle object);

  // The framework's current stream on this tensor's device; null on the CPU.
  void* stream() const;

 private:
  const void* exchange_api_ = nullptr;
  py::object owner_;
};

// An argument that may be None.
struct OptionalArgument {
  OptionalArgument(const char* name, py::handle object) {
    if (!object.is_none()) view_.emplace(name, object);
  }
  const TensorArgument* get() const { return view_ ? &*view_ : nullptr; }

 private:
  std::optional<TensorArgument> view_;
};

}  // namespace viops
