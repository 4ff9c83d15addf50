// Everything the kernels need from outside, included before the compiler target is raised: inline functions of
// the standard library must not be compiled for instructions that another machine lacks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../common/partition.h"
#include "../common/view.h"
#include "interaction.h"
