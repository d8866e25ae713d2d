// What the ids of a sparse teacher's row decide alone: which of them count, the student's logits there, and the divergence
// within them. A warp or a block of threads a row, an id or several a thread.
#pragma once
#include "sparse_row.cuh"

namespace kdkernels::cuda {

// Threads of a row: a warp, or a block. Their sums and maxima, of which every thread gets the same.
template <int Threads>
struct Team {
  static constexpr int kWarps = Threads / 32;
  double* memory;  // of a block: one a warp
  int thread;

  __device__ void sync() const {
    if constexpr (kWarps == 1)
      __syncwarp();
    else
      __syncthreads();
  }
  template <class Real, class Op>
  __device__ Real all(Real x, Op op) const {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x = op(x, __shfl_xor_sync(kAllLanes, x, d));
    if constexpr (kWarps > 1) {
      sync();
      Real* of_warps = reinterpret_cast<Real*>(memory);
      if (thread % 32 == 0) of_warps[thread / 32] = x;
      sync();
      x = of_warps[0];
      for (int i = 1; i < kWarps; i++) x = op(x, of_warps[i]);
    }
    return x;
  }
  template <class Real>
  __device__ Real sum(Real x) const {
    return all(x, [](Real a, Real b) { return a + b; });
  }
  __device__ float max(float x) const {
    return all(x, [](float a, float b) { return fmaxf(a, b); });
  }
  __device__ int min(int x) const {
    return all(x, [](int a, int b) { return ::min(a, b); });
  }
};

// Which of a row's ids come first: a table of ids by their hash, with the least place of each. The outcome does not depend
// on the order in which threads arrive.
struct Places {
  static constexpr int kFree = -1;
  int *ids, *places;
  int bits;  // of its size

