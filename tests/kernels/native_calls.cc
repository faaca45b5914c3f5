// Loads every native library of a build and calls some of each, through the functions that Python calls: prints a name
// and a hash of the results' bits for each call, or the results themselves where bits may differ between processors.
//
//   native_calls KERNELS.so PROTO.so DISPATCH.so PLANNER.so DISK.so SLOW_LINK.so FILE
//
// FILE is read by the disk's threads.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "expert_mlp.h"
#include "linear.h"
#include "rounding.h"

using moehive::Format;

namespace {

uint32_t state = 1;
uint32_t next() { return state = state * 1664525u + 1013904223u; }

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s: %s\n", what, dlerror());
  std::exit(1);
}

// The function `name` of a library, none of whose symbols may be missing.
template <class Function>
Function* find(void* library, const char* name) {
  void* found = dlsym(library, name);
  require(found, name);
  return reinterpret_cast<Function*>(found);
}

template <class T>
void show_hash(const std::string& name, const std::vector<T>& data) {
  uint64_t hash = 1469598103934665603u;
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(data.data());
  for (size_t i = 0; i < data.size() * sizeof(T); ++i) hash = (hash ^ bytes[i]) * 1099511628211u;
  std::printf("hash %s %016llx\n", name.c_str(), static_cast<unsigned long long>(hash));
}

std::vector<float> numbers(size_t count) {
  std::vector<float> made(count);
  for (float& x : made) x = static_cast<float>(static_cast<int32_t>(next())) * 0x1p-31f;
  return made;
}

std::vector<uint16_t> bf16_of(const std::vector<float>& wide) {
  std::vector<uint16_t> made(wide.size());
  for (size_t i = 0; i < wide.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &wide[i], 4);
    made[i] = bits >> 16;
  }
  return made;
}

// Rows of a GGUF file in q4_0, whose factors are numbers of about 2^-9.
std::vector<uint8_t> rows_of_q4_0(int64_t blocks) {
  std::vector<uint8_t> made(blocks * 18);
  for (uint8_t& byte : made) byte = next() >> 24;
  for (int64_t block = 0; block < blocks; ++block) {
    const uint16_t factor = (next() >> 16 & 0x83ffu) | 0x1800u;
    std::memcpy(&made[block * 18], &factor, 2);
  }
  return made;
}

constexpr int64_t kHidden = 64, kMiddle = 32, kTokens = 3, kExperts = 2, kDown = 1 << 15;
constexpr int kThreads = 2;

struct alignas(64) Blob {
  uint8_t bytes[1 << 16];
};

