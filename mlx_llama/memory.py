"""What a model needs of the machine at a context, and what the machine has. Bytes everywhere.

One function predicts what `mx.get_peak_memory()` will say: weights, the cache at the whole context,
and the largest working set of a pass; and what the native kernels hold beside it. Checked on the
CPU; on Metal nobody has checked it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from mlx_llama import dequantized, ops
from mlx_llama.cache.kv import STEP
from mlx_llama.cache.rows import GROUPS, PLAIN, KVBits, row_bytes
from mlx_llama.cgroups import group_folders
from mlx_llama.config import ModelConfig
from mlx_llama.errors import MemoryShortError

FLOAT32 = 4
CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
CHOICES = (KVBits(32, 32), KVBits(16, 16), KVBits(8, 8), KVBits(4, 4))


@dataclass(frozen=True, slots=True)
class Demand:
    """What decides how much memory a model takes, but for the length of its context.

    weights: bytes still to be loaded. bits: of the cache. dtype: of activations. chunk: tokens of a
    prompt that are computed at once. slides: whether a full context forgets the oldest tokens.
    packed_from: tokens that are cached as computed before all are packed.
    """

    config: ModelConfig
    weights: int
    bits: KVBits
    dtype: mx.Dtype
    chunk: int
    slides: bool = False
    packed_from: int = 0

    def at(self, context: int, found: int | None) -> MemoryPlan:
        """Predict the peak of filling a context; found: the memory that is free."""
        return MemoryPlan(
            context=context,
            weights=self.weights,
            cache=cache_bytes(self, context),
            workspace=workspace_bytes(self, context),
            scratch=scratch_bytes(self, context),
            found=found,
            is_proven=ops.backend() == "cpu",
        )

    def largest_context(self, found: int | None) -> int:
        """Return the longest context that fits, up to the model's own; 0 where none does."""
        low, high = 0, self.config.max_context
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.at(middle, found).fits else (low, middle - 1)
        return low

    def largest_contexts(self, found: int | None) -> dict[str, int]:
        """Return the longest context that fits at what the model can have of 32, 16, 8 and 4 bits.

        By `--kv-bits`; those that were chosen are among them.
        """
        choices = [bits for bits in CHOICES if bits == self.bits or self._has(bits)]
        choices += [] if self.bits in choices else [self.bits]
        return {str(bits): replace(self, bits=bits).largest_context(found) for bits in choices}

    def _has(self, bits: KVBits) -> bool:
        """Whether the model can be cached in such bits, and 32 are not what 16 mean."""
        if not bits.is_plain:
            return self.config.head_dim % GROUPS[-1] == 0
        is_half = ops.cache_dtype(self.dtype, KVBits()) != mx.float32
        return bits == KVBits() or (self.dtype == mx.float32 and is_half)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a model takes at a context of so many tokens; found: what is free, None if unknown.

    scratch: of the native kernels, which MLX does not count. is_proven: whether the prediction was
    checked on this kind of device.
    """

    context: int
    weights: int
    cache: int
    workspace: int
    scratch: int
    found: int | None
    is_proven: bool

    @property
    def total(self) -> int:
        """Bytes needed in all."""
        return self.weights + self.cache + self.workspace + self.scratch

    @property
    def fits(self) -> bool:
        """Whether the machine has so much, as far as it tells."""
        return self.found is None or self.total <= self.found


def require_memory(demand: Demand, plan: MemoryPlan) -> None:
    """Raise MemoryShortError, with the contexts that would fit, when a plan does not."""
    found = plan.found
    if plan.fits or found is None:
        return
    workspace = plan.workspace + plan.scratch
    parts = [("weights", plan.weights), ("cache", plan.cache), ("workspace", workspace)]
    listed = ", ".join(f"{name} {_size(value)}" for name, value in parts if value)
    most = demand.largest_contexts(found)
    hint = "end another program, or take a smaller model or fewer bits"
    if any(most.values()):
        hint = "--context can be at most " + ", ".join(
            f"{n} with --kv-bits {bits}" for bits, n in most.items()
        )
    raise MemoryShortError(
        f"--context {plan.context}: {_size(plan.total)} needed ({listed}), {_size(found)} of "
        f"memory free: {hint}"
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def cache_bytes(demand: Demand, context: int) -> int:
    """Return the most that the cached tokens take while a context is filled."""
    config, dtype = demand.config, demand.dtype
    packed = cache_bytes_per_token(config, demand.bits, dtype)
    if demand.bits.is_plain or demand.packed_from == 0:
        return context * packed
    plain_tokens = min(context, -(-demand.packed_from // STEP) * STEP)
    plain = cache_bytes_per_token(config, KVBits(), dtype)
    # One layer stands in both forms while it is packed.
    both = plain_tokens * (plain + packed // config.n_layers)
    return max(both, context * packed)


def cache_bytes_per_token(config: ModelConfig, bits: KVBits, dtype: mx.Dtype) -> int:
    """Return what one token takes in all layers, plain or packed. dtype: of activations."""
    size = ops.cache_dtype(dtype, bits).size
    row = sum(row_bytes(config.head_dim, each, size) for each in (bits.keys, bits.values))
    return config.n_layers * config.n_kv_heads * row


def workspace_bytes(demand: Demand, context: int) -> int:
    """Return the largest working set of a pass: what half a block has alive at once on a CPU.

    The factors count arrays of `model` and `attention`; they were measured, in float32 and
    bfloat16, on shapes from 4M parameters to an 8B's. A pass that overwrites a ring keeps its own
    rows of every layer until it is over; in the last one it works for a single token.
    """
    config, dtype = demand.config, demand.dtype
    chunk = demand.chunk if demand.slides else min(demand.chunk, context)
    seen = context + chunk if demand.slides else context
    in_layer = cache_bytes_per_token(config, demand.bits, dtype) // config.n_layers
    pending = chunk * in_layer * (config.n_layers - 1) if demand.slides else 0
    if ops.kernels() is not None:
        return _native_bytes(demand, chunk) + pending
    masks = chunk * seen if demand.slides else 0
    return (
        pending
        + masks
        + max(
            _feed_forward_bytes(config, dtype, chunk),
            _prompt_attention_bytes(demand, seen, chunk),
            _token_attention_bytes(config, context, demand.bits, dtype),
            _dequantized_bytes(config, chunk) if dtype == mx.float32 else 0,
        )
    )


def scratch_bytes(demand: Demand, context: int) -> int:
    """Return what the native kernels hold beside MLX's arrays: what one operation wants at most."""
    if (ours := ops.kernels()) is None:
        return 0
    config = demand.config
    heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    dim, hidden = config.dim, config.hidden_dim
    shapes = ((heads + 2 * kv_heads, dim), (dim, heads), (2 * hidden, dim), (dim, hidden))
    forms = {config.quantization, *config.overrides.values()}
    chunk = demand.chunk if demand.slides else min(demand.chunk, context)
    rows = context + chunk if demand.slides else context
    asked: list[tuple[int, int]] = []  # for all threads together, and for each
    for n_tokens in (chunk, 1):
        asked.append(
            ours.attention_scratch(
                config.n_heads, config.n_kv_heads, config.head_dim, n_tokens, rows
            )
        )
        for form in forms:
            how = {} if form is None else {"group_size": form.group_size, "bits": form.bits}
            if form is None or ops.is_native_format(form):
                products = (
                    ours.product_scratch(*each, n_tokens, demand.dtype, **how) for each in shapes
                )
                asked += products
    return max(common for common, _ in asked) + ours.threads() * max(each for _, each in asked)


