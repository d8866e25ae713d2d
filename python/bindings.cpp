// kdkernels._C: csrc for Python. Addresses come as integers (Tensor.data_ptr()), checked by the caller; the GIL is
// released while a sweep runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../csrc/cpu/rows.h"
#ifdef KD_CUDA
#include "../csrc/cuda/rows.h"
#endif
#include "../csrc/rows.h"

namespace py = pybind11;
namespace kd = kdkernels;

namespace {

template <class T = void>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

kd::DType dtype_from(int code) {
  if (code < 0 || code > 3) throw std::invalid_argument("unknown dtype code " + std::to_string(code));
  return static_cast<kd::DType>(code);
}

kd::RowLayout layout(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  if (sizes.size() != strides.size() || sizes.size() > size_t(kd::RowLayout::max_dims))
    throw std::invalid_argument("a row layout has up to " + std::to_string(kd::RowLayout::max_dims) +
                                " sizes and as many strides");
  kd::RowLayout l;
  l.dims = int(sizes.size());
  for (int i = 0; i < l.dims; i++) l.size[i] = sizes[size_t(i)], l.stride[i] = strides[size_t(i)];
  return l;
}

kd::Logits logits(std::uintptr_t data, int dtype, int64_t width, const std::vector<int64_t>& sizes,
                  const std::vector<int64_t>& strides, double logit_scale, double softcap) {
  return {pointer(data), dtype_from(dtype), width, layout(sizes, strides), {logit_scale, softcap}};
}

kd::SparseTeacher sparse_teacher(int tail, bool whole, std::uintptr_t ids, bool ids_are_64_bit, std::uintptr_t logprobs,
                                 int logprobs_dtype, int64_t k, int64_t ids_stride, int64_t logprobs_stride,
                                 double scale) {
  if (tail < 0 || tail > int(kd::Tail::drop)) throw std::invalid_argument("unknown tail " + std::to_string(tail));
  kd::SparseTeacher t;
  t.tail = static_cast<kd::Tail>(tail);
  t.whole = whole;
  t.ids = pointer(ids);
  t.ids_are_64_bit = ids_are_64_bit;
  t.logprobs = pointer(logprobs);
  t.logprobs_dtype = dtype_from(logprobs_dtype);
  t.k = k;
  t.ids_stride = ids_stride;
  t.logprobs_stride = logprobs_stride;
  t.scale = scale;
  return t;
}

kd::RowProblem row_problem(const kd::Logits& student, const kd::Logits& teacher, const kd::SparseTeacher& sparse,
                           int64_t rows, int64_t vocab_size, int divergence, const std::vector<double>& parameters, std::uintptr_t weights, int strong,
                           double strong_amount, std::uintptr_t mask, const std::vector<int64_t>& mask_sizes,
                           const std::vector<int64_t>& mask_strides, double kd_weight, double ce_weight,
                           bool scale_by_temperature, double temperature, std::uintptr_t temperatures,
                           std::uintptr_t labels, std::uintptr_t row_scale, bool scale_gradient, std::uintptr_t loss,
                           std::uintptr_t stats, std::uintptr_t gradient, int gradient_dtype,
                           const std::vector<int64_t>& gradient_sizes, const std::vector<int64_t>& gradient_strides) {
  if (parameters.size() > 4) throw std::invalid_argument("a divergence has up to 4 parameters");
  if (divergence < 0 || divergence > int(kd::DivergenceId::adaptive_kl))
    throw std::invalid_argument("unknown divergence id " + std::to_string(divergence));
  if (strong < 0 || strong > int(kd::StrongSetId::given))
    throw std::invalid_argument("unknown strong set id " + std::to_string(strong));
  kd::RowProblem p;
  p.student = student;
  p.teacher = teacher;
  p.sparse = sparse;
  p.rows = rows;
  p.vocab_size = vocab_size;
  p.divergence = divergence;
  for (size_t i = 0; i < parameters.size(); i++) p.parameters[i] = parameters[i];
  p.weights = pointer(weights);
  p.strong = {static_cast<kd::StrongSetId>(strong), strong_amount, pointer<const uint8_t>(mask),
              layout(mask_sizes, mask_strides)};
  p.kd_weight = kd_weight;
  p.ce_weight = ce_weight;
  p.scale_by_temperature = scale_by_temperature;
  p.temperature = temperature;
  p.temperatures = pointer(temperatures);
  p.labels = pointer<const int64_t>(labels);
  p.row_scale = pointer(row_scale);
  p.scale_gradient = scale_gradient;
  p.loss = pointer(loss);
  p.stats = pointer(stats);
  p.gradient = pointer(gradient);
  p.gradient_dtype = dtype_from(gradient_dtype);
  p.gradient_rows = layout(gradient_sizes, gradient_strides);
  return p;
}

void cpu_row_loss(const kd::RowProblem& problem, int threads) {
  py::gil_scoped_release release;
  kd::cpu::row_loss(problem, threads);
}

void cpu_scale_rows(std::uintptr_t in, std::uintptr_t out, int dtype, const std::vector<int64_t>& sizes,
                    const std::vector<int64_t>& strides, int64_t rows, int64_t width, std::uintptr_t factors,
                    int threads) {
  const kd::RowLayout l = layout(sizes, strides);
  const kd::DType type = dtype_from(dtype);
  py::gil_scoped_release release;
  kd::cpu::scale_rows(pointer(in), pointer(out), type, l, rows, width, pointer(factors), threads);
}

#ifdef KD_CUDA
// plan: cluster, consumers, slot_columns, blocks_per_sm, ahead; empty: the library's choice.
void cuda_row_loss(const kd::RowProblem& problem, std::uintptr_t stream, const std::vector<int>& plan) {
  if (!plan.empty() && plan.size() != 5) throw std::invalid_argument("a plan has 5 numbers");
  py::gil_scoped_release release;
  const kd::cuda::Plan chosen =
      plan.empty() ? kd::cuda::plan(problem) : kd::cuda::Plan{plan[0], plan[1], plan[2], plan[3], plan[4]};
  kd::cuda::row_loss(problem, chosen, pointer(stream));
}

void cuda_scale_rows(std::uintptr_t in, std::uintptr_t out, int dtype, const std::vector<int64_t>& sizes,
                     const std::vector<int64_t>& strides, int64_t rows, int64_t width, std::uintptr_t factors,
                     int64_t factor_stride, std::uintptr_t stream) {
  kd::cuda::scale_rows(pointer(in), pointer(out), dtype_from(dtype), layout(sizes, strides), rows, width,
                       pointer<const float>(factors), factor_stride, pointer(stream));
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ kernels of kdkernels. Private: use kdkernels.distillation_loss.";
  py::class_<kd::Logits>(m, "Logits")
      .def(py::init(&logits), py::kw_only(), py::arg("data"), py::arg("dtype"), py::arg("width"), py::arg("sizes"),
           py::arg("strides"), py::arg("logit_scale"), py::arg("softcap"));
  m.attr("max_row_dims") = py::int_(int(kd::RowLayout::max_dims));
  py::class_<kd::SparseTeacher>(m, "SparseTeacher")
      .def(py::init(&sparse_teacher), py::kw_only(), py::arg("tail"), py::arg("whole"), py::arg("ids"),
           py::arg("ids_are_64_bit"), py::arg("logprobs"), py::arg("logprobs_dtype"), py::arg("k"),
           py::arg("ids_stride"), py::arg("logprobs_stride"), py::arg("scale"));
  py::class_<kd::RowProblem>(m, "RowProblem")
      .def(py::init(&row_problem), py::kw_only(), py::arg("student"), py::arg("teacher") = kd::Logits(),
           py::arg("sparse") = kd::SparseTeacher(), py::arg("rows"), py::arg("vocab_size"), py::arg("divergence"),
           py::arg("parameters"), py::arg("weights") = 0, py::arg("strong") = 0, py::arg("strong_amount") = 0.0,
           py::arg("mask") = 0, py::arg("mask_sizes") = std::vector<int64_t>(),
           py::arg("mask_strides") = std::vector<int64_t>(),
           py::arg("kd_weight"), py::arg("ce_weight"), py::arg("scale_by_temperature"), py::arg("temperature"), py::arg("temperatures"),
           py::arg("labels"), py::arg("row_scale"), py::arg("scale_gradient"), py::arg("loss"), py::arg("stats"),
           py::arg("gradient"), py::arg("gradient_dtype"), py::arg("gradient_sizes"), py::arg("gradient_strides"));
#ifdef KD_CUDA
  m.attr("cuda") = py::bool_(true);
  m.def("cuda_why_not", &kd::cuda::why_not, py::arg("device"));
  m.def("cuda_why_not_rows", &kd::cuda::why_not_rows, py::arg("problem"));
  m.def("cuda_row_loss", &cuda_row_loss, py::arg("problem"), py::kw_only(), py::arg("stream"), py::arg("plan"));
  m.def("cuda_scale_rows", &cuda_scale_rows, py::kw_only(), py::arg("inp"), py::arg("out"), py::arg("dtype"),
        py::arg("sizes"), py::arg("strides"), py::arg("rows"), py::arg("width"), py::arg("factors"),
        py::arg("factor_stride"), py::arg("stream"));
#else
  m.attr("cuda") = py::bool_(false);
#endif
  m.def("cpu_capabilities", &kd::cpu::capabilities);
  m.def("cpu_capability", &kd::cpu::capability);
  m.def("cpu_row_loss", &cpu_row_loss, py::arg("problem"), py::kw_only(), py::arg("threads"));
  m.def("cpu_scale_rows", &cpu_scale_rows, py::kw_only(), py::arg("inp"), py::arg("out"), py::arg("dtype"),
        py::arg("sizes"), py::arg("strides"), py::arg("rows"), py::arg("width"), py::arg("factors"),
        py::arg("threads"));
  m.def("back_with_huge_pages", [](std::uintptr_t data, int64_t bytes, int threads) {
    py::gil_scoped_release release;
    kd::cpu::back_with_huge_pages(pointer(data), bytes, threads);
  });
}
