#include "expert_mlp.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "bf16.h"
#include "groups.h"
#include "sums.h"

namespace moehive {
namespace {

constexpr int64_t kManyTokens = 32;  // for fewer, waking threads takes longer than passing over them
constexpr int64_t kBlock = 1 << 19;  // floats of intermediate results at once, where it need not be more
constexpr int64_t kSums = 256;       // that stay in the first cache while rows pass over them

const float* floats_at(const char* blob, int64_t offset) { return reinterpret_cast<const float*>(blob + offset); }

void add_bias(float* out, const float* bias, int64_t rows, int64_t tokens) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; ++r) out[t * rows + r] += bias[r];
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

// `n` numbers of f32 into bf16 or f32.
void store(const float* from, int64_t n, bool bf16, void* to, int64_t at) {
  if (bf16) {
    uint16_t* out = static_cast<uint16_t*>(to) + at;
    for (int64_t i = 0; i < n; ++i) out[i] = to_bf16(from[i]);
  } else {
    std::memcpy(static_cast<float*>(to) + at, from, n * sizeof(float));
  }
}

// Vectors of some `columns` as the products of a format take them, one after the other.
class Operands {
 public:
  Operands(Format format, int64_t columns)
      : kind_(vectors_of(format)), columns_(columns), bytes_(vector_bytes(kind_, columns)) {}

  bool are_floats() const { return kind_ == Vectors::floats; }
  int64_t bytes() const { return bytes_; }  // of each

  void place(void* memory, int64_t count) {
    memory_ = static_cast<char*>(memory);
    if (kind_ != Vectors::bytes) return;
    views_.reserve(count);
    for (int64_t i = 0; i < count; ++i) views_.push_back(quantized_at(memory_ + i * bytes_, columns_));
  }

  // What Product::x takes.
  const void* operator[](int64_t i) const {
    return kind_ == Vectors::bytes ? static_cast<const void*>(&views_[i]) : memory_ + i * bytes_;
  }

  float* floats(int64_t i) const { return reinterpret_cast<float*>(memory_ + i * bytes_); }

  // Of those that are not floats.
  void round(const Kernel& kernel, const float* x, int64_t i) const {
    (kind_ == Vectors::bytes ? kernel.quantize : kernel.round)(x, columns_, memory_ + i * bytes_);
  }

 private:
  Vectors kind_;
  int64_t columns_, bytes_;
  char* memory_ = nullptr;
  std::vector<Quantized> views_;
};

}  // namespace

// One call of `run`, step by step: hidden states → inputs → middles → results.
class Experts::Call {
 public:
  Call(Experts& own, const Layer& layer)
      : own_(own),
        layer_(layer),
        spec_(layer.spec),
        pairs_(pairs_of(layer)),
        groups_(groups_of(pairs_)),
        count_(static_cast<int64_t>(pairs_.size())),
        experts_(static_cast<int64_t>(groups_.size())),
        sharing_(count_ == experts_ ? own.pool_->threads() : 0),
        ups_(up_format_, hidden_, middle_, experts_, sharing_),
        downs_(down_format_, middle_, hidden_, experts_, sharing_),
        inputs_(up_format_, hidden_),
        middles_(down_format_, middle_),
        input_of_(count_),
        middle_of_(count_) {}

  // Each token's vector as the first projection takes it.
  void make_inputs(const Rows& from) {
    const int64_t floats = layer_.tokens * inputs_.bytes() / sizeof(float);
    const int64_t more = middles_.are_floats() ? 0 : count_ * middles_.bytes() / sizeof(float);
    float* const memory = own_.inputs_.floats(floats + more);
    inputs_.place(memory, layer_.tokens);
    if (more) place_middles(memory + floats);
    for (int64_t i = 0; i < count_; ++i) input_of_[i] = inputs_[pairs_[i].token];
    const int64_t parts = layer_.tokens < kManyTokens ? 1 : own_.pool_->threads();
    const bool widened = from.bf16 && !inputs_.are_floats();  // to be rounded again from there
    float* const wide = widened ? own_.widened_.floats(parts * hidden_) : nullptr;
    auto make_part = [&](int64_t part) {
      const int64_t end = (part + 1) * layer_.tokens / parts;
      for (int64_t token = part * layer_.tokens / parts; token < end; ++token)
        if (layer_.offsets[token] != layer_.offsets[token + 1])
          make_input(from, token, wide ? wide + part * hidden_ : nullptr);
    };
    parts == 1 ? make_part(0) : own_.pool_->run(parts, make_part);
  }

