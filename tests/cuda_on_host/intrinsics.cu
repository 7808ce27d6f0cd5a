// Prints what each warp exchange, PTX wrapper, conversion and integer intrinsic gives, one line a value:
// name, place, bits.  Built for the host and for a GPU, both must print the same: `make gpu STAGE=emulation`.
//
// Products of matrices are taken of small integers, whose sums are exact in any order.
#include <cstdio>
#include <vector>

#include "common/cuda.cuh"
#include "common/ptx.cuh"

namespace viops {
namespace {

constexpr int kLanes = 32;
constexpr int kWords = 32;  // of each lane

// Results of one warp: word `i` of lane `l` at [i][l].
struct Results {
  unsigned* words;
  __device__ void put(int i, unsigned word) const { words[i * kLanes + threadIdx.x] = word; }
};

// Numbers that differ by lane and by `n`.
__device__ unsigned mixed(unsigned n) {
  unsigned x = (threadIdx.x + 1) * 2654435761u ^ (n + 1) * 2246822519u;
  x ^= x >> 15;
  x *= 3266489917u;
  return x ^ x >> 13;
}
__device__ float small_float(unsigned n) { return static_cast<float>(static_cast<int>(mixed(n) % 17) - 8); }

__global__ void shuffles(Results out) {
  const unsigned full = 0xffffffffu, value = mixed(0);
  const int source = static_cast<int>(mixed(1) % 64) - 16;
  for (int width = 1, i = 0; width <= 32; width *= 2) {
    out.put(i++, __shfl_sync(full, value, source, width));
    out.put(i++, __shfl_up_sync(full, value, 3, width));
    out.put(i++, __shfl_down_sync(full, value, 5, width));
    out.put(i++, __shfl_xor_sync(full, value, 9, width));
  }
  out.put(24, __float_as_uint(__shfl_xor_sync(full, small_float(2), 16)));
  const double wide = __shfl_down_sync(full, static_cast<double>(value) / 3, 7);
  out.put(25, static_cast<unsigned>(__double_as_longlong(wide)));
  out.put(26, static_cast<unsigned>(__double_as_longlong(wide) >> 32));
}

__global__ void votes(Results out) {
  const unsigned full = 0xffffffffu, value = mixed(0);
  out.put(0, __ballot_sync(full, value & 1));
  out.put(1, static_cast<unsigned>(__any_sync(full, value == 5)));
  out.put(2, static_cast<unsigned>(__all_sync(full, value != 5)));
  out.put(3, __match_any_sync(full, value % 5));
  int same = -1;
  out.put(4, __match_all_sync(full, 7u, &same));
  out.put(5, static_cast<unsigned>(same));
  out.put(6, __match_all_sync(full, value % 5, &same));
  out.put(7, static_cast<unsigned>(same));
  out.put(8, __reduce_add_sync(full, value));
  out.put(9, __reduce_min_sync(full, value));
  out.put(10, static_cast<unsigned>(__reduce_max_sync(full, static_cast<int>(value))));
  out.put(11, __reduce_and_sync(full, value | 0xffffu));
  out.put(12, __reduce_or_sync(full, value & 0x1234u));
  out.put(13, __reduce_xor_sync(full, value));
  out.put(14, static_cast<unsigned>(__syncthreads_count(value & 1)));
  out.put(15, __syncthreads_or(value == 5) != 0);
  out.put(16, __syncthreads_and(value != 5) != 0);
  if (threadIdx.x < 20) {
    out.put(17, __ballot_sync(0xfffffu, value & 2));
    out.put(18, __shfl_sync(0xfffffu, value, 19));
    out.put(19, __reduce_add_sync(0xfffffu, value));
    out.put(20, __match_any_sync(0xfffffu, value % 3));
  }
}

__global__ void integers(Results out) {
  const unsigned a = mixed(0), b = mixed(1);
  out.put(0, static_cast<unsigned>(__popc(a)));
  out.put(1, static_cast<unsigned>(__clz(static_cast<int>(a >> (b % 32)))));
  out.put(2, static_cast<unsigned>(__ffs(static_cast<int>(a << (b % 32)))));
  out.put(3, __brev(a));
  out.put(4, __umulhi(a, b));
  out.put(5, static_cast<unsigned>(__mulhi(static_cast<int>(a), static_cast<int>(b))));
  out.put(6, __byte_perm(a, b, mixed(2) & 0xffffu));
  out.put(7, static_cast<unsigned>(__dp4a(static_cast<int>(a), static_cast<int>(b), 17)));
  out.put(8, __dp4a(a, b, 17u));
  out.put(9, __funnelshift_l(a, b, mixed(2)));
  out.put(10, __funnelshift_r(a, b, mixed(2)));
  const unsigned long long wide = static_cast<unsigned long long>(a) << 32 | b;
  out.put(11, static_cast<unsigned>(__popcll(wide)));
  out.put(12, static_cast<unsigned>(__clzll(static_cast<long long>(wide >> (b % 64)))));
  out.put(13, static_cast<unsigned>(__ffsll(static_cast<long long>(wide << (b % 64)))));
  out.put(14, static_cast<unsigned>(__float2int_rn(__uint_as_float(a))));
  out.put(15, static_cast<unsigned>(__float2int_rz(__uint_as_float(a))));
  out.put(16, static_cast<unsigned>(__float2int_rn(static_cast<float>(static_cast<int>(b)) * 0.5f)));
}

// Floats of every magnitude, with NaN, infinities, subnormals and halves of steps among them.
__device__ float any_float(unsigned n) {
  const float special[] = {0.0f,          -0.0f,          65504.0f,       65519.996f,
                           65520.0f,      5.9604645e-8f,  2.9802322e-8f,  -2.98023260e-8f,
                           6.1035156e-5f, 1.00048828125f, 1.00146484375f, 1.00390625f,
                           1.01171875f,   3.3895314e38f,  3.4e38f,        1e-40f};
  if (n < 16) return special[n];
  if (n == 16) return __uint_as_float(0x7f800000u);
  if (n == 17) return __uint_as_float(0xff800000u);
  if (n == 18) return __uint_as_float(0x7fc01234u);
  if (n == 19) return __uint_as_float(0xffa00001u);
  return __uint_as_float(mixed(n));
}

__global__ void conversions(Results out) {
  for (int i = 0; i < kWords; ++i) {
    const float value = any_float(static_cast<unsigned>(i) + (threadIdx.x ? 20 : 0));
    const __half half = __float2half_rn(value);
    const __nv_bfloat16 brain = __float2bfloat16_rn(value);
    out.put(i, static_cast<unsigned>(__half_as_ushort(half)) << 16 | __bfloat16_as_ushort(brain));
  }
}

__global__ void conversions_back(Results out) {
  for (int i = 0; i < kWords / 2; ++i) {
    const auto bits = static_cast<unsigned short>(mixed(static_cast<unsigned>(i)));
    const bool nan = (bits & 0x7fffu) > 0x7c00u;  // whose payload may differ
    out.put(2 * i, nan ? 0 : __float_as_uint(__half2float(__ushort_as_half(bits))));
    out.put(2 * i + 1, __float_as_uint(__bfloat162float(__ushort_as_bfloat16(bits))));
  }
}

__global__ void conversions_of_double(Results out) {
  for (int i = 0; i < kWords; ++i) {
    const auto n = static_cast<unsigned>(i);
    const double value = static_cast<double>(small_float(n)) + static_cast<double>(mixed(n)) * 0x1p-43;
    out.put(i, static_cast<unsigned>(__half_as_ushort(__double2half(value))) << 16 |
                   __bfloat16_as_ushort(__double2bfloat16(value)));
  }
}

template <bool kTransposed>
__global__ void matrix_loads(Results out) {
  VIOPS_SHARED(uint4, rows, [kLanes]);
  rows[threadIdx.x] = make_uint4(mixed(0), mixed(1), mixed(2), mixed(3));
  __syncthreads();
  uint32_t fragment[4];
  const void* row = &rows[(threadIdx.x * 5) % kLanes];
  if (kTransposed) {
    ldmatrix_x4_trans(fragment, row);
  } else {
    ldmatrix_x4(fragment, row);
  }
  for (int i = 0; i < 4; ++i) out.put(i, fragment[i]);
}

struct HalfProduct {
  static __device__ uint32_t pack(unsigned n) {
    return __half_as_ushort(__float2half_rn(small_float(n))) |
           static_cast<uint32_t>(__half_as_ushort(__float2half_rn(small_float(n + 1)))) << 16;
  }
  static __device__ void run(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16_f16(c, a, b);
  }
};

struct BfloatProduct {
  static __device__ uint32_t pack(unsigned n) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(small_float(n))) |
           static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(small_float(n + 1)))) << 16;
  }
  static __device__ void run(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    mma_m16n8k16_bf16(c, a, b);
  }
};

