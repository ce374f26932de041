// The registers of AMX, set up by what they hold.
#pragma once
#include "vec.h"

#ifndef PX_AMX
#define PX_AMX 0
#endif

#if PX_AMX
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
    void set(int tile, int count, int bytes = 64) { rows[tile] = count, row_bytes[tile] = bytes; }
};
#endif
