// The sweeps over one row: statistics -> (sums) -> gradient. Each works block by block, so that a block's columns are
// in L1 while they are used, and the row pair in L2 between the sweeps.
#pragma once
#include "../divergence/pointwise.h"
#include "../rows.h"
#include "convert.h"
#include "vector.h"

namespace kdkernels {
namespace {

constexpr double kLog2E = 1.4426950408889634;

// What the first sweep knows after some blocks; merging is rescaling to a common maximum.
struct Statistics {
  double student_max = -INFINITY, teacher_max = -INFINITY;
  double student_sum = 0, teacher_sum = 0;  // of e^((z - max)/T)
  double hard_sum = 0;                      // of e^(z - max): the student at temperature 1
  int64_t top_block = 0;                    // where student_max is
  // Teacher-weighted moments of x = ((teacher - student) - origin)/T, the spread of the log-ratios.
  double origin = 0, moment1 = 0, moment2 = 0;

  double variance() const {
    const double mean = moment1 / teacher_sum;
    return moment2 / teacher_sum - mean * mean;
  }
};

inline double finite_or_zero(double x) { return std::isfinite(x) ? x : 0; }

// Adds a block's moments: of its columns where the block carries much of the teacher's mass, else of its two maxima
// alone, which costs nothing and tells models that agree from models that do not.
template <class Math>
void add_moments(const typename Math::Real* student, const typename Math::Real* teacher, int n, double inv_temperature,
                 double block_student_max, double block_teacher_max, double block_sum, Statistics& st) {
  using V = typename Math::V;
  if (block_sum < st.teacher_sum / 16) {
    const double x = finite_or_zero((block_teacher_max - block_student_max - st.origin) * inv_temperature);
    st.moment1 += block_sum * x;
    st.moment2 += block_sum * x * x;
    return;
  }
  const V scale = Math::set(inv_temperature), zero = Math::set(0), origin = Math::set(st.origin);
  const V max = Math::set(st.teacher_max), log2_scale = Math::set(inv_temperature * kLog2E);
  V moment1 = zero, moment2 = zero;
  for (int i = 0; i < n; i += Math::lanes) {
    const V z = Math::load(student + i), y = Math::load(teacher + i);
    const V p = Math::exp2_nonpositive((y - max) * log2_scale);
    const V x = ((y - z) - origin) * scale;
    const V px = Math::select(Math::greater(p, zero), p * x, zero);
    moment1 = moment1 + px;
    moment2 = moment2 + Math::select(Math::greater(p, zero), px * x, zero);
  }
  st.moment1 += Math::sum(moment1);
  st.moment2 += Math::sum(moment2);
}

// The block to come: fetched while this one is computed, so that memory never waits for arithmetic.
struct Ahead {
  const char *student, *teacher;
  int64_t student_bytes, teacher_bytes;  // per column
};

template <class Math>
void statistics_block(const typename Math::Real* student, const typename Math::Real* teacher, int n,
                      int64_t block, const Ahead& ahead, double inv_temperature, bool hard, bool moments,
                      Statistics& st) {
  using V = typename Math::V;
  V student_max = Math::set(-INFINITY), teacher_max = student_max;
  for (int i = 0; i < n; i += Math::lanes) {
    student_max = Math::max(Math::load(student + i), student_max);
    teacher_max = Math::max(Math::load(teacher + i), teacher_max);
  }
  const double old_student = st.student_max, old_teacher = st.teacher_max;
  const double block_student = Math::largest(student_max), block_teacher = Math::largest(teacher_max);
  if (block_student > old_student) {
    st.student_max = block_student;
    st.top_block = block;
    st.student_sum *= std::exp((old_student - st.student_max) * inv_temperature);
    st.hard_sum *= std::exp(old_student - st.student_max);
  }
  if (block_teacher > old_teacher) {
    st.teacher_max = block_teacher;
    const double factor = std::exp((old_teacher - st.teacher_max) * inv_temperature);
    st.teacher_sum *= factor, st.moment1 *= factor, st.moment2 *= factor;
  }
  if (old_student == -INFINITY) st.origin = float(finite_or_zero(st.teacher_max - st.student_max));

  const V scale = Math::set(inv_temperature * kLog2E), zero = Math::set(0);
  student_max = Math::set(finite_or_zero(st.student_max));  // all -inf so far: e^-inf = 0, and NaN stays NaN
  teacher_max = Math::set(finite_or_zero(st.teacher_max));
  V student_sum = zero, teacher_sum = zero;
  for (int i = 0; i < n; i += Math::lanes) {
    __builtin_prefetch(ahead.student + i * ahead.student_bytes);
    __builtin_prefetch(ahead.teacher + i * ahead.teacher_bytes);
    student_sum = student_sum + Math::exp2_nonpositive((Math::load(student + i) - student_max) * scale);
    teacher_sum = teacher_sum + Math::exp2_nonpositive((Math::load(teacher + i) - teacher_max) * scale);
  }
  const double block_sum = Math::sum(teacher_sum);
  st.student_sum += Math::sum(student_sum);
  st.teacher_sum += block_sum;
  if (moments)
    add_moments<Math>(student, teacher, n, inv_temperature, block_student, block_teacher, block_sum, st);
  if (hard) {
    const V log2e = Math::set(kLog2E);
    V hard_sum = zero;
    for (int i = 0; i < n; i += Math::lanes)
      hard_sum = hard_sum + Math::exp2_nonpositive((Math::load(student + i) - student_max) * log2e);
    st.hard_sum += Math::sum(hard_sum);
  }
}

struct Sums {
  double value = 0, slope = 0;
};

template <class Math, class D>
Sums sums_block(const typename Math::Real* student, const typename Math::Real* teacher, int n,
                const RowConstants<Math>& row, const D& divergence, double pivot) {
  using V = typename Math::V;
  const V at = Math::set(pivot);
  V value = Math::set(0), slope = Math::set(0);
  for (int i = 0; i < n; i += Math::lanes) {
    const auto c = Column<Math>::make(Math::load(student + i), Math::load(teacher + i), row);
    value = value + divergence.value(c);
    slope = slope + divergence.slope(c, at);
  }
  return {Math::sum(value), Math::sum(slope)};
}

// out = slope_factor·slope + q_factor·q; returns the sum of the values.
template <bool WithQ, bool Stream, class Math, class D>
double gradient_columns(const typename Math::Real* student, const typename Math::Real* teacher, int n,
                        const RowConstants<Math>& row, const D& divergence, double pivot, double slope_factor, double q_factor,
                        typename Math::Real* out) {
  using V = typename Math::V;
  const V at = Math::set(pivot), by_slope = Math::set(slope_factor), by_q = Math::set(q_factor);
  V value = Math::set(0);
  for (int i = 0; i < n; i += Math::lanes) {
    const auto c = Column<Math>::make(Math::load(student + i), Math::load(teacher + i), row);
    if constexpr (D::slopes_sum_to_zero) value = value + divergence.value(c);
    V g = by_slope * divergence.slope(c, at);
    if constexpr (WithQ) g = g + by_q * c.student();
    if constexpr (Stream)
      Math::stream(out + i, g);
    else
      Math::store(out + i, g);
  }
  return Math::sum(value);
}

template <class Math, class D>
double gradient_block(const typename Math::Real* student, const typename Math::Real* teacher, int n,
                      const RowConstants<Math>& row, const D& divergence, double pivot, double slope_factor,
                      double q_factor, bool stream, typename Math::Real* out) {
  auto columns = gradient_columns<true, false, Math, D>;
  if (q_factor == 0)
    columns = stream ? gradient_columns<false, true, Math, D> : gradient_columns<false, false, Math, D>;
  else if (stream)
    columns = gradient_columns<true, true, Math, D>;
  return columns(student, teacher, n, row, divergence, pivot, slope_factor, q_factor, out);
}

// out += factor·e^(student - max)
template <class Math>
void add_hard_softmax(const typename Math::Real* student, int n, double student_max, double factor,
                      typename Math::Real* out) {
  const typename Math::V max = Math::set(student_max), by = Math::set(factor), log2e = Math::set(kLog2E);
  for (int i = 0; i < n; i += Math::lanes)
    Math::store(out + i, Math::load(out + i) + by * Math::exp2_nonpositive((Math::load(student + i) - max) * log2e));
}

// Where the log-normalisers' gap is uncertain by more than this share of the log-ratios' spread, it is refined: sums
// of fp32 exponentials leave about 3e-8 in it, and a gradient of norm ~spread carries it at first order.
template <class Math>
constexpr double kRefineBelow = sizeof(typename Math::Real) == 4 ? 0.1 : 0;

constexpr int64_t kStreamFrom = int64_t(16) << 20;  // bytes of gradient

template <class Math, template <class> class Divergence>
class RowSweep {
  using Real = typename Math::Real;
  using D = Divergence<Math>;

