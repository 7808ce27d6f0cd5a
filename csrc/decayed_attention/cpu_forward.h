// Forward of decayed attention on the CPU; part of cpu.cpp.
#pragma once

#include <limits>

#include "decayed_attention/cpu_lines.h"

namespace viops::decayed_attention {
namespace {

// Calls at(Width<V>, c) for the panels of so many channels, V of them from channel c on.
template <int kWidth>
using Width = std::integral_constant<int, kWidth>;

template <class A, class At>
VIOPS_INLINE void for_channel_panels(int64_t channels, const At& at) {
  int64_t panel = 0;
  const int64_t panels = num_panels<A>(channels);
  for (; panel + kVectors <= panels; panel += kVectors) at(Width<kVectors>(), panel);
  for (; panel < panels; ++panel) at(Width<1>(), panel);
}

// Tokens that attend to each other.
template <class A>
struct Line {
  Panels<const A> q, k;  // [length][D], turned, k times the scale
  Panels<const A> v;     // [length][Dv]
  int64_t head_dim, value_dim;
  Deal<A> deal;
};

// Keys whose logits are held at once: those of a block of queries stay in the first-level cache.
constexpr int64_t kForwardKeys = 14 * 16;

// Where one block of queries is worked on.
template <class A>
struct BlockRoom {
  A* q;  // [D][lanes], a plane each panel
  int64_t q_plane;
  Panels<A> logits = {nullptr, 0};  // [keys][queries]
  A* factors;                       // [kVectors][kLanes]

  BlockRoom(Memory& memory, int64_t head_dim) : q_plane(num_panels<A>(head_dim) * kLanes<A> * kLanes<A>) {
    q = memory.take<A>(kVectors * q_plane);
    logits = memory.take_panels<A>(kForwardKeys, kVectors * kLanes<A>);
    factors = memory.take<A>(kVectors * kLanes<A>);
  }
};

// logits [keys][queries] -> numerators of the softmax with these largest logits; adds their sums.
template <int kWidth, class A>
void exponentiate(Panels<A> logits, int64_t keys, const Vector<A>* most, Vector<A>* sum) {
  for (int v = 0; v < kWidth; ++v) {
    A* row = logits.data + v * logits.plane;
    const Vector<A> largest = most[v];
    Vector<A> total = sum[v];
    for (int64_t i = 0; i < keys; ++i, row += kLanes<A>) {
      const Vector<A> numerators = exp2_of_nonpositive((load<A>(row) - largest) * static_cast<A>(kLog2OfE));
      store<A>(row, numerators);
      total += numerators;
    }
    sum[v] = total;
  }
}

// Rows of out [queries][Dv], times the factors of their lanes.
template <class A>
void scale_rows(Panels<A> out, int64_t count, int64_t channels, const A* factors) {
  for (int64_t c = 0; c < channels; c += kLanes<A>, out.data += out.plane) {
    for (int64_t i = 0; i < count; ++i) store<A>(out.row(i), factors[i] * load<A>(out.row(i)));
  }
}

// The queries of panels [first, first + kWidth) of a line -> out [queries][Dv], their rows from 0 on, and
// logsumexp [queries], of which lanes beyond the last are written too.
template <int kWidth, class A, class Decay>
void attend(const Line<A>& line, const Decay& decay, int64_t first, const BlockRoom<A>& room, Panels<A> out,
            A* logsumexp) {
  const Deal<A>& deal = line.deal;
  for (int v = 0; v < kWidth; ++v) {
    pack_transposed<A>(line.q.rows_from(deal.first(first + v)), deal.count(first + v), line.head_dim,
                       room.q + v * room.q_plane);
  }
  Vector<A> most[kWidth], sum[kWidth] = {};
  for (int v = 0; v < kWidth; ++v) most[v] = Vector<A>{} + std::numeric_limits<A>::lowest();
  for (int64_t key = 0; key < line.deal.length; key += kForwardKeys) {
    const int64_t keys = std::min(kForwardKeys, line.deal.length - key);
    const bool is_first = key == 0, is_last = key + keys == line.deal.length;
    Vector<A> raised[kWidth];
    for (int v = 0; v < kWidth; ++v) raised[v] = most[v];
    for_tiles<kWidth>(keys, [&](auto rows, int64_t row, int64_t count) {
      logit_tile<rows(), kWidth, A, Decay>(line.k, {room.q, room.q_plane}, line.head_dim, decay, key + row,
                                           count, room.logits.rows_from(row), raised);
    });
    for (int v = 0; v < kWidth; ++v) {
      const Vector<A> shrink = exp2_of_nonpositive((most[v] - raised[v]) * static_cast<A>(kLog2OfE));
      most[v] = raised[v];
      if (is_first) continue;
      sum[v] *= shrink;
      store<A>(room.factors, shrink);
      scale_rows<A>(out.rows_from(v * deal.lanes), deal.count(first + v), line.value_dim, room.factors);
    }
    exponentiate<kWidth, A>(room.logits, keys, most, sum);
    for (int v = 0; v < kWidth; ++v) {
      store<A>(room.factors, A(1) / sum[v]);
      for_channel_panels<A>(line.value_dim, [&](auto width, int64_t panel) {
        for_tiles<width()>(deal.count(first + v), [&](auto rows, int64_t row, int64_t count) {
          transposed_product_tile<rows(), width(), A>(
              room.logits.data + v * room.logits.plane + row, keys, line.v.rows_from(key).panels_from(panel),
              out.rows_from(v * deal.lanes + row).panels_from(panel), count, !is_first,
              is_last ? room.factors + row : nullptr);
        });
      });
    }
  }
  for (int v = 0; v < kWidth; ++v) store<A>(logsumexp + v * deal.lanes, most[v] + log_of_positive(sum[v]));
}

// All panels of one block, of which the line may have fewer than the block.
template <class A, class Decay>
void attend_block(const Line<A>& line, const Decay& decay, int64_t first, const BlockRoom<A>& room,
                  Panels<A> out, A* logsumexp) {
  if (line.deal.panels - first >= kVectors) {
    attend<kVectors>(line, decay, first, room, out, logsumexp);
  } else {
    attend<1>(line, decay, first, room, out, logsumexp);
  }
}

// What stays of a head from one pass to the next.
template <class A>
struct HeadRoom {
  Panels<A> q, k, v;  // [h w][D], [h w][Dv]: v, or axially what the rows gave

