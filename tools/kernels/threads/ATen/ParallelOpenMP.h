// Stands in for the header of this name in torch where the thread sanitizer watches (tools/kernels/sanitize.py): the
// loops of csrc run in threads that it knows. It does not see how those of OpenMP wait for each other, and would report
// every hand-over as a race.
#pragma once

#include <algorithm>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#define INTRA_OP_PARALLEL

namespace at::internal {

template <typename F>
inline void invoke_parallel(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  int64_t threads = at::get_num_threads();
  if (grain_size > 0) threads = std::min(threads, divup(end - begin, grain_size));
  int64_t chunk = divup(end - begin, threads);
  std::exception_ptr error;
  std::mutex one;
  std::vector<std::thread> running;
  for (int64_t thread = 0; begin + thread * chunk < end; thread++) {
    running.emplace_back([&, thread] {
      try {
        ThreadIdGuard guard(thread);
        f(begin + thread * chunk, std::min(end, begin + (thread + 1) * chunk));
      } catch (...) {
        std::lock_guard<std::mutex> alone(one);
        error = std::current_exception();
      }
    });
  }
  for (std::thread& thread : running) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace at::internal
