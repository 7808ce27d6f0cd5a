// The CUDA part's only question to the runtime that is not a kernel launch.
#include <string>

namespace viops {

int count_cuda_devices(std::string& reason) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) reason = cudaGetErrorString(status);
  return count;
}

}  // namespace viops
