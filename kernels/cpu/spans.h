// A cache's spans of pages, shared out over threads.
//
// A `Job` says how a part's rows attend:
//   Spans spans(part)                          that its rows see
//   Seen seen(part, memory), floats(part)      where they are kept, and the floats that takes
//   attend(part, span, seen), join(part, seen, more), finish(part, seen)
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
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

// A part that one thread has for itself; `memory` is twice floats(part).
template <class Job, class Part>
void attend_whole(const Job& job, const Part& part, float* memory) {
  const Spans spans = job.spans(part);
  const Seen seen = job.seen(part, memory), more = job.seen(part, memory + job.floats(part));
  job.attend(part, spans.begin, seen);
  for (int64_t span = spans.begin + 1; span < spans.end; ++span) {
    job.attend(part, span, more);
    job.join(part, seen, more);
  }
  job.finish(part, seen);
}

// Parts whose spans are given to all threads. Throws std::bad_alloc.
template <class Job, class Part>
void attend_in_spans(Trunk& trunk, const Job& job, const std::vector<Part>& parts, int64_t work) {
  struct Piece {
    const Part* part;
    int64_t span, at;
  };
  thread_local std::vector<Piece> pieces;
  thread_local std::vector<float> memory;
  pieces.clear();
  int64_t floats = 16;
  for (const Part& part : parts) {
    const Spans spans = job.spans(part);
    for (int64_t span = spans.begin; span < spans.end; ++span) {
      pieces.push_back({&part, span, floats});
      floats += job.floats(part);
    }
  }
  if (static_cast<int64_t>(memory.size()) < floats) memory.resize(floats);
  float* const begin = memory.data() - reinterpret_cast<uintptr_t>(memory.data()) / sizeof(float) % 16;  // of a line
  const Piece* list = pieces.data();  // of this thread: the others must not look for their own
  const auto seen = [&](const Piece& piece) { return job.seen(*piece.part, begin + piece.at); };
  trunk.each(static_cast<int64_t>(pieces.size()), work,
             [&](int64_t i) { job.attend(*list[i].part, list[i].span, seen(list[i])); });
  for (size_t i = 0, next; i < pieces.size(); i = next) {
    for (next = i + 1; next < pieces.size() && pieces[next].part == pieces[i].part; ++next)
      job.join(*pieces[i].part, seen(pieces[i]), seen(pieces[next]));
    job.finish(*pieces[i].part, seen(pieces[i]));
  }
}

}  // namespace moehive
