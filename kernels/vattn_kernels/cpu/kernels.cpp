// CPU implementation of the ops in vattn_kernels/ops.py; contract there, truth in vattn_kernels/reference.
// One work item is one (request, KV head): its query heads share the index set. Long items are cut into chunks of
// tokens, so that one request keeps every core busy.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <omp.h>
#include <vector>

namespace {

constexpr int kMaxGroup = 16;
constexpr int kTotals = kMaxGroup + 1;
constexpr int kMaxDim = 256;
constexpr int kChunk = 512;  // Tokens of a task: small enough that three KV heads keep an even number of cores busy.
constexpr int kBlock = 64;
constexpr int kRounds = 48;
constexpr int kPatience = 8;
constexpr int kSweeps = 2;
constexpr float kFirstRoundQuantile = 1.2f;
constexpr float kGuardShare = 12.0f;
constexpr double kRankedShare = 2.0 / 3.0, kMostShare = 0.06;
constexpr float kLeastGrowth = 1.05f, kImpatientGrowth = 2.0f;
constexpr float kTiny = 1e-30f;
constexpr float kForced = 1e30f, kMostScale = 1e29f;
constexpr float kUnusable = -1.0f;
constexpr float kMaxExponent = 60.0f, kMostHalfVariance = 8.0f;
constexpr float kRounding = 1e-6f;
constexpr double kLeastUnit = 1e-15;
constexpr float kMostHalfWidth = 1e3f;
// Targets and the errors they bound, in the order of vattn_kernels/cpu/__init__.py.
enum Error : int { kOutput, kDenominator, kNumerator, kBoth };
constexpr int kMaxParts = 2;
constexpr int kGridSteps = 16;
constexpr double kLeastStep = 1.0001;
constexpr double kVarianceAndRange = 8.0 / 3.0, kRange = 2.0 / 3.0;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Half a step of a norm byte, and the rounding of a float32 logit: an upper bound lies above both.
constexpr float kHalfStep = 0.501f, kMargin = 1e-4f;

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
  int64_t batch, num_qo_heads, num_kv_heads, head_dim, kv_stride, max_fields, words;
  int64_t num_budget_edges, num_error_edges, num_audit_edges;
  int64_t layer_id, seed, sink, window, dense_below, top_k_count, pilot_min, workspace_stride;
  int64_t seq_lens_is_int64, is_bf16, is_uniform, target, selector, threads;
  double sm_scale, top_k_share, pilot, cap, floor, audit_rate;
  int64_t table, log_term, table_points, table_steps;
  int64_t group_mean, norm_bytes, num_layers;
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
  const void *k_cache;
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

inline uint32_t scramble(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  return x * 0x846ca68bu;
}
inline uint32_t mix(uint32_t x) {
  x = scramble(x);
  return x ^ (x >> 16);
}
constexpr uint32_t kGolden = 0x9E3779B1u;

inline uint32_t stream_key(uint32_t seed, uint32_t layer, uint32_t head, uint32_t n) {
  uint32_t x = seed;
  for (const uint32_t t : {layer, head, n}) x = mix((x ^ (t * kGolden)) + 0x7F4A7C15u);
  return x;
}
inline float uniform01(uint32_t i, uint32_t key) { return float(scramble(i * kGolden + key) >> 9) * 0x1p-23f; }

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
  // L of bound bernstein; 0 for the others.
  const double log_term;
  int parts[kMaxParts];
  int num_parts, num_bounded;
  // Scores with a scale of their own: one a head, or one for the group.
  int score_rows;
  double factor;
  float norm_of[256], upper_of[256], agreement[kMaxBits + 1];

