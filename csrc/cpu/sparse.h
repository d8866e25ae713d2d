// The sweep for a sparse teacher. The given ids S are a short row of their own, whose divergence comes from the same
// code as that of a whole row; of the rest W the student's normaliser is all that is needed, and its gradient is one
// multiple of the student's probabilities.
#pragma once
#include "../divergence/sparse.h"
#include "sweep.h"
#include "tokens.h"

namespace kdkernels {
namespace {

// Sums of e^((logit - max)/T), and of e^(logit - max), after some blocks.
struct Exponentials {
  double max = -INFINITY, sum = 0, hard_sum = 0;

  bool exist() const { return sum > 0; }
  double lse(double inv_temperature) const { return exist() ? max * inv_temperature + std::log(sum) : -INFINITY; }
};

template <class Math>
double sum_of_exponentials(const typename Math::Real* logits, int n, double max, double scale, const Ahead& ahead) {
  using V = typename Math::V;
  const typename Math::PowersBelow powers(max, scale * kLog2E);
  V sum = Math::set(0);
  for (int i = 0; i < n; i += Math::lanes) {
    __builtin_prefetch(ahead.student + i * ahead.student_bytes);
    sum = sum + powers(Math::load(logits + i));
  }
  return Math::sum(sum);
}

template <class Math>
double largest_of(const typename Math::Real* logits, int n) {
  constexpr int ahead = 4;  // as many maxima, none of which waits for another
  typename Math::V max[ahead];
  for (auto& m : max) m = Math::set(-INFINITY);
  int i = 0;
  for (; i + ahead * Math::lanes <= n; i += ahead * Math::lanes)
    for (int j = 0; j < ahead; j++) max[j] = Math::max(Math::load(logits + i + j * Math::lanes), max[j]);
  for (; i < n; i += Math::lanes) max[0] = Math::max(Math::load(logits + i), max[0]);
  return Math::largest(Math::max(Math::max(max[0], max[1]), Math::max(max[2], max[3])));
}

template <class Math>
void add_exponentials(const typename Math::Real* logits, int n, const Ahead& ahead, double inv_temperature, bool hard,
                      Exponentials& e) {
  const double max = largest_of<Math>(logits, n);
  if (max > e.max) {
    e.sum *= std::exp((e.max - max) * inv_temperature);
    e.hard_sum *= std::exp(e.max - max);
    e.max = max;
  }
  const double at = finite_or_zero(e.max);  // all -inf so far: e^-inf = 0, and NaN stays NaN
  e.sum += sum_of_exponentials<Math>(logits, n, at, inv_temperature, ahead);
  if (hard) e.hard_sum += sum_of_exponentials<Math>(logits, n, at, 1, ahead);
}

// out = factor·e^((logit - max)·scale); 0 where the factor is, whatever the logits.
template <bool Stream, class Math>
void scaled_exponentials(const typename Math::Real* logits, int n, double max, double scale, double factor,
                         typename Math::Real* out) {
  using V = typename Math::V;
  const typename Math::PowersBelow powers(max, scale * kLog2E);
  const V times = Math::set(factor);
  for (int i = 0; i < n; i += Math::lanes) {
    V x = Math::set(0);
    if (factor != 0) x = times * powers(Math::load(logits + i));
    if constexpr (Stream)
      Math::stream(out + i, x);
    else
      Math::store(out + i, x);
  }
}

// The divergence between the models normalised within S: a row that is as wide as S. Both models' logits are taken from
// their largest: differences of the ones that count are exact then, wherever a model's logits lie.
template <class Math>
class Within : WholeRow<Math> {
  using Base = WholeRow<Math>;
  using Base::p_, Base::blocks, Base::read, Base::inv_temperature_;

 public:
  using Real = typename Math::Real;

  explicit Within(RowProblem& own) : Base(own), own_(own) {}

  // Of n ids, over whole registers beyond them too; written by whoever then calls measure().
  void resize(int64_t most) {
    stride_ = size_t(most + Math::lanes);
    values_.resize(3 * stride_);
  }
  Real* student() { return values_.data(); }
  Real* teacher() { return values_.data() + stride_; }
  const Real* student() const { return values_.data(); }
  const Real* gradient() const { return values_.data() + 2 * stride_; }

