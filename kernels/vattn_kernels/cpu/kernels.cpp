// CPU implementation of the ops in vattn_kernels/ops.py; contract there, truth in vattn_kernels/reference.
// One work item is one (request, KV head): its query heads share the index set. Long items are cut into chunks of
// tokens, so that one request keeps every core busy.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <omp.h>
#include <vector>

namespace {

constexpr int kMaxGroup = 16;
constexpr int kMaxDim = 256;
constexpr int kChunk = 2048;
constexpr int kBlock = 64;
constexpr int kRounds = 4;
constexpr float kFirstRoundQuantile = 1.2f;
constexpr float kGuardShare = 8.0f;
constexpr float kLeastGrowth = 1.05f;
constexpr float kTiny = 1e-30f;
constexpr float kForced = 1e30f;
constexpr float kUnusable = -1.0f;
constexpr float kMaxExponent = 60.0f;
constexpr float kRounding = 1e-6f;
constexpr double kLeastUnit = 1e-15;
constexpr float kMostHalfWidth = 1e3f;

// Order of the fields as in vattn_kernels/cpu/__init__.py.
struct DecodeArgs {
  const void *q, *k_cache, *v_cache;
  const int32_t *kv_indices;
  const void *seq_lens;
  const int32_t *codes;
  const uint8_t *norms, *valid;
  const float *mean, *query_basis, *steps;
  const int32_t *fields;
  const float *params;
  const int32_t *covered;
  void *out;
  float *stats;
  double *counters;
  const int64_t *counter_offsets;
  const float *budget_edges, *error_edges, *audit_edges;
  float *workspace;
  int64_t selector, group_mean, norm_bytes, num_layers;
  int64_t batch, num_qo_heads, num_kv_heads, head_dim, kv_stride, max_fields, words;
  int64_t num_budget_edges, num_error_edges, num_audit_edges;
  int64_t layer_id, seed, sink, window, dense_below, top_k_count, pilot_min, workspace_stride;
  int64_t seq_lens_is_int64, is_bf16, is_uniform, is_output, is_oracle, threads;
  double sm_scale, top_k_share, pilot, cap, floor, audit_rate;
  int64_t table, table_points, table_steps;
};

// As in vattn_kernels/cpu/__init__.py.
enum Selector : int64_t { kSketch, kOracle, kQuest, kSign, kHash };

struct EncodeArgs {
  const void *k_cache, *v_cache;
  const int64_t *slots;
  const float *mean, *key_basis, *steps;
  const int32_t *fields;
  int32_t *codes;
  uint8_t *norms, *valid;
  int64_t num_slots, num_kv_heads, head_dim, max_fields, words, is_bf16, threads;
};

struct SignatureArgs {
  const void *k_cache, *v_cache;
  const int64_t *slots;
  const float *mean, *nets;
  const int32_t *widths;
  int32_t *codes;
  uint8_t *norms, *valid;
  int64_t num_slots, num_kv_heads, head_dim, num_nets, num_layers, words, centred, is_bf16, threads;
};

struct PageArgs {
  const void *k_cache, *v_cache;
  const int64_t *slots;
  void *bounds;
  uint8_t *norms, *valid;
  int64_t num_slots, pool_slots, num_kv_heads, head_dim, is_bf16, threads;
};

inline float load(const float *p) { return *p; }
inline float load(const uint16_t *p) {
  const uint32_t bits = uint32_t(*p) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline void store(float *p, float x) { *p = x; }
inline void store(uint16_t *p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *p = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// exp for |x| < 88 to 2 ulp: Cody-Waite reduction and a degree-6 polynomial, so that the loops vectorise.
inline float fast_exp(float x) {
  x = std::min(std::max(x, -87.0f), 87.0f);
  const float n = std::floor(x * 1.44269504f + 0.5f);
  float r = x - n * 0.693359375f;
  r -= n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

inline uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}
constexpr uint32_t kGolden = 0x9E3779B1u;

inline uint32_t stream_key(uint32_t seed, uint32_t layer, uint32_t head, uint32_t n) {
  uint32_t x = seed;
  for (const uint32_t t : {layer, head, n}) x = mix((x ^ (t * kGolden)) + 0x7F4A7C15u);
  return x;
}
inline float uniform01(uint32_t i, uint32_t key) { return float(mix(i * kGolden + key) >> 8) * 5.9604644775390625e-8f; }

// First images of a keyed permutation of [0, n): a balanced Feistel network with cycle walking.
struct Permutation {
  uint32_t n, key, half, mask;
  Permutation(uint32_t n_, uint32_t key_) : n(n_), key(key_), half(1) {
    while ((uint64_t(1) << (2 * half)) < n) ++half;
    mask = (1u << half) - 1;
  }
  uint32_t operator()(uint32_t x) const {
    do {
      uint32_t left = x >> half, right = x & mask;
      for (uint32_t r = 0; r < 4; ++r) {
        const uint32_t next = (left ^ mix(right + key + r * kGolden)) & mask;
        left = right;
        right = next;
      }
      x = (left << half) | right;
    } while (x >= n);
    return x;
  }
};

constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));

inline Lanes load_lanes(const float *p) {
  Lanes x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline Lanes load_lanes(const uint16_t *p) {
  Lanes x;
  for (int i = 0; i < kLanes; ++i) x[i] = load(p + i);
  return x;
}
// Rows are scattered over the pool: without this a read waits for memory row by row.
constexpr int kAhead = 12;
template <typename T> inline void prefetch(const T *row, int dim) {
  for (int d = 0; d < dim; d += 64 / int(sizeof(T))) __builtin_prefetch(row + d);
}
inline float total_of(Lanes x) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

// out[g][j] = scale * <q_g, row_j> for G query rows of C chunks; a row is loaded once for all of them.
template <typename T, int G, int C>
void dots_fixed(const float *q, const T *const *rows, int64_t count, float scale, float *out, int64_t stride, int chunks) {
  const int n = C ? C : chunks;
  for (int64_t j = 0; j < count; ++j) {
    if (j + kAhead < count) prefetch(rows[j + kAhead], n * kLanes);
    Lanes acc[G] = {};
    for (int c = 0; c < n; ++c) {
      const Lanes k = load_lanes(rows[j] + c * kLanes);
      for (int g = 0; g < G; ++g) acc[g] += load_lanes(q + (g * n + c) * kLanes) * k;
    }
    for (int g = 0; g < G; ++g) out[g * stride + j] = scale * total_of(acc[g]);
  }
}

// acc[g] += sum_j p[g][j] * row_j, with the sums in registers over the whole list.
template <typename T, int G, int C>
void accumulate_fixed(const float *p, int64_t stride, const T *const *rows, int64_t count, float *acc, int64_t acc_stride, int chunks) {
  const int n = C ? C : chunks;
  constexpr int kHeld = C ? C : kMaxDim / kLanes;
  Lanes held[G][kHeld];
  for (int g = 0; g < G; ++g)
    for (int c = 0; c < n; ++c) held[g][c] = load_lanes(acc + g * acc_stride + c * kLanes);
  for (int64_t j = 0; j < count; ++j)
    for (int c = 0; c < n; ++c) {
      const Lanes v = load_lanes(rows[j] + c * kLanes);
      for (int g = 0; g < G; ++g) held[g][c] += p[g * stride + j] * v;
    }
  for (int g = 0; g < G; ++g)
    for (int c = 0; c < n; ++c) std::memcpy(acc + g * acc_stride + c * kLanes, &held[g][c], sizeof(Lanes));
}

template <typename T, int G>
void dots_group(const float *q, const T *const *rows, int64_t count, float scale, float *out, int64_t stride, int chunks) {
  if (chunks == 4) return dots_fixed<T, G, 4>(q, rows, count, scale, out, stride, chunks);
  if (chunks == 8) return dots_fixed<T, G, 8>(q, rows, count, scale, out, stride, chunks);
  dots_fixed<T, G, 0>(q, rows, count, scale, out, stride, chunks);
}
template <typename T, int G>
void accumulate_group(const float *p, int64_t stride, const T *const *rows, int64_t count, float *acc, int64_t acc_stride, int chunks) {
  if (chunks == 4) return accumulate_fixed<T, G, 4>(p, stride, rows, count, acc, acc_stride, chunks);
  if (chunks == 8 && G <= 3) return accumulate_fixed<T, G, 8>(p, stride, rows, count, acc, acc_stride, chunks);
  accumulate_fixed<T, G, 0>(p, stride, rows, count, acc, acc_stride, chunks);
}

template <typename T>
void dots(const float *q, int group, const T *const *rows, int64_t count, float scale, float *out, int64_t stride, int dim) {
  const int chunks = dim / kLanes;
  for (int g = 0; g < group;) {
    const int left = group - g;
    const float *from = q + g * dim;
    float *to = out + g * stride;
    if (left >= 4 && left != 5 && left != 6) dots_group<T, 4>(from, rows, count, scale, to, stride, chunks), g += 4;
    else if (left >= 3) dots_group<T, 3>(from, rows, count, scale, to, stride, chunks), g += 3;
    else if (left == 2) dots_group<T, 2>(from, rows, count, scale, to, stride, chunks), g += 2;
    else dots_group<T, 1>(from, rows, count, scale, to, stride, chunks), g += 1;
  }
}
template <typename T>
void accumulate(const float *p, int64_t stride, int group, const T *const *rows, int64_t count, float *acc, int64_t acc_stride, int dim) {
  const int chunks = dim / kLanes;
  for (int g = 0; g < group;) {
    const int left = group - g;
    const float *from = p + g * stride;
    float *to = acc + g * acc_stride;
    if (left >= 4 && left != 5 && left != 6) accumulate_group<T, 4>(from, stride, rows, count, to, acc_stride, chunks), g += 4;
    else if (left >= 3) accumulate_group<T, 3>(from, stride, rows, count, to, acc_stride, chunks), g += 3;
    else if (left == 2) accumulate_group<T, 2>(from, stride, rows, count, to, acc_stride, chunks), g += 2;
    else accumulate_group<T, 1>(from, stride, rows, count, to, acc_stride, chunks), g += 1;
  }
}

template <typename T> inline float dot(const float *q, const T *k, int dim) {
  float acc = 0;
#pragma omp simd reduction(+ : acc)
  for (int d = 0; d < dim; ++d) acc += q[d] * load(k + d);
  return acc;
}
inline void axpy(float p, const float *v, float *acc, int dim) {
#pragma omp simd
  for (int d = 0; d < dim; ++d) acc[d] += p * v[d];
}

// A norm as a byte of eight steps per octave.
inline uint8_t level_of(float norm) {
  const float level = std::nearbyint(8.0f * std::log2(std::max(norm, 1e-20f)) + 128.0f);
  return uint8_t(std::min(std::max(level, 0.0f), 255.0f));
}
template <typename T> inline float norm_of_row(const T *v, int dim) {
  float square = 0;
#pragma omp simd reduction(+ : square)
  for (int d = 0; d < dim; ++d) square += load(v + d) * load(v + d);
  return std::sqrt(square);
}

constexpr int kPage = 16;
constexpr int kMaxWidth = 512;
constexpr int kMaxBits = 128;
constexpr int kMaxWords = kMaxGroup * kMaxBits / 32;

// Signs of a net's outputs as words; layout of the net in vattn_kernels/signature.py.
inline void signature_of(const float *x, const float *net, const int32_t *widths, int64_t num_layers, uint32_t *words) {
  float in[kMaxWidth], out[kMaxWidth];
  std::memcpy(in, x, sizeof(float) * widths[0]);
  for (int64_t l = 0; l < num_layers; ++l) {
    const int inner = widths[l], outer = widths[l + 1];
    std::memcpy(out, net + inner * outer, sizeof(float) * outer);
    for (int i = 0; i < inner; ++i) axpy(in[i], net + i * outer, out, outer);
    net += (inner + 1) * outer;
    if (l + 1 == num_layers)
      for (int w = 0; w < outer / 32; ++w) {
        words[w] = 0;
        for (int i = 0; i < 32; ++i) words[w] |= uint32_t(out[w * 32 + i] > 0) << i;
      }
    else
      for (int i = 0; i < outer; ++i) in[i] = out[i] / (1.0f + fast_exp(-out[i]));
  }
}

// log-sum-exp state of one query head.
struct Partial {
  float acc[kMaxDim];
  float max = -std::numeric_limits<float>::infinity(), sum = 0;
};
constexpr int64_t kPartialStride = sizeof(Partial) / sizeof(float);

template <typename T> struct Decode {
  const DecodeArgs &a;
  const int dim, group;
  const T *keys, *values;
  float norm_of[256], agreement[kMaxBits + 1];

  explicit Decode(const DecodeArgs &args)
      : a(args), dim(int(args.head_dim)), group(int(args.num_qo_heads / args.num_kv_heads)),
        keys(static_cast<const T *>(args.k_cache)), values(static_cast<const T *>(args.v_cache)) {
    for (int i = 0; i < 256; ++i) norm_of[i] = std::exp2(float(i - 128) / 8.0f);
    const int bits = args.selector >= kSign ? args.fields[args.num_layers] : 0;
    for (int i = 0; i < bits + 1; ++i) {
      const double part = double(i) / std::max(bits, 1);
      agreement[i] = float(args.selector == kSign ? std::cos(M_PI * part) : 1 - 2 * part);
    }
  }

  struct Item {
    int64_t request = 0, head = 0;
    int64_t n = 0, lo = 0, hi = 0, range = 0;
    bool dense = false, audited = false;
    const int32_t *slots = nullptr;
    float q[kMaxGroup * kMaxDim];
    float coded_query[kMaxGroup * kMaxDim];
    float bias[kMaxGroup], kappa[kMaxGroup];
    uint32_t signature[kMaxWords];
    Partial fixed[kMaxGroup];
    float *scores = nullptr, *ranks = nullptr;
    float score_sum = 0;
  };

  int64_t seq_len(int64_t b) const {
    return a.seq_lens_is_int64 ? static_cast<const int64_t *>(a.seq_lens)[b] : static_cast<const int32_t *>(a.seq_lens)[b];
  }
  const T *row(const T *base, int32_t slot, int64_t head) const { return base + (int64_t(slot) * a.num_kv_heads + head) * dim; }

  float quantile(double inverse_nu) const {
    const double x = std::min(inverse_nu * a.table_steps, double(a.table_points - 1));
    const int j = std::min(int(x), int(a.table_points) - 2);
    const float *t = a.params + a.table;
    return float(t[j] + (x - j) * (t[j + 1] - t[j]));
  }

  // Exact attention over positions [from, to), merged into `out`.
  void attend(const Item &item, int64_t from, int64_t to, Partial *out) const {
    float logits[kMaxGroup * kBlock];
    const T *k_rows[kBlock], *v_rows[kBlock];
    for (int64_t start = from; start < to; start += kBlock) {
      const int count = int(std::min<int64_t>(kBlock, to - start));
      for (int j = 0; j < count; ++j) {
        k_rows[j] = row(keys, item.slots[start + j], item.head);
        v_rows[j] = row(values, item.slots[start + j], item.head);
      }
      dots(item.q, group, k_rows, count, float(a.sm_scale), logits, kBlock, dim);
      for (int g = 0; g < group; ++g) {
        float *p = logits + g * kBlock, m = out[g].max, sum = 0;
        for (int j = 0; j < count; ++j) m = std::max(m, p[j]);
        const float rescale = fast_exp(out[g].max - m);
        out[g].max = m;
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < count; ++j) {
          p[j] = fast_exp(p[j] - m);
          sum += p[j];
        }
        out[g].sum = out[g].sum * rescale + sum;
        for (int d = 0; d < dim; ++d) out[g].acc[d] *= rescale;
      }
      accumulate(logits, kBlock, group, v_rows, count, out[0].acc, kPartialStride, dim);
    }
  }

  static void merge(Partial &into, const Partial &part, int dim) {
    if (part.sum == 0) return;
    const float m = std::max(into.max, part.max);
    const float mine = into.sum > 0 ? fast_exp(into.max - m) : 0, theirs = fast_exp(part.max - m);
    into.max = m;
    into.sum = into.sum * mine + part.sum * theirs;
    for (int d = 0; d < dim; ++d) into.acc[d] = into.acc[d] * mine + part.acc[d] * theirs;
  }

  void clear(Partial *p) const {
    for (int g = 0; g < group; ++g) {
      p[g].max = -std::numeric_limits<float>::infinity();
      p[g].sum = 0;
      std::memset(p[g].acc, 0, sizeof(float) * dim);
    }
  }

  void prepare(Item &item, int64_t index) const {
    item.request = index / a.num_kv_heads;
    item.head = index % a.num_kv_heads;
    item.n = seq_len(item.request);
    item.slots = a.kv_indices + item.request * a.kv_stride;
    item.lo = std::min(a.sink, item.n);
    item.hi = std::max(item.lo, item.n - a.window);
    item.range = item.hi - item.lo;
    item.dense = item.n < a.dense_below || item.n > int64_t(*a.covered) || item.range <= 2 * a.pilot_min;
    item.scores = a.workspace + index * a.workspace_stride;
    item.ranks = item.scores + int64_t(group) * a.kv_stride;
    const uint32_t key = stream_key(uint32_t(a.seed) + 0x5bd1e995u, uint32_t(a.layer_id), uint32_t(item.head), uint32_t(item.n));
    item.audited = !item.dense && uniform01(uint32_t(item.request), key) < a.audit_rate;
    const T *q = static_cast<const T *>(a.q) + (item.request * a.num_qo_heads + item.head * group) * dim;
    for (int i = 0; i < group * dim; ++i) item.q[i] = load(q + i);
    clear(item.fixed);
    if (item.dense) return;
    attend(item, 0, item.lo, item.fixed);
    attend(item, item.hi, item.n, item.fixed);
    if (a.selector >= kQuest) return project_on_line(item);
    if (!a.is_oracle) project(item);
  }

  const float *line(const Item &item) const { return a.steps + item.head * 3; }

  // What is constant over tokens goes into the bias: the mean key's logit and the line's level.
  void project_on_line(Item &item) const {
    const float scale = float(a.sm_scale);
    const int bits = a.selector == kQuest ? 0 : a.fields[a.num_layers];
    int64_t size = 0;
    if (bits)
      for (int64_t l = 0; l < a.num_layers; ++l) size += (a.fields[l] + 1) * a.fields[l + 1];
    for (int g = 0; g < group; ++g) {
      const float *q = item.q + g * dim;
      const float base = scale * dot(q, a.mean + item.head * dim, dim);
      item.bias[g] = line(item)[0] + base;
      item.kappa[g] = scale * norm_of_row(q, dim);
      if (a.selector == kQuest) item.bias[g] -= line(item)[1] * base;
      if (bits) signature_of(q, a.query_basis + (item.head * group + g) * size, a.fields, a.num_layers, item.signature + g * (bits / 32));
    }
  }

  // Query in the sketch's coordinates, scaled by the steps; what is constant over tokens goes into the bias.
  void project(Item &item) const {
    const float *mean = a.mean + item.head * dim, *basis = a.query_basis + item.head * dim * dim;
    const float *steps = a.steps + item.head * a.max_fields;
    const int32_t *fields = a.fields + item.head * a.max_fields * 3;
    const float scale = float(a.sm_scale);
    for (int g = 0; g < group; ++g) {
      float t[kMaxDim] = {0};
      for (int d = 0; d < dim; ++d) axpy(item.q[g * dim + d], basis + d * dim, t, dim);
      float energy = 0;
      for (int d = 0; d < dim; ++d) energy += t[d] * t[d];
      item.kappa[g] = 0.5f * scale * scale * energy / dim;
      float bias = scale * dot(item.q + g * dim, mean, dim);
      for (int f = 0; f < a.max_fields; ++f) {
        const int width = fields[f * 3 + 2];
        const float weight = width ? scale * t[f] * steps[f] : 0;
        item.coded_query[g * dim + f] = weight;
        if (width) bias += weight * (0.5f - float(1 << (width - 1)));
      }
      item.bias[g] = bias;
    }
  }

  static constexpr int kScoreBlock = 256;

  // Neighbouring tokens mostly share a page, so its logits are kept until the page changes.
  void estimate_quest(const Item &item, const int32_t *slots, int count, float (*lhat)[kScoreBlock], float *usable) const {
    const T *bounds = static_cast<const T *>(static_cast<const void *>(a.codes));
    const float scale = float(a.sm_scale), slope = line(item)[1], offset = line(item)[2];
    float current[kMaxGroup];
    int32_t page = -1;
    for (int j = 0; j < count; ++j) {
      usable[j] = a.valid[slots[j]];
      if (slots[j] / kPage != page) {
        page = slots[j] / kPage;
        const T *least = bounds + (int64_t(page) * a.num_kv_heads + item.head) * 2 * dim, *greatest = least + dim;
        for (int g = 0; g < group; ++g) {
          const float *q = item.q + g * dim;
          float middle = 0, half = 0;
#pragma omp simd reduction(+ : middle, half)
          for (int d = 0; d < dim; ++d) {
            const float low = load(least + d), high = load(greatest + d);
            middle += q[d] * (low + high);
            half += std::fabs(q[d]) * (high - low);
          }
          current[g] = item.bias[g] + 0.5f * scale * (slope * middle + offset * half);
        }
      }
      for (int g = 0; g < group; ++g) lhat[g][j] = current[g];
    }
  }

  void estimate_signature(const Item &item, const int32_t *slots, int count, float (*lhat)[kScoreBlock], float *usable) const {
    const int words = a.fields[a.num_layers] / 32, apart = a.words > words ? words : 0;
    const float slope = line(item)[1], offset = line(item)[2];
    for (int j = 0; j < count; ++j) {
      const int64_t at = int64_t(slots[j]) * a.num_kv_heads + item.head;
      usable[j] = a.valid[slots[j]];
      const float norm = norm_of[a.norms[at * a.norm_bytes]];
      const uint32_t *codes = reinterpret_cast<const uint32_t *>(a.codes) + at * a.words;
      for (int g = 0; g < group; ++g) {
        int differing = 0;
        for (int w = 0; w < words; ++w) differing += __builtin_popcount(codes[g * apart + w] ^ item.signature[g * words + w]);
        lhat[g][j] = item.bias[g] + item.kappa[g] * norm * (offset + slope * agreement[differing]);
      }
    }
  }

  // Estimated logits of up to kScoreBlock positions, the squared coding errors, and whether a sketch is usable.
  void estimated(const Item &item, int64_t start, int count, float (*lhat)[kScoreBlock], float *variance, float *usable) const {
    const int32_t *fields = a.fields + item.head * a.max_fields * 3;
    const int32_t *slots = item.slots + start;
    if (a.selector >= kQuest) {
      std::fill_n(variance, count, 0.0f);
      return a.selector == kQuest ? estimate_quest(item, slots, count, lhat, usable) : estimate_signature(item, slots, count, lhat, usable);
    }
    uint32_t words[8][kScoreBlock];
    if (a.is_oracle) {
      for (int j = 0; j < count; ++j) {
        const T *k = row(keys, slots[j], item.head);
        for (int g = 0; g < group; ++g) lhat[g][j] = float(a.sm_scale) * dot(item.q + g * dim, k, dim);
        variance[j] = 0;
        usable[j] = 1;
      }
      return;
    }
    for (int j = 0; j < count; ++j) {
      const int64_t at = int64_t(slots[j]) * a.num_kv_heads + item.head;
      for (int w = 0; w < a.words; ++w) words[w][j] = uint32_t(a.codes[at * a.words + w]);
      const float error = norm_of[a.norms[at * 2]];
      variance[j] = error * error;
      usable[j] = a.valid[slots[j]];
    }
    for (int g = 0; g < group; ++g)
      for (int j = 0; j < count; ++j) lhat[g][j] = item.bias[g];
    for (int f = 0; f < a.max_fields; ++f) {
      const int width = fields[f * 3 + 2];
      if (!width) continue;
      const uint32_t shift = uint32_t(fields[f * 3 + 1]), mask = (1u << width) - 1;
      const uint32_t *word = words[fields[f * 3]];
      float code[kScoreBlock];
#pragma omp simd
      for (int j = 0; j < count; ++j) code[j] = float(int32_t((word[j] >> shift) & mask));
      for (int g = 0; g < group; ++g) {
        const float weight = item.coded_query[g * dim + f];
#pragma omp simd
        for (int j = 0; j < count; ++j) lhat[g][j] += weight * code[j];
      }
    }
  }

  // Estimated weights of positions [from, to) relative to the fixed maximum; adds their sum per head to `sums`.
  // A token without a valid sketch gets kUnusable and is later read for certain.
  void score(Item &item, int64_t from, int64_t to, double *sums) const {
    float lhat[kMaxGroup][kScoreBlock], variance[kScoreBlock], usable[kScoreBlock];
    for (int64_t start = from; start < to; start += kScoreBlock) {
      const int count = int(std::min<int64_t>(kScoreBlock, to - start));
      estimated(item, start, count, lhat, variance, usable);
      for (int g = 0; g < group; ++g) {
        float *out = item.scores + g * a.kv_stride + start;
        const float m = item.fixed[g].max, kappa = a.is_oracle ? 0.0f : item.kappa[g];
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < count; ++j) {
          const float e = fast_exp(std::min(lhat[g][j] + kappa * variance[j] - m, kMaxExponent));
          out[j] = usable[j] != 0 ? e : kUnusable;
          sum += usable[j] != 0 ? e : 0;
        }
        sums[g] += sum;
      }
    }
  }

