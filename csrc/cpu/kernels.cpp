// The sweeps for one instruction set: compiled once for each, with KD_KERNELS naming the function it defines.
#include "kernels.h"

#include "adaptive.h"
#include "decoupled.h"
#include "sparse.h"
#include "sweep.h"

namespace kdkernels {
namespace {

template <class Sweep>
void sweep_rows(const RowProblem& problem, int64_t begin, int64_t end) {
  Sweep sweep(problem);
  for (int64_t row = begin; row < end; row++) sweep.run(row);
}

template <class Math, template <class> class... Ds>
void dispatch(DivergenceList<Ds...>, const RowProblem& problem, int64_t begin, int64_t end) {
  static constexpr SweepFunction by_id[] = {sweep_rows<PointwiseSweep<Math, Ds>>..., sweep_rows<DecoupledSweep<Math>>,
                                            sweep_rows<AdaptiveSweep<Math>>};
  static_assert(sizeof...(Ds) == size_t(DivergenceId::decoupled));
  by_id[problem.divergence](problem, begin, end);
  Math::fence();
}

template <class Math, class Within>
void dispatch_sparse(const RowProblem& problem, int64_t begin, int64_t end) {
  sweep_rows<SparseSweep<Math, Within>>(problem, begin, end);
  Math::fence();
}

void sweep(const RowProblem& problem, int64_t begin, int64_t end) {
  if (problem.sparse.tail != Tail::none) {
    auto sparse = dispatch_sparse<SimdMath, SimdMath>;
    if (problem.student.dtype == DType::float64)
      sparse = dispatch_sparse<DoubleMath, DoubleMath>;
    else if (problem.sparse.logprobs_dtype == DType::float64)
      sparse = dispatch_sparse<SimdMath, DoubleMath>;
    return sparse(problem, begin, end);
  }
  const bool wide = problem.student.dtype == DType::float64 || problem.teacher.dtype == DType::float64;
  wide ? dispatch<DoubleMath>(AllDivergences{}, problem, begin, end)
       : dispatch<SimdMath>(AllDivergences{}, problem, begin, end);
}

template <class Real>
void scale_as(const void* in, void* out, DType dtype, int64_t n, double factor) {
  Real block[kBlock];
  for (int64_t at = 0; at < n; at += kBlock) {
    const int count = int(n - at < kBlock ? n - at : kBlock);
    widen(in, dtype, at, count, block);
    for (int i = 0; i < count; i++) block[i] *= Real(factor);
    narrow(block, count, out, dtype, at);
  }
}

void scale(const void* in, void* out, DType dtype, int64_t n, double factor) {
  dtype == DType::float64 ? scale_as<double>(in, out, dtype, n, factor) : scale_as<float>(in, out, dtype, n, factor);
}

}  // namespace

CpuKernels KD_KERNELS() { return {sweep, scale}; }

}  // namespace kdkernels