  // False: the student has NaN or +inf there, or the teacher, whose logits are from their largest already.
  bool prepare(int n, double inv_temperature, bool hard) {
    const int padded = round_up(n, Math::lanes);
    for (int i = n; i < padded; i++) student()[i] = teacher()[i] = -INFINITY;
    sums_ = Exponentials();
    sums_.max = largest_of<Math>(student(), padded);
    if (sums_.max > -INFINITY)
      for (int i = 0; i < n; i++) student()[i] -= Real(sums_.max);
    own_.student = own_.teacher = {};
    own_.student.data = student(), own_.teacher.data = teacher();
    own_.student.dtype = own_.teacher.dtype = sizeof(Real) == 4 ? DType::float32 : DType::float64;
    own_.vocab_size = padded;
    inv_temperature_ = inv_temperature, this->own_hard_sum_ = hard;
    row_.statistics = this->statistics();
    teacher_sum_ = row_.statistics.teacher_sum;
    sums_.sum = row_.statistics.student_sum;
    sums_.hard_sum = hard ? row_.statistics.hard_sum : sums_.sum;
    row_.statistics = row_.statistics.with_references();
    return sums_.max < INFINITY && !std::isnan(sums_.sum) && !std::isnan(teacher_sum_) &&
           this->prepare_constants(row_);
  }

  const Exponentials& sums() const { return sums_; }            // of the student
  double teacher_lse() const { return std::log(teacher_sum_); }  // from the largest; -inf where it has no mass

  // D, and as gradient() by_gap·T·dD/dlogit + by_student·q~.
  double measure(double by_gap, double by_student) {
    if (!(teacher_sum_ > 0)) return measure<ForwardKL>(by_gap, by_student);  // by_gap is 0, and its gap finite
    switch (DivergenceId(own_.divergence)) {
      case DivergenceId::reverse_kl: return measure<ReverseKL>(by_gap, by_student);
      case DivergenceId::jensen_shannon: return measure<JensenShannon>(by_gap, by_student);
      default: return measure<ForwardKL>(by_gap, by_student);
    }
  }

 private:
  template <template <class> class Divergence>
  double measure(double by_gap, double by_student) {
    const Divergence<Math> divergence(p_.parameters, row_.constants);
    typename Base::Slopes slopes;
    double value = Base::measure(row_, divergence, slopes);
    if (p_.gradient) {
      const double of_q = by_student - by_gap * slopes.mean;
      double values = 0;
      for (int64_t b = 0; b < blocks(); b++) {
        const auto [student, teacher, n] = read(b);
        values += gradient_block<Math>(student, teacher, n, row_.constants, divergence, slopes.pivot, by_gap, of_q, false,
                                       values_.data() + 2 * stride_ + b * kBlock);
      }
      if (divergence.slopes_sum_to_zero) value = values;
    }
    return sums_.exist() ? value : INFINITY;
  }

  RowProblem& own_;
  size_t stride_ = 0;
  std::vector<Real> values_;
  typename Base::Prepared row_;
  Exponentials sums_;
  double teacher_sum_ = 0;
};

template <class Math, class WithinMath>
class SparseSweep : Row<Math> {
  using Base = Row<Math>;
  using Real = typename Math::Real;
  using Base::p_, Base::blocks, Base::read, Base::inv_temperature_, Base::own_hard_sum_, Base::put_stat;

 public:
  explicit SparseSweep(const RowProblem& problem)
      : Base(problem), tokens_(problem.sparse, problem.vocab_size), within_problem_(problem), within_(within_problem_) {
    within_problem_.sparse = {};
    within_.resize(problem.sparse.k);
  }

  void run(int64_t row) {
    if (!this->begin(row)) return;
    if (!tokens_.read(row)) return this->put_all(NAN);
    read_teacher();
    rest_ = Exponentials();
    p_.sparse.whole ? sweep_vocabulary() : gather();
    if (!within_.prepare(tokens_.size(), inv_temperature_, own_hard_sum_) || !has_distribution())
      return this->put_all(NAN);
    const double log_mass = tokens_.log_mass();
    const auto parts = SparseRow<double>::make(p_.sparse.tail, log_mass, odds(), tokens_.size(), p_.vocab_size);
    const double kd = this->kd_factor(), shared_ce = this->shared_ce_factor();
    const double divergence =
        within_.measure(kd * parts.within, kd * parts.moved + weighted(shared_ce, parts.student_strong));
    const HardSoftmax hard = this->hard();
    const double cross_entropy = this->cross_entropy(hard);
    put_stats(parts, log_mass);
    if (p_.gradient) {
      const double of_rest = shared_ce * parts.student_weak - kd * parts.moved;
      p_.sparse.whole ? write_gradient(hard, rest_.exist() ? of_rest / rest_.sum : 0) : write_tokens();
    }
    this->put_loss(parts.loss(divergence), cross_entropy);
  }

 private:
  void read_teacher() {
    const double max = tokens_.largest(), at = max == -INFINITY ? 0 : max;
    for (int i = 0; i < tokens_.size(); i++)
      within_.teacher()[i] = typename WithinMath::Real((tokens_.logprob(i) - at) * p_.sparse.scale);
    teacher_max_ = max * p_.sparse.scale;
  }