  HeadRoom(Memory& memory, int64_t tokens, int64_t head_dim, int64_t value_dim)
      : q(memory.take_panels<A>(tokens, head_dim)),
        k(memory.take_panels<A>(tokens, head_dim)),
        v(memory.take_panels<A>(tokens, value_dim)) {}
};

template <class T>
class Forward {
 public:
  using A = decltype(widen(T()));

  Forward(const Inputs& inputs, const TensorView& out, const TensorView* logsumexp, const TensorView* inner)
      : inputs_(inputs),
        q_(inputs.q),
        k_(inputs.k),
        v_(inputs.v),
        out_(out),
        inner_(inner ? *inner : out),
        keeps_inner_(inner != nullptr),
        logsumexp_(logsumexp ? static_cast<A*>(logsumexp->data) : nullptr),
        num_heads_(inputs.q.shape[1]),
        height_(inputs.q.shape[2]),
        width_(inputs.q.shape[3]),
        longest_(inputs.axial ? std::max(height_, width_) : height_ * width_) {}

  void run() const {
    const int64_t heads = inputs_.q.shape[0] * num_heads_, tokens = height_ * width_;
    if (heads == 0) return;
    const int64_t bytes = heads * tokens * 2 * (q_.channels + v_.channels) * static_cast<int64_t>(sizeof(T));
    const int threads = bytes < kSerialBytes ? 1 : max_threads();
    Memory head_memory, line_memory;
    HeadRoom<A>(head_memory, tokens, q_.channels, v_.channels);
    LineRoom(line_memory, *this);
    const int64_t head_bytes = head_memory.bytes(), line_bytes = line_memory.bytes();
    const int64_t parts = inputs_.axial ? width_ : Deal<A>(tokens).blocks();

    // heads are dealt to threads whole where they suffice, else in two rounds, of rows and of the rest
    const bool whole_heads = heads >= threads;
    const Scratch memory((whole_heads ? threads : heads) * head_bytes + threads * line_bytes);
    char* line_rooms = memory.data() + (whole_heads ? threads : heads) * head_bytes;
    const auto work = [&](int64_t head, char* head_data, char* line_data, int64_t row, int64_t rows,
                          int64_t part, int64_t last, bool another_follows) {
      Memory own(head_data), other(line_data);
      const HeadRoom<A> head_room(own, tokens, q_.channels, v_.channels);
      const LineRoom line_room(other, *this);
      const Place place = place_of(head);
      line_room.begin_head(*this, place);
      for (; row < rows; ++row) take_row(place, row, head_room, line_room);
      for (; part < last; ++part) {
        if (another_follows) prefetch_share(place_of(head + 1), part, parts);
        inputs_.axial ? attend_column(place, part, head_room, line_room)
                      : attend_grid(place, part, head_room, line_room);
      }
    };
    if (whole_heads) {
      parallel_for(heads, threads, [&](int thread, int64_t begin, int64_t end) {
        for (int64_t head = begin; head < end; ++head) {
          work(head, memory.data() + thread * head_bytes, line_rooms + thread * line_bytes, 0, height_, 0,
               parts, head + 1 < end);
        }
      });
      return;
    }
    parallel_for(heads * height_, threads, [&](int thread, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / height_, row = i % height_;
        work(head, memory.data() + head * head_bytes, line_rooms + thread * line_bytes, row, row + 1, 0, 0,
             false);
      }
    });
    parallel_for(heads * parts, threads, [&](int thread, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / parts, part = i % parts;
        work(head, memory.data() + head * head_bytes, line_rooms + thread * line_bytes, 0, 0, part, part + 1,
             false);
      }
    });
  }

