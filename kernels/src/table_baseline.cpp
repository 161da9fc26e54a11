#define MLK_ISA baseline
#define MLK_LANES 4
#define MLK_NAME table_baseline
#include "table.inc"
