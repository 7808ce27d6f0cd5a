// Built without instrumentation: it moves between stacks, and tells the sanitizers of it.
#include "executor.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "switch_stack.h"

namespace viops::on_host {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxStaticShared = 48 << 10;
constexpr size_t kMaxDynamicShared = 227 << 10;  // of sm_90
constexpr unsigned kMaxFibresToCheck = 4096;     // at a time; the race detector bears twice as many
constexpr int kUninitialised = 0xff;             // NaN, -1: not what a kernel hopes for

std::string text_of(Location where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

template <class Triple>
std::string text_of(const Triple& triple) {
  return "(" + std::to_string(triple.x) + ", " + std::to_string(triple.y) + ", " + std::to_string(triple.z) +
         ")";
}

enum class State { ready, at_barrier, at_exchange, left };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Thread {
  Fibre fibre;
  uint3 index;
  State state = State::left;
  Location where;         // of the barrier or the exchange that it waits at
  const char* name = "";  // of that
  unsigned mask = 0;      // of the exchange
  void* argument = nullptr;
  void (*work)(const Lanes&) = nullptr;
  unsigned together_with = 0;  // the lanes of the exchange that ended
  bool orders_memory = false;
  char exchange_tag[2] = {};  // for the race detector: what was written before the last two exchanges
  const char* last_tag = nullptr;
  int num_exchanges = 0;
  std::vector<std::vector<Copy>> copies;  // groups; the last one is open
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

Memory uninitialised(size_t bytes, size_t alignment) {
  void* memory = nullptr;
  if (posix_memalign(&memory, std::max(alignment, sizeof(void*)), bytes)) throw std::bad_alloc();
  std::memset(memory, kUninitialised, bytes);
  return Memory(memory);
}

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  const std::function<void()>& body;
  Location where;
  unsigned num_threads = block.x * block.y * block.z;
  unsigned num_blocks = grid.x * grid.y * grid.z;
  std::atomic<unsigned> next_block{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::string error;
  char started_tag = 0, done_tag = 0;  // for the race detector

  Launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body, Location where)
      : grid(grid), block(block), shared_bytes(shared_bytes), body(body), where(where) {}

  void fail(const std::string& text) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (error.empty()) error = text;
    failed = true;
  }
};

class Worker;
thread_local Worker* this_worker = nullptr;

// Runs blocks one after the other on one thread of the operating system.
class Worker {
 public:
  explicit Worker(Launch& launch) : launch_(launch), stacks_(take_stacks()), threads_(launch.num_threads) {}
  ~Worker() { give_back_stacks(std::move(stacks_)); }

  void run(unsigned number) {
    random_.seed(settings().seed * 0x9e3779b97f4a7c15u + number);
    this_worker = this;
    gridDim = launch_.grid;
    blockDim = launch_.block;
    blockIdx = position(number, launch_.grid);
    if (kDetectsRaces) {
      stacks_.reset();  // what another block did with the same stack would seem a race
      stacks_ = std::make_unique<Stacks>(launch_.num_threads);
    }
    static_bytes_ = 0;
    num_arrived_ = 0;
    num_barriers_ = 0;
    num_left_ = 0;
    error_.clear();
    std::fill(std::begin(ready_), std::end(ready_), 0u);
    any_ready_ = 0;
    rank_threads();
    for (unsigned i = 0; i < launch_.num_threads; ++i) {
      Thread& thread = threads_[i];
      thread.index = position(i, launch_.block);
      make_ready(thread);
      thread.copies.assign(1, {});
      thread.fibre.stack = stacks_->stack(i);
      thread.fibre.start(&Worker::enter);
    }
    while (num_left_ < launch_.num_threads && error_.empty()) {
      if (!run_one_thread()) error_ = describe_deadlock();
    }
    for (Thread& thread : threads_) thread.fibre.finish(thread.state == State::left);
    dynamic_shared_.reset();
    shared_.clear();
    if (!error_.empty()) launch_.fail(error_);
    this_worker = nullptr;
  }

