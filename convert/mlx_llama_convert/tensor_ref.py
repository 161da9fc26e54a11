from mlx_llama.tensor_ref import RowBuffer,TensorRef,_read_at,row_bounds # moved to mlx_llama