 public:
  explicit RowSweep(const RowProblem& problem) : p_(problem) {}

  void run(int64_t row) {
    const double row_scale = number(p_.row_scale, row);
    row_ = row;
    if (row_scale == 0) {
      report(0, 0, 0, 0, 0);
      if (p_.gradient) fill(p_.gradient, p_.student.dtype, p_.gradient_rows.offset(row), p_.student.width, false);
      return;
    }
    student_at_ = p_.student.rows.offset(row);
    teacher_at_ = p_.teacher.rows.offset(row);
    const double temperature = p_.temperatures ? number(p_.temperatures, row) : p_.temperature;
    const double inv_temperature = Real(1 / temperature);  // the same number for the columns and for their sums
    const bool with_ce = p_.ce_weight != 0;
    const int64_t label = with_ce ? p_.labels[row] : 0;
    // The student at temperature 1 is the divergence's own softmax unless T or a missing divergence says otherwise.
    const bool own_hard_sum = with_ce && temperature != 1;

    Statistics st;
    for (int64_t b = 0; b < blocks(); b++) {
      const auto [student, teacher, n] = read(b);
      statistics_block<Math>(student, teacher, n, b, ahead(b + 1), inv_temperature, own_hard_sum,
                             p_.gradient && kRefineBelow<Math> > 0, st);
    }
    const double gap_of_logs = std::log(st.teacher_sum) - std::log(st.student_sum);
    const double max_gap = st.teacher_max - st.student_max;
    if (!(temperature > 0 && std::isfinite(temperature)) || !std::isfinite(max_gap + gap_of_logs) || label < 0 ||
        label >= p_.vocab_size) {
      report(NAN, NAN, NAN, NAN, NAN);
      if (p_.gradient) fill(p_.gradient, p_.student.dtype, p_.gradient_rows.offset(row), p_.student.width, true);
      return;
    }
    const double shift = std::trunc(max_gap / 4) * 4;
    double gap = (max_gap - shift) * inv_temperature + gap_of_logs;
    if (p_.gradient && st.variance() < kRefineBelow<Math> * kRefineBelow<Math>) {
      const auto rough = constants(st, shift, inv_temperature, gap);
      gap -= sums(rough, ForwardKL<Math>(p_.parameters, rough), 0).slope;
    }
    const auto row_constants = constants(st, shift, inv_temperature, gap);
    const D divergence(p_.parameters, row_constants);

    double value = 0, mean_slope = 0, pivot = 0;
    if (!D::slopes_sum_to_zero || !p_.gradient) {
      if (!D::slopes_sum_to_zero) pivot = derivative_at_top(row_constants, divergence, st);
      const Sums s = sums(row_constants, divergence, pivot);
      value = s.value, mean_slope = D::slopes_sum_to_zero ? 0 : s.slope;
    }
    double cross_entropy = 0;
    const double hard_sum = own_hard_sum ? st.hard_sum : st.student_sum;
    if (with_ce) cross_entropy = std::log(hard_sum) - (label_logit(label) - st.student_max);
    if (p_.gradient) {
      const double gradient_scale = p_.scale_gradient ? row_scale : 1;
      const double kd = p_.kd_weight * (p_.scale_by_temperature ? temperature : inv_temperature) * gradient_scale;
      const double ce = p_.ce_weight * gradient_scale;
      const double v = write_gradient(row_constants, divergence, st, pivot, kd, mean_slope, ce, hard_sum, own_hard_sum, label);
      if (D::slopes_sum_to_zero) value = v;
    }
    const double kd_factor = p_.kd_weight * (p_.scale_by_temperature ? temperature * temperature : 1);
    const double loss = (kd_factor != 0 ? kd_factor * value : 0) + (with_ce ? p_.ce_weight * cross_entropy : 0);
    report(row_scale * loss, st.student_max * inv_temperature + std::log(st.student_sum),
           st.teacher_max * inv_temperature + std::log(st.teacher_sum), value, cross_entropy);
  }

