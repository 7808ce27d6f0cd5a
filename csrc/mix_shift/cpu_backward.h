// The gradients: through the layer norm, to x, and to filters and biases.
#pragma once

#include "mix_shift/cpu_forward.h"

namespace viops::mix_shift {
namespace {

constexpr int64_t kSummedPlaces = 64;  // of a row, and rows, whose sums are held by themselves
constexpr int64_t kSummedRows = 32;

// Gradient of a place through the norm: grad_u, and what the place adds to those of weight and bias.
template <class A, class T>
void norm_place(const A* values, const A* grads, const A* weight, int64_t channels, A eps, T* grad_u,
                A* grad_weight, A* grad_bias) {
  const Moments<A> moments(values, channels, eps);
  const A share = 1 / static_cast<A>(channels);
  Vector<A> sums = {}, products = {};
  A sum = 0, product = 0;
  int64_t c = 0;
  for (; c + kLanes<A> <= channels; c += kLanes<A>) {
    const Vector<A> z = (load<A>(values + c) - moments.mean) * moments.rstd, grad = load<A>(grads + c);
    const Vector<A> scaled = grad * load<A>(weight + c);
    sums += scaled, products += scaled * z;
    store<A>(grad_weight + c, load<A>(grad_weight + c) + grad * z);
    store<A>(grad_bias + c, load<A>(grad_bias + c) + grad);
  }
  for (; c < channels; ++c) {
    const A z = (values[c] - moments.mean) * moments.rstd, scaled = grads[c] * weight[c];
    sum += scaled, product += scaled * z;
    grad_weight[c] += grads[c] * z, grad_bias[c] += grads[c];
  }
  const A mean = (sum + sum_lanes(sums)) * share, slant = (product + sum_lanes(products)) * share;
  for (c = 0; c + kLanes<A> <= channels; c += kLanes<A>) {
    const Vector<A> z = (load<A>(values + c) - moments.mean) * moments.rstd;
    store<A>(grad_u + c, (load<A>(grads + c) * load<A>(weight + c) - mean - z * slant) * moments.rstd);
  }
  for (; c < channels; ++c) {
    const A z = (values[c] - moments.mean) * moments.rstd;
    grad_u[c] = Narrow<T, A>::of((grads[c] * weight[c] - mean - z * slant) * moments.rstd);
  }
}

// A row of all channels -> [W][C].
template <class A, class T>
void load_places(const T* from, int64_t column, int64_t channel, int64_t columns, int64_t channels, A* to) {
  if (channel == 1) {
    for (int64_t w = 0; w < columns; ++w) widen_row(to + w * channels, from + w * column, channels);
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t w = 0; w < columns; ++w) {
      to[w * channels + c] = static_cast<A>(widen(from[w * column + c * channel]));
    }
  }
}

// to[i] += from[i]
template <class A>
void add_values(A* to, const A* from, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) store<A>(to + i, load<A>(to + i) + load<A>(from + i));
  for (; i < count; ++i) to[i] += from[i];
}

