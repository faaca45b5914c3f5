#include "expert_mlp.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

#include "activation.h"
#include "bf16.h"
#include "pieces.h"

namespace moehive {
namespace {

constexpr int64_t kMaxTokens = 48;                       // of a group within a piece
constexpr int64_t kMaxProducts = kPieceRows * kMaxTokens;  // of a group's, and rows of a piece with one token

struct Pair {
  uint64_t blob;
  uint32_t pair, token;
};

// Pairs first .. last of the sorted list are one expert's.
struct Group {
  const char* blob;
  int64_t first, last;
};

const float* floats_at(const char* blob, int64_t offset) { return reinterpret_cast<const float*>(blob + offset); }

// The pieces of a projection of all experts, which threads take one by one.
struct Pieces {
  int64_t step, end;  // rows of a piece, of an expert
  int64_t of_expert;  // pieces

  // `threads` share one token of each expert; 0: there are several.
  Pieces(Format format, int64_t columns, int64_t rows, int64_t experts, int threads)
      : step(threads ? std::min(piece_rows_for_one(format, columns, rows * experts, threads), kMaxProducts)
                     : piece_rows(format, columns)),
        end(rows),
        of_expert((rows + step - 1) / step) {}

  int64_t expert(int64_t piece) const { return piece / of_expert; }
  int64_t first_row(int64_t piece) const { return piece % of_expert * step; }

  // Walks one piece: its rows, and its expert's tokens in groups of at most kMaxTokens.
  template <class Work>
  void walk(const std::vector<Group>& groups, int64_t piece, Work&& work) const {
    const Group& group = groups[expert(piece)];
    const int64_t row = first_row(piece);
    for (int64_t first = group.first; first < group.last; first += kMaxTokens)
      work(group.blob, row, std::min(step, end - row), first, std::min(kMaxTokens, group.last - first));
  }
};

void add_bias(float* out, const float* bias, int64_t rows, int64_t tokens) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t t = 0; t < tokens; ++t) out[r * tokens + t] += bias[r];
}

// y = z / sqrt(mean(z²) + eps) * weight, with z = y * norm
void normalize(float* y, const float* norm, int64_t n, float eps, float weight) {
  double squares = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    y[i] *= norm[i];
    squares += static_cast<double>(y[i]) * y[i];
  }
  const float scale = static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(n) + eps));
  for (int64_t i = 0; i < n; ++i) y[i] = y[i] * scale * weight;
}

}  // namespace

Scratch::~Scratch() { ::operator delete(memory_, std::align_val_t{64}); }

float* Scratch::floats(int64_t count) {
  if (count > capacity_) {
    ::operator delete(memory_, std::align_val_t{64});
    memory_ = nullptr;
    capacity_ = 0;
    memory_ = static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t{64}));
    capacity_ = count;
  }
  return memory_;
}

void sum_pairs(const float* pairs, const uint32_t* offsets, int64_t tokens, int64_t hidden_size, float* sums) {
  for (int64_t t = 0; t < tokens; ++t) {
    float* sum = sums + t * hidden_size;
    std::memset(sum, 0, hidden_size * sizeof(float));
    for (uint32_t pair = offsets[t]; pair < offsets[t + 1]; ++pair)
      for (int64_t i = 0; i < hidden_size; ++i) sum[i] += pairs[pair * hidden_size + i];
  }
}

namespace {

constexpr int64_t kAtOnce = 256;  // sums that stay in the first cache while the parts pass over them

// `n` numbers of a row, f32 or bf16 of any alignment, into `to`.
template <bool kBf16>
void load(const void* from, int64_t at, int64_t n, float* to) {
  if constexpr (kBf16) {
    uint16_t half[kAtOnce];
    std::memcpy(half, static_cast<const char*>(from) + at * 2, n * 2);
    for (int64_t i = 0; i < n; ++i) to[i] = from_bf16(half[i]);
  } else {
    std::memcpy(to, static_cast<const char*>(from) + at * 4, n * 4);
  }
}

// One piece of sums, and the sum of their squares. Called with a constant `n` it becomes vectors.
template <bool kBf16>
inline float add_piece(const void* const* parts, int64_t number, int64_t at, int64_t n, void* out) {
  float sums[kAtOnce] = {}, part[kAtOnce];
  if (number > 0) load<kBf16>(parts[0], at, n, sums);  // not added to 0: 0 + -0 would be another 0
  for (int64_t p = 1; p < number; ++p) {
    load<kBf16>(parts[p], at, n, part);
    for (int64_t i = 0; i < n; ++i) sums[i] += part[i];
  }
  float lanes[8] = {};
  for (int64_t i = 0; i + 8 <= n; i += 8)
    for (int64_t lane = 0; lane < 8; ++lane) lanes[lane] += sums[i + lane] * sums[i + lane];
  float squares = 0.0f;
  for (int64_t i = n / 8 * 8; i < n; ++i) squares += sums[i] * sums[i];
  for (float lane : lanes) squares += lane;
  if constexpr (kBf16) {
    uint16_t half[kAtOnce];
    for (int64_t i = 0; i < n; ++i) half[i] = to_bf16(sums[i]);
    std::memcpy(static_cast<char*>(out) + at * 2, half, n * 2);
  } else {
    std::memcpy(static_cast<char*>(out) + at * 4, sums, n * 4);
  }
  return squares;
}

template <bool kBf16>
bool add_all(const void* const* parts, int64_t number, int64_t count, void* out) {
  float squares = 0.0f;
  int64_t at = 0;
  for (; at + kAtOnce <= count; at += kAtOnce) squares += add_piece<kBf16>(parts, number, at, kAtOnce, out);
  if (at < count) squares += add_piece<kBf16>(parts, number, at, count - at, out);
  return std::isfinite(squares);
}

}  // namespace

