// Batch channel norm on the CPU; built once a CPU level.
//
// Forward and backward each read all values for sums of planes, have a moment with groups, and walk the
// values again, backwards: those read last are still in a cache.  Planes are cut into pieces by their size
// alone, so that no result depends on threads, nor an image's own sums on the batch.
#include <algorithm>
#include <type_traits>

#include "batch_channel_norm/batch_channel_norm.h"
#include "batch_channel_norm/cpu_groups.h"

namespace viops::batch_channel_norm {
namespace {

// Of a plane, which stays in the first-level cache; less where vectors are short, and sums long.
constexpr int64_t kPieceBytes = kLanes<float> < 8 ? 4 << 10 : 16 << 10;
constexpr int64_t kWidthBytes = 2 << 10;     // of the channels of a place that are worked on together
constexpr int64_t kPlacesBytes = 128 << 10;  // of the places that one thread takes
constexpr int64_t kLeastPlaces = 64;         // so that their sums are small beside them
constexpr int64_t kCachedBytes = 16 << 10;   // of the places that are read twice
constexpr int64_t kPlacesAhead = 4;          // that are loaded before they are written
constexpr int64_t kGradientPlaces = 64;      // whose sums are held in A
constexpr int64_t kSerialPlanes = 512;       // groups of fewer are one thread's

// The start of the whole cache lines in a call's memory, which has one to spare.
char* whole_lines(const Scratch& memory) {
  return memory.data() + (kCacheLine - reinterpret_cast<uintptr_t>(memory.data()) % kCacheLine) % kCacheLine;
}

// Pieces of planes, or, where channels lie side by side, of places times some channels.
template <class T, bool kChannelsLast>
struct Work {
  Sizes sizes;
  int64_t width, blocks;  // channels of a piece, and how many times that
  Partials partials;
  int threads;
  bool stream;

  // The call moves `moved` times x.
  Work(const Sizes& sizes, int64_t moved) : sizes(sizes) {
    const int64_t size = sizeof(T), line = kCacheLine / size;
    width = kChannelsLast ? std::min(sizes.channels, kWidthBytes / size) : 1;
    blocks = (sizes.channels + width - 1) / width;
    const int64_t most =
        kChannelsLast ? std::max(kPlacesBytes / (width * size), kLeastPlaces) : kPieceBytes / size;
    const int64_t pieces = (sizes.places + most - 1) / most;
    const int64_t length = pieces ? (sizes.places + pieces - 1) / pieces : 1;
    partials = {nullptr, pieces, (length + line - 1) / line * line, sizes.channels, sizes.places};
    partials.pieces = (sizes.places + partials.length - 1) / partials.length;
    const int64_t bytes = moved * sizes.values() * size;
    threads = bytes < kSerialBytes ? 1 : max_threads();
    // where the call overflows the last cache, what is written goes past it: it drives out nothing
    stream = bytes > last_cache_bytes() / 2;
  }

  struct Item {
    int64_t b, c, width, piece, begin, end;  // channels [c, c + width), places [begin, end)
  };

  // Elements from `offset` on, of plane `plane`, channel c or those that follow it; and where the next are.
  struct Run {
    int64_t plane, c, offset, count, ahead;
  };

  Item item(int64_t index) const {
    Item item;
    if (kChannelsLast) {
      item.c = index % blocks * width;
      item.piece = index / blocks % partials.pieces;
      item.b = index / blocks / partials.pieces;
      item.width = std::min(width, sizes.channels - item.c);
    } else {
      item.piece = index % partials.pieces;
      item.c = index / partials.pieces % sizes.channels;
      item.b = index / partials.pieces / sizes.channels;
      item.width = 1;
    }
    item.begin = partials.begin(item.piece);
    item.end = partials.end(item.piece);
    return item;
  }

  // Where channel c of place s is in a tensor like x.
  int64_t offset(int64_t b, int64_t c, int64_t s) const {
    return kChannelsLast ? (b * sizes.places + s) * sizes.channels + c
                         : (b * sizes.channels + c) * sizes.places + s;
  }

  // Calls visit(item, memory) for all items, memory being the thread's own.
  template <class A, class Visit>
  void for_each(int64_t arrays, const Visit& visit) const {
    const int64_t bytes = kChannelsLast ? padded(arrays * width * sizeof(A)) : 0;
    const Scratch memory(threads * bytes);
    parallel_for(sizes.batch * blocks * partials.pieces, threads, [&](int part, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        visit(item(i), reinterpret_cast<A*>(whole_lines(memory) + part * bytes));
      }
    });
  }