  // inputs → middles, each pair's as the second projection takes it. Where those are rounded, they are in f32 of some
  // experts at a time.
  void make_middles() {
    const bool rounded = !middles_.are_floats();
    const int64_t most = rounded ? std::max<int64_t>(1, kBlock / middle_stride_) : count_;
    for (int64_t begin = 0, end; begin < experts_; begin = end) {
      const int64_t first_pair = groups_[begin].first;
      for (end = begin + 1; end < experts_ && groups_[end].last - first_pair <= most;) ++end;
      const int64_t here = groups_[end - 1].last - first_pair, first_piece = begin * ups_.of_expert;
      float* const middles = own_.middles_.floats(here * middle_stride_);
      if (!rounded) place_middles(middles);
      for (int64_t i = 0; i < here; ++i)
        std::fill(middles + i * middle_stride_ + middle_, middles + (i + 1) * middle_stride_, 0.0f);
      own_.pool_->run((end - begin) * ups_.of_expert,
                      [&](uint32_t piece) { project_up(first_piece + piece, middles, first_pair); });
      if (rounded)
        own_.pool_->run(here, [&](uint32_t i) {
          middles_.round(own_.kernel_, middles + i * middle_stride_, first_pair + i);
        });
    }
  }

  // middles → results, some columns of them at a time: of all pairs, so that they can be added in order.
  void make_results(const Rows& to, bool added) {
    const int64_t all = layer_.offsets[layer_.tokens];
    const bool straight = !added && !to.bf16;  // results are wanted as they are
    int64_t pieces = downs_.of_expert;         // of each expert at once
    if (!straight && spec_.post_norm < 0)
      pieces = std::clamp<int64_t>(kBlock / std::max<int64_t>(1, all) / downs_.step, 1, downs_.of_expert);
    const int64_t width = std::min(hidden_, pieces * downs_.step);
    Scratch& free = middles_.are_floats() ? own_.outputs_ : own_.middles_;  // in f32 no more needed once rounded
    float* const out = straight ? static_cast<float*>(to.memory) : free.floats(all * width);
    for (int64_t piece = 0; piece < downs_.of_expert; piece += pieces) {
      const int64_t column = piece * downs_.step;
      const Band band{piece, std::min(pieces, downs_.of_expert - piece), column, std::min(width, hidden_ - column),
                      out, width};
      own_.pool_->run(experts_ * band.pieces, [&](uint32_t number) { project_down(number, band); });
      if (spec_.post_norm >= 0) own_.pool_->run(count_, [&](uint32_t i) { normalize_pair(pairs_[i], out); });
      if (added) {
        own_.pool_->run(layer_.tokens, [&](uint32_t token) { add_token(token, band, to); });
      } else if (!straight) {
        own_.pool_->run(all, [&](uint32_t pair) {
          store(out + pair * width, band.columns, to.bf16, to.memory, pair * hidden_ + column);
        });
      }
    }
  }

 private:
  // Some columns of the results of all pairs, which stand in `out` [pairs, width].
  struct Band {
    int64_t first_piece, pieces;  // of each expert
    int64_t column, columns;
    float* out;
    int64_t width;
  };

  void place_middles(void* memory) {
    middles_.place(memory, count_);
    for (int64_t i = 0; i < count_; ++i) middle_of_[i] = middles_[i];
  }

  // `wide` [hidden]: where a state in bf16 is widened that is to be rounded again.
  void make_input(const Rows& from, int64_t token, float* wide) const {
    if (!inputs_.are_floats()) return inputs_.round(own_.kernel_, state(from, token, wide), token);
    float* const row = inputs_.floats(token);
    const float* const here = state(from, token, row);
    if (here != row) std::memcpy(row, here, hidden_ * sizeof(float));
    std::fill(row + hidden_, row + padded(hidden_), 0.0f);
  }

  // A token's in f32, in `wide` if it is not that already.
  const float* state(const Rows& from, int64_t token, float* wide) const {
    if (!from.bf16) return static_cast<const float*>(from.memory) + token * hidden_;
    const uint16_t* const stored = static_cast<const uint16_t*>(from.memory) + token * hidden_;
    for (int64_t i = 0; i < hidden_; ++i) wide[i] = from_bf16(stored[i]);
    return wide;
  }

  // A piece is some rows of the gate and the same rows of the up projection; `middles` are of the pairs from
  // `first_pair`.
  void project_up(int64_t piece, float* middles, int64_t first_pair) const {
    ups_.walk(groups_, piece, [&](const char* blob, int64_t row, int64_t rows, int64_t first, int64_t tokens) {
      alignas(64) float gate[kMaxProducts], up[kMaxProducts];
      const auto project = [&](int matrix, float* out, const char* next) {
        own_.kernel_.multiply({up_format_, up_at(blob, matrix, row), rows, hidden_, &input_of_[first], tokens, out,
                               rows, next});
        if (spec_.up_bias >= 0) add_bias(out, floats_at(blob, spec_.up_bias) + matrix * middle_ + row, rows, tokens);
      };
      const char* next = up_piece_at(piece + own_.pool_->threads());
      project(0, gate, spec_.gated ? up_at(blob, 1, row) : next);
      if (spec_.gated) {
        project(1, up, next);
        own_.kernel_.join_gate(spec_, gate, up, rows * tokens);
      } else {
        own_.kernel_.activate(spec_, gate, rows * tokens);
      }
      float* to_rows = middles + (first - first_pair) * middle_stride_ + row;
      for (int64_t t = 0; t < tokens; ++t)
        std::memcpy(to_rows + t * middle_stride_, gate + t * rows, rows * sizeof(float));
    });
  }