def _native_bytes(demand: Demand, chunk: int) -> int:
    """Count what an operation has alive where the native kernels run it: no scores.

    Each waits for those before, so that is the residual stream, what the operation reads and what
    it writes: SwiGLU its gates, their factors and the products, rotation q, k and v, and q and k
    once more.
    """
    config, size = demand.config, demand.dtype.size
    heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention = (2 * heads + 3 * kv_heads) * size
    return chunk * (config.dim * size + max(3 * config.hidden_dim * size, attention))


def _feed_forward_bytes(config: ModelConfig, dtype: mx.Dtype, chunk: int) -> int:
    copies = 3 if dtype == mx.float32 else 4
    return copies * chunk * dtype.size * (config.hidden_dim + config.dim)


def _dequantized_bytes(config: ModelConfig, chunk: int) -> int:
    """Count a product with a packed matrix where a BLAS does it: see `dequantized.py`."""
    if ops.fast_blas() is None or config.quantization is None or chunk < dequantized.LEAST_ROWS:
        return 0
    heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    dim, hidden = config.dim, config.hidden_dim
    shapes = ((heads + 2 * kv_heads, dim), (dim, heads), (2 * hidden, dim), (dim, hidden))
    found: list[int] = []
    for rows, columns in shapes:
        whole = rows * columns * dequantized.NUMBER_BYTES
        # The residual stream twice, what is multiplied, and the product.
        floats = chunk * (2 * dim + columns + rows)
        if whole > dequantized.BYTES:  # in parts, which are joined, beside what the norm has left
            found.append((floats + chunk * rows) * FLOAT32)
            floats += 3 * chunk * dim
        found.append(min(dequantized.BYTES, whole) + floats * FLOAT32)
    return max(found)


