// Backward of decayed attention on the CPU; part of cpu.cpp.
#pragma once

#include "decayed_attention/cpu_forward.h"

namespace viops::decayed_attention {
namespace {

// What a line's backward takes beside the line, and gives.
template <class A>
struct LineGradients {
  Panels<const A> grad_out;  // [length][Dv]
  const A* logsumexp;        // [length]
  Panels<A> grad_q, grad_k;  // [length][D]
  Panels<A> grad_v;          // [length][Dv]
  bool add;                  // whether grad_q and grad_k are added to
};

// Where one block of queries is worked on: all keys at once, since what their softmax is normalised with, and
// what all of their gradients have in common, is summed anew; the results of forward are rounded.
template <class A>
struct GradientRoom {
  int64_t q_plane, grad_plane;
  A *q, *grad;                       // [D][lanes] and [Dv][lanes], a plane each panel
  Panels<A> attention, grad_logits;  // [keys][queries]

  GradientRoom(Memory& memory, int64_t length, int64_t head_dim, int64_t value_dim)
      : q_plane(num_panels<A>(head_dim) * kLanes<A> * kLanes<A>),
        grad_plane(num_panels<A>(value_dim) * kLanes<A> * kLanes<A>),
        q(memory.take<A>(kVectors * q_plane)),
        grad(memory.take<A>(kVectors * grad_plane)),
        attention(memory.take_panels<A>(length, kVectors * kLanes<A>)),
        grad_logits(memory.take_panels<A>(length, kVectors * kLanes<A>)) {}
};

// Of no use: what stands in where log_decay needs no gradient.
struct NoDistance {};

// numerators [keys][queries] -> attention, and gradients to it -> gradients to the logits; gives the sum of
// these times the distances.
template <class A, class Distance>
Vector<A> finish_gradients(A* attention, A* grad, int64_t keys, Vector<A> sum, Vector<A> delta,
                           const Distance& distance, int64_t panel) {
  const Vector<A> factor = A(1) / sum;
  delta *= factor;
  Vector<A> grad_decay{};
  for (int64_t i = 0; i < keys; ++i, attention += kLanes<A>, grad += kLanes<A>) {
    const Vector<A> probabilities = load<A>(attention) * factor;
    const Vector<A> grad_logits = probabilities * (load<A>(grad) - delta);
    store<A>(attention, probabilities);
    store<A>(grad, grad_logits);
    if constexpr (!std::is_same_v<Distance, NoDistance>) grad_decay += grad_logits * distance.at(i, panel);
  }
  return grad_decay;
}

// The lanes below `count`, and `other` in those beyond.
template <class A>
Vector<A> first_lanes(const A* from, int64_t count, A other) {
  A lanes[kLanes<A>];
  for (int i = 0; i < kLanes<A>; ++i) lanes[i] = i < count ? from[i] : other;
  return load<A>(lanes);
}

// c [keys][C] = (add: itself plus) a [keys][queries of kWidth panels] times b [queries][C].
template <int kWidth, class A>
void multiply_over_queries(Panels<const A> a, const Deal<A>& deal, int64_t first, Panels<const A> b,
                           Panels<A> c, int64_t channels, bool add) {
  const auto depth = [&](int64_t panel) { return deal.count(first + panel); };
  for_channel_panels<A>(channels, [&](auto width, int64_t panel) {
    for_tiles<width()>(deal.length, [&](auto rows, int64_t row, int64_t count) {
      product_over_queries_tile<rows(), width(), A>(a.rows_from(row), kWidth, depth, b.panels_from(panel),
                                                    c.rows_from(row).panels_from(panel), count, add);
    });
  });
}

// c [queries][C] = (add: itself plus) the transpose of a panel of a [keys][queries], times b [keys][C].
template <class A>
void multiply_over_keys(const A* a, int64_t keys, Panels<const A> b, Panels<A> c, int64_t queries,
                        int64_t channels, bool add) {
  for (int64_t key = 0; key < keys; key += kForwardKeys) {
    for_channel_panels<A>(channels, [&](auto width, int64_t panel) {
      for_tiles<width()>(queries, [&](auto rows, int64_t row, int64_t count) {
        transposed_product_tile<rows(), width(), A>(
            a + key * kLanes<A> + row, std::min(kForwardKeys, keys - key),
            b.rows_from(key).panels_from(panel), c.rows_from(row).panels_from(panel), count, add || key > 0,
            nullptr);
      });
    });
  }
}

// What the queries of panels [first, first + kWidth) of a line give; returns what they give for log_decay.
template <int kWidth, class A, class Decay, class Distance>
Vector<A> attend_back(const Line<A>& line, const LineGradients<A>& to, const Decay& decay,
                      const Distance& distance, int64_t first, const GradientRoom<A>& room) {
  const Deal<A>& deal = line.deal;
  constexpr A kZeros[kLanes<A>] = {};
  Vector<A> logsumexp[kWidth], sum[kWidth], delta[kWidth] = {};
  for (int v = 0; v < kWidth; ++v) {
    const int64_t query = deal.first(first + v), count = deal.count(first + v);
    pack_transposed<A>(line.q.rows_from(query), count, line.head_dim, room.q + v * room.q_plane);
    pack_transposed<A>(to.grad_out.rows_from(query), count, line.value_dim, room.grad + v * room.grad_plane);
    // spare lanes attend to nothing, and nothing is divided by 1
    logsumexp[v] = first_lanes<A>(to.logsumexp + query, count, A(1e30));
    sum[v] = first_lanes<A>(kZeros, count, A(1));
  }
  for_tiles<kWidth>(deal.length, [&](auto rows, int64_t row, int64_t count) {
    attention_tile<rows(), kWidth, A, Decay>(line.k, {room.q, room.q_plane}, line.head_dim, decay, row, count,
                                             logsumexp, room.attention.rows_from(row), sum);
    gradient_tile<rows(), kWidth, A>(line.v, {room.grad, room.grad_plane}, line.value_dim, row, count,
                                     room.attention.rows_from(row), room.grad_logits.rows_from(row), delta);
  });
  Vector<A> grad_decay{};
  for (int v = 0; v < kWidth; ++v) {
    grad_decay += finish_gradients<A>(room.attention.data + v * room.attention.plane,
                                      room.grad_logits.data + v * room.grad_logits.plane, deal.length, sum[v],
                                      delta[v], distance, v);
  }
  const int64_t query = deal.first(first);
  multiply_over_queries<kWidth, A>(room.attention, deal, first, to.grad_out.rows_from(query), to.grad_v,
                                   line.value_dim, first > 0);
  multiply_over_queries<kWidth, A>(room.grad_logits, deal, first, line.q.rows_from(query), to.grad_k,
                                   line.head_dim, to.add || first > 0);
  for (int v = 0; v < kWidth; ++v) {
    multiply_over_keys<A>(room.grad_logits.data + v * room.grad_logits.plane, deal.length, line.k,
                          to.grad_q.rows_from(deal.first(first + v)), deal.count(first + v), line.head_dim,
                          to.add);
  }
  return grad_decay;
}

template <class T>
class Backward {
 public:
  using A = decltype(widen(T()));

