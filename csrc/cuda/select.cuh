// The threshold of a row's strong set, found where the row lies: the k-th largest of the teacher's logits, or the largest
// threshold above which they hold a given mass.
//
// The search goes over the order-preserving integer images of floats. A round is one sweep of the teacher's row against a
// window: columns are counted by image in its exact part, kExact images from `low` on; by equal intervals of values in its
// coarse part, further up; and what lies above the exact part is added up. The counts of all blocks then name the
// threshold, or show where it lies: an exact count times the image's exponential is its mass, so that the decision is
// exact; the coarse counts, whose masses are estimates, only say where to look next. The first window is laid by a sample
// of the row, some rows ahead, by a warp of its own; for 16-bit logits it most often holds the threshold. What a round has
// shown is never lost, and where guesses fail the known interval is halved, so that the search ends whatever the row.
//
// For the few largest of fp32 logits, whose images are too many to count, the first round lists what lies in its window
// instead: every block's list goes to all, and each finds the threshold in them by halving. Where a list is too short, a
// round of counts comes next.
#pragma once
#include "sweep.cuh"

namespace kdkernels::cuda {

constexpr int kBins = 256;
constexpr int kScoutBins = 128;
constexpr int kScouted = 4;  // rows that the scout may be ahead of the consumers

// Floats in the order of unsigned integers; both zeros have one.
__device__ __forceinline__ uint32_t image_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
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
// Bins of either part of a window. Of fp32 logits, the coarse part finds the threshold: their images are many.
template <class T>
constexpr int kExact = kSpareBits<T> ? 128 : 32;
template <class T>
constexpr int kCoarse = kBins - kExact<T>;
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

template <class T>
struct Window {
  uint32_t low;      // an image, of no spare bits
  float coarse;      // where the coarse part begins: at the end of the exact part, or above
  float inv_width;   // of its intervals; the last one has no end
  float reference;   // masses are e^((y - reference)/T); NaN: the largest logit, which is to be found

  static __device__ Window at(uint32_t low, float coarse, float width, float reference) {
    Window w{low, coarse, width > 0 ? 1 / width : 0, reference};
    w.coarse = w.bounded() ? fmaxf(coarse, w.middle()) : __builtin_inff();
    return w;
  }
  // Whether numbers lie above the exact part, and from which value on.
  __device__ bool bounded() const { return low < kBeyondImages - (uint32_t(kExact<T>) << kSpareBits<T>); }
  __device__ uint32_t middle_image() const { return low + (uint32_t(kExact<T>) << kSpareBits<T>); }
  // Of a value in the coarse part. Rounding and all, larger values have no smaller interval.
  static __device__ __forceinline__ int interval(float y, float coarse, float inv_width) {
    return min(kCoarse<T> - 1, int((y - coarse) * inv_width));
  }
  // The least value of an interval but the first, by a whole warp; NaN where rounding has put it further off than this
  // looks, as it may in a far-off window.
  __device__ float begin_of(int n, int lane) const {
    const uint32_t first = image_of(coarse + n / inv_width) - 16;
    const uint32_t within = __ballot_sync(0xffffffffu, interval(value_of(first + lane), coarse, inv_width) >= n);
    return within == 0 || within & 1 ? __builtin_nanf("") : value_of(first + __ffs(within) - 1);
  }
  __device__ float middle() const { return bounded() ? value_at<T>(middle_image()) : __builtin_nanf(""); }
};

// What is known of a row's threshold between rounds: its image lies in [least, beyond).
template <class T>
struct Search {
  Window<T> window;
  uint32_t least, beyond;
  int rounds;
};

constexpr int kListed = 128;  // images that a block lists at most, in the place of its bins

// Whether a row's first round lists: the scout's window holds some ten times as many as are asked for.
template <class T>
__device__ __forceinline__ bool lists(float amount, int blocks) {
  return kSpareBits<T> == 0 && amount <= 16 * blocks;
}

template <class T>
struct SelectMemory {
  alignas(16) uint32_t bins[kBins];  // of this block; all 0 between rounds
  uint32_t scout_bins[kScoutBins];
  Window<T> scouted[kScouted];
  Search<T> searches[2];  // of the rows in flight
  float threshold[2];     // NaN: another round
  float sums_of_blocks[2][4][ExchangeMemory::kMaxBlocks];
  uint64_t sent[2];
  uint32_t listed;  // 0 between rounds: how many should be in this block's list