template <class T>
void norm_backward_of(const TensorView& grad_y, const TensorView& x, const Weights& weights,
                      const Groups& groups, const Norm& norm, const TensorView& grad_u,
                      const TensorView& grad_norm_weight, const TensorView& grad_norm_bias) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const Scratch blocks(x.shape[1] * static_cast<int64_t>(sizeof(Block)));
  const Plan<A> plan(x, groups, weights.td != nullptr, true, blocks.data());
  const int64_t channels = plan.channels, row = plan.width * channels;
  const A* const bias = weights.bias ? static_cast<const A*>(weights.bias->data) : nullptr;
  // a thread has: a room, u of a stripe, a row of grad_y, and sums of its own, of the stripe and of a few
  // places, so that none has many terms, [2, C] each
  const int64_t of_thread =
      padded((Room<A>::elements(plan) + (plan.stripe_rows + 1) * row + 6 * channels) * sizeof(A)) / sizeof(A);
  const Shared<A> shared(plan, weights, false);
  const Scratch memory(plan.threads * of_thread * sizeof(A));
  A* const rooms = reinterpret_cast<A*>(memory.data());
  const int64_t sums_place = Room<A>::elements(plan) + (plan.stripe_rows + 1) * row;
  for (int part = 0; part < plan.threads; ++part) {
    A* const sums = rooms + part * of_thread + sums_place;
    std::fill(sums, sums + 2 * channels, A(0));
  }
  plan.for_each_stripe([&](int part, const Item& item, const Item& next) {
    A* const mine = rooms + part * of_thread;
    const Room<A> room(plan, mine, shared.outside);
    A* const u = mine + Room<A>::elements(plan);
    A* const grads = u + plan.stripe_rows * row;
    A* const sums = mine + sums_place;
    A* const of_stripe = sums + 2 * channels;
    A* const of_places = of_stripe + 2 * channels;
    Ahead ahead = plan.template ahead_of_stripes<T>(next, x, nullptr);
    mix_stripe<A, T>(plan, x, item, bias, shared, room, ahead, u);
    std::fill(of_stripe, of_stripe + 2 * channels, A(0));
    const Channels<const T> from(grad_y, item.b, 0);
    T* to = static_cast<T*>(grad_u.data) + (item.b * plan.height + item.first) * row;
    for (int64_t r = 0; r < item.rows; ++r) {
      load_places<A, T>(from.data + (item.first + r) * from.row, from.column, from.channel, plan.width,
                        channels, grads);
      for (int64_t begin = 0; begin < plan.width; begin += kSummedPlaces) {
        const int64_t end = std::min(plan.width, begin + kSummedPlaces);
        std::fill(of_places, of_places + 2 * channels, A(0));
        for (int64_t w = begin; w < end; ++w, to += channels) {
          norm_place(u + r * row + w * channels, grads + w * channels,
                     static_cast<const A*>(norm.weight.data), channels, static_cast<A>(norm.eps), to,
                     of_places, of_places + channels);
        }
        add_values(of_stripe, of_places, 2 * channels);
      }
    }
    add_values(sums, of_stripe, 2 * channels);
  });
  A* const to_weight = static_cast<A*>(grad_norm_weight.data);
  A* const to_bias = static_cast<A*>(grad_norm_bias.data);
  std::fill(to_weight, to_weight + channels, A(0));
  std::fill(to_bias, to_bias + channels, A(0));
  for (int part = 0; part < plan.threads; ++part) {
    const A* const sums = rooms + part * of_thread + sums_place;
    add_values(to_weight, sums, channels);
    add_values(to_bias, sums + channels, channels);
  }
}

// A thread's memory for the gradient to x: both directions' results of a stripe.
template <class A>
struct SpreadRoom : Room<A> {
  A* along;
  A* across;

  static int64_t elements(const Plan<A>& plan) {
    return Room<A>::elements(plan) + 2 * plan.stripe_elements();
  }
  SpreadRoom(const Plan<A>& plan, A* memory, const A* outside)
      : Room<A>(plan, memory, outside),
        along(memory + Room<A>::elements(plan)),
        across(along + plan.stripe_elements()) {}
};