  // --- called on a fibre

  Thread& current() { return *current_; }

  void yield() {
    Thread& thread = *current_;
    release(&launch_.done_tag);  // it may not be resumed
    thread.fibre.leave(scheduler_);
    threadIdx = thread.index;
  }

  [[noreturn]] void fail(const Thread& thread, const std::string& text, Location where) {
    {
      const RacesIgnored ignored;
      error_ = message(text, where, &thread);
    }
    RacesIgnored::end_those_of_a_fibre();
    release(&launch_.done_tag);
    current_->fibre.leave(scheduler_);
    std::abort();  // a fibre that failed is not resumed
  }

  Votes barrier(const char* name, int predicate, Location where) {
    Thread& thread = *current_;
    char* const tag = barrier_tags_ + num_barriers_ % 2;
    release(tag);
    thread.state = State::at_barrier;
    thread.where = where;
    thread.name = name;
    num_true_ += predicate != 0;
    if (++num_arrived_ == launch_.num_threads) end_barrier();
    yield();
    acquire(tag);
    return votes_;
  }

  void exchange(const char* name, unsigned mask, void* argument, void (*work)(const Lanes&), Location where,
                bool orders_memory) {
    Thread& thread = *current_;
    const unsigned lane = linear(thread) % 32;
    if (!(mask >> lane & 1)) {
      fail(thread,
           std::string(name) + ": the mask " + hex(mask) + " lacks the calling lane " + std::to_string(lane),
           where);
    }
    thread.state = State::at_exchange;
    thread.where = where;
    thread.name = name;
    thread.mask = mask;
    thread.argument = argument;
    thread.work = work;
    thread.orders_memory = orders_memory;
    if (orders_memory) {
      thread.last_tag = thread.exchange_tag + thread.num_exchanges++ % 2;
      release(const_cast<char*>(thread.last_tag));
    }
    if (const unsigned active = lanes_that_came(thread)) end_exchange(thread, active);
    yield();
    if (!orders_memory) return;
    Thread* const warp = &threads_[linear(thread) / 32 * 32];
    for (unsigned other = 0; other < 32; ++other) {
      if (thread.together_with >> other & 1) acquire(const_cast<char*>(warp[other].last_tag));
    }
  }

  void* shared_variable(const void* key, size_t bytes, size_t alignment, Location where) {
    const RacesIgnored ignored;
    Memory& variable = shared_[key];
    if (!variable) {
      static_bytes_ += bytes;
      if (static_bytes_ > kMaxStaticShared) {
        fail(*current_, "more than 48 KB of static shared memory", where);
      }
      // `launch` opts in to more than 48 KB by the size of the dynamic part alone
      const size_t most = launch_.shared_bytes > kMaxStaticShared ? kMaxDynamicShared : kMaxStaticShared;
      if (static_bytes_ + launch_.shared_bytes > most) {
        fail(*current_, "more static and dynamic shared memory than a launch gets", where);
      }
      variable = uninitialised(bytes, alignment);
    }
    return variable.get();
  }

  char* dynamic_shared(Location where) {
    const RacesIgnored ignored;
    if (launch_.shared_bytes == 0) fail(*current_, "launched without dynamic shared memory", where);
    if (!dynamic_shared_) dynamic_shared_ = uninitialised(launch_.shared_bytes, 16);
    return static_cast<char*>(dynamic_shared_.get());
  }

  unsigned linear(const Thread& thread) const { return static_cast<unsigned>(&thread - threads_.data()); }
  Thread& lane(int number) { return threads_[linear(*current_) / 32 * 32 + static_cast<unsigned>(number)]; }

 private:
  static uint3 position(unsigned number, dim3 extent) {
    return {number % extent.x, number / extent.x % extent.y, number / extent.x / extent.y};
  }

