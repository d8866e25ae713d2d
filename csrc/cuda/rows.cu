#include "rows.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

#include "check.h"
#include "exchange.cuh"
#include "kernel.h"
#include "ring.cuh"
#include "split.cuh"
#include "sparse.cuh"
#include "split_kernel.h"

namespace kdkernels::cuda {
namespace {

struct Device {
  int number = 0, major = 0, multiprocessors = 0, shared_per_block = 0, shared_per_sm = 0, reserved = 0;
};

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "kdkernels: cudaDeviceGetAttribute");
  return value;
}

Device device_info(int number) {
  static std::mutex mutex;
  static std::map<int, Device> known;
  const std::lock_guard lock(mutex);
  auto found = known.find(number);
  if (found == known.end()) {
    Device d;
    d.number = number;
    d.major = attribute(cudaDevAttrComputeCapabilityMajor, number);
    d.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, number);
    d.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, number);
    d.shared_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, number);
    d.reserved = attribute(cudaDevAttrReservedSharedMemoryPerBlock, number);
    found = known.emplace(number, d).first;
  }
  return found->second;
}

Device current_device() {
  int number = 0;
  check(cudaGetDevice(&number), "kdkernels: cudaGetDevice");
  return device_info(number);
}

template <class T, template <class> class... Ds>
const void* kernel_of(DivergenceList<Ds...>, int divergence) {
  static const void* (*const by_id[])() = {&row_kernel<T, Ds>...};
  return by_id[divergence]();
}

const void* kernel_of(DType dtype, int divergence) {
  switch (dtype) {
    case DType::bfloat16: return kernel_of<__nv_bfloat16>(AllDivergences{}, divergence);
    case DType::float16: return kernel_of<__half>(AllDivergences{}, divergence);
    default: return kernel_of<float>(AllDivergences{}, divergence);
  }
}

bool splits(const RowProblem& p) { return p.strong.id != StrongSetId::none; }
bool selects(const RowProblem& p) { return p.strong.id == StrongSetId::top_k || p.strong.id == StrongSetId::top_p; }

template <class T>
const void* split_kernel_of(const RowProblem& p) {
  if (p.divergence == int(DivergenceId::adaptive_kl)) return split_kernel<T, SplitSweepId::adaptive_kl>();
  if (p.strong.id == StrongSetId::label) return split_kernel<T, SplitSweepId::decoupled_label>();
  if (p.strong.id == StrongSetId::given) return split_kernel<T, SplitSweepId::decoupled_given>();
  if (p.strong.id == StrongSetId::top_k) return split_kernel<T, SplitSweepId::decoupled_top_k>();
  return split_kernel<T, SplitSweepId::decoupled_top_p>();
}

bool sparse(const RowProblem& p) { return p.sparse.tail != Tail::none; }

const void* kernel_of(const RowProblem& p) {
  if (sparse(p)) {
    switch (p.student.dtype) {
      case DType::bfloat16: return sparse_kernel<__nv_bfloat16>(is_resident(p.sparse));
      case DType::float16: return sparse_kernel<__half>(is_resident(p.sparse));
      default: return sparse_kernel<float>(is_resident(p.sparse));
    }
  }
  if (!splits(p)) return kernel_of(p.student.dtype, p.divergence);
  switch (p.student.dtype) {
    case DType::bfloat16: return split_kernel_of<__nv_bfloat16>(p);
    case DType::float16: return split_kernel_of<__half>(p);
    default: return split_kernel_of<float>(p);
  }
}

// Threads of a block beside the consumers.
int helpers(const RowProblem& p) { return sparse(p) ? kSparseHelpers : splits(p) ? kSplitHelpers : 64; }

int most_consumers(const RowProblem& p) { return sparse(p) ? kMaxSparseConsumers : splits(p) ? kMaxSplitConsumers : kMaxConsumers; }

int group(const RowProblem& p) { return int(16 / bytes_per_element(p.student.dtype)); }

// Columns of a block's share, counted from the 16-byte boundary before the row: what whole warps take at a time.
int64_t share(const RowProblem& p, int cluster) {
  const int64_t of_warp = 32 * group(p), columns = p.vocab_size + group(p) - 1;
  return ((columns + cluster - 1) / cluster + of_warp - 1) / of_warp * of_warp;
}