  template <class Row>
  __device__ void clear(const Row& team, int threads) const {
    for (int i = team.thread; i < 1 << bits; i += threads) ids[i] = kFree, places[i] = INT32_MAX;
  }
  __device__ unsigned next(unsigned at) const { return (at + 1) & ((1u << bits) - 1); }
  __device__ unsigned start(int id) const { return unsigned(id) * 2654435761u >> (32 - bits); }
  // Where the id lies.
  __device__ unsigned add(int id, int place) const {
    for (unsigned at = start(id);; at = next(at)) {
      const int there = atomicCAS(&ids[at], kFree, id);
      if (there != kFree && there != id) continue;
      atomicMin(&places[at], place);
      return at;
    }
  }
};

__device__ int64_t id_at(const SparseTeacher& t, uint32_t row, int j) {
  const int64_t at = int64_t(row) * t.ids_stride + j;
  return t.ids_are_64_bit ? static_cast<const int64_t*>(t.ids)[at] : static_cast<const int32_t*>(t.ids)[at];
}
__device__ float logprob_at(const SparseTeacher& t, uint32_t row, int j) {
  const int64_t at = int64_t(row) * t.logprobs_stride + j;
  switch (t.logprobs_dtype) {
    case DType::bfloat16: return float(static_cast<const __nv_bfloat16*>(t.logprobs)[at]);
    case DType::float16: return float(static_cast<const __half*>(t.logprobs)[at]);
    default: return static_cast<const float*>(t.logprobs)[at];
  }
}

// A thread's share of a row's ids: the places thread, thread + Threads, …
template <int Each>
struct Entries {
  int id[Each];  // -1: none
  float logit[Each], score[Each];
};

// The divergence within S, and its gradient for the workspace.
template <template <class> class Divergence, int Each, int Threads>
__device__ float within(const RowProblem& p, const Entries<Each>& e, const Team<Threads>& team, RowConstants<FloatMath> row,
                        float (&gaps)[Each], float (&shares)[Each]) {
  using C = Column<FloatMath>;
  using D = Divergence<FloatMath>;
  auto column = [&](int i) { return C::make(e.logit[i], e.score[i], row); };
  // Where the models nearly agree, a gradient carries the normalisers' rounding at first order: one Newton step.
  const ForwardKL<FloatMath> forward(p.parameters, row);
  float off = 0;
#pragma unroll
  for (int i = 0; i < Each; i++)
    if (e.id[i] >= 0) off += forward.slope(column(i), 0);
  row.gap_rest -= team.sum(off);

  const D divergence(p.parameters, row);
  float pivot = 0;
  if constexpr (!D::slopes_sum_to_zero) {  // at the student's most likely id
    float with = -__builtin_inff();
#pragma unroll
    for (int i = 0; i < Each; i++)
      if (e.id[i] >= 0 && e.logit[i] == row.student_max) with = fmaxf(with, e.score[i]);
    pivot = divergence.derivative(C::make(row.student_max, team.max(with), row));
    if (!isfinite(pivot)) pivot = 0;
  }
  float value = 0, slope = 0;
#pragma unroll
  for (int i = 0; i < Each; i++) {
    gaps[i] = shares[i] = 0;
    if (e.id[i] < 0) continue;
    const C c = column(i);
    shares[i] = c.student(), gaps[i] = divergence.slope(c, pivot);
    value += divergence.value(c), slope += gaps[i];
  }
  value = team.sum(value), slope = team.sum(slope);
  if constexpr (!D::slopes_sum_to_zero) {
#pragma unroll
    for (int i = 0; i < Each; i++) gaps[i] -= slope != 0 ? slope * shares[i] : 0.0f;
  }
  return value;
}

// Row `row` of the problem, to place `place` of w. `before_logits` is called before the first of the student's is read.
template <class T, int Each, int Threads, class F>
__device__ __forceinline__ void prepare_row(const RowProblem& p, uint32_t row, const Team<Threads>& team, const Places& places,
                                            const SparseWorkspace& w, int64_t place, F before_logits) {
  const SparseTeacher& teacher = p.sparse;
  const int k = int(teacher.k);
  const int64_t first = place * k;
  IdsRow out{};
  out.student_reference = kPadding, out.top_logit = -__builtin_inff(), out.label = -1;
  const float scale = static_cast<const float*>(p.row_scale)[row];
  if (scale == 0) {
    for (int j = team.thread; j < k; j += Threads) w.ids[first + j] = -1;
    out.flags = kSkipped;
    if (team.thread == 0) {
      w.rows[place] = out;
      if (!teacher.whole) report_sparse(p, row, true, 0, 1, {});
    }
    return;
  }

  // Clean ids, and what they are multiplied with.
  Entries<Each> e;
  unsigned at[Each];
  float logprob[Each];
  bool invalid = false;
  places.clear(team, Threads);
  team.sync();
#pragma unroll
  for (int i = 0; i < Each; i++) {
    const int j = i * Threads + team.thread;
    const int64_t id = j < k ? id_at(teacher, row, j) : -1;
    logprob[i] = j < k ? logprob_at(teacher, row, j) : 0;
    invalid |= id >= p.vocab_size;
    e.id[i] = id >= 0 && id < p.vocab_size ? int(id) : -1;
    if (e.id[i] >= 0) at[i] = places.add(e.id[i], j);
  }
  const T* student = row_begin<T>(p.student, row);
  before_logits();
  const float temperature = p.temperatures ? static_cast<const float*>(p.temperatures)[row] : float(p.temperature);
  const float inv_temperature = reciprocal(temperature), score_scale = float(teacher.scale);
  int label = -1;
  if (p.with_ce()) {
    const int64_t given = p.labels[row];
    invalid |= given < 0 || given >= p.vocab_size;
    if (given >= 0 && given < p.vocab_size) label = int(given), out.label_logit = float(student[label]);
  }
  out.label = label;
  team.sync();
  float student_max = -__builtin_inff(), teacher_max = -__builtin_inff();
  double mass = 0;
  int count = 0, label_inside = 0;
#pragma unroll
  for (int i = 0; i < Each; i++) {
    const int j = i * Threads + team.thread;
    e.logit[i] = e.score[i] = -__builtin_inff();
    if (e.id[i] >= 0 && places.places[at[i]] != j) e.id[i] = -1;
    if (e.id[i] < 0) continue;
    e.logit[i] = float(student[e.id[i]]), e.score[i] = logprob[i] * score_scale;
    student_max = fmaxf(student_max, e.logit[i]), teacher_max = fmaxf(teacher_max, e.score[i]);
    mass += exp(double(logprob[i])), count++, label_inside |= e.id[i] == label;
  }
  student_max = team.max(student_max), teacher_max = team.max(teacher_max);
  mass = team.sum(mass);
  count = team.sum(count | label_inside << 16 | int(invalid) << 20);  // k <= 4096: none runs into the next
  out.ids = count & 0xffff;
  if (count >> 16 & 1) out.flags |= kLabelInside;
  if (count >> 20) out.flags |= kInvalid;

  const bool some_student = student_max > -__builtin_inff(), some_teacher = teacher_max > -__builtin_inff();
  float student_sum = 0, teacher_sum = 0, hard_sum = 0;
  int top = INT32_MAX;
#pragma unroll
  for (int i = 0; i < Each; i++) {
    if (e.id[i] < 0) continue;
    const float x = e.logit[i] - student_max, y = e.score[i] - teacher_max;
    if (some_student) student_sum += expf(x * inv_temperature), hard_sum += expf(x);
    if (some_teacher) teacher_sum += expf(y * inv_temperature);
    if (y == 0) top = min(top, i * Threads + team.thread);
  }
  student_sum = team.sum(student_sum), teacher_sum = team.sum(teacher_sum), hard_sum = team.sum(hard_sum);
  top = team.min(top);
  float top_logit = -__builtin_inff();
#pragma unroll
  for (int i = 0; i < Each; i++)
    if (i * Threads + team.thread == top) top_logit = e.logit[i];
  out.top_logit = team.max(top_logit);
  if (!isfinite(student_sum) || !isfinite(teacher_sum) || !isfinite(mass) || !is_positive_finite(temperature)) out.flags |= kInvalid;

  float gaps[Each], shares[Each];
  if (some_student && some_teacher && !(out.flags & kInvalid)) {
    const Logarithm of_student = Logarithm::of(student_sum), of_teacher = Logarithm::of(teacher_sum);
    const float max_gap = teacher_max - student_max;
    RowConstants<FloatMath> c;
    c.student_max = student_max, c.teacher_max = teacher_max;
    c.shift = truncf(max_gap / 4) * 4;
    c.inv_temperature = inv_temperature, c.log2e_over_temperature = kLog2Ef / temperature;
    c.inv_student_sum = reciprocal(student_sum), c.inv_teacher_sum = reciprocal(teacher_sum);
    c.log_student_sum = of_student.natural(), c.log_teacher_sum = of_teacher.natural();
    c.gap = log_ratio(of_teacher, of_student), c.gap_rest = (max_gap - c.shift) * inv_temperature;
    if (p.divergence == int(DivergenceId::reverse_kl))
      out.within = within<ReverseKL>(p, e, team, c, gaps, shares);
    else if (p.divergence == int(DivergenceId::jensen_shannon))
      out.within = within<JensenShannon>(p, e, team, c, gaps, shares);
    else
      out.within = within<ForwardKL>(p, e, team, c, gaps, shares);
  } else {
    // One of the models has no distribution within S; the teacher's alone has a gradient, of forward KL.
    const float of_teacher = some_teacher ? reciprocal(teacher_sum) : 0, of_student = some_student ? reciprocal(student_sum) : 0;
#pragma unroll
    for (int i = 0; i < Each; i++) {
      gaps[i] = some_teacher ? -of_teacher * expf((e.score[i] - teacher_max) * inv_temperature) : 0;
      shares[i] = some_student ? of_student * expf((e.logit[i] - student_max) * inv_temperature) : 0;
    }
    out.within = some_teacher ? __builtin_inff() : 0;
  }
#pragma unroll
  for (int i = 0; i < Each; i++) {
    const int j = i * Threads + team.thread;
    if (j >= k) continue;
    w.ids[first + j] = e.id[i], w.logits[first + j] = e.logit[i];
    w.gaps[first + j] = gaps[i], w.shares[first + j] = shares[i];
  }
  if (team.thread != 0) return;
  if (some_student) out.student_reference = student_max, out.student_sum = student_sum, out.hard_sum = hard_sum;
  out.log_mass = log(mass), out.teacher_mass = float(mass);
  out.teacher_lse = some_teacher ? fmaf(teacher_max, inv_temperature, logf(teacher_sum)) : -__builtin_inff();
  if (!teacher.whole) {
    const float by_scale = p.scale_gradient ? scale : 1.0f, nan = __builtin_nanf("");
    out.by_gap = some_teacher ? float(p.kd_weight) * (p.scale_by_temperature ? temperature : inv_temperature) * by_scale : 0;
    report_sparse(p, row, !(out.flags & kInvalid), scale, temperature, {out.within, 0, nan, out.teacher_lse, out.teacher_mass, nan, nan});
  }
  w.rows[place] = out;
}

}  // namespace kdkernels::cuda
