#include "team.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <thread>
#include <vector>

namespace {

constexpr int kSpins = 400;  // of about 40 ns: threads that all have a core meet within this time

int64_t nanoseconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return now.tv_sec * 1000000000LL + now.tv_nsec;
}

// A word that is counted up; who waits for the next count spins, then sleeps.
struct alignas(64) Signal {
  std::atomic<uint32_t> count{0};
  std::atomic<int> sleepers{0};

  void raise() {
    count.fetch_add(1);
    if (sleepers.load() > 0) syscall(SYS_futex, reinterpret_cast<uint32_t*>(&count), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }

  // Returns the nanoseconds asleep.
  int64_t wait(uint32_t seen) {
    for (int i = 0; i < kSpins; i++) {
      if (count.load(std::memory_order_acquire) != seen) return 0;
      __builtin_ia32_pause();
    }
    const int64_t start = nanoseconds(CLOCK_MONOTONIC);
    sleepers.fetch_add(1);
    while (count.load() == seen) syscall(SYS_futex, reinterpret_cast<uint32_t*>(&count), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    sleepers.fetch_sub(1);
    return nanoseconds(CLOCK_MONOTONIC) - start;
  }
};

thread_local int64_t asleep_nanoseconds = 0;  // at barriers of the run in progress

}  // namespace

struct Team {
  std::vector<std::thread> workers;
  Signal start, barrier, finish;
  alignas(64) std::atomic<int> arrived{0};
  std::atomic<int> running{0};
  std::vector<double> lost;  // by thread, of the last run
  TeamWork work = nullptr;
  void* argument = nullptr;
  int num_active = 1;
  bool is_over = false;

  void compute(int thread) {
    const int64_t start_time = nanoseconds(CLOCK_MONOTONIC), start_computing = nanoseconds(CLOCK_THREAD_CPUTIME_ID);
    asleep_nanoseconds = 0;
    work(argument, thread, num_active);
    const double computing = (double)(nanoseconds(CLOCK_THREAD_CPUTIME_ID) - start_computing);
    const double all = (double)(nanoseconds(CLOCK_MONOTONIC) - start_time);
    lost[(size_t)thread] = all > 0 ? std::max(0.0, all - computing - (double)asleep_nanoseconds) / all : 0;
  }

  void loop(int thread) {
    for (uint32_t seen = 0;; seen++) {
      start.wait(seen);
      if (is_over) return;
      if (thread < num_active) compute(thread);
      if (running.fetch_sub(1) == 1) finish.raise();
    }
  }
};

Team* team_new(int num_threads) {
  Team* team = new Team;
  team->lost.resize((size_t)num_threads);
  try {
    for (int thread = 1; thread < num_threads; thread++) team->workers.emplace_back([team, thread] { team->loop(thread); });
  } catch (...) {  // the system gives no more threads: end those that there are
    team_delete(team);
    throw;
  }
  return team;
}

void team_delete(Team* team) {
  team->is_over = true;
  team->start.raise();
  for (std::thread& worker : team->workers) worker.join();
  delete team;
}

int team_size(const Team* team) { return (int)team->workers.size() + 1; }

void team_run(Team* team, int num_threads, TeamWork work, void* argument) {
  team->work = work, team->argument = argument, team->num_active = num_threads;
  std::fill(team->lost.begin(), team->lost.end(), 0.0);
  if (num_threads == 1) return team->compute(0);
  // All workers start and finish, also those that have no share of this run: so none can miss one.
  team->running.store((int)team->workers.size());
  team->start.raise();
  team->compute(0);
  for (;;) {
    const uint32_t seen = team->finish.count.load();  // before the look at `running`: whoever ends last raises it after
    if (team->running.load() == 0) return;
    team->finish.wait(seen);
  }
}

void team_meet(Team* team) {
  const uint32_t seen = team->barrier.count.load(std::memory_order_acquire);
  if (team->arrived.fetch_add(1) + 1 < team->num_active) {
    asleep_nanoseconds += team->barrier.wait(seen);
    return;
  }
  team->arrived.store(0);
  team->barrier.raise();
}

double team_lost_share(const Team* team) { return *std::max_element(team->lost.begin(), team->lost.end()); }
