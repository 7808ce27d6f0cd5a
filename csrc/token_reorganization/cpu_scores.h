// Class attention scores on the CPU; part of cpu.cpp.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "common/rows.h"
#include "token_reorganization/token_reorganization.h"

namespace viops::token_reorganization {
namespace {

// The rows [B, H, N][D] of a tensor, handed out contiguous: in place where D is, else copied.
template <class T>
struct HeadRows {
  T* data;
  int64_t stride_b, stride_h, stride_n, stride_d, head_dim;

  explicit HeadRows(const TensorView& view)
      : data(static_cast<T*>(view.data)),
        stride_b(view.stride[0]),
        stride_h(view.stride[1]),
        stride_n(view.stride[2]),
        stride_d(view.shape[3] > 1 ? view.stride[3] : 1),
        head_dim(view.shape[3]) {}

  VIOPS_INLINE T* at(int64_t b, int64_t h, int64_t n) const {
    return data + b * stride_b + h * stride_h + n * stride_n;
  }

  VIOPS_INLINE const T* get(int64_t b, int64_t h, int64_t n, std::remove_const_t<T>* buffer) const {
    const T* row = at(b, h, n);
    if (stride_d == 1) return row;
    for (int64_t d = 0; d < head_dim; ++d) buffer[d] = row[d * stride_d];
    return buffer;
  }

  // Copies a row that was made in a buffer to its place, where the place is not contiguous.
  VIOPS_INLINE void put(int64_t b, int64_t h, int64_t n, const T* buffer) const {
    T* row = at(b, h, n);
    for (int64_t d = 0; d < head_dim; ++d) row[d * stride_d] = buffer[d];
  }
};

template <class A>
void softmax(A* row, int64_t count) {
  A largest = row[0];
  for (int64_t i = 1; i < count; ++i) largest = std::max(largest, row[i]);
  A sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += row[i] = std::exp(row[i] - largest);
  for (int64_t i = 0; i < count; ++i) row[i] /= sum;
}

template <class T>
void scores_forward(const TensorView& q, const TensorView& k, double scale, const TensorView& scores,
                    const TensorView& probabilities) {
  using A = decltype(widen(T()));
  const int64_t batch = q.shape[0], num_heads = q.shape[1], num_tokens = q.shape[2], head_dim = q.shape[3];
  const int64_t num_patches = scores.shape[1], num_prefix = num_tokens - num_patches;
  const HeadRows<const T> q_rows(q), k_rows(k);
  A* p = static_cast<A*>(probabilities.data);  // [B, H, N]
  const int64_t query_bytes = padded(head_dim * sizeof(A)), buffer_bytes = padded(head_dim * sizeof(T));
  const int64_t bytes = batch * num_heads * num_tokens * head_dim * static_cast<int64_t>(sizeof(T));

  // memory order of a fused qkv projection has the heads of a token side by side
  const bool token_major = k_rows.stride_n >= k_rows.stride_h;
  const auto heads = [&](int64_t b, int64_t first, int64_t last, char* memory) {
    T* buffer = reinterpret_cast<T*>(memory + num_heads * query_bytes);
    const auto query = [&](int64_t h) { return reinterpret_cast<A*>(memory + h * query_bytes); };
    for (int64_t h = first; h < last; ++h) {
      widen_row(query(h), q_rows.get(b, h, 0, buffer), head_dim);
    }
    const auto logit = [&](int64_t h, int64_t n) {
      p[(b * num_heads + h) * num_tokens + n] =
          static_cast<A>(scale) * dot_row(k_rows.get(b, h, n, buffer), query(h), head_dim);
    };
    if (token_major) {
      for (int64_t n = 0; n < num_tokens; ++n) {
        for (int64_t h = first; h < last; ++h) logit(h, n);
      }
    } else {
      for (int64_t h = first; h < last; ++h) {
        for (int64_t n = 0; n < num_tokens; ++n) logit(h, n);
      }
    }
    for (int64_t h = first; h < last; ++h) softmax(p + (b * num_heads + h) * num_tokens, num_tokens);
  };
  const Pieces pieces(batch, num_heads, bytes);
  pieces.for_each(num_heads * query_bytes + buffer_bytes, [&](int64_t b, int64_t piece, char* memory) {
    heads(b, num_heads * piece / pieces.per_image, num_heads * (piece + 1) / pieces.per_image, memory);
  });

  float* out = static_cast<float*>(scores.data);  // [B, P]
  parallel_for(batch, pieces.threads, [&](int, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t i = 0; i < num_patches; ++i) {
        A sum = 0;
        for (int64_t h = 0; h < num_heads; ++h) sum += p[(b * num_heads + h) * num_tokens + num_prefix + i];
        out[b * num_patches + i] = static_cast<float>(sum / static_cast<A>(num_heads));
      }
    }
  });
}

