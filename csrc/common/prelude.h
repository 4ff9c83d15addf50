// Everything the kernels need from outside, included before the compiler target is raised: inline functions of
// the standard library must not be compiled for instructions that another machine lacks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "bfloat16.h"
#include "partition.h"
#include "scratch.h"
#include "view.h"
