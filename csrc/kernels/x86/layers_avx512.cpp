// Row operations and attention for this ISA: none yet, the table keeps what it inherited.
#include "kernels/kernels.h"

namespace setpoint {

void register_avx512_layers(KernelTable&) {}

}  // namespace setpoint