  float value_norm(const T *v) const {
    float square = 0;
    for (int d = 0; d < dim; ++d) square += load(v + d) * load(v + d);
    return std::sqrt(square);
  }

  // Share of the output (or of the mass) per token, the largest or the mean over the group, left in head 0's row.
  double share(Item &item, int64_t from, int64_t to, const double *sums) const {
    float inverse[kMaxGroup];
    for (int g = 0; g < group; ++g) inverse[g] = float(1.0 / (item.fixed[g].sum + sums[g])) / (a.group_mean ? group : 1);
    float *first = item.scores;
#pragma omp simd
    for (int64_t i = from; i < to; ++i) first[i] *= inverse[0];
    for (int g = 1; g < group; ++g) {
      const float *other = item.scores + g * a.kv_stride;
      if (a.group_mean) {
#pragma omp simd
        for (int64_t i = from; i < to; ++i) first[i] += other[i] * inverse[g];
      } else {
#pragma omp simd
        for (int64_t i = from; i < to; ++i) first[i] = std::max(first[i], other[i] * inverse[g]);
      }
    }
    double total = 0;
    const bool with_norm = a.is_output && !a.is_uniform;
    for (int64_t i = from; i < to; ++i) {
      if (with_norm) {
        const int64_t at = int64_t(item.slots[i]) * a.num_kv_heads + item.head;
        first[i] *= a.is_oracle ? value_norm(row(values, item.slots[i], item.head)) : norm_of[a.norms[(at + 1) * a.norm_bytes - 1]];
      }
      total += std::max(first[i], 0.0f);
    }
    return total;
  }