 private:
  struct Block {
    const Real *student, *teacher;
    int n;  // columns, rounded up to whole registers
  };

  static double number(const void* data, int64_t row, bool is_double) {
    return is_double ? static_cast<const double*>(data)[row] : double(static_cast<const float*>(data)[row]);
  }
  double number(const void* data, int64_t row) const { return number(data, row, p_.student.dtype == DType::float64); }
  void put(void* data, int64_t at, double x) const {
    if (p_.student.dtype == DType::float64)
      static_cast<double*>(data)[at] = x;
    else
      static_cast<float*>(data)[at] = float(x);
  }
  void report(double loss, double student_lse, double teacher_lse, double value, double cross_entropy) const {
    put(p_.loss, row_, loss);
    const double stats[] = {student_lse, teacher_lse, value, cross_entropy};
    for (int i = 0; i < 4; i++) put(p_.stats, i * p_.rows + row_, stats[i]);
  }

  int64_t blocks() const { return (p_.vocab_size + kBlock - 1) / kBlock; }
  int columns(int64_t b) const {
    const int64_t left = p_.vocab_size - b * kBlock;
    return int(left < kBlock ? left : kBlock);
  }
  Block read(int64_t b, Real* derivative = nullptr) {
    const int n = columns(b);
    return {read_block<Math>(p_.student, student_at_, b * kBlock, n, student_block_, derivative),
            read_block<Math>(p_.teacher, teacher_at_, b * kBlock, n, teacher_block_), round_up(n, Math::lanes)};
  }
  Ahead ahead(int64_t b) const {
    const int64_t column = b < blocks() ? b * kBlock : 0;
    const int64_t student_bytes = bytes_per_element(p_.student.dtype), teacher_bytes = bytes_per_element(p_.teacher.dtype);
    return {static_cast<const char*>(p_.student.data) + (student_at_ + column) * student_bytes,
            static_cast<const char*>(p_.teacher.data) + (teacher_at_ + column) * teacher_bytes, student_bytes,
            teacher_bytes};
  }
  double label_logit(int64_t label) {
    return *read_block<Math>(p_.student, student_at_, label, 1, student_block_);
  }