// Rows [first, first + rows) of grad_x of a block, to `to`, whose row 0 is that of `first`.
template <class A, class T, class U>
void spread_block(const Plan<A>& plan, const Block& block, const Channels<const T>& image, const A* table,
                  int64_t first, int64_t rows, const Channels<U>& to, const SpreadRoom<A>& room,
                  Ahead& ahead) {
  const int64_t k = block.kernel, margin = k / 2;
  const int64_t right = block.right, down = block.down;
  std::fill(room.bias, room.bias + kLanes<A>, A(0));
  if constexpr (std::is_same_v<T, A> && std::is_same_v<U, A>) {
    if (is_direct(plan, block, image, to)) {
      const auto sources = [&](int64_t done, Rolled* rolled) {
        const int64_t from = wrapped(first + done + down, plan.height);
        rolled[0] = {first + done, 0, right, 0};
        rolled[1] = {from, 0, 0, 0};
        return plan.height - from;  // the next row is made at the image's other end
      };
      return convolve_in_place(plan, block, image, room.bias, table, room.outside, rows, to, ahead, sources);
    }
  }
  Slab<A> slab(room.slabs[0], plan.width, block.lanes, margin);
  Tile<A> tile = {};
  tile.num_sources = 1, tile.kernel = k, tile.row = slab.row, tile.lanes = block.lanes;
  tile.out_row = plan.out_row(block), tile.vectors = tile.out_row / kLanes<A>;
  tile.bias = room.bias;
  const bool two = block.num_sources == 2;
  // rolled along W in the forward: each row is convolved where it lies, and rolled back afterwards
  slab.load(image, block.count, plan.height, first - margin, rows + k - 1, 0, 0);
  tile.sources[0] = {slab.rows(), table};
  tile.out = two || right ? room.across : room.along;
  const auto next_rows = [](int64_t, int64_t count) { return count; };
  convolve(tile, rows, ahead, next_rows);
  if (!two && !right) return store_block(plan, block, room.along, 0, rows, to);
  // along H: rows that were rolled round the image's end are convolved apart from the others
  for (int64_t done = 0; two && done < rows;) {
    const int64_t from = wrapped(first + done + down, plan.height);
    const int64_t count = std::min(rows - done, plan.height - from);
    slab.load(image, block.count, plan.height, from - margin, count + k - 1, 0, 0);
    tile.sources[0].taps = table + k * k * kLanes<A>;
    tile.sources[0].rows = slab.rows();
    tile.out = room.along + done * tile.out_row;
    convolve(tile, count, ahead, next_rows);
    done += count;
  }
  const int64_t seam = (plan.width - right) * block.lanes, turned = right * block.lanes;
  for (int64_t r = 0; r < rows; ++r) {
    A* const out = room.along + r * tile.out_row;
    const A* const across = room.across + r * tile.out_row;
    if (!two) std::fill(out, out + tile.out_row, A(0));
    add_values(out, across + turned, seam);
    add_values(out + seam, across, turned);
  }
  store_block(plan, block, room.along, 0, rows, to);
}

template <class T>
void input_gradient_of(const TensorView& grad_u, const Weights& weights, const Groups& groups,
                       const TensorView& grad_x) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const Scratch blocks(grad_u.shape[1] * static_cast<int64_t>(sizeof(Block)));
  const Plan<A> plan(grad_u, groups, weights.td != nullptr, false, blocks.data());
  const int64_t of_thread = padded(SpreadRoom<A>::elements(plan) * sizeof(A)) / sizeof(A);
  const Shared<A> shared(plan, weights, true);
  const Scratch memory(plan.threads * of_thread * sizeof(A));
  A* const rooms = reinterpret_cast<A*>(memory.data());
  const auto spread = [&](const SpreadRoom<A>& room, const Item& item, const Block& block, const A* table,
                          Ahead& ahead) {
    const Channels<const T> image(grad_u, item.b, block.first);
    const Channels<T> to = Channels<T>(grad_x, item.b, block.first).below(item.first);
    with_staged(plan, block, image, room.staged, [&](const auto& staged) {
      spread_block(plan, block, staged, table, item.first, item.rows, to, room, ahead);
    });
  };
  if (plan.by_blocks) {
    return plan.for_each_of_blocks([&](int part, const Item& item, const Item& next) {
      const SpreadRoom<A> room(plan, rooms + part * of_thread, shared.outside);
      if (item.opens) fill_table(plan, *item.block, weights, true, room.table);
      Ahead ahead = plan.template ahead_of_blocks<T>(next, grad_u, &grad_x);
      spread(room, item, *item.block, room.table, ahead);
    });
  }
  plan.for_each_stripe([&](int part, const Item& item, const Item& next) {
    const SpreadRoom<A> room(plan, rooms + part * of_thread, shared.outside);
    Ahead ahead = plan.template ahead_of_stripes<T>(next, grad_u, &grad_x);
    for (int64_t i = 0; i < plan.num_blocks; ++i) {
      spread(room, item, plan.blocks[i], shared.table(plan.blocks[i]), ahead);
    }
  });
}

// A thread's sums of the gradients to filters and biases.
template <class A>
struct FilterSums {
  A* slab;
  A* grads;
  A* lanes;   // by lane, of one block or of all: tables of taps, then [blocks][kLanes] of biases
  A* totals;  // [2 K + C]: of both directions and of the biases
  A* staged[2];

