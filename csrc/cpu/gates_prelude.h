#pragma once

#include "../common/prelude.h"
#include "gates.h"