  static RowConstants<Math> constants(const Statistics& st, double shift, double inv_temperature, double gap) {
    RowConstants<Math> r;
    r.student_max = Math::set(st.student_max), r.teacher_max = Math::set(st.teacher_max);
    r.shift = Math::set(shift), r.gap = Math::set(gap), r.gap_rest = Math::set(gap - Real(gap));
    r.inv_temperature = Math::set(inv_temperature), r.log2e_over_temperature = Math::set(inv_temperature * kLog2E);
    r.inv_student_sum = Math::set(1 / st.student_sum), r.inv_teacher_sum = Math::set(1 / st.teacher_sum);
    r.log_student_sum = Math::set(std::log(st.student_sum)), r.log_teacher_sum = Math::set(std::log(st.teacher_sum));
    return r;
  }

  // h = dD/dq at the student's largest logit.
  double derivative_at_top(const RowConstants<Math>& row, const D& divergence, const Statistics& st) {
    const auto [student, teacher, n] = read(st.top_block);
    int top = 0;
    while (top < n - 1 && double(student[top]) != st.student_max) top++;
    const auto c = Column<Math>::make(Math::set(student[top]), Math::set(teacher[top]), row);
    return finite_or_zero(Math::largest(divergence.derivative(c)));
  }

  // From the row's end: what the sweep before left in the cache is used first.
  template <class AnyD>
  Sums sums(const RowConstants<Math>& row, const AnyD& divergence, double pivot) {
    Sums total;
    for (int64_t b = blocks() - 1; b >= 0; b--) {
      const auto [student, teacher, n] = read(b);
      const Sums s = sums_block(student, teacher, n, row, divergence, pivot);
      total.value += s.value, total.slope += s.slope;
    }
    return total;
  }

