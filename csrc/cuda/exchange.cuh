// Totals over a row: from every thread of every block of the cluster to every thread of it.
//
// Warps add up their lanes by shuffles and leave the sums in shared memory; the block's first warp adds those up, sends
// the block's to the other blocks of the cluster through distributed shared memory, onto a barrier that counts bytes, and
// adds up what comes from them. So each number is worked out by one warp of a block, not by all, and there is no barrier
// of the whole cluster. The order of every addition is fixed.
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

// Eight floats from everyone to the first warp: sums, and two numbers that go with them.
struct alignas(16) Parcel {
  float v[8] = {};
};

struct ExchangeMemory {
  static constexpr int kMaxWarps = 32, kMaxBlocks = 16;
  Parcel of_warps[kMaxWarps];
  float of_blocks[2][8][kMaxBlocks];  // two take turns: nobody sends again before everyone has read the last but one
  alignas(16) float broadcast[8];
  alignas(16) unsigned char row[128];  // what a row's first sweep found (sweep.cuh), kept while the row is worked on
  uint64_t barriers[2];
};

struct Exchange {
  ExchangeMemory* memory;
  int blocks, warps, rank, warp, lane;
  int count = 0;

  __device__ bool leads() const { return warp == 0; }

  // Everyone's parcel to the first warp, lane i of which returns warp i's; the other warps return at once.
  __device__ __forceinline__ Parcel gather(const Parcel& mine) const {
    if (lane == 0) memory->of_warps[warp] = mine;
    __syncwarp();
    Parcel theirs;
    if (leads()) {
      block_barrier_wait(1, warps * 32);
      if (lane < warps) theirs = memory->of_warps[lane];
    } else {
      block_barrier_arrive(1, warps * 32);
    }
    return theirs;
  }

  // By the first warp: value i is in lane i·32/N, …; lane i returns those of block i.
  template <int N>
  __device__ __forceinline__ Parcel across(float mine) {
    constexpr int group = 32 / N;
    const int b = count & 1;
    const uint32_t barrier = shared_address(&memory->barriers[b]);
    const uint32_t to = shared_address(&memory->of_blocks[b][lane / group][rank]);
    for (int block = lane % group; block < blocks; block += group)
      store_remote(address_in(to, block), mine, address_in(barrier, block));
    if (lane == 0) barrier_arrive_expecting(barrier, N * blocks * 4);
    barrier_wait_cluster(barrier, count >> 1 & 1);
    count++;
    Parcel theirs;
    if (lane < blocks)
#pragma unroll
      for (int i = 0; i < N; i++) theirs.v[i] = memory->of_blocks[b][i][lane];
    return theirs;
  }

  // What the first warp wrote for everyone has reached everyone.
  __device__ __forceinline__ void broadcast() const {
    __syncwarp();
    block_barrier_wait(2, warps * 32);
  }

  // Sums over everyone, in everyone.
  template <int N>
  __device__ __forceinline__ void sums(float (&v)[N]) {
    constexpr int group = 32 / N;
    const float of_warp = warp_sums(v, lane);
    Parcel parcel;
#pragma unroll
    for (int i = 0; i < N; i++) parcel.v[i] = __shfl_sync(kAllLanes, of_warp, i * group);
    parcel = gather(parcel);
    if (leads()) {
#pragma unroll
      for (int i = 0; i < N; i++) v[i] = parcel.v[i];
      float total = warp_sums(v, lane);
      if (blocks > 1) {
        parcel = across<N>(total);
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = parcel.v[i];
        total = warp_sums(v, lane);
      }
      if (lane % group == 0) memory->broadcast[lane / group] = total;
    }
    broadcast();
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = memory->broadcast[i];
  }

  // The largest x of everyone, and the y that came with it, in everyone.
  __device__ __forceinline__ void top(float& x, float& y) {
    keep_top(x, y);
    Parcel parcel;
    parcel.v[0] = x, parcel.v[1] = y;
    parcel = gather(parcel);
    if (leads()) {
      x = lane < warps ? parcel.v[0] : -__builtin_inff(), y = parcel.v[1];
      keep_top(x, y);
      if (blocks > 1) {
        parcel = across<2>(lane < 16 ? x : y);
        x = lane < blocks ? parcel.v[0] : -__builtin_inff(), y = parcel.v[1];
        keep_top(x, y);
      }
      if (lane == 0) memory->broadcast[0] = x, memory->broadcast[1] = y;
    }
    broadcast();
    x = memory->broadcast[0], y = memory->broadcast[1];
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
