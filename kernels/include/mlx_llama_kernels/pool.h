// Threads that share out the parts of one job at a time.
//
// The caller works too, and needs nobody: parts are claimed one by one, so a thread that is not
// running delays nothing but the part it holds. Each thread begins with a share of its own, in
// order, because what it fetches ahead is then what it works on next; who is done helps the others.
// Idle threads sleep after some microseconds.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <vector>

namespace mlk {

// Processors that this process may use: its affinity, its cgroup's quota, OMP_NUM_THREADS.
size_t usable_processors();

class Pool {
 public:
  // The one of this process; never destroyed, because other threads may outlive main.
  static Pool& shared();

  explicit Pool(size_t threads);
  ~Pool();
  Pool(const Pool&) = delete;

  size_t threads() const { return threads_.load(); }
  // Threads that work, the caller included; at least 1. Fewer where the system gives no more.
  void resize(size_t threads);

  // Calls part(first, last, thread) for ranges that cover [0, n) once; thread is below threads().
  // Ranges are of `grain` parts, larger ones where there would be too many. What a part throws is
  // thrown here, once all are over.
  template <class Fn>
  void each(size_t n, size_t grain, Fn part) {
    run(n, grain, [](void* f, size_t first, size_t last, size_t thread) {
      (*static_cast<Fn*>(f))(first, last, thread);
    }, &part);
  }

  // Memory of at least so many floats for each thread, kept for the next job; for use inside of
  // one job, by its thread.
  float* scratch(size_t thread, size_t floats);
  // The same for the caller, who must hold `lock`.
  float* common(size_t floats);
  // Floats that are held so, whoever asked for them.
  size_t held() {
    auto taken = lock();
    size_t floats = common_.size();
    for (const auto& memory : scratch_) floats += memory.size();
    return floats;
  }
  std::unique_lock<std::recursive_mutex> lock() {
    return std::unique_lock<std::recursive_mutex>(busy_);
  }

 private:
  using Call = void (*)(void*, size_t, size_t, size_t);
  void run(size_t n, size_t grain, Call call, void* context);
  void work(size_t thread);
  void claim(uint32_t job, size_t thread);
  void work_on(size_t range, size_t thread);
  void stop();

  struct Worker;
  std::recursive_mutex busy_;
  std::atomic<size_t> threads_{1};
  std::vector<Worker*> workers_;
  std::vector<std::vector<float>> scratch_;
  std::vector<float> common_;

  // A thread's share of the job's ranges: the job's number (32 bits), the end (16), the next (16).
  struct alignas(64) Share {
    std::atomic<uint64_t> state{0};
  };
  std::unique_ptr<Share[]> shares_;
  std::atomic<uint32_t> job_{0};
  std::atomic<uint32_t> done_{0};
  std::atomic<bool> ends_{false};
  size_t n_ = 0, grain_ = 1;
  Call call_ = nullptr;
  void* context_ = nullptr;
  std::mutex failing_;
  std::exception_ptr error_;
};

}  // namespace mlk
