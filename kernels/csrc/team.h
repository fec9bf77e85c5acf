// The threads of the backend: one team, one parallel region per step.
//
// All members run the same function. Work is handed out in chunks by an atomic counter, and phases
// end at a barrier that spins for a while and then sleeps on a futex. Which member computes a chunk
// never changes a result. A second pool (OpenMP's, torch's) would fight for the same cores: torch is
// kept out of the step.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace toptwo {

class Team {
 public:
  // size: members, the caller of `run` included.
  // pinned: the calling process is the team's alone. Where there is a member for every processor, each is
  // bound to its own, the caller too; two members on one processor would wait for each other.
  Team(int size, bool pinned);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // What a member sees of the team while `run` lasts.
  class Member {
   public:
    Member(Team& team, int index) : team_(team), index_(index) {}
    int index() const { return index_; }
    int team_size() const { return team_.size_; }

    // Call f(i) for every i < n, each once on some member; returns when all are done.
    template <class F>
    void for_each(int64_t n, F&& f) {
      std::atomic<int64_t>& next = team_.counters_[phase_ % 4].value;
      // The counter of two phases ago is at rest: everyone has left that phase's barrier.
      if (index_ == 0) team_.counters_[(phase_ + 2) % 4].value.store(0, std::memory_order_relaxed);
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(i);
      ++phase_;
      team_.wait_for_all();
    }

   private:
    Team& team_;
    int index_;
    unsigned phase_ = 0;
  };

  // Run f(member) on every member; returns when all have returned. Not reentrant. f must not throw.
  void run(const std::function<void(Member&)>& f);

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };
  // A number that members wait to see change: by spinning first, asleep later.
  struct alignas(64) Signal {
    std::atomic<uint32_t> value{0};
    std::atomic<uint32_t> sleepers{0};
    void wait_while(uint32_t old, int spins);
    void advance();
  };

  void wait_for_all();
  void work(int index);

  int size_;
  Counter counters_[4];
  alignas(64) std::atomic<int> arrived_{0};
  Signal barrier_, start_;
  const std::function<void(Member&)>* function_ = nullptr;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace toptwo