  // Inclusion rank r = u / a: a token is read at scale c when r < c.
  double rank(Item &item, int64_t from, int64_t to, double share_sum) const {
    const uint32_t key = stream_key(uint32_t(a.seed), uint32_t(a.layer_id), uint32_t(item.head), uint32_t(item.n));
    const float base = float(a.floor * share_sum / item.range);
    double total = 0;
    float *shares = item.scores, *ranks = item.ranks;
    float partial = 0;
#pragma omp simd reduction(+ : partial)
    for (int64_t i = from; i < to; ++i) {
      const bool usable = shares[i] >= 0;
      const float s = usable ? std::max(shares[i], kTiny) + base : kForced;
      shares[i] = s;
      ranks[i] = usable ? uniform01(uint32_t(i), key) / s : 0.0f;
      partial += usable ? s : 0.0f;
    }
    total = partial;
    return total;
  }

  // Per-thread buffers; matrices are [head][list entry] with row stride `stride`.
  struct Scratch {
    std::vector<int32_t> list;
    std::vector<const T *> k_rows, v_rows;
    std::vector<float> logits, masses, weighted, distances, weight, square, share;
    std::vector<uint8_t> member;
    int64_t stride = 0;
    Partial audit[kMaxGroup];

    void reserve(int64_t entries, int group) {
      if (entries <= stride && size_t(stride * group) <= logits.size()) return;
      stride = std::max(stride, (entries + 1023) / 1024 * 1024);
      for (auto *matrix : {&logits, &masses, &weighted, &distances}) matrix->resize(size_t(stride * group));
      for (auto *row : {&weight, &square, &share}) row->resize(size_t(stride));
      k_rows.resize(size_t(stride));
      v_rows.resize(size_t(stride));
      list.resize(size_t(stride));
    }
  };

