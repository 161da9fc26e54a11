#include "mlx_llama_kernels/pool.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#if defined(__linux__)
#include <sched.h>
#endif

namespace mlk {

namespace {

constexpr int SPINS = 2000;  // some tens of microseconds, about a step between two operations
constexpr size_t MOST_RANGES = 0xffff;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The quota of a cgroup file such as "150000 100000", in processors rounded up; 0 for none.
size_t quota(const std::string& path) {
  std::ifstream file(path);
  std::string most;
  double period = 0;
  if (!(file >> most >> period) || most == "max" || period <= 0) return 0;
  double processors = std::strtod(most.c_str(), nullptr) / period;
  return processors > 0 ? size_t(processors + 0.999) : 0;
}

// The smallest quota of this process's cgroup (version 2) and those above it.
size_t cgroup_quota() {
  size_t least = 0;
  auto take = [&](size_t found) {
    if (found && (!least || found < least)) least = found;
  };
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("0::", 0) != 0) continue;
    std::string path = line.substr(3);
    while (true) {
      take(quota("/sys/fs/cgroup" + (path == "/" ? "" : path) + "/cpu.max"));
      size_t slash = path.rfind('/');
      if (slash == std::string::npos || path == "/") break;
      path = slash ? path.substr(0, slash) : "/";
    }
  }
  std::ifstream v1("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double most = 0, each = 0;
  if (v1 >> most && period >> each && most > 0 && each > 0) take(size_t(most / each + 0.999));
  return least;
}

}  // namespace

size_t usable_processors() {
  size_t found = std::max(1u, std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) found = std::max(1, CPU_COUNT(&set));
#endif
  if (size_t limit = cgroup_quota()) found = std::min(found, limit);
  if (const char* asked = std::getenv("OMP_NUM_THREADS")) {
    long n = std::strtol(asked, nullptr, 10);
    if (n > 0) found = std::min(found, size_t(n));
  }
  return found;
}

struct Pool::Worker {
  std::thread thread;
};

Pool& Pool::shared() {
  static Pool* pool = new Pool(usable_processors());
  return *pool;
}

Pool::Pool(size_t threads) { resize(threads); }
Pool::~Pool() { stop(); }

void Pool::stop() {
  ends_ = true;
  job_.fetch_add(1);
  job_.notify_all();
  for (Worker* worker : workers_) {
    worker->thread.join();
    delete worker;
  }
  workers_.clear();
  ends_ = false;
}

void Pool::resize(size_t threads) {
  auto held = lock();
  threads = std::clamp<size_t>(threads, 1, 1024);
  stop();
  threads_ = 1;
  scratch_.resize(threads);
  shares_ = std::make_unique<Share[]>(threads);
  workers_.reserve(threads);
  for (size_t i = 1; i < threads; ++i) {
    auto worker = std::make_unique<Worker>();
    try {
      worker->thread = std::thread([this, i] { work(i); });
    } catch (const std::system_error&) {
      break;  // this process may make no more; those that there are do
    }
    workers_.push_back(worker.release());
    threads_ = workers_.size() + 1;
  }
}

namespace {

// Given back first: nothing of it is wanted any more, and what grows step by step takes too much.
float* at_least(std::vector<float>& memory, size_t floats) {
  if (memory.size() < floats) {
    memory = std::vector<float>();
    memory.resize(floats);
  }
  return memory.data();
}

}  // namespace

float* Pool::scratch(size_t thread, size_t floats) { return at_least(scratch_[thread], floats); }
float* Pool::common(size_t floats) { return at_least(common_, floats); }

void Pool::run(size_t n, size_t grain, Call call, void* context) {
  if (n == 0) return;
  auto held = lock();
  grain = std::max({grain, size_t(1), (n + MOST_RANGES - 1) / MOST_RANGES});
  size_t ranges = (n + grain - 1) / grain;
  if (ranges == 1 || threads() == 1) {
    call(context, 0, n, 0);
    return;
  }
  n_ = n, grain_ = grain, call_ = call, context_ = context;
  done_.store(0, std::memory_order_relaxed);
  uint32_t job = job_.load(std::memory_order_relaxed) + 1;
  for (size_t i = 0, shares = threads(); i < shares; ++i) {
    uint64_t first = ranges * i / shares, last = ranges * (i + 1) / shares;
    shares_[i].state.store(uint64_t(job) << 32 | last << 16 | first, std::memory_order_release);
  }
  job_.store(job, std::memory_order_release);
  job_.notify_all();
  claim(job, 0);
  for (int spin = 0; done_.load(std::memory_order_acquire) != ranges; ++spin) {
    if (spin < SPINS) relax();
    else std::this_thread::yield();
  }
  if (std::exception_ptr error = std::exchange(error_, nullptr)) std::rethrow_exception(error);
}

void Pool::claim(uint32_t job, size_t thread) {
  for (size_t i = 0, n = threads(); i < n; ++i) {
    std::atomic<uint64_t>& share = shares_[(thread + i) % n].state;
    uint64_t state = share.load(std::memory_order_acquire);
    while (true) {
      size_t next = state & 0xffff, end = state >> 16 & 0xffff;
      if (uint32_t(state >> 32) != job) return;
      if (next >= end) break;
      if (!share.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
      // The job cannot end before this range is done, so what describes it stands still.
      work_on(next, thread);
      state = share.load(std::memory_order_acquire);
    }
  }
}

void Pool::work_on(size_t range, size_t thread) {
  size_t first = range * grain_;
  try {
    call_(context_, first, std::min(first + grain_, n_), thread);
  } catch (...) {  // told to the caller when nobody works on the job any more
    std::lock_guard<std::mutex> held(failing_);
    if (!error_) error_ = std::current_exception();
  }
  done_.fetch_add(1, std::memory_order_acq_rel);
}

void Pool::work(size_t thread) {
  uint32_t seen = 0;
  while (true) {
    uint32_t job = job_.load(std::memory_order_acquire);
    for (int spin = 0; job == seen && spin < SPINS; ++spin) {
      relax();
      job = job_.load(std::memory_order_acquire);
    }
    if (job == seen) {
      job_.wait(seen, std::memory_order_acquire);
      continue;
    }
    if (ends_) return;
    seen = job;
    claim(job, thread);
  }
}

}  // namespace mlk
