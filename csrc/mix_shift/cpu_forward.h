// u = both directions of a block's stripe, and y: u itself or its layer norm.
#pragma once

#include <cmath>

#include "mix_shift/cpu_direct.h"

namespace viops::mix_shift {
namespace {

// A thread's memory for mixing.
template <class A>
struct Room {
  A* slabs[2];
  A* out;
  A* bias;           // [kLanes]
  A* table;          // of one block
  A* staged;         // planes side by side
  const A* outside;  // zeros, of all threads

  static int64_t elements(const Plan<A>& plan) {
    return 2 * plan.slab_elements() + plan.out_elements(kMostTileRows) +
           (2 + 2 * plan.largest_kernel * plan.largest_kernel) * kLanes<A> +
           (plan.staged ? plan.staged_elements() : 0);
  }
  Room(const Plan<A>& plan, A* memory, const A* outside)
      : slabs{memory, memory + plan.slab_elements()},
        out(slabs[1] + plan.slab_elements()),
        bias(out + plan.out_elements(kMostTileRows)),
        table(bias + kLanes<A>),
        staged(table + 2 * plan.largest_kernel * plan.largest_kernel * kLanes<A>),
        outside(outside) {}
};

// Rows of a block, from [rows][plan.out_row(block)] to rows [first, first + rows).
template <class A, class T>
void store_block(const Plan<A>& plan, const Block& block, const A* out, int64_t first, int64_t rows,
                 const Channels<T>& to) {
  const int64_t row = plan.out_row(block), columns = plan.width;
  T* const begin = to.data + first * to.row;
  if (row == columns * block.lanes && to.row == columns * to.column) {
    return store_columns<A, T>(out, rows * columns, block.count, block.lanes, begin, to.column, to.channel);
  }
  for (int64_t r = 0; r < rows; ++r) {
    store_columns<A, T>(out + r * row, columns, block.count, block.lanes, begin + r * to.row, to.column,
                        to.channel);
  }
}

// u of rows [first, first + rows) of a block, to `to`, whose row 0 is that of `first`.
template <class A, class T, class U>
void mix_block(const Plan<A>& plan, const Block& block, const Channels<const T>& image, const A* bias,
               const A* table, int64_t first, int64_t rows, const Channels<U>& to, const Room<A>& room,
               Ahead& ahead) {
  Vector<A> of_lanes = {};
  for (int64_t c = 0; bias && c < block.count; ++c) {
    for (int64_t lane = c; lane < kLanes<A>; lane += block.lanes) of_lanes[lane] = bias[block.first + c];
  }
  store<A>(room.bias, of_lanes);
  const int64_t right = block.right, down = block.down;
  if constexpr (std::is_same_v<T, A> && std::is_same_v<U, A>) {
    if (is_direct(plan, block, image, to)) {
      const auto sources = [&](int64_t done, Rolled* rolled) {
        rolled[0] = {first + done, 0, 0, right};
        rolled[1] = {first + done, down, 0, 0};
        return rows;
      };
      return convolve_in_place(plan, block, image, room.bias, table, room.outside, rows, to, ahead, sources);
    }
  }
  const int64_t k = block.kernel, margin = k / 2;
  Tile<A> tile = {};
  tile.num_sources = block.num_sources;
  for (int s = 0; s < tile.num_sources; ++s) {
    Slab<A> slab(room.slabs[s], plan.width, block.lanes, margin);
    slab.load(image, block.count, plan.height, first - margin, rows + k - 1, s == 0 ? 0 : down,
              s == 0 ? right : 0);
    tile.sources[s] = {slab.rows(), table + s * k * k * kLanes<A>};
    tile.row = slab.row;
  }
  tile.kernel = k, tile.lanes = block.lanes;
  tile.out_row = plan.out_row(block), tile.vectors = tile.out_row / kLanes<A>;
  tile.bias = room.bias, tile.out = room.out;
  convolve(tile, rows, ahead, [&](int64_t done, int64_t count) {
    store_block(plan, block, room.out, done, count, to);
    return 0;  // each tile is in the same place
  });
}

// Mean and 1 / sqrt(var + eps) of a place's channels.
template <class A>
struct Moments {
  A mean, rstd;

