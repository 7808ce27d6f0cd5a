// Fibres: stacks that a thread of the operating system moves between, and what sanitizers must hear of it.
// For executor.cpp alone.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

// VIOPS_SANITIZER says how the kernels are built: 0 plain, 1 address, 2 thread.
#if VIOPS_SANITIZER == 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#elif VIOPS_SANITIZER == 2
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

// Saves the registers that a function must keep, puts the stack pointer into *from, and goes on with the
// stack `to`, whose owner saved its own there.
extern "C" void viops_switch_stack(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.pushsection .text
.globl viops_switch_stack
.hidden viops_switch_stack
.type viops_switch_stack, @function
viops_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size viops_switch_stack, .-viops_switch_stack
.popsection
)");
#elif defined(__aarch64__)
asm(R"(
.pushsection .text
.globl viops_switch_stack
.hidden viops_switch_stack
.type viops_switch_stack, %function
viops_switch_stack:
  stp x19, x20, [sp, #-160]!
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x19, x20, [sp], #160
  ret
.size viops_switch_stack, .-viops_switch_stack
.popsection
)");
#else
#error "tests/cuda_on_host: viops_switch_stack is written for x86-64 and aarch64"
#endif

namespace viops::on_host {

constexpr bool kDetectsRaces = VIOPS_SANITIZER == 2;

// For the race detector: what was written before release(tag) is seen after acquire(tag).
inline void release([[maybe_unused]] void* tag) {
#if VIOPS_SANITIZER == 2
  __tsan_release(tag);
#endif
}
inline void acquire([[maybe_unused]] void* tag) {
#if VIOPS_SANITIZER == 2
  __tsan_acquire(tag);
#endif
}

// While it lives, what this fibre reads and writes is no race.  A worker has one outside its fibres.
struct RacesIgnored {
#if VIOPS_SANITIZER == 2
  RacesIgnored() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    ++depth;
  }
  ~RacesIgnored() { end(); }
  static void end() {
    --depth;
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  // For a fibre that is given up: its destructors will not run.
  static void end_those_of_a_fibre() {
    while (depth > 1) end();
  }
  static inline thread_local int depth = 0;
#else
  ~RacesIgnored() {}
  static void end_those_of_a_fibre() {}
#endif
};

// The stack of the thread of the operating system that the fibres run on.
struct Scheduler {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
  void* fibre = nullptr;  // the race detector's
};

struct Stack {
  char* memory;
  size_t bytes;
};

// Stacks for the threads of a block, each above a page that cannot be touched.
class Stacks {
 public:
  explicit Stacks(size_t count) : count_(count), page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    void* memory = mmap(nullptr, count_ * (page_ + kBytes), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    for (size_t i = 0; i < count_; ++i) mprotect(memory_ + i * (page_ + kBytes), page_, PROT_NONE);
  }
  ~Stacks() { munmap(memory_, count_ * (page_ + kBytes)); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  Stack stack(size_t i) const { return {memory_ + i * (page_ + kBytes) + page_, kBytes}; }

 private:
  static constexpr size_t kBytes = VIOPS_SANITIZER ? 256 << 10 : 64 << 10;
  size_t count_, page_;
  char* memory_;
};

inline std::mutex& stacks_mutex() {
  static std::mutex mutex;
  return mutex;
}

// Stacks of launches that ended, for those to come.
inline std::vector<std::unique_ptr<Stacks>>& idle_stacks() {
  static auto* const idle = new std::vector<std::unique_ptr<Stacks>>;
  return *idle;
}

inline std::unique_ptr<Stacks> take_stacks() {
  constexpr size_t kMaxThreads = 1024;  // of a block
  const std::lock_guard<std::mutex> lock(stacks_mutex());
  auto& idle = idle_stacks();
  if (idle.empty()) return std::make_unique<Stacks>(kMaxThreads);
  std::unique_ptr<Stacks> stacks = std::move(idle.back());
  idle.pop_back();
  return stacks;
}

inline void give_back_stacks(std::unique_ptr<Stacks> stacks) {
  const std::lock_guard<std::mutex> lock(stacks_mutex());
  idle_stacks().push_back(std::move(stacks));
}

struct Fibre {
  Stack stack = {};
  void* stack_pointer = nullptr;
  [[maybe_unused]] void* fake_stack = nullptr;
  [[maybe_unused]] void* fibre = nullptr;  // the race detector's
  Scheduler* scheduler = nullptr;

  // The first resume() calls `entry`, which must never return.
  void start(void (*entry)()) {
    constexpr int kSavedRegisters = 20;  // no fewer than viops_switch_stack saves
    auto* top = reinterpret_cast<uintptr_t*>(stack.memory + stack.bytes) - 2;
    for (int i = 0; i <= kSavedRegisters; ++i) top[-i] = 0;
#if defined(__x86_64__)
    top[-2] = reinterpret_cast<uintptr_t>(entry);  // where `ret` goes, leaving an odd multiple of 8
    stack_pointer = top - 8;
#else
    top[-20 + 11] = reinterpret_cast<uintptr_t>(entry);  // x30
    stack_pointer = top - 20;
#endif
#if VIOPS_SANITIZER == 2
    fibre = __tsan_create_fiber(0);
#endif
  }

  // Goes on with the fibre until it leaves.
  __attribute__((noinline)) void resume(Scheduler& from) {
    scheduler = &from;
#if VIOPS_SANITIZER == 1
    __sanitizer_start_switch_fiber(&from.fake_stack, stack.memory, stack.bytes);
#elif VIOPS_SANITIZER == 2
    from.fibre = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fibre, __tsan_switch_to_fiber_no_sync);
#endif
    viops_switch_stack(&from.stack_pointer, stack_pointer);
#if VIOPS_SANITIZER == 1
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
  }

  // To be called first in the fibre.
  void arrive() {
#if VIOPS_SANITIZER == 1
    __sanitizer_finish_switch_fiber(nullptr, &scheduler->stack, &scheduler->stack_bytes);
#endif
  }

  // Goes back to the scheduler until the next resume().
  __attribute__((noinline)) void leave(Scheduler& to) {
#if VIOPS_SANITIZER == 1
    __sanitizer_start_switch_fiber(&fake_stack, to.stack, to.stack_bytes);
#elif VIOPS_SANITIZER == 2
    __tsan_switch_to_fiber(to.fibre, __tsan_switch_to_fiber_no_sync);
#endif
    viops_switch_stack(&stack_pointer, to.stack_pointer);
#if VIOPS_SANITIZER == 1
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  [[noreturn]] __attribute__((noinline)) void leave_for_good(Scheduler& to) {
#if VIOPS_SANITIZER == 1
    __sanitizer_start_switch_fiber(nullptr, to.stack, to.stack_bytes);
#elif VIOPS_SANITIZER == 2
    __tsan_switch_to_fiber(to.fibre, __tsan_switch_to_fiber_no_sync);
#endif
    viops_switch_stack(&stack_pointer, to.stack_pointer);
    __builtin_trap();
  }

  // Called by the scheduler when the block has ended; `left` where the fibre left for good.
  void finish([[maybe_unused]] bool left) {
#if VIOPS_SANITIZER == 1
    if (!left) __asan_unpoison_memory_region(stack.memory, stack.bytes);
#elif VIOPS_SANITIZER == 2
    __tsan_destroy_fiber(fibre);
#endif
  }
};

}  // namespace viops::on_host
