from mlx_llama.dtypes import A,BY_SAFETENSORS,DTYPES,Dtype,MAX_DIMENSION,MAX_NDIM # moved to mlx_llama