  Backward(const TensorView& grad_out, const Inputs& inputs, const TensorView& logsumexp,
           const TensorView* inner, const TensorView& grad_q, const TensorView& grad_k,
           const TensorView& grad_v, const TensorView* grad_log_decay)
      : inputs_(inputs),
        q_(inputs.q),
        k_(inputs.k),
        v_(inputs.v),
        grad_out_(grad_out),
        inner_(inner ? *inner : grad_out),
        grad_q_(grad_q),
        grad_k_(grad_k),
        grad_v_(grad_v),
        logsumexp_(static_cast<const A*>(logsumexp.data)),
        grad_log_decay_(grad_log_decay ? static_cast<A*>(grad_log_decay->data) : nullptr),
        num_heads_(inputs.q.shape[1]),
        height_(inputs.q.shape[2]),
        width_(inputs.q.shape[3]),
        longest_(inputs.axial ? std::max(height_, width_) : height_ * width_) {}

  void run() const {
    const int64_t heads = inputs_.q.shape[0] * num_heads_;
    const int64_t bytes =
        heads * height_ * width_ * 4 * (q_.channels + v_.channels) * static_cast<int64_t>(sizeof(T));
    Memory memory;
    Room(memory, *this);
    const Pieces pieces(heads, 1, bytes);
    pieces.for_each(memory.bytes(), [&](int64_t head, int64_t, char* data) {
      Memory own(data);
      const Room room(own, *this);
      const Place place = {head / num_heads_, head % num_heads_};
      const double grad = inputs_.axial ? split_head(place, room) : whole_head(place, room);
      if (grad_log_decay_) grad_log_decay_[head] = static_cast<A>(grad);
    });
  }