constexpr int kStaticShared = sizeof(ExchangeMemory) + (2 * sizeof(uint64_t) + sizeof(RowHeader)) * kMaxSlots + 256;  // with room for alignment

int static_shared(const RowProblem& p) {
  return kStaticShared + (splits(p) ? int(sizeof(SplitMemory<float>)) : sparse(p) ? int(sizeof(SparseMemory)) : 0);
}

// Dynamic shared memory that lies before the ring.
int64_t before_ring(const RowProblem& p, const Plan& plan) {
  return sparse(p) && is_resident(p.sparse) ? resident_bytes(p.sparse.k) : split_bytes(p.strong.id, plan.cluster);
}

int64_t slot_bytes(const RowProblem& p, const Plan& plan) {
  return plan.slot_columns * ((sparse(p) ? 1 : 2) * bytes_per_element(p.student.dtype) + (p.strong.mask ? 1 : 0));
}

int slots(const Device& d, const RowProblem& p, const Plan& plan) {
  const int64_t per_block = std::min<int64_t>(d.shared_per_block, d.shared_per_sm / plan.blocks_per_sm - d.reserved);
  const int64_t room = per_block - static_shared(p) - before_ring(p, plan);
  const int64_t slot = slot_bytes(p, plan);
  return int(std::clamp<int64_t>(room / slot, 0, kMaxSlots));
}

// Slots that a block's share of a row takes.
int chunks(const RowProblem& p, const Plan& plan) {
  return int((share(p, plan.cluster) + plan.slot_columns - 1) / plan.slot_columns);
}

bool has_gradient(const RowProblem& p) { return p.gradient != nullptr; }

// One past the last element of a tensor whose strides are not negative.
const void* end_of(const Logits& logits) {
  int64_t last = logits.width;
  for (int i = 0; i < logits.rows.dims; i++) last += (logits.rows.size[i] - 1) * logits.rows.stride[i];
  return static_cast<const char*>(logits.data) + last * bytes_per_element(logits.dtype);
}

// How rows lie within groups of columns, 16 bytes of logits: each row's columns after a group's boundary, as far as it can
// be told.
struct Alignment {
  int64_t base;
  int dims;
  int64_t size[RowLayout::max_dims], stride[RowLayout::max_dims];
  bool constant;  // the same for every row
};

Alignment alignment(const void* data, const RowLayout& rows, int64_t bytes, int64_t g) {
  Alignment a{int64_t(reinterpret_cast<uintptr_t>(data) / uintptr_t(bytes)) % g, rows.dims, {}, {}, true};
  for (int i = 0; i < rows.dims; i++) {
    a.size[i] = rows.size[i], a.stride[i] = rows.stride[i] % g;
    a.constant = a.constant && a.stride[i] == 0;
  }
  return a;
}

bool alike(const Alignment& a, const Alignment& b) {
  if (a.base != b.base) return false;
  if (a.constant && b.constant) return true;
  return a.dims == b.dims && std::equal(a.size, a.size + a.dims, b.size) &&
         std::equal(a.stride, a.stride + a.dims, b.stride);
}

}  // namespace

std::string why_not(int device) {
  const int major = device_info(device).major;
  if (major >= 9) return "";
  return "the CUDA kernels need compute capability 9.0 or newer, this device has " + std::to_string(major) + "." +
         std::to_string(attribute(cudaDevAttrComputeCapabilityMinor, device));
}

std::string why_not_rows(const RowProblem& p) {
  if (!sparse(p) && p.student.dtype != p.teacher.dtype) return "student and teacher logits differ in dtype";
  if (p.student.dtype == DType::float64 || p.sparse.logprobs_dtype == DType::float64) return "float64 logits";
  const bool narrows = p.student.dtype == DType::float32 && bytes_per_element(p.gradient_dtype) == 2;
  if (has_gradient(p) && p.gradient_dtype != p.student.dtype && !narrows)
    return "a gradient that has not the student logits' dtype, nor 16 bits where they are float32";
  if (!p.student.transform.identity() || !p.teacher.transform.identity()) return "logit scales and softcaps";
  if (p.rows >= int64_t(1) << 31 || p.student.width >= int64_t(1) << 30) return "2^31 rows or 2^30 columns and more";
  if (sparse(p) && !p.sparse.whole) return "";
  const int64_t bytes = bytes_per_element(p.student.dtype);
  const int64_t of_gradient = bytes_per_element(p.gradient_dtype), g = group(p);
  const Alignment student = alignment(p.student.data, p.student.rows, bytes, g);
  if ((!sparse(p) && !alike(student, alignment(p.teacher.data, p.teacher.rows, bytes, g))) ||
      (has_gradient(p) && !alike(student, alignment(p.gradient, p.gradient_rows, of_gradient, g))))
    return "rows of student, teacher and gradient lie differently within 16 bytes";
  if (p.strong.mask) {
    const Alignment mask = alignment(p.strong.mask, p.strong.mask_rows, 1, 16);
    if (!student.constant || student.base != 0 || !mask.constant || mask.base != 0 || p.vocab_size % 16 != 0)
      return "a mask whose rows, or logits whose rows, do not lie at multiples of 16 bytes";
  }
  if (plan(p).cluster == 0)
    return "a vocabulary of " + std::to_string(p.vocab_size) + " does not fit the shared memory of a cluster";
  return "";
}

