// Choosing tokens: the arithmetic of draws.py, compiled. Both take the same token for the same logits.
//
// A token weighs round(2**43 * exp((logit - largest) / temperature)), a whole number: sums are exact in any order, so
// loops over lanes and blocks give what numpy's sums give. exp is written out, because no two libraries' last bits agree.
//
// No sort of the vocabulary: weights lie in blocks of 64 with each block's largest. A cut is the largest threshold from
// which on the weights count or sum to enough; it is found by halving, with passes that skip blocks below the threshold.
#include "sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "visible.h"

namespace {

constexpr int BLOCK = 64;
constexpr int UNIT_BITS = 43;
constexpr int64_t UNIT = int64_t{1} << UNIT_BITS;
// Added to a double of this size, it leaves the nearest integer, and UNIT_BITS more, in the low bits.
constexpr double NEAREST = 6755399441055744.0 + UNIT_BITS;  // 1.5 * 2**52
constexpr double LOG2_E = 1.4426950408889634;
constexpr double LOWEST = -60.0;  // 2**(43 - 60) rounds to 0
// (2**f - 1) / f for f from -1/2 to 1/2, fitted at Chebyshev's points: 2**f within 6e-9 of itself.
constexpr double SERIES[] = {0.00015453162949152332, 0.0013390863364649932, 0.009618082557265605,
                             0.05550357114219167,    0.24022650760568237,   0.6931471880262288};
constexpr int32_t INFINITE = 0x7f800000;
// How a cut's threshold is looked for; none of these changes what is found.
constexpr int GUESS = 128;  // the first try is this block's largest weight, in falling order
constexpr int SAMPLES = 256;
constexpr int SPREAD = 16;  // samples to either side: about twice their standard error
constexpr int COPIED = 8192;  // between two thresholds, so many weights are copied (64 KiB) and halved there
constexpr int FEW = 64;  // and so many are sorted

// As many as the target's vectors hold: compilers split longer ones badly.
#if defined(__AVX512F__)
constexpr int LANES = 8;
#elif defined(__AVX__)
constexpr int LANES = 4;
#else
constexpr int LANES = 2;
#endif
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef double Doubles __attribute__((vector_size(LANES * 8)));
typedef int64_t Integers __attribute__((vector_size(LANES * 8)));

// Memory that each calling thread keeps: 2 MiB at a vocabulary of 128,000.
struct Scratch {
  std::vector<float> logits;
  std::vector<float> block_logits;  // largest of each block
  std::vector<int64_t> weights;
  std::vector<int64_t> block_weights;  // largest of each block
  std::vector<int64_t> few;
  std::vector<float> likely;
  std::vector<int32_t> likely_ids;
};

struct Largest {
  float logit;
  int32_t token;
  bool finite;  // the row holds no NaN and no infinity
};

int64_t blocks_of(int64_t vocab) { return (vocab + BLOCK - 1) / BLOCK; }

template <typename To, typename From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bytes");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Bits whose order as integers is the floats' order: compilers find the largest integer of many at once, but may not
// reorder a maximum of floats.
inline int32_t ordered(float logit) {
  const int32_t bits = bits_of<int32_t>(logit);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

Largest find_largest(const float* logits, int64_t vocab) {
  int32_t most = std::numeric_limits<int32_t>::min(), widest = 0;
  for (int64_t i = 0; i < vocab; ++i) {
    const int32_t key = ordered(logits[i]), bits = bits_of<int32_t>(logits[i]) & 0x7fffffff;
    most = key > most ? key : most;
    widest = bits > widest ? bits : widest;
  }
  const float largest = bits_of<float>(most ^ ((most >> 31) & 0x7fffffff));
  int64_t token = 0;
  for (; token + BLOCK <= vocab; token += BLOCK) {
    int32_t found = 0;
    for (int i = 0; i < BLOCK; ++i) found |= logits[token + i] == largest;
    if (found) break;
  }
  while (token + 1 < vocab && logits[token] != largest) ++token;
  return {largest, static_cast<int32_t>(token), widest < INFINITE};
}

inline Integers weigh_lanes(const float* logits, double largest, double scale) {
  Floats narrow;
  std::memcpy(&narrow, logits, sizeof narrow);
  Doubles power = (__builtin_convertvector(narrow, Doubles) - largest) * scale;
  const Doubles lowest = LOWEST - Doubles{};
  power = power > lowest ? power : lowest;
  const Doubles shifted = power + NEAREST;
  const Doubles fraction = power - (shifted - NEAREST);
  Doubles series = fraction * SERIES[0] + SERIES[1];
  for (int i = 2; i < 6; ++i) series = series * fraction + SERIES[i];
  series = series * fraction + 1.0;
  const Doubles weight = (Doubles)((Integers)series + ((Integers)shifted << 52));
  return (Integers)(weight + 0x1p52) - bits_of<int64_t>(0x1p52);
}

// What turns a logit's distance into powers of two.
double scale_of(double temperature) { return std::min(LOG2_E / temperature, 1e300); }

// A row's blocks in turn; the last one is filled up with logits that weigh nothing.
template <typename Use>
inline void for_blocks(const float* logits, int64_t vocab, Use use) {
  const int64_t whole = vocab / BLOCK;
  for (int64_t block = 0; block < whole; ++block) use(block, logits + block * BLOCK);
  if (whole * BLOCK == vocab) return;
  float rest[BLOCK];
  std::fill(rest, rest + BLOCK, -std::numeric_limits<float>::infinity());
  std::copy(logits + whole * BLOCK, logits + vocab, rest);
  use(whole, rest);
}

inline int64_t sum_of(Integers lanes) {
  int64_t sum = 0;
  for (int lane = 0; lane < LANES; ++lane) sum += lanes[lane];
  return sum;
}

// The row's weights, padded with 0 to whole blocks; returns their sum.
int64_t weigh(const float* logits, int64_t vocab, double largest, double temperature, Scratch& scratch) {
  const int64_t blocks = blocks_of(vocab);
  const double scale = scale_of(temperature);
  scratch.weights.resize(blocks * BLOCK);
  scratch.block_weights.resize(blocks);
  Integers sum{};
  for_blocks(logits, vocab, [&](int64_t block, const float* from) {
    int64_t* to = scratch.weights.data() + block * BLOCK;
    Integers most{};
    for (int i = 0; i < BLOCK; i += LANES) {
      const Integers weights = weigh_lanes(from + i, largest, scale);
      std::memcpy(to + i, &weights, sizeof weights);
      sum += weights;
      most = weights > most ? weights : most;
    }
    int64_t block_most = 0;
    for (int lane = 0; lane < LANES; ++lane) block_most = std::max<int64_t>(block_most, most[lane]);
    scratch.block_weights[block] = block_most;
  });
  return sum_of(sum);
}

// The same sum at temperature 1, kept nowhere.
int64_t weight_sum(const float* logits, int64_t vocab, double largest) {
  Integers sum{};
  for_blocks(logits, vocab, [&](int64_t, const float* from) {
    for (int i = 0; i < BLOCK; i += LANES) sum += weigh_lanes(from + i, largest, LOG2_E);
  });
  return sum_of(sum);
}

struct Measure {
  int64_t count;
  int64_t sum;
};

inline Integers load(const int64_t* weights) {
  Integers lanes;
  std::memcpy(&lanes, weights, sizeof lanes);
  return lanes;
}

inline void measure_block(const int64_t* weights, Integers least, Integers& count, Integers& sum) {
  for (int i = 0; i < BLOCK; i += LANES) {
    const Integers lanes = load(weights + i), counted = lanes >= least;
    count -= counted;
    sum += lanes & counted;
  }
}

Measure measure_from(int64_t threshold, const Scratch& scratch) {
  Integers count{}, sum{};
  for (size_t block = 0; block < scratch.block_weights.size(); ++block)
    if (scratch.block_weights[block] >= threshold)
      measure_block(scratch.weights.data() + block * BLOCK, threshold - Integers{}, count, sum);
  return {sum_of(count), sum_of(sum)};
}

// What is left after cuts: weights above `floor`, and the first `ties` that equal it.
struct Kept {
  int64_t floor;
  int64_t ties;
  int64_t sum;
};

// Where the threshold of a cut lies: from `low` on there is enough, from `high` on there is not.
struct Bracket {
  int64_t wanted;
  bool by_count;
  int64_t low, high;
  Measure from_low, from_high;

  int64_t measured(Measure measure) const { return by_count ? measure.count : measure.sum; }
  int64_t count() const { return high - low > 1 ? from_low.count - from_high.count : 0; }
  bool holds(int64_t threshold) const { return low < threshold && threshold < high; }
  void halve(int64_t threshold, Measure found) {
    const bool enough = measured(found) >= wanted;
    (enough ? low : high) = threshold;
    (enough ? from_low : from_high) = found;
  }
  // Halfway in powers of two, as weights are spread.
  int64_t middle() const {
    const int64_t low_bits = bits_of<int64_t>(static_cast<double>(std::max<int64_t>(low, 1)));
    const int64_t high_bits = bits_of<int64_t>(static_cast<double>(high));
    const int64_t found = static_cast<int64_t>(bits_of<double>(low_bits + (high_bits - low_bits) / 2));
    return holds(found) ? found : low + (high - low) / 2;
  }
};

// Two weights between which the threshold probably is, from every 64th weight.
void estimate(const Bracket& bracket, Scratch& scratch, int64_t guesses[2]) {
  const int64_t blocks = static_cast<int64_t>(scratch.block_weights.size());
  const int64_t stride = (blocks + SAMPLES - 1) / SAMPLES;
  scratch.few.clear();
  for (int64_t block = 0; block < blocks; block += stride)
    scratch.few.push_back(scratch.weights[block * BLOCK + block / stride % BLOCK]);
  std::sort(scratch.few.begin(), scratch.few.end(), std::greater<int64_t>());
  const int64_t size = static_cast<int64_t>(scratch.few.size());
  const int64_t share = bracket.wanted / (stride * BLOCK);
  int64_t reached = 0, index = 0;
  for (; index < size - 1 && reached < share; ++index) reached += bracket.by_count ? 1 : scratch.few[index];
  guesses[0] = scratch.few[std::max<int64_t>(index - SPREAD, 0)];
  guesses[1] = scratch.few[std::min(index + SPREAD, size - 1)];
}

// Copies the bracket's weights to `few` and halves among them; returns the threshold.
int64_t settle(Bracket& bracket, Scratch& scratch) {
  std::vector<int64_t>& few = scratch.few;
  few.resize(bracket.count() + BLOCK + 1);
  int64_t size = 0;
  for (size_t block = 0; block < scratch.block_weights.size(); ++block) {
    if (scratch.block_weights[block] < bracket.low) continue;
    const int64_t* weights = scratch.weights.data() + block * BLOCK;
    for (int i = 0; i < BLOCK; ++i) {  // without a branch: which are in is chance
      few[size] = weights[i];
      size += (weights[i] >= bracket.low) & (weights[i] < bracket.high);
    }
  }
  const int64_t end = size;
  while (size % BLOCK) few[size++] = -1;
  const Measure base = bracket.from_high;
  while (bracket.count() > FEW) {
    Integers count{}, sum{};
    const int64_t threshold = bracket.middle();
    for (int64_t i = 0; i < size; i += BLOCK) measure_block(few.data() + i, threshold - Integers{}, count, sum);
    bracket.halve(threshold, {base.count + sum_of(count), base.sum + sum_of(sum)});
  }
  if (bracket.high - bracket.low <= 1) return bracket.low;
  const auto last = std::remove_if(few.begin(), few.begin() + end, [&](int64_t weight) {
    return weight < bracket.low || weight >= bracket.high;
  });
  std::sort(few.begin(), last, std::greater<int64_t>());
  int64_t reached = bracket.measured(bracket.from_high);
  for (auto weight = few.begin(); weight != last; ++weight) {
    reached += bracket.by_count ? 1 : *weight;
    if (reached >= bracket.wanted) return *weight;
  }
  return bracket.low;  // not reached: from `low` on there is enough
}

// The fewest largest weights, lowest ids first among equals, that count or sum to `wanted`; from `least` on there is
// enough.
Kept cut(int64_t wanted, bool by_count, int64_t least, Measure from_least, Scratch& scratch) {
  Bracket bracket{wanted, by_count, least, UNIT + 1, from_least, {0, 0}};
  const int64_t blocks = static_cast<int64_t>(scratch.block_weights.size());
  const int64_t rank = std::min<int64_t>(by_count ? wanted : GUESS, blocks) - 1;
  scratch.few = scratch.block_weights;
  std::nth_element(scratch.few.begin(), scratch.few.begin() + rank, scratch.few.end(), std::greater<int64_t>());
  const int64_t guess = scratch.few[rank];
  if (bracket.holds(guess)) bracket.halve(guess, measure_from(guess, scratch));
  if (bracket.count() > COPIED) {
    int64_t guesses[2];
    estimate(bracket, scratch, guesses);
    for (const int64_t threshold : guesses)
      if (bracket.holds(threshold)) bracket.halve(threshold, measure_from(threshold, scratch));
  }
  while (bracket.count() > COPIED) {
    const int64_t threshold = bracket.middle();
    bracket.halve(threshold, measure_from(threshold, scratch));
  }
  const int64_t floor = bracket.count() ? settle(bracket, scratch) : bracket.low;
  const Measure above = measure_from(floor + 1, scratch);
  const int64_t missing = wanted - bracket.measured(above);
  const int64_t ties = by_count || floor == 0 ? missing : (missing + floor - 1) / floor;
  return {floor, ties, above.sum + ties * floor};
}

// The kept token at `target` of the kept sum, by id.
int32_t take(const Kept& kept, int64_t target, const Scratch& scratch) {
  int64_t ties = kept.ties;
  const Integers floor = kept.floor - Integers{};
  for (size_t block = 0; block < scratch.block_weights.size(); ++block) {
    if (scratch.block_weights[block] < kept.floor) continue;
    const int64_t* weights = scratch.weights.data() + block * BLOCK;
    Integers above{}, ties_found{};
    for (int i = 0; i < BLOCK; i += LANES) {
      const Integers lanes = load(weights + i);
      above += lanes & (lanes > floor);
      ties_found -= lanes == floor;
    }
    const int64_t equal = sum_of(ties_found);
    const int64_t whole = sum_of(above) + std::min(equal, ties) * kept.floor;
    if (target >= whole) {
      target -= whole;
      ties -= std::min(equal, ties);
      continue;
    }
    for (int i = 0; i < BLOCK; ++i) {
      if (weights[i] < kept.floor || (weights[i] == kept.floor && ties-- <= 0)) continue;
      if (target < weights[i]) return static_cast<int32_t>(block * BLOCK + i);
      target -= weights[i];
    }
  }
  return -1;  // not reached: target is below the sum
}

int32_t draw(const float* logits, int64_t vocab, float largest, const Choice& choice, Scratch& scratch) {
  const int64_t total = weigh(logits, vocab, largest, choice.temperature, scratch);
  Kept kept{0, 0, total};
  Measure from_floor{static_cast<int64_t>(scratch.weights.size()), total};
  if (choice.top_k > 0 && choice.top_k < vocab) {
    kept = cut(choice.top_k, true, 0, from_floor, scratch);
    from_floor = measure_from(kept.floor, scratch);
  }
  if (choice.min_p > 0) {
    const int64_t least = std::min(static_cast<int64_t>(std::ceil(choice.min_p * static_cast<double>(UNIT))), UNIT);
    if (least > kept.floor) {
      from_floor = measure_from(least, scratch);
      kept = {least, from_floor.count, from_floor.sum};
    }
  }
  if (choice.top_p < 1) {
    const double wanted = std::ceil(choice.top_p * static_cast<double>(kept.sum));
    const int64_t whole = std::min(std::max(static_cast<int64_t>(wanted), int64_t{1}), kept.sum);
    kept = cut(whole, false, kept.floor, from_floor, scratch);
  }
  const auto product = static_cast<unsigned __int128>(choice.point) * static_cast<uint64_t>(kept.sum);
  return take(kept, static_cast<int64_t>(product >> 53), scratch);
}

// The likeliest ids, largest logit first, lowest id first among equals.
void find_top(const float* logits, int64_t vocab, int64_t count, int32_t* ids, Scratch& scratch) {
  const int64_t blocks = blocks_of(vocab);
  scratch.block_logits.resize(blocks);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t end = std::min(vocab, (block + 1) * BLOCK);
    int32_t most = std::numeric_limits<int32_t>::min();
    for (int64_t id = block * BLOCK; id < end; ++id) most = std::max(most, ordered(logits[id]));
    scratch.block_logits[block] = bits_of<float>(most ^ ((most >> 31) & 0x7fffffff));
  }
  float least = -std::numeric_limits<float>::infinity();
  if (count <= blocks) {
    scratch.likely = scratch.block_logits;
    std::nth_element(
        scratch.likely.begin(), scratch.likely.begin() + (count - 1), scratch.likely.end(), std::greater<float>());
    least = scratch.likely[count - 1];
  }
  scratch.likely_ids.clear();
  for (int64_t block = 0; block < blocks; ++block) {
    if (scratch.block_logits[block] < least) continue;
    const int64_t end = std::min(vocab, (block + 1) * BLOCK);
    for (int64_t id = block * BLOCK; id < end; ++id)
      if (logits[id] >= least) scratch.likely_ids.push_back(static_cast<int32_t>(id));
  }
  const auto end = scratch.likely_ids.begin() + count;
  std::partial_sort(scratch.likely_ids.begin(), end, scratch.likely_ids.end(), [logits](int32_t a, int32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  });
  std::copy(scratch.likely_ids.begin(), end, ids);
}

void score_row(const float* logits, int64_t vocab, Largest largest, int32_t token, int64_t num_top, double* logprob,
               int32_t* top_ids, double* top_logprobs, Scratch& scratch) {
  const double sum = static_cast<double>(weight_sum(logits, vocab, largest.logit)) * 0x1p-43;
  const double below = static_cast<double>(largest.logit) + std::log(sum);
  *logprob = static_cast<double>(logits[token]) - below;
  if (num_top <= 0) return;
  const int64_t count = std::min(num_top, vocab);
  find_top(logits, vocab, count, top_ids, scratch);
  for (int64_t i = 0; i < count; ++i) top_logprobs[i] = static_cast<double>(logits[top_ids[i]]) - below;
}

bool is_edited(const Choice& choice) { return choice.mask || choice.num_biases || choice.num_seen; }

// Mask, bias and penalties on a copy of the row. Ids outside the vocabulary change nothing.
void edit(const float* logits, int64_t vocab, const Choice& choice, std::vector<float>& edited) {
  edited.resize(vocab);
  if (choice.mask) {
    std::fill(edited.begin(), edited.end(), -std::numeric_limits<float>::infinity());
    const int64_t words = std::min<int64_t>(choice.num_mask_words, (vocab + 31) / 32);
    for (int64_t word = 0; word < words; ++word) {  // mostly nothing or everything of a word is allowed
      uint32_t bits = choice.mask[word];
      if (bits == ~uint32_t{0} && word * 32 + 32 <= vocab)
        std::copy(logits + word * 32, logits + word * 32 + 32, edited.data() + word * 32);
      else
        for (int64_t id = word * 32; bits && id < vocab; ++id, bits >>= 1)
          if (bits & 1) edited[id] = logits[id];
    }
  } else {
    std::copy(logits, logits + vocab, edited.begin());
  }
  for (int32_t i = 0; i < choice.num_biases; ++i) {
    const int32_t id = choice.bias_ids[i];
    if (id < 0 || id >= vocab) continue;
    edited[id] = static_cast<float>(static_cast<double>(edited[id]) + choice.biases[i]);
  }
  for (int32_t i = 0; i < choice.num_seen; ++i) {
    const int32_t id = choice.seen_ids[i];
    if (id < 0 || id >= vocab) continue;
    double logit = edited[id];
    logit = logit > 0 ? logit / choice.repetition_penalty : logit * choice.repetition_penalty;
    const double less = logit - choice.seen_counts[i] * choice.frequency_penalty;
    edited[id] = static_cast<float>(less - (choice.seen_counts[i] > 0 ? choice.presence_penalty : 0.0));
  }
}

void choose_row(const float* logits, int64_t vocab, Choice& choice, Scratch& scratch) {
  const Largest raw = find_largest(logits, vocab);
  choice.token = -1;
  if (!raw.finite) return;
  const float* row = logits;
  Largest largest = raw;
  if (is_edited(choice)) {
    edit(logits, vocab, choice, scratch.logits);
    row = scratch.logits.data();
    largest = find_largest(row, vocab);
    if (largest.logit == -std::numeric_limits<float>::infinity()) return;
  }
  choice.token = choice.temperature > 0 ? draw(row, vocab, largest.logit, choice, scratch) : largest.token;
  if (choice.num_top >= 0 && choice.token >= 0)  // -1 where penalties left no finite logit
    score_row(logits, vocab, raw, choice.token, choice.num_top, &choice.logprob, choice.top_ids, choice.top_logprobs,
              scratch);
}

Scratch& own_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

}  // namespace

