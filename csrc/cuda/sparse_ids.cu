// The two launches around the sweep of a sparse teacher's rows (sparse.h): one block a row, a thread an id or several.
#include "../divergence/sparse.h"
#include "check.h"
#include "sparse.cuh"

namespace kdkernels::cuda {
namespace {

constexpr int kMostThreads = 256;

// Sums and maxima over a block.
struct Block {
  double* memory;  // one a warp
  int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;

  template <class Real, class Op>
  __device__ Real all(Real x, Op op) const {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x = op(x, __shfl_xor_sync(kAllLanes, x, d));
    if (warps == 1) return x;
    __syncthreads();
    Real* of_warps = reinterpret_cast<Real*>(memory);
    if (lane == 0) of_warps[warp] = x;
    __syncthreads();
    x = of_warps[0];
    for (int i = 1; i < warps; i++) x = op(x, of_warps[i]);
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
  int* ids;     // -1: free
  int* places;
  int bits;     // of its size

  __device__ void clear() const {
    for (int i = threadIdx.x; i < 1 << bits; i += blockDim.x) ids[i] = -1, places[i] = INT32_MAX;
  }
  __device__ unsigned start(int id) const { return unsigned(id) * 2654435761u >> (32 - bits); }
  __device__ void add(int id, int place) const {
    const unsigned mask = (1u << bits) - 1;
    for (unsigned at = start(id);; at = (at + 1) & mask) {
      const int there = atomicCAS(&ids[at], -1, id);
      if (there == -1 || there == id) {
        atomicMin(&places[at], place);
        return;
      }
    }
  }
  __device__ bool is_first(int id, int place) const {
    const unsigned mask = (1u << bits) - 1;
    unsigned at = start(id);
    while (ids[at] != id) at = (at + 1) & mask;
    return places[at] == place;
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

// A row's entries of the workspace.
struct Entries {
  int* ids;
  float *logits, *gaps, *shares;
  __device__ Entries(const SparseWorkspace& w, uint32_t row, int k) {
    const int64_t at = int64_t(row) * k;
    ids = w.ids + at, logits = w.logits + at, gaps = w.gaps + at, shares = w.shares + at;
  }
};

// The divergence within S, and its gradient, from the ids' logits and scores (in `gaps`, which it overwrites).
template <template <class> class Divergence>
__device__ float within(const RowProblem& p, const Entries& e, int k, const Block& block, RowConstants<FloatMath> row) {
  using C = Column<FloatMath>;
  auto each = [&](auto f) {
    for (int j = threadIdx.x; j < k; j += blockDim.x)
      if (e.ids[j] >= 0) f(C::make(e.logits[j], e.gaps[j], row), j);
  };
  // Where the models nearly agree, a gradient carries the normalisers' rounding at first order: one Newton step.
  const ForwardKL<FloatMath> forward(p.parameters, row);
  float off = 0;
  each([&](const C& c, int) { off += forward.slope(c, 0); });
  row.gap_rest -= block.sum(off);

  const Divergence<FloatMath> divergence(p.parameters, row);
  float pivot = 0;
  if constexpr (!Divergence<FloatMath>::slopes_sum_to_zero) {  // at the student's most likely id
    int best = INT32_MAX;
    each([&](const C&, int j) {
      if (e.logits[j] == row.student_max) best = min(best, j);
    });
    best = block.min(best);
    if (best < k) pivot = divergence.derivative(C::make(e.logits[best], e.gaps[best], row));
    if (!isfinite(pivot)) pivot = 0;
    __syncthreads();
  }
  float value = 0, slope = 0;
  each([&](const C& c, int) { value += divergence.value(c), slope += divergence.slope(c, pivot); });
  value = block.sum(value), slope = block.sum(slope);
  if (Divergence<FloatMath>::slopes_sum_to_zero) slope = 0;
  each([&](const C& c, int j) {
    const float share = c.student();
    e.gaps[j] = divergence.slope(c, pivot) - (slope != 0 ? slope * share : 0.0f), e.shares[j] = share;
  });
  return value;
}

template <class T>
__global__ void __launch_bounds__(kMostThreads) prepare_kernel(const __grid_constant__ RowProblem p, SparseWorkspace workspace, int bits) {
  extern __shared__ int table[];
  __shared__ double of_warps[kMostThreads / 32];
  const SparseTeacher& teacher = p.sparse;
  const uint32_t row = blockIdx.x;
  const int k = int(teacher.k);
  const Entries e(workspace, row, k);
  const Block block{of_warps};
  IdsRow out{};
  out.student_reference = kPadding, out.top_logit = -__builtin_inff(), out.label = -1;
  const float scale = static_cast<const float*>(p.row_scale)[row];
  if (scale == 0) {
    for (int j = threadIdx.x; j < k; j += blockDim.x) e.ids[j] = -1;
    out.flags = kSkipped;
    if (threadIdx.x == 0) {
      workspace.rows[row] = out;
      if (!teacher.whole) report_sparse(p, row, true, 0, 1, {});
    }
    return;
  }
  const float temperature = p.temperatures ? static_cast<const float*>(p.temperatures)[row] : float(p.temperature);
  const float inv_temperature = reciprocal(temperature), log2_scale = kLog2Ef / temperature;
  const T* student = row_begin<T>(p.student, row);
  int label = -1;
  if (p.with_ce()) {
    const int64_t given = p.labels[row];
    if (given >= 0 && given < p.vocab_size)
      label = int(given), out.label_logit = float(student[label]);
    else
      out.flags |= kInvalid;
  }
  out.label = label;

  // Clean ids, and what they are multiplied with.
  const Places places{table, table + (1 << bits), bits};
  places.clear();
  __syncthreads();
  bool invalid = false;
  for (int j = threadIdx.x; j < k; j += blockDim.x) {
    const int64_t id = id_at(teacher, row, j);
    invalid |= id >= p.vocab_size;
    if (id >= 0 && id < p.vocab_size) places.add(int(id), j);
  }
  __syncthreads();
  float student_max = -__builtin_inff(), teacher_max = -__builtin_inff();
  double mass = 0;
  int count = 0;
  bool label_inside = false;
  const float score_scale = float(teacher.scale);
  for (int j = threadIdx.x; j < k; j += blockDim.x) {
    const int64_t given = id_at(teacher, row, j);
    const bool counts = given >= 0 && given < p.vocab_size && places.is_first(int(given), j);
    const int id = counts ? int(given) : -1;
    const float logprob = counts ? logprob_at(teacher, row, j) : -__builtin_inff();
    const float logit = counts ? float(student[id]) : -__builtin_inff(), score = logprob * score_scale;
    e.ids[j] = id, e.logits[j] = logit, e.gaps[j] = score, e.shares[j] = 0;
    student_max = fmaxf(student_max, logit), teacher_max = fmaxf(teacher_max, score);
    if (counts) mass += exp(double(logprob)), count++, label_inside |= id == label;
  }
  student_max = block.max(student_max), teacher_max = block.max(teacher_max);
  mass = block.sum(mass), count = block.sum(count);
  if (block.sum(int(label_inside))) out.flags |= kLabelInside;
  if (block.sum(int(invalid))) out.flags |= kInvalid;
  out.ids = count;

  const bool some_student = student_max > -__builtin_inff(), some_teacher = teacher_max > -__builtin_inff();
  float student_sum = 0, teacher_sum = 0, hard_sum = 0;
  int top = INT32_MAX;
  for (int j = threadIdx.x; j < k; j += blockDim.x) {
    if (e.ids[j] < 0) continue;
    const float x = e.logits[j], y = e.gaps[j];
    if (some_student) student_sum += expf((x - student_max) * inv_temperature), hard_sum += expf(x - student_max);
    if (some_teacher) teacher_sum += expf((y - teacher_max) * inv_temperature);
    if (y == teacher_max) top = min(top, j);
  }
  student_sum = block.sum(student_sum), teacher_sum = block.sum(teacher_sum), hard_sum = block.sum(hard_sum);
  top = block.min(top);
  if (!isfinite(student_sum) || !isfinite(teacher_sum) || !isfinite(mass) || !is_positive_finite(temperature)) out.flags |= kInvalid;
  if (top < k) out.top_logit = e.logits[top];
  __syncthreads();  // before `gaps` change

  if (some_student && some_teacher && !(out.flags & kInvalid)) {
    const Logarithm of_student = Logarithm::of(student_sum), of_teacher = Logarithm::of(teacher_sum);
    const float max_gap = teacher_max - student_max;
    RowConstants<FloatMath> c;
    c.student_max = student_max, c.teacher_max = teacher_max;
    c.shift = truncf(max_gap / 4) * 4;
    c.inv_temperature = inv_temperature, c.log2e_over_temperature = log2_scale;
    c.inv_student_sum = reciprocal(student_sum), c.inv_teacher_sum = reciprocal(teacher_sum);
    c.log_student_sum = of_student.natural(), c.log_teacher_sum = of_teacher.natural();
    c.gap = log_ratio(of_teacher, of_student), c.gap_rest = (max_gap - c.shift) * inv_temperature;
    if (p.divergence == int(DivergenceId::reverse_kl))
      out.within = within<ReverseKL>(p, e, k, block, c);
    else if (p.divergence == int(DivergenceId::jensen_shannon))
      out.within = within<JensenShannon>(p, e, k, block, c);
    else
      out.within = within<ForwardKL>(p, e, k, block, c);
  } else {
    // One of the models has no distribution within S; the teacher's alone has a gradient, of forward KL.
    const float inverse = some_teacher ? reciprocal(teacher_sum) : 0, of_student = some_student ? reciprocal(student_sum) : 0;
    for (int j = threadIdx.x; j < k; j += blockDim.x) {
      if (e.ids[j] < 0) continue;
      const float x = e.logits[j], y = e.gaps[j];
      e.gaps[j] = some_teacher ? -inverse * expf((y - teacher_max) * inv_temperature) : 0;
      e.shares[j] = some_student ? of_student * expf((x - student_max) * inv_temperature) : 0;
    }
    out.within = some_teacher ? __builtin_inff() : 0;
  }
  if (threadIdx.x != 0) return;
  if (some_student) out.student_reference = student_max, out.student_sum = student_sum, out.hard_sum = hard_sum;
  out.log_mass = log(mass), out.teacher_mass = float(mass);
  out.teacher_lse = some_teacher ? fmaf(teacher_max, inv_temperature, logf(teacher_sum)) : -__builtin_inff();
  if (!teacher.whole) {
    // Nothing outside S matters, nor the masses: the row is done but for its gradient.
    const float by_scale = p.scale_gradient ? scale : 1.0f, nan = __builtin_nanf("");
    out.by_gap = float(p.kd_weight) * (p.scale_by_temperature ? temperature : inv_temperature) * by_scale;
    if (!some_teacher) out.by_gap = 0;
    out.label = -1;
    report_sparse(p, row, !(out.flags & kInvalid), scale, temperature, {out.within, 0, nan, out.teacher_lse, out.teacher_mass, nan, nan});
  }
  workspace.rows[row] = out;
}

template <class T>
__global__ void __launch_bounds__(kMostThreads) patch_kernel(const __grid_constant__ RowProblem p, SparseWorkspace workspace) {
  const uint32_t row = blockIdx.x;
  const int k = int(p.sparse.k), width = int(p.student.width);
  const IdsRow r = workspace.rows[row];
  const GradientRow<T> gradient = gradient_row<T>(p, row_offset(p.gradient_rows, row));
  if (!p.sparse.whole) {  // else the sweep has written the other columns
    const float with = r.flags & kInvalid ? __builtin_nanf("") : 0.0f;
    fill_row<T>(gradient, 0, width, with, int(threadIdx.x) * kGroup<T>, int(blockDim.x) * kGroup<T>);
    __syncthreads();
  }
  if (r.flags & (kSkipped | kInvalid)) return;
  auto hard = [&](float logit) { return r.by_hard != 0 ? r.by_hard * expf(logit - r.hard_reference) : 0.0f; };
  const Entries e(workspace, row, k);
  for (int j = threadIdx.x; j < k; j += blockDim.x) {
    const int id = e.ids[j];
    if (id < 0) continue;
    float g = fmaf(r.by_gap, e.gaps[j], r.by_share * e.shares[j]) + hard(e.logits[j]);
    if (id == r.label) g -= r.at_label;
    store_one(gradient, id, g);
  }
  if (threadIdx.x == 0 && r.label >= 0 && !(r.flags & kLabelInside)) {
    const float temperature = p.temperatures ? static_cast<const float*>(p.temperatures)[row] : float(p.temperature);
    const float of_rest = r.by_rest != 0 ? r.by_rest * FloatMath::exp2((r.label_logit - r.rest_reference) * (kLog2Ef / temperature)) : 0;
    store_one(gradient, r.label, of_rest + hard(r.label_logit) - r.at_label);
  }
}

int threads_for(int64_t k) { return k <= 32 ? 32 : k <= 64 ? 64 : k <= 128 ? 128 : kMostThreads; }

template <class T>
void prepare_as(const RowProblem& p, const SparseWorkspace& workspace, cudaStream_t stream) {
  int bits = 6;
  while (int64_t(1) << bits < 2 * p.sparse.k) bits++;
  const int shared = int(2 * sizeof(int)) << bits;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(&prepare_kernel<T>), cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 16),
        "kdkernels: shared memory");
  prepare_kernel<T><<<unsigned(p.rows), threads_for(p.sparse.k), shared, stream>>>(p, workspace, bits);
  check(cudaGetLastError(), "kdkernels: launching the ids' kernel");
}

template <class T>
void patch_as(const RowProblem& p, const SparseWorkspace& workspace, cudaStream_t stream) {
  const int threads = p.sparse.whole ? threads_for(p.sparse.k) : kMostThreads;
  patch_kernel<T><<<unsigned(p.rows), threads, 0, stream>>>(p, workspace);
  check(cudaGetLastError(), "kdkernels: launching the ids' gradient");
}

}  // namespace

void sparse_prepare(const RowProblem& p, const SparseWorkspace& workspace, cudaStream_t stream) {
  switch (p.student.dtype) {
    case DType::bfloat16: return prepare_as<__nv_bfloat16>(p, workspace, stream);
    case DType::float16: return prepare_as<__half>(p, workspace, stream);
    default: return prepare_as<float>(p, workspace, stream);
  }
}

void sparse_patch(const RowProblem& p, const SparseWorkspace& workspace, cudaStream_t stream) {
  switch (p.student.dtype) {
    case DType::bfloat16: return patch_as<__nv_bfloat16>(p, workspace, stream);
    case DType::float16: return patch_as<__half>(p, workspace, stream);
    default: return patch_as<float>(p, workspace, stream);
  }
}

}  // namespace kdkernels::cuda