def _prompt_attention_bytes(demand: Demand, seen: int, chunk: int) -> int:
    """Count a pass over so many rows; a sliding one has them in two parts, which are joined."""
    config, bits, dtype = demand.config, demand.bits, demand.dtype
    heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    rows = ops.attention_manner(dtype).tile_rows(config.n_heads, chunk)
    is_float, is_tiled = dtype == mx.float32, seen > rows
    rows = min(rows, seen)
    if is_tiled:
        # In half precision the weights of a tile become halves again for plain values.
        halves = 0 if is_float else 2 if bits.values == PLAIN else 1
        per_score = 2 * FLOAT32 + halves * dtype.size
        # The middle of what was found: how far MLX allocates ahead differs from run to run.
        floats = 7 - demand.slides if is_float else 5 - 2 * demand.slides
        per_number = floats * FLOAT32 + (0 if is_float else 3 * dtype.size)
    else:
        n_copies = 4 if demand.slides else 2
        per_score = n_copies * dtype.size
        per_number = (8 if is_float and demand.slides else 3) * dtype.size
    scores = config.n_heads * chunk * rows * per_score
    projected = 2 * chunk * (heads + 2 * kv_heads) * dtype.size
    n_keys = 1 if bits.keys == PLAIN else 2 if is_float else 4
    keys = n_keys * rows * kv_heads * dtype.size if is_tiled else 0
    # What the feed-forward layer before has not given back yet.
    before = _feed_forward_bytes(config, dtype, chunk) // 8
    return scores + projected + chunk * heads * per_number + keys + before


def _token_attention_bytes(config: ModelConfig, context: int, bits: KVBits, dtype: mx.Dtype) -> int:
    is_float = dtype == mx.float32
    scores = config.n_heads * context * FLOAT32 * (1 if is_float and bits.is_plain else 2)
    # On a CPU packed products want float32 scales and biases.
    n_packed = 0 if is_float else sum(each != PLAIN for each in (bits.keys, bits.values))
    scales = row_bytes(config.head_dim, 8, FLOAT32) - config.head_dim if n_packed else 0
    return scores + n_packed * context * config.n_kv_heads * scales


def memory_found() -> int | None:
    """Return the bytes that MLX can still take: of the GPU's working set, or of free memory."""
    most = ops.working_set()
    return available_memory() if most is None else most - mx.get_active_memory()


def available_memory() -> int | None:
    """Return the bytes that a program can still take, the cgroup's limit respected."""
    found = [size for size in (_linux_available(), _cgroup_left()) if size is not None]
    if found:
        return min(found)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def _linux_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_left() -> int | None:
    """Return the least that the process's control groups leave, from its own to the root's."""
    found = [
        left
        for folder in _cgroup_folders()
        for names in CGROUP_FILES
        if (left := _left_in(folder, *names)) is not None
    ]
    return min(found, default=None)


def _cgroup_folders() -> list[Path]:
    return group_folders("memory")


def _left_in(folder: Path, limit: str, used: str) -> int | None:
    try:
        most = int((folder / limit).read_text(encoding="ascii"))
        taken = int((folder / used).read_text(encoding="ascii"))
        stat = dict(
            line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines()
        )
    except (OSError, ValueError):  # no such group, or "max"
        return None
    # What was read from files is given up when it is wanted.
    spare = int(stat.get("total_inactive_file") or stat.get("inactive_file") or 0)
    return most - max(0, taken - spare)
