#define MLK_ISA avx2
#define MLK_LANES 8
#define MLK_NAME table_avx2
#include "table.inc"