bool add_rows(const void* const* parts, int64_t number, bool bf16, int64_t count, void* out) {
  return bf16 ? add_all<true>(parts, number, count, out) : add_all<false>(parts, number, count, out);
}

void Experts::run(const Layer& layer) {
  const std::lock_guard<std::mutex> lock(mutex_);
  run_alone(layer);
}

void Experts::run_whole(Layer layer, const Rows& from, const Rows& to, bool added) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const int64_t hidden = layer.spec.hidden_size, pairs = layer.offsets[layer.tokens];
  layer.hidden = static_cast<const float*>(from.memory);
  if (from.bf16) {
    float* wide = hidden_.floats(layer.tokens * hidden);
    const uint16_t* stored = static_cast<const uint16_t*>(from.memory);
    for (int64_t i = 0; i < layer.tokens * hidden; ++i) wide[i] = from_bf16(stored[i]);
    layer.hidden = wide;
  }
  const int64_t rows = added ? layer.tokens : pairs;
  // As few buffers as can be: results go straight to where they are wanted, if they are wanted as they are.
  float* results = static_cast<float*>(to.memory);
  if (added || to.bf16) {
    layer.out = outputs_.floats((pairs + rows) * hidden);
    if (!added) {
      results = layer.out;
    } else if (to.bf16) {
      results = layer.out + pairs * hidden;
    }
  } else {
    layer.out = results;
  }
  run_alone(layer);
  if (added) sum_pairs(layer.out, layer.offsets, layer.tokens, hidden, results);
  if (to.bf16) {
    uint16_t* stored = static_cast<uint16_t*>(to.memory);
    for (int64_t i = 0; i < rows * hidden; ++i) stored[i] = to_bf16(results[i]);
  }
}