namespace {

// Slots for a share, so that `rows` of them fit and at least one slot is left to fetch into, unless `tight`.
bool lay_out(const Device& d, const RowProblem& p, Plan& plan, int rows, bool tight) {
  const int of_warp = 32 * group(p), least = plan.consumers * group(p);
  const int64_t columns = share(p, plan.cluster);
  auto fits_in = [&](int pieces, int spare) {
    const int64_t slot = ((columns + pieces - 1) / pieces + of_warp - 1) / of_warp * of_warp;
    plan.slot_columns = int(std::max<int64_t>(slot, least));
    return slots(d, p, plan) >= rows * chunks(p, plan) + spare;
  };
  for (int pieces = 1; pieces <= 4; pieces++)
    if (fits_in(pieces, 1)) return true;
  return tight && (fits_in(2, 0) || fits_in(1, 0) || fits_in(4, 0));
}

// Of a sparse teacher: two rows at a time, in slots that are filled and emptied sooner than whole shares.
bool lay_out_sparse(const Device& d, const RowProblem& p, Plan& plan) {
  const int turn = plan.consumers * group(p);
  plan.slot_columns = int(std::clamp<int64_t>(share(p, plan.cluster), turn, 2 * turn));
  return slots(d, p, plan) > (1 + plan.ahead) * chunks(p, plan);
}

Plan sparse_plan(const Device& d, const RowProblem& p, Plan plan) {
  for (plan.ahead = 1; plan.ahead >= 0; plan.ahead--)
    for (plan.cluster = 1; plan.cluster <= 16; plan.cluster *= 2) {
      if (!lay_out_sparse(d, p, plan)) continue;
      // A larger cluster where rows are too few to fill the chip.
      for (Plan wider = plan; wider.cluster < 16 && p.rows * wider.cluster * 2 <= d.multiprocessors && share(p, wider.cluster * 2) >= 2048;) {
        wider.cluster *= 2;
        if (!lay_out_sparse(d, p, wider)) break;
        plan = wider;
      }
      return plan;
    }
  plan.cluster = 0;
  return plan;
}

}  // namespace

