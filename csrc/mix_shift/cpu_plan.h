// How a call is cut: channels into blocks, images into stripes of rows, both among threads.
#pragma once

#include "mix_shift/cpu_image.h"

namespace viops::mix_shift {
namespace {

constexpr int64_t kPlaneSlabBytes = 16 << 10;  // of a plane's stripe: two of them stay in the first cache
constexpr int64_t kStripeBytes = 384 << 10;    // of all channels of a stripe: within the second cache
constexpr int64_t kLeastStripeRows = 4;
constexpr int64_t kStripePlaces = 4096;      // at most, so that no sum of float32 is too long
constexpr int64_t kStagedBytes = 64 << 10;   // of small planes side by side
constexpr int64_t kMoveTaps = kVectorBytes;  // in the time that brings a place in and out: measured

// A row of so many columns is vectors enough that what is left over at its end does not matter.
constexpr int64_t kWideColumns = 48;

// A piece of work: rows [first, first + rows) of image b, of one block or of all channels.
struct Item {
  int64_t index;
  const Block* block;
  int64_t b, first, rows;
  bool opens, closes;  // the block, for this thread
};

template <class A>
struct Plan {
  int64_t batch, channels, height, width;
  // Whether a block of an image is a piece of work, and not all channels of a stripe.
  bool by_blocks;
  // Whether planes, too small to be vectors row by row, are brought side by side before; then an image is one
  // stripe.  Else blocks of by_blocks are planes.
  bool staged;
  bool has_td;
  bool normed;  // a norm over all channels follows
  const Groups& groups;
  Block* blocks;
  int64_t num_blocks = 0;
  int64_t table_vectors = 0;  // of all blocks
  int64_t largest_kernel = 1;
  int64_t stripe_rows = 1, stripes = 1;
  int threads;

  // `memory` has room for a Block for each channel.
  Plan(const TensorView& x, const Groups& groups, bool has_td, bool normed, char* memory)
      : batch(x.shape[0]),
        channels(x.shape[1]),
        height(x.shape[2]),
        width(x.shape[3]),
        by_blocks(false),
        staged(false),
        has_td(has_td),
        normed(normed),
        groups(groups),
        blocks(reinterpret_cast<Block*>(memory)) {
    if (!normed && x.stride[3] == 1 && x.stride[1] != 1) {
      staged = width < kWideColumns && staged_elements() * static_cast<int64_t>(sizeof(A)) <= kStagedBytes;
      by_blocks = staged || fills_vectors(width);
    }
    const int64_t bytes = 2 * batch * channels * height * width * static_cast<int64_t>(sizeof(A));
    threads = bytes < kSerialBytes ? 1 : max_threads();
    for (int64_t g = 0; g < groups.count; ++g) deal(g);
    cut_stripes();
  }

  int64_t most_lanes() const { return by_blocks && !staged ? 1 : kLanes<A>; }
  int64_t staged_elements() const { return height * width * kLanes<A>; }
  int64_t out_row(const Block& block) const { return Slab<A>::row_of(width, block.lanes, 0); }
  // Elements of a slab and of a stripe's result, at most.
  int64_t slab_elements() const {
    const int64_t rows = stripe_rows + kMostTileRows - 1 + largest_kernel - 1;
    return rows * Slab<A>::row_of(width, most_lanes(), largest_kernel / 2) + kLanes<A>;
  }
  int64_t out_elements(int64_t rows) const {
    return rows * Slab<A>::row_of(width, most_lanes(), 0) + kLanes<A>;
  }
  int64_t stripe_elements() const { return out_elements(stripe_rows + kMostTileRows - 1); }

  // What comes next of blocks and of stripes, of T: its rows of x, and of y or null.
  template <class T>
  Ahead ahead_of_blocks(const Item& next, const TensorView& x, const TensorView* y) const {
    if (next.index >= num_blocks * batch * stripes) return {};
    return ahead<T>(next, x, y, next.block->count, 1);
  }
  template <class T>
  Ahead ahead_of_stripes(const Item& next, const TensorView& x, const TensorView* y) const {
    if (next.index >= batch * stripes) return {};
    return ahead<T>(next, x, y, channels, num_blocks);
  }