void call_kernels(void* library) {
  auto* pack = find<int32_t(int32_t, const uint8_t*, int64_t, int64_t, uint8_t*)>(library, "moehive_pack");
  auto* create = find<void*(const char*, int32_t)>(library, "moehive_create");
  auto* destroy = find<void(void*)>(library, "moehive_destroy");
  auto* kernel = find<const char*(int32_t)>(library, "moehive_kernel");
  auto* layer = find<int32_t(void*, const MoehiveSpec*, void*, int32_t, int64_t, const uint32_t*, const uint64_t*,
                             const float*, int32_t, void*)>(library, "moehive_layer");
  static Blob blobs[2][kExperts];  // of q4_0, of bf16
  for (Blob& blob : blobs[0]) {
    const auto up = rows_of_q4_0(2 * kMiddle * kHidden / 32), down = rows_of_q4_0(kHidden * kMiddle / 32);
    const int32_t number = static_cast<int32_t>(Format::q4_0);
    require(pack(number, up.data(), 2 * kMiddle, kHidden / 32, blob.bytes) == 0, "pack");
    require(pack(number, down.data(), kHidden, kMiddle / 32, blob.bytes + kDown) == 0, "pack");
  }
  show_hash("packed", std::vector<uint8_t>(blobs[0][0].bytes, blobs[0][0].bytes + sizeof(Blob)));
  for (Blob& blob : blobs[1]) {
    const auto up = bf16_of(numbers(2 * kMiddle * kHidden)), down = bf16_of(numbers(kHidden * kMiddle));
    std::memcpy(blob.bytes, up.data(), up.size() * 2);
    std::memcpy(blob.bytes + kDown, down.data(), down.size() * 2);
  }
  auto hidden = bf16_of(numbers(kTokens * kHidden));
  const auto weights = numbers(kTokens * kExperts);
  const uint32_t offsets[kTokens + 1] = {0, 2, 4, 6};
  for (int place = 0; const char* name = kernel(place); ++place) {
    void* experts = create(name, kThreads);
    require(experts, name);
    for (int kind = 0; kind < 2; ++kind) {
      MoehiveSpec spec{};
      spec.hidden_size = kHidden, spec.intermediate_size = kMiddle, spec.gated = 1, spec.alpha = 1;
      spec.up_bias = spec.down_bias = spec.post_norm = -1, spec.down = kDown;
      spec.up_format = spec.down_format = static_cast<int32_t>(kind == 0 ? Format::q4_0 : Format::bf16);
      spec.activation = static_cast<int32_t>(moehive::Activation::relu);  // without the C library's functions
      std::vector<uint64_t> addresses;
      for (int pair = 0; pair < kTokens * kExperts; ++pair)
        addresses.push_back(reinterpret_cast<uint64_t>(&blobs[kind][pair % kExperts]));
      std::vector<uint16_t> sums(kTokens * kHidden);
      const int32_t status = layer(experts, &spec, hidden.data(), 1, kTokens, offsets, addresses.data(),
                                   weights.data(), 1, sums.data());
      require(status == 0, "layer");
      show_hash(std::string("layer-") + (kind == 0 ? "q4_0-" : "bf16-") + name, sums);
    }
    destroy(experts);
  }

  auto* trunk_create = find<void*(int32_t)>(library, "moehive_trunk_create");
  using Linear = int32_t(void*, const MoehiveMatrix*, int64_t, const float*, int64_t, float*);
  auto* linear = find<Linear>(library, "moehive_linear");
  void* trunk = trunk_create(kThreads);
  require(trunk, "trunk");
  const int32_t bf16 = static_cast<int32_t>(Format::bf16), q4_0 = static_cast<int32_t>(Format::q4_0);
  const std::vector<MoehiveMatrix> matrices{{blobs[1][0].bytes, nullptr, 2 * kMiddle, kHidden, bf16},
                                            {blobs[0][0].bytes, nullptr, 2 * kMiddle, kHidden, q4_0}};
  const auto x = numbers(kTokens * kHidden);
  std::vector<float> out(kTokens * 4 * kMiddle);
  require(linear(trunk, matrices.data(), matrices.size(), x.data(), kTokens, out.data()) == 0, "linear");
  std::printf("numbers linear");
  for (float number : out) std::printf(" %.9g", number);
  std::printf("\n");
}

// One block, with an upper triangle through which errors are compensated.
void call_rounding(void* library) {
  auto* quantize = find<int32_t(const MoehiveRounding*, int32_t)>(library, "moehive_quantize");
  constexpr int64_t rows = 19, columns = 250, width = 256;
  const auto weight = numbers(rows * columns);
  auto factor = numbers(width * width), importance = numbers(width);
  for (int64_t i = 0; i < width; ++i) factor[i * width + i] = 4, importance[i] += 2;
  for (Format format : {Format::q2_k, Format::q3_k, Format::q4_k, Format::q5_k, Format::q6_k, Format::q8_0,
                        Format::iq4_xs, Format::iq4_nl}) {
    std::vector<uint8_t> codes(rows * width), minimums(rows * width);
    std::vector<int8_t> scales(rows * width);
    std::vector<uint16_t> d(rows * width), m(rows * width);
    const MoehiveRounding job{weight.data(), importance.data(), factor.data(), codes.data(), d.data(), m.data(),
                              scales.data(), minimums.data(), rows, columns, width, static_cast<int32_t>(format)};
    require(quantize(&job, kThreads) == 0, "quantize");
    codes.insert(codes.end(), minimums.begin(), minimums.end());
    codes.insert(codes.end(), scales.begin(), scales.end());
    show_hash("codes-" + std::to_string(job.format), codes);
    d.insert(d.end(), m.begin(), m.end());
    show_hash("factors-" + std::to_string(job.format), d);
  }
}