 private:
  struct Place {
    int64_t b, h;
  };

  Place place_of(int64_t head) const { return {head / num_heads_, head % num_heads_}; }

  // Starts loading a part of a head: the memory is idle while the tokens before it attend.
  void prefetch_share(Place place, int64_t part, int64_t parts) const {
    for (int64_t y = part * height_ / parts; y < (part + 1) * height_ / parts; ++y) {
      prefetch_far(q_.row(place.b, place.h, y), width_);
      prefetch_far(k_.row(place.b, place.h, y), width_);
      prefetch_far(v_.row(place.b, place.h, y), width_);
    }
  }

  // Where lines are worked on, and the decays of a head.
  struct LineRoom {
    Panels<A> q, k, v, out;  // of a row or column; out of a block where the line is the whole grid
    A* logsumexp;
    BlockRoom<A> block;
    A* line_decay;
    A *row_decay, *column_decay;
    int32_t* places;

    LineRoom(Memory& memory, const Forward& own)
        : q(memory.take_panels<A>(own.inputs_.axial ? own.longest_ : 0, own.q_.channels)),
          k(memory.take_panels<A>(own.inputs_.axial ? own.longest_ : 0, own.q_.channels)),
          v(memory.take_panels<A>(own.inputs_.axial ? own.longest_ : 0, own.v_.channels)),
          out(memory.take_panels<A>(own.inputs_.axial ? own.longest_ : kVectors * kLanes<A>,
                                    own.v_.channels)),
          logsumexp(memory.take<A>((own.inputs_.axial ? own.longest_ : 0) + 2 * kVectors * kLanes<A>)),
          block(memory, own.q_.channels),
          line_decay(memory.take<A>(own.inputs_.axial ? LineDistance<A>::size(own.longest_) : 0)),
          row_decay(memory.take<A>(own.inputs_.axial ? 0 : own.height_ * GridDistance<A>::kRow)),
          column_decay(memory.take<A>(own.inputs_.axial ? 0 : own.width_ * GridDistance<A>::kRow)),
          places(memory.take<int32_t>(own.inputs_.axial ? 0 : 2 * (own.longest_ + kSpareRows))) {}

    void begin_head(const Forward& own, Place place) const {
      if (own.inputs_.axial) {
        LineDistance<A>::fill(line_decay, own.longest_, own.log_decay(place), 0);
      } else {
        GridDistance<A>::fill_places(places, own.height_, own.width_);
      }
    }
  };

  A log_decay(Place place) const {
    const TensorView& view = inputs_.log_decay;
    return static_cast<const A*>(view.data)[place.b * view.stride[0] + place.h * view.stride[1]];
  }

  // [h, w] of a pass; not where there is none.
  A* logsumexp(Place place, int64_t pass) const {
    const int64_t passes = inputs_.axial ? 2 : 1;
    return logsumexp_ + ((place.b * passes + pass) * num_heads_ + place.h) * height_ * width_;
  }

  Rotation<A> rotation(Place place, int64_t y) const {
    if (!inputs_.sin) return {};
    return {Grid<const A>(*inputs_.sin).row(place.b, 0, y), Grid<const A>(*inputs_.cos).row(place.b, 0, y)};
  }

