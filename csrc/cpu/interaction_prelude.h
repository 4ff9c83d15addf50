#pragma once

#include "../common/prelude.h"
#include "interaction.h"
#include "level.h"