  static std::string hex(unsigned mask) {
    char text[16];
    std::snprintf(text, sizeof(text), "0x%08x", mask);
    return text;
  }

  static void enter() {
    Worker& worker = *this_worker;
    Thread& thread = *worker.current_;
    thread.fibre.arrive();
    threadIdx = thread.index;
    acquire(&worker.launch_.started_tag);
    std::string thrown;
    try {
      worker.launch_.body();
    } catch (const std::exception& error) {
      thrown = std::string("an exception: ") + error.what();
    }
    if (!thrown.empty()) worker.fail(thread, thrown, worker.launch_.where);
    release(&worker.launch_.done_tag);
    worker.take_leave(thread);
    thread.fibre.leave_for_good(worker.scheduler_);
  }

  // Ranks of the threads: whenever one waits, the ready one of the lowest rank runs, so that the first warps
  // run as far ahead of the others as barriers let them.
  void rank_threads() {
    const auto count = static_cast<unsigned>(threads_.size());
    by_rank_.resize((count + 31) / 32 * 32);
    std::iota(by_rank_.begin(), by_rank_.end(), 0u);
    if (settings().order == Order::reverse) std::reverse(by_rank_.begin(), by_rank_.end());
    if (settings().order == Order::random) {
      std::vector<unsigned> warps(by_rank_.size() / 32);
      std::iota(warps.begin(), warps.end(), 0u);
      std::shuffle(warps.begin(), warps.end(), random_);
      for (size_t w = 0; w < warps.size(); ++w) {
        const auto lanes = by_rank_.begin() + static_cast<std::ptrdiff_t>(32 * w);
        std::iota(lanes, lanes + 32, 32 * warps[w]);
        std::shuffle(lanes, lanes + 32, random_);
      }
    }
    ranks_.resize(by_rank_.size());
    for (unsigned rank = 0; rank < by_rank_.size(); ++rank) ranks_[by_rank_[rank]] = rank;
  }

  void take_leave(Thread& thread) {
    thread.state = State::left;
    ++num_left_;
    const unsigned first = linear(thread) / 32 * 32;
    for (unsigned other = first; other < first + 32 && other < threads_.size(); ++other) {
      if (threads_[other].state != State::at_exchange) continue;
      if (const unsigned active = lanes_that_came(threads_[other])) end_exchange(threads_[other], active);
    }
  }

  void make_ready(Thread& thread) {
    thread.state = State::ready;
    const unsigned rank = ranks_[linear(thread)];
    ready_[rank / 32] |= 1u << rank % 32;
    any_ready_ |= 1u << rank / 32;
  }

  // Lets the first ready thread run up to its next wait; whether there was one.
  bool run_one_thread() {
    if (!any_ready_) return false;
    const auto group = static_cast<unsigned>(std::countr_zero(any_ready_));
    const auto bit = static_cast<unsigned>(std::countr_zero(ready_[group]));
    ready_[group] &= ready_[group] - 1;
    if (!ready_[group]) any_ready_ &= any_ready_ - 1;
    current_ = &threads_[by_rank_[32 * group + bit]];
    current_->fibre.resume(scheduler_);
    return true;
  }

  void end_barrier() {
    for (Thread& thread : threads_) {
      if (thread.where.line() != current_->where.line() || thread.name != current_->name ||
          std::strcmp(thread.where.file_name(), current_->where.file_name())) {
        fail(thread,
             std::string("divergent barrier: thread ") + text_of(current_->index) + " waits in " +
                 current_->name + " at " + text_of(current_->where) + ", this one in " + thread.name,
             thread.where);
      }
    }
    votes_ = {static_cast<int>(num_true_), static_cast<int>(launch_.num_threads)};
    num_true_ = 0;
    num_arrived_ = 0;
    ++num_barriers_;
    if (settings().order == Order::random) rank_threads();
    for (Thread& thread : threads_) make_ready(thread);
  }

