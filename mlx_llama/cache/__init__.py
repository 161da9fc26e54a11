"""Keys and values of tokens already seen: `kv` the caches, `window` what is held and seen, `rows`
how it is stored, `slots` how single tokens write to it, `view` what attention reads, `file` how it
is kept on disk."""

from mlx_llama.cache.file import load_cache, save_cache
from mlx_llama.cache.kv import Cache, KVCache, NoCache
from mlx_llama.cache.rows import KVBits
from mlx_llama.cache.slots import Slots
from mlx_llama.cache.view import View

__all__ = ["Cache", "KVBits", "KVCache", "NoCache", "Slots", "View", "load_cache", "save_cache"]
