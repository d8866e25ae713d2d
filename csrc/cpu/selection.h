// The largest threshold whose {logit >= threshold} weighs enough: a count of tokens for top-k, a share of the
// probability for top-p. No sort of the row and no copy of it: bounds close in until few candidates lie between them.
#pragma once
#include <algorithm>
#include <vector>

#include "convert.h"

namespace kdkernels {
namespace {

template <class Math>
class Selection {
  using Real = typename Math::Real;
  using V = typename Math::V;

 public:
  // read(b): block b of the row, padded with -inf to whole registers. Rows with NaN or +inf get any threshold.
  template <class Read>
  Real top_k(int64_t vocab_size, Read read, int64_t k) {
    find_maxima(vocab_size, read);
    // The k-th largest of k or more groups' maxima bounds the k-th largest logit, most often closely.
    const Real bound = k <= int64_t(maxima_.size()) ? largest(k, maxima_) : -kInfinity;
    return search(read, double(k), bound, [](V) { return Math::set(1); });
  }

  // The smallest such set that holds `mass` of softmax(logits·inv_temperature).
  template <class Read>
  Real top_p(int64_t vocab_size, Read read, double mass, double inv_temperature) {
    if (mass >= 1) return -kInfinity;
    find_maxima(vocab_size, read);
    const V max = Math::set(*std::max_element(maxima_.begin(), maxima_.end()));
    const V scale = Math::set(inv_temperature * kLog2E);
    const auto weigh = [=](V logit) { return Math::exp2_nonpositive((logit - max) * scale); };
    const Real all[] = {-kInfinity};
    double total[1];
    weigh_above<1>(read, all, weigh, total);
    return search(read, mass * total[0], -kInfinity, weigh);
  }

  // Whether any logit of a block reaches a threshold that was found in this row.
  bool reaches(int64_t block, Real threshold) const {
    const size_t groups = kBlock / kGroup, begin = size_t(block) * groups;
    for (size_t i = begin; i < begin + groups && i < maxima_.size(); i++)
      if (maxima_[i] >= threshold) return true;
    return false;
  }

 private:
  static constexpr Real kInfinity = __builtin_inf();
  static constexpr int kGroup = 128;           // columns to a maximum
  static constexpr size_t kCandidates = 1024;  // few enough to sort
  static constexpr int kRounds = 4;            // each leaves about an eighth, whatever the distribution
  static constexpr int kThresholds = 8;        // as many sums as registers hold in a round

  // weight{logit >= low} >= target > weight{logit >= high} = above
  struct Bounds {
    Real low, high;
    double above;
  };

  static Real largest(int64_t k, std::vector<Real> values) {
    std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<Real>());
    return values[size_t(k - 1)];
  }
  int columns(int64_t b) const {
    const int64_t left = vocab_size_ - b * kBlock;
    return int(left < kBlock ? left : kBlock);
  }
  int64_t blocks() const { return (vocab_size_ + kBlock - 1) / kBlock; }

  template <class Read>
  void find_maxima(int64_t vocab_size, Read read) {
    vocab_size_ = vocab_size;
    maxima_.clear();
    for (int64_t b = 0; b < blocks(); b++) {
      const Real* logits = read(b);
      const int n = round_up(columns(b), Math::lanes);
      for (int group = 0; group < n; group += kGroup) {
        const int end = group + kGroup < n ? group + kGroup : n;
        V max = Math::set(-kInfinity);
        for (int i = group; i < end; i += Math::lanes) max = Math::max(Math::load(logits + i), max);
        maxima_.push_back(Math::largest(max));
      }
    }
  }

  template <class Read, class Weigh>
  Real search(Read read, double target, Real low, Weigh weigh) {
    Bounds at{low, kInfinity, 0};
    for (int round = 0; !collect(read, at, round < kRounds ? kCandidates : size_t(vocab_size_)); round++)
      tighten(read, target, weigh, at);
    std::sort(candidates_.begin(), candidates_.end(), std::greater<Real>());
    double held = at.above;
    for (size_t i = 0; i < candidates_.size(); i++) {
      held += double(Math::largest(weigh(Math::set(candidates_[i]))));
      if (held >= target) return candidates_[i];
    }
    return at.low;  // only -inf is left, or the sums' rounding
  }

