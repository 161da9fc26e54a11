#define MLK_ISA vbmi
#define MLK_LANES 16
#define MLK_NAME table_vbmi
#include "table.inc"