 private:
  struct Place {
    int64_t b, h;
  };

  // A head's q, k and their gradients, and where lines are worked on.
  struct Room {
    Panels<A> q, k, grad_q, grad_k;  // [h w][D]
    Panels<A> grad_inner;            // [h w][Dv]
    Panels<A> line_q, line_k, line_grad_q, line_grad_k;
    Panels<A> v, grad_out, grad_v;  // of a line
    A* logsumexp;
    GradientRoom<A> block;
    A *line_decay, *line_distance;
    A *row_decay, *column_decay, *row_distance, *column_distance;
    int32_t* places;

    Room(Memory& memory, const Backward& own)
        : q(memory.take_panels<A>(own.height_ * own.width_, own.q_.channels)),
          k(memory.take_panels<A>(own.height_ * own.width_, own.q_.channels)),
          grad_q(memory.take_panels<A>(own.height_ * own.width_, own.q_.channels)),
          grad_k(memory.take_panels<A>(own.height_ * own.width_, own.q_.channels)),
          grad_inner(
              memory.take_panels<A>(own.inputs_.axial ? own.height_ * own.width_ : 0, own.v_.channels)),
          line_q(memory.take_panels<A>(own.inputs_.axial ? own.height_ : 0, own.q_.channels)),
          line_k(memory.take_panels<A>(own.inputs_.axial ? own.height_ : 0, own.q_.channels)),
          line_grad_q(memory.take_panels<A>(own.inputs_.axial ? own.height_ : 0, own.q_.channels)),
          line_grad_k(memory.take_panels<A>(own.inputs_.axial ? own.height_ : 0, own.q_.channels)),
          v(memory.take_panels<A>(own.longest_, own.v_.channels)),
          grad_out(memory.take_panels<A>(own.longest_, own.v_.channels)),
          grad_v(memory.take_panels<A>(own.longest_, own.v_.channels)),
          logsumexp(memory.take<A>(own.longest_)),
          block(memory, own.longest_, own.q_.channels, own.v_.channels),
          line_decay(memory.take<A>(own.inputs_.axial ? LineDistance<A>::size(own.longest_) : 0)),
          line_distance(memory.take<A>(own.inputs_.axial ? LineDistance<A>::size(own.longest_) : 0)),
          row_decay(memory.take<A>(own.inputs_.axial ? 0 : own.height_ * GridDistance<A>::kRow)),
          column_decay(memory.take<A>(own.inputs_.axial ? 0 : own.width_ * GridDistance<A>::kRow)),
          row_distance(memory.take<A>(own.inputs_.axial ? 0 : own.height_ * GridDistance<A>::kRow)),
          column_distance(memory.take<A>(own.inputs_.axial ? 0 : own.width_ * GridDistance<A>::kRow)),
          places(memory.take<int32_t>(own.inputs_.axial ? 0 : 2 * (own.longest_ + kSpareRows))) {}
  };

  A log_decay(Place place) const {
    const TensorView& view = inputs_.log_decay;
    return static_cast<const A*>(view.data)[place.b * view.stride[0] + place.h * view.stride[1]];
  }

