// The ids that a sparse teacher names in a row, in the order of the blocks they lie in, and their log-probabilities.
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

// e^x for x <= 0, at least e^-700, to double precision; NaN counts as -inf. Vectorised by the compiler, as std::exp is not.
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
        columns_(size_t(t_.k)), places_(size_t(t_.k)), given_(size_t(t_.k)), logprobs_(size_t(t_.k + kSums)) {}

  // False: an id is out of range.
  bool read(int64_t row) {
    const bool in_range = t_.ids_are_64_bit ? place(static_cast<const int64_t*>(t_.ids) + row * t_.ids_stride)
                                            : place(static_cast<const int32_t*>(t_.ids) + row * t_.ids_stride);
    if (!in_range) return false;
    drop_repeated();
    widen(t_.logprobs, t_.logprobs_dtype, row * t_.logprobs_stride, int(t_.k), given_.data());
    for (int i = 0; i < size_; i++) logprobs_[size_t(i)] = given_[size_t(places_[size_t(i)])];
    find_best();
    return true;
  }

  int size() const { return size_; }
  Range in_block(int64_t b) const { return {starts_[size_t(b)], starts_[size_t(b + 1)]}; }
  int64_t column(int i) const { return columns_[size_t(i)]; }
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

  // Sorted by block, and within it in the order given.
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
      const size_t at = size_t(ends[ids[i] / kBlock]++);
      columns_[at] = ids[i], places_[at] = int(i);
    }
    return true;
  }

  void drop_repeated() {
    const int64_t blocks = int64_t(starts_.size()) - 2;
    size_ = 0;
    for (int64_t b = 0; b < blocks; b++) {
      const auto [begin, end] = in_block(b);
      const int kept = size_;
      for (int i = begin; i < end; i++) {
        bool& taken = taken_[columns_[size_t(i)] % kBlock];
        if (taken) continue;
        taken = true;
        columns_[size_t(size_)] = columns_[size_t(i)], places_[size_t(size_)] = places_[size_t(i)];
        size_++;
      }
      for (int i = kept; i < size_; i++) taken_[columns_[size_t(i)] % kBlock] = false;
      starts_[size_t(b)] = kept;
    }
    starts_[size_t(blocks)] = size_;
  }

  void find_best() {
    best_ = -1;
    for (int i = 0; i < size_; i++) {
      const double mine = logprobs_[size_t(i)], most = largest();
      if (best_ < 0 || mine > most || (mine == most && places_[size_t(i)] < places_[size_t(best_)])) best_ = i;
    }
  }

  const SparseTeacher& t_;
  int64_t vocab_size_;
  int size_ = 0, best_ = -1;
  std::vector<int> starts_;  // of the blocks
  std::vector<int64_t> columns_;
  std::vector<int> places_;  // where the ids were given
  std::vector<double> given_, logprobs_;
  bool taken_[kBlock] = {};
};

}  // namespace
}  // namespace kdkernels
