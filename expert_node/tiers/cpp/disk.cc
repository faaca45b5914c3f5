// Files into buffers, read in pieces by a few threads of its own: the piece that is due first goes first.
//
// Who waits for a file waits in here (`wait`), and what has been read is collected in one call, so that no thread of
// the reader ever needs Python's lock.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#define MOEHIVE_API extern "C" __attribute__((visibility("default")))

namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kPage = 4096;  // direct reads want addresses, offsets and sizes in multiples of it
constexpr int32_t kShort = -1;   // in place of an errno: the file has fewer bytes than it should
constexpr int32_t kCancelled = -2;

struct Job {
  int64_t number;
  int64_t due;
  std::string path;
  char* buffer;
  int64_t bytes;
  bool direct;
  int64_t claimed = 0;  // bytes that some thread has taken on
  int reading = 0;      // pieces in hand
  int32_t error = 0;
};

// With O_DIRECT if `direct` and the file system knows it. -1: errno says why not.
int open_for_reading(const char* path, bool direct) {
#ifdef O_DIRECT
  if (direct) {
    const int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
    if (descriptor >= 0) return descriptor;  // tmpfs and some network file systems have no such thing
  }
#else
  (void)direct;
#endif
  return open(path, O_RDONLY | O_CLOEXEC);
}

// Reads `bytes` bytes at `offset`, in whole pages as a direct read must. A descriptor for each piece costs some
// microseconds beside hundreds for its bytes, and no thread waits for another one's.
int32_t read_piece(const Job& job, int64_t offset, int64_t bytes) {
  const int descriptor = open_for_reading(job.path.c_str(), job.direct);
  if (descriptor < 0) return errno;
#ifdef POSIX_FADV_SEQUENTIAL
  if (!job.direct) posix_fadvise(descriptor, offset, bytes, POSIX_FADV_SEQUENTIAL);
#endif
  const int64_t whole = (bytes + kPage - 1) / kPage * kPage;
  int32_t error = 0;
  for (int64_t done = 0; done < bytes && !error;) {
    int64_t count = pread(descriptor, job.buffer + offset + done, whole - done, offset + done);
    if (count < 0) {
      if (errno != EINTR) error = errno;
      continue;
    }
    if (done + count < bytes) count -= count % kPage;  // a direct read goes on at a page's start
    if (count == 0) error = kShort;
    done += count;
  }
#ifdef POSIX_FADV_DONTNEED
  if (!job.direct) posix_fadvise(descriptor, offset, bytes, POSIX_FADV_DONTNEED);
#endif
  close(descriptor);
  return error;
}

// On the coordinator's machine threads of a node wait for their turn (courtesy.py). Not these: they take a moment of a
// processor for each piece, and until then the disk has nothing to do.
void begin_at_once() {
#if defined(__linux__)
  const sched_param none{};
  sched_setscheduler(0, SCHED_OTHER, &none);
#endif
}

