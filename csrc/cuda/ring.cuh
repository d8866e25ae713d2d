// A ring of shared-memory slots, each a piece of both models' rows (or, of a sparse teacher, of the student's alone), filled
// by one producer thread with bulk asynchronous copies and emptied by the consumer warps. The producer runs ahead into the next row while consumers work on this one.
//
// A row is seen from the 16-byte boundary at or before its first column: `phase` columns lie before it, and a block's
// share is counted from there, so that rows of any width are copied and stored 16 bytes at a time.
#pragma once
#include "../rows.h"
#include "gradient.cuh"
#include "ptx.cuh"
#include "sparse.h"

namespace kdkernels::cuda {

constexpr int kMaxSlots = 32;

// A RowProblem and how it is laid over clusters; see plan() in rows.cu.
struct ClusterProblem {
  RowProblem rows;
  const void *student_end, *teacher_end;  // one past the last element that may be read
  int share;                              // columns of a block, a multiple of the group
  int slot_columns, slots;
  // The problem's doubles as the kernel computes with them.
  float kd_weight, ce_weight, temperature, parameters[4], strong_amount;
  bool with_ce, reads_labels, scale_by_temperature, scale_gradient;
  int ahead;  // rows that the ring holds beside the one at hand
  bool short_forms;  // those of far.h will do: the gradient is rounded to 16 bits
  SparseWorkspace sparse;
};

// Row numbers fit 32 bits here, and dividing by 32-bit numbers is what a GPU can afford.
__device__ __forceinline__ int64_t row_offset(const RowLayout& rows, uint32_t row) {
  int64_t at = 0;
#pragma unroll
  for (int i = RowLayout::max_dims - 1; i > 0; i--)
    if (i < rows.dims) {
      const uint32_t size = uint32_t(rows.size[i]);
      at += int64_t(row % size) * rows.stride[i];
      row /= size;
    }
  return rows.dims ? at + int64_t(row) * rows.stride[0] : 0;
}

template <class T>
__device__ __forceinline__ const T* row_begin(const Logits& logits, uint32_t row) {
  return static_cast<const T*>(logits.data) + row_offset(logits.rows, row);
}

// A row's own numbers, with the first of its slots. A row takes at least one, also where it is skipped.
struct RowHeader {
  float scale, temperature, log2e_over_temperature;
  int label;            // -1: out of range
  int phase;            // columns between the 16-byte boundary and the row
  int columns, chunks;  // of this block's share, and the slots they take
  int64_t gradient;     // offset of its gradient
};

// Kept in a register instead of computed anew at each use.
__device__ __forceinline__ uint32_t kept(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <class T, int Models = 2>
struct Ring {
  uint32_t slots;        // (count, Models, slot_columns) of T: student, teacher; then, of a mask, (count, slot_columns) bytes
  RowHeader* headers;    // one a slot
  uint32_t full, empty;  // barriers, one a slot
  int slot_columns, count;

  __device__ uint32_t half_bytes() const { return slot_columns * uint32_t(sizeof(T)); }
  __device__ uint32_t student(int slot) const { return slots + slot * Models * half_bytes(); }
  __device__ uint32_t teacher(int slot) const { return student(slot) + half_bytes(); }
  __device__ uint32_t mask(int slot) const { return student(count) + slot * slot_columns; }
  __device__ uint32_t full_barrier(int slot) const { return full + slot * 8; }
  __device__ uint32_t empty_barrier(int slot) const { return empty + slot * 8; }

  // The bytes of n columns from `from` on that a bulk copy may take; the rest is copied one by one.
  static __device__ uint32_t bulk_bytes(const T* from, int n, const void* end) {
    const int64_t wanted = int64_t(n) * sizeof(T);
    const int64_t there = reinterpret_cast<const char*>(end) - reinterpret_cast<const char*>(from);
    return uint32_t(wanted <= there ? wanted : there / 16 * 16);
  }
  static __device__ void copy_rest(uint32_t to, const T* from, uint32_t bulk, const void* end) {
    for (int i = int(bulk / sizeof(T)); from + i < end; i++)
      *reinterpret_cast<T*>(__cvta_shared_to_generic(to + i * sizeof(T))) = from[i];
    async_proxy_fence();
  }

  __device__ RowHeader header(const ClusterProblem& problem, uint32_t row, int begin) const {
    const RowProblem& p = problem.rows;
    RowHeader h{};
    if (row >= uint32_t(p.rows)) return h;
    h.scale = static_cast<const float*>(p.row_scale)[row];
    h.temperature = p.temperatures ? static_cast<const float*>(p.temperatures)[row] : problem.temperature;
    if (problem.reads_labels) {
      const int64_t label = p.labels[row];
      h.label = label >= 0 && label < p.vocab_size ? int(label) : -1;
    }
    h.log2e_over_temperature = 1.44269504f / h.temperature;
    h.phase = phase_of(row_begin<T>(p.student, row));
    h.columns = h.scale == 0 ? 0 : max(0, min(problem.share, h.phase + int(p.vocab_size) - begin));
    h.chunks = max(1, (h.columns + slot_columns - 1) / slot_columns);
    h.gradient = row_offset(p.gradient_rows, row);
    return h;
  }

  // By one thread: both rows' columns from `begin` on, of this block's share, of every row.
  template <bool Masked>
  __device__ void produce(const ClusterProblem& problem, uint32_t first_row, uint32_t row_step, int begin) const {
    const RowProblem& p = problem.rows;
    const uint32_t rows = uint32_t(p.rows);
    int slot = 0;
    uint32_t parity = 1;
    RowHeader next = header(problem, first_row, begin);
    for (uint32_t row = first_row; row < rows; row += row_step) {
      const RowHeader h = next;
      next = header(problem, row + row_step, begin);  // on its way while this row is copied
      const int end = begin + h.columns;
      const T* student_row = row_begin<T>(p.student, row) - h.phase;
      const T* teacher_row = Models == 2 ? row_begin<T>(p.teacher, row) - h.phase : nullptr;
      const uint8_t* mask_row = Masked ? p.strong.mask + row_offset(p.strong.mask_rows, row) : nullptr;
      int at = begin;
      do {
        const int n = max(0, (min(slot_columns, end - at) + kGroup<T> - 1) / kGroup<T> * kGroup<T>);
        const T *from_student = student_row + at, *from_teacher = teacher_row + at;
        const uint32_t bytes = n * uint32_t(sizeof(T));
        const uint32_t student_bytes = n ? bulk_bytes(from_student, n, problem.student_end) : 0;
        const uint32_t teacher_bytes = n && Models == 2 ? bulk_bytes(from_teacher, n, problem.teacher_end) : 0;
        barrier_wait(empty_barrier(slot), parity);
        if (at == begin) headers[slot] = h;
        if (student_bytes < bytes) copy_rest(student(slot), from_student, student_bytes, problem.student_end);
        if (Models == 2 && teacher_bytes < bytes) copy_rest(teacher(slot), from_teacher, teacher_bytes, problem.teacher_end);
        const uint32_t mask_bytes = Masked ? (n + 15) / 16 * 16 : 0;  // a masked row has no phase: why_not_rows
        barrier_arrive_expecting(full_barrier(slot), student_bytes + teacher_bytes + mask_bytes);
        if (mask_bytes) bulk_load(mask(slot), mask_row + at, mask_bytes, full_barrier(slot));
        if (student_bytes) bulk_load(student(slot), from_student, student_bytes, full_barrier(slot));
        if (teacher_bytes) bulk_load(teacher(slot), from_teacher, teacher_bytes, full_barrier(slot));
        if (++slot == count) slot = 0, parity ^= 1;
      } while ((at += slot_columns) < end);
    }
  }
};

}  // namespace kdkernels::cuda