  // [h, w] of a pass.
  const A* logsumexp(Place place, int64_t pass) const {
    const int64_t passes = inputs_.axial ? 2 : 1;
    return logsumexp_ + ((place.b * passes + pass) * num_heads_ + place.h) * height_ * width_;
  }

  Rotation<A> rotation(Place place, int64_t y) const {
    if (!inputs_.sin) return {};
    return {Grid<const A>(*inputs_.sin).row(place.b, 0, y), Grid<const A>(*inputs_.cos).row(place.b, 0, y)};
  }

  void take_q_and_k(Place place, const Room& room) const {
    for (int64_t y = 0; y < height_; ++y) {
      const Rotation<A> turn = rotation(place, y);
      if (y + 1 < height_) {
        prefetch<false>(q_.row(place.b, place.h, y + 1), width_);
        prefetch<false>(k_.row(place.b, place.h, y + 1), width_);
      }
      pack_rotated<A>(q_.row(place.b, place.h, y), turn, A(1), width_, room.q.rows_from(y * width_));
      pack_rotated<A>(k_.row(place.b, place.h, y), turn, static_cast<A>(inputs_.scale), width_,
                      room.k.rows_from(y * width_));
    }
  }

  void put_row_of_q_and_k(Place place, int64_t y, const Room& room) const {
    const Rotation<A> turn = rotation(place, y);
    unpack_rotated_back<A>(room.grad_q.rows_from(y * width_), turn, A(1), width_,
                           grad_q_.row(place.b, place.h, y));
    unpack_rotated_back<A>(room.grad_k.rows_from(y * width_), turn, static_cast<A>(inputs_.scale), width_,
                           grad_k_.row(place.b, place.h, y));
  }

  // One axial line; gives the gradient to log_decay.
  double line_back(const Line<A>& line, const LineGradients<A>& to, const Room& room) const {
    const Deal<A>& deal = line.deal;
    double grad_decay = 0;
    for (int64_t panel = 0; panel < deal.panels; panel += kVectors) {
      const int64_t origin = longest_ + kSpareRows + deal.first(panel);
      const LineDistance<A> decay = {room.line_decay + origin, deal.lanes};
      const LineDistance<A> distance = {room.line_distance + origin, deal.lanes};
      grad_decay += block_back(line, to, decay, distance, panel, room);
    }
    return grad_decay;
  }

  template <class Distance>
  double block_back(const Line<A>& line, const LineGradients<A>& to, const Distance& decay,
                    const Distance& distance, int64_t panel, const Room& room) const {
    const bool whole = line.deal.panels - panel >= kVectors;
    if (grad_log_decay_) {
      return sum_lanes(whole ? attend_back<kVectors>(line, to, decay, distance, panel, room.block)
                             : attend_back<1>(line, to, decay, distance, panel, room.block));
    }
    whole ? attend_back<kVectors>(line, to, decay, NoDistance(), panel, room.block)
          : attend_back<1>(line, to, decay, NoDistance(), panel, room.block);
    return 0;
  }

  double split_head(Place place, const Room& room) const {
    LineDistance<A>::fill(room.line_decay, longest_, log_decay(place), 0);
    LineDistance<A>::fill(room.line_distance, longest_, A(1), 0);
    take_q_and_k(place, room);
    double grad_decay = 0;
    for (int64_t x = 0; x < width_; ++x) grad_decay += column_back(place, x, room);
    for (int64_t y = 0; y < height_; ++y) grad_decay += row_back(place, y, room);
    return grad_decay;
  }