  // Calls visit(run) for all runs, each thread's pieces from the last to the first.
  template <class Visit>
  void for_each_run_backwards(const Visit& visit) const {
    parallel_for(sizes.batch * blocks * partials.pieces, threads, [&](int, int64_t begin, int64_t end) {
      for (int64_t i = end; i-- > begin;) {
        const Item own = item(i);
        const int64_t plane = own.b * sizes.channels + own.c;
        if (kChannelsLast) {
          for (int64_t s = own.begin; s < own.end; ++s) {
            visit({plane, own.c, offset(own.b, own.c, s), own.width, kPlacesAhead * sizes.channels});
          }
        } else {
          const int64_t first = offset(own.b, own.c, own.begin);
          const Item next = item(std::max(i - 1, begin));
          visit({plane, own.c, first, own.end - own.begin, offset(next.b, next.c, next.begin) - first});
        }
      }
      if (stream) stream_fence();
    });
  }

  // Calls visit(g, memory) for all groups, memory being `arrays` doubles for each channel of a group.
  template <class Visit>
  void for_each_group(int64_t arrays, const Visit& visit) const {
    const int at_once = sizes.batch * sizes.channels < kSerialPlanes ? 1 : threads;
    const int64_t bytes = padded(arrays * sizes.in_group * 8);
    const Scratch memory(at_once * bytes);
    parallel_for(sizes.groups, at_once, [&](int part, int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        visit(g, reinterpret_cast<double*>(whole_lines(memory) + part * bytes));
      }
    });
  }
};

// A run's coefficients: one for all of it, or each its own.
template <bool kChannelsLast, class A>
VIOPS_INLINE auto pick(const A* coefficients, int64_t i) {
  if constexpr (kChannelsLast) {
    return coefficients + i;
  } else {
    return coefficients[i];
  }
}

template <class T, class A, bool kChannelsLast>
void sum_moments(const Work<T, kChannelsLast>& work, const T* x, const A* shift) {
  const Partials& partials = work.partials;
  work.template for_each<A>(3, [&](const auto& item, A* memory) {
    double* const mean = partials.first(item.b, item.piece) + item.c;
    double* const square = partials.second(item.b, item.piece) + item.c;
    const T* from = x + work.offset(item.b, item.c, item.begin);
    if constexpr (kChannelsLast) {
      std::fill(mean, mean + item.width, 0.0);
      std::fill(square, square + item.width, 0.0);
      const int64_t stride = work.sizes.channels;
      const int64_t most = std::max<int64_t>(kCachedBytes / (item.width * sizeof(T)), kPlacesAtOnce);
      for (int64_t s = item.begin; s < item.end; s += most) {
        const int64_t places = std::min(most, item.end - s);
        add_moments(from + (s - item.begin) * stride, stride, places, item.width, shift + item.c,
                    static_cast<double>(s - item.begin), mean, square, memory);
      }
    } else {
      const Moments moments = moments_along(from, item.end - item.begin, shift[item.c]);
      *mean = moments.mean;
      *square = moments.square;
    }
  });
}

template <class T, class A, bool kChannelsLast, bool kRelu>
void normalise(const Work<T, kChannelsLast>& work, const T* x, const T* residual, const Small<A>& small,
               const A* slopes, const A* offsets, T* y) {
  using P = decltype(pick<kChannelsLast>(slopes, 0));
  work.for_each_run_backwards([&](const typename Work<T, kChannelsLast>::Run& run) {
    const Normalised<T, A, P, kRelu> values = {{x + run.offset, pick<kChannelsLast>(small.shift, run.c),
                                                pick<kChannelsLast>(small.plane_mean, run.plane)},
                                               residual ? residual + run.offset : nullptr,
                                               pick<kChannelsLast>(slopes, run.plane),
                                               pick<kChannelsLast>(offsets, run.plane)};
    write<A>(y + run.offset, run.count, work.stream, run.ahead, values);
  });
}