  // Calls work(part, item, next) for all, each thread's share block after block.  Shares take equally long:
  // groups with larger kernels have fewer pieces in theirs.
  template <class Work>
  void for_each_of_blocks(const Work& work) const {
    const int64_t per_block = batch * stripes;
    parallel_for(threads, threads, [&](int, int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        const int64_t begin = share_begin(part), end = share_begin(part + 1);
        if (begin == end) continue;
        Item item = item_of_stripes(begin % per_block);
        item.index = begin, item.block = &blocks[begin / per_block];
        for (item.opens = true; item.index < end;) {
          Item next = after(item);
          if (next.b == batch) next.b = 0, ++next.block, next.opens = true;
          item.closes = next.opens || next.index == end;
          work(static_cast<int>(part), item, next);
          item = next;
        }
      }
    });
  }

  // The same for stripes of all channels.
  template <class Work>
  void for_each_stripe(const Work& work) const {
    parallel_for(batch * stripes, threads, [&](int part, int64_t begin, int64_t end) {
      for (Item item = item_of_stripes(begin); item.index < end; item = after(item)) {
        work(part, item, after(item));
      }
    });
  }

 private:
  // Whether rows of so many columns leave at most a quarter of their vectors empty.
  static bool fills_vectors(int64_t columns) { return 4 * columns >= 3 * Slab<A>::whole(columns); }

  int64_t cost(const Block& block) const { return kMoveTaps + block.table(); }

  // The first piece of work of a thread's share.
  int64_t share_begin(int64_t part) const {
    int64_t all = 0;
    for (int64_t i = 0; i < num_blocks; ++i) all += cost(blocks[i]);
    // of all pieces' time, so much is before it: in `threads`-ths of a block's piece
    int64_t before = all * part, i = 0;
    for (; i < num_blocks && before >= cost(blocks[i]) * threads; ++i) before -= cost(blocks[i]) * threads;
    if (i == num_blocks) return num_blocks * batch * stripes;
    return i * batch * stripes + batch * stripes * before / (cost(blocks[i]) * threads);
  }

  void deal(int64_t g) {
    largest_kernel = std::max(largest_kernel, groups.kernel[g]);
    const int64_t right = wrapped(groups.shift[g], width), down = wrapped(groups.shift[g], height);
    const bool merged = has_td && right == 0 && down == 0;
    for (int64_t first = groups.begin(g), left = groups.end(g) - first; left > 0;) {
      const int64_t count = std::min(left, most_lanes());
      int64_t lanes = 1;
      while (lanes < count) lanes *= 2;
      Block& block = blocks[num_blocks++];
      block.first = first, block.count = count, block.lanes = lanes;
      block.group = g, block.kernel = groups.kernel[g];
      block.right = right, block.down = down;
      block.num_sources = has_td && !merged ? 2 : 1, block.merged = merged;
      block.tables = table_vectors;
      table_vectors += block.table();
      first += count, left -= count;
    }
  }

  void cut_stripes() {
    const int64_t size = sizeof(A);
    int64_t most;
    if (by_blocks) {
      const int64_t row = size * Slab<A>::row_of(width, 1, largest_kernel / 2);
      most = std::max<int64_t>(kMostTileRows, kPlaneSlabBytes / row - largest_kernel + 1);
    } else {
      most = std::max<int64_t>(kLeastStripeRows, kStripeBytes / (width * channels * size));
    }
    most = std::min(most, std::max(kLeastStripeRows, kStripePlaces / width));
    stripes = staged ? 1 : (height + most - 1) / most;
    if (!by_blocks && batch > 0 && batch * stripes < threads) {
      stripes = std::min((height + kLeastStripeRows - 1) / kLeastStripeRows, (threads + batch - 1) / batch);
    }
    stripe_rows = (height + stripes - 1) / stripes;
    stripes = (height + stripe_rows - 1) / stripe_rows;
  }

  Item item_of_stripes(int64_t index) const {
    const int64_t first = index % stripes * stripe_rows;
    return {index, nullptr, index / stripes, first, std::min(stripe_rows, height - first), false, false};
  }

  // The item that follows, of the same block.
  Item after(const Item& item) const {
    Item next = {item.index + 1, item.block, item.b, item.first + stripe_rows, 0, false, false};
    if (next.first >= height) next.first = 0, ++next.b;
    next.rows = std::min(stripe_rows, height - next.first);
    return next;
  }