  // The finite logits within the bounds; false where they are more than `most`.
  template <class Read>
  bool collect(Read read, const Bounds& at, size_t most) {
    candidates_.clear();
    for (int64_t b = 0; b < blocks(); b++) {
      const Real* logits = nullptr;
      const int n = columns(b);
      for (int group = 0; group < n; group += kGroup) {
        if (!(maxima_[size_t(b * (kBlock / kGroup) + group / kGroup)] >= at.low)) continue;
        if (!logits) logits = read(b);
        collect_group(logits, group, group + kGroup < n ? group + kGroup : n, at);
        if (candidates_.size() > most) return false;
      }
    }
    return true;
  }
  void collect_group(const Real* logits, int begin, int end, const Bounds& at) {
    const V low = Math::set(at.low), high = Math::set(at.high), outside = Math::set(-kInfinity);
    for (int i = begin; i < end; i += Math::lanes) {
      const V x = Math::load(logits + i), below = Math::select(Math::greater(high, x), x, outside);
      const V inside = Math::select(Math::greater(low, below), outside, below);
      if (!Math::any(Math::greater(inside, outside))) continue;
      Real lanes[Math::lanes];
      Math::store(lanes, inside);
      for (Real lane : lanes)
        if (lane > -kInfinity) candidates_.push_back(lane);
    }
  }
  static bool within(const Bounds& at, Real x) { return x >= at.low && x < at.high && x > -kInfinity; }

  // Weighs at the quantiles of a sample, and takes the two that enclose the target.
  template <class Read, class Weigh>
  void tighten(Read read, double target, Weigh weigh, Bounds& at) {
    sample(read, at);
    if (candidates_.empty()) return;
    // Close together at the top, where a top-p ends in most rows.
    constexpr double quantile[kThresholds] = {1. / 256, 1. / 64, 1. / 32, 1. / 16, 1. / 8, 1. / 4, 1. / 2, 3. / 4};
    Real thresholds[kThresholds];
    double above[kThresholds];
    for (int j = 0; j < kThresholds; j++) thresholds[j] = candidates_[size_t(double(candidates_.size()) * quantile[j])];
    weigh_above<kThresholds>(read, thresholds, weigh, above);
    for (int j = 0; j < kThresholds; j++) {
      if (above[j] >= target) {
        at.low = thresholds[j];
        return;
      }
      at.high = thresholds[j], at.above = above[j];
    }
  }

  // Every 16th logit of four blocks, those within the bounds in descending order.
  template <class Read>
  void sample(Read read, const Bounds& at) {
    candidates_.clear();
    for (int64_t part = 0; part < 4; part++) {
      const int64_t b = blocks() * part / 4;
      const Real* logits = read(b);
      for (int i = 0; i < columns(b); i += 16)
        if (within(at, logits[i])) candidates_.push_back(logits[i]);
    }
    std::sort(candidates_.begin(), candidates_.end(), std::greater<Real>());
  }

  template <int N, class Read, class Weigh>
  void weigh_above(Read read, const Real* thresholds, Weigh weigh, double* above) {
    for (int j = 0; j < N; j++) above[j] = 0;
    V at[N];
    for (int j = 0; j < N; j++) at[j] = Math::set(thresholds[j]);
    for (int64_t b = 0; b < blocks(); b++) {
      const Real* logits = read(b);
      const int n = round_up(columns(b), Math::lanes);
      V sums[N];
      for (int j = 0; j < N; j++) sums[j] = Math::set(0);
      for (int i = 0; i < n; i += Math::lanes) {
        const V logit = Math::load(logits + i), weight = weigh(logit);
        for (int j = 0; j < N; j++)
          sums[j] = sums[j] + Math::select(Math::greater(at[j], logit), Math::set(0), weight);
      }
      for (int j = 0; j < N; j++) above[j] += Math::sum(sums[j]);
    }
  }

  int64_t vocab_size_ = 0;
  std::vector<Real> maxima_, candidates_;
};

}  // namespace
}  // namespace kdkernels
