// Finds the most likely token with less work than multiplying the whole output matrix, and finds exactly the one that
// multiplying it all would find.
//
// Few rows are short of memory bandwidth. Of an 8-bit matrix, a 5-bit copy is multiplied first. What the copy leaves out of a channel's
// weights has a known norm, so the product has a known error: only panels whose upper bound reaches the best exact logit seen are
// multiplied again, with all their bits. Hidden states of a language model share a few large directions; the error
// along those is stored per channel and added back, which leaves a bound tight enough to be of use (a head of 262,144
// channels: about 1 % of the panels). The bound is Cauchy-Schwarz, with room for every rounding on the way.
//
// Many rows are short of arithmetic. They multiply the whole matrix, but by the first plane of their inputs only: what
// the second plane can add is bounded by its norm times the channel's, and few panels are left to add it to.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "core/thread_pool.h"
#include "program/workspace.h"

namespace setpoint {

class Shortlist {
 public:
  // Raise it whenever the same matrix leaves other bytes in memory: they are cached on disk.
  static constexpr uint32_t kVersion = 1;

  // Whether the matrix is of the kind that this helps: many channels, 8-bit codes; all scales finite.
  static bool suits_shape(const PackedWeight& weight);
  static bool suits(const PackedWeight& weight);
  // Of what is derived from the matrix; zeros to begin with.
  static size_t memory_bytes(const PackedWeight& weight);
  static bool is_made(const uint8_t* memory);

  // Derives everything from the matrix, into `memory`. `hidden`: some rows [n][k] of typical inputs of the matrix. They
  // decide how tight the bounds are, never a result.
  Shortlist(const PackedWeight& weight, std::span<const float> hidden, const KernelTable& kernels, ThreadPool& pool, int max_rows,
            uint8_t* memory);
  // What was made there before: memory is only read.
  Shortlist(const PackedWeight& weight, int max_rows, uint8_t* memory);

  size_t num_bytes() const { return memory_bytes(weight_); }
  const PackedWeight& weight() const { return weight_; }  // the 5-bit copy

  // Of input row `row`, given in two planes. False when the row is beyond what the bounds cover (not finite, say).
  bool load_row(int row, const QuantizedActivations& coarse, const QuantizedActivations& fine);

  // args: rows and panels as for the whole matrix, q the coarse plane. Notes each panel's bound.
  void screen_copy(const KernelTable& kernels, MatmulArgs args);   // out receives scratch
  void screen_whole(const KernelTable& kernels, MatmulArgs args);  // args.weight is the matrix; out: what lacks the fine plane
  float upper(int row, int panel) const { return upper_[static_cast<size_t>(row) * panels() + static_cast<size_t>(panel)]; }
  int most_promising(int row) const;   // the panel with the highest bound
  void leave_out(int row, int panel);  // it is known now

 private:
  static constexpr int kDirections = 2;
  struct Row {
    float along[kDirections];     // the input's components along the directions
    float rounding[kDirections];  // what the stored error may be off along them, as a factor of it
    float rest;                   // norm of the input without them
    float slack;                  // bound of all other errors, as a factor of a channel's norm
  };
  enum Bound : int { error_along, error_rest = kDirections, norm, kBounds };  // per channel, bf16

  size_t panels() const { return static_cast<size_t>(weight_.panels()); }
  void find_directions(std::span<const float> hidden);
  void shorten(const PackedWeight& whole, int panel, float* error_norms, float* kept_norms);
  void store_bounds(int channel, const float* along, float error_norm, float kept_norm);
  void measure_errors(const PackedWeight& whole, const KernelTable& kernels, ThreadPool& pool);
  void measure_panels();
  float panel_bound(const Row& row, const float* y, int panel) const;
  template <class BoundOf>
  void screen(const KernelTable& kernels, MatmulArgs args, BoundOf&& bound_of);

  PackedWeight weight_;  // 5-bit copy
  uint8_t* codes_;
  uint16_t* bounds_;   // [panel][kBounds][16]
  float* directions_;  // [kDirections][k]: exactly the sum of the two planes
  QuantizedActivations coarse_directions_, fine_directions_;
  std::vector<float> panel_norms_;  // [panels] the largest of its channels
  std::vector<Row> rows_;
  std::vector<float> upper_;  // [rows][panels]
};

}  // namespace setpoint
