// What the host executor does not run; using it ends the build with a line that says so.
#pragma once

#define VIOPS_UNSUPPORTED(what) \
  __attribute__((error(what " is not supported by the host executor (tests/cuda_on_host)")))

VIOPS_UNSUPPORTED("__activemask, whose answer no CUDA program may rely on,") unsigned __activemask();
VIOPS_UNSUPPORTED("clock") long clock64();
VIOPS_UNSUPPORTED("__nanosleep") void __nanosleep(unsigned);
VIOPS_UNSUPPORTED("griddepcontrol") void cudaGridDependencySynchronize();

// _Pragma takes one string, so these lines are as long as they are.
// clang-format off
#define asm _Pragma("GCC error \"inline PTX (wgmma, TMA, mbarrier) is not supported by the host executor; put it into csrc/common/ptx.cuh with a fallback\"") __asm__
#define __cluster_dims__(...) _Pragma("GCC error \"a cluster of thread blocks is not supported by the host executor\"")
#define CUtensorMap _Pragma("GCC error \"TMA (CUtensorMap) is not supported by the host executor\"") struct CUtensorMap