  // Packs row y, and lets it attend within itself where the grid is split.
  void take_row(Place place, int64_t y, const HeadRoom<A>& head, const LineRoom& room) const {
    const int64_t first = y * width_;
    const Rotation<A> turn = rotation(place, y);
    if (y + 1 < height_) {
      prefetch<false>(q_.row(place.b, place.h, y + 1), width_);
      prefetch<false>(k_.row(place.b, place.h, y + 1), width_);
      prefetch<false>(v_.row(place.b, place.h, y + 1), width_);
    }
    if (keeps_inner_) prefetch<true>(inner_.row(place.b, place.h, y), width_);
    pack_rotated<A>(q_.row(place.b, place.h, y), turn, A(1), width_, head.q.rows_from(first));
    pack_rotated<A>(k_.row(place.b, place.h, y), turn, static_cast<A>(inputs_.scale), width_,
                    head.k.rows_from(first));
    if (!inputs_.axial) return pack<A>(v_.row(place.b, place.h, y), width_, head.v.rows_from(first));
    pack<A>(v_.row(place.b, place.h, y), width_, room.v);
    attend_line(
        {head.q.rows_from(first), head.k.rows_from(first), room.v, q_.channels, v_.channels, Deal<A>(width_)},
        room, head.v.rows_from(first));
    if (logsumexp_) std::copy_n(room.logsumexp, width_, logsumexp(place, 0) + first);
    if (keeps_inner_) unpack<A>(head.v.rows_from(first), width_, inner_.row(place.b, place.h, y));
  }

  void attend_column(Place place, int64_t x, const HeadRoom<A>& head, const LineRoom& room) const {
    prefetch<true>(out_.column(place.b, place.h, x), height_);
    copy_rows<A>(head.q.rows_from(x), width_, room.q, 1, height_, q_.channels);
    copy_rows<A>(head.k.rows_from(x), width_, room.k, 1, height_, q_.channels);
    copy_rows<A>(head.v.rows_from(x), width_, room.v, 1, height_, v_.channels);
    attend_line({room.q, room.k, room.v, q_.channels, v_.channels, Deal<A>(height_)}, room, room.out);
    if (logsumexp_) {
      A* lse = logsumexp(place, 1);
      for (int64_t y = 0; y < height_; ++y) lse[y * width_ + x] = room.logsumexp[y];
    }
    unpack<A>(room.out, height_, out_.column(place.b, place.h, x));
  }

  // A row or column -> out [length][Dv] and room.logsumexp.
  void attend_line(const Line<A>& line, const LineRoom& room, Panels<A> out) const {
    const Deal<A>& deal = line.deal;
    for (int64_t panel = 0; panel < deal.panels; panel += kVectors) {
      const int64_t first = deal.first(panel);
      const LineDistance<A> decay = {room.line_decay + longest_ + kSpareRows + first, deal.lanes};
      attend_block(line, decay, panel, room.block, out.rows_from(first), room.logsumexp + first);
    }
  }

  // A block of queries of the whole grid.
  void attend_grid(Place place, int64_t block, const HeadRoom<A>& head, const LineRoom& room) const {
    const Line<A> line = {head.q, head.k, head.v, q_.channels, v_.channels, Deal<A>(height_ * width_)};
    const int64_t panel = block * kVectors, first = line.deal.first(panel);
    GridDistance<A>::fill(room.row_decay, room.column_decay, height_, width_, log_decay(place), first,
                          line.deal.lanes);
    const GridDistance<A> decay = {room.row_decay, room.column_decay, room.places};
    attend_block(line, decay, panel, room.block, room.out, room.logsumexp);
    const int64_t end = std::min(line.deal.length, line.deal.first(panel + kVectors));
    if (logsumexp_) std::copy_n(room.logsumexp, end - first, logsumexp(place, 0) + first);
    for (int64_t n = first; n < end;) {
      const int64_t x = n % width_, count = std::min(width_ - x, end - n);
      Tokens<T> row = out_.row(place.b, place.h, n / width_);
      row.data += x * row.step;
      unpack<A>(room.out.rows_from(n - first), count, row);
      n += count;
    }
  }

  const Inputs& inputs_;
  const Grid<const T> q_, k_, v_;
  const Grid<T> out_, inner_;
  const bool keeps_inner_;
  A* logsumexp_;
  const int64_t num_heads_, height_, width_, longest_;
};

}  // namespace
}  // namespace viops::decayed_attention
