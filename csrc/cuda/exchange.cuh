// Totals over a row: from every consumer thread of every block of the cluster to every one of them, without making them
// wait for each other.
//
// Consumer warps add up their lanes by shuffles, leave the sums in shared memory and go on. One warp of the block does
// nothing but totals: it adds up what the warps left, sends the block's sums to the other blocks through distributed
// shared memory onto a barrier that counts bytes, adds up what comes from them, and signals that the result is there.
// Consumers wait only where they need it, which is after they have worked on another row. The order of every addition is
// fixed.
#pragma once
#include "ptx.cuh"

namespace kdkernels::cuda {

constexpr unsigned kAllLanes = ~0u;

// N sums over a warp: lane l returns the total of value l / (32 / N).
template <int N>
__device__ __forceinline__ float warp_sums(float (&v)[N], int lane) {
  int distance = 16;
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2, distance /= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < half; i++) {
      const float sent = upper ? v[i] : v[i + half], kept = upper ? v[i + half] : v[i];
      v[i] = kept + __shfl_xor_sync(kAllLanes, sent, distance);
    }
  }
#pragma unroll
  for (int d = 16 / N; d > 0; d /= 2) v[0] += __shfl_xor_sync(kAllLanes, v[0], d);
  return v[0];
}

// The largest over a warp, in every lane; a NaN counts for nothing.
__device__ __forceinline__ float warp_max(float x) {
  int bits = __float_as_int(fmaxf(x, -__builtin_inff()));
  bits = __reduce_max_sync(kAllLanes, bits ^ (bits >> 31 & 0x7fffffff));  // floats in the order of integers
  return __int_as_float(bits ^ (bits >> 31 & 0x7fffffff));
}

// The largest x of a warp and the y that came with it, in every lane.
__device__ __forceinline__ void warp_top(float& x, float& y) {
  const float largest = warp_max(x);
  const unsigned has = __ballot_sync(kAllLanes, x == largest);
  y = __shfl_sync(kAllLanes, y, has ? __ffs(has) - 1 : 0);
  x = largest;
}

struct alignas(16) Parcel {
  float v[8] = {};
};

enum class Wanted : int { statistics, sums, top, select, nothing_more };

// What consumers want done with their parcels.
struct Request {
  Wanted what;
  int buffer;     // of the row's numbers
  bool is_value;  // the first sum is the row's divergence; of a select: the row's first
  int slot;       // where a row begins in the ring, with its statistics
  uint32_t row;
};

struct ExchangeMemory {
  static constexpr int kMaxWarps = 16, kMaxBlocks = 16;
  // Exchanges that may be posted and not waited for: a row's statistics, all of the row's before, the row's after.
  static constexpr int kInFlight = 8;
  Parcel of_warps[kInFlight][kMaxWarps];
  Parcel result[kInFlight];
  Request request[kInFlight];
  float of_warps_total[8];
  float of_blocks[2][8][kMaxBlocks];  // two take turns: nobody sends again before everyone has read the last but one
  alignas(16) unsigned char numbers[2][192];  // RowNumbers (totals.cuh) of the rows in flight
  uint64_t posted[kInFlight], ready[kInFlight], sent[2];

  __device__ void init(int warps) {
    for (uint64_t& barrier : posted) barrier_init(shared_address(&barrier), warps);
    for (uint64_t& barrier : ready) barrier_init(shared_address(&barrier), 1);
    for (uint64_t& barrier : sent) barrier_init(shared_address(&barrier), 1);
  }
};

// A consumer warp's side.
struct Exchange {
  ExchangeMemory* memory;
  int warps, warp, lane;
  int count = 0;

  // Leaves the warp's sums, of which lane l holds value l / (32 / N); returns the number to wait for.
  template <int N>
  __device__ __forceinline__ int post_sums(float of_warp, const Request& request) {
    const int b = count % ExchangeMemory::kInFlight;
    if (lane % (32 / N) == 0) memory->of_warps[b][warp].v[lane / (32 / N)] = of_warp;
    return post(request);
  }
  __device__ __forceinline__ int post(const Request& request) {
    const int b = count % ExchangeMemory::kInFlight;
    if (threadIdx.x == 0) memory->request[b] = request;
    __syncwarp();
    if (lane == 0) barrier_arrive(shared_address(&memory->posted[b]));
    return count++;
  }
  __device__ __forceinline__ Parcel& mine() const { return memory->of_warps[count % ExchangeMemory::kInFlight][warp]; }

  __device__ __forceinline__ const Parcel& wait(int number) const {
    const int b = number % ExchangeMemory::kInFlight;
    barrier_wait(shared_address(&memory->ready[b]), number / ExchangeMemory::kInFlight & 1);
    return memory->result[b];
  }

  // Sums over everyone, at once.
  template <int N>
  __device__ __forceinline__ void sums(float (&v)[N], bool is_value, int buffer) {
    const float of_warp = warp_sums(v, lane);
    const Parcel& result = wait(post_sums<N>(of_warp, {Wanted::sums, buffer, is_value, 0, 0}));
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = result.v[i];
  }

  // The largest x of everyone, and the y that came with it, at once.
  __device__ __forceinline__ void top(float& x, float& y) {
    warp_top(x, y);
    if (lane == 0) mine().v[0] = x, mine().v[1] = y;
    const Parcel& result = wait(post({Wanted::top, 0, false, 0, 0}));
    x = result.v[0], y = result.v[1];
  }
};

}  // namespace kdkernels::cuda