  double write_gradient(const RowConstants<Math>& row, const D& divergence, const Statistics& st, double pivot,
                        double kd, double mean_slope, double ce, double hard_sum, bool own_hard_sum, int64_t label) {
    const int64_t at = p_.gradient_rows.offset(row_);
    const bool transformed = !p_.student.transform.identity(), fold_ce = !own_hard_sum && kd != 0;
    const bool same_type = p_.student.dtype == (sizeof(Real) == 4 ? DType::float32 : DType::float64);
    // Past the caches where the gradient is too large to stay in them and is not touched again here.
    const bool large = p_.rows * p_.student.width * int64_t(sizeof(Real)) >= kStreamFrom;
    const bool may_stream = large && kd != 0 && ce == 0 && p_.gradient != p_.student.data;
    double value = 0;
    for (int64_t b = 0; b < blocks(); b++) {
      const int columns = this->columns(b);
      const auto [student, teacher, n] = read(b, transformed ? derivative_block_ : nullptr);
      const bool direct = same_type && !transformed && n == columns;
      Real* out = direct ? static_cast<Real*>(p_.gradient) + at + b * kBlock : gradient_block_;
      const bool aligned = reinterpret_cast<uintptr_t>(out) % (Math::lanes * sizeof(Real)) == 0;
      const bool stream = direct && may_stream && aligned;
      value += gradient_block<Math>(student, teacher, n, row, divergence, pivot, kd,
                                    (fold_ce ? ce : 0) - kd * mean_slope, stream, out);
      if (kd == 0)  // no divergence in the gradient, not even as 0·inf
        for (int i = 0; i < n; i++) out[i] = 0;
      if (ce != 0) {
        if (!fold_ce) add_hard_softmax<Math>(student, n, st.student_max, ce / hard_sum, out);
        if (label / kBlock == b) out[label % kBlock] -= Real(ce);
      }
      if (transformed)
        for (int i = 0; i < columns; i++) out[i] *= derivative_block_[i];
      if (!direct) narrow(out, columns, p_.gradient, p_.student.dtype, at + b * kBlock);
    }
    fill(p_.gradient, p_.student.dtype, at + p_.vocab_size, p_.student.width - p_.vocab_size, false);
    return value;
  }

  const RowProblem& p_;
  int64_t row_ = 0, student_at_ = 0, teacher_at_ = 0;
  alignas(64) Real student_block_[kBlock], teacher_block_[kBlock], gradient_block_[kBlock], derivative_block_[kBlock];
};

}  // namespace
}  // namespace kdkernels
