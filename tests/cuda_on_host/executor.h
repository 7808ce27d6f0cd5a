// Runs CUDA kernels on the CPU: a fibre a thread, a block at a time on each worker.
//
// A thread runs until it comes to a barrier or a warp exchange; then the next one runs, in the order that
// the settings say.  What CUDA leaves undefined is an error that names file, line, block and thread:
// barriers that part of a block comes to, exchanges that lanes of the mask do not come to, values read
// from lanes that did not bring one.
#pragma once

#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define VIOPS_THREAD_LOCAL inline constinit thread_local __attribute__((tls_model("initial-exec")))
VIOPS_THREAD_LOCAL uint3 threadIdx;
VIOPS_THREAD_LOCAL uint3 blockIdx;
VIOPS_THREAD_LOCAL dim3 blockDim;
VIOPS_THREAD_LOCAL dim3 gridDim;
constexpr int warpSize = 32;

namespace viops::on_host {

using Location = std::source_location;

// A kernel did what CUDA leaves undefined.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order { forward, reverse, random };

struct Settings {
  Order order = Order::forward;  // of the threads of a block, and of the blocks
  uint64_t seed = 0;             // of Order::random
  int workers = 2;               // blocks at a time
};
Settings& settings();

// Runs `body` once a thread; throws Error.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body, Location where);

// Ends the launch with an error; called by a kernel's thread.
[[noreturn]] void fail(const char* text, Location where);

// --- the block's memory

// A variable of the block's shared memory, told apart by `key`; of exactly `bytes`, all of them 0xFF.
void* shared_variable(const void* key, size_t bytes, size_t alignment, Location where);
char* dynamic_shared(Location where);

// --- barriers and exchanges

struct Votes {
  int count;    // of the block's threads with a predicate that is not zero
  int threads;  // of the block
};
Votes block_barrier(const char* name, int predicate, Location where);

constexpr unsigned kFullWarp = 0xffffffffu;

// What the lanes of an exchange brought; null for those that brought nothing.
struct Lanes {
  void* arguments[32];
  unsigned active;  // the lanes that take part

  // A lane's argument; an error of the whole exchange where it brought none.
  template <class T>
  T& get(int lane) const {
    if (!arguments[lane]) fail_of_lane(lane);
    return *static_cast<T*>(arguments[lane]);
  }
  bool has(int lane) const { return active >> lane & 1; }
  [[noreturn]] void fail_of_lane(int lane) const;
};

// Waits for the other lanes of `mask`; the last to come runs `work` on what all brought, once.  Lanes
// that have left the kernel are not waited for.
void together(const char* name, unsigned mask, void* argument, void (*work)(const Lanes&), Location where,
              bool orders_memory = false);

int lane_of_this_thread();

// Ends the launch with an error of another lane of this thread's warp.
[[noreturn]] void fail_of(int lane, const char* text);

// --- asynchronous copies: made when they are waited for

void start_copy(void* to, const void* from, size_t bytes, Location where);
void commit_copies();
void wait_for_copies(int pending);

void check_aligned(const void* pointer, size_t alignment, const char* name, Location where);

}  // namespace viops::on_host
