#include "rows.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace kdkernels::cpu {
namespace {

struct Choice {
  std::string name;
  CpuKernels kernels;
};

std::vector<Choice> choices() {
  std::vector<Choice> all = {{"baseline", baseline_kernels()}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    all.push_back({"avx2", avx2_kernels()});
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    all.push_back({"avx512", avx512_kernels()});
#endif
  return all;
}

Choice choice() {
  static const std::vector<Choice> all = choices();
  const char* wanted = std::getenv("KDKERNELS_CPU_CAPABILITY");
  if (!wanted || !*wanted) return all.back();
  std::string runs;
  for (const Choice& c : all) {
    if (c.name == wanted) return c;
    runs += (runs.empty() ? "" : ", ") + c.name;
  }
  throw std::runtime_error(std::string("KDKERNELS_CPU_CAPABILITY is '") + wanted + "'; this processor runs " + runs);
}

// f(begin, end) over [0, n) in pieces, on up to `threads` threads.
template <class F>
void parallel(int64_t n, int64_t piece, int threads, F f) {
  const int64_t pieces = (n + piece - 1) / piece;
  if (threads > pieces) threads = int(pieces);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < pieces; i++) f(i * piece, n < (i + 1) * piece ? n : (i + 1) * piece);
}

constexpr int64_t kColumnsPerId = 32;  // that take about as long

// Rows a thread takes at a time: enough columns to be worth the handing out.
int64_t rows_per_piece(int64_t width) { return width > 16384 ? 1 : (16384 + width) / (width + 1); }

}  // namespace

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const Choice& c : choices()) names.push_back(c.name);
  return names;
}

std::string capability() { return choice().name; }

void row_loss(const RowProblem& problem, int threads) {
  const CpuKernels kernels = choice().kernels;
  const int64_t ids = problem.sparse.tail == Tail::none ? 0 : problem.sparse.k;
  parallel(problem.rows, rows_per_piece(problem.vocab_size + kColumnsPerId * ids), threads,
           [&](int64_t begin, int64_t end) { kernels.sweep(problem, begin, end); });
}

void scale_rows(const void* in, void* out, DType dtype, const RowLayout& layout, int64_t rows, int64_t width,
                const void* factors, int threads) {
  const CpuKernels kernels = choice().kernels;
  const int64_t bytes = bytes_per_element(dtype);
  auto factor = [&](int64_t row) {
    return dtype == DType::float64 ? static_cast<const double*>(factors)[row]
                                   : double(static_cast<const float*>(factors)[row]);
  };
  bool all_one = in == out;
  for (int64_t row = 0; row < rows && all_one; row++) all_one = factor(row) == 1;
  if (all_one) return;
  parallel(rows, rows_per_piece(width), threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const double by = factor(row);
      const char* from = static_cast<const char*>(in) + layout.offset(row) * bytes;
      char* to = static_cast<char*>(out) + layout.offset(row) * bytes;
      if (by != 1)
        kernels.scale(from, to, dtype, width, by);
      else if (in != out)
        std::memcpy(to, from, size_t(width * bytes));
    }
  });
}

void back_with_huge_pages(void* data, int64_t bytes, int threads) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096, huge_page = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / page * page;
  if (end < begin + 2 * huge_page || madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) != 0) return;
#if defined(MADV_POPULATE_WRITE)
  const uintptr_t first = begin / huge_page * huge_page;
  parallel(int64_t((end - first + huge_page - 1) / huge_page), 4, threads, [&](int64_t from, int64_t to) {
    uintptr_t low = first + uintptr_t(from) * huge_page, high = first + uintptr_t(to) * huge_page;
    low = low < begin ? begin : low;
    high = high > end ? end : high;
    madvise(reinterpret_cast<void*>(low), high - low, MADV_POPULATE_WRITE);
  });
#else
  (void)threads;
#endif
#else
  (void)data, (void)bytes, (void)threads;
#endif
}

}  // namespace kdkernels::cpu