class Reader {
 public:
  Reader(int threads, int64_t piece) : piece_(piece) {
    try {
      for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
    } catch (...) {
      end();
      throw;
    }
  }
  ~Reader() { end(); }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  int64_t read(const char* path, char* buffer, int64_t bytes, int64_t due, bool direct) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t number = ++last_number_;
    auto job = std::make_unique<Job>(Job{number, due, path, buffer, bytes, direct});
    line_.emplace(std::make_pair(due, number), job.get());
    jobs_.emplace(number, std::move(job));
    const int64_t pieces = (bytes + piece_ - 1) / piece_;
    for (int64_t i = std::min<int64_t>(pieces, idle_); i > 0; --i) work_.notify_one();
    return number;
  }

  void move(int64_t number, int64_t due) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = jobs_.find(number);
    if (found == jobs_.end()) return;
    Job& job = *found->second;
    if (line_.erase({job.due, number})) line_.emplace(std::make_pair(due, number), &job);
    job.due = due;
  }

  bool cancel(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = jobs_.find(number);
    if (found == jobs_.end()) return false;
    Job& job = *found->second;
    if (!line_.erase({job.due, number})) return false;
    if (job.reading) {
      job.claimed = job.bytes;
      job.error = kCancelled;
      return false;
    }
    jobs_.erase(found);
    return true;
  }

  int64_t collect(int64_t* numbers, int32_t* errors, int64_t room) {
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t count = 0;
    for (; count < room && !finished_.empty(); ++count) {
      numbers[count] = finished_.front().first;
      errors[count] = finished_.front().second;
      finished_.pop_front();
    }
    return count;
  }

  uint64_t wait(uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    news_.wait(lock, [&] { return news_count_ != seen; });
    return news_count_;
  }

  uint64_t news() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return news_count_;
  }

  void wake() {
    const std::lock_guard<std::mutex> lock(mutex_);
    tell();
  }

  void totals(int64_t* bytes, double* seconds) {
    const std::lock_guard<std::mutex> lock(mutex_);
    *bytes = bytes_;
    *seconds = seconds_ + (in_flight_ ? busy_seconds() : 0);
  }

 private:
  double busy_seconds() const { return std::chrono::duration<double>(Clock::now() - busy_since_).count(); }

  void tell() {
    ++news_count_;
    news_.notify_all();
  }

  void work() {
    begin_at_once();
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      ++idle_;
      work_.wait(lock, [this] { return closed_ || !line_.empty(); });
      --idle_;
      if (closed_) return;
      Job& job = *line_.begin()->second;
      const int64_t offset = job.claimed, bytes = std::min(piece_, job.bytes - offset);
      job.claimed += bytes;
      if (job.claimed == job.bytes) line_.erase(line_.begin());
      ++job.reading;
      if (!in_flight_++) busy_since_ = Clock::now();
      lock.unlock();
      const int32_t error = read_piece(job, offset, bytes);
      lock.lock();
      bytes_ += bytes;
      if (!--in_flight_) seconds_ += busy_seconds();
      if (error && !job.error) {
        job.error = error;
        if (line_.erase({job.due, job.number})) job.claimed = job.bytes;  // the rest is of no use
      }
      if (!--job.reading && job.claimed == job.bytes) {
        finished_.emplace_back(job.number, job.error);
        jobs_.erase(job.number);
        tell();
      }
    }
  }

  void end() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
      work_.notify_all();
    }
    for (std::thread& thread : threads_) thread.join();
  }

  const int64_t piece_;
  std::mutex mutex_;
  std::condition_variable work_, news_;
  std::map<std::pair<int64_t, int64_t>, Job*> line_;  // by due and number: those with pieces that nobody has taken
  std::unordered_map<int64_t, std::unique_ptr<Job>> jobs_;  // those that are not finished
  std::deque<std::pair<int64_t, int32_t>> finished_;        // numbers and errors, until they are collected
  int64_t last_number_ = 0;
  uint64_t news_count_ = 0;
  int idle_ = 0, in_flight_ = 0;
  Clock::time_point busy_since_{};
  int64_t bytes_ = 0;
  double seconds_ = 0;
  bool closed_ = false;
  std::vector<std::thread> threads_;
};

Reader* of(void* handle) { return static_cast<Reader*>(handle); }

}  // namespace

MOEHIVE_API int32_t moehive_disk_abi() { return 1; }

// Null when the threads can't be made.
MOEHIVE_API void* moehive_disk_create(int32_t threads, int64_t piece_bytes) {
  if (threads < 1 || piece_bytes < kPage || piece_bytes % kPage) return nullptr;
  try {
    return new Reader(threads, piece_bytes);
  } catch (const std::exception&) {
    return nullptr;
  }
}

// Pieces in hand are read to their end; nothing else is. No thread may be in `wait`.
MOEHIVE_API void moehive_disk_destroy(void* handle) { delete of(handle); }

// Puts a file's first `bytes` bytes in line for `buffer`, which has whole pages and stays until the file's number is
// collected or cancelled. What has the smallest `due` is read first. Returns the number; 0 without memory.
MOEHIVE_API int64_t moehive_disk_read(void* handle, const char* path, void* buffer, int64_t bytes, int64_t due,
                                      int32_t direct) {
  if (bytes < 1) return 0;
  try {
    return of(handle)->read(path, static_cast<char*>(buffer), bytes, due, direct != 0);
  } catch (const std::exception&) {
    return 0;
  }
}

// What is left of a file becomes due at another time.
MOEHIVE_API void moehive_disk_move(void* handle, int64_t number, int64_t due) { of(handle)->move(number, due); }

// Takes what is left of a file out of line: 1; 0 when a piece of it is being read, so that it will be collected, as
// read or as cancelled.
MOEHIVE_API int32_t moehive_disk_cancel(void* handle, int64_t number) { return of(handle)->cancel(number); }

// The numbers of up to `room` files that are read, each once, and for each 0, an errno, -1 when it was too short, -2 when it was
// cancelled.
MOEHIVE_API int64_t moehive_disk_collect(void* handle, int64_t* numbers, int32_t* errors, int64_t room) {
  return of(handle)->collect(numbers, errors, room);
}

// A number that changes with each file that is read and each call of `wake`; `wait` waits until it is not `seen`.
MOEHIVE_API uint64_t moehive_disk_news(void* handle) { return of(handle)->news(); }
MOEHIVE_API uint64_t moehive_disk_wait(void* handle, uint64_t seen) { return of(handle)->wait(seen); }
MOEHIVE_API void moehive_disk_wake(void* handle) { of(handle)->wake(); }

// Since the start: bytes read, and the seconds in which at least one read was in flight.
MOEHIVE_API void moehive_disk_totals(void* handle, int64_t* bytes, double* seconds) {
  of(handle)->totals(bytes, seconds);
}