  // `planes` of so many channels lie one after another, or are the channels of each place.
  template <class T>
  Ahead ahead(const Item& next, const TensorView& x, const TensorView* y, int64_t planes,
              int64_t rounds) const {
    const int64_t channel = next.block ? next.block->first : 0;
    const auto place = [&](const TensorView* view) -> const T* {
      if (!view) return nullptr;
      const int64_t row = next.block ? width : width * planes;
      const bool whole = view->stride[2] == row && (!staged || view->stride[1] == height * width);
      if (!whole) return nullptr;
      return static_cast<const T*>(view->data) + next.b * view->stride[0] + channel * view->stride[1] +
             next.first * view->stride[2];
    };
    const int64_t bytes = next.rows * width * planes * static_cast<int64_t>(sizeof(T));
    return Ahead(place(&x), place(y), bytes, rounds * ((next.rows + kMostTileRows - 1) / kMostTileRows));
  }
};

// A block's tables of taps, for each source [k columns][k rows][kLanes]; mirrored for the gradient to x.
template <class A>
void fill_table(const Plan<A>& plan, const Block& block, const Weights& weights, bool mirrored, A* table) {
  const int64_t k = block.kernel, taps = block.taps();
  const int64_t first =
      plan.groups.offset[block.group] + (block.first - plan.groups.begin(block.group)) * taps;
  const A* const lr = static_cast<const A*>(weights.lr.data) + first;
  const A* const td = weights.td ? static_cast<const A*>(weights.td->data) + first : nullptr;
  for (int s = 0; s < block.num_sources; ++s) {
    const A* const from = s == 0 ? lr : td;
    for (int64_t j = 0; j < k; ++j) {
      for (int64_t i = 0; i < k; ++i, table += kLanes<A>) {
        const int64_t tap = mirrored ? taps - 1 - (i * k + j) : i * k + j;
        const auto value = [&](int64_t c) {
          return block.merged ? lr[c * taps + tap] + td[c * taps + tap] : from[c * taps + tap];
        };
        if (block.lanes == 1) {
          store<A>(table, Vector<A>{} + value(0));
          continue;
        }
        for (int64_t c = 0; c < block.count; ++c) table[c] = value(c);
        for (int64_t c = block.count; c < block.lanes; ++c) table[c] = 0;
        for (int64_t lane = block.lanes; lane < kLanes<A>; ++lane) table[lane] = table[lane - block.lanes];
      }
    }
  }
}

// An image's channels of a block, side by side: from `memory` where they are brought there, else where they
// are.
template <class A, class T, class Use>
VIOPS_INLINE void with_staged(const Plan<A>& plan, const Block& block, const Channels<const T>& image,
                              A* memory, const Use& use) {
  if (!plan.staged) return use(image);
  const int64_t columns = plan.width, row = columns * block.lanes;
  if (image.row == columns * image.column) {
    load_columns<A, T>(image.data, image.column, image.channel, plan.height * columns, block.count,
                       block.lanes, memory);
  } else {
    for (int64_t h = 0; h < plan.height; ++h) {
      load_columns<A, T>(image.data + h * image.row, image.column, image.channel, columns, block.count,
                         block.lanes, memory + h * row);
    }
  }
  use(Channels<const A>(memory, 1, row, block.lanes));
}

// What all threads of a call read: the tables of all blocks, where they are used again and again, and zeros
// as wide as a row of channels_last images.
template <class A>
struct Shared {
  Scratch memory;
  A* tables;
  A* outside;

  Shared(const Plan<A>& plan, const Weights& weights, bool mirrored)
      : memory((plan.by_blocks ? 0 : (plan.table_vectors + 1) * kLanes<A> + plan.width * plan.channels) *
               sizeof(A)),
        tables(reinterpret_cast<A*>(memory.data())),
        outside(tables + plan.table_vectors * kLanes<A>) {
    if (plan.by_blocks) return;
    std::fill(outside, outside + plan.width * plan.channels + kLanes<A>, A(0));
    parallel_for(plan.num_blocks, plan.threads, [&](int, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        fill_table(plan, plan.blocks[i], weights, mirrored, tables + plan.blocks[i].tables * kLanes<A>);
      }
    });
  }

  const A* table(const Block& block) const { return tables + block.tables * kLanes<A>; }
};

}  // namespace
}  // namespace viops::mix_shift