  struct HeadState {
    float out[kMaxDim];
    double sum, norm;
    float max, half_width;
  };
  static constexpr int64_t kHeadStride = sizeof(HeadState) / sizeof(float);

  // Logits and value norms of list entries [from, to).
  void read(const Item &item, Scratch &s, int64_t from, int64_t to) const {
    for (int64_t j = from; j < to; ++j) {
      s.k_rows[j] = row(keys, item.slots[s.list[j]], item.head);
      s.v_rows[j] = row(values, item.slots[s.list[j]], item.head);
    }
    dots(item.q, group, s.k_rows.data() + from, to - from, float(a.sm_scale), s.logits.data() + from, s.stride, dim);
    for (int64_t j = from; j < to; ++j) {
      if (j + kAhead < to) prefetch(s.v_rows[j + kAhead], dim);
      float square = 0;
#pragma omp simd reduction(+ : square)
      for (int d = 0; d < dim; ++d) square += load(s.v_rows[j] + d) * load(s.v_rows[j] + d);
      s.square[j] = square;
    }
  }

  // Ratio estimates of all heads from the first `count` list entries and their inverse inclusion weights, then
  // d^2 = y^2 |v - o|^2 (target output) or y^2 (denominator) of every entry.
  void estimate(const Item &item, Scratch &s, int64_t count, HeadState *heads) const {
    for (int g = 0; g < group; ++g) {
      HeadState &h = heads[g];
      const Partial &fixed = item.fixed[g];
      const float *logits = s.logits.data() + g * s.stride, *weight = s.weight.data();
      float *masses = s.masses.data() + g * s.stride, *weighted = s.weighted.data() + g * s.stride;
      float m = fixed.max, sum = 0;
      for (int64_t j = 0; j < count; ++j) m = std::max(m, logits[j]);
      h.max = m;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < count; ++j) {
        masses[j] = fast_exp(logits[j] - m);
        weighted[j] = weight[j] * masses[j];
        sum += weighted[j];
      }
      const float rescale = fast_exp(fixed.max - m);
      h.sum = double(fixed.sum) * rescale + sum;
      for (int d = 0; d < dim; ++d) h.out[d] = fixed.acc[d] * rescale;
    }
    accumulate(s.weighted.data(), s.stride, group, s.v_rows.data(), count, heads[0].out, kHeadStride, dim);
    float outs[kMaxGroup * kMaxDim];
    for (int g = 0; g < group; ++g) {
      HeadState &h = heads[g];
      const float inverse = float(1.0 / h.sum);
      double square = 0;
      for (int d = 0; d < dim; ++d) {
        h.out[d] *= inverse;
        outs[g * dim + d] = h.out[d];
        square += double(h.out[d]) * h.out[d];
      }
      h.norm = std::sqrt(square);
    }
    if (a.is_output) dots(outs, group, s.v_rows.data(), count, 1.0f, s.distances.data(), s.stride, dim);
    for (int g = 0; g < group; ++g) {
      const float *masses = s.masses.data() + g * s.stride, norm2 = float(heads[g].norm * heads[g].norm);
      float *distances = s.distances.data() + g * s.stride;
      for (int64_t j = 0; j < count; ++j) {
        const float gap = a.is_output ? std::max(s.square[j] - 2 * distances[j] + norm2, 0.0f) : 1.0f;
        distances[j] = masses[j] * masses[j] * gap;
      }
    }
  }

  double tolerance(const HeadState &h) const { return std::max(h.sum * (a.is_output ? h.norm : 1.0), kLeastUnit); }

  // A half-width that telemetry can add up, whatever the inputs were.
  static float bounded(double half_width) { return half_width < kMostHalfWidth ? float(half_width) : kMostHalfWidth; }


  // Largest scale at which the expected reads stay within the cap, or `c` when they already do.
  float limit_scale(const Item &item, float scale, bool &capped) const {
    if (a.cap >= 1.0) return scale;
    const double allowed = a.cap * double(item.range);
    const auto reads = [&](double c) {
      double total = 0;
      for (int64_t i = item.lo; i < item.hi; ++i) total += std::min(1.0, c * item.scores[i]);
      return total;
    };
    if (reads(scale) <= allowed) return scale;
    capped = true;
    double low = 0, high = scale;
    for (int step = 0; step < 40; ++step) {
      const double middle = 0.5 * (low + high);
      (reads(middle) <= allowed ? low : high) = middle;
    }
    return float(low);
  }

  void proportional(Item &item, Scratch &s, HeadState *heads, float *stats) const {
    const float epsilon = a.params[0];
    const float pilot = float(std::max<double>(a.pilot_min, std::ceil(a.pilot * item.range)));
    float scale = pilot / std::max(item.score_sum, kTiny), previous = -1;
    bool capped = false;
    scale = limit_scale(item, scale, capped);
    s.reserve(item.range + 1, group);
    int64_t count = 0;
    for (int round = 0;; ++round) {
      const int64_t old = count;
      int32_t *list = s.list.data();
      for (int64_t i = item.lo; i < item.hi; ++i) {
        list[count] = int32_t(i);
        count += item.ranks[i] < scale && item.ranks[i] >= previous;
      }
      previous = scale;
      read(item, s, old, count);
      for (int64_t j = old; j < count; ++j) s.share[j] = item.scores[list[j]];
      // Once everything was read nothing is left to estimate.
      const bool whole = count == item.range;
      for (int64_t j = 0; j < count; ++j) s.weight[j] = whole ? 1.0f : 1.0f / std::min(1.0f, scale * s.share[j]);
      estimate(item, s, count, heads);
      float next = scale;
      bool certified = true;
      for (int g = 0; g < group; ++g) {
        HeadState &h = heads[g];
        const float *distances = s.distances.data() + g * s.stride, *weight = s.weight.data(), *share = s.share.data();
        const double unit = tolerance(h);
        const float per_unit = float(1.0 / unit);
        double variance = 0, square = 0;
#pragma omp simd reduction(+ : variance, square)
        for (int64_t j = 0; j < count; ++j) {
          const float w = weight[j], t = w * (w - 1.0f) * (distances[j] * per_unit * per_unit);
          variance += t;
          square += t * t * (1.0f - 1.0f / w);
        }
        const double inverse_nu = variance > 0 ? square / (2 * variance * variance) : 0;
        const float factor = quantile(inverse_nu);
        h.half_width = bounded(factor * std::sqrt(variance));
        certified = certified && h.half_width <= epsilon;
        const double aim = epsilon / (round == 0 ? kFirstRoundQuantile : factor);
        float c = scale;
        if (variance > aim * aim)
          for (int step = 0; step < 12; ++step) {
            double linear = 0, constant = 0;
#pragma omp simd reduction(+ : linear, constant)
            for (int64_t j = 0; j < count; ++j) {
              const float w = share[j] * c < 1 ? weight[j] * (distances[j] * per_unit * per_unit) : 0.0f;
              linear += w / share[j];
              constant += w;
            }
            const float solved = float(linear / (aim * aim + constant));
            if (!(solved > c * 1.0005f)) break;
            c = solved;
          }
        const double guard = kGuardShare / (epsilon * (a.is_output ? std::max(h.norm, 1e-30) : 1.0));
        next = std::max(next, float(std::min(std::max(double(c), guard), 1e29)));
      }
      if (whole || (round > 0 && certified) || round == kRounds - 1) break;
      if (round > 0) next = std::max(next, scale * kLeastGrowth);
      next = std::max(scale, limit_scale(item, next, capped));
      if (capped && next <= scale) break;
      scale = next;
    }
    for (int g = 0; g < group; ++g) {
      const HeadState &h = heads[g];
      float *row = stats + g * 6;
      row[1] = float(count);
      row[2] = h.half_width;
      row[3] = h.half_width <= epsilon ? 0.0f : capped ? 2.0f : 1.0f;
      row[4] = float(item.n - item.range + count);
      row[5] = float(1.0 - double(item.fixed[g].sum) * fast_exp(item.fixed[g].max - h.max) / h.sum);
    }
  }

  void uniform(Item &item, Scratch &s, HeadState *heads, float *stats, int64_t &top_k_read) const {
    const float epsilon = a.params[0];
    const int64_t n = item.range;
    const int64_t wanted = a.top_k_count >= 0 ? a.top_k_count : int64_t(std::ceil(a.top_k_share * double(n)));
    const int64_t top_k = std::min(n, wanted);
    s.member.assign(size_t(n), 0);
    s.reserve(n + top_k, group);
    const float *shares = item.scores + item.lo;
    for (int64_t i = 0; i < n; ++i) s.list[i] = int32_t(i);
    if (top_k > 0 && top_k < n)
      std::nth_element(s.list.begin(), s.list.begin() + top_k, s.list.begin() + n,
                       [&](int32_t x, int32_t y) { return shares[x] > shares[y] || (shares[x] == shares[y] && x < y); });
    for (int64_t j = 0; j < top_k; ++j) {
      s.member[s.list[j]] = 1;
      s.list[j] += int32_t(item.lo);
    }
    read(item, s, 0, top_k);
    const Permutation permute(uint32_t(n), stream_key(uint32_t(a.seed), uint32_t(a.layer_id), uint32_t(item.head), uint32_t(item.n)));
    const int64_t pilot = std::min(n, std::max<int64_t>(a.pilot_min, int64_t(std::ceil(a.pilot * double(n)))));
    const int64_t most = std::max(pilot, int64_t(std::floor(a.cap * double(n))));
    int64_t budget = pilot, drawn = 0, count = top_k;
    bool cut[kMaxGroup] = {false};
    for (int round = 0; round < 2; ++round) {
      const int64_t old = count;
      for (; drawn < budget; ++drawn) {
        const uint32_t image = permute(uint32_t(drawn));
        if (!s.member[image]) s.list[count++] = int32_t(item.lo + image);
      }
      read(item, s, old, count);
      const float expand = float(double(n) / double(budget));
      for (int64_t j = 0; j < count; ++j) s.weight[j] = j < top_k ? 1.0f : expand;
      estimate(item, s, count, heads);
      int64_t next = budget;
      for (int g = 0; g < group; ++g) {
        HeadState &h = heads[g];
        const float *distances = s.distances.data() + g * s.stride, *masses = s.masses.data() + g * s.stride;
        double squares = 0, mass = 0;
        for (int64_t j = top_k; j < count; ++j) {
          squares += distances[j];
          mass += masses[j];
        }
        float along[kMaxDim] = {0};
        if (a.is_output) accumulate(masses + top_k, s.stride, 1, s.v_rows.data() + top_k, count - top_k, along, dim, dim);
        double mean_square = mass * mass;
        if (a.is_output) {
          mean_square = 0;
          for (int d = 0; d < dim; ++d) {
            const double x = along[d] - mass * h.out[d];
            mean_square += x * x;
          }
        }
        const double sigma2 = std::max(0.0, (squares - mean_square / double(budget)) / double(budget - 1));
        const double unit = tolerance(h), z = quantile(1.0 / double(budget - 1));
        h.half_width = bounded(z * double(n) * std::sqrt(sigma2 * std::max(0.0, 1.0 / double(budget) - 1.0 / double(n))) / unit);
        if (round == 0) {
          const double root = z * double(n) * std::sqrt(sigma2) / (epsilon * unit), infinite = root * root;
          int64_t b = std::max(pilot, int64_t(std::ceil(std::isfinite(infinite) ? n * infinite / (n + infinite) : double(n))));
          cut[g] = b > most;
          next = std::max(next, std::min(b, most));
        }
      }
      budget = next;
      if (budget == drawn) break;
    }
    for (int g = 0; g < group; ++g) {
      const HeadState &h = heads[g];
      float *row = stats + g * 6;
      row[1] = float(budget);
      row[2] = h.half_width;
      row[3] = cut[g] ? 2.0f : h.half_width <= epsilon * (1 + kRounding) ? 0.0f : 1.0f;
      row[4] = float(item.n - n + count);
      row[5] = float(1.0 - double(item.fixed[g].sum) * fast_exp(item.fixed[g].max - h.max) / h.sum);
    }
    top_k_read = top_k;
  }

  void observe(double *block, const float *edges, int64_t num_edges, float value) const {
    block[0] += value;
    block[1 + (std::lower_bound(edges, edges + num_edges, value) - edges)] += 1;
  }

  // Counters of one item; blocks and their entries are in the order that ops.py states.
  void count(const Item &item, const float *stats, int64_t top_k_read, const float *audit_error) const {
    double *row = a.counters;
    const int64_t *at = a.counter_offsets;
#pragma omp critical(vattn_count)
    for (int g = 0; g < group; ++g) {
      const float *st = stats + g * 6;
      row[at[0]] += double(item.n);
      row[at[2] + int64_t(st[3])] += 1;
      if (item.dense) {
        row[at[1] + 4] += double(item.n);
        continue;
      }
      row[at[1] + 0] += double(item.lo);
      row[at[1] + 1] += double(item.n - item.hi);
      row[at[1] + 2] += double(top_k_read);
      row[at[1] + 3] += double(st[4]) - double(item.n - item.range + top_k_read);
      observe(row + at[3], a.budget_edges, a.num_budget_edges, st[1]);
      observe(row + at[4], a.error_edges, a.num_error_edges, st[2]);
      if (item.audited) {
        row[at[5]] += 1;
        row[at[5] + 1] += audit_error[g] > a.params[0];
        observe(row + at[6], a.audit_edges, a.num_audit_edges, audit_error[g]);
      }
    }
  }

  void write(const Item &item, int g, const float *o) const {
    T *out = static_cast<T *>(a.out) + (item.request * a.num_qo_heads + item.head * group + g) * dim;
    for (int d = 0; d < dim; ++d) store(out + d, o[d]);
  }

  void sample(Item &item, Scratch &s) const {
    HeadState heads[kMaxGroup];
    float *stats = a.stats + (item.request * a.num_qo_heads + item.head * group) * 6;
    float audit_error[kMaxGroup] = {0};
    int64_t top_k_read = 0;
    if (a.is_uniform)
      uniform(item, s, heads, stats, top_k_read);
    else
      proportional(item, s, heads, stats);
    if (item.audited) {
      clear(s.audit);
      attend(item, 0, item.n, s.audit);
    }
    for (int g = 0; g < group; ++g) {
      stats[g * 6] = stats[g * 6 + 4] / float(item.n);
      write(item, g, heads[g].out);
      if (!item.audited) continue;
      double gap = 0, norm = 0;
      for (int d = 0; d < dim; ++d) {
        const double exact = double(s.audit[g].acc[d]) / s.audit[g].sum, x = heads[g].out[d] - exact;
        gap += x * x;
        norm += exact * exact;
      }
      audit_error[g] = float(std::sqrt(gap / std::max(norm, 1e-300)));
    }
    count(item, stats, top_k_read, audit_error);
  }

  void finish_dense(const Item &item, Partial *parts, int64_t chunks) const {
    float *stats = a.stats + (item.request * a.num_qo_heads + item.head * group) * 6;
    for (int g = 0; g < group; ++g) {
      for (int64_t c = 1; c < chunks; ++c) merge(parts[g], parts[c * group + g], dim);
      float o[kMaxDim];
      for (int d = 0; d < dim; ++d) o[d] = item.n > 0 ? parts[g].acc[d] / parts[g].sum : 0;
      write(item, g, o);
      const float row[6] = {1, 0, 0, 3, float(item.n), 0};
      std::memcpy(stats + g * 6, row, sizeof row);
    }
    if (item.n > 0) count(item, stats, 0, nullptr);
  }

  void run() const {
    static thread_local std::vector<Item> items;
    static thread_local std::vector<Partial> parts;
    static thread_local std::vector<double> sums, shares, ranks;
    struct Task {
      int64_t item, chunk;
    };
    static thread_local std::vector<Task> tasks;
    const int64_t total = a.batch * a.num_kv_heads;
    items.resize(size_t(total));
    tasks.clear();
    int64_t chunks = 1;
    for (int64_t b = 0; b < a.batch; ++b) chunks = std::max(chunks, (seq_len(b) + kChunk - 1) / kChunk);
    for (int64_t i = 0; i < total; ++i)
      for (int64_t c = 0; c * kChunk < std::max<int64_t>(seq_len(i / a.num_kv_heads), 1); ++c) tasks.push_back({i, c});
    parts.resize(size_t(total * chunks * group));
    sums.assign(size_t(total * chunks * kMaxGroup), 0);
    shares.assign(size_t(total * chunks), 0);
    ranks.assign(size_t(total * chunks), 0);

    Item *const items_ = items.data();
    Partial *const parts_ = parts.data();
    double *const sums_ = sums.data(), *const shares_ = shares.data(), *const ranks_ = ranks.data();
    const Task *const tasks_ = tasks.data();
    const int64_t num_tasks = int64_t(tasks.size());
    // Chunks of the sampled range are cut at multiples of kChunk of the position, so a task's bounds are fixed.
    const auto bounds = [&](const Task &t, int64_t &from, int64_t &to) {
      const Item &item = items_[t.item];
      from = std::max(t.chunk * kChunk, item.dense ? int64_t(0) : item.lo);
      to = std::min((t.chunk + 1) * kChunk, item.dense ? item.n : item.hi);
    };
    const auto total_of = [&](const double *part, int64_t item) {
      double sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += part[item * chunks + c];
      return sum;
    };
#pragma omp parallel num_threads(int(a.threads))
    {
      static thread_local Scratch scratch;
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < total; ++i) prepare(items_[i], i);
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < num_tasks; ++t) {
        int64_t from, to;
        bounds(tasks_[t], from, to);
        Item &item = items_[tasks_[t].item];
        const int64_t at = tasks_[t].item * chunks + tasks_[t].chunk;
        if (item.dense) {
          clear(parts_ + at * group);
          attend(item, from, to, parts_ + at * group);
        } else {
          score(item, from, to, sums_ + at * kMaxGroup);
        }
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < num_tasks; ++t) {
        Item &item = items_[tasks_[t].item];
        if (item.dense) continue;
        int64_t from, to;
        bounds(tasks_[t], from, to);
        double sum[kMaxGroup] = {0};
        for (int64_t c = 0; c < chunks; ++c)
          for (int g = 0; g < group; ++g) sum[g] += sums_[(tasks_[t].item * chunks + c) * kMaxGroup + g];
        shares_[tasks_[t].item * chunks + tasks_[t].chunk] = share(item, from, to, sum);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < num_tasks; ++t) {
        Item &item = items_[tasks_[t].item];
        if (item.dense || a.is_uniform) continue;
        int64_t from, to;
        bounds(tasks_[t], from, to);
        ranks_[tasks_[t].item * chunks + tasks_[t].chunk] = rank(item, from, to, total_of(shares_, tasks_[t].item));
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < total; ++i) {
        Item &item = items_[i];
        if (item.dense) {
          finish_dense(item, parts_ + i * chunks * group, std::max<int64_t>(1, (item.n + kChunk - 1) / kChunk));
        } else {
          item.score_sum = float(total_of(ranks_, i));
          sample(item, scratch);
        }
      }
    }
  }
};

