#define MLK_ISA avx512
#define MLK_LANES 16
#define MLK_NAME table_avx512
#include "table.inc"
