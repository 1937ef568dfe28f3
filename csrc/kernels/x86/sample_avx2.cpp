// The sampler's vocabulary scans, 8 floats wide.
#include "kernels/sample_scan.h"

namespace setpoint {
const SampleScans kSampleScansAvx2 = {scan_maxima<8>, scan_weights<8>, scan_mask<8>};
}
