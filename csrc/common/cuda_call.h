// Whether a call from Python runs on CUDA, and on which device and stream.
#pragma once

#include <initializer_list>

#include "common/python_tensor.h"

namespace viops {

// In builds for tests, CUDA sources run on the CPU and its tensors take the place of CUDA's.
#if defined(VIOPS_CUDA_ON_HOST)
constexpr Device kCudaDevice = Device::cpu;
#else
constexpr Device kCudaDevice = Device::cuda;
#endif

// Makes the device of a call's tensors the current one while it lives.
class CudaCall {
 public:
  // Null arguments are left out.  Raises where the tensors are not all on the CPU or all on one CUDA device,
  // or this build has no CUDA part.
  explicit CudaCall(std::initializer_list<const TensorArgument*> arguments);
  ~CudaCall();
  CudaCall(const CudaCall&) = delete;
  CudaCall& operator=(const CudaCall&) = delete;

  // Whether the call runs on CUDA; else it runs on the CPU.
  explicit operator bool() const { return on_cuda_; }
  // The framework's current stream on the device: a cudaStream_t.
  void* stream() const { return stream_; }

 private:
  bool on_cuda_ = false;
  int previous_device_ = -1;
  void* stream_ = nullptr;
};

}  // namespace viops