template <class Product>
__global__ void float_products(Results out) {
  uint32_t a[4], b[2];
  float c[4];
  for (unsigned i = 0; i < 4; ++i) a[i] = Product::pack(2 * i);
  for (unsigned i = 0; i < 2; ++i) b[i] = Product::pack(8 + 2 * i);
  for (unsigned i = 0; i < 4; ++i) c[i] = small_float(12 + i);
  Product::run(c, a, b);
  for (int i = 0; i < 4; ++i) out.put(i, __float_as_uint(c[i]));
}

// Of signed and unsigned bytes.
template <bool kUnsignedA, bool kUnsignedB>
__global__ void integer_products(Results out) {
  uint32_t a[4], b[2];
  int32_t c[4];
  for (unsigned i = 0; i < 4; ++i) a[i] = mixed(i);
  for (unsigned i = 0; i < 2; ++i) b[i] = mixed(4 + i);
  for (unsigned i = 0; i < 4; ++i) c[i] = static_cast<int32_t>(mixed(6 + i));
  if (kUnsignedA && kUnsignedB) {
    mma_m16n8k32_u8(c, a, b);
  } else if (kUnsignedA) {
    mma_m16n8k32_u8_s8(c, a, b);
  } else if (kUnsignedB) {
    mma_m16n8k32_s8_u8(c, a, b);
  } else {
    mma_m16n8k32_s8(c, a, b);
  }
  for (int i = 0; i < 4; ++i) out.put(i, static_cast<unsigned>(c[i]));
}

