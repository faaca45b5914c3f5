#include "expert_mlp.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "bf16.h"
#include "pieces.h"
#include "sums.h"

namespace moehive {
namespace {

constexpr int64_t kMaxTokens = 96;                       // of a group within a piece
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

constexpr int64_t kManyTokens = 32;  // for fewer, waking threads takes longer than passing over them
constexpr int64_t kBlock = 1 << 19;  // floats of intermediate results at once, where it need not be more
constexpr int64_t kSums = 256;       // that stay in the first cache while rows pass over them

// `n` numbers of f32 into bf16 or f32.
void store(const float* from, int64_t n, bool bf16, void* to, int64_t at) {
  if (bf16) {
    uint16_t* out = static_cast<uint16_t*>(to) + at;
    for (int64_t i = 0; i < n; ++i) out[i] = to_bf16(from[i]);
  } else {
    std::memcpy(static_cast<float*>(to) + at, from, n * sizeof(float));
  }
}

}  // namespace

void Experts::run(const Layer& layer, const Rows& from, const Rows& to, bool added) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const MoehiveSpec& spec = layer.spec;
  const int64_t hidden = spec.hidden_size, middle = spec.intermediate_size;
  const int64_t middle_stride = padded(middle);
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

  // The tokens' vectors as the first projection takes them, and the pairs' as the second does, if that is not in f32.
  const Vectors input_kind = vectors_of(up_format), middle_kind = vectors_of(down_format);
  const int64_t input_bytes = vector_bytes(input_kind, hidden);
  const int64_t middle_bytes = middle_kind == Vectors::floats ? 0 : vector_bytes(middle_kind, middle);
  char* inputs = reinterpret_cast<char*>(
      inputs_.floats((layer.tokens * input_bytes + count * middle_bytes) / static_cast<int64_t>(sizeof(float))));
  char* made_middles = inputs + layer.tokens * input_bytes;
  std::vector<Quantized> input_views, middle_views;
  std::vector<const void*> input_of(count), middle_of(count);
  const auto make = [&](Vectors kind, const float* x, int64_t columns, char* memory) {
    kind == Vectors::bytes ? kernel_.quantize(x, columns, memory) : kernel_.round(x, columns, memory);
  };
  const auto state = [&](int64_t token, float* wide) {  // a token's in f32, in `wide` if it is not that already
    if (!from.bf16) return static_cast<const float*>(from.memory) + token * hidden;
    const uint16_t* stored = static_cast<const uint16_t*>(from.memory) + token * hidden;
    for (int64_t i = 0; i < hidden; ++i) wide[i] = from_bf16(stored[i]);
    return static_cast<const float*>(wide);
  };
  const int64_t parts = layer.tokens < kManyTokens ? 1 : pool_->threads();
  const bool widened = from.bf16 && input_kind != Vectors::floats;  // to be rounded again from there
  float* const wide = widened ? widened_.floats(parts * hidden) : nullptr;
  auto make_inputs = [&](int64_t part) {
    const int64_t end = (part + 1) * layer.tokens / parts;
    for (int64_t token = part * layer.tokens / parts; token < end; ++token) {
      char* memory = inputs + token * input_bytes;
      if (layer.offsets[token] == layer.offsets[token + 1]) continue;
      if (input_kind != Vectors::floats) {
        make(input_kind, state(token, wide ? wide + part * hidden : nullptr), hidden, memory);
        continue;
      }
      float* row = reinterpret_cast<float*>(memory);
      const float* stored = state(token, row);
      if (stored != row) std::memcpy(row, stored, hidden * sizeof(float));
      std::fill(row + hidden, row + padded(hidden), 0.0f);
    }
  };
  parts == 1 ? make_inputs(0) : pool_->run(parts, make_inputs);
  if (input_kind == Vectors::bytes) {
    for (int64_t token = 0; token < layer.tokens; ++token)
      input_views.push_back(quantized_at(inputs + token * input_bytes, hidden));
    for (int64_t i = 0; i < count; ++i) input_of[i] = &input_views[pairs[i].token];
  } else {
    for (int64_t i = 0; i < count; ++i) input_of[i] = inputs + pairs[i].token * input_bytes;
  }

  const int64_t experts = static_cast<int64_t>(groups.size());
  const int sharing = count == experts ? pool_->threads() : 0;
  const Pieces ups(up_format, hidden, middle, experts, sharing), downs(down_format, middle, hidden, experts, sharing);
  const int64_t up_pieces = experts * ups.of_expert;
  const auto up_at = [&](const char* blob, int matrix, int64_t row) {  // gate and up, where the expert is gated
    return blob + spec.up + matrix * rows_bytes(up_format, middle, hidden) + rows_bytes(up_format, row, hidden);
  };
  const auto down_at = [&](const char* blob, int64_t row) {
    return blob + spec.down + rows_bytes(down_format, row, middle);
  };
  // What a thread probably takes after a piece, fetched while that one ends.
  const auto down_piece_at = [&](int64_t piece) {
    piece = std::min(piece, experts * downs.of_expert - 1);
    return down_at(groups[downs.expert(piece)].blob, downs.first_row(piece));
  };
  const auto up_piece_at = [&](int64_t piece) {
    if (piece >= up_pieces) return down_piece_at(piece - up_pieces);
    return up_at(groups[ups.expert(piece)].blob, 0, ups.first_row(piece));
  };

