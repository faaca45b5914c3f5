// A cache's spans of pages, shared out over threads.
//
// A `Job` says how a part's rows attend:
//   Spans spans(part)                          that its rows see
//   Seen seen(part, memory), floats(part)      where they are kept, and the floats that takes: a multiple of 16
//   attend(part, span, seen), join(part, seen, more), finish(part, seen)
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "scratch.h"
#include "trunk_threads.h"

namespace moehive {

// begin .. end
struct Spans {
  int64_t begin, end;
  static Spans of(int64_t first_key, int64_t last_key) {
    return {first_key / (kPage * kSpan), last_key / (kPage * kSpan) + 1};
  }
  int64_t count() const { return end - begin; }
};

// Parts that one thread each has for itself. Throws std::bad_alloc.
template <class Job, class Part>
void attend_whole(Trunk& trunk, const Job& job, const std::vector<Part>& parts, int64_t work) {
  int64_t floats = 0;
  for (const Part& part : parts) floats = std::max(floats, job.floats(part));
  thread_local Scratch scratch;
  float* const memory = scratch.floats(2 * floats * trunk.threads());
  const int64_t count = static_cast<int64_t>(parts.size());
  std::atomic<int64_t> next{0};
  trunk.each(trunk.threads(), work, [&](int64_t thread) {
    float* const own = memory + 2 * floats * thread;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      const Part& part = parts[i];
      const Spans spans = job.spans(part);
      const Seen seen = job.seen(part, own), more = job.seen(part, own + floats);
      job.attend(part, spans.begin, seen);
      for (int64_t span = spans.begin + 1; span < spans.end; ++span) {
        job.attend(part, span, more);
        job.join(part, seen, more);
      }
      job.finish(part, seen);
    }
  });
}

// Parts whose spans are given to all threads. Throws std::bad_alloc.
template <class Job, class Part>
void attend_in_spans(Trunk& trunk, const Job& job, const std::vector<Part>& parts, int64_t work) {
  struct Piece {
    const Part* part;
    int64_t span, at;
  };
  thread_local std::vector<Piece> pieces;
  thread_local Scratch scratch;
  pieces.clear();
  int64_t floats = 0;
  for (const Part& part : parts) {
    const Spans spans = job.spans(part);
    for (int64_t span = spans.begin; span < spans.end; ++span) {
      pieces.push_back({&part, span, floats});
      floats += job.floats(part);
    }
  }
  float* const memory = scratch.floats(floats);
  const Piece* list = pieces.data();  // of this thread: the others must not look for their own
  const auto seen = [&](const Piece& piece) { return job.seen(*piece.part, memory + piece.at); };
  trunk.each(static_cast<int64_t>(pieces.size()), work,
             [&](int64_t i) { job.attend(*list[i].part, list[i].span, seen(list[i])); });
  for (size_t i = 0, next; i < pieces.size(); i = next) {
    for (next = i + 1; next < pieces.size() && pieces[next].part == pieces[i].part; ++next)
      job.join(*pieces[i].part, seen(pieces[i]), seen(pieces[next]));
    job.finish(*pieces[i].part, seen(pieces[i]));
  }
}

}  // namespace moehive