  static int64_t lane_elements(const Plan<A>& plan) {
    const int64_t one = 2 * plan.largest_kernel * plan.largest_kernel;
    return (plan.by_blocks ? one + 1 : plan.table_vectors + plan.num_blocks) * kLanes<A>;
  }
  static int64_t total_elements(const Plan<A>& plan) {
    return 2 * plan.groups.offset[plan.groups.count] + plan.channels;
  }
  static int64_t elements(const Plan<A>& plan) {
    const int64_t staged = plan.staged ? 2 * (plan.staged_elements() + kLanes<A>) : 0;
    return plan.slab_elements() + plan.stripe_elements() + lane_elements(plan) + total_elements(plan) +
           staged;
  }
  FilterSums(const Plan<A>& plan, A* memory)
      : slab(memory),
        grads(slab + plan.slab_elements()),
        lanes(grads + plan.stripe_elements()),
        totals(lanes + lane_elements(plan)),
        staged{totals + total_elements(plan),
               totals + total_elements(plan) + plan.staged_elements() + kLanes<A>} {}
};

// Adds what a stripe of a block gives to its sums by lane: `taps` as its tables, bias [kLanes].
template <class A, class T, class U>
void sum_block(const Plan<A>& plan, const Block& block, const Channels<const T>& image,
               const Channels<const U>& grad_image, int64_t first, int64_t rows, const FilterSums<A>& room,
               A* taps, A* bias, Ahead& ahead) {
  const int64_t k = block.kernel, margin = k / 2, read = summed_rows(rows);
  const int64_t grad_row = plan.out_row(block);
  Slab<A> grads(room.grads, plan.width, block.lanes, 0);
  grads.load(grad_image, block.count, plan.height, first, rows, 0, 0);
  grads.zero_rows(rows, read);
  Vector<A> sum = {};
  for (int64_t begin = 0; begin < rows; begin += kSummedRows) {
    Vector<A> of_rows = {};
    for (int64_t r = begin; r < std::min(rows, begin + kSummedRows); ++r) {
      if (r % kMostTileRows == 0) ahead.step();
      Vector<A> of_row = {};
      for (int64_t i = 0; i < grad_row; i += kLanes<A>) of_row += load<A>(grads.data + r * grad_row + i);
      of_rows += of_row;
    }
    sum += of_rows;
  }
  store<A>(bias, load<A>(bias) + sum);
  Slab<A> slab(room.slab, plan.width, block.lanes, margin);
  for (int s = 0; s < block.num_sources; ++s, taps += k * k * kLanes<A>) {
    slab.load(image, block.count, plan.height, first - margin, rows + k - 1, s == 0 ? 0 : block.down,
              s == 0 ? block.right : 0);
    slab.zero_rows(rows + k - 1, read + k - 1);
    const TapSums<A> sums = {slab.rows(), grads.data,           k,   slab.row, grad_row,
                             block.lanes, grad_row / kLanes<A>, taps};
    sum_taps(sums, rows);
  }
}

// The lanes of one channel.
template <class A>
A sum_channel(const A* lanes, int64_t channel, int64_t step) {
  if (step == 1) return sum_lanes(load<A>(lanes));
  A sum = 0;
  for (int64_t lane = channel; lane < kLanes<A>; lane += step) sum += lanes[lane];
  return sum;
}

// Adds a block's sums by lane to a thread's totals.
template <class A>
void gather_block(const Plan<A>& plan, const Block& block, const A* taps, const A* bias, A* totals) {
  const int64_t k = block.kernel, size = plan.groups.offset[plan.groups.count];
  const int64_t first =
      plan.groups.offset[block.group] + (block.first - plan.groups.begin(block.group)) * k * k;
  for (int s = 0; s < block.num_sources; ++s) {
    for (int64_t j = 0; j < k; ++j) {
      for (int64_t i = 0; i < k; ++i, taps += kLanes<A>) {
        for (int64_t c = 0; c < block.count; ++c) {
          const A sum = sum_channel(taps, c, block.lanes);
          const int64_t place = first + c * k * k + i * k + j;
          totals[s * size + place] += sum;
          if (block.merged) totals[size + place] += sum;
        }
      }
    }
  }
  for (int64_t c = 0; c < block.count; ++c) {
    totals[2 * size + block.first + c] += sum_channel(bias, c, block.lanes);
  }
}