  // hidden → intermediate: a piece is some rows of the gate and the same rows of the up projection. Where the results
  // are rounded, they are in f32 of some experts at a time.
  const int64_t most_middles = middle_bytes ? std::max<int64_t>(1, kBlock / middle_stride) : count;
  if (middle_kind == Vectors::bytes) {
    for (int64_t i = 0; i < count; ++i) middle_views.push_back(quantized_at(made_middles + i * middle_bytes, middle));
    for (int64_t i = 0; i < count; ++i) middle_of[i] = &middle_views[i];
  } else if (middle_bytes) {
    for (int64_t i = 0; i < count; ++i) middle_of[i] = made_middles + i * middle_bytes;
  }
  for (int64_t begin = 0, end; begin < experts; begin = end) {
    const int64_t first_pair = groups[begin].first;
    for (end = begin + 1; end < experts && groups[end].last - first_pair <= most_middles;) ++end;
    const int64_t here = groups[end - 1].last - first_pair, first_piece = begin * ups.of_expert;
    float* middles = middles_.floats(here * middle_stride);
    for (int64_t i = 0; i < here; ++i) {
      if (!middle_bytes) middle_of[first_pair + i] = middles + i * middle_stride;
      std::fill(middles + i * middle_stride + middle, middles + (i + 1) * middle_stride, 0.0f);
    }
    pool_->run((end - begin) * ups.of_expert, [&](uint32_t number) {
      const int64_t piece = first_piece + number;
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
          kernel_.join_gate(spec, gate, up, rows * tokens);
        } else {
          kernel_.activate(spec, gate, rows * tokens);
        }
        float* to_rows = middles + (first - first_pair) * middle_stride + row;
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t r = 0; r < rows; ++r) to_rows[t * middle_stride + r] = gate[r * tokens + t];
      });
    });
    if (middle_bytes) {
      pool_->run(here, [&](uint32_t i) {
        make(middle_kind, middles + i * middle_stride, middle, made_middles + (first_pair + i) * middle_bytes);
      });
    }
  }

  // intermediate → hidden, some columns of the result at a time: of all pairs, so that they can be added in order.
  const int64_t all = layer.offsets[layer.tokens];
  const bool straight = !added && !to.bf16;  // results are wanted as they are
  int64_t pieces = downs.of_expert;          // of each expert at once
  if (!straight && spec.post_norm < 0)
    pieces = std::clamp<int64_t>(kBlock / std::max<int64_t>(1, all) / downs.step, 1, downs.of_expert);
  const int64_t width = std::min(hidden, pieces * downs.step);
  Scratch& free = middle_bytes ? middles_ : outputs_;  // middles that were rounded are not needed any more
  float* const out = straight ? static_cast<float*>(to.memory) : free.floats(all * width);
  for (int64_t first_piece = 0; first_piece < downs.of_expert; first_piece += pieces) {
    const int64_t column = first_piece * downs.step, columns = std::min(width, hidden - column);
    const int64_t some = std::min(pieces, downs.of_expert - first_piece);
    const auto piece_of = [&](int64_t number) {
      return number / some * downs.of_expert + first_piece + number % some;
    };
    pool_->run(experts * some, [&](uint32_t number) {
      const int64_t piece = piece_of(number);
      downs.walk(groups, piece, [&](const char* blob, int64_t row, int64_t rows, int64_t first, int64_t tokens) {
        alignas(64) float products[kMaxProducts];
        const char* next = down_piece_at(piece_of(number + pool_->threads()));
        kernel_.multiply({down_format, down_at(blob, row), rows, middle, &middle_of[first], tokens, products, tokens,
                          next});
        if (spec.down_bias >= 0) add_bias(products, floats_at(blob, spec.down_bias) + row, rows, tokens);
        for (int64_t t = 0; t < tokens; ++t) {
          const uint32_t pair = pairs[first + t].pair;
          const float weight = spec.post_norm >= 0 ? 1.0f : layer.weights[pair];
          float* row_out = out + pair * width + row - column;
          for (int64_t r = 0; r < rows; ++r) row_out[r] = products[r * tokens + t] * weight;
        }
      });
    });
    if (spec.post_norm >= 0) {
      pool_->run(count, [&](uint32_t i) {
        const Pair& pair = pairs[i];
        const float* norm = floats_at(reinterpret_cast<const char*>(pair.blob), spec.post_norm);
        normalize(out + pair.pair * hidden, norm, hidden, spec.post_norm_eps, layer.weights[pair.pair]);
      });
    }
    if (added) {
      pool_->run(layer.tokens, [&](uint32_t token) {
        const float* rows = out + layer.offsets[token] * width;
        const int64_t number = layer.offsets[token + 1] - layer.offsets[token];
        float sums[kSums];
        for (int64_t at = 0; at < columns; at += kSums) {
          const int64_t n = std::min(kSums, columns - at);
          sum_pairs(rows + at, number, width, n, sums);
          store(sums, n, to.bf16, to.memory, token * hidden + column + at);
        }
      });
    } else if (!straight) {
      pool_->run(all, [&](uint32_t pair) {
        store(out + pair * width, columns, to.bf16, to.memory, pair * hidden + column);
      });
    }
  }
}

}  // namespace moehive