// The largest logit's id of some rows; -1 for a row that holds NaN or infinity.
RAYMILL_VISIBLE void raymill_argmax(const float* logits, int64_t vocab, const int32_t* rows, int64_t count,
                                    int32_t* tokens) {
  for (int64_t i = 0; i < count; ++i) {
    const Largest largest = find_largest(logits + rows[i] * vocab, vocab);
    tokens[i] = largest.finite ? largest.token : -1;
  }
}

RAYMILL_VISIBLE void raymill_choose(const float* logits, int64_t vocab, Choice* const* choices, int64_t count) {
  Scratch& scratch = own_scratch();
  for (int64_t i = 0; i < count; ++i) choose_row(logits + choices[i]->row * vocab, vocab, *choices[i], scratch);
}

// Log probabilities of one token of each row, and of each row's num_top likeliest; NaN, of id 0, where a row holds NaN or
// infinity: nothing there has an order.
RAYMILL_VISIBLE void raymill_score(const float* logits, int64_t vocab, int64_t rows, const int32_t* targets,
                                   int64_t num_top, double* logprobs, int32_t* top_ids, double* top_logprobs) {
  Scratch& scratch = own_scratch();
  for (int64_t row = 0; row < rows; ++row) {
    const Largest largest = find_largest(logits + row * vocab, vocab);
    if (!largest.finite) {
      logprobs[row] = std::numeric_limits<double>::quiet_NaN();
      std::fill_n(top_ids + row * num_top, num_top, 0);
      std::fill_n(top_logprobs + row * num_top, num_top, logprobs[row]);
      continue;
    }
    score_row(logits + row * vocab, vocab, largest, targets[row], num_top, logprobs + row, top_ids + row * num_top,
              top_logprobs + row * num_top, scratch);
  }
}

RAYMILL_VISIBLE int raymill_is_finite(const float* numbers, int64_t count) {
  int32_t widest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = bits_of<int32_t>(numbers[i]) & 0x7fffffff;
    widest = bits > widest ? bits : widest;
  }
  return widest < INFINITE;
}
