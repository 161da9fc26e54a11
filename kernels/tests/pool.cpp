#include <chrono>
#include <thread>

#include "checks.h"
#include "values.h"

namespace mlk {

void check_pool() {
  for (size_t threads : {1, 2, 5}) {
    Pool pool(threads);
    for (int round = 0; round < 300; ++round) {
      size_t n = between(0, 200), grain = between(1, 9);
      std::vector<int> met(n, 0);
      pool.each(n, grain, [&](size_t first, size_t last, size_t thread) {
        if (thread >= threads) std::abort();
        for (size_t i = first; i < last; ++i) ++met[i];
      });
      for (int times : met) require(times, 1, 0, "parts of a job");
      if (round % 100 == 99) {
        pool.resize(threads);
        std::this_thread::sleep_for(std::chrono::milliseconds(2));  // until the workers sleep
      }
    }
    std::vector<std::thread> callers;
    std::atomic<size_t> total{0};
    for (int caller = 0; caller < 3; ++caller) {
      callers.emplace_back([&] {
        for (int i = 0; i < 100; ++i) {
          pool.each(37, 2, [&](size_t first, size_t last, size_t) { total += last - first; });
        }
      });
    }
    for (auto& caller : callers) caller.join();
    require(double(total), 3 * 100 * 37, 0, "parts of jobs of several callers");
  }
}

}  // namespace mlk