// Measured on an H100, bf16, fraction of the memory limit (docs/performance.md):
//   - a row alone in the ring, in the smallest cluster that holds it, suits what memory limits: reverse KL at 128256
//     0.94 in clusters of 4, 0.89 two rows at a time in clusters of 8; total variation 0.66 and 0.65, but where the
//     cluster is the same (50304: 2) 0.64 and 0.77;
//   - two rows at a time suit what needs two exchanges a row and many special functions: Jensen-Shannon 0.61 and 0.56;
//   - forward KL, the lightest, takes two where that leaves room to fetch the third: 0.96 and 0.93.
Plan plan(const RowProblem& p) {
  const Device d = current_device();
  const bool narrow = bytes_per_element(p.student.dtype) == 2;
  const auto divergence = DivergenceId(p.divergence);
  const bool like_forward = divergence == DivergenceId::forward_kl || (divergence == DivergenceId::decoupled && !selects(p));
  const bool mixture = divergence == DivergenceId::jensen_shannon || divergence == DivergenceId::skew_forward_kl ||
                       divergence == DivergenceId::skew_reverse_kl;
  struct Threads {
    int64_t up_to;  // columns of a row
    int consumers, blocks_per_sm;
  };
  static constexpr Threads threads[] = {{1024, 128, 3}, {8192, 128, 3}, {16384, 256, 2}, {INT64_MAX, 512, 1}};
  const Threads* few = threads;
  while (p.vocab_size * (narrow ? 1 : 2) > few->up_to) few++;
  const int consumers = std::min(few->consumers, most_consumers(p));
  Plan one{0, consumers, 0, few->blocks_per_sm, 0}, two = one;
  if (sparse(p)) return sparse_plan(d, p, one);
  two.ahead = 1;
  for (const bool tight : {false, true})
    for (int cluster = 1; cluster <= 16 && one.cluster == 0; cluster *= 2) {
      Plan wider = one;
      wider.cluster = cluster;
      if (lay_out(d, p, wider, 1, tight)) one = wider;
    }
  for (int cluster = 1; cluster <= 16 && two.cluster == 0; cluster *= 2) {
    Plan wider = two;
    wider.cluster = cluster;
    if (lay_out(d, p, wider, 2, true)) two = wider;
  }
  Plan plan = one;
  if (narrow && two.cluster) {
    const bool needs_sums = divergence > DivergenceId::symmetric_kl && !splits(p), room = slots(d, p, two) > 2 * chunks(p, two);
    const bool light = like_forward && one.cluster == 4 && chunks(p, two) == 1 && room;
    if (mixture || light || (needs_sums && two.cluster == one.cluster)) plan = two;
  }
  if (plan.cluster == 0) return plan;
  if (plan.cluster == 1 && !plan.ahead && divergence <= DivergenceId::symmetric_kl && narrow && consumers == 512)
    plan.slot_columns = 8192;  // 0.95 instead of 0.93 at 32000
  // A larger cluster where rows are too few to fill the chip.
  while (plan.cluster < 16 && p.rows * plan.cluster * 2 <= d.multiprocessors && share(p, plan.cluster * 2) >= 2048) {
    Plan wider = plan;
    wider.cluster *= 2;
    if (!lay_out(d, p, wider, 1 + plan.ahead, false)) break;
    plan = wider;
  }
  return plan;
}

namespace {

void sweep(const RowProblem& p, const Plan& plan, const SparseWorkspace& workspace, void* stream) {
  if (p.rows == 0) return;
  const Device d = current_device();
  const bool possible = plan.ahead >= 0 && plan.ahead <= 1 && plan.cluster >= 1 && plan.cluster <= 16 && plan.consumers >= 32 &&
                        plan.consumers <= most_consumers(p) && plan.consumers % 32 == 0 &&
                        plan.slot_columns >= plan.consumers * group(p) && plan.slot_columns % (32 * group(p)) == 0;
  if (!possible || chunks(p, plan) * (1 + plan.ahead) > slots(d, p, plan))
    throw std::invalid_argument("kdkernels: this problem does not fit the plan asked for");
  ClusterProblem problem{p, end_of(p.student), end_of(p.teacher), int(share(p, plan.cluster)), plan.slot_columns,
                         slots(d, p, plan), float(p.kd_weight), float(p.ce_weight), float(p.temperature),
                         {float(p.parameters[0]), float(p.parameters[1]), float(p.parameters[2]), float(p.parameters[3])},
                         float(p.strong.amount), p.with_ce(), p.reads_labels(), p.scale_by_temperature,
                         p.scale_gradient, plan.ahead, has_gradient(p) && bytes_per_element(p.gradient_dtype) == 2,
                         workspace};
  const void* kernel = kernel_of(p);

  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(plan.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(unsigned(plan.consumers + helpers(p)));
  config.gridDim = dim3(unsigned(plan.cluster));
  config.dynamicSmemBytes = size_t(problem.slots) * size_t(slot_bytes(p, plan)) + size_t(before_ring(p, plan));
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;

  // As many clusters as the chip holds at once; asked once for each kind of launch.
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int, size_t>, int> known;
  int resident = 0;
  {
    const std::lock_guard lock(mutex);
    auto& entry = known[{d.number, kernel, plan.cluster, plan.consumers, config.dynamicSmemBytes}];
    if (entry == 0) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 d.shared_per_block - static_shared(p)),
            "kdkernels: shared memory");
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "kdkernels: cluster size");
      check(cudaOccupancyMaxActiveClusters(&entry, kernel, &config), "kdkernels: occupancy");
      if (entry < 1) throw std::runtime_error("kdkernels: no cluster of this size fits the device");
    }
    resident = entry;
  }
  config.gridDim = dim3(unsigned(plan.cluster * std::min<int64_t>(resident, p.rows)));
  void* arguments[] = {&problem};
  check(cudaLaunchKernelExC(&config, kernel, arguments), "kdkernels: launching the row sweep");
}

}  // namespace