  static bool same_exchange(const Thread& a, const Thread& b) {
    return a.state == State::at_exchange && a.mask == b.mask && a.work == b.work &&
           std::strcmp(a.name, b.name) == 0;
  }

  // The lanes that take part in this thread's exchange, once all have come; else none.
  unsigned lanes_that_came(const Thread& thread) {
    const unsigned first = linear(thread) / 32 * 32;
    unsigned active = 0;
    for (unsigned lane = 0; lane < 32 && first + lane < threads_.size(); ++lane) {
      const Thread& other = threads_[first + lane];
      if (!(thread.mask >> lane & 1) || other.state == State::left) continue;
      if (!same_exchange(other, thread)) return 0;
      active |= 1u << lane;
    }
    return active;
  }

  void end_exchange(const Thread& thread, unsigned active) {
    Thread* const warp = &threads_[linear(thread) / 32 * 32];
    Lanes lanes = {{}, active};
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (active >> lane & 1) lanes.arguments[lane] = warp[lane].argument;
    }
    const RacesIgnored ignored;  // `work` reads and writes on behalf of other threads
    thread.work(lanes);
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(active >> lane & 1)) continue;
      warp[lane].together_with = active;
      make_ready(warp[lane]);
    }
  }

  std::string message(const std::string& text, Location where, const Thread* thread) const {
    std::string full = "CUDA on host: " + text + "; at " + text_of(where) + ", block " + text_of(blockIdx);
    if (thread) full += ", thread " + text_of(thread->index);
    return full + ", launched at " + text_of(launch_.where);
  }

  // Why no thread can run.
  std::string describe_deadlock() const {
    const Thread* at_barrier = nullptr;
    const Thread* left = nullptr;
    for (const Thread& thread : threads_) {
      if (thread.state == State::at_exchange) return describe_exchange(thread);
      if (thread.state == State::at_barrier && !at_barrier) at_barrier = &thread;
      if (thread.state == State::left && !left) left = &thread;
    }
    return message(
        "thread " + text_of(left->index) + " left the kernel, while others wait in " + at_barrier->name,
        at_barrier->where, at_barrier);
  }

  std::string describe_exchange(const Thread& thread) const {
    const unsigned first = linear(thread) / 32 * 32;
    const std::string waits = std::string(thread.name) + " with mask " + hex(thread.mask) + ": lane ";
    for (unsigned lane = 0; lane < 32 && first + lane < threads_.size(); ++lane) {
      const Thread& other = threads_[first + lane];
      if (!(thread.mask >> lane & 1) || other.state == State::left) continue;
      if (same_exchange(other, thread)) continue;
      std::string text = waits + std::to_string(lane) + " does not come; it waits in " + other.name;
      if (other.state == State::at_exchange) text += " with mask " + hex(other.mask);
      return message(text + " at " + text_of(other.where), thread.where, &thread);
    }
    return message(waits + "none is missing", thread.where, &thread);
  }

  Launch& launch_;
  std::unique_ptr<Stacks> stacks_;
  std::vector<Thread> threads_;
  std::vector<unsigned> by_rank_, ranks_;
  unsigned ready_[32] = {}, any_ready_ = 0;  // bits of ranks, and of the 32s among them
  std::mt19937_64 random_;
  Thread* current_ = nullptr;
  Scheduler scheduler_;
  std::map<const void*, Memory> shared_;
  Memory dynamic_shared_;
  size_t static_bytes_ = 0;
  unsigned num_left_ = 0, num_arrived_ = 0, num_barriers_ = 0, num_true_ = 0;
  Votes votes_ = {};
  char barrier_tags_[2] = {};
  std::string error_;
};

