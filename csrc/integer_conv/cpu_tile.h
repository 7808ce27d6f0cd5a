// The product of 6 rows of int16 pairs with columns of int16 pairs, exactly.  Local to the including file.
#pragma once

#include "common/simd.h"

namespace viops::integer_conv {
namespace {

typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef int16_t Shorts __attribute__((vector_size(kVectorBytes)));
typedef float Floats __attribute__((vector_size(kVectorBytes)));

constexpr int kColumns = kVectorBytes / 4;  // of a vector
constexpr int kRows = 6;                    // of a tile
// Vectors of a tile: with them 6 x 4 of 32 registers, or 6 x 2 of 16, hold sums.
#if defined(__AVX512F__)
constexpr int kMostVectors = 4;
#else
constexpr int kMostVectors = 2;
#endif
constexpr int kBlock = kMostVectors * kColumns;  // columns

// A part of the depth: `pairs` pairs of `run`, from its pair `start` on; `closes` ends a chain.
struct Segment {
  int32_t run, start, pairs, closes;
};

// Sums of a tile: high * 2^16 + low.
struct Sums {
  alignas(64) Ints high[kRows * kMostVectors];
  alignas(64) Ints low[kRows * kMostVectors];
};

VIOPS_INLINE Ints splat(const int16_t* pair) {
  int32_t both;
  std::memcpy(&both, pair, sizeof(both));
  return Ints{} + both;
}

// sum += the two products of each pair.
template <bool kFused>
VIOPS_INLINE void multiply_add(Ints& sum, const Ints& pairs, const Ints& other) {
#if defined(__AVX512F__)
  if constexpr (kFused) {  // AVX-512 VNNI, which no x86-64 level contains
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(pairs), "v"(other));
  } else {  // one block: apart from its sum, a product would be spilled
    Ints products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(sum), "=&v"(products) : "v"(pairs), "v"(other));
  }
#elif defined(__AVX2__)
  Ints products;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(pairs), "x"(other));
#elif defined(__x86_64__)
  sum += reinterpret_cast<Ints>(
      _mm_madd_epi16(reinterpret_cast<__m128i>(pairs), reinterpret_cast<__m128i>(other)));
#else
  const Shorts a = reinterpret_cast<Shorts>(pairs), b = reinterpret_cast<Shorts>(other);
  for (int i = 0; i < kColumns; ++i)
    sum[i] += int32_t(a[2 * i]) * b[2 * i] + int32_t(a[2 * i + 1]) * b[2 * i + 1];
#endif
}

#define VIOPS_ROWS _Pragma("GCC unroll 8") for (int r = 0; r < kRows; ++r)
#define VIOPS_VECTORS _Pragma("GCC unroll 8") for (int v = 0; v < kVectors; ++v)

// rows.at(r, segment) is row r's first pair of a segment, and rows.step() elements further is its next;
// w [pairs, kVectors * kColumns, 2], those of all segments one after the other.  At the end of a chain 2^16
// ths of the sums move to the high words; what is left begins the next chain.
template <int kVectors, bool kFused, class Rows>
__attribute__((noinline)) void multiply(const Rows& rows, const Segment* segments, int64_t count,
                                        const int16_t* w, Sums& sums) {
  Ints sum[kRows][kVectors];
  VIOPS_ROWS VIOPS_VECTORS sum[r][v] = Ints{};
  bool first = true;
  const int64_t step = rows.step();
  for (const Segment* segment = segments; segment < segments + count; ++segment) {
    const int16_t* row[kRows];
    VIOPS_ROWS row[r] = rows.at(r, *segment);
    const int64_t pairs = segment->pairs;
    for (int64_t i = 0; i < pairs; ++i) {
      Ints columns[kVectors];
      VIOPS_VECTORS std::memcpy(&columns[v], w + v * 2 * kColumns, sizeof(Ints));
      w += kVectors * 2 * kColumns;
      VIOPS_ROWS {
        const Ints pair = splat(row[r] + step * i);
        VIOPS_VECTORS multiply_add<kFused>(sum[r][v], columns[v], pair);
      }
    }
    if (!segment->closes) continue;
    if (first) {
      VIOPS_ROWS VIOPS_VECTORS sums.high[r * kVectors + v] = sum[r][v] >> 16;
    } else {
      VIOPS_ROWS VIOPS_VECTORS sums.high[r * kVectors + v] += sum[r][v] >> 16;
    }
    VIOPS_ROWS VIOPS_VECTORS sum[r][v] &= 0xffff;
    first = false;
  }
  VIOPS_ROWS VIOPS_VECTORS sums.low[r * kVectors + v] = sum[r][v];
  if (first) VIOPS_ROWS VIOPS_VECTORS sums.high[r * kVectors + v] = Ints{};
}

// Cuts runs into chains: the sum over a chain of |w| of any column, times limit, and what is left of the
// chain before it stay below 2^31.
class Planner {
 public:
  Planner(Segment* segments, int32_t limit)
      : segments_(segments), most_(((int64_t(1) << 31) - (1 << 16)) / limit) {}

  // Adds `pairs` pairs of a run, whose filters are w [pairs, columns, 2]; columns at most kBlock.
  void add(int32_t run, int64_t pairs, const int16_t* w, int columns) {
    int32_t start = 0;
    for (int32_t i = 0; i < pairs; ++i, w += 2 * columns) {
      if (!add_pair(w, columns)) {
        if (i > start) {
          segments_[count_++] = {run, start, i - start, 1};
        } else {
          segments_[count_ - 1].closes = 1;
        }
        start = i;
        for (int c = 0; c < columns; ++c) sums_[c] = 0;
        add_pair(w, columns);
      }
    }
    if (pairs > start) segments_[count_++] = {run, start, static_cast<int32_t>(pairs) - start, 0};
  }
  // The segments; the last chain is left open.
  int64_t count() const { return count_; }

 private:
  // Adds to each column's sum; returns false where one is too large then.
  bool add_pair(const int16_t* w, int columns) {
    int32_t largest = 0;
    for (int c = 0; c < columns; ++c) {
      const int32_t first = w[2 * c], second = w[2 * c + 1];
      sums_[c] += (first < 0 ? -first : first) + (second < 0 ? -second : second);
      largest = sums_[c] > largest ? sums_[c] : largest;
    }
    return largest <= most_;
  }

  Segment* segments_;
  int64_t count_ = 0;
  int64_t most_;
  int32_t sums_[kBlock] = {};
};

#undef VIOPS_ROWS
#undef VIOPS_VECTORS

}  // namespace
}  // namespace viops::integer_conv
