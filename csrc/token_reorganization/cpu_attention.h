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

int64_t whole_tiles(int64_t count) { return (count + kTileColumns - 1) / kTileColumns * kTileColumns; }

// The columns of a matrix that has one for each token.  One tile more where its rows would lie half a page
// apart, in the same few sets of the first-level cache.
int64_t token_columns(int64_t num_tokens) {
  const int64_t columns = whole_tiles(num_tokens);
  return columns % 512 == 0 ? columns + kTileColumns : columns;
}

// Hands out matrices from memory that holds `floats` for each of them.
struct MatrixMemory {
  float* next;

  static int64_t floats(int64_t rows, int64_t columns) {
    return padded(rows * columns * static_cast<int64_t>(sizeof(float))) / static_cast<int64_t>(sizeof(float));
  }

  explicit MatrixMemory(char* memory) : next(reinterpret_cast<float*>(memory)) {}

  float* take(int64_t rows, int64_t columns) {
    float* matrix = next;
    next += floats(rows, columns);
    return matrix;
  }
};

// Rows [first, first + count) of a head -> to [count, width], zero beyond D.
void pack_rows(const HeadRows<const float>& rows, int64_t b, int64_t h, int64_t first, int64_t count,
               float* to, int64_t width) {
  for (int64_t n = 0; n < count; ++n, to += width) {
    const float* from = rows.at(b, h, first + n);
    for (int64_t d = 0; d < rows.head_dim; ++d) to[d] = from[d * rows.stride_d];
    std::fill(to + rows.head_dim, to + width, 0.0f);
  }
}

// All N rows of a head -> to [D, columns], zero beyond N.
void pack_transposed(const HeadRows<const float>& rows, int64_t b, int64_t h, int64_t num_tokens, float* to,
                     int64_t columns) {
  constexpr int64_t kBlock = 16;  // tokens whose values of one channel fill a cache line
  for (int64_t first = 0; first < columns; first += kBlock) {
    const int64_t room = std::min(kBlock, columns - first);
    const int64_t count = std::clamp<int64_t>(num_tokens - first, 0, room);
    for (int64_t d = 0; d < rows.head_dim; ++d) {
      float* line = to + d * columns + first;
      for (int64_t i = 0; i < count; ++i) line[i] = rows.at(b, h, first + i)[d * rows.stride_d];
      for (int64_t i = count; i < room; ++i) line[i] = 0.0f;
    }
  }
}

// from [count, width] times a factor -> rows [first, first + count) of a head.
void unpack_rows(const float* from, int64_t width, const HeadRows<float>& rows, int64_t b, int64_t h,
                 int64_t first, int64_t count, const float* factors) {
  for (int64_t n = 0; n < count; ++n, from += width) {
    float* to = rows.at(b, h, first + n);
    const float factor = factors ? factors[n] : 1.0f;
    for (int64_t d = 0; d < rows.head_dim; ++d) to[d * rows.stride_d] = from[d] * factor;
  }
}

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

// Room for one head: k transposed and v, and a stripe of queries, logits and results.
int64_t attention_forward_bytes(int64_t num_tokens, int64_t head_dim) {
  const int64_t columns = token_columns(num_tokens), width = whole_tiles(head_dim);
  const auto floats = MatrixMemory::floats;
  return (floats(head_dim, columns) + floats(num_tokens, width) + floats(kQueryRows, columns) +
          2 * floats(kQueryRows, width)) *
         static_cast<int64_t>(sizeof(float));
}

void attention_forward(const TensorView& q, const TensorView& k, const TensorView& v, double scale,
                       const TensorView& out, const TensorView& logsumexp) {
  const int64_t batch = q.shape[0], num_heads = q.shape[1], num_tokens = q.shape[2], head_dim = q.shape[3];
  const int64_t columns = token_columns(num_tokens), width = whole_tiles(head_dim);
  const HeadRows<const float> q_rows(q), k_rows(k), v_rows(v);
  const HeadRows<float> out_rows(out);
  float* lse = static_cast<float*>(logsumexp.data);  // [B, H, N]

  const int64_t bytes = 4 * batch * num_heads * num_tokens * head_dim * static_cast<int64_t>(sizeof(float));
  const int64_t stripes = (num_tokens + kQueryRows - 1) / kQueryRows;
  // an item is a head, or a part of its query rows where heads are fewer than threads
  const Pieces pieces(batch * num_heads, stripes, bytes);
  pieces.for_each(attention_forward_bytes(num_tokens, head_dim), [&](int64_t item, int64_t piece,
                                                                     char* memory) {
    const int64_t b = item / num_heads, h = item % num_heads;
    MatrixMemory room(memory);
    float* k_transposed = room.take(head_dim, columns);
    float* v_packed = room.take(num_tokens, width);
    float* logits = room.take(kQueryRows, columns);
    float* q_stripe = room.take(kQueryRows, width);
    float* out_stripe = room.take(kQueryRows, width);
    pack_transposed(k_rows, b, h, num_tokens, k_transposed, columns);
    pack_rows(v_rows, b, h, 0, num_tokens, v_packed, width);

    const int64_t end = std::min(num_tokens, stripes * (piece + 1) / pieces.per_image * kQueryRows);
    for (int64_t first = stripes * piece / pieces.per_image * kQueryRows; first < end; first += kQueryRows) {
      const int64_t rows = std::min(kQueryRows, end - first);
      pack_rows(q_rows, b, h, first, rows, q_stripe, width);
      multiply<false>(rows, columns, head_dim, {q_stripe, width, 1}, k_transposed, columns, logits, columns);
      float factors[kQueryRows];
      for (int64_t m = 0; m < rows; ++m) {
        const SoftmaxRow row(logits + m * columns, num_tokens, columns, static_cast<float>(scale));
        factors[m] = 1.0f / row.sum;
        lse[item * num_tokens + first + m] = row.largest + std::log(row.sum);
      }
      multiply<false>(rows, width, num_tokens, {logits, columns, 1}, v_packed, width, out_stripe, width);
      unpack_rows(out_stripe, width, out_rows, b, h, first, rows, factors);
    }
  });
}