template <class T, class A, bool kChannelsLast>
void forward_in_layout(const TensorView& x, const TensorView* residual, const TensorView* given_var,
                       const TensorView* speed, const Parameters& parameters, Mode mode, const TensorView& y,
                       const Small<A>& small) {
  const Sizes sizes(x, parameters.weight);
  Work<T, kChannelsLast> work(sizes, 2);
  const int64_t coefficient_bytes = padded(sizes.batch * sizes.channels * sizeof(A));
  const Scratch memory(work.partials.bytes(sizes.batch) + 2 * coefficient_bytes);
  A* const slopes = reinterpret_cast<A*>(whole_lines(memory));
  A* const offsets = reinterpret_cast<A*>(whole_lines(memory) + coefficient_bytes);
  work.partials.data = reinterpret_cast<double*>(whole_lines(memory) + 2 * coefficient_bytes);
  const T* const from = static_cast<const T*>(x.data);
  const A* const var = given_var ? static_cast<const A*>(given_var->data) : nullptr;
  const A* const share = speed ? static_cast<const A*>(speed->data) : nullptr;

  sum_moments(work, from, small.shift);
  work.for_each_group(1, [&](int64_t g, double* factors) {
    merge_planes(sizes, small, g, work.partials);
    write_channels(sizes, small, g, mode, var, share);
    write_group(sizes, small, g, factors);
    write_affines(sizes, small, g, slopes, offsets);
  });
  const T* const added = residual ? static_cast<const T*>(residual->data) : nullptr;
  T* const to = static_cast<T*>(y.data);
  parameters.relu ? normalise<T, A, kChannelsLast, true>(work, from, added, small, slopes, offsets, to)
                  : normalise<T, A, kChannelsLast, false>(work, from, added, small, slopes, offsets, to);
}

// shift [C]: the given means, or medians of values, or zeros.
template <class T, class A>
void write_shift(const TensorView& x, const TensorView* given_mean, A* shift) {
  const int64_t batch = x.shape[0], places = x.shape[2];
  for (int64_t c = 0; c < x.shape[1]; ++c) {
    const T* const channel = static_cast<const T*>(x.data) + c * x.stride[1];
    A values[kShiftValues] = {};
    for (int i = 0; i < kShiftValues && !given_mean && batch * places > 0; ++i) {
      values[i] = static_cast<A>(widen(channel[shift_place(i, batch, places, x.stride[0], x.stride[2])]));
    }
    shift[c] = given_mean ? static_cast<const A*>(given_mean->data)[c] : median(values);
  }
}

template <class T>
void forward(const TensorView& x, const TensorView* residual, const TensorView* given_mean,
             const TensorView* given_var, const TensorView* speed, const Parameters& parameters, Mode mode,
             const TensorView& y, const Statistics& statistics) {
  using A = decltype(widen(T()));
  const Small<A> small(parameters, statistics);
  write_shift<T>(x, given_mean, small.shift);
  if (is_channels_last(x)) {
    forward_in_layout<T, A, true>(x, residual, given_var, speed, parameters, mode, y, small);
  } else {
    forward_in_layout<T, A, false>(x, residual, given_var, speed, parameters, mode, y, small);
  }
}

// The tensors of backward that are like x; residual and kept may be null.  kept: the gradient to the
// residual.
template <class T>
struct Values {
  const T *grad_y, *x, *residual;
  T *kept, *grad_x;
};

template <class T, class A, bool kChannelsLast, bool kRelu>
struct Backward {
  using P = std::conditional_t<kChannelsLast, const A*, A>;
  const Work<T, kChannelsLast>& work;
  const Values<T>& values;
  const Small<A>& small;
  const A *slopes, *offsets;  // [B, C] where relu

  template <bool kMasked>
  Gradient<T, A, P, kMasked> gradient(const T* grad_y, int64_t plane, int64_t c, int64_t offset) const {
    return {grad_y + offset,
            {{values.x + offset, pick<kChannelsLast>(small.shift, c),
              pick<kChannelsLast>(small.plane_mean, plane)},
             values.residual ? values.residual + offset : nullptr,
             kMasked ? pick<kChannelsLast>(slopes, plane) : P(),
             kMasked ? pick<kChannelsLast>(offsets, plane) : P()}};
  }

  void sum() const {
    const Partials& partials = work.partials;
    work.template for_each<A>(2, [&](const auto& item, A* memory) {
      double* const grads = partials.first(item.b, item.piece) + item.c;
      double* const products = partials.second(item.b, item.piece) + item.c;
      const int64_t plane = item.b * work.sizes.channels + item.c;
      const auto offset = [&](int64_t s) { return work.offset(item.b, item.c, s); };
      if constexpr (kChannelsLast) {
        std::fill(grads, grads + item.width, 0.0);
        std::fill(products, products + item.width, 0.0);
        for (int64_t s = item.begin; s < item.end; s += kGradientPlaces) {
          add_sums(gradient<kRelu>(values.grad_y, plane, item.c, offset(s)), work.sizes.channels,
                   std::min(kGradientPlaces, item.end - s), item.width,
                   values.kept ? values.kept + offset(s) : nullptr, grads, products, memory);
        }
      } else {
        const GradientSums sums =
            sums_along(gradient<kRelu>(values.grad_y, plane, item.c, offset(item.begin)),
                       item.end - item.begin, values.kept ? values.kept + offset(item.begin) : nullptr);
        *grads = sums.grad;
        *products = sums.product;
      }
    });
  }

