#include "common/cuda_info.h"

#include <sstream>
#include <stdexcept>

namespace viops {

std::vector<std::string> cuda_architectures() {
  std::vector<std::string> names;
  std::istringstream list(VIOPS_CUDA_ARCHITECTURES);
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
  return names;
}

std::string cuda_version() { return VIOPS_CUDA_VERSION; }

std::string cuda_reason() { return VIOPS_CUDA_REASON; }

#if defined(VIOPS_CUDA)
int count_cuda_devices(std::string& reason);

int cuda_devices() {
  std::string reason;
  const int count = count_cuda_devices(reason);
  if (!reason.empty()) throw std::runtime_error("CUDA: " + reason);
  return count;
}
#else
int cuda_devices() { throw std::runtime_error(std::string("CUDA: ") + VIOPS_CUDA_REASON); }
#endif

}  // namespace viops
