// The strong set of a row, block by block. However it is chosen, a column belongs to it where a score reaches a
// threshold; the score is the teacher's logit itself where the set goes by that.
#pragma once
#include "../rows.h"
#include "selection.h"

namespace kdkernels {
namespace {

template <class Math>
struct Members {
  const typename Math::Real* score;
  typename Math::Real threshold;
  int strong;  // how many columns are in S
};

template <class Math>
class StrongTokens {
  using Real = typename Math::Real;
  using V = typename Math::V;

 public:
  explicit StrongTokens(const RowProblem& problem) : p_(problem) {}

  // read_teacher(b): a block of the teacher's transformed logits.
  template <class ReadTeacher>
  void choose(int64_t row, int64_t label, double inv_temperature, ReadTeacher read_teacher) {
    const StrongSet& set = p_.strong;
    label_ = label;
    if (set.id == StrongSetId::given) mask_ = set.mask + set.mask_rows.offset(row);
    if (set.id == StrongSetId::top_k) threshold_ = selection_.top_k(p_.vocab_size, read_teacher, int64_t(set.amount));
    if (set.id == StrongSetId::top_p)
      threshold_ = selection_.top_p(p_.vocab_size, read_teacher, set.amount, inv_temperature);
  }

  Members<Math> of(int64_t block, const Real* teacher, int columns) {
    switch (p_.strong.id) {
      case StrongSetId::label: return of_label(block, teacher, columns);
      case StrongSetId::given: return of_mask(block, columns);
      default: return {teacher, threshold_, count(block, teacher, columns)};
    }
  }

 private:
  Members<Math> of_label(int64_t block, const Real* teacher, int columns) {
    if (label_ / kBlock != block) return {teacher, Real(__builtin_inf()), 0};
    for (int i = 0; i < round_up(columns, Math::lanes); i++) score_[i] = 0;
    score_[label_ % kBlock] = 1;
    return {score_, Real(0.5), 1};
  }
  Members<Math> of_mask(int64_t block, int columns) {
    const uint8_t* mask = mask_ + block * kBlock;
    int strong = 0;
    for (int i = 0; i < columns; i++) score_[i] = mask[i] ? Real(1) : Real(0), strong += mask[i] ? 1 : 0;
    for (int i = columns; i < round_up(columns, Math::lanes); i++) score_[i] = 0;
    return {score_, Real(0.5), strong};
  }
  int count(int64_t block, const Real* teacher, int columns) const {
    if (threshold_ == -Real(__builtin_inf())) return columns;
    if (!selection_.reaches(block, threshold_)) return 0;
    const int n = round_up(columns, Math::lanes);
    const V threshold = Math::set(threshold_), one = Math::set(1), zero = Math::set(0);
    V weak = zero;
    for (int i = 0; i < n; i += Math::lanes)
      weak = weak + Math::select(Math::greater(threshold, Math::load(teacher + i)), one, zero);
    return n - int(Math::sum(weak));  // padding is -inf, and weak
  }

  const RowProblem& p_;
  int64_t label_ = 0;
  const uint8_t* mask_ = nullptr;
  Real threshold_ = 0;
  Selection<Math> selection_;
  alignas(64) Real score_[kBlock];
};

}  // namespace
}  // namespace kdkernels
