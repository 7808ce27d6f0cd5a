// A register tile of a float32 matrix product, and 2^x.  Local to the including file: see cpu_level.h.
#pragma once

#include "common/rows.h"

namespace viops {
namespace {

// Rows and vectors of a tile: as many accumulators as the registers hold beside one column and one factor.
constexpr int kTileRows = 6;
constexpr int kTileVectors = kVectorBytes == 64 ? 4 : 2;
constexpr int kTileColumns = kTileVectors * kLanes<float>;

// c[m][0..kTileColumns) = sum over k < depth of a[m][k] * b[k][0..kTileColumns), row strides lda, ldb, ldc.
template <int kRows>
__attribute__((noinline)) void multiply_tile(const float* a, int64_t lda, const float* b, int64_t ldb,
                                             int64_t depth, float* c, int64_t ldc) {
  Vector<float> sums[kRows][kTileVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) sums[m][v] = Vector<float>{};
  }
  for (int64_t k = 0; k < depth; ++k, b += ldb) {
    Vector<float> row[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) row[v] = load<float>(b + v * kLanes<float>);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const float factor = a[m * lda + k];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sums[m][v] += factor * row[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) store<float>(c + m * ldc + v * kLanes<float>, sums[m][v]);
  }
}

// c [rows, columns] = a [rows, depth] b [depth, columns]; columns a multiple of kTileColumns.
void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b,
              int64_t ldb, float* c, int64_t ldc) {
  static_assert(kTileRows == 6);
  for (int64_t n = 0; n < columns; n += kTileColumns) {
    int64_t m = 0;
    for (; m + kTileRows <= rows; m += kTileRows) {
      multiply_tile<kTileRows>(a + m * lda, lda, b + n, ldb, depth, c + m * ldc + n, ldc);
    }
    a += m * lda;
    c += m * ldc;
    switch (rows - m) {
      case 5: multiply_tile<5>(a, lda, b + n, ldb, depth, c + n, ldc); break;
      case 4: multiply_tile<4>(a, lda, b + n, ldb, depth, c + n, ldc); break;
      case 3: multiply_tile<3>(a, lda, b + n, ldb, depth, c + n, ldc); break;
      case 2: multiply_tile<2>(a, lda, b + n, ldb, depth, c + n, ldc); break;
      case 1: multiply_tile<1>(a, lda, b + n, ldb, depth, c + n, ldc); break;
      default: break;
    }
    a -= m * lda;
    c -= m * ldc;
  }
}

// 2^x for x <= 0 to 2e-7 relative; below -126 it is 2^-126, and NaN stays NaN.  The polynomial is the Taylor
// series of 2^f, f in
// [-1/2, 1/2], to its seventh term.
VIOPS_INLINE Vector<float> exp2_of_nonpositive(Vector<float> x) {
  using Bits = MaskVector<float>;
  const Vector<float> lowest = Vector<float>{} - 126.0f;
  const Vector<float> to_integer = Vector<float>{} + 0x1.8p23f;  // adding it rounds to an integer
  x = x < lowest ? lowest : x;
  const Vector<float> shifted = x + to_integer;
  const Vector<float> f = x - (shifted - to_integer);
  Vector<float> power = Vector<float>{} + 1.5403530e-4f;
  power = power * f + 1.3333558e-3f;
  power = power * f + 9.6181291e-3f;
  power = power * f + 5.5504109e-2f;
  power = power * f + 2.4022651e-1f;
  power = power * f + 6.9314718e-1f;
  power = power * f + 1.0f;
  return power * bit_cast<Vector<float>>((bit_cast<Bits>(shifted) << 23) + (127 << 23));
}

}  // namespace
}  // namespace viops