void row_loss(const RowProblem& p, const Plan& plan, void* stream) { sweep(p, plan, {}, stream); }

int64_t sparse_bytes(const RowProblem& p) { return is_resident(p.sparse) ? 0 : sparse_workspace_bytes(p.rows, p.sparse.k); }

void sparse_row_loss(const RowProblem& p, const Plan& plan, void* memory, void* stream) {
  if (p.rows == 0) return;
  const SparseWorkspace workspace = sparse_workspace(memory, p.rows, p.sparse.k);
  const auto s = static_cast<cudaStream_t>(stream);
  if (!is_resident(p.sparse)) sparse_prepare(p, workspace, s);
  if (p.sparse.whole)
    sweep(p, plan, workspace, stream);
  else if (has_gradient(p))
    write_gaps(p, workspace, s);
}

namespace {

// A block takes a run of rows; most often every factor is 1 and it leaves after one look at them.
template <class T>
__global__ void __launch_bounds__(256) scale_rows_kernel(const T* in, T* out, RowLayout layout, int64_t rows, int64_t width,
                                                         const float* factors, int64_t factor_stride, int rows_per_block) {
  const int64_t first = int64_t(blockIdx.x) * rows_per_block, last = min(rows, first + rows_per_block);
  if (in == out) {
    bool work = false;
    if (factor_stride == 0)
      work = factors[0] != 1;
    else
      for (int64_t row = first + threadIdx.x; row < last; row += blockDim.x) work |= factors[row * factor_stride] != 1;
    if (!__syncthreads_or(work)) return;
  }
  constexpr int G = kGroup<T>;
  for (int64_t row = first; row < last; row++) {
    const float factor = factors[row * factor_stride];
    if (factor == 1 && in == out) continue;
    const int64_t at = row_offset(layout, uint32_t(row));
    const T* from = in + at;
    T* to = out + at;
    const int phase = phase_of(from);
    const bool together = phase == phase_of(to);
    for (int64_t j = int64_t(threadIdx.x) * G - phase; j < width; j += int64_t(blockDim.x) * G) {
      if (together && j >= 0 && j + G <= width) {
        float x[G];
        widen(*reinterpret_cast<const uint4*>(from + j), x, T{});
#pragma unroll
        for (int i = 0; i < G; i++) x[i] *= factor;
        store(to + j, x);
      } else {
        for (int i = 0; i < G; i++)
          if (j + i >= 0 && j + i < width) to[j + i] = narrow<T>(float(from[j + i]) * factor);
      }
    }
  }
}

template <class T>
void scale_as(const void* in, void* out, const RowLayout& layout, int64_t rows, int64_t width, const float* factors,
              int64_t factor_stride, cudaStream_t stream) {
  const int64_t blocks = std::min<int64_t>(rows, int64_t(current_device().multiprocessors) * 16);
  const int per_block = int((rows + blocks - 1) / blocks);
  scale_rows_kernel<T><<<unsigned((rows + per_block - 1) / per_block), 256, 0, stream>>>(
      static_cast<const T*>(in), static_cast<T*>(out), layout, rows, width, factors, factor_stride, per_block);
  check(cudaGetLastError(), "kdkernels: launching scale_rows");
}

}  // namespace

void scale_rows(const void* in, void* out, DType dtype, const RowLayout& layout, int64_t rows, int64_t width,
                const float* factors, int64_t factor_stride, void* stream) {
  if (rows == 0 || width == 0) return;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::bfloat16: return scale_as<__nv_bfloat16>(in, out, layout, rows, width, factors, factor_stride, s);
    case DType::float16: return scale_as<__half>(in, out, layout, rows, width, factors, factor_stride, s);
    case DType::float32: return scale_as<float>(in, out, layout, rows, width, factors, factor_stride, s);
    default: throw std::invalid_argument("kdkernels: scale_rows on a GPU takes 32 and 16-bit floats");
  }
}

}  // namespace kdkernels::cuda
