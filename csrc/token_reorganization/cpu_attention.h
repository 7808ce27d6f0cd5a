// Softmax attention on the CPU; part of cpu.cpp.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/tile.h"
#include "token_reorganization/cpu_scores.h"

namespace viops::token_reorganization {
namespace {

// Query rows that are worked on at once: their logits stay in the second-level cache.
constexpr int64_t kQueryRows = 24;

// One head of one image, packed: k transposed, v with whole tiles of columns, and room for a stripe.
struct PackedHead {
  int64_t num_tokens, head_dim, columns, width;
  float* k_transposed;  // [D, columns], columns = N up to whole tiles, zero beyond N
  float* v;             // [N, width], width = D up to whole tiles, zero beyond D
  float* q;             // [kQueryRows, D]
  float* logits;        // [kQueryRows, columns]
  float* out;           // [kQueryRows, width]

  static int64_t whole_tiles(int64_t count) {
    return (count + kTileColumns - 1) / kTileColumns * kTileColumns;
  }

  static int64_t scratch_bytes(int64_t num_tokens, int64_t head_dim) {
    const int64_t columns = columns_for(num_tokens), width = whole_tiles(head_dim);
    const int64_t floats =
        head_dim * columns + num_tokens * width + kQueryRows * (padded(head_dim) + columns + width);
    return padded(floats * static_cast<int64_t>(sizeof(float)));
  }

  // One tile more where rows would lie half a page apart, in the same few sets of the first-level cache.
  static int64_t columns_for(int64_t num_tokens) {
    const int64_t columns = whole_tiles(num_tokens);
    return columns % 512 == 0 ? columns + kTileColumns : columns;
  }

  PackedHead(int64_t num_tokens, int64_t head_dim, char* memory)
      : num_tokens(num_tokens),
        head_dim(head_dim),
        columns(columns_for(num_tokens)),
        width(whole_tiles(head_dim)),
        k_transposed(reinterpret_cast<float*>(memory)),
        v(k_transposed + head_dim * columns),
        logits(v + num_tokens * width) {
    out = logits + kQueryRows * columns;
    q = out + kQueryRows * width;
  }

  void pack(const HeadRows<const float>& k_rows, const HeadRows<const float>& v_rows, int64_t b,
            int64_t h) const {
    constexpr int64_t block = 16;  // tokens whose values of one channel fill a cache line; divides a tile
    static_assert(kTileColumns % block == 0 || block % kTileColumns == 0);
    const int64_t stride_d = k_rows.stride_d;
    for (int64_t first = 0; first < columns; first += block) {
      const int64_t count = std::clamp<int64_t>(num_tokens - first, 0, block);
      const int64_t room = std::min(block, columns - first);
      for (int64_t d = 0; d < head_dim; ++d) {
        float* to = k_transposed + d * columns + first;
        for (int64_t i = 0; i < count; ++i) to[i] = k_rows.at(b, h, first + i)[d * stride_d];
        for (int64_t i = count; i < room; ++i) to[i] = 0.0f;
      }
    }
    for (int64_t n = 0; n < num_tokens; ++n) {
      const float* from = v_rows.at(b, h, n);
      float* to = v + n * width;
      for (int64_t d = 0; d < head_dim; ++d) to[d] = from[d * v_rows.stride_d];
      std::fill(to + head_dim, to + width, 0.0f);
    }
  }
};

// row [columns] of dot products -> numerators of the softmax over the first `count` of scale times them;
// gives their largest logit and their sum.
struct SoftmaxRow {
  float largest, sum;

  SoftmaxRow(float* row, int64_t count, int64_t columns, float scale) {
    constexpr float kLog2OfE = 1.44269504f;
    for (int64_t i = 0; i < columns; i += kLanes<float>) store<float>(row + i, load<float>(row + i) * scale);
    std::fill(row + count, row + columns, -INFINITY);
    Vector<float> most = load<float>(row);
    for (int64_t i = kLanes<float>; i < columns; i += kLanes<float>) {
      const Vector<float> logits = load<float>(row + i);
      most = most > logits ? most : logits;
    }
    largest = most[0];
    for (int i = 1; i < kLanes<float>; ++i) largest = std::max(largest, most[i]);
    Vector<float> total{};
    for (int64_t i = 0; i < columns; i += kLanes<float>) {
      const Vector<float> numerators = exp2_of_nonpositive((load<float>(row + i) - largest) * kLog2OfE);
      store<float>(row + i, numerators);
      total += numerators;
    }
    sum = sum_lanes(total);
  }
};

void attention_forward(const TensorView& q, const TensorView& k, const TensorView& v, double scale,
                       const TensorView& out, const TensorView& logsumexp) {
  const int64_t batch = q.shape[0], num_heads = q.shape[1], num_tokens = q.shape[2], head_dim = q.shape[3];
  const HeadRows<const float> q_rows(q), k_rows(k), v_rows(v);
  const HeadRows<float> out_rows(out);
  float* lse = static_cast<float*>(logsumexp.data);  // [B, H, N]

  const int64_t bytes = 4 * batch * num_heads * num_tokens * head_dim * static_cast<int64_t>(sizeof(float));
  const int64_t stripes = (num_tokens + kQueryRows - 1) / kQueryRows;
  // an item is a head, or a part of its query rows where heads are fewer than threads
  const Pieces pieces(batch * num_heads, stripes, bytes);
  pieces.for_each(PackedHead::scratch_bytes(num_tokens, head_dim), [&](int64_t item, int64_t piece,
                                                                       char* memory) {
    const int64_t b = item / num_heads, h = item % num_heads;
    const PackedHead head(num_tokens, head_dim, memory);
    head.pack(k_rows, v_rows, b, h);
    const int64_t end = std::min(num_tokens, stripes * (piece + 1) / pieces.per_image * kQueryRows);
    for (int64_t first = stripes * piece / pieces.per_image * kQueryRows; first < end; first += kQueryRows) {
      const int64_t rows = std::min(kQueryRows, end - first);
      for (int64_t m = 0; m < rows; ++m) {
        const float* from = q_rows.at(b, h, first + m);
        for (int64_t d = 0; d < head_dim; ++d) {
          head.q[m * head_dim + d] = from[d * q_rows.stride_d];
        }
      }
      multiply(rows, head.columns, head_dim, head.q, head_dim, head.k_transposed, head.columns, head.logits,
               head.columns);
      float factor[kQueryRows];
      for (int64_t m = 0; m < rows; ++m) {
        const SoftmaxRow row(head.logits + m * head.columns, num_tokens, head.columns,
                             static_cast<float>(scale));
        factor[m] = 1.0f / row.sum;
        lse[item * num_tokens + first + m] = row.largest + std::log(row.sum);
      }
      multiply(rows, head.width, num_tokens, head.logits, head.columns, head.v, head.width, head.out,
               head.width);
      for (int64_t m = 0; m < rows; ++m) {
        float* to = out_rows.at(b, h, first + m);
        for (int64_t d = 0; d < head_dim; ++d)
          to[d * out_rows.stride_d] = head.out[m * head.width + d] * factor[m];
      }
    }
  });
}

}  // namespace
}  // namespace viops::token_reorganization
