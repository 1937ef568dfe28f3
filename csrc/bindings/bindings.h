#pragma once
#include <nanobind/nanobind.h>

namespace setpoint {

void bind_matmul(nanobind::module_& m);       // packing, dequantizing, matmul kernels one by one (tests, benches)
void bind_layers(nanobind::module_& m);       // norm, rope, activation, attention kernels one by one (tests, benches)
void bind_sampling(nanobind::module_& m);     // the sampler alone (tests)
void bind_weights(nanobind::module_& m);      // the store of a model's packed weights
void bind_text(nanobind::module_& m);         // string arrays and SentencePiece vocabularies
void bind_speculation(nanobind::module_& m);  // texts that lookups guess from
void bind_program(nanobind::module_& m);      // the lowered program and the machine's features
void bind_probe(nanobind::module_& m);        // what the machine can do at most

}  // namespace setpoint
