#include "common/threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <string>

#if defined(__linux__)
#include <link.h>
#endif

namespace viops {
namespace {

// The GNU entry point, which LLVM's and Intel's runtimes offer too.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using GetInt = int (*)();

bool forked = false;
// registered when the extension is loaded, so that no fork comes before it
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// libtorch_cpu, if the process has loaded it: what it links is the runtime that torch runs.
void* torch_library() {
#if defined(__APPLE__)
  return dlopen("@rpath/libtorch_cpu.dylib", RTLD_NOW | RTLD_NOLOAD);
#else
  return dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
#endif
}

struct Runtime {
  GompParallel parallel = nullptr;
  GetInt max_threads = nullptr;  // torch's own count: it also holds in threads that torch has not met
  GetInt thread_num = nullptr;
  GetInt num_threads = nullptr;
  GetInt in_parallel = nullptr;
  std::string path = "none";

  Runtime() {
    void* torch = torch_library();
    if (!bind(torch) && !bind(RTLD_DEFAULT)) bind(dlopen(loaded_library().c_str(), RTLD_NOW | RTLD_NOLOAD));
    if (!torch || !parallel) return;
    if (void* count = dlsym(torch, "_ZN2at15get_num_threadsEv"))
      max_threads = reinterpret_cast<GetInt>(count);
  }

 private:
  bool bind(void* handle) {
    if (!handle) return false;
    auto* entry = dlsym(handle, "GOMP_parallel");
    max_threads = reinterpret_cast<GetInt>(dlsym(handle, "omp_get_max_threads"));
    thread_num = reinterpret_cast<GetInt>(dlsym(handle, "omp_get_thread_num"));
    num_threads = reinterpret_cast<GetInt>(dlsym(handle, "omp_get_num_threads"));
    in_parallel = reinterpret_cast<GetInt>(dlsym(handle, "omp_in_parallel"));
    if (!entry || !max_threads || !thread_num || !num_threads || !in_parallel) return false;
    Dl_info info;
    if (dladdr(entry, &info) && info.dli_fname) path = info.dli_fname;
    parallel = reinterpret_cast<GompParallel>(entry);
    return true;
  }

  // The OpenMP runtime among the libraries that the process has loaded, for one that torch loaded
  // without making its symbols global.
  static std::string loaded_library() {
    std::string found = "libgomp.so.1";
#if defined(__linux__)
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          const char* base = std::strrchr(info->dlpi_name, '/');
          if (!base) return 0;
          for (const char* prefix : {"/libgomp", "/libomp", "/libiomp"}) {
            if (std::strncmp(base, prefix, std::strlen(prefix)) == 0) {
              *static_cast<std::string*>(out) = info->dlpi_name;
              return 1;
            }
          }
          return 0;
        },
        &found);
#endif
    return found;
  }
};

const Runtime& runtime() {
  static const Runtime instance;
  return instance;
}

struct Loop {
  int64_t count;
  void (*body)(void*, int, int64_t, int64_t);
  void* context;
};

void run_part(void* argument) {
  const Loop& loop = *static_cast<const Loop*>(argument);
  const int64_t parts = runtime().num_threads();
  const int64_t part = runtime().thread_num();
  const int64_t begin = loop.count * part / parts;
  const int64_t end = loop.count * (part + 1) / parts;
  if (begin < end) loop.body(loop.context, static_cast<int>(part), begin, end);
}

}  // namespace

int max_threads() {
  if (forked || !runtime().parallel || runtime().in_parallel()) return 1;
  return std::max(1, runtime().max_threads());
}

const char* openmp_runtime() { return runtime().path.c_str(); }

void parallel_ranges(int64_t count, int threads, void (*body)(void*, int, int64_t, int64_t), void* context) {
  if (count <= 0) return;
  const int64_t wanted = std::min<int64_t>({count, threads, max_threads()});
  if (wanted <= 1) return body(context, 0, 0, count);
  Loop loop{count, body, context};
  runtime().parallel(run_part, &loop, static_cast<unsigned>(wanted), 0);
}

}  // namespace viops
