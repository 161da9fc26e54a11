"""Keys and values of tokens already seen: `base` what a model needs of a cache, `kv` the cache,
`window` what is held and seen, `rows` how it is stored, `slots` how single tokens write to it,
`view` what attention reads, `file` how it is kept on disk."""

from mlx_llama.cache.base import Cache, NoCache
from mlx_llama.cache.file import load_cache, save_cache
from mlx_llama.cache.kv import KVCache
from mlx_llama.cache.rows import KVBits
from mlx_llama.cache.slots import Slots
from mlx_llama.cache.view import View

__all__ = ["Cache", "KVBits", "KVCache", "NoCache", "Slots", "View", "load_cache", "save_cache"]
