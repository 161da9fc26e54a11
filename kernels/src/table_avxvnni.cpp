#define MLK_ISA avxvnni
#define MLK_LANES 8
#define MLK_NAME table_avxvnni
#include "table.inc"