void Experts::run_alone(const Layer& layer) {
  const MoehiveSpec& spec = layer.spec;
  const int64_t hidden = spec.hidden_size, middle = spec.intermediate_size;
  const int64_t hidden_stride = padded(hidden), middle_stride = padded(middle);
  const Format up_format = static_cast<Format>(spec.up_format), down_format = static_cast<Format>(spec.down_format);

  std::vector<Pair> pairs;
  for (int64_t token = 0; token < layer.tokens; ++token)
    for (uint32_t pair = layer.offsets[token]; pair < layer.offsets[token + 1]; ++pair)
      if (layer.blobs[pair] != 0) pairs.push_back({layer.blobs[pair], pair, static_cast<uint32_t>(token)});
  std::sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) {
    return a.blob != b.blob ? a.blob < b.blob : a.pair < b.pair;
  });
  const int64_t count = static_cast<int64_t>(pairs.size());
  std::vector<Group> groups;
  for (int64_t i = 0; i < count; ++i) {
    if (i == 0 || pairs[i].blob != pairs[i - 1].blob)
      groups.push_back({reinterpret_cast<const char*>(pairs[i].blob), i, i});
    groups.back().last = i + 1;
  }

  float* inputs = inputs_.floats(layer.tokens * hidden_stride);
  for (int64_t token = 0; token < layer.tokens; ++token) {
    float* to = inputs + token * hidden_stride;
    std::memcpy(to, layer.hidden + token * hidden, hidden * sizeof(float));
    std::fill(to + hidden, to + hidden_stride, 0.0f);
  }
  float* middles = middles_.floats(count * middle_stride);
  std::vector<const void*> input_of(count), middle_of(count);
  for (int64_t i = 0; i < count; ++i) {
    input_of[i] = inputs + pairs[i].token * hidden_stride;
    middle_of[i] = middles + i * middle_stride;
    std::fill(middles + i * middle_stride + middle, middles + (i + 1) * middle_stride, 0.0f);
  }
  // Vectors in 8 bits, for block formats: of the tokens, then of the pairs.
  const int64_t input_bytes = is_block(up_format) ? quantized_bytes(hidden) : 0;
  const int64_t middle_bytes = is_block(down_format) ? quantized_bytes(middle) : 0;
  char* quantized = reinterpret_cast<char*>(
      quantized_.floats((layer.tokens * input_bytes + count * middle_bytes) / static_cast<int64_t>(sizeof(float))));
  char* quantized_middles = quantized + layer.tokens * input_bytes;
  std::vector<Quantized> input_views, middle_views;
  if (input_bytes) {
    for (int64_t token = 0; token < layer.tokens; ++token) {
      input_views.push_back(quantized_at(quantized + token * input_bytes, hidden));
      if (layer.offsets[token] < layer.offsets[token + 1])
        kernel_.quantize(layer.hidden + token * hidden, hidden, quantized + token * input_bytes);
    }
    for (int64_t i = 0; i < count; ++i) input_of[i] = &input_views[pairs[i].token];
  }
  if (middle_bytes) {
    for (int64_t i = 0; i < count; ++i)
      middle_views.push_back(quantized_at(quantized_middles + i * middle_bytes, middle));
    for (int64_t i = 0; i < count; ++i) middle_of[i] = &middle_views[i];
  }

  const int64_t experts = static_cast<int64_t>(groups.size());
  const int sharing = count == experts ? pool_->threads() : 0;
  const Pieces ups(up_format, hidden, middle, experts, sharing), downs(down_format, middle, hidden, experts, sharing);
  const int64_t up_pieces = experts * ups.of_expert, down_pieces = experts * downs.of_expert;
  const auto up_at = [&](const char* blob, int matrix, int64_t row) {  // gate and up, where the expert is gated
    return blob + spec.up + matrix * rows_bytes(up_format, middle, hidden) + rows_bytes(up_format, row, hidden);
  };
  const auto down_at = [&](const char* blob, int64_t row) {
    return blob + spec.down + rows_bytes(down_format, row, middle);
  };
  // What a thread probably takes after a piece, fetched while that one ends.
  const auto down_piece_at = [&](int64_t piece) {
    piece = std::min(piece, down_pieces - 1);
    return down_at(groups[downs.expert(piece)].blob, downs.first_row(piece));
  };
  const auto up_piece_at = [&](int64_t piece) {
    if (piece >= up_pieces) return down_piece_at(piece - up_pieces);
    return up_at(groups[ups.expert(piece)].blob, 0, ups.first_row(piece));
  };

  // hidden → intermediate: a piece is some rows of the gate and the same rows of the up projection.
  pool_->run(up_pieces, [&](uint32_t piece) {
    ups.walk(groups, piece, [&](const char* blob, int64_t row, int64_t rows, int64_t first, int64_t tokens) {
      alignas(64) float gate[kMaxProducts], up[kMaxProducts];
      const auto project = [&](int matrix, float* out, const char* next) {
        kernel_.multiply({up_format, up_at(blob, matrix, row), rows, hidden, &input_of[first], tokens, out, tokens,
                          next});
        if (spec.up_bias >= 0) add_bias(out, floats_at(blob, spec.up_bias) + matrix * middle + row, rows, tokens);
      };
      const char* next = up_piece_at(piece + pool_->threads());
      project(0, gate, spec.gated ? up_at(blob, 1, row) : next);
      if (spec.gated) {
        project(1, up, next);
        join_gate(spec, gate, up, rows * tokens);
      } else {
        activate(spec, gate, rows * tokens);
      }
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t r = 0; r < rows; ++r) middles[(first + t) * middle_stride + row + r] = gate[r * tokens + t];
    });
  });

  if (middle_bytes) {
    pool_->run(count, [&](uint32_t i) {
      kernel_.quantize(middles + i * middle_stride, middle, quantized_middles + i * middle_bytes);
    });
  }

  // intermediate → hidden
  pool_->run(down_pieces, [&](uint32_t piece) {
    downs.walk(groups, piece, [&](const char* blob, int64_t row, int64_t rows, int64_t first, int64_t tokens) {
      alignas(64) float out[kMaxProducts];
      const char* next = down_piece_at(piece + pool_->threads());
      kernel_.multiply({down_format, down_at(blob, row), rows, middle, &middle_of[first], tokens, out, tokens, next});
      if (spec.down_bias >= 0) add_bias(out, floats_at(blob, spec.down_bias) + row, rows, tokens);
      for (int64_t t = 0; t < tokens; ++t) {
        const uint32_t pair = pairs[first + t].pair;
        const float weight = spec.post_norm >= 0 ? 1.0f : layer.weights[pair];
        float* to = layer.out + pair * hidden + row;
        for (int64_t r = 0; r < rows; ++r) to[r] = out[r * tokens + t] * weight;
      }
    });
  });

  if (spec.post_norm < 0) return;
  pool_->run(count, [&](uint32_t i) {
    const Pair& pair = pairs[i];
    const float* norm = floats_at(reinterpret_cast<const char*>(pair.blob), spec.post_norm);
    normalize(layer.out + pair.pair * hidden, norm, hidden, spec.post_norm_eps, layer.weights[pair.pair]);
  });
}

}  // namespace moehive
