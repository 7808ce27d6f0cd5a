// Inline PTX, each with what it computes in plain C++ for the host executor.
//
// Matrix fragments are as PTX defines them: of 32 lanes, group = lane / 4 and member = lane % 4.
#pragma once

#include "common/cuda.cuh"

namespace viops {

#if defined(__CUDACC__)

// Asks for the 128-byte line at `address` to be brought into the L2 cache.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of 16 bytes from global to shared memory, both 16-byte aligned; it is there after the
// wait for its group, for other threads after a barrier too.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global)
               : "memory");
}

// Closes the group of copies that this thread has started since the last one.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's newest groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane l names row l % 8 of matrix l / 8, 16-byte
// aligned; fragment[i] gets columns 2 member and 2 member + 1 of row `group` of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// c [16, 8] += a [16, 16] b [16, 8], float sums of half products.
__device__ __forceinline__ void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same of bfloat16.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#define VIOPS_MMA_M16N8K32(name, type_a, type_b)                                                          \
  __device__ __forceinline__ void name(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." type_a "." type_b                               \
                 ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                   \
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                     \
  }
// c [16, 8] += a [16, 32] b [32, 8], int32 sums of int8 products, modulo 2^32.
VIOPS_MMA_M16N8K32(mma_m16n8k32_s8, "s8", "s8")
// The same where a, b or both are uint8.
VIOPS_MMA_M16N8K32(mma_m16n8k32_u8_s8, "u8", "s8")
VIOPS_MMA_M16N8K32(mma_m16n8k32_s8_u8, "s8", "u8")
VIOPS_MMA_M16N8K32(mma_m16n8k32_u8, "u8", "u8")
#undef VIOPS_MMA_M16N8K32

#else

inline void prefetch_l2(const void*) {}

inline void cp_async_16(void* shared, const void* global,
                        on_host::Location where = on_host::Location::current()) {
  on_host::start_copy(shared, global, 16, where);
}
inline void cp_async_commit() { on_host::commit_copies(); }
template <int kPending>
inline void cp_async_wait() {
  on_host::wait_for_copies(kPending);
}

namespace on_host {

struct MatrixLoad {
  uint32_t* fragment;  // [4]
  uint16_t row[8];     // read by the lane that names it
};

inline void load_matrices_of_warp(uint32_t* fragment, const void* row, const char* name,
                                  void (*work)(const Lanes&), Location where) {
  check_aligned(row, 16, name, where);
  MatrixLoad own = {fragment, {}};
  std::memcpy(own.row, row, sizeof(own.row));
  together(name, kFullWarp, &own, work, where);
}

template <bool kTransposed>
void load_matrices(const Lanes& lanes) {
  const auto element = [&](int matrix, int row, int column) -> uint32_t {
    return lanes.get<MatrixLoad>(8 * matrix + row).row[column];
  };
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const uint32_t low = kTransposed ? element(i, 2 * member, group) : element(i, group, 2 * member);
      const uint32_t high =
          kTransposed ? element(i, 2 * member + 1, group) : element(i, group, 2 * member + 1);
      lanes.get<MatrixLoad>(lane).fragment[i] = low | high << 16;
    }
  }
}

template <class C>
struct Product {
  C* c;               // [4]
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
};

// Of element `k` of a row of a (or of a column of b): the lane that holds it, its register and its place
// there; kPacked elements a register.
template <int kPacked>
struct Held {
  int member, half, place;
  explicit Held(int k) : member(k / kPacked % 4), half(k / (4 * kPacked)), place(k % kPacked) {}
};

template <int kPacked, class C, class WidenA, class WidenB>
void multiply_fragments(const Lanes& lanes, const WidenA& widen_a, const WidenB& widen_b) {
  constexpr int kBits = 32 / kPacked;
  C sums[16][8];
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      C sum = lanes.get<Product<C> >(row % 8 * 4 + column / 2).c[row / 8 * 2 + column % 2];
      for (int k = 0; k < 8 * kPacked; ++k) {
        const Held<kPacked> held(k);
        const uint32_t a = lanes.get<Product<C> >(row % 8 * 4 + held.member).a[held.half * 2 + row / 8];
        const uint32_t b = lanes.get<Product<C> >(column * 4 + held.member).b[held.half];
        sum = static_cast<C>(sum + widen_a(a >> (held.place * kBits)) * widen_b(b >> (held.place * kBits)));
      }
      sums[row][column] = sum;
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      lanes.get<Product<C> >(row % 8 * 4 + column / 2).c[row / 8 * 2 + column % 2] = sums[row][column];
    }
  }
}

inline void multiply_f16(const Lanes& lanes) {
  const auto widen = [](uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
  };
  multiply_fragments<2, float>(lanes, widen, widen);
}
inline void multiply_bf16(const Lanes& lanes) {
  const auto widen = [](uint32_t bits) {
    return __bfloat162float(__ushort_as_bfloat16(static_cast<uint16_t>(bits)));
  };
  multiply_fragments<2, float>(lanes, widen, widen);
}
// Of bytes of these types.
template <class A, class B>
void multiply_bytes(const Lanes& lanes) {
  // unsigned, so that sums wrap
  multiply_fragments<4, uint32_t>(
      lanes, [](uint32_t bits) { return static_cast<uint32_t>(static_cast<A>(bits)); },
      [](uint32_t bits) { return static_cast<uint32_t>(static_cast<B>(bits)); });
}

template <class C>
void product(void (*work)(const Lanes&), const char* name, C* c, const uint32_t* a, const uint32_t* b,
             Location where) {
  Product<C> own = {c, a, b};
  together(name, kFullWarp, &own, work, where);
}

}  // namespace on_host

inline void ldmatrix_x4(uint32_t (&fragment)[4], const void* row,
                        on_host::Location where = on_host::Location::current()) {
  on_host::load_matrices_of_warp(fragment, row, "ldmatrix", on_host::load_matrices<false>, where);
}
inline void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* row,
                              on_host::Location where = on_host::Location::current()) {
  on_host::load_matrices_of_warp(fragment, row, "ldmatrix.trans", on_host::load_matrices<true>, where);
}
inline void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             on_host::Location where = on_host::Location::current()) {
  on_host::product(on_host::multiply_f16, "mma.f16", c, a, b, where);
}
inline void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              on_host::Location where = on_host::Location::current()) {
  on_host::product(on_host::multiply_bf16, "mma.bf16", c, a, b, where);
}
#define VIOPS_MMA_M16N8K32(name, label, type_a, type_b)                                                    \
  inline void name(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],                        \
                   on_host::Location where = on_host::Location::current()) {                               \
    on_host::product(on_host::multiply_bytes<type_a, type_b>, label, reinterpret_cast<uint32_t*>(c), a, b, \
                     where);                                                                               \
  }
VIOPS_MMA_M16N8K32(mma_m16n8k32_s8, "mma.s8", int8_t, int8_t)
VIOPS_MMA_M16N8K32(mma_m16n8k32_u8_s8, "mma.u8.s8", uint8_t, int8_t)
VIOPS_MMA_M16N8K32(mma_m16n8k32_s8_u8, "mma.s8.u8", int8_t, uint8_t)
VIOPS_MMA_M16N8K32(mma_m16n8k32_u8, "mma.u8", uint8_t, uint8_t)
#undef VIOPS_MMA_M16N8K32

#endif

}  // namespace viops
