// The ids that a sparse teacher names in a row, in the order of their columns, and their log-probabilities.
#pragma once
#include <algorithm>
#include <vector>

#include "blocks.h"

namespace kdkernels {
namespace {

struct InverseFactorials {
  double of[14];
  constexpr InverseFactorials() : of{1} {
    for (int i = 1; i < 14; i++) of[i] = of[i - 1] / i;
  }
};
constexpr InverseFactorials kInverseFactorials;

// e^x for x <= 0, at least e^-700, to double precision; NaN counts as -inf. The compiler vectorises it, not std::exp.
KD_INLINE double exp_nonpositive(double x) {
  constexpr double magic = 6755399441055744.0;  // 1.5·2^52: adding it rounds to a whole number, in the low bits
  const double clamped = x > -700 ? x : -700;
  const double shifted = clamped * kLog2E + magic, n = shifted - magic;
  const double r = (clamped - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;  // ln 2 in two parts
  double p = 0;
  for (int i = 13; i >= 0; i--) p = p * r + kInverseFactorials.of[i];
  uint64_t bits, power;
  std::memcpy(&bits, &p, 8);
  std::memcpy(&power, &shifted, 8);
  bits += power << 52;
  std::memcpy(&p, &bits, 8);
  return p;
}

class RowTokens {
 public:
  struct Range {
    int begin, end;
  };

  RowTokens(const SparseTeacher& teacher, int64_t vocab_size)
      : t_(teacher), vocab_size_(vocab_size), starts_(size_t((vocab_size + kBlock - 1) / kBlock + 2)),
        tokens_(size_t(t_.k)), given_(size_t(t_.k)), logprobs_(size_t(t_.k + kSums)) {}

  // False: an id is out of range.
  bool read(int64_t row) {
    const bool in_range = t_.ids_are_64_bit ? place(static_cast<const int64_t*>(t_.ids) + row * t_.ids_stride)
                                            : place(static_cast<const int32_t*>(t_.ids) + row * t_.ids_stride);
    if (!in_range) return false;
    sort();
    drop_repeated();
    widen(t_.logprobs, t_.logprobs_dtype, row * t_.logprobs_stride, int(t_.k), given_.data());
    for (int i = 0; i < size_; i++) logprobs_[size_t(i)] = given_[size_t(tokens_[size_t(i)].place())];
    find_best();
    return true;
  }

  int size() const { return size_; }
  Range in_block(int64_t b) const { return {starts_[size_t(b)], starts_[size_t(b + 1)]}; }
  int64_t column(int i) const { return tokens_[size_t(i)].column(); }
  double logprob(int i) const { return logprobs_[size_t(i)]; }
  int best() const { return best_; }  // of the largest log-probability, the first of equals; -1 where there are no ids
  double largest() const { return best_ < 0 ? -INFINITY : logprobs_[size_t(best_)]; }

  // logsumexp of the log-probabilities; -inf where there is no mass.
  double log_mass() {
    const double max = largest();
    if (!(max > -INFINITY)) return -INFINITY;
    double sums[kSums] = {};
    for (int i = size_; i < size_ + kSums; i++) logprobs_[size_t(i)] = -INFINITY;
    for (int i = 0; i < size_; i += kSums)
      for (int lane = 0; lane < kSums; lane++) sums[lane] += exp_nonpositive(logprobs_[size_t(i + lane)] - max);
    double sum = 0;
    for (double lane : sums) sum += lane;
    return max + std::log(sum);
  }

 private:
  static constexpr int kSums = 8;
  static constexpr int kFew = 8;  // ids to a block, which need no more than insertion to be sorted

  struct Token {
    static constexpr int place_bits = 12;
    static_assert(SparseTeacher::most_ids <= 1 << place_bits);
    int64_t bits;  // in their order by column, then by where they were given
    int64_t column() const { return bits >> place_bits; }
    int place() const { return int(bits & ((1 << place_bits) - 1)); }
    bool operator<(const Token& other) const { return bits < other.bits; }
  };

  // Sorted by block.
  template <class Id>
  bool place(const Id* ids) {
    std::fill(starts_.begin(), starts_.end(), 0);
    int* ends = starts_.data() + 1;  // of the blocks, once all are placed
    for (int64_t i = 0; i < t_.k; i++) {
      if (ids[i] >= vocab_size_) return false;
      if (ids[i] >= 0) ends[ids[i] / kBlock + 1]++;
    }
    for (size_t b = 2; b < starts_.size(); b++) starts_[b] += starts_[b - 1];
    for (int64_t i = 0; i < t_.k; i++) {
      if (ids[i] < 0) continue;
      tokens_[size_t(ends[ids[i] / kBlock]++)] = {(int64_t(ids[i]) << Token::place_bits) + i};
    }
    size_ = starts_[starts_.size() - 2];
    return true;
  }

  void sort() {
    if (size_ > kFew * int(starts_.size())) return std::sort(tokens_.begin(), tokens_.begin() + size_);
    for (int i = 1; i < size_; i++) {
      const Token token = tokens_[size_t(i)];
      int at = i;
      for (; at > 0 && token < tokens_[size_t(at - 1)]; at--) tokens_[size_t(at)] = tokens_[size_t(at - 1)];
      tokens_[size_t(at)] = token;
    }
  }

  void drop_repeated() {
    const int before = size_;
    int64_t last = -1;
    size_ = 0;
    for (int i = 0; i < before; i++) {
      const Token token = tokens_[size_t(i)];
      tokens_[size_t(size_)] = token;
      size_ += token.column() != last;
      last = token.column();
    }
    if (size_ == before) return;
    std::fill(starts_.begin(), starts_.end(), 0);
    for (int i = 0; i < size_; i++) starts_[size_t(column(i) / kBlock + 1)]++;
    for (size_t b = 1; b < starts_.size(); b++) starts_[b] += starts_[b - 1];
  }

  void find_best() {
    best_ = -1;
    for (int i = 0; i < size_; i++) {
      const double mine = logprobs_[size_t(i)], most = largest();
      const bool earlier = best_ < 0 || tokens_[size_t(i)].place() < tokens_[size_t(best_)].place();
      if (best_ < 0 || mine > most || (mine == most && earlier)) best_ = i;
    }
  }

  const SparseTeacher& t_;
  int64_t vocab_size_;
  int size_ = 0, best_ = -1;
  std::vector<int> starts_;  // of the blocks
  std::vector<Token> tokens_;
  std::vector<double> given_, logprobs_;
};

}  // namespace
}  // namespace kdkernels
