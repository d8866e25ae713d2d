// The threshold of a row's strong set, found where the row lies: the k-th largest of the teacher's logits, or the largest
// threshold above which they hold a given mass.
//
// A radix select over the order-preserving integer image of a float. A window of kBins equal intervals of images is laid
// where the threshold is expected; one sweep of the teacher's row counts the columns of each interval in shared memory and
// adds up what lies above the window. The counts of all blocks then say whether the threshold lies above, below or in
// which interval, and an interval of a single image ends the search: for 16-bit logits most often at once, since a warp of
// its own (the scout) lays the first window by a sample of the row, one row ahead. Where it guessed wrong, or images are
// many (fp32), there is another round; what a round has shown is never lost, so that the search ends whatever the row.
//
// Masses are exact where that decides: an interval of a single image holds its count times that image's exponential. In
// wider ones they are estimates, which the next round confirms or refutes.
#pragma once
#include "sweep.cuh"

namespace kdkernels::cuda {

constexpr int kBins = 512;
constexpr int kScoutBins = 256;

// Floats in the order of unsigned integers.
__device__ __forceinline__ uint32_t image_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits ^ (uint32_t(int(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ float value_of(uint32_t image) {
  return __uint_as_float(image & 0x80000000u ? image ^ 0x80000000u : ~image);
}
// Bits of an image that a value widened from T leaves alike: zeros of a positive number, ones of a negative one.
template <class T>
constexpr int kSpareBits = 0;
template <>
constexpr int kSpareBits<__nv_bfloat16> = 16;
template <>
constexpr int kSpareBits<__half> = 13;
// The value whose image lies in [image, image + 2^spare), image a multiple of 2^spare.
template <class T>
__device__ __forceinline__ float value_at(uint32_t image) {
  return value_of(image & 0x80000000u ? image : image | ((1u << kSpareBits<T>)-1));
}
template <class T>
__device__ __forceinline__ uint32_t rounded_image(float x) {
  return image_of(x) >> kSpareBits<T> << kSpareBits<T>;
}
// Images of the numbers from -inf to +inf lie in [least, beyond).
template <class T>
constexpr uint32_t kLeastImage = 0x007fffffu >> kSpareBits<T> << kSpareBits<T>;
constexpr uint32_t kBeyondImages = 0xff800001u;

// kBins intervals of 2^shift images from `low` on.
struct Window {
  uint32_t low;
  int shift;
  float reference;  // masses are e^((y - reference)/T)

  template <class T>
  static __device__ Window over(uint32_t low, uint32_t end, float reference) {
    int shift = kSpareBits<T>;
    while (end - low > uint64_t(kBins) << shift) shift++;
    return {low, shift, reference};
  }
  __device__ uint32_t end() const {
    const uint64_t end = low + (uint64_t(kBins) << shift);
    return end < kBeyondImages ? uint32_t(end) : kBeyondImages;
  }
};

struct SelectMemory {
  alignas(16) uint32_t bins[kBins];  // of this block; all 0 between rounds
  uint32_t scout_bins[kScoutBins];
  Window scouted[2];  // of the rows in flight
  Window window;      // of the next round
  float threshold;    // NaN: another round
  float sums_of_blocks[2][4][ExchangeMemory::kMaxBlocks];
  uint64_t scout_full[2], scout_empty[2], sent[2];

  __device__ void init(int warps) {
    for (uint64_t& barrier : scout_full) barrier_init(shared_address(&barrier), 1);
    for (uint64_t& barrier : scout_empty) barrier_init(shared_address(&barrier), warps);
    for (uint64_t& barrier : sent) barrier_init(shared_address(&barrier), 1);
  }
};

// Dynamic shared memory that the exchange of counts takes: two rounds of all blocks.
constexpr int select_bytes(int blocks) { return 2 * blocks * kBins * int(sizeof(uint32_t)); }

__device__ __forceinline__ bool by_mass(const RowProblem& p) { return p.strong.id == StrongSetId::top_p; }

// ---- The first window, by a warp of its own.
template <class T>
class Scout {
  using Math = FloatMath;
  static constexpr int G = kGroup<T>, kVectors = 8;  // a lane's sample: as many pieces of 16 bytes

 public:
  __device__ Scout(const ClusterProblem& problem, SelectMemory* memory, int lane)
      : p_(problem.rows), temperature_(problem.temperature), amount_(problem.strong_amount), memory_(memory), lane_(lane) {}

  __device__ void serve(uint32_t first_row, uint32_t row_step) {
    for (int i = lane_; i < kScoutBins; i += 32) memory_->scout_bins[i] = 0;
    __syncwarp();
    int n = 0;
    for (uint32_t row = first_row; row < uint32_t(p_.rows); row += row_step, n++) {
      const int b = n & 1;
      barrier_wait(shared_address(&memory_->scout_empty[b]), (n >> 1 & 1) ^ 1);
      const bool counts = static_cast<const float*>(p_.row_scale)[row] != 0;
      if (counts) {
        const Window window = look(row);
        if (lane_ == 0) memory_->scouted[b] = window;
      }
      __syncwarp();
      if (lane_ == 0) barrier_arrive(shared_address(&memory_->scout_full[b]));
    }
  }

 private:
  __device__ Window look(uint32_t row) {
    const T* begin = row_begin<T>(p_.teacher, row);
    const int phase = phase_of(begin), columns = int(p_.vocab_size), groups = (columns - (G - phase) % G) / G;
    const T* aligned = begin + (G - phase) % G;
    const Window everything = Window::over<T>(kLeastImage<T>, kBeyondImages, 0);
    if (groups < 32) return everything;
    // Pieces spread evenly over the row.
    const int pieces = min(32 * kVectors, groups / 32 * 32), each = pieces / 32;
    uint4 sample[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; i++)
      if (i < each) {
        const int at = int(int64_t(i * 32 + lane_) * groups / pieces);
        sample[i] = __ldg(reinterpret_cast<const uint4*>(aligned + int64_t(at) * G));
      }
    float top = -__builtin_inff(), bottom = __builtin_inff();
    auto over_sample = [&](auto f) {
#pragma unroll
      for (int i = 0; i < kVectors; i++)
        if (i < each) {
          float y[G];
          widen(sample[i], y, T{});
#pragma unroll
          for (int j = 0; j < G; j++) f(y[j]);
        }
    };
    over_sample([&](float y) {
      top = fmaxf(top, y);
      if (y > -__builtin_inff()) bottom = fminf(bottom, y);
    });
    top = warp_max(top), bottom = -warp_max(-bottom);
    if (!isfinite(top) || !isfinite(bottom) || !(top > bottom)) return {everything.low, everything.shift, isfinite(top) ? top : 0};

    const bool mass = by_mass(p_);
    const float temperature = p_.temperatures ? static_cast<const float*>(p_.temperatures)[row] : temperature_;
    const float k = kLog2Ef / temperature, step = (kScoutBins - 1) / (top - bottom);
    float squares = 0;
    over_sample([&](float y) {
      const int bin = min(kScoutBins - 1, int((top - y) * step));
      const float weight = Math::exp2((y - top) * k);
      squares += weight * weight;
      if (y > -__builtin_inff()) atomicAdd(&memory_->scout_bins[bin], mass ? uint32_t(weight * 0x1p20f) : 1u);
    });
    __syncwarp();
    constexpr int each_bins = kScoutBins / 32;
    float held[each_bins], all = 0;
#pragma unroll
    for (int i = 0; i < each_bins; i++) {
      held[i] = float(memory_->scout_bins[lane_ * each_bins + i]);
      memory_->scout_bins[lane_ * each_bins + i] = 0;
      all += held[i];
    }
    float before = all;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const float from = __shfl_up_sync(kAllLanes, before, d);
      if (lane_ >= d) before += from;
    }
    const float total = __shfl_sync(kAllLanes, before, 31);
    before -= all;
    // Where the sample says that the row's threshold surely is not, below and above.
    float upper, lower;
    if (mass) {
      float v[1] = {squares};
      const float mean = total * 0x1p-20f, independent = mean * mean / warp_sums(v, lane_);
      const float doubt = 3 * sqrtf(amount_ * (1 - amount_) / independent) + 0.01f;
      upper = fminf(amount_ + doubt, 0.5f + 0.5f * amount_) * total;
      lower = independent > 64 ? (amount_ - doubt) * total : -1;
    } else {
      const float expected = amount_ * (pieces * G) / columns, doubt = 3 * sqrtf(expected) + 2;
      upper = expected + doubt, lower = expected - doubt;
    }
    int low_bin = kScoutBins, high_bin = -1;  // the last bin above which less than `upper` lies; … all under `lower`
#pragma unroll
    for (int i = 0; i < each_bins; i++) {
      before += held[i];
      if (before >= upper) low_bin = min(low_bin, lane_ * each_bins + i);
      if (before < lower) high_bin = lane_ * each_bins + i;
    }
    low_bin = __reduce_min_sync(kAllLanes, low_bin), high_bin = __reduce_max_sync(kAllLanes, high_bin);
    if (low_bin == kScoutBins) return {everything.low, everything.shift, top};
    const uint32_t low = max(rounded_image<T>(top - (low_bin + 1) / step), kLeastImage<T>);
    if (high_bin < 0) return {low, kSpareBits<T>, top};
    return Window::over<T>(low, rounded_image<T>(top - high_bin / step) + (1u << kSpareBits<T>), top);
  }

  const RowProblem& p_;
  const float temperature_, amount_;
  SelectMemory* memory_;
  const int lane_;
};

// ---- A round's decision, by the warp of totals: all blocks come to the same.
template <class T>
class SelectTotals {
  using Math = FloatMath;
  static constexpr int kEach = kBins / 32;

 public:
  __device__ SelectTotals(const ClusterProblem& problem, SelectMemory* memory, uint32_t* of_blocks, int blocks, int rank, int lane)
      : amount_(problem.strong_amount), mass_(by_mass(problem.rows)), memory_(memory), of_blocks_(of_blocks),
        blocks_(blocks), rank_(rank), lane_(lane) {}

  // `sums`, in lanes 0 and 8: what lies above the window (columns or mass), and the mass of all.
  __device__ void round(float sums, bool first, int buffer, float k) {
    if (first) window_ = memory_->scouted[buffer], least_ = kLeastImage<T>, beyond_ = kBeyondImages, rounds_ = 0;
    uint32_t counts[kEach];
    exchange(sums, counts);
    const float above = __shfl_sync(kAllLanes, sums, 0), all = __shfl_sync(kAllLanes, sums, 8);
    const float threshold = decide(counts, above, all, k);
    if (lane_ == 0) memory_->window = window_, memory_->threshold = threshold;
  }

 private:
  // Lane l has bins l·kEach and on. Both become those of all blocks.
  __device__ void exchange(float& sums, uint32_t (&counts)[kEach]) {
    uint4* mine = reinterpret_cast<uint4*>(memory_->bins) + lane_ * (kEach / 4);
#pragma unroll
    for (int i = 0; i < kEach / 4; i++) {
      const uint4 four = mine[i];
      counts[4 * i] = four.x, counts[4 * i + 1] = four.y, counts[4 * i + 2] = four.z, counts[4 * i + 3] = four.w;
      mine[i] = make_uint4(0, 0, 0, 0);
    }
    if (blocks_ == 1) return;
    const int b = count_ & 1;
    const uint32_t barrier = shared_address(&memory_->sent[b]);
    const uint32_t bins = shared_address(of_blocks_ + (b * blocks_ + rank_) * kBins + lane_ * kEach);
    const uint32_t sum = shared_address(&memory_->sums_of_blocks[b][lane_ / 8][rank_]);
    for (int block = 0; block < blocks_; block++) {
      const uint32_t to = address_in(bins, block), there = address_in(barrier, block);
#pragma unroll
      for (int i = 0; i < kEach; i += 4)
        store_remote(to + i * 4, make_uint4(counts[i], counts[i + 1], counts[i + 2], counts[i + 3]), there);
      if (lane_ % 8 == 0) store_remote(address_in(sum, block), sums, there);
    }
    if (lane_ == 0) barrier_arrive_expecting(barrier, blocks_ * (kBins + 4) * 4);
    barrier_wait_cluster(barrier, count_ >> 1 & 1);
    count_++;
#pragma unroll
    for (int i = 0; i < kEach; i++) counts[i] = 0;
    for (int block = 0; block < blocks_; block++) {
      const uint4* theirs = reinterpret_cast<const uint4*>(of_blocks_ + (b * blocks_ + block) * kBins) + lane_ * (kEach / 4);
#pragma unroll
      for (int i = 0; i < kEach / 4; i++) {
        const uint4 four = theirs[i];
        counts[4 * i] += four.x, counts[4 * i + 1] += four.y, counts[4 * i + 2] += four.z, counts[4 * i + 3] += four.w;
      }
    }
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = lane_ < blocks_ ? memory_->sums_of_blocks[b][i][lane_] : 0;
    sums = warp_sums(v, lane_);
  }

  // The threshold; or NaN, and the window of another round.
  __device__ float decide(const uint32_t (&counts)[kEach], float above, float all, float k) {
    const float none = -__builtin_inff(), again = __builtin_nanf("");
    if (mass_ && !(all > 0 && all < __builtin_inff())) {  // the reference is far off; NaN: the row is
      if (all != all || rounds_++ > kMostRounds) return none;
      window_.reference += (all > 0 ? 64 : -64) / k;
      return again;
    }
    const float target = mass_ ? amount_ * all : amount_;
    float held[kEach], mine = 0;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      held[i] = float(counts[i]);
      if (mass_ && counts[i]) {
        const uint32_t begin = window_.low + (uint32_t(lane_ * kEach + i) << window_.shift);
        float value = value_at<T>(begin);
        if (window_.shift > kSpareBits<T>) value = 0.5f * value + 0.5f * value_of(begin + ((1u << window_.shift) - 1));
        held[i] *= Math::exp2((value - window_.reference) * k);
      }
      mine += held[i];
    }
    float over = mine;  // what lies in this lane's bins and all above
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const float from = __shfl_down_sync(kAllLanes, over, d);
      if (lane_ + d < 32) over += from;
    }
    over += above - mine;
    int bin = -1;
#pragma unroll
    for (int i = kEach - 1; i >= 0; i--) {
      over += held[i];
      if (bin < 0 && over >= target) bin = lane_ * kEach + i;
    }
    bin = __reduce_max_sync(kAllLanes, bin);
    if (rounds_++ > kMostRounds) return none;
    if (above >= target) {
      least_ = window_.end();
    } else if (bin < 0) {
      beyond_ = window_.low;
    } else {
      const uint32_t begin = window_.low + (uint32_t(bin) << window_.shift);
      const uint32_t end = uint32_t(min(uint64_t(begin) + (uint64_t(1) << window_.shift), uint64_t(kBeyondImages)));
      if (window_.shift == kSpareBits<T>) return value_at<T>(begin);
      if (mass_) {  // by an estimate: known is the window alone
        least_ = max(least_, window_.low), beyond_ = min(beyond_, window_.end());
        window_ = Window::over<T>(max(begin, least_), min(end, beyond_), window_.reference);
        return again;
      }
      least_ = max(least_, begin), beyond_ = min(beyond_, end);
    }
    if (least_ >= beyond_) return none;  // rounding: not even everything holds the mass asked for
    window_ = Window::over<T>(least_, beyond_, window_.reference);
    return again;
  }

  static constexpr int kMostRounds = 4096;
  const float amount_;
  const bool mass_;
  SelectMemory* memory_;
  uint32_t* of_blocks_;  // (2, blocks, kBins)
  const int blocks_, rank_, lane_;
  int count_ = 0, rounds_ = 0;
  Window window_{};
  uint32_t least_ = 0, beyond_ = 0;  // the threshold's image lies in [least, beyond)
};

}  // namespace kdkernels::cuda
