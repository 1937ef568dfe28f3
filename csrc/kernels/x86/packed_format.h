// The packed layouts that exist, as types: the kernels are compiled once for each.
// Everything is in an anonymous namespace: every unit compiles its own copy for its own ISA (kernels.h).
#pragma once
#include "kernels/kernels.h"
#include "kernels/packed_layout.h"

namespace setpoint {
namespace {

template <Codes codes, ScaleType type, bool affine, int group>
struct PackedFormat {
  static constexpr Codes kCodes = codes;
  static constexpr bool kSubScales = type == ScaleType::sub8;
  static constexpr bool kAffine = affine;
  static constexpr int kGroup = group;
  static constexpr int kStepGroups = kStepInputs / group;
  static constexpr int kSteps = steps_per_record(type);
  static constexpr int kStepBytes = step_bytes(codes);
  static constexpr int kScaleBytes = scale_block_bytes(type, affine, group);
  static constexpr int kRecordBytes = record_bytes(codes, type, affine, group);
  // Within a record: the mins of f16 records; the sub-scales and sub-mins of the others.
  static constexpr int kMinsAt = type == ScaleType::sub8 ? 32 : kLineBytes;
  static constexpr int kSubMinsAt = kLineBytes + 256 / group * 16;
};

// Calls visit(PackedFormat<...>()) with the weight's format.
template <class Visit>
inline void visit_format(const PackedWeight& w, Visit visit) {
  constexpr ScaleType f16 = ScaleType::f16, sub8 = ScaleType::sub8;
  const bool subs = w.scale_type == sub8;
  switch (w.codes) {
    case Codes::u2:
      return visit(PackedFormat<Codes::u2, sub8, true, 16>());  // Q2_K
    case Codes::u3:
      return visit(PackedFormat<Codes::u3, sub8, false, 16>());  // Q3_K
    case Codes::u4:
      if (subs) return visit(PackedFormat<Codes::u4, sub8, true, 32>());  // Q4_K
      if (w.affine) return visit(PackedFormat<Codes::u4, f16, true, 32>());
      return visit(PackedFormat<Codes::u4, f16, false, 32>());
    case Codes::u5:
      if (subs) return visit(PackedFormat<Codes::u5, sub8, true, 32>());  // Q5_K
      if (w.affine) return visit(PackedFormat<Codes::u5, f16, true, 32>());
      return visit(PackedFormat<Codes::u5, f16, false, 32>());
    case Codes::u6:
      return visit(PackedFormat<Codes::u6, sub8, false, 16>());  // Q6_K
    default:
      return visit(PackedFormat<Codes::u8, f16, false, 32>());
  }
}

}  // namespace
}  // namespace setpoint