__global__ void asynchronous_copies(Results out) {
  VIOPS_SHARED(uint4, copied, [2 * kLanes]);
  uint4* source = reinterpret_cast<uint4*>(out.words + 16 * kLanes);  // results that stay
  source[threadIdx.x] = make_uint4(mixed(0), mixed(1), mixed(2), mixed(3));
  __syncthreads();
  cp_async_16(&copied[threadIdx.x], &source[kLanes - 1 - threadIdx.x]);
  cp_async_commit();
  cp_async_16(&copied[kLanes + threadIdx.x], &source[threadIdx.x]);
  cp_async_commit();
  cp_async_wait<1>();
  out.put(0, copied[threadIdx.x].y);
  cp_async_wait<0>();
  __syncthreads();
  out.put(1, copied[kLanes + (threadIdx.x + 1) % kLanes].z);
}

__global__ void atomics(Results out) {
  VIOPS_SHARED(unsigned, cells, [8]);
  if (threadIdx.x < 8) cells[threadIdx.x] = 0;
  __syncthreads();
  const unsigned value = mixed(0);
  atomicAdd(&cells[0], value);
  atomicMax(&cells[1], value);
  atomicOr(&cells[2], 1u << (value % 32));
  atomicXor(&cells[3], value);
  atomicMin(reinterpret_cast<int*>(&cells[4]), static_cast<int>(value));
  atomicExch(&cells[5], 77u);
  atomicCAS(&cells[6], 0u, 99u);
  atomicAnd(&cells[7], value);
  __syncthreads();
  for (int i = 0; i < 8; ++i) out.put(i, cells[i]);
}

#if defined(__CUDACC__)
struct Buffer {
  static constexpr size_t kBytes = kWords * kLanes * sizeof(unsigned);
  unsigned* device = nullptr;
  unsigned words[kWords * kLanes];
  Buffer() {
    check_cuda(cudaMalloc(&device, kBytes));
    check_cuda(cudaMemset(device, 0, kBytes));
  }
  ~Buffer() { cudaFree(device); }
  unsigned* for_kernel() { return device; }
  void finish() { check_cuda(cudaMemcpy(words, device, kBytes, cudaMemcpyDeviceToHost)); }
};
#else
struct Buffer {
  alignas(16) unsigned words[kWords * kLanes] = {};
  unsigned* for_kernel() { return words; }
  void finish() {}
};
#endif

void report(const char* name, void (*kernel)(Results)) {
  Buffer buffer;
  launch(kernel, {1, kLanes, 0, nullptr}, Results{buffer.for_kernel()});
  buffer.finish();
  for (int i = 0; i < kWords * kLanes; ++i) std::printf("%s %d %08x\n", name, i, buffer.words[i]);
}

}  // namespace
}  // namespace viops

int main() {
  using namespace viops;
  report("shuffles", shuffles);
  report("votes", votes);
  report("integers", integers);
  report("conversions", conversions);
  report("conversions_back", conversions_back);
  report("conversions_of_double", conversions_of_double);
  report("ldmatrix", matrix_loads<false>);
  report("ldmatrix.trans", matrix_loads<true>);
  report("mma.f16", float_products<HalfProduct>);
  report("mma.bf16", float_products<BfloatProduct>);
  report("mma.s8", integer_products<false, false>);
  report("mma.u8.s8", integer_products<true, false>);
  report("mma.s8.u8", integer_products<false, true>);
  report("mma.u8", integer_products<true, true>);
  report("cp.async", asynchronous_copies);
  report("atomics", atomics);
}