template <typename T> void encode(const EncodeArgs &a) {
  const int dim = int(a.head_dim);
#pragma omp parallel for schedule(static) num_threads(int(a.threads))
  for (int64_t i = 0; i < a.num_slots * a.num_kv_heads; ++i) {
    const int64_t slot = a.slots[i / a.num_kv_heads], head = i % a.num_kv_heads;
    const int64_t at = slot * a.num_kv_heads + head;
    const T *k = static_cast<const T *>(a.k_cache) + at * dim, *v = static_cast<const T *>(a.v_cache) + at * dim;
    const float *mean = a.mean + head * dim, *basis = a.key_basis + head * dim * dim, *steps = a.steps + head * a.max_fields;
    const int32_t *fields = a.fields + head * a.max_fields * 3;
    float z[kMaxDim] = {0};
    for (int d = 0; d < dim; ++d) axpy(load(k + d) - mean[d], basis + d * dim, z, dim);
    float error = 0, square = 0;
    uint32_t words[8] = {0};
    for (int d = 0; d < dim; ++d) {
      float residual = z[d];
      if (d < a.max_fields && fields[d * 3 + 2]) {
        const int half = 1 << (fields[d * 3 + 2] - 1);
        const int code = std::min(std::max(int(std::floor(std::min(std::max(z[d] / steps[d], -64.0f), 64.0f))), -half), half - 1);
        residual -= (float(code) + 0.5f) * steps[d];
        words[fields[d * 3]] |= uint32_t(code + half) << fields[d * 3 + 1];
      }
      error += residual * residual;
      square += load(v + d) * load(v + d);
    }
    for (int w = 0; w < a.words; ++w) a.codes[at * a.words + w] = int32_t(words[w]);
    a.norms[at * 2] = level_of(std::sqrt(error));
    a.norms[at * 2 + 1] = level_of(std::sqrt(square));
    if (head == 0) a.valid[slot] = 1;
  }
}

