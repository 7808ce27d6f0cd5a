// clang-format off
#error "cub: not supported by the host executor (tests/cuda_on_host); write the loop, or call torch from Python"
