// A ring of shared-memory slots, each a piece of both models' rows, filled by one producer thread with bulk asynchronous
// copies and emptied by the consumer warps. The producer runs ahead into the next row while consumers work on this one.
//
// A row is seen from the 16-byte boundary at or before its first column: `phase` columns lie before it, and a block's
// share is counted from there, so that rows of any width are copied and stored 16 bytes at a time.
#pragma once
#include "../rows.h"
#include "group.cuh"
#include "ptx.cuh"

namespace kdkernels::cuda {

constexpr int kMaxSlots = 32;

// A RowProblem and how it is laid over clusters; see plan() in rows.cu.
struct ClusterProblem {
  RowProblem rows;
  const void *student_end, *teacher_end;  // one past the last element that may be read
  int share;                              // columns of a block, a multiple of the group
  int slot_columns, slots;
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

template <class T>
__device__ __forceinline__ int phase_of(const T* row) {
  return int(reinterpret_cast<uintptr_t>(row) / sizeof(T)) & (kGroup<T> - 1);
}

template <class T>
struct Ring {
  T* slots;              // (count, 2, slot_columns): student, teacher
  uint32_t full, empty;  // barriers, one a slot
  int slot_columns, count;

  __device__ T* student(int slot) const { return slots + size_t(slot) * 2 * slot_columns; }
  __device__ T* teacher(int slot) const { return student(slot) + slot_columns; }
  __device__ uint32_t full_barrier(int slot) const { return full + slot * 8; }
  __device__ uint32_t empty_barrier(int slot) const { return empty + slot * 8; }

  // The bytes of n columns from `from` on that a bulk copy may take; the rest is copied one by one.
  static __device__ uint32_t bulk_bytes(const T* from, int n, const void* end) {
    const int64_t wanted = int64_t(n) * sizeof(T);
    const int64_t there = reinterpret_cast<const char*>(end) - reinterpret_cast<const char*>(from);
    return uint32_t(wanted <= there ? wanted : there / 16 * 16);
  }
  static __device__ void copy_rest(T* to, const T* from, uint32_t bulk, const void* end) {
    for (int i = int(bulk / sizeof(T)); from + i < end; i++) to[i] = from[i];
    async_proxy_fence();
  }

  // By one thread: both rows' columns [begin, begin + columns) of every row that counts.
  __device__ void produce(const ClusterProblem& problem, uint32_t first_row, uint32_t row_step, int begin) const {
    const RowProblem& p = problem.rows;
    const float* scales = static_cast<const float*>(p.row_scale);
    const uint32_t rows = uint32_t(p.rows);
    int slot = 0;
    uint32_t parity = 1;
    float next_scale = first_row < rows ? scales[first_row] : 0;
    for (uint32_t row = first_row; row < rows; row += row_step) {
      const float scale = next_scale;
      next_scale = row + row_step < rows ? scales[row + row_step] : 0;
      if (scale == 0) continue;
      const T *student_row = row_begin<T>(p.student, row), *teacher_row = row_begin<T>(p.teacher, row);
      const int phase = phase_of(student_row);
      const int end = min(begin + problem.share, phase + int(p.vocab_size));
      for (int at = begin; at < end; at += slot_columns) {
        const int n = (min(slot_columns, end - at) + kGroup<T> - 1) / kGroup<T> * kGroup<T>;
        const T *from_student = student_row + (at - phase), *from_teacher = teacher_row + (at - phase);
        const uint32_t student_bytes = bulk_bytes(from_student, n, problem.student_end);
        const uint32_t teacher_bytes = bulk_bytes(from_teacher, n, problem.teacher_end);
        barrier_wait(empty_barrier(slot), parity);
        if (student_bytes < n * sizeof(T)) copy_rest(student(slot), from_student, student_bytes, problem.student_end);
        if (teacher_bytes < n * sizeof(T)) copy_rest(teacher(slot), from_teacher, teacher_bytes, problem.teacher_end);
        barrier_arrive_expecting(full_barrier(slot), student_bytes + teacher_bytes);
        if (student_bytes) bulk_load(shared_address(student(slot)), from_student, student_bytes, full_barrier(slot));
        if (teacher_bytes) bulk_load(shared_address(teacher(slot)), from_teacher, teacher_bytes, full_barrier(slot));
        if (++slot == count) slot = 0, parity ^= 1;
      }
    }
  }
};

}  // namespace kdkernels::cuda
