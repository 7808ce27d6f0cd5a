// clang-format off
#error "cooperative groups: not supported by the host executor (tests/cuda_on_host); use __syncthreads, __syncwarp and the __*_sync exchanges"
