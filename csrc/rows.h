// The problem every backend solves: N independent rows of logits of two models in, a loss per row out, and the
// gradient of the student's logits where it is asked for. Plain pointers and strides; knows nothing of Python or torch.
#pragma once
#include <cstdint>

#include "divergence/inline.h"

namespace kdkernels {

enum class DType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

// Always inlined, as every function here: several instruction sets include this header, and the linker keeps one copy.
KD_INLINE int64_t bytes_per_element(DType dtype) {
  switch (dtype) {
    case DType::float64: return 8;
    case DType::float32: return 4;
    default: return 2;
  }
}

enum class DivergenceId : int32_t {
  forward_kl = 0,
  reverse_kl = 1,
  symmetric_kl = 2,
  jensen_shannon = 3,
  skew_forward_kl = 4,
  skew_reverse_kl = 5,
  total_variation = 6,
  alpha_beta = 7,
  decoupled = 8,    // these two split the vocabulary by a StrongSet
  adaptive_kl = 9,
};

// How a row's strong set S is chosen from the teacher's transformed logits; the rest is the weak set W.
enum class StrongSetId : int32_t {
  none = 0,
  label = 1,  // the row's label alone
  top_k = 2,  // logits >= the amount-th largest: ties enter as a whole
  top_p = 3,  // the smallest {logit >= threshold} with amount of the teacher's mass; all from amount = 1 on
  given = 4,  // the mask's
};

// The leading dimensions of a (..., V) tensor whose last one is contiguous; strides in elements. Row numbers count
// in row-major order, so that a shifted view such as logits[:, :-1] is read where it lies.
struct RowLayout {
  static constexpr int max_dims = 4;
  int dims = 0;
  int64_t size[max_dims] = {};
  int64_t stride[max_dims] = {};

  KD_INLINE int64_t offset(int64_t row) const {
    int64_t at = 0;
    for (int i = dims - 1; i > 0; i--) {
      at += row % size[i] * stride[i];
      row /= size[i];
    }
    return dims ? at + row * stride[0] : 0;
  }
};

// Applied to a model's logits before the temperature: x = logit_scale·z, then softcap·tanh(x / softcap) if softcap > 0.
struct Transform {
  double logit_scale = 1;
  double softcap = 0;
  KD_INLINE bool identity() const { return logit_scale == 1 && !(softcap > 0); }
};

struct Logits {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t width = 0;  // columns in memory; those from vocab_size on are padding
  RowLayout rows;
  Transform transform;
};

struct StrongSet {
  StrongSetId id = StrongSetId::none;
  double amount = 0;
  const uint8_t* mask = nullptr;  // one byte a column, 0 or 1
  RowLayout mask_rows;            // strides may be 0
};

// What becomes of the probability that a sparse teacher does not tell; kdkernels/teachers.py defines each.
enum class Tail : int32_t { none = 0, bucket = 1, renormalize = 2, teacher = 3, drop = 4 };

// A teacher by the log-probabilities of k tokens a row. An id < 0 names no token; of one that comes again in its row,
// the first counts; a row with an id >= vocab_size is NaN.
struct SparseTeacher {
  Tail tail = Tail::none;  // none: the teacher is one of logits
  bool whole = true;       // false: of the vocabulary only the ids matter (renormalize, without cross-entropy)
  const void* ids = nullptr;  // (rows, k)
  bool ids_are_64_bit = false;
  const void* logprobs = nullptr;  // (rows, k)
  DType logprobs_dtype = DType::float32;
  int64_t k = 0;
  int64_t ids_stride = 0, logprobs_stride = 0;  // elements from row to row
  double scale = 1;                             // the temperature of the log-probabilities: times it, they are logits
};

// row = kd_weight·T²·D(p, q) + ce_weight·CE(label), times row_scale.
struct RowProblem {
  Logits student, teacher;
  SparseTeacher sparse;          // in the place of teacher, which then is empty
  int64_t rows = 0;
  int64_t vocab_size = 0;
  int32_t divergence = 0;        // a DivergenceId
  double parameters[4] = {};     // the divergence's own; decoupled: bcd, scd, wcd, whether masses weight them (1 or 0)
  StrongSet strong;
  double kd_weight = 1;
  double ce_weight = 0;          // > 0 needs labels
  bool scale_by_temperature = true;
  double temperature = 1;
  const int64_t* labels = nullptr;  // one per row, where they are read; outside [0, vocab_size): the row is NaN
  bool scale_gradient = true;       // false: row_scale multiplies the loss alone (the caller scales the gradient)
  DType gradient_dtype = DType::float32;  // the student's; on a GPU, bfloat16 or float16 too where that is float32

  // Numbers per row are double where the student is float64, else float.
  const void* temperatures = nullptr;  // (rows), replaces temperature; may be null
  const void* row_scale = nullptr;     // (rows); a row with 0 is not read, its loss and gradient are 0
  const void* weights = nullptr;       // (3), replaces decoupled's bcd, scd, wcd; may be null
  void* loss = nullptr;                // (rows)
  // (4, rows): student lse, teacher lse, divergence, cross-entropy; decoupled (9, rows): also BCD, SCD, WCD, the
  // teacher's and the student's mass of S; sparse (7, rows): also those masses of the ids, and whether (1 or 0) the
  // student's largest logit is at the teacher's most likely id. Not whole: NaN where the other tokens are needed.
  void* stats = nullptr;
  void* gradient = nullptr;  // null: none wanted. May be the student's own memory, if it has the student's dtype
  RowLayout gradient_rows;

  KD_INLINE bool with_ce() const { return ce_weight != 0; }
  KD_INLINE bool reads_labels() const { return with_ce() || strong.id == StrongSetId::label; }
};

}  // namespace kdkernels