  Moments(const A* values, int64_t channels, A eps) {
    Vector<A> sums = {};
    int64_t c = 0;
    for (; c + kLanes<A> <= channels; c += kLanes<A>) sums += load<A>(values + c);
    A sum = sum_lanes(sums);
    for (; c < channels; ++c) sum += values[c];
    mean = sum / static_cast<A>(channels);
    Vector<A> squares = {};
    for (c = 0; c + kLanes<A> <= channels; c += kLanes<A>) {
      const Vector<A> distance = load<A>(values + c) - mean;
      squares += distance * distance;
    }
    A square = sum_lanes(squares);
    for (; c < channels; ++c) square += (values[c] - mean) * (values[c] - mean);
    rstd = 1 / std::sqrt(square / static_cast<A>(channels) + eps);
  }
};

template <class A, class T>
void normalise(const A* values, const Moments<A>& moments, const A* weight, const A* bias, int64_t channels,
               T* y) {
  int64_t c = 0;
  for (; c + kLanes<A> <= channels; c += kLanes<A>) {
    const Vector<A> z = (load<A>(values + c) - moments.mean) * moments.rstd * load<A>(weight + c);
    store<A>(y + c, bias ? z + load<A>(bias + c) : z);
  }
  for (; c < channels; ++c) {
    const A z = (values[c] - moments.mean) * moments.rstd * weight[c];
    y[c] = Narrow<T, A>::of(bias ? z + bias[c] : z);
  }
}

// u of all blocks of a stripe, [rows][W][C].
template <class A, class T>
void mix_stripe(const Plan<A>& plan, const TensorView& x, const Item& item, const A* bias,
                const Shared<A>& shared, const Room<A>& room, Ahead& ahead, A* u) {
  const Channels<A> to(u, 1, plan.width * plan.channels, plan.channels);
  for (int64_t i = 0; i < plan.num_blocks; ++i) {
    const Block& block = plan.blocks[i];
    mix_block(plan, block, Channels<const T>(x, item.b, block.first), bias, shared.table(block), item.first,
              item.rows, to.from(block.first), room, ahead);
  }
}

template <class T>
void forward_of(const TensorView& x, const Weights& weights, const Groups& groups, const Norm* norm,
                const TensorView& y) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const Scratch blocks(x.shape[1] * static_cast<int64_t>(sizeof(Block)));
  const Plan<A> plan(x, groups, weights.td != nullptr, norm != nullptr, blocks.data());
  const A* const bias = weights.bias ? static_cast<const A*>(weights.bias->data) : nullptr;
  const int64_t u_elements = norm ? plan.stripe_rows * plan.width * plan.channels : 0;
  const int64_t of_thread = padded((Room<A>::elements(plan) + u_elements) * sizeof(A)) / sizeof(A);
  const Shared<A> shared(plan, weights, false);
  const Scratch memory(plan.threads * of_thread * sizeof(A));
  A* const rooms = reinterpret_cast<A*>(memory.data());
  const auto mix = [&](const Room<A>& room, const Item& item, const Block& block, const A* table,
                       Ahead& ahead) {
    const Channels<const T> image(x, item.b, block.first);
    const Channels<T> to = Channels<T>(y, item.b, block.first).below(item.first);
    with_staged(plan, block, image, room.staged, [&](const auto& staged) {
      mix_block(plan, block, staged, bias, table, item.first, item.rows, to, room, ahead);
    });
  };
  if (plan.by_blocks) {
    return plan.for_each_of_blocks([&](int part, const Item& item, const Item& next) {
      const Room<A> room(plan, rooms + part * of_thread, shared.outside);
      if (item.opens) fill_table(plan, *item.block, weights, false, room.table);
      Ahead ahead = plan.template ahead_of_blocks<T>(next, x, &y);
      mix(room, item, *item.block, room.table, ahead);
    });
  }
  plan.for_each_stripe([&](int part, const Item& item, const Item& next) {
    const Room<A> room(plan, rooms + part * of_thread, shared.outside);
    Ahead ahead = plan.template ahead_of_stripes<T>(next, x, norm ? nullptr : &y);
    if (!norm) {
      for (int64_t i = 0; i < plan.num_blocks; ++i) {
        mix(room, item, plan.blocks[i], shared.table(plan.blocks[i]), ahead);
      }
      return;
    }
    A* const u = rooms + part * of_thread + Room<A>::elements(plan);
    mix_stripe<A, T>(plan, x, item, bias, shared, room, ahead, u);
    const A* const weight = static_cast<const A*>(norm->weight.data);
    const A* const norm_bias = norm->bias ? static_cast<const A*>(norm->bias->data) : nullptr;
    const int64_t places = item.rows * plan.width;
    T* const to = static_cast<T*>(y.data) + (item.b * plan.height + item.first) * plan.width * plan.channels;
    for (int64_t place = 0; place < places; ++place) {
      const A* const values = u + place * plan.channels;
      const Moments<A> moments(values, plan.channels, static_cast<A>(norm->eps));
      normalise(values, moments, weight, norm_bias, plan.channels, to + place * plan.channels);
    }
  });
}

}  // namespace
}  // namespace viops::mix_shift