  __device__ void init() {
    if constexpr (kSpareBits<T> == 0) listed = 0;
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
  // A lane's sample: as many pieces of 16 bytes.
  static constexpr int G = kGroup<T>, kVectors = kSpareBits<T> ? 4 : 8;

 public:
  __device__ Scout(const ClusterProblem& problem, SelectMemory<T>* memory, int lane)
      : p_(problem.rows), temperature_(problem.temperature), amount_(problem.strong_amount), memory_(memory), lane_(lane) {}

  // Ahead of the consumers, which say when they have `used` what was `prepared`.
  __device__ void serve(uint64_t (&prepared)[kScouted], uint64_t (&used)[kScouted], uint32_t first_row, uint32_t row_step) {
    for (int i = lane_; i < kScoutBins; i += 32) memory_->scout_bins[i] = 0;
    __syncwarp();
    int n = 0;
    for (uint32_t row = first_row; row < uint32_t(p_.rows); row += row_step, n++) {
      const int b = n % kScouted;
      barrier_wait(shared_address(&used[b]), (n / kScouted & 1) ^ 1);
      if (static_cast<const float*>(p_.row_scale)[row] != 0) {
        const Window<T> window = look(row);
        if (lane_ == 0) memory_->scouted[b] = window;
      }
      __syncwarp();
      if (lane_ == 0) barrier_arrive(shared_address(&prepared[b]));
    }
  }

 private:
  __device__ Window<T> look(uint32_t row) {
    const T* begin = row_begin<T>(p_.teacher, row);
    const int phase = phase_of(begin), columns = int(p_.vocab_size), skip = (G - phase) % G, groups = (columns - skip) / G;
    // Pieces of 16 bytes, spread evenly over the row; the whole row where it is short.
    const bool whole = groups < 32;
    const int pieces = whole ? (columns + G - 1) / G : min(32 * kVectors, groups / 32 * 32), each = (pieces + 31) / 32;
    float sample[kVectors][G];
#pragma unroll
    for (int i = 0; i < kVectors; i++)
      if (i < each) {
        if (whole) {
#pragma unroll
          for (int j = 0; j < G; j++) {
            const int at = (i * 32 + lane_) * G + j;
            sample[i][j] = at < columns ? float(begin[at]) : -__builtin_inff();
          }
        } else {
          const int at = int(int64_t(i * 32 + lane_) * groups / pieces);
          widen(__ldg(reinterpret_cast<const uint4*>(begin + skip + int64_t(at) * G)), sample[i], T{});
        }
      }
    auto over_sample = [&](auto f) {
#pragma unroll
      for (int i = 0; i < kVectors; i++)
        if (i < each)
#pragma unroll
          for (int j = 0; j < G; j++) f(sample[i][j]);
    };
    float top = -__builtin_inff(), bottom = top;
    over_sample([&](float y) {
      top = fmaxf(top, y);
      if (y > -__builtin_inff()) bottom = fmaxf(bottom, -y);
    });
    top = warp_max(top), bottom = -warp_max(bottom);
    const bool mass = by_mass(p_);
    const float temperature = p_.temperatures ? static_cast<const float*>(p_.temperatures)[row] : temperature_;
    const float k = kLog2Ef / temperature, width = temperature * 0.25f;
    if (!isfinite(top) || !isfinite(bottom)) return Window<T>::at(kLeastImage<T>, -__builtin_inff(), 1, __builtin_nanf(""));
    if (!(top > bottom)) return Window<T>::at(rounded_image<T>(top), top, width, top);

    const float step = (kScoutBins - 1) / (top - bottom);
    float squares = 0;
    over_sample([&](float y) {
      if (!(y > -__builtin_inff())) return;
      const int bin = min(kScoutBins - 1, int((top - y) * step));
      const float weight = Math::exp2((y - top) * k);
      squares += weight * weight;
      atomicAdd(&memory_->scout_bins[bin], mass ? uint32_t(weight * 0x1p20f) : 1u);
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
    // The threshold is not likely to lie below where the sample holds this much.
    float enough;
    if (mass) {
      float v[1] = {squares};
      const float mean = total * 0x1p-20f, independent = mean * mean / warp_sums(v, lane_);
      const float doubt = 3 * sqrtf(amount_ * (1 - amount_) / independent) + 0.01f;
      enough = fminf(amount_ + doubt, 0.5f + 0.5f * amount_) * total;
    } else {
      const float expected = amount_ * (whole ? 1 : float(pieces * G) / columns);
      // A second round costs 16-bit logits more than a wide window does; what lies in that of others is listed.
      enough = expected + (whole ? 0 : kSpareBits<T> ? 3 * sqrtf(expected) + 2 : 2 * sqrtf(expected) + 1);
    }
    int low_bin = kScoutBins;
#pragma unroll
    for (int i = 0; i < each_bins; i++) {
      before += held[i];
      if (before >= enough) low_bin = min(low_bin, lane_ * each_bins + i);
    }
    low_bin = __reduce_min_sync(kAllLanes, low_bin);
    const float low = low_bin == kScoutBins ? bottom : top - (low_bin + 1) / step;
    if constexpr (kSpareBits<T> == 0)
      if (!mass) {
        // So many images lie between that values must do: from `low` to where the sample's tail, taken for an exponential
        // one, would have half of what is asked for.
        const float share = whole ? 1 : float(pieces * G) / columns, tail = (top - low) / logf(fmaxf(2, enough));
        const float upper = top + tail * fmaxf(0, 0.7f - logf(fmaxf(amount_ * share, 1e-6f)));
        return Window<T>::at(max(rounded_image<T>(low), kLeastImage<T>), -__builtin_inff(), (upper - low) / kCoarse<T>, top);
      }
    return Window<T>::at(max(rounded_image<T>(low), kLeastImage<T>), top, width, top);
  }

  const RowProblem& p_;
  const float temperature_, amount_;
  SelectMemory<T>* memory_;
  const int lane_;
};

// ---- A round's decision, by the warp of totals: all blocks come to the same.
template <class T, bool kMass>
class SelectTotals {
  using Math = FloatMath;
  static constexpr int kEach = kBins / 32;

 public:
  __device__ SelectTotals(const ClusterProblem& problem, SelectMemory<T>* memory, uint32_t* of_blocks, int blocks, int rank, int lane)
      : amount_(problem.strong_amount), memory_(memory), of_blocks_(of_blocks),
        blocks_(blocks), rank_(rank), lane_(lane) {}

  // `sums`, in lanes 0 and 8: what lies above the window's exact part (columns or mass), and the mass of all.
  __device__ void round(float sums, const Request& request, float k) {
    Search<T>& search = memory_->searches[request.buffer];
    if (request.is_value) {
      window_ = memory_->scouted[request.row % kScouted], least_ = kLeastImage<T>, beyond_ = kBeyondImages, rounds_ = 0;
    } else {
      window_ = search.window, least_ = search.least, beyond_ = search.beyond, rounds_ = search.rounds;
    }
    if (window_.reference != window_.reference) window_.reference = maximum_;
    if constexpr (!kMass && kSpareBits<T> == 0)
      if (request.is_value && lists<T>(amount_, blocks_)) {
        const float threshold = from_lists(k);
        if (lane_ == 0) search = {window_, least_, beyond_, rounds_}, memory_->threshold[request.buffer] = threshold;
        return;
      }
    uint32_t counts[kEach];
    exchange(sums, counts);
    const float above = __shfl_sync(kAllLanes, sums, 0), all = __shfl_sync(kAllLanes, sums, 8);
    const float threshold = decide(counts, above, all, k);
    if (lane_ == 0) search = {window_, least_, beyond_, rounds_}, memory_->threshold[request.buffer] = threshold;
  }
  // Of the row's logits, ahead of a round whose window knows no reference.
  __device__ void set_maximum(float maximum) { maximum_ = maximum; }

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

  // Of the images that all blocks list: the threshold, or NaN and another round.
  __device__ float from_lists(float k) {
    uint4* mine = reinterpret_cast<uint4*>(memory_->bins) + lane_;
    const uint4 four = *mine;
    const uint32_t listed = memory_->listed;
    __syncwarp();
    *mine = make_uint4(0, 0, 0, 0);
    if (lane_ == 0) memory_->listed = 0;
    const int b = count_ & 1;
    uint32_t* list = of_blocks_ + (b * blocks_ + rank_) * kBins + lane_ * 4;
    // What is listed, and whether it is more than a list holds.
    float sums = lane_ == 0 ? float(listed) : lane_ == 8 && listed > kListed ? 1 : 0;
    if (blocks_ == 1) {
      *reinterpret_cast<uint4*>(list) = four;
      __syncwarp();
    } else {
      const uint32_t barrier = shared_address(&memory_->sent[b]), here = shared_address(list);
      const uint32_t sum = shared_address(&memory_->sums_of_blocks[b][lane_ / 8][rank_]);
      for (int block = 0; block < blocks_; block++) {
        const uint32_t there = address_in(barrier, block);
        store_remote(address_in(here, block), four, there);
        if (lane_ % 8 == 0) store_remote(address_in(sum, block), sums, there);
      }
      if (lane_ == 0) barrier_arrive_expecting(barrier, blocks_ * (kListed + 4) * 4);
      barrier_wait_cluster(barrier, count_ >> 1 & 1);
      count_++;
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; i++) v[i] = lane_ < blocks_ ? memory_->sums_of_blocks[b][i][lane_] : 0;
      sums = warp_sums(v, lane_);
    }
    const int total = int(__shfl_sync(kAllLanes, sums, 0)), wanted = int(amount_);
    if (__shfl_sync(kAllLanes, sums, 8) > 0) {
      rounds_++;
      return __builtin_nanf("");
    }
    if (total < wanted) {  // as a round of counts with nothing in its exact part
      const uint32_t nothing[kEach] = {};
      return decide(nothing, float(total), 0, k);
    }
    const uint4* lists = reinterpret_cast<const uint4*>(of_blocks_ + b * blocks_ * kBins) + lane_;
    auto count = [&](uint32_t least) {  // of the images from there on
      int n = 0;
      for (int block = 0; block < blocks_; block++) {
        const uint4 x = lists[block * (kBins / 4)];
        n += (x.x >= least) + (x.y >= least) + (x.z >= least) + (x.w >= least);
      }
      return int(__reduce_add_sync(kAllLanes, unsigned(n)));
    };
    uint32_t largest = 0;
    for (int block = 0; block < blocks_; block++) {
      const uint4 x = lists[block * (kBins / 4)];
      largest = max(max(max(largest, x.x), max(x.y, x.z)), x.w);
    }
    // As many as are wanted from `low` on, fewer from `high` on.
    uint32_t low = window_.low, high = __reduce_max_sync(kAllLanes, largest) + 1;
    while (high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      const int n = count(middle);
      if (n >= wanted)
        low = middle;
      else
        high = middle;
      if (n == wanted) break;
    }
    return value_of(low);
  }

  // The threshold; or NaN, and the window of another round.
  __device__ float decide(const uint32_t (&counts)[kEach], float above, float all, float k) {
    const float infinity = __builtin_inff(), again = __builtin_nanf("");
    if (kMass && !(all > 0 && all < infinity)) {
      // The reference is far off; or the row holds no number, or a NaN, and then it is NaN whatever its set.
      if (all != all || !(fabsf(window_.reference) < infinity) || rounds_++ > kMostRounds) return -infinity;
      window_.reference = again;
      return again;
    }
    const float target = kMass ? amount_ * all : amount_, middle = window_.middle();
    // The lower half of the warp has the exact part, the upper the coarse one; or as the bins are divided.
    constexpr int exact_lanes = kExact<T> / kEach;
    const bool coarse = lane_ >= exact_lanes;
    const int place = exact_lanes == 16 ? lane_ % 16 : coarse ? lane_ - exact_lanes : lane_;
    const float width = window_.inv_width > 0 ? 1 / window_.inv_width : 0;
    float held[kEach], mine = 0;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
      const int bin = place * kEach + i;
      held[i] = float(counts[i]);
      if (kMass && counts[i]) {
        const float value =
            coarse ? window_.coarse + (bin + 0.5f) * width : value_at<T>(window_.low + (uint32_t(bin) << kSpareBits<T>));
        const float exponent = fmaf(value, k, -(window_.reference * k));  // as count_window's
        held[i] *= Math::exp2(coarse ? fminf(exponent, 100) : exponent);
      }
      mine += held[i];
    }
    if (kMass && window_.coarse == middle) {  // what the last interval holds is known
      float others = coarse ? mine - (lane_ == 31 ? held[kEach - 1] : 0) : 0;
#pragma unroll
      for (int d = 16; d > 0; d /= 2) others += __shfl_xor_sync(kAllLanes, others, d);
      if (lane_ == 31) mine -= held[kEach - 1], held[kEach - 1] = fmaxf(0, above - others), mine += held[kEach - 1];
    }
    float over = mine;  // of its half of the warp, what lies in this lane's intervals and all above
#pragma unroll
    for (int d = 1; d < (exact_lanes == 16 ? 16 : 32); d *= 2) {
      const float from = __shfl_down_sync(kAllLanes, over, d, exact_lanes == 16 ? 16 : 32);
      if (exact_lanes == 16 ? place + d < 16 : lane_ + d < (coarse ? 32 : exact_lanes)) over += from;
    }
    over += (coarse ? 0 : above) - mine;
    int bin = -1;
    bool just = false;  // what lies in that interval and above is as many as asked for
#pragma unroll
    for (int i = kEach - 1; i >= 0; i--) {
      over += held[i];
      if (bin < 0 && over >= target) bin = place * kEach + i, just = over == target;
    }
    const int exact_bin = __reduce_max_sync(kAllLanes, coarse ? -1 : bin);
    const int coarse_bin = __reduce_max_sync(kAllLanes, coarse ? bin : -1);

    float from = again, to = again;  // a guess
    if (above >= target) {
      if constexpr (!kMass && kSpareBits<T> == 0) {
        // Then the interval begins at a threshold as good as the least value in it.
        const bool done = __any_sync(kAllLanes, coarse && bin > 0 && bin == coarse_bin && just);
        const float begin = done ? window_.begin_of(coarse_bin, lane_) : again;
        if (begin == begin) return begin;
      }
      least_ = max(least_, window_.middle_image());
      if (window_.coarse < infinity && width > 0) {
        from = coarse_bin < 0 ? value_at<T>(least_) : window_.coarse + (coarse_bin - 1) * width;
        to = coarse_bin < 0 ? window_.coarse : window_.coarse + (coarse_bin < kCoarse<T> - 1 ? coarse_bin + 2 : 16 * kCoarse<T>) * width;
      }
    } else {
      if (exact_bin >= 0) return value_at<T>(window_.low + (uint32_t(exact_bin) << kSpareBits<T>));
      beyond_ = min(beyond_, window_.low);
      to = value_at<T>(beyond_), from = to - kLog2Ef / k * exp2f(3.0f * rounds_);
    }
    // Rounding may leave nothing between; then the set's mass is the one asked for, as far as fp32 knows.
    const float upper = beyond_ < kBeyondImages ? value_at<T>(beyond_) : infinity;
    if (least_ >= beyond_ || rounds_ > kMostRounds) return upper;
    const uint32_t images = beyond_ - least_;
    if (images <= uint32_t(kExact<T>) << kSpareBits<T>) {
      window_ = Window<T>::at(least_, infinity, 0, window_.reference);
    } else {
      const uint32_t low = from == from ? max(rounded_image<T>(from), least_) : beyond_;
      to = fminf(to, upper);
      const float at = low < beyond_ ? value_at<T>(low) : again;
      if (rounds_ < 10 && isfinite(at) && isfinite(to) && to > at)
        window_ = Window<T>::at(low, -infinity, (to - at) / kCoarse<T>, window_.reference);
      else
        window_ = Window<T>::at(least_ + (images / 2 >> kSpareBits<T> << kSpareBits<T>), infinity, 0, window_.reference);
    }
    rounds_++;
    return again;
  }

  static constexpr int kMostRounds = 100;
  const float amount_;
  SelectMemory<T>* memory_;
  uint32_t* of_blocks_;  // (2, blocks, kBins)
  const int blocks_, rank_, lane_;
  int count_ = 0, rounds_ = 0;
  Window<T> window_{};
  float maximum_ = 0;
  uint32_t least_ = 0, beyond_ = 0;  // the threshold's image lies in [least, beyond)
};

}  // namespace kdkernels::cuda