  // What has been kept is masked already.
  template <bool kMasked>
  void write_grad_x(const PlaneGradients<A>& planes) const {
    const T* grad_y = kRelu && !kMasked ? values.kept : values.grad_y;
    work.for_each_run_backwards([&](const typename Work<T, kChannelsLast>::Run& run) {
      const GradientToX<T, A, P, kMasked> grad_x = {gradient<kMasked>(grad_y, run.plane, run.c, run.offset),
                                                    pick<kChannelsLast>(planes.along, run.plane),
                                                    pick<kChannelsLast>(planes.centre, run.plane),
                                                    pick<kChannelsLast>(planes.slant, run.plane)};
      write<A>(values.grad_x + run.offset, run.count, work.stream, run.ahead, grad_x);
    });
  }
};

template <class T, class A, bool kChannelsLast, bool kRelu>
void backward_in_layout(const Sizes& sizes, const Values<T>& values, const Small<A>& small, int64_t count,
                        const SmallGradients<A>& grads) {
  Work<T, kChannelsLast> work(sizes, 3);
  const int64_t coefficient_bytes = padded(sizes.batch * sizes.channels * sizeof(A));
  const Scratch memory(work.partials.bytes(sizes.batch) + 5 * coefficient_bytes);
  const auto array = [&](int i) { return reinterpret_cast<A*>(whole_lines(memory) + i * coefficient_bytes); };
  const PlaneGradients<A> planes = {array(0), array(1), array(2)};
  work.partials.data = reinterpret_cast<double*>(whole_lines(memory) + 5 * coefficient_bytes);
  const Backward<T, A, kChannelsLast, kRelu> backward = {work, values, small, array(3), array(4)};

  if (kRelu) {
    work.for_each_group(0, [&](int64_t g, double*) { write_affines(sizes, small, g, array(3), array(4)); });
  }
  backward.sum();
  work.for_each_group(4, [&](int64_t g, double* doubles) {
    group_backward(sizes, small, g, work.partials, grads, planes, doubles);
    if (count > 0) add_through_statistics(sizes, small, g, count, grads, planes);
  });
  if (kRelu && !values.kept) return backward.template write_grad_x<kRelu>(planes);
  backward.template write_grad_x<false>(planes);
}

template <class T>
void backward(const TensorView& grad_y, const TensorView& x, const TensorView* residual,
              const Parameters& parameters, const Statistics& statistics, int64_t count,
              const TensorView* totals, const Gradients& gradients) {
  using A = decltype(widen(T()));
  const auto data = [](const TensorView* view) { return view ? static_cast<T*>(view->data) : nullptr; };
  const Values<T> values = {data(&grad_y), data(&x), parameters.relu ? data(residual) : nullptr,
                            data(gradients.residual), data(&gradients.x)};
  const Small<A> small(parameters, statistics);
  const SmallGradients<A> grads(gradients, totals);
  const Sizes sizes(x, parameters.weight);
  const auto run = [&](auto channels_last, auto relu) {
    backward_in_layout<T, A, decltype(channels_last)::value, decltype(relu)::value>(sizes, values, small,
                                                                                    count, grads);
  };
  const auto in_layout = [&](auto channels_last) {
    parameters.relu ? run(channels_last, std::true_type()) : run(channels_last, std::false_type());
  };
  is_channels_last(x) ? in_layout(std::true_type()) : in_layout(std::false_type());
}

const CpuKernels kernels = {
    [](const TensorView& x, const TensorView* residual, const TensorView* given_mean,
       const TensorView* given_var, const TensorView* speed, const Parameters& parameters, Mode mode,
       const TensorView& y, const Statistics& statistics) {
      VIOPS_FOR_DTYPE(x, forward, x, residual, given_mean, given_var, speed, parameters, mode, y, statistics)
    },
    [](const TensorView& grad_y, const TensorView& x, const TensorView* residual,
       const Parameters& parameters, const Statistics& statistics, int64_t count, const TensorView* totals,
       const Gradients& gradients) {
      VIOPS_FOR_DTYPE(x, backward, grad_y, x, residual, parameters, statistics, count, totals, gradients)
    },
};

}  // namespace

extern const CpuKernels VIOPS_LEVEL_NAME(kernels) = kernels;

}  // namespace viops::batch_channel_norm