template <class T>
void weight_gradient_of(const TensorView& grad_u, const TensorView& x, const Groups& groups,
                        const TensorView& grad_lr, const TensorView* grad_td, const TensorView* grad_bias) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const Scratch blocks(x.shape[1] * static_cast<int64_t>(sizeof(Block)));
  const Plan<A> plan(x, groups, grad_td != nullptr, false, blocks.data());
  const int64_t of_thread = padded(FilterSums<A>::elements(plan) * sizeof(A)) / sizeof(A);
  const Scratch memory(plan.threads * of_thread * sizeof(A));
  A* const rooms = reinterpret_cast<A*>(memory.data());
  const int64_t of_lanes = FilterSums<A>::lane_elements(plan),
                of_totals = FilterSums<A>::total_elements(plan);
  for (int part = 0; part < plan.threads; ++part) {
    const FilterSums<A> room(plan, rooms + part * of_thread);
    std::fill(room.lanes, room.lanes + of_lanes + of_totals, A(0));
  }
  const auto sum = [&](const FilterSums<A>& room, const Item& item, const Block& block, A* taps, A* bias,
                       Ahead& ahead) {
    const Channels<const T> image(x, item.b, block.first), grad_image(grad_u, item.b, block.first);
    with_staged(plan, block, image, room.staged[0], [&](const auto& staged) {
      with_staged(plan, block, grad_image, room.staged[1], [&](const auto& staged_grad) {
        sum_block(plan, block, staged, staged_grad, item.first, item.rows, room, taps, bias, ahead);
      });
    });
  };
  if (plan.by_blocks) {
    plan.for_each_of_blocks([&](int part, const Item& item, const Item& next) {
      const FilterSums<A> room(plan, rooms + part * of_thread);
      A* const bias = room.lanes + item.block->table() * kLanes<A>;
      Ahead ahead = plan.template ahead_of_blocks<T>(next, x, &grad_u);
      sum(room, item, *item.block, room.lanes, bias, ahead);
      if (!item.closes) return;
      gather_block(plan, *item.block, room.lanes, bias, room.totals);
      std::fill(room.lanes, bias + kLanes<A>, A(0));
    });
  } else {
    const auto taps_of = [&](const FilterSums<A>& room, int64_t i) {
      return room.lanes + plan.blocks[i].tables * kLanes<A>;
    };
    const auto bias_of = [&](const FilterSums<A>& room, int64_t i) {
      return room.lanes + (plan.table_vectors + i) * kLanes<A>;
    };
    plan.for_each_stripe([&](int part, const Item& item, const Item& next) {
      const FilterSums<A> room(plan, rooms + part * of_thread);
      Ahead ahead = plan.template ahead_of_stripes<T>(next, x, &grad_u);
      for (int64_t i = 0; i < plan.num_blocks; ++i) {
        sum(room, item, plan.blocks[i], taps_of(room, i), bias_of(room, i), ahead);
      }
    });
    parallel_for(plan.num_blocks, plan.threads, [&](int, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        for (int part = 0; part < plan.threads; ++part) {
          const FilterSums<A> room(plan, rooms + part * of_thread);
          gather_block(plan, plan.blocks[i], taps_of(room, i), bias_of(room, i), room.totals);
        }
      }
    });
  }
  const int64_t size = groups.offset[groups.count];
  const auto add_up = [&](const TensorView& to_, int64_t place, int64_t count) {
    A* const to = static_cast<A*>(to_.data);
    std::fill(to, to + count, A(0));
    for (int part = 0; part < plan.threads; ++part) {
      add_values(to, FilterSums<A>(plan, rooms + part * of_thread).totals + place, count);
    }
  };
  add_up(grad_lr, 0, size);
  if (grad_td) add_up(*grad_td, size, size);
  if (grad_bias) add_up(*grad_bias, 2 * size, plan.channels);
}

}  // namespace
}  // namespace viops::mix_shift