template <typename T> void encode_signature(const SignatureArgs &a) {
  const int dim = int(a.head_dim);
  const int64_t per_head = a.num_nets / a.num_kv_heads, words = a.words / per_head;
  int64_t size = 0;
  for (int64_t l = 0; l < a.num_layers; ++l) size += (a.widths[l] + 1) * a.widths[l + 1];
#pragma omp parallel for schedule(static) num_threads(int(a.threads))
  for (int64_t i = 0; i < a.num_slots * a.num_kv_heads; ++i) {
    const int64_t slot = a.slots[i / a.num_kv_heads], head = i % a.num_kv_heads;
    const int64_t at = slot * a.num_kv_heads + head;
    const T *k = static_cast<const T *>(a.k_cache) + at * dim, *v = static_cast<const T *>(a.v_cache) + at * dim;
    float key[kMaxDim], offset[kMaxDim];
    for (int d = 0; d < dim; ++d) {
      key[d] = load(k + d);
      offset[d] = key[d] - a.mean[head * dim + d];
    }
    for (int64_t n = 0; n < per_head; ++n)
      signature_of(a.centred ? offset : key, a.nets + (head * per_head + n) * size, a.widths, a.num_layers,
                   reinterpret_cast<uint32_t *>(a.codes) + at * a.words + n * words);
    a.norms[at * 2] = level_of(norm_of_row(offset, dim));
    a.norms[at * 2 + 1] = level_of(norm_of_row(v, dim));
    if (head == 0) a.valid[slot] = 1;
  }
}