// logits [columns] and grad_attention [columns], both of one query row -> the row of the attention matrix and
// the gradient to the row's dot products, in their places.
void attention_gradient_row(float* logits, float* grad_attention, int64_t columns, float scale,
                            float logsumexp, float inner) {
  constexpr float kLog2OfE = 1.44269504f;
  for (int64_t i = 0; i < columns; i += kLanes<float>) {
    const Vector<float> attention =
        exp2_of_nonpositive((load<float>(logits + i) * scale - logsumexp) * kLog2OfE);
    store<float>(logits + i, attention);
    store<float>(grad_attention + i, attention * (load<float>(grad_attention + i) - inner) * scale);
  }
}

// Room for one head: k both ways, v transposed, the gradients to k and v, and a stripe of all else.
int64_t attention_backward_bytes(int64_t num_tokens, int64_t head_dim) {
  const int64_t columns = token_columns(num_tokens), width = whole_tiles(head_dim);
  const auto floats = MatrixMemory::floats;
  return (2 * floats(head_dim, columns) + 3 * floats(num_tokens, width) + 2 * floats(kQueryRows, columns) +
          3 * floats(kQueryRows, width)) *
         static_cast<int64_t>(sizeof(float));
}

void attention_backward(const TensorView& grad_out, const TensorView& q, const TensorView& k,
                        const TensorView& v, const TensorView& out, const TensorView& logsumexp, double scale,
                        const TensorView& grad_q, const TensorView& grad_k, const TensorView& grad_v) {
  const int64_t batch = q.shape[0], num_heads = q.shape[1], num_tokens = q.shape[2], head_dim = q.shape[3];
  const int64_t columns = token_columns(num_tokens), width = whole_tiles(head_dim);
  const HeadRows<const float> grad_out_rows(grad_out), q_rows(q), k_rows(k), v_rows(v), out_rows(out);
  const HeadRows<float> grad_q_rows(grad_q), grad_k_rows(grad_k), grad_v_rows(grad_v);
  const float* lse = static_cast<const float*>(logsumexp.data);  // [B, H, N]

  const int64_t bytes = 8 * batch * num_heads * num_tokens * head_dim * static_cast<int64_t>(sizeof(float));
  const Pieces heads(batch * num_heads, 1, bytes);
  heads.for_each(attention_backward_bytes(num_tokens, head_dim), [&](int64_t item, int64_t, char* memory) {
    const int64_t b = item / num_heads, h = item % num_heads;
    MatrixMemory room(memory);
    float* k_transposed = room.take(head_dim, columns);
    float* v_transposed = room.take(head_dim, columns);
    float* k_packed = room.take(num_tokens, width);
    float* k_gradient = room.take(num_tokens, width);
    float* v_gradient = room.take(num_tokens, width);
    float* attention = room.take(kQueryRows, columns);
    float* grad_logits = room.take(kQueryRows, columns);
    float* q_stripe = room.take(kQueryRows, width);
    float* grad_stripe = room.take(kQueryRows, width);
    float* result = room.take(kQueryRows, width);
    pack_transposed(k_rows, b, h, num_tokens, k_transposed, columns);
    pack_transposed(v_rows, b, h, num_tokens, v_transposed, columns);
    pack_rows(k_rows, b, h, 0, num_tokens, k_packed, width);
    std::fill(k_gradient, k_gradient + num_tokens * width, 0.0f);
    std::fill(v_gradient, v_gradient + num_tokens * width, 0.0f);

    for (int64_t first = 0; first < num_tokens; first += kQueryRows) {
      const int64_t rows = std::min(kQueryRows, num_tokens - first);
      pack_rows(q_rows, b, h, first, rows, q_stripe, width);
      pack_rows(grad_out_rows, b, h, first, rows, grad_stripe, width);
      pack_rows(out_rows, b, h, first, rows, result, width);
      multiply<false>(rows, columns, head_dim, {q_stripe, width, 1}, k_transposed, columns, attention,
                      columns);
      multiply<false>(rows, columns, head_dim, {grad_stripe, width, 1}, v_transposed, columns, grad_logits,
                      columns);
      for (int64_t m = 0; m < rows; ++m) {
        const float inner = dot_row(grad_stripe + m * width, result + m * width, head_dim);
        attention_gradient_row(attention + m * columns, grad_logits + m * columns, columns,
                               static_cast<float>(scale), lse[item * num_tokens + first + m], inner);
      }
      multiply<false>(rows, width, num_tokens, {grad_logits, columns, 1}, k_packed, width, result, width);
      unpack_rows(result, width, grad_q_rows, b, h, first, rows, nullptr);
      multiply<true>(num_tokens, width, rows, {grad_logits, 1, columns}, q_stripe, width, k_gradient, width);
      multiply<true>(num_tokens, width, rows, {attention, 1, columns}, grad_stripe, width, v_gradient, width);
    }
    unpack_rows(k_gradient, width, grad_k_rows, b, h, 0, num_tokens, nullptr);
    unpack_rows(v_gradient, width, grad_v_rows, b, h, 0, num_tokens, nullptr);
  });
}

}  // namespace
}  // namespace viops::token_reorganization
