// One row's choice, as compiled_draws.Choice lays it out: settings in, the token and its log probability out.
#pragma once
#include <cstdint>

struct Choice {
  double temperature;  // 0 takes the largest
  double top_p;
  double min_p;
  double repetition_penalty;
  double frequency_penalty;
  double presence_penalty;
  uint64_t point;  // where in the sum the draw falls, in 2**-53 of it
  const uint32_t* mask;  // bit i % 32 of word i / 32: whether id i may come, never beyond; null allows all
  const int32_t* bias_ids;
  const double* biases;
  const int32_t* seen_ids;  // what the penalties touch
  const int32_t* seen_counts;
  int32_t num_mask_words;
  int32_t num_biases;
  int32_t num_seen;
  int32_t top_k;  // 0 cuts nothing
  int32_t row;  // of the logits
  int32_t num_top;  // likeliest ids to give with their log probabilities; -1 gives none and no log probability
  int32_t token;  // out; -1 where nothing can be chosen
  int32_t* top_ids;  // out, num_top
  double* top_logprobs;  // out, num_top
  double logprob;  // out, nats
};