  explicit Decode(const DecodeArgs &args)
      : a(args), dim(int(args.head_dim)), group(int(args.num_qo_heads / args.num_kv_heads)),
        keys(static_cast<const T *>(args.k_cache)), values(static_cast<const T *>(args.v_cache)),
        log_term(args.params[args.log_term]) {
    const bool both = a.target == kBoth;
    parts[0] = both ? int(kNumerator) : int(a.target);
    parts[1] = kDenominator;
    num_bounded = both ? 2 : 1;
    num_parts = log_term > 0 && a.target == kOutput ? 2 : num_bounded;
    factor = both ? 2 : 1;
    score_rows = a.is_uniform || a.group_mean || log_term > 0 ? 1 : group;
    for (int i = 0; i < 256; ++i) {
      norm_of[i] = std::exp2(float(i - 128) / 8.0f);
      upper_of[i] = i == 255 ? std::numeric_limits<float>::infinity() : std::exp2((float(i - 128) + kHalfStep) / 8.0f);
    }
    const int bits = a.selector >= kSign ? a.fields[a.num_layers] : 0;
    for (int i = 0; i <= bits && bits; ++i) {
      const double part = double(i) / bits;
      agreement[i] = float(a.selector == kSign ? std::cos(M_PI * part) : 1 - 2 * part);
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
    float *scores = nullptr, *draws = nullptr;
    // Least score of each row, added to every score; sum of the largest share of each token.
    float floors[kMaxGroup];
    double share_sum = 0;
    // Denominator of each head by the scores, relative to the fixed maximum; their shares are relative to it.
    double mass[kMaxGroup];
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
    item.draws = item.scores + int64_t(group) * a.kv_stride;
    const uint32_t key = stream_key(uint32_t(a.seed) + 0x5bd1e995u, uint32_t(a.layer_id), uint32_t(item.head), uint32_t(item.n));
    item.audited = !item.dense && uniform01(uint32_t(item.request), key) < a.audit_rate;
    const T *q = static_cast<const T *>(a.q) + (item.request * a.num_qo_heads + item.head * group) * dim;
    for (int i = 0; i < group * dim; ++i) item.q[i] = load(q + i);
    clear(item.fixed);
    if (item.dense) return;
    attend(item, 0, item.lo, item.fixed);
    attend(item, item.hi, item.n, item.fixed);
    if (a.selector == kSketch) project(item);
    if (a.selector >= kQuest) project_on_line(item);
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

  static constexpr int kScoreBlock = 256, kStretch = 32;

  // Estimated logits of a block of tokens, and the squared errors of their codes (0 but for `sketch`); a token with
  // usable 0 has no valid side data.
  struct Estimates {
    float lhat[kMaxGroup][kScoreBlock], variance[kScoreBlock] = {}, usable[kScoreBlock];
    uint32_t words[8][kScoreBlock];
  };

  void estimate_oracle(const Item &item, const int32_t *slots, int count, Estimates &e) const {
    for (int j = 0; j < count; ++j) {
      const T *k = row(keys, slots[j], item.head);
      for (int g = 0; g < group; ++g) e.lhat[g][j] = float(a.sm_scale) * dot(item.q + g * dim, k, dim);
      e.usable[j] = 1;
    }
  }

  void estimate_sketch(const Item &item, const int32_t *slots, int count, Estimates &e) const {
    const int32_t *fields = a.fields + item.head * a.max_fields * 3;
    for (int j = 0; j < count; ++j) {
      const int64_t at = int64_t(slots[j]) * a.num_kv_heads + item.head;
      for (int w = 0; w < a.words; ++w) e.words[w][j] = uint32_t(a.codes[at * a.words + w]);
      const float error = norm_of[a.norms[at * 2]];
      e.variance[j] = error * error;
      e.usable[j] = a.valid[slots[j]];
    }
    for (int g = 0; g < group; ++g)
      for (int j = 0; j < count; ++j) e.lhat[g][j] = item.bias[g];
    for (int f = 0; f < a.max_fields; ++f) {
      const int width = fields[f * 3 + 2];
      if (!width) continue;
      const uint32_t shift = uint32_t(fields[f * 3 + 1]), mask = (1u << width) - 1;
      const uint32_t *word = e.words[fields[f * 3]];
      float code[kScoreBlock];
#pragma omp simd
      for (int j = 0; j < count; ++j) code[j] = float(int32_t((word[j] >> shift) & mask));
      for (int g = 0; g < group; ++g) {
        const float weight = item.coded_query[g * dim + f];
#pragma omp simd
        for (int j = 0; j < count; ++j) e.lhat[g][j] += weight * code[j];
      }
    }
  }

  // Neighbouring tokens mostly share a page, so its logits are kept until the page changes. With `upper` it is the
  // greatest that a key between the bounds can have, before the line.
  void estimate_quest(const Item &item, const int32_t *slots, int count, bool upper, Estimates &e) const {
    const T *bounds = static_cast<const T *>(static_cast<const void *>(a.codes));
    const float scale = float(a.sm_scale), slope = upper ? 1 : line(item)[1], offset = upper ? 1 : line(item)[2];
    float current[kMaxGroup];
    int32_t page = -1;
    for (int j = 0; j < count; ++j) {
      e.usable[j] = a.valid[slots[j]];
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
          current[g] = (upper ? 0 : item.bias[g]) + 0.5f * scale * (slope * middle + offset * half);
        }
      }
      for (int g = 0; g < group; ++g) e.lhat[g][j] = current[g];
    }
  }

  void estimate_signature(const Item &item, const int32_t *slots, int count, Estimates &e) const {
    const int words = a.fields[a.num_layers] / 32, apart = a.words > words ? words : 0;
    const float slope = line(item)[1], offset = line(item)[2];
    for (int j = 0; j < count; ++j) {
      const int64_t at = int64_t(slots[j]) * a.num_kv_heads + item.head;
      e.usable[j] = a.valid[slots[j]];
      const float norm = norm_of[a.norms[at * a.norm_bytes]];
      const uint32_t *codes = reinterpret_cast<const uint32_t *>(a.codes) + at * a.words;
      for (int g = 0; g < group; ++g) {
        int differing = 0;
        for (int w = 0; w < words; ++w) differing += __builtin_popcount(codes[g * apart + w] ^ item.signature[g * words + w]);
        e.lhat[g][j] = item.bias[g] + item.kappa[g] * norm * (offset + slope * agreement[differing]);
      }
    }
  }

  void estimated(const Item &item, int64_t start, int count, Estimates &e) const {
    const int32_t *slots = item.slots + start;
    switch (a.selector) {
    case kSketch: return estimate_sketch(item, slots, count, e);
    case kOracle: return estimate_oracle(item, slots, count, e);
    case kQuest: return estimate_quest(item, slots, count, false, e);
    default: return estimate_signature(item, slots, count, e);
    }
  }

  // Provable upper bounds in place of the estimated logits, whatever the keys are; `sign` and `hash` have none.
  void upper_bounds(const Item &item, int64_t start, int count, Estimates &e) const {
    if (a.selector == kQuest) return estimate_quest(item, item.slots + start, count, true, e);
    estimated(item, start, count, e);
    if (a.selector != kSketch) return;
    for (int g = 0; g < group; ++g) {
      const float length = float(std::sqrt(2.0 * item.kappa[g] * dim));
      for (int j = 0; j < count && length > 0; ++j)
        e.lhat[g][j] += length * upper_of[a.norms[(int64_t(item.slots[start + j]) * a.num_kv_heads + item.head) * 2]];
    }
  }

  // Scores of these are off by more than the values' norms differ, and the tokens that matter most have short values.
  bool is_coarse() const { return a.selector >= kQuest; }

  // Rank tokens better than they weigh them (quantiles.py, RANKING_SELECTORS).
  bool is_ranking() const { return a.selector == kQuest || a.selector == kHash; }

