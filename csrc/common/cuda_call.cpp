#include "common/cuda_call.h"

#include <string>

#include "common/cuda_info.h"

namespace viops {
namespace {

std::string name_of_device(const TensorView& view) {
  switch (view.device) {
    case Device::cpu: return "the CPU";
    case Device::cuda: return "cuda:" + std::to_string(view.device_index);
    default: return "another device";
  }
}

}  // namespace

#if defined(VIOPS_CUDA_ON_HOST) || !defined(VIOPS_CUDA)
static int exchange_cuda_device(int device) { return device; }
#else
int exchange_cuda_device(int device);  // of cuda_devices.cu
#endif

CudaCall::CudaCall(std::initializer_list<const TensorArgument*> arguments) {
  const TensorArgument* first = nullptr;
  for (const TensorArgument* argument : arguments) {
    if (!argument) continue;
    if (!first) first = argument;
    if (argument->device != first->device || argument->device_index != first->device_index) {
      throw std::invalid_argument(std::string(argument->name) + ": expected a tensor on " +
                                  name_of_device(*first) + ", where " + first->name + " is, got one on " +
                                  name_of_device(*argument));
    }
    if (argument->device == Device::other) {
      throw std::invalid_argument(
          std::string(argument->name) +
          ": expected a tensor on the CPU or a CUDA device, got one on another device");
    }
  }
  if (!first || first->device != kCudaDevice) return;
#if !defined(VIOPS_CUDA)
  throw std::invalid_argument(std::string(first->name) + ": expected a tensor on the CPU, got one on " +
                              name_of_device(*first) + ", and this build has no CUDA part: " + cuda_reason());
#endif
  on_cuda_ = true;
  stream_ = first->stream();
  const int device = first->device_index;
  const int previous = exchange_cuda_device(device);
  if (previous != device) previous_device_ = previous;
}

CudaCall::~CudaCall() {
  if (previous_device_ < 0) return;
  try {
    exchange_cuda_device(previous_device_);
  } catch (const std::exception&) {  // the next CUDA call meets the same error, and can raise
  }
}

}  // namespace viops
