// What every sweep does with a row beside its divergence: its numbers in and out, its blocks, cross-entropy, and the
// way of a gradient to memory.
#pragma once
#include "blocks.h"

namespace kdkernels {
namespace {

constexpr int64_t kStreamFrom = int64_t(16) << 20;  // bytes of gradient

// The student at temperature 1: e^(logit - max) / sum.
struct HardSoftmax {
  double max, sum;
};

template <class Math>
class Row {
  using Real = typename Math::Real;

 public:
  explicit Row(const RowProblem& problem) : p_(problem) {}

 protected:
  struct Block {
    const Real *student, *teacher;  // a sparse teacher has no blocks: null
    int n;  // columns, rounded up to whole registers
  };

  // False: there is nothing to sweep, and all that is asked of this row has been written.
  bool begin(int64_t row) {
    row_ = row;
    row_scale_ = number(p_.row_scale, row);
    if (row_scale_ == 0) {
      put_all(0);
      return false;
    }
    student_at_ = p_.student.rows.offset(row);
    teacher_at_ = p_.teacher.rows.offset(row);
    temperature_ = p_.temperatures ? number(p_.temperatures, row) : p_.temperature;
    inv_temperature_ = Real(1 / temperature_);  // the same number for the columns and for their sums
    // The student at temperature 1 is the divergence's own softmax unless T or a missing divergence says otherwise.
    own_hard_sum_ = p_.with_ce() && temperature_ != 1;
    label_ = p_.reads_labels() ? p_.labels[row] : 0;
    if (temperature_ > 0 && std::isfinite(temperature_) && label_ >= 0 && label_ < p_.vocab_size) return true;
    put_all(NAN);
    return false;
  }

  // 0 or NaN as everything that is asked of this row.
  void put_all(double x) const {
    put(p_.loss, row_, x);
    const int more = p_.divergence == int32_t(DivergenceId::decoupled) ? 5 : 0;
    const int stats = 4 + (sparse() ? 3 : more);
    for (int i = 0; i < stats; i++) put_stat(i, x);
    if (p_.gradient) fill(p_.gradient, p_.student.dtype, p_.gradient_rows.offset(row_), p_.student.width, x != 0);
  }

  void put_loss(double divergence, double cross_entropy) const {
    const double kd_factor = p_.kd_weight * (p_.scale_by_temperature ? temperature_ * temperature_ : 1);
    const double loss =
        (kd_factor != 0 ? kd_factor * divergence : 0) + (p_.with_ce() ? p_.ce_weight * cross_entropy : 0);
    put(p_.loss, row_, row_scale_ * loss);
    put_stat(2, divergence);
    put_stat(3, cross_entropy);
  }
  void put_stat(int i, double x) const { put(p_.stats, i * p_.rows + row_, x); }

  static double number(const void* data, int64_t at, bool is_double) {
    return is_double ? static_cast<const double*>(data)[at] : double(static_cast<const float*>(data)[at]);
  }
  double number(const void* data, int64_t at) const { return number(data, at, p_.student.dtype == DType::float64); }

  bool sparse() const { return p_.sparse.tail != Tail::none; }
  int64_t blocks() const { return (p_.vocab_size + kBlock - 1) / kBlock; }
  int columns(int64_t b) const {
    const int64_t left = p_.vocab_size - b * kBlock;
    return int(left < kBlock ? left : kBlock);
  }
  Block read(int64_t b, Real* derivative = nullptr) {
    const int n = columns(b);
    return {read_block<Math>(p_.student, student_at_, b * kBlock, n, student_block_, derivative),
            sparse() ? nullptr : read_teacher(b), round_up(n, Math::lanes)};
  }
  const Real* read_teacher(int64_t b) {
    return read_block<Math>(p_.teacher, teacher_at_, b * kBlock, columns(b), teacher_block_);
  }
  Ahead ahead(int64_t b) const {
    const int64_t column = b < blocks() ? b * kBlock : 0;
    const int64_t student_bytes = bytes_per_element(p_.student.dtype), teacher_bytes = bytes_per_element(p_.teacher.dtype);
    const char* student = static_cast<const char*>(p_.student.data) + (student_at_ + column) * student_bytes;
    if (sparse()) return {student, nullptr, student_bytes, 0};
    return {student, static_cast<const char*>(p_.teacher.data) + (teacher_at_ + column) * teacher_bytes, student_bytes,
            teacher_bytes};
  }

