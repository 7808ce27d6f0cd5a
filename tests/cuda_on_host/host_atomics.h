// CUDA's atomics.  They are relaxed there; under the race detector they also order what they surround,
// since it knows nothing of __threadfence.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#if defined(__SANITIZE_THREAD__)
#define VIOPS_ATOMIC_ORDER __ATOMIC_ACQ_REL
#define VIOPS_ATOMIC_LOAD_ORDER __ATOMIC_ACQUIRE
inline void __threadfence() {}
inline void __threadfence_block() {}
#else
#define VIOPS_ATOMIC_ORDER __ATOMIC_RELAXED
#define VIOPS_ATOMIC_LOAD_ORDER __ATOMIC_RELAXED
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
#endif

template <class T>
using Unchanged = std::type_identity_t<T>;

// Puts next(old) where old is; gives old.
template <class T, class Next>
T viops_atomic(T* address, const Next& next) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics take 4 or 8 bytes");
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  auto* bits = reinterpret_cast<Bits*>(address);
  Bits old = __atomic_load_n(bits, VIOPS_ATOMIC_LOAD_ORDER);
  while (!__atomic_compare_exchange_n(bits, &old, std::bit_cast<Bits>(next(std::bit_cast<T>(old))), false,
                                      VIOPS_ATOMIC_ORDER, VIOPS_ATOMIC_LOAD_ORDER)) {
  }
  return std::bit_cast<T>(old);
}

template <class T>
T atomicAdd(T* address, Unchanged<T> value) {
  static_assert(!std::is_same_v<T, long long> && !std::is_same_v<T, long>, "CUDA adds unsigned long long");
  if constexpr (std::is_same_v<T, int>) {
    return viops_atomic(address, [=](int old) {
      return static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value));
    });
  } else {
    return viops_atomic(address, [=](T old) { return static_cast<T>(old + value); });
  }
}
template <class T>
T atomicMin(T* address, Unchanged<T> value) {
  static_assert(std::is_integral_v<T>, "CUDA has no atomicMin of floating-point numbers");
  return viops_atomic(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicMax(T* address, Unchanged<T> value) {
  static_assert(std::is_integral_v<T>, "CUDA has no atomicMax of floating-point numbers");
  return viops_atomic(address, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicAnd(T* address, Unchanged<T> value) {
  return viops_atomic(address, [=](T old) { return old & value; });
}
template <class T>
T atomicOr(T* address, Unchanged<T> value) {
  return viops_atomic(address, [=](T old) { return old | value; });
}
template <class T>
T atomicXor(T* address, Unchanged<T> value) {
  return viops_atomic(address, [=](T old) { return old ^ value; });
}
template <class T>
T atomicExch(T* address, Unchanged<T> value) {
  return viops_atomic(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, Unchanged<T> expected, Unchanged<T> value) {
  return viops_atomic(address, [=](T old) { return old == expected ? value : old; });
}