  // The `number`th piece of a band, times the pairs' weights where no norm comes before them.
  void project_down(int64_t number, const Band& band) const {
    const auto piece_of = [&](int64_t one) {
      return one / band.pieces * downs_.of_expert + band.first_piece + one % band.pieces;
    };
    const char* next = down_piece_at(piece_of(number + own_.pool_->threads()));
    const int64_t piece = piece_of(number);
    downs_.walk(groups_, piece, [&](const char* blob, int64_t row, int64_t rows, int64_t first, int64_t tokens) {
      alignas(64) float products[kMaxProducts];
      own_.kernel_.multiply({down_format_, down_at(blob, row), rows, middle_, &middle_of_[first], tokens, products,
                             rows, next});
      if (spec_.down_bias >= 0) add_bias(products, floats_at(blob, spec_.down_bias) + row, rows, tokens);
      for (int64_t t = 0; t < tokens; ++t) {
        const uint32_t pair = pairs_[first + t].pair;
        const float weight = spec_.post_norm >= 0 ? 1.0f : layer_.weights[pair];
        float* row_out = band.out + pair * band.width + row - band.column;
        for (int64_t r = 0; r < rows; ++r) row_out[r] = products[t * rows + r] * weight;
      }
    });
  }

  // A pair's whole result, in `out` [pairs, hidden].
  void normalize_pair(const Pair& pair, float* out) const {
    const float* norm = floats_at(reinterpret_cast<const char*>(pair.blob), spec_.post_norm);
    normalize(out + pair.pair * hidden_, norm, hidden_, spec_.post_norm_eps, layer_.weights[pair.pair]);
  }

  void add_token(int64_t token, const Band& band, const Rows& to) const {
    const float* rows = band.out + layer_.offsets[token] * band.width;
    const int64_t number = layer_.offsets[token + 1] - layer_.offsets[token];
    float sums[kSums];
    for (int64_t at = 0; at < band.columns; at += kSums) {
      const int64_t n = std::min(kSums, band.columns - at);
      sum_pairs(rows + at, number, band.width, n, sums);
      store(sums, n, to.bf16, to.memory, token * hidden_ + band.column + at);
    }
  }

  const char* up_at(const char* blob, int matrix, int64_t row) const {  // gate and up, where the expert is gated
    return blob + spec_.up + matrix * rows_bytes(up_format_, middle_, hidden_) + rows_bytes(up_format_, row, hidden_);
  }
  const char* down_at(const char* blob, int64_t row) const {
    return blob + spec_.down + rows_bytes(down_format_, row, middle_);
  }

  // What a thread probably takes after a piece, fetched while that one ends.
  const char* up_piece_at(int64_t piece) const {
    const int64_t pieces = experts_ * ups_.of_expert;
    if (piece >= pieces) return down_piece_at(piece - pieces);
    return up_at(groups_[ups_.expert(piece)].blob, 0, ups_.first_row(piece));
  }
  const char* down_piece_at(int64_t piece) const {
    piece = std::min(piece, experts_ * downs_.of_expert - 1);
    return down_at(groups_[downs_.expert(piece)].blob, downs_.first_row(piece));
  }

  Experts& own_;
  const Layer& layer_;
  const MoehiveSpec& spec_;
  const int64_t hidden_ = spec_.hidden_size, middle_ = spec_.intermediate_size, middle_stride_ = padded(middle_);
  const Format up_format_ = static_cast<Format>(spec_.up_format);
  const Format down_format_ = static_cast<Format>(spec_.down_format);
  const std::vector<Pair> pairs_;
  const std::vector<Group> groups_;  // an expert's each
  const int64_t count_, experts_;    // of those
  const int sharing_;                // threads of one token of each expert; 0: there are several
  const Pieces ups_, downs_;
  Operands inputs_, middles_;                      // of each token, of each pair
  std::vector<const void*> input_of_, middle_of_;  // of each pair
};

void Experts::run(const Layer& layer, const Rows& from, const Rows& to, bool added) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Call call(*this, layer);
  call.make_inputs(from);
  call.make_middles();
  call.make_results(to, added);
}

}  // namespace moehive
