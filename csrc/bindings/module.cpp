// The Python module `setpoint._native`: one bind_* function per area.
#include "bindings/bindings.h"

NB_MODULE(_native, m) {
  m.doc() = "Setpoint's native core: packed weights, kernels, lowered programs.";
  nanobind::set_leak_warnings(false);  // daemon threads hold objects when the interpreter ends
  setpoint::bind_matmul(m);
  setpoint::bind_layers(m);
  setpoint::bind_sampling(m);
  setpoint::bind_weights(m);
  setpoint::bind_text(m);
  setpoint::bind_speculation(m);
  setpoint::bind_program(m);
  setpoint::bind_probe(m);
}
