// Totals over a row: from every thread of every block of the cluster to every thread of it.
//
// A warp adds up its lanes by shuffles and sends its sums to all blocks of the cluster, through distributed shared memory
// onto a barrier that counts bytes; each warp waits for those of all warps and adds them up itself. No block barrier, no
// cluster barrier. Two buffers take turns: nobody sends for an exchange before it has read the last but one, because the
// last one needed its contribution. The order of every addition is fixed.
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

struct Exchange {
  static constexpr int kValues = 8;  // floats a warp sends at most
  static constexpr size_t bytes(int blocks, int warps) { return 2 * kValues * size_t(blocks) * warps * sizeof(float); }

  float* entries;    // (2, kValues, blocks · warps)
  uint32_t barrier;  // two of them
  int blocks, warps, rank, warp, lane;
  int count = 0;

  __device__ int senders() const { return blocks * warps; }
  __device__ const float* received(int value) const { return entries + ((count & 1) * kValues + value) * senders(); }

  // Lane i of a group of `lanes` sends x to blocks i, i + lanes, …
  __device__ __forceinline__ void send(int value, float x, int first, int lanes) const {
    const uint32_t to = shared_address(received(value) + rank * warps + warp), bar = barrier + (count & 1) * 8;
    for (int block = first; block < blocks; block += lanes) store_remote(address_in(to, block), x, address_in(bar, block));
  }
  // Until `values` floats have come from every warp.
  __device__ __forceinline__ void wait(int values) const {
    const uint32_t bar = barrier + (count & 1) * 8;
    if (warp == 0 && lane == 0) barrier_arrive_expecting(bar, values * senders() * 4);
    barrier_wait(bar, count >> 1 & 1);
  }

  template <int N>
  __device__ __forceinline__ void sums(float (&v)[N]) {
    constexpr int group = 32 / N;
    const float mine = warp_sums(v, lane);
    send(lane / group, mine, lane % group, group);
    wait(N);
#pragma unroll
    for (int i = 0; i < N; i++) {
      v[i] = 0;
      for (int e = lane; e < senders(); e += 32) v[i] += received(i)[e];
    }
    const float total = warp_sums(v, lane);
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = __shfl_sync(kAllLanes, total, i * group);
    count++;
  }

  __device__ __forceinline__ void maxima(float& a, float& b) {
    a = warp_max(a), b = warp_max(b);
    send(lane / 16, lane < 16 ? a : b, lane % 16, 16);
    wait(2);
    a = b = -__builtin_inff();
    for (int e = lane; e < senders(); e += 32) a = fmaxf(a, received(0)[e]), b = fmaxf(b, received(1)[e]);
    a = warp_max(a), b = warp_max(b);
    count++;
  }

  // The largest x of all threads, and the y that came with it.
  __device__ __forceinline__ void top(float& x, float& y) {
    keep_top(x, y);
    send(lane / 16, lane < 16 ? x : y, lane % 16, 16);
    wait(2);
    x = -__builtin_inff(), y = 0;
    for (int e = lane; e < senders(); e += 32)
      if (received(0)[e] > x) x = received(0)[e], y = received(1)[e];
    keep_top(x, y);
    count++;
  }

 private:
  static __device__ __forceinline__ void keep_top(float& x, float& y) {
    const float largest = warp_max(x);
    const unsigned has = __ballot_sync(kAllLanes, x == largest);
    y = __shfl_sync(kAllLanes, y, has ? __ffs(has) - 1 : 0);
    x = largest;
  }
};

}  // namespace kdkernels::cuda