template <typename T> void encode_pages(const PageArgs &a) {
  const int dim = int(a.head_dim);
  const T *keys = static_cast<const T *>(a.k_cache), *values = static_cast<const T *>(a.v_cache);
  std::vector<int64_t> touched(size_t(a.num_slots));
  for (int64_t i = 0; i < a.num_slots; ++i) {
    const int64_t slot = a.slots[i];
    touched[i] = slot / kPage;
    a.valid[slot] = 1;
    for (int64_t at = slot * a.num_kv_heads; at < (slot + 1) * a.num_kv_heads; ++at)
      a.norms[at] = level_of(norm_of_row(values + at * dim, dim));
  }
  std::sort(touched.begin(), touched.end());
  touched.erase(std::unique(touched.begin(), touched.end()), touched.end());
#pragma omp parallel for schedule(static) num_threads(int(a.threads))
  for (int64_t i = 0; i < int64_t(touched.size()) * a.num_kv_heads; ++i) {
    const int64_t page = touched[i / a.num_kv_heads], head = i % a.num_kv_heads;
    T *least = static_cast<T *>(a.bounds) + (page * a.num_kv_heads + head) * 2 * dim, *greatest = least + dim;
    bool first = true;
    for (int64_t slot = page * kPage; slot < std::min((page + 1) * kPage, a.pool_slots); ++slot) {
      if (!a.valid[slot]) continue;
      const T *k = keys + (slot * a.num_kv_heads + head) * dim;
      for (int d = 0; d < dim; ++d) {
        if (first || load(k + d) < load(least + d)) least[d] = k[d];
        if (first || load(k + d) > load(greatest + d)) greatest[d] = k[d];
      }
      first = false;
    }
  }
}

} // namespace

extern "C" void vattn_decode(const DecodeArgs *args) {
  if (args->is_bf16)
    Decode<uint16_t>(*args).run();
  else
    Decode<float>(*args).run();
}

extern "C" void vattn_encode(const EncodeArgs *args) {
  if (args->is_bf16)
    encode<uint16_t>(*args);
  else
    encode<float>(*args);
}

extern "C" void vattn_encode_signature(const SignatureArgs *args) {
  if (args->is_bf16)
    encode_signature<uint16_t>(*args);
  else
    encode_signature<float>(*args);
}

extern "C" void vattn_encode_pages(const PageArgs *args) {
  if (args->is_bf16)
    encode_pages<uint16_t>(*args);
  else
    encode_pages<float>(*args);
}

extern "C" int64_t vattn_args_size(int64_t which) {
  const int64_t sizes[] = {sizeof(DecodeArgs), sizeof(EncodeArgs), sizeof(SignatureArgs), sizeof(PageArgs)};
  return sizes[which];
}
