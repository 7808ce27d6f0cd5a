// clang-format off
#error "nvcuda::wmma: not supported by the host executor (tests/cuda_on_host); use mma.sync of csrc/common/ptx.cuh"