template <class T>
void scores_backward(const TensorView& grad_scores, const TensorView& q, const TensorView& k,
                     const TensorView& probabilities, double scale, const TensorView& grad_q,
                     const TensorView& grad_k) {
  using A = decltype(widen(T()));
  const int64_t batch = q.shape[0], num_heads = q.shape[1], num_tokens = q.shape[2], head_dim = q.shape[3];
  const int64_t num_patches = grad_scores.shape[1], num_prefix = num_tokens - num_patches;
  const HeadRows<const T> q_rows(q), k_rows(k);
  const HeadRows<T> grad_q_rows(grad_q), grad_k_rows(grad_k);
  const A* p = static_cast<const A*>(probabilities.data);               // [B, H, N]
  const float* grad_out = static_cast<const float*>(grad_scores.data);  // [B, P]
  const int64_t row_bytes = padded(head_dim * sizeof(A)), buffer_bytes = padded(head_dim * sizeof(T));
  const int64_t logits_bytes = padded(num_tokens * sizeof(A));
  const int64_t bytes = 3 * batch * num_heads * num_tokens * head_dim * static_cast<int64_t>(sizeof(T));

  const auto heads = [&](int64_t b, int64_t first, int64_t last, char* memory) {
    A* query = reinterpret_cast<A*>(memory);                        // [D]
    A* grad_query = reinterpret_cast<A*>(memory + row_bytes);       // [D]
    A* grad_logits = reinterpret_cast<A*>(memory + 2 * row_bytes);  // [N]
    T* buffer = reinterpret_cast<T*>(memory + 2 * row_bytes + logits_bytes);
    for (int64_t h = first; h < last; ++h) {
      const A* row = p + (b * num_heads + h) * num_tokens;
      const auto grad_p = [&](int64_t n) {
        const int64_t i = n - num_prefix;
        if (i < 0) return A(0);
        return static_cast<A>(grad_out[b * grad_scores.stride[0] + i * grad_scores.stride[1]]) /
               static_cast<A>(num_heads);
      };
      A inner = 0;
      for (int64_t n = 0; n < num_tokens; ++n) inner += row[n] * grad_p(n);
      for (int64_t n = 0; n < num_tokens; ++n) {
        grad_logits[n] = row[n] * (grad_p(n) - inner) * static_cast<A>(scale);
      }
      widen_row(query, q_rows.get(b, h, 0, buffer), head_dim);
      for (int64_t n = 0; n < num_tokens; ++n) {
        const T* key = k_rows.get(b, h, n, buffer);
        add_rows(grad_query, n == 0, &key, grad_logits + n, 1, head_dim);
        T* out = grad_k_rows.stride_d == 1 ? grad_k_rows.at(b, h, n) : buffer;
        scale_row(out, query, grad_logits[n], head_dim);
        if (out == buffer) grad_k_rows.put(b, h, n, buffer);
      }
      narrow_row(buffer, grad_query, head_dim);
      grad_q_rows.put(b, h, 0, buffer);
      std::fill(buffer, buffer + head_dim, Narrow<T, A>::of(A(0)));
      for (int64_t n = 1; n < num_tokens; ++n) grad_q_rows.put(b, h, n, buffer);
    }
  };
  const Pieces pieces(batch, num_heads, bytes);
  pieces.for_each(2 * row_bytes + logits_bytes + buffer_bytes, [&](int64_t b, int64_t piece, char* memory) {
    heads(b, num_heads * piece / pieces.per_image, num_heads * (piece + 1) / pieces.per_image, memory);
  });
}

}  // namespace
}  // namespace viops::token_reorganization
