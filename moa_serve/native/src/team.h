// Threads that compute a step together: all run the same function and meet at barriers. Between steps they sleep; at a barrier they
// spin for some microseconds and then sleep, so that a busy neighbour costs time but never the machine.
#pragma once
#include <stdint.h>

struct Team;

using TeamWork = void (*)(void* argument, int thread, int num_threads);

Team* team_new(int num_threads);  // throws std::system_error or std::bad_alloc, and then leaves nothing behind
void team_delete(Team* team);
int team_size(const Team* team);
// Runs `work` on the first `num_threads` threads, the caller's among them, and returns when all are done.
void team_run(Team* team, int num_threads, TeamWork work, void* argument);
// Inside of `work`: go on when every thread is here.
void team_meet(Team* team);
// Of the last run, the largest share of a thread's time in which it neither computed nor slept: somebody else had its core.
double team_lost_share(const Team* team);
