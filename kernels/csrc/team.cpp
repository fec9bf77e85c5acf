#include "team.h"

#include <sched.h>
#if defined(__linux__)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace toptwo {

namespace {

// About 50 us between steps: what a sleeping process would not miss.
constexpr int kIdleSpins = 1200;
// About 5 ms inside a step: who waits longer than microseconds waits for a member that another process has
// displaced. Sleeping would hand that process this processor too, for a whole slice at every barrier.
constexpr int kBarrierSpins = 120'000;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Processors that this process may use.
std::vector<int> processors() {
  std::vector<int> found;
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed)) return found;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &allowed)) found.push_back(cpu);
#endif
  return found;
}

void bind_to(std::thread::native_handle_type thread, int cpu) {
#if defined(__linux__)
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  pthread_setaffinity_np(thread, sizeof one, &one);
#endif
}

}  // namespace

void Team::Signal::wait_while(uint32_t old, int spins) {
  for (int i = 0; i < spins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    relax();
  }
  sleepers.fetch_add(1);
  while (value.load() == old) value.wait(old);
  sleepers.fetch_sub(1);
}

void Team::Signal::advance() {
  value.fetch_add(1);
  if (sleepers.load()) value.notify_all();
}

Team::Team(int size, bool pinned) : size_(size < 1 ? 1 : size) {
  for (int index = 1; index < size_; ++index) threads_.emplace_back([this, index] { work(index); });
  const std::vector<int> cpus = processors();
  if (!pinned || int(cpus.size()) != size_) return;
  bind_to(pthread_self(), cpus[0]);
  for (int index = 1; index < size_; ++index) bind_to(threads_[size_t(index - 1)].native_handle(), cpus[size_t(index)]);
}

Team::~Team() {
  stopping_ = true;
  start_.advance();
  for (std::thread& thread : threads_) thread.join();
}

void Team::wait_for_all() {
  if (size_ == 1) return;
  uint32_t now = barrier_.value.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    barrier_.advance();
  } else {
    barrier_.wait_while(now, kBarrierSpins);
  }
}

void Team::work(int index) {
  for (uint32_t seen = 0;;) {
    start_.wait_while(seen, kIdleSpins);
    seen = start_.value.load(std::memory_order_acquire);
    if (stopping_) return;
    Member member(*this, index);
    (*function_)(member);
    wait_for_all();
  }
}

void Team::run(const std::function<void(Member&)>& f) {
  function_ = &f;
  for (Counter& counter : counters_) counter.value.store(0, std::memory_order_relaxed);
  start_.advance();
  Member member(*this, 0);
  f(member);
  wait_for_all();
}

}  // namespace toptwo