void call_proto(void* library) {
  auto* round = find<void(const char*, int32_t, int64_t, int64_t, int8_t*, float*)>(library, "moehive_round");
  constexpr int64_t rows = 5, columns = 200, groups = 4;
  const auto wide = numbers(rows * columns);
  std::vector<int8_t> steps(rows * columns);
  std::vector<float> scales(rows * groups);
  round(reinterpret_cast<const char*>(wide.data()), 0, rows, columns, steps.data(), scales.data());
  show_hash("rounded", steps);
  show_hash("scales", scales);
}

void call_dispatch(void* library) {
  auto* choose = find<int32_t(const int32_t*, int64_t, int64_t, const double*, const double*, int64_t, const int64_t*,
                              int64_t, int32_t, int64_t*)>(library, "moehive_choose");
  constexpr int64_t experts = 16, most = 2, nodes = 3;
  std::vector<int32_t> holders;
  for (int64_t expert = 0; expert < experts; ++expert)
    for (int64_t place = 0; place < most; ++place) holders.push_back((expert + place) % nodes);
  const double base[nodes] = {1, 2, 4}, per[nodes] = {0.5, 0.25, 1};
  std::vector<int64_t> ids, owner(experts);
  for (int i = 0; i < 24; ++i) ids.push_back((next() >> 16) % experts);
  const int32_t status =
      choose(holders.data(), experts, most, base, per, nodes, ids.data(), ids.size(), 0, owner.data());
  require(status == 0, "choose");
  show_hash("chosen", owner);
}

void call_planner(void* library) {
  auto* count = find<void(int64_t, int64_t, const int64_t*, const uint16_t*, int32_t*)>(library, "moehive_count_pairs");
  const std::vector<int64_t> offsets{0, 3, 3, 5};
  const std::vector<uint16_t> hits{0, 2, 3, 1, 2};
  std::vector<int32_t> counts(16);
  count(3, 4, offsets.data(), hits.data(), counts.data());
  show_hash("pairs", counts);
}

void call_disk(void* library, const char* path) {
  auto* create = find<void*(int32_t, int64_t)>(library, "moehive_disk_create");
  auto* read = find<int64_t(void*, const char*, void*, int64_t, int64_t, int32_t)>(library, "moehive_disk_read");
  auto* collect = find<int64_t(void*, int64_t*, int32_t*, int64_t)>(library, "moehive_disk_collect");
  auto* news = find<uint64_t(void*)>(library, "moehive_disk_news");
  auto* wait = find<uint64_t(void*, uint64_t)>(library, "moehive_disk_wait");
  auto* destroy = find<void(void*)>(library, "moehive_disk_destroy");
  constexpr int64_t bytes = 40000, page = 4096;
  void* reader = create(kThreads, 2 * page);
  require(reader, "disk");
  void* buffer = std::aligned_alloc(page, 10 * page);
  require(read(reader, path, buffer, bytes, 0, 0) > 0, "read");
  int64_t number;
  int32_t error;
  for (;;) {
    const uint64_t seen = news(reader);
    if (collect(reader, &number, &error, 1) == 1) break;
    wait(reader, seen);
  }
  require(error == 0, "a file");
  destroy(reader);
  const char* read_bytes = static_cast<const char*>(buffer);
  show_hash("file", std::vector<char>(read_bytes, read_bytes + bytes));
}

void call_slow_link(void* library) {
  auto* run = find<int32_t(const void*, int64_t, int64_t, int64_t, double, int32_t)>(library, "moehive_slow_link_run");
  int ends[2];
  require(pipe(ends) == 0 && close(ends[1]) == 0, "a pipe that has ended");
  std::printf("numbers network %d\n", run(nullptr, 0, 0, 0, 1.0, ends[0]));
  close(ends[0]);
}

}  // namespace

int main(int count, char** arguments) {
  require(count == 8, "arguments");
  void* libraries[6];
  for (int i = 0; i < 6; ++i) require(libraries[i] = dlopen(arguments[i + 1], RTLD_NOW), arguments[i + 1]);
  call_kernels(libraries[0]);
  call_rounding(libraries[0]);
  call_proto(libraries[1]);
  call_dispatch(libraries[2]);
  call_planner(libraries[3]);
  call_disk(libraries[4], arguments[7]);
  call_slow_link(libraries[5]);
}
