// From logits to a token without sorting the vocabulary: only tokens that can be kept are sorted.
// The rules are those of reference/sampling.py.

struct Candidate {
  float weight;
  int32_t id;
};

// The largest logit; NaN if any is not a number.
static float largest(const float* logits, int64_t vocab) {
  F8 most = f8_set1(-INFINITY);
  bool nan = false;
  int64_t i = 0;
  for (; i + 8 <= vocab; i += 8) {
    F8 x = f8_load(logits + i);
    nan |= f8_any_nan(x);
    most = f8_max(most, x);
  }
  float top = max_lanes(most);
  for (; i < vocab; ++i) {
    nan |= logits[i] != logits[i];
    top = logits[i] > top ? logits[i] : top;
  }
  return nan ? NAN : top;
}

static int64_t first_equal(const float* logits, int64_t vocab, float value) {
  for (int64_t i = 0;; i += 8) {
    if (i + 8 <= vocab && !f8_mask_ge(f8_load(logits + i), f8_set1(value))) continue;
    for (int64_t j = i; j < i + 8 && j < vocab; ++j)
      if (logits[j] == value) return j;
  }
}

// Index of the first weight at which the running sum exceeds uniform * total.
template <class Weight>
static int64_t invert(int64_t count, double uniform, Weight weight) {
  double total = 0.0, running = 0.0;
  for (int64_t i = 0; i < count; ++i) total += weight(i);
  int64_t last = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (weight(i) > 0.0f) last = i;
    running += weight(i);
    if (running > uniform * total) return i;
  }
  return last;  // uniform * total was rounded up to the total
}

// How many of the sorted candidates are kept.
static int64_t kept(const std::vector<Candidate>& sorted, const SampleArgs& a, double total) {
  int64_t count = int64_t(sorted.size());
  if (a.top_k > 0 && a.top_k < a.vocab) {
    count = count < a.top_k ? count : a.top_k;
    total = 0.0;
    for (int64_t i = 0; i < count; ++i) total += sorted[size_t(i)].weight;
  }
  if (a.top_p < 1.0) {
    // Keep a token while the mass before it has not reached top_p; the first is always kept.
    double before = 0.0;
    int64_t keep = 0;
    for (; keep < count && (keep == 0 || before < a.top_p * total); ++keep) before += sorted[size_t(keep)].weight;
    count = keep;
  }
  if (a.min_p > 0.0)
    while (count > 1 && sorted[size_t(count - 1)].weight < a.min_p * sorted[0].weight) --count;
  return count;
}

// Tokens of at least `threshold`, in the order of their ids; adds up their mass.
static double gather(const std::vector<float>& weights, float threshold, std::vector<Candidate>& found) {
  found.clear();
  double mass = 0.0;
  const int64_t vocab = int64_t(weights.size());
  for (int64_t i = 0; i < vocab; i += 8) {
    if (i + 8 <= vocab && !f8_mask_ge(f8_load(&weights[size_t(i)]), f8_set1(threshold))) continue;
    for (int64_t j = i; j < i + 8 && j < vocab; ++j) {
      float weight = weights[size_t(j)];
      if (weight < threshold) continue;
      mass += weight;
      found.push_back({weight, int32_t(j)});
    }
  }
  return mass;
}

// Bring the best candidates to the front in order and drop the others: `count` of them, or four times as
// many until their mass is enough. Flat distributions have tens of thousands of candidates.
template <class Enough>
static void sort_best(std::vector<Candidate>& found, int64_t count, Enough enough) {
  auto better = [](const Candidate& x, const Candidate& y) {
    return x.weight != y.weight ? x.weight > y.weight : x.id < y.id;
  };
  for (; count < int64_t(found.size()); count *= 4) {
    std::nth_element(found.begin(), found.begin() + count, found.end(), better);
    double mass = 0.0;
    for (int64_t i = 0; i < count; ++i) mass += found[size_t(i)].weight;
    if (!enough(mass)) continue;
    found.resize(size_t(count));
    break;
  }
  std::sort(found.begin(), found.end(), better);
}

static int64_t sample(const SampleArgs& a) {
  float most = largest(a.logits, a.vocab);
  if (!std::isfinite(most)) return -1;
  const float temperature = float(a.temperature);
  if (temperature <= 0.0f) return first_equal(a.logits, a.vocab, most);

  // From the largest logit down: dividing by a tiny temperature must not overflow to inf - inf.
  static thread_local std::vector<float> weights;
  static thread_local std::vector<Candidate> found;
  weights.resize(size_t(a.vocab));
  for (int64_t i = 0; i < a.vocab; i += 8) {
    float lanes[8];
    const int64_t n = a.vocab - i < 8 ? a.vocab - i : 8;
    for (int64_t j = 0; j < 8; ++j) lanes[j] = j < n ? a.logits[i + j] : -INFINITY;
    F8 shifted = f8_div(f8_sub(f8_load(lanes), f8_set1(most)), f8_set1(temperature));
    // e^-87 is the least that f8_exp returns; what is below has no weight at all.
    f8_store(lanes, f8_exp(shifted));
    const int real = f8_mask_ge(shifted, f8_set1(-87.0f));
    for (int64_t j = 0; j < n; ++j) weights[size_t(i + j)] = real >> j & 1 ? lanes[j] : 0.0f;
  }

  const bool some_k = a.top_k > 0 && a.top_k < a.vocab;
  if (!some_k && a.top_p >= 1.0 && a.min_p <= 0.0)
    return invert(a.vocab, a.uniform, [&](int64_t i) { return weights[size_t(i)]; });
  double total = 0.0;
  for (float weight : weights) total += weight;
  // Lower the bar until everything that can be kept lies above it.
  for (float threshold : {3e-2f, 1e-3f, 1e-5f, 0.0f}) {
    double mass = gather(weights, threshold, found);
    bool enough = some_k ? int64_t(found.size()) >= a.top_k
                         : mass >= a.top_p * total || double(threshold) <= a.min_p;
    if (enough || threshold == 0.0f) break;
  }
  sort_best(found, some_k ? a.top_k : 256, [&](double mass) {
    return some_k || (a.top_p < 1.0 && mass >= a.top_p * total);
  });
  int64_t count = kept(found, a, total);
  return found[size_t(invert(count, a.uniform, [&](int64_t i) { return found[size_t(i)].weight; }))].id;
}