  // The student's logits at the ids, and its sums over the rest.
  void sweep_vocabulary() {
    for (int64_t b = 0; b < blocks(); b++) {
      const auto [student, teacher, n] = read(b);
      add_exponentials<Math>(without_tokens(b, student, n), n, this->ahead(b + 1), inv_temperature_, own_hard_sum_, rest_);
    }
    if (!own_hard_sum_) rest_.hard_sum = rest_.sum;
  }
  const Real* without_tokens(int64_t b, const Real* student, int n) {
    const auto [begin, end] = tokens_.in_block(b);
    if (begin == end) return student;
    Real* rest = this->student_block_;
    if (student != rest) std::memcpy(rest, student, size_t(n) * sizeof(Real));
    for (int i = begin; i < end; i++) {
      Real& logit = rest[tokens_.column(i) % kBlock];
      within_.student()[i] = logit;
      logit = -INFINITY;
    }
    return rest;
  }

  // The student's logits at the ids alone, and their derivatives by what is in memory.
  void gather() {
    derivatives_.resize(size_t(tokens_.size()));
    for (int i = 0; i < tokens_.size(); i++) {
      within_.student()[i] = *read_block<Math>(p_.student, this->student_at_, tokens_.column(i), 1,
                                               this->student_block_, this->derivative_block_);
      derivatives_[size_t(i)] = p_.student.transform.identity() ? Real(1) : this->derivative_block_[0];
    }
  }

  // Not so where the student has NaN or +inf, or -inf throughout.
  bool has_distribution() const {
    if (!p_.sparse.whole) return true;
    return rest_.max < INFINITY && !std::isnan(rest_.sum) && (rest_.exist() || within_.sums().exist());
  }

  // log(Q_S / Q_W)
  double odds() const {
    const Exponentials& s = within_.sums();
    if (!p_.sparse.whole) return NAN;
    if (!s.exist() || !rest_.exist()) return s.exist() ? INFINITY : -INFINITY;
    return (s.max - rest_.max) * inv_temperature_ + (std::log(s.sum) - std::log(rest_.sum));
  }

  HardSoftmax hard() const {
    const Exponentials& s = within_.sums();
    const double max = s.max > rest_.max ? s.max : rest_.max;
    const auto part = [&](const Exponentials& e) { return e.exist() ? e.hard_sum * std::exp(e.max - max) : 0; };
    return {max, part(s) + part(rest_)};
  }

  void put_stats(const SparseRow<double>& parts, double log_mass) const {
    const Exponentials& s = within_.sums();
    const bool whole = p_.sparse.whole;
    const bool agree = tokens_.best() >= 0 && within_.student()[tokens_.best()] == 0 && s.max >= rest_.max;
    put_stat(0, whole ? log_add(s.lse(inv_temperature_), rest_.lse(inv_temperature_)) : NAN);
    put_stat(1, teacher_max_ * inv_temperature_ + within_.teacher_lse());
    put_stat(4, std::exp(log_mass));
    put_stat(5, parts.student_strong);
    put_stat(6, whole ? double(agree) : NAN);
  }

  // The gradient in W is factor·e^((logit - max)/T).
  void write_gradient(const HardSoftmax& hard, double factor) {
    const double max = finite_or_zero(rest_.max);
    Base::write_gradient(hard, [&](int64_t b, const Real* student, const Real*, int n, bool stream, Real* out) {
      const auto [begin, end] = tokens_.in_block(b);
      if (stream && begin == end) return scaled_exponentials<true, Math>(student, n, max, inv_temperature_, factor, out);
      Real* block = stream ? this->gradient_block_ : out;
      scaled_exponentials<false, Math>(student, n, max, inv_temperature_, factor, block);
      for (int i = begin; i < end; i++) block[tokens_.column(i) % kBlock] = Real(within_.gradient()[i]);
      if (!stream) return;
      for (int i = 0; i < n; i += Math::lanes) Math::stream(out + i, Math::load(block + i));
    });
  }

  // The gradient where only the ids have one.
  void write_tokens() {
    const int64_t at = p_.gradient_rows.offset(this->row_);
    fill(p_.gradient, p_.student.dtype, at, p_.student.width, false);
    if (this->kd_factor() == 0) return;
    for (int i = 0; i < tokens_.size(); i++) {
      const Real gradient = Real(within_.gradient()[i]) * derivatives_[size_t(i)];
      narrow(&gradient, 1, p_.gradient, p_.student.dtype, at + tokens_.column(i));
    }
  }

  RowTokens tokens_;
  RowProblem within_problem_;
  Within<WithinMath> within_;
  Exponentials rest_;
  double teacher_max_ = 0;
  std::vector<Real> derivatives_;
};

}  // namespace
}  // namespace kdkernels