  RowConstants<Math> constants(const Statistics& st, double shift, double gap) const {
    RowConstants<Math> r;
    r.student_max = Math::set(st.student_max), r.teacher_max = Math::set(st.teacher_max);
    r.shift = Math::set(shift), r.gap = Math::set(gap), r.gap_rest = Math::set(gap - Real(gap));
    r.inv_temperature = Math::set(inv_temperature_), r.log2e_over_temperature = Math::set(inv_temperature_ * kLog2E);
    r.inv_student_sum = Math::set(1 / st.student_sum), r.inv_teacher_sum = Math::set(1 / st.teacher_sum);
    r.log_student_sum = Math::set(std::log(st.student_sum)), r.log_teacher_sum = Math::set(std::log(st.teacher_sum));
    return r;
  }

  double cross_entropy(const HardSoftmax& hard) {
    if (!p_.with_ce()) return 0;
    const double logit = *read_block<Math>(p_.student, student_at_, label_, 1, student_block_);
    return std::log(hard.sum) - (logit - hard.max);
  }

  // Factors of the gradients of the divergence (times T) and of the cross-entropy.
  double kd_factor() const {
    return p_.kd_weight * (p_.scale_by_temperature ? temperature_ : inv_temperature_) * gradient_scale();
  }
  double ce_factor() const { return p_.ce_weight * gradient_scale(); }
  // The cross-entropy's factor of the divergence's own softmax, where the two share one.
  double shared_ce_factor() const { return !own_hard_sum_ && kd_factor() != 0 ? ce_factor() : 0; }

  // divergence_block(b, student, teacher, n, stream, out) writes kd_factor()·T·dD/dlogit, and with it what
  // shared_ce_factor() takes.
  template <class DivergenceBlock>
  void write_gradient(const HardSoftmax& hard, DivergenceBlock divergence_block) {
    const double kd = kd_factor(), ce = ce_factor(), apart_ce = ce - shared_ce_factor();
    const int64_t at = p_.gradient_rows.offset(row_);
    const bool transformed = !p_.student.transform.identity();
    const bool same_type = p_.student.dtype == (sizeof(Real) == 4 ? DType::float32 : DType::float64);
    // Past the caches where the gradient is too large to stay in them and is not touched again here.
    const bool large = p_.rows * p_.student.width * int64_t(sizeof(Real)) >= kStreamFrom;
    const bool in_place = p_.gradient == p_.student.data;
    const bool may_stream = large && kd != 0 && ce == 0 && !in_place;
    const bool may_write = same_type && !transformed && !(in_place && apart_ce != 0);  // which reads the logits again
    for (int64_t b = 0; b < blocks(); b++) {
      const int columns = this->columns(b);
      const auto [student, teacher, n] = read(b, transformed ? derivative_block_ : nullptr);
      const bool direct = may_write && n == columns;
      Real* out = direct ? static_cast<Real*>(p_.gradient) + at + b * kBlock : gradient_block_;
      const bool aligned = reinterpret_cast<uintptr_t>(out) % (Math::lanes * sizeof(Real)) == 0;
      divergence_block(b, student, teacher, n, direct && may_stream && aligned, out);
      if (kd == 0)  // no divergence in the gradient, not even as 0·inf
        for (int i = 0; i < n; i++) out[i] = 0;
      if (apart_ce != 0) add_hard_softmax<Math>(student, n, hard.max, ce / hard.sum, out);
      if (ce != 0 && label_ / kBlock == b) out[label_ % kBlock] -= Real(ce);
      if (transformed)
        for (int i = 0; i < columns; i++) out[i] *= derivative_block_[i];
      if (!direct) narrow(out, columns, p_.gradient, p_.student.dtype, at + b * kBlock);
    }
    fill(p_.gradient, p_.student.dtype, at + p_.vocab_size, p_.student.width - p_.vocab_size, false);
  }

  const RowProblem& p_;
  int64_t row_ = 0, student_at_ = 0, teacher_at_ = 0, label_ = 0;
  double row_scale_ = 0, temperature_ = 1, inv_temperature_ = 1;
  bool own_hard_sum_ = false;
  alignas(64) Real student_block_[kBlock], teacher_block_[kBlock], gradient_block_[kBlock], derivative_block_[kBlock];

 private:
  void put(void* data, int64_t at, double x) const {
    if (p_.student.dtype == DType::float64)
      static_cast<double*>(data)[at] = x;
    else
      static_cast<float*>(data)[at] = float(x);
  }
  double gradient_scale() const { return p_.scale_gradient ? row_scale_ : 1; }
};

}  // namespace
}  // namespace kdkernels
