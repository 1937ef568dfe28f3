// The sampler's vocabulary scans, 16 floats wide.
#include "kernels/sample_scan.h"

namespace setpoint {
const SampleScans kSampleScansAvx512 = {scan_maxima<16>, scan_weights<16>, scan_mask<16>};
}