  double column_back(Place place, int64_t x, const Room& room) const {
    if (x + 1 < width_) {
      prefetch<false>(inner_.column(place.b, place.h, x + 1), height_);
      prefetch<false>(grad_out_.column(place.b, place.h, x + 1), height_);
    }
    copy_rows<A>(room.q.rows_from(x), width_, room.line_q, 1, height_, q_.channels);
    copy_rows<A>(room.k.rows_from(x), width_, room.line_k, 1, height_, q_.channels);
    pack<A>(inner_.column(place.b, place.h, x), height_, room.v);
    pack<A>(grad_out_.column(place.b, place.h, x), height_, room.grad_out);
    const A* lse = logsumexp(place, 1);
    for (int64_t y = 0; y < height_; ++y) room.logsumexp[y] = lse[y * width_ + x];
    const double grad_decay = line_back(
        {room.line_q, room.line_k, room.v, q_.channels, v_.channels, Deal<A>(height_)},
        {room.grad_out, room.logsumexp, room.line_grad_q, room.line_grad_k, room.grad_v, false}, room);
    copy_rows<A>(room.line_grad_q, 1, room.grad_q.rows_from(x), width_, height_, q_.channels);
    copy_rows<A>(room.line_grad_k, 1, room.grad_k.rows_from(x), width_, height_, q_.channels);
    copy_rows<A>(room.grad_v, 1, room.grad_inner.rows_from(x), width_, height_, v_.channels);
    return grad_decay;
  }

  double row_back(Place place, int64_t y, const Room& room) const {
    const int64_t first = y * width_;
    const Panels<A> grad_inner = room.grad_inner.rows_from(first);
    if (y + 1 < height_) prefetch<false>(v_.row(place.b, place.h, y + 1), width_);
    prefetch<true>(grad_q_.row(place.b, place.h, y), width_);
    prefetch<true>(grad_k_.row(place.b, place.h, y), width_);
    prefetch<true>(grad_v_.row(place.b, place.h, y), width_);
    pack<A>(v_.row(place.b, place.h, y), width_, room.v);
    const double grad_decay = line_back(
        {room.q.rows_from(first), room.k.rows_from(first), room.v, q_.channels, v_.channels, Deal<A>(width_)},
        {grad_inner, logsumexp(place, 0) + first, room.grad_q.rows_from(first), room.grad_k.rows_from(first),
         room.grad_v, true},
        room);
    unpack<A>(room.grad_v, width_, grad_v_.row(place.b, place.h, y));
    put_row_of_q_and_k(place, y, room);
    return grad_decay;
  }

  double whole_head(Place place, const Room& room) const {
    const int64_t tokens = height_ * width_;
    GridDistance<A>::fill_places(room.places, height_, width_);
    take_q_and_k(place, room);
    for (int64_t y = 0; y < height_; ++y) {
      pack<A>(v_.row(place.b, place.h, y), width_, room.v.rows_from(y * width_));
      pack<A>(grad_out_.row(place.b, place.h, y), width_, room.grad_out.rows_from(y * width_));
    }
    const Line<A> line = {room.q, room.k, room.v, q_.channels, v_.channels, Deal<A>(tokens)};
    const LineGradients<A> to = {room.grad_out, logsumexp(place, 0), room.grad_q,
                                 room.grad_k,   room.grad_v,         false};
    double grad_decay = 0;
    for (int64_t panel = 0; panel < line.deal.panels; panel += kVectors) {
      const int64_t first = line.deal.first(panel), lanes = line.deal.lanes;
      GridDistance<A>::fill(room.row_decay, room.column_decay, height_, width_, log_decay(place), first,
                            lanes);
      GridDistance<A>::fill(room.row_distance, room.column_distance, height_, width_, A(1), first, lanes);
      const GridDistance<A> decay = {room.row_decay, room.column_decay, room.places};
      const GridDistance<A> distance = {room.row_distance, room.column_distance, room.places};
      grad_decay += block_back(line, to, decay, distance, panel, room);
    }
    for (int64_t y = 0; y < height_; ++y) {
      unpack<A>(room.grad_v.rows_from(y * width_), width_, grad_v_.row(place.b, place.h, y));
      put_row_of_q_and_k(place, y, room);
    }
    return grad_decay;
  }

  const Inputs& inputs_;
  const Grid<const T> q_, k_, v_, grad_out_, inner_;
  const Grid<T> grad_q_, grad_k_, grad_v_;
  const A* logsumexp_;
  A* grad_log_decay_;
  const int64_t num_heads_, height_, width_, longest_;
};

}  // namespace
}  // namespace viops::decayed_attention