  // Estimated weights of positions [from, to) relative to the fixed maximum; adds their sum per head to `sums`. Where the
  // value counts they are left times its norm. A token of which the code says nothing gets kUnusable, and is read for certain.
  void score(Item &item, int64_t from, int64_t to, double *sums) const {
    Estimates e;
    const bool with_norm = a.target != kDenominator && !a.is_uniform && !is_coarse();
    float norms[kScoreBlock];
    for (int64_t start = from; start < to; start += kScoreBlock) {
      const int count = int(std::min<int64_t>(kScoreBlock, to - start));
      estimated(item, start, count, e);
      for (int j = 0; j < count; ++j) norms[j] = with_norm ? value_norm(item, start + j, norm_of) : 1.0f;
      for (int g = 0; g < group; ++g) {
        float *out = item.scores + g * a.kv_stride + start;
        const float m = item.fixed[g].max, kappa = a.selector == kSketch ? item.kappa[g] : 0.0f;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < count; ++j) {
          const float weight = fast_exp(std::min(e.lhat[g][j] + kappa * e.variance[j] - m, kMaxExponent));
          const bool known = e.usable[j] != 0 && kappa * e.variance[j] <= kMostHalfVariance;
          out[j] = known ? weight * norms[j] : a.is_uniform && e.usable[j] != 0 ? 0.0f : kUnusable;
          sum += known ? weight : 0;
        }
        sums[g] += sum;
      }
    }
  }

  // Norm of v as it scales a score.
  float value_norm(const Item &item, int64_t i, const float *norms) const {
    if (a.selector == kOracle) return norm_of_row(row(values, item.slots[i], item.head), dim);
    return norms[a.norms[(int64_t(item.slots[i]) * a.num_kv_heads + item.head + 1) * a.norm_bytes - 1]];
  }

  // Share of the output (or of the mass) per token in `score_rows` rows: each head's own, or the largest or the mean over
  // the group; and the draws u. Adds the sum of each row to `totals`, and the sum of the rows' maximum behind them.
  void share(Item &item, int64_t from, int64_t to, const double *sums, double *totals) const {
    const uint32_t key = stream_key(uint32_t(a.seed), uint32_t(a.layer_id), uint32_t(item.head), uint32_t(item.n));
    float inverse[kMaxGroup];
    for (int g = 0; g < group; ++g) inverse[g] = float(1.0 / (item.fixed[g].sum + sums[g])) / (a.group_mean ? group : 1);
    for (int64_t start = from; start < to; start += kScoreBlock) {
      const int count = int(std::min<int64_t>(kScoreBlock, to - start));
      float *first = item.scores + start, *draws = item.draws + start, largest[kScoreBlock] = {0}, most = 0;
      for (int g = 0; g < group; ++g) {
        float *own = first + g * a.kv_stride;
        const float scale = inverse[g];
#pragma omp simd
        for (int j = 0; j < count; ++j) own[j] = own[j] < 0 ? (a.is_uniform ? kUnusable : kForced) : own[j] * scale;
      }
      for (int g = 1; g < group && score_rows == 1; ++g) {
        const float *other = first + g * a.kv_stride;
        if (a.group_mean) {
#pragma omp simd
          for (int j = 0; j < count; ++j) first[j] = std::min(first[j] + other[j], kForced);
        } else {
#pragma omp simd
          for (int j = 0; j < count; ++j) first[j] = std::max(first[j], other[j]);
        }
      }
      for (int r = 0; r < score_rows; ++r) {
        const float *own = first + r * a.kv_stride;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < count; ++j) {
          const float s = own[j] < kForced ? own[j] : 0.0f;
          sum += s;
          largest[j] = std::max(largest[j], s);
        }
        totals[r] += sum;
      }
#pragma omp simd reduction(+ : most)
      for (int j = 0; j < count; ++j) {
        draws[j] = uniform01(uint32_t(start) + uint32_t(j), key);
        most += largest[j];
      }
      totals[kMaxGroup] += most;
    }
  }

  float score_of(const Item &item, int r, int64_t i) const { return item.scores[r * a.kv_stride + i] + item.floors[r]; }

  // t_i = max over rows of c_r s_ri: token i is read when u_i < t_i.
  void intensity(const Item &item, const float *scales, int64_t start, int count, float *out) const {
    for (int r = 0; r < score_rows; ++r) {
      const float *scores = item.scores + r * a.kv_stride + start, scale = scales[r], floor = item.floors[r] * scale;
      if (r == 0) {
#pragma omp simd
        for (int j = 0; j < count; ++j) out[j] = scale * scores[j] + floor;
      } else {
#pragma omp simd
        for (int j = 0; j < count; ++j) out[j] = std::max(out[j], scale * scores[j] + floor);
      }
    }
  }

  // Per-thread buffers; matrices are [head][list entry] with row stride `stride`.
  struct Scratch {
    std::vector<int32_t> list, order;
    std::vector<const T *> k_rows, v_rows;
    std::vector<float> logits, masses, weighted, share, distances[kMaxParts], weight, square, others, one_over;
    std::vector<uint8_t> member;
    int64_t stride = 0;
    Partial audit[kMaxGroup];

    void reserve(int64_t entries, int group, int parts) {
      if (entries <= stride && size_t(stride * group) <= std::min(logits.size(), distances[parts - 1].size())) return;
      stride = std::max(stride, (entries + 1023) / 1024 * 1024);
      for (auto *matrix : {&logits, &masses, &weighted, &share}) matrix->resize(size_t(stride * group));
      for (int p = 0; p < parts; ++p) distances[p].resize(size_t(stride * group));
      for (auto *row : {&weight, &square, &others, &one_over}) row->resize(size_t(stride));
      k_rows.resize(size_t(stride));
      v_rows.resize(size_t(stride));
      list.resize(size_t(stride));
      order.resize(size_t(stride));
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
  // d^2 of every entry and part: y^2 |v - o|^2 (output), y^2 (denominator) or y^2 |v|^2 (numerator).
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
    for (int p = 0; p < num_parts; ++p) {
      if (parts[p] == kOutput) dots(outs, group, s.v_rows.data(), count, 1.0f, s.distances[p].data(), s.stride, dim);
      for (int g = 0; g < group; ++g) {
        const float *masses = s.masses.data() + g * s.stride, norm2 = float(heads[g].norm * heads[g].norm);
        float *distances = s.distances[p].data() + g * s.stride;
        for (int64_t j = 0; j < count; ++j) {
          const float gap = parts[p] == kOutput      ? std::max(s.square[j] - 2 * distances[j] + norm2, 0.0f)
                            : parts[p] == kNumerator ? s.square[j]
                                                     : 1.0f;
          distances[j] = masses[j] * masses[j] * gap;
        }
      }
    }
  }

  // What epsilon is relative to.
  static double unit_of(const HeadState &h, int part) {
    return std::max(h.sum * (part == kDenominator ? 1.0 : h.norm), kLeastUnit);
  }

  // A half-width that telemetry can add up, whatever the inputs were.
  static float bounded(double half_width) { return half_width < kMostHalfWidth ? float(half_width) : kMostHalfWidth; }

  // Bound bernstein; lemmas and formulas are those of vattn_kernels/reference/bernstein.py.
  static double relative(double width) { return width < 1 ? width / (1 - width) : kInfinity; }

  double combine(const double *widths) const {
    if (a.target == kOutput) return widths[1] < 1 ? relative(widths[0] / (1 - widths[1])) : kInfinity;
    double sum = 0;
    for (int p = 0; p < num_parts; ++p) sum += relative(widths[p]);
    return factor * sum;
  }
  double poisson_width(double variance, double reach) const {
    return std::sqrt(2 * log_term * variance) + kVarianceAndRange * log_term * reach;
  }
  double uniform_width(double sigma, double reach, double size, double population) const {
    if (size >= population) return 0;
    const double rate = std::sqrt(2 * log_term * std::min(1.0, (population - size) / size) / size);
    if (rate >= 1) return kInfinity;
    return population * (rate * (sigma + reach * std::sqrt(2 * log_term / size)) + kRange * reach * log_term / size) / (1 - rate);
  }

  // Logarithms of upper bounds on y, and on y |v|, over the tokens that stay open from a look on; y relative to no maximum.
  struct Reach {
    double mass[kGridSteps + 1], value[kGridSteps + 1];
    double of(int part, int look, const HeadState &h) const {
      const double masses = std::exp(mass[look] - h.max), values = std::exp(value[look] - h.max);
      if (part == kDenominator) return masses;
      return part == kNumerator ? values : values + (h.norm > 0 ? h.norm * masses : 0);
    }
  };

  // `last_open(i)` is the last look at which position i is not read for certain, or below 0; `log_weight(i)` scales y.
  template <typename LastOpen, typename LogWeight>
  void reaches(const Item &item, LastOpen last_open, LogWeight log_weight, Reach *reach) const {
    Estimates e;
    for (int g = 0; g < group; ++g)
      for (int look = 0; look <= kGridSteps; ++look) reach[g].mass[look] = reach[g].value[look] = -kInfinity;
    for (int64_t start = item.lo; start < item.hi; start += kScoreBlock) {
      const int count = int(std::min<int64_t>(kScoreBlock, item.hi - start));
      upper_bounds(item, start, count, e);
      for (int j = 0; j < count; ++j) {
        const int look = std::min(last_open(start + j), kGridSteps);
        if (look < 0) continue;
        const double weight = log_weight(start + j), log_norm = std::log(double(value_norm(item, start + j, upper_of)));
        for (int g = 0; g < group; ++g) {
          double upper = e.lhat[g][j];
          upper = e.usable[j] != 0 ? upper + kMargin * (1 + std::abs(upper)) + weight : kInfinity;
          reach[g].mass[look] = std::max(reach[g].mass[look], upper);
          reach[g].value[look] = std::max(reach[g].value[look], upper + log_norm);
        }
      }
    }
    for (int g = 0; g < group; ++g)
      for (int look = kGridSteps - 1; look >= 0; --look) {
        reach[g].mass[look] = std::max(reach[g].mass[look], reach[g].mass[look + 1]);
        reach[g].value[look] = std::max(reach[g].value[look], reach[g].value[look + 1]);
      }
  }

  // Expected reads.
  double reads(const Item &item, const float *scales) const {
    float likely[kScoreBlock];
    double total = 0;
    for (int64_t start = item.lo; start < item.hi; start += kScoreBlock) {
      const int count = int(std::min<int64_t>(kScoreBlock, item.hi - start));
      intensity(item, scales, start, count, likely);
      for (int j = 0; j < count; ++j) total += std::min(1.0f, likely[j]);
    }
    return total;
  }

  // Moves `wanted` back towards `scales` until the expected reads stay within the cap; whether it had to.
  bool limit(const Item &item, const float *scales, float *wanted) const {
    if (a.cap >= 1.0) return false;
    const double allowed = a.cap * double(item.range);
    float at[kMaxGroup];
    const auto reads_at = [&](double part) {
      for (int r = 0; r < score_rows; ++r) at[r] = float(scales[r] + part * (double(wanted[r]) - scales[r]));
      return reads(item, at);
    };
    if (reads_at(1) <= allowed) return false;
    double low = 0, high = 1;
    for (int step = 0; step < 40; ++step) {
      const double middle = 0.5 * (low + high);
      (reads_at(middle) <= allowed ? low : high) = middle;
    }
    reads_at(low);
    std::copy(at, at + score_rows, wanted);
    return true;
  }

  // Looks of bound bernstein at a Poisson sample: a geometric grid of scales that the sample does not influence.
  struct Looks {
    double first = 0, log_step = 0;
    double at(int look) const { return first * std::exp(log_step * look); }
    // Last look whose scale is at most c.
    int before(double c) const { return int(std::floor(std::log(c * (1 + 1e-6) / first) / log_step)); }
  };

  Looks looks_of(const Item &item, double first) const {
    float least = kForced;
    for (int64_t i = item.lo; i < item.hi; ++i) least = std::min(least, score_of(item, 0, i));
    const double last = least < kForced ? (1 + 1e-5) / least : first;
    return {first, std::max(std::log(last / first), 1e-9) / kGridSteps};
  }

  // Half-width of bound bernstein at scale c, from what was read; `weight` is 1/pi at the scale of the reading.
  double provable(const HeadState &h, const Scratch &s, int g, int64_t count, const Looks &looks, const Reach &reach, double c) const {
    double widths[kMaxParts];
    const int look = std::min(std::max(looks.before(c), 0), kGridSteps);
    for (int p = 0; p < num_parts; ++p) {
      const double unit = unit_of(h, parts[p]);
      const float *distances = s.distances[p].data() + g * s.stride, *weight = s.weight.data(), *share = s.share.data();
      const float per_unit = float(1.0 / unit), scale = float(c);
      double variance = 0;
#pragma omp simd reduction(+ : variance)
      for (int64_t j = 0; j < count; ++j)
        variance += weight[j] * (1.0f / std::min(1.0f, scale * share[j]) - 1.0f) * (distances[j] * per_unit * per_unit);
      widths[p] = poisson_width(variance, reach.of(parts[p], look, h) / (c * unit));
    }
    return combine(widths);
  }

  // Least c >= least at which the half-widths of a head's bounded parts add up to epsilon, with pi = min(1, max(others,
  // c share)), whose inverses are at hand: Newton's method in 1/c within a bracket. `gain` is quantile * factor / unit of
  // each part; the search begins at `guess`.
  float least_scale(const Scratch &s, int g, int64_t count, float least, double guess, double epsilon, const double *gain) const {
    const float *weight = s.weight.data(), *others = s.others.data(), *one_over = s.one_over.data();
    double slope;
    const auto width = [&](float c) {
      double sum = 0;
      slope = 0;
      for (int p = 0; p < num_bounded; ++p) {
        const float *distances = s.distances[p].data() + g * s.stride, k = float(gain[p]);
        float variance = 0, linear = 0, over_c = 1.0f / c;
#pragma omp simd reduction(+ : variance, linear)
        for (int64_t j = 0; j < count; ++j) {
          const float mine = over_c * one_over[j], inverse = std::max(std::min(mine, others[j]), 1.0f);
          const float w = weight[j] * (distances[j] * k * k);
          variance += w * (inverse - 1.0f);
          linear += mine == inverse ? w * inverse : 0.0f;
        }
        const double root = std::sqrt(std::max(variance, 0.0f));
        sum += root;
        slope += root > 0 ? linear * c / (2 * root) : 0;
      }
      return sum;
    };
    double low = least, high = kInfinity, c = guess;
    bool at_least = false;
    for (int step = 0; step < 40; ++step) {
      const double found = width(float(c));
      if (c <= least && found <= epsilon) return least;
      at_least = at_least || c <= least;
      (found <= epsilon ? high : low) = c;
      if (std::abs(found - epsilon) <= 1e-5 * epsilon || high < low * (1 + 1e-6) || low >= kMostScale) break;
      // Tangent of the width as a function of 1/c.
      c = slope > 0 ? 1 / (1 / c - (found - epsilon) / slope) : kInfinity;
      if (c <= least && !at_least) c = least;
      else if (!(c > low && c < high)) c = high < kInfinity ? 0.5 * (low + high) : 2 * low;
    }
    return float(std::min(c, double(kMostScale)));
  }

  // What a head asks of its scale.
  struct Want {
    double gain[kMaxParts], guard;
    bool grows;
  };

  // Scales at which every head's half-width is epsilon by what was read, each the least beside the others: a head reads
  // what the others read too, so they are solved in turn, a few times over.
  void solve(Scratch &s, int64_t count, const Want *wants, const float *scales, float growth, double epsilon, float *solved) const {
    const bool apart = score_rows == group;
    float least[kMaxGroup];
    std::copy(scales, scales + score_rows, least);
    for (int g = 0; g < group; ++g) {
      const int r = apart ? g : 0;
      if (wants[g].grows) least[r] = std::max({least[r], scales[r] * growth, float(std::min<double>(wants[g].guard, kMostScale))});
    }
    std::copy(least, least + score_rows, solved);
    for (int sweep = 0; sweep < (apart && group > 1 ? kSweeps : 1); ++sweep)
      for (int g = 0; g < group; ++g) {
        if (!wants[g].grows) continue;
        const int r = apart ? g : 0;
        float *others = s.others.data();
        std::fill(others, others + count, 0.0f);
        for (int q = 0; q < score_rows; ++q) {
          if (q == r) continue;
          const float *share = s.share.data() + q * s.stride, scale = solved[q];
#pragma omp simd
          for (int64_t j = 0; j < count; ++j) others[j] = std::max(others[j], scale * share[j]);
        }
        const float *share = s.share.data() + r * s.stride;
        float *one_over = s.one_over.data();
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          others[j] = 1.0f / others[j];
          one_over[j] = 1.0f / share[j];
        }
        const float c = least_scale(s, g, count, least[r], solved[r], epsilon, wants[g].gain);
        solved[r] = apart ? c : std::max(solved[r], c);
      }
  }

  // Adds the tokens with u < t that were not read yet to the list, and reads them.
  void extend(Item &item, Scratch &s, const float *scales, int64_t &count) const {
    const int64_t old = count;
    int32_t *list = s.list.data();
    float likely[kScoreBlock];
    for (int64_t start = item.lo; start < item.hi; start += kScoreBlock) {
      const int here = int(std::min<int64_t>(kScoreBlock, item.hi - start));
      intensity(item, scales, start, here, likely);
      const float *draws = item.draws + start;
      // Most stretches have nothing new in a later round.
      for (int j = 0; j < here; j += kStretch) {
        const int end = std::min(j + kStretch, here);
        int any = 0;
#pragma omp simd reduction(| : any)
        for (int i = j; i < end; ++i) any |= draws[i] < likely[i];
        for (int i = j; i < end && any; ++i) {
          list[count] = int32_t(start + i);
          count += draws[i] < likely[i];
        }
      }
    }
    read(item, s, old, count);
    for (int64_t j = old; j < count; ++j) item.draws[list[j]] = std::numeric_limits<float>::infinity();
    for (int r = 0; r < score_rows; ++r)
      for (int64_t j = old; j < count; ++j) s.share[r * s.stride + j] = score_of(item, r, list[j]);
  }

  // Inverse inclusion probabilities of the list; once everything was read nothing is left to estimate.
  void weigh(const Item &item, Scratch &s, const float *scales, int64_t count) const {
    float *weight = s.weight.data();
    std::fill(weight, weight + count, count == item.range ? 1.0f : 0.0f);
    if (count == item.range) return;
    for (int r = 0; r < score_rows; ++r) {
      const float *share = s.share.data() + r * s.stride, scale = scales[r];
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) weight[j] = std::max(weight[j], scale * share[j]);
    }
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) weight[j] = 1.0f / std::min(1.0f, weight[j]);
  }

  // Of a head that the cap left uncertified: from attention over what was read, o0, towards the estimate o1 of truncated
  // weights by B^2 / (B^2 + V), with B = |o1 - o0| and the variance V of o1 (reference/estimate.py, `shrunk`).
  void shrink(const Item &item, Scratch &s, int g, int64_t count, HeadState &h) const {
    const float *masses = s.masses.data() + g * s.stride, *weight = s.weight.data();
    float *weighted = s.weighted.data() + g * s.stride, *drawn = h.out, plain[kMaxDim];
    const float rescale = fast_exp(item.fixed[g].max - h.max), most = float(kMostShare * h.sum);
    const double fixed = double(item.fixed[g].sum) * rescale;
    double plain_sum = fixed, drawn_sum = fixed, variance = 0, gap = 0;
#pragma omp simd reduction(+ : plain_sum, drawn_sum)
    for (int64_t j = 0; j < count; ++j) {
      weighted[j] = masses[j] + std::min((weight[j] - 1.0f) * masses[j], most);
      plain_sum += masses[j];
      drawn_sum += weighted[j];
    }
    for (int d = 0; d < dim; ++d) plain[d] = drawn[d] = item.fixed[g].acc[d] * rescale;
    accumulate(masses, s.stride, 1, s.v_rows.data(), count, plain, dim, dim);
    accumulate(weighted, s.stride, 1, s.v_rows.data(), count, drawn, dim, dim);
    for (int d = 0; d < dim; ++d) {
      plain[d] = float(plain[d] / plain_sum);
      drawn[d] = float(drawn[d] / drawn_sum);
      gap += double(drawn[d] - plain[d]) * (drawn[d] - plain[d]);
    }
    for (int64_t j = 0; j < count; ++j) {
      const float beyond = weighted[j] - masses[j];
      if (beyond <= 0) continue;
      double distance = 0;
#pragma omp simd reduction(+ : distance)
      for (int d = 0; d < dim; ++d) {
        const float away = load(s.v_rows[j] + d) - drawn[d];
        distance += away * away;
      }
      variance += double(weighted[j]) * beyond * distance;
    }
    variance /= drawn_sum * drawn_sum;
    if (gap + variance <= 0) return;
    const float kept = float(gap / (gap + variance));
    for (int d = 0; d < dim; ++d) h.out[d] = plain[d] + kept * (drawn[d] - plain[d]);
  }

  // Of what the cap leaves beyond the reads at `scales`, `kRankedShare` goes to the best scores, read for certain.
  void rank(Item &item, Scratch &s, const float *scales, int64_t count) const {
    const int64_t best = int64_t(kRankedShare * (a.cap * double(item.range) - reads(item, scales)));
    if (best <= 0) return;
    float *largest = s.others.data();
    std::fill(largest, largest + item.range, 0.0f);
    for (int r = 0; r < score_rows; ++r)
      for (int64_t j = 0; j < item.range; ++j) largest[j] = std::max(largest[j], score_of(item, r, item.lo + j));
    int32_t *order = s.order.data();
    std::iota(order, order + item.range, 0);
    std::nth_element(order, order + best, order + item.range,
                     [&](int32_t x, int32_t y) { return largest[x] > largest[y] || (largest[x] == largest[y] && x < y); });
    for (int r = 0; r < score_rows; ++r) {
      for (int64_t j = 0; j < best; ++j) item.scores[r * a.kv_stride + item.lo + order[j]] = kForced;
      for (int64_t j = 0; j < count; ++j) s.share[r * s.stride + j] = score_of(item, r, s.list[j]);
    }
  }

  void proportional(Item &item, Scratch &s, HeadState *heads, float *stats) const {
    const float epsilon = a.params[0];
    const float pilot = float(std::max<double>(a.pilot_min, std::ceil(a.pilot * item.range)));
    float scales[kMaxGroup] = {0}, next[kMaxGroup];
    std::fill(next, next + score_rows, pilot / std::max(float(item.share_sum), kTiny));
    bool capped = limit(item, scales, next);
    std::copy(next, next + score_rows, scales);
    Looks looks;
    Reach reach[kMaxGroup];
    if (log_term > 0) {
      looks = looks_of(item, scales[0]);
      const auto last_open = [&](int64_t i) { return score_of(item, 0, i) >= kForced ? -1 : looks.before(1.0 / score_of(item, 0, i)); };
      reaches(item, last_open, [&](int64_t i) { return -std::log(double(score_of(item, 0, i))); }, reach);
    }
    s.reserve(item.range + 1, group, num_parts);
    int64_t count = 0;
    for (int round = 0;; ++round) {
      extend(item, s, scales, count);
      weigh(item, s, scales, count);
      const bool whole = count == item.range;
      estimate(item, s, count, heads);
      std::copy(scales, scales + score_rows, next);
      Want wants[kMaxGroup];
      bool certified = true;
      for (int g = 0; g < group; ++g) {
        HeadState &h = heads[g];
        if (log_term > 0) {
          const double scale = scales[0];
          h.half_width = whole ? 0.0f : bounded(provable(h, s, g, count, looks, reach[g], scale));
          if (h.half_width <= epsilon) continue;
          certified = false;
          int look = std::min(looks.before(scale * kLeastStep) + 1, kGridSteps);
          while (look < kGridSteps && !(provable(h, s, g, count, looks, reach[g], looks.at(look)) <= epsilon)) ++look;
          next[0] = std::max(next[0], float(looks.at(look)));
          continue;
        }
        double width = 0;
        for (int p = 0; p < num_bounded; ++p) {
          const float *distances = s.distances[p].data() + g * s.stride, *weight = s.weight.data();
          const double unit = unit_of(h, parts[p]);
          const float per_unit = float(1.0 / unit);
          double variance = 0, square = 0;
#pragma omp simd reduction(+ : variance, square)
          for (int64_t j = 0; j < count; ++j) {
            const float w = weight[j], t = w * (w - 1.0f) * (distances[j] * per_unit * per_unit);
            variance += t;
            square += t * t * (1.0f - 1.0f / w);
          }
          const float z = quantile(variance > 0 ? square / (2 * variance * variance) : 0);
          width += factor * z * std::sqrt(variance);
          wants[g].gain[p] = factor * (round == 0 ? kFirstRoundQuantile : z) / unit;
        }
        h.half_width = bounded(width);
        const double log_overrated = std::log(item.mass[g]) + item.fixed[g].max - std::log(double(h.sum)) - h.max;
        // Coarse scores are no weights, so their sum is no mass.
        const double overrated = is_coarse() ? 1.0 : std::exp(std::min(std::max(log_overrated, 0.0), double(kMaxExponent)));
        wants[g].guard = overrated * kGuardShare * factor / (epsilon * (a.target == kDenominator ? 1.0 : std::max(h.norm, 1e-30)));
        wants[g].grows = round == 0 || !(h.half_width <= epsilon);
        certified = certified && h.half_width <= epsilon;
      }
      if (whole || ((round > 0 || log_term > 0) && certified) || round == kRounds - 1) break;
      const float growth = round == 0 ? 1.0f : round < kPatience ? kLeastGrowth : kImpatientGrowth;
      if (log_term == 0) solve(s, count, wants, scales, growth, epsilon, next);
      if (round == kRounds - 2) std::fill(next, next + score_rows, 2 * kForced);
      float wanted[kMaxGroup];
      std::copy(next, next + score_rows, wanted);
      const bool cut = limit(item, scales, next);
      if (capped && cut) break;
      if (cut && is_ranking() && log_term == 0) {
        rank(item, s, scales, count);
        std::copy(wanted, wanted + score_rows, next);
        limit(item, scales, next);
      }
      capped = capped || cut;
      for (int r = 0; r < score_rows; ++r) scales[r] = std::max(scales[r], next[r]);
    }
    for (int g = 0; g < group; ++g) {
      HeadState &h = heads[g];
      if (capped && h.half_width > epsilon && is_coarse() && a.target == kOutput) shrink(item, s, g, count, h);
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
    s.reserve(n + top_k, group, num_parts);
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
    // What is sampled: the range without the top-k, whose members are skipped where the permutation names them.
    const int64_t population = n - top_k;
    const int64_t pilot = std::min(population, std::max<int64_t>(a.pilot_min, int64_t(std::ceil(a.pilot * double(n)))));
    const int64_t most = std::min(population, std::max(pilot, int64_t(std::floor(a.cap * double(n)))));
    std::vector<int64_t> looks;
    Reach reach[kMaxGroup];
    if (log_term > 0 && population > 0) {
      const double ratio = double(population) / double(pilot);
      for (int step = 1; step < kGridSteps; ++step)
        looks.push_back(std::min(population, int64_t(std::ceil(double(pilot) * std::pow(ratio, double(step) / kGridSteps)))));
      looks.push_back(population);
      looks.push_back(most);
      std::sort(looks.begin(), looks.end());
      reaches(item, [&](int64_t i) { return s.member[i - item.lo] ? -1 : kGridSteps; }, [](int64_t) { return 0.0; }, reach);
    }
    int64_t budget = pilot, count = top_k;
    uint32_t walked = 0;
    bool cut[kMaxGroup] = {false};
    const int rounds = log_term > 0 ? kRounds : 2;
    for (int round = 0; round < rounds; ++round) {
      const int64_t old = count;
      while (count < top_k + budget) {
        const uint32_t image = permute(walked++);
        if (!s.member[image]) s.list[count++] = int32_t(item.lo + image);
      }
      read(item, s, old, count);
      const float expand = float(double(population) / double(std::max<int64_t>(1, budget)));
      for (int64_t j = 0; j < count; ++j) s.weight[j] = j < top_k ? 1.0f : expand;
      estimate(item, s, count, heads);
      if (budget == population) {
        for (int g = 0; g < group; ++g) heads[g].half_width = 0;
        break;
      }
      int64_t next = budget;
      for (int g = 0; g < group; ++g) {
        HeadState &h = heads[g];
        const float *masses = s.masses.data() + g * s.stride;
        double mass = 0, sigmas[kMaxParts], units[kMaxParts], sigma = 0;
        for (int64_t j = top_k; j < count; ++j) mass += masses[j];
        float along[kMaxDim] = {0};
        if (a.target != kDenominator) accumulate(masses + top_k, s.stride, 1, s.v_rows.data() + top_k, count - top_k, along, dim, dim);
        for (int p = 0; p < num_parts; ++p) {
          const float *distances = s.distances[p].data() + g * s.stride;
          double squares = 0, mean_square = mass * mass;
          for (int64_t j = top_k; j < count; ++j) squares += distances[j];
          if (parts[p] != kDenominator) {
            mean_square = 0;
            for (int d = 0; d < dim; ++d) {
              const double x = along[d] - (parts[p] == kOutput ? mass * h.out[d] : 0.0);
              mean_square += x * x;
            }
          }
          units[p] = unit_of(h, parts[p]);
          sigmas[p] = std::sqrt(std::max(0.0, (squares - mean_square / double(budget)) / double(budget - 1))) / units[p];
          if (p < num_bounded) sigma += factor * sigmas[p];
        }
        int64_t b = budget;
        if (log_term > 0) {
          // A weight and its mean lie in [0, reach]; a vector and its mean are up to two reaches apart.
          const auto width = [&](int64_t size) {
            double widths[kMaxParts];
            for (int p = 0; p < num_parts; ++p) {
              const double diameter = reach[g].of(parts[p], 0, h) * (parts[p] == kDenominator && a.target != kOutput ? 1 : 2);
              widths[p] = uniform_width(sigmas[p], diameter / units[p], double(size), double(population));
            }
            return combine(widths);
          };
          h.half_width = bounded(width(budget));
          if (h.half_width <= epsilon || round == rounds - 1) continue;
          b = population;
          for (const int64_t look : looks)
            if (look > budget && width(look) <= epsilon) {
              b = look;
              break;
            }
        } else {
          const double z = quantile(1.0 / double(budget - 1));
          const double total = double(population), root = z * total * sigma / epsilon, infinite = root * root;
          h.half_width = bounded(z * total * sigma * std::sqrt(1.0 / double(budget) - 1.0 / total));
          if (round > 0) continue;
          b = std::max(pilot, int64_t(std::ceil(std::isfinite(infinite) ? total * infinite / (total + infinite) : total)));
        }
        cut[g] = b > most;
        next = std::max(next, std::min(b, most));
      }
      if (next == budget) break;
      budget = next;
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
    static thread_local std::vector<double> sums, shares;
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
    sums.assign(size_t(total * chunks * kTotals), 0);
    shares.assign(size_t(total * chunks * kTotals), 0);

    Item *const items_ = items.data();
    Partial *const parts_ = parts.data();
    double *const sums_ = sums.data(), *const shares_ = shares.data();
    const Task *const tasks_ = tasks.data();
    const int64_t num_tasks = int64_t(tasks.size());
    // Chunks of the sampled range are cut at multiples of kChunk of the position, so a task's bounds are fixed.
    const auto bounds = [&](const Task &t, int64_t &from, int64_t &to) {
      const Item &item = items_[t.item];
      from = std::max(t.chunk * kChunk, item.dense ? int64_t(0) : item.lo);
      to = std::min((t.chunk + 1) * kChunk, item.dense ? item.n : item.hi);
    };
    const auto add_chunks = [&](const double *part, int64_t item, double *sum) {
      for (int64_t c = 0; c < chunks; ++c)
        for (int g = 0; g < kTotals; ++g) sum[g] += part[(item * chunks + c) * kTotals + g];
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
          score(item, from, to, sums_ + at * kTotals);
        }
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < num_tasks; ++t) {
        Item &item = items_[tasks_[t].item];
        if (item.dense) continue;
        int64_t from, to;
        bounds(tasks_[t], from, to);
        double sum[kTotals] = {0};
        add_chunks(sums_, tasks_[t].item, sum);
        share(item, from, to, sum, shares_ + (tasks_[t].item * chunks + tasks_[t].chunk) * kTotals);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < total; ++i) {
        Item &item = items_[i];
        if (item.dense) {
          finish_dense(item, parts_ + i * chunks * group, std::max<int64_t>(1, (item.n + kChunk - 1) / kChunk));
        } else {
          double sum[kTotals] = {0};
          add_chunks(shares_, i, sum);
          for (int r = 0; r < score_rows; ++r) item.floors[r] = std::max(float(a.floor * sum[r] / item.range), kTiny);
          item.share_sum = sum[kMaxGroup];
          double scored[kTotals] = {0};
          add_chunks(sums_, i, scored);
          for (int g = 0; g < group; ++g) item.mass[g] = item.fixed[g].sum + scored[g];
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
    const T *k = static_cast<const T *>(a.k_cache) + at * dim;
    float key[kMaxDim], offset[kMaxDim];
    for (int d = 0; d < dim; ++d) {
      key[d] = load(k + d);
      offset[d] = key[d] - a.mean[head * dim + d];
    }
    for (int64_t n = 0; n < per_head; ++n)
      signature_of(a.centred ? offset : key, a.nets + (head * per_head + n) * size, a.widths, a.num_layers,
                   reinterpret_cast<uint32_t *>(a.codes) + at * a.words + n * words);
    a.norms[at] = level_of(norm_of_row(offset, dim));
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
