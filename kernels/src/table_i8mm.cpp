#define MLK_ISA i8mm
#define MLK_LANES 4
#define MLK_NAME table_i8mm
#include "table.inc"
