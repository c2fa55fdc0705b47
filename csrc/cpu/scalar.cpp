// kernels.inc for any processor.
#include "kernels.h"
#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>
#define RETRO_FLOATS 4
#define RETRO_ROWS 4
#define RETRO_VECTORS 1
#define RETRO_BF16 0
namespace retro {
namespace scalar {
#include "kernels.inc"
}  // namespace scalar
extern const Build scalar_build = {"scalar", scalar::attention_forward, scalar::attention_backward, scalar::rope, scalar::gather_neighbors, scalar::linear, scalar::norm, scalar::put, scalar::attend, scalar::cross_entropy, scalar::apply};
}  // namespace retro