void check_config(const Launch& launch) {
  const dim3 grid = launch.grid, block = launch.block;
  const bool right = grid.x && grid.y && grid.z && block.x && block.y && block.z &&
                     static_cast<uint64_t>(block.x) * block.y * block.z <= kMaxThreads && block.z <= 64 &&
                     grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535 &&
                     launch.shared_bytes <= kMaxDynamicShared;
  if (!right) {
    throw Error("CUDA on host: invalid configuration: grid " + text_of(grid) + ", block " + text_of(block) +
                ", " + std::to_string(launch.shared_bytes) + " bytes of shared memory; launched at " +
                text_of(launch.where));
  }
}

// Blocks as they come to this worker; under the race detector a fixed share, since a counter that
// workers share would order them.
void run_blocks(Launch& launch, unsigned worker, unsigned workers) {
  const RacesIgnored ignored;  // in the scheduler, not in the fibres
  Worker runner(launch);
  const auto number = [&](unsigned i) {
    return settings().order == Order::forward ? i : launch.num_blocks - 1 - i;
  };
  if (kDetectsRaces) {
    for (unsigned i = worker; i < launch.num_blocks && !launch.failed; i += workers) runner.run(number(i));
    return;
  }
  for (unsigned i; !launch.failed && (i = launch.next_block++) < launch.num_blocks;) runner.run(number(i));
}

}  // namespace

Settings& settings() {
  static Settings settings;
  return settings;
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body, Location where) {
  Launch launch(grid, block, shared_bytes, body, where);
  check_config(launch);
  release(&launch.started_tag);
  const unsigned most =
      kDetectsRaces ? kMaxFibresToCheck / launch.num_threads : static_cast<unsigned>(settings().workers);
  const unsigned workers = std::min(launch.num_blocks, most);
  std::vector<std::thread> others;
  for (unsigned worker = 1; worker < workers; ++worker) {
    others.emplace_back([&launch, worker, workers] { run_blocks(launch, worker, workers); });
  }
  run_blocks(launch, 0, workers);
  for (std::thread& other : others) other.join();
  acquire(&launch.done_tag);
  if (launch.failed) throw Error(launch.error);
}

void fail(const char* text, Location where) { this_worker->fail(this_worker->current(), text, where); }

void fail_of(int lane, const char* text) {
  const Thread& thread = this_worker->lane(lane);
  this_worker->fail(thread, std::string(thread.name) + ": " + text, thread.where);
}

void Lanes::fail_of_lane(int lane) const {
  fail(("the exchange needs lane " + std::to_string(lane) + ", which brought nothing").c_str(),
       this_worker->current().where);
}

void* shared_variable(const void* key, size_t bytes, size_t alignment, Location where) {
  return this_worker->shared_variable(key, bytes, alignment, where);
}

char* dynamic_shared(Location where) { return this_worker->dynamic_shared(where); }

Votes block_barrier(const char* name, int predicate, Location where) {
  return this_worker->barrier(name, predicate, where);
}

void together(const char* name, unsigned mask, void* argument, void (*work)(const Lanes&), Location where,
              bool orders_memory) {
  this_worker->exchange(name, mask, argument, work, where, orders_memory);
}

int lane_of_this_thread() { return static_cast<int>(this_worker->linear(this_worker->current()) % 32); }

void start_copy(void* to, const void* from, size_t bytes, Location where) {
  const RacesIgnored ignored;
  check_aligned(to, bytes, "cp.async", where);
  check_aligned(from, bytes, "cp.async", where);
  this_worker->current().copies.back().push_back({to, from, bytes});
}

void commit_copies() {
  const RacesIgnored ignored;
  this_worker->current().copies.emplace_back();
}

void wait_for_copies(int pending) {
  auto& groups = this_worker->current().copies;
  while (groups.size() > static_cast<size_t>(pending) + 1) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

void check_aligned(const void* pointer, size_t alignment, const char* name, Location where) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment == 0) return;
  fail((std::string(name) + ": an address that is not a multiple of " + std::to_string(alignment)).c_str(),
       where);
}

}  // namespace viops::on_host
