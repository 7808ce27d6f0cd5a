#include "common/python_tensor.h"

#include VIOPS_DLPACK_HEADER

#include <algorithm>
#include <string>

namespace viops {
namespace {

// The exchange API that a type offers, or null.
const DLPackExchangeAPI* look_up_exchange_api(PyTypeObject* type) {
  const py::handle type_object(reinterpret_cast<PyObject*>(type));
  const py::object capsule = py::getattr(type_object, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto* header =
      static_cast<const DLPackExchangeAPIHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (header && header->version.major > DLPACK_MAJOR_VERSION) header = header->prev_api;
  if (!header || header->version.major != DLPACK_MAJOR_VERSION) return nullptr;
  const auto* api = reinterpret_cast<const DLPackExchangeAPI*>(header);
  return api->dltensor_from_py_object_no_sync ? api : nullptr;
}

// The same, remembered for the first few types that have one: torch.Tensor, Parameter.  The GIL guards it.
const DLPackExchangeAPI* exchange_api_of(py::handle object) {
  constexpr int kRemembered = 4;
  static PyTypeObject* types[kRemembered];
  static const DLPackExchangeAPI* apis[kRemembered];
  static int count = 0;
  PyTypeObject* type = Py_TYPE(object.ptr());
  for (int i = 0; i < count; ++i) {
    if (types[i] == type) return apis[i];
  }
  const DLPackExchangeAPI* api = look_up_exchange_api(type);
  if (api && count < kRemembered) {
    Py_INCREF(type);  // kept for good, so that its address cannot come to mean another type
    types[count] = type;
    apis[count++] = api;
  }
  return api;
}

DType dtype_of(DLDataType type) {
  if (type.lanes != 1) return DType::other;
  const auto is = [&](DLDataTypeCode code, int bits) { return type.code == code && type.bits == bits; };
  if (is(kDLFloat, 32)) return DType::float32;
  if (is(kDLFloat, 64)) return DType::float64;
  if (is(kDLFloat, 16)) return DType::float16;
  if (is(kDLBfloat, 16)) return DType::bfloat16;
  if (is(kDLInt, 16)) return DType::int16;
  if (is(kDLInt, 64)) return DType::int64;
  return DType::other;
}

Device device_of(DLDevice device) {
  switch (device.device_type) {
    case kDLCPU:
    case kDLCUDAHost: return Device::cpu;
    case kDLCUDA: return Device::cuda;
    default: return Device::other;
  }
}

void fill(TensorView& view, const DLTensor& tensor) {
  if (tensor.ndim > kMaxRank) {
    throw std::invalid_argument(std::string(view.name) + ": expected at most " + std::to_string(kMaxRank) +
                                " axes, got " + std::to_string(tensor.ndim));
  }
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.rank = tensor.ndim;
  std::copy_n(tensor.shape, tensor.ndim, view.shape);
  int64_t compact = 1;
  for (int axis = tensor.ndim - 1; axis >= 0; --axis) {
    view.stride[axis] = tensor.strides ? tensor.strides[axis] : compact;
    compact *= view.shape[axis];
  }
  int64_t size = 1;
  for (int axis = 0; axis < view.rank; ++axis) size *= view.shape[axis];
  if (!tensor.data && size > 0) {
    throw TypeMismatch(std::string(view.name) + ": expected a tensor that has memory, got one without");
  }
  view.dtype = dtype_of(tensor.dtype);
  view.device = device_of(tensor.device);
  view.device_index = tensor.device.device_id;
}

}  // namespace

TensorArgument::TensorArgument(const char* argument, py::handle object) {
  name = argument;
  if (const DLPackExchangeAPI* api = exchange_api_of(object)) {
    DLTensor tensor;
    if (api->dltensor_from_py_object_no_sync(object.ptr(), &tensor) != 0) {
      py::error_already_set error;
      throw TypeMismatch(std::string(name) + ": the tensor cannot be read: " + error.what());
    }
    exchange_api_ = api;
    fill(*this, tensor);
    return;
  }
  if (!py::hasattr(object, "__dlpack__")) {
    throw TypeMismatch(std::string(name) + ": expected a tensor, got " + Py_TYPE(object.ptr())->tp_name);
  }
  try {
    owner_ = object.attr("__dlpack__")();
  } catch (py::error_already_set& error) {
    throw TypeMismatch(std::string(name) + ": the tensor cannot be read: " + error.what());
  }
  if (!PyCapsule_IsValid(owner_.ptr(), "dltensor")) {
    throw TypeMismatch(std::string(name) + ": __dlpack__ gave no capsule named dltensor");
  }
  fill(*this, static_cast<DLManagedTensor*>(PyCapsule_GetPointer(owner_.ptr(), "dltensor"))->dl_tensor);
  if (device == Device::cuda) {
    throw TypeMismatch(std::string(name) +
                       ": a CUDA tensor needs the C exchange API of DLPack, which tells the stream "
                       "(torch 2.10 or newer)");
  }
}

void* TensorArgument::stream() const {
  if (device != Device::cuda) return nullptr;
  void* stream = nullptr;
  const auto* api = static_cast<const DLPackExchangeAPI*>(exchange_api_);
  if (api->current_work_stream(kDLCUDA, device_index, &stream) != 0) throw py::error_already_set();
  return stream;
}

}  // namespace viops
