// clang-format off
#error "cooperative groups: not supported by the host executor (tests/cuda_on_host); use __shfl_xor_sync"
