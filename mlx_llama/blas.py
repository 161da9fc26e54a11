"""An optimised BLAS in place of the one that comes with MLX: the second-best way on a CPU.

MLX's wheel for Linux brings the reference BLAS, which multiplies float32 matrices 60 to 80 times
slower than OpenBLAS. MLX binds its functions by name, so that a library which was made global
before MLX is loaded is what runs. It is taken where the native kernels are not installed; a
macOS has Accelerate. Imports no MLX, and opens libraries of the system alone.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from mlx_llama.cgroups import usable_processors
from mlx_llama.errors import OptionError

VARIABLE = "MLX_LLAMA_BLAS"  # of the command line, which gives its value to `choose`
OFF = "off"
KERNELS = "mlx_llama_kernels"
# In the order in which they are looked for, and how their threads are counted and limited.
THREADS = {
    "libopenblas.so.0": ("openblas_get_num_threads", "openblas_set_num_threads"),
    "libmkl_rt.so.2": ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
    "libblis.so.4": ("bli_thread_get_num_threads", "bli_thread_set_num_threads"),
}


@dataclass(frozen=True, slots=True)
class Blas:
    """A library that multiplies for MLX. name: as it was opened."""

    name: str
    library: Any

    def threads(self) -> int | None:
        """Return how many threads it works with; None where it does not tell."""
        count = self._function(0)
        return None if count is None else int(count())

    def use_threads(self, n_threads: int) -> bool:
        """Let so many threads work; whether it can be told to."""
        from ctypes import c_long

        limit = self._function(1)
        if limit is None:
            return False
        limit(c_long(n_threads))
        return True

    def _function(self, which: int) -> Any | None:
        names = [functions[which] for functions in THREADS.values()]
        return next(
            (getattr(self.library, name) for name in names if hasattr(self.library, name)), None
        )


@dataclass(slots=True)
class _State:
    """What was asked for, and what was taken when MLX was loaded."""

    asked: str | None = None
    taken: Blas | None = None


_STATE = _State()


def take() -> None:
    """Open the library that was asked for, or that is found: called when MLX is about to be loaded.

    Later is too late, and earlier costs time for nothing. Raises OptionError where what was asked
    for cannot be opened.
    """
    _STATE.taken = _chosen(_STATE.asked)


def choose(name: str) -> None:
    """Take this BLAS, or none ("off"), when MLX is imported.

    name: a library of the system's path, such as "libblis.so.4", or an absolute path.
    Raises OptionError where it could have no effect: MLX is loaded already, or the name is a path
    below the current folder. One that cannot be opened is an OptionError when MLX is imported.
    """
    if "/" in name and not name.startswith("/"):
        raise OptionError(
            f"{VARIABLE}={name}: expected {OFF}, the name of a library such as libopenblas.so.0, "
            "or its absolute path"
        )
    if name == _STATE.asked:
        return
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        why = "MLX is loaded already" if sys.platform == "linux" else "only Linux has a choice"
        raise OptionError(f"{VARIABLE}={name}: no BLAS can be taken: {why}; leave it out")
    _STATE.asked = name


def taken() -> Blas | None:
    """Return the library that MLX multiplies with; None where it is MLX's own."""
    return _STATE.taken


def _chosen(asked: str | None) -> Blas | None:
    if asked == OFF:
        return None
    if asked is not None:
        try:
            found = _opened(asked)
        except OSError as error:
            raise OptionError(f"{VARIABLE}={asked}: cannot be opened: {error}") from error
        if found is None:
            raise OptionError(f"{VARIABLE}={asked}: a library without cblas_sgemm, so no BLAS")
        return found
    if find_spec(KERNELS) is not None:  # they leave it nothing to do
        return None
    for name in THREADS:
        try:
            if (found := _opened(name)) is not None:
                return found
        except OSError:  # there is no such library
            continue
    return None


def _opened(name: str) -> Blas | None:
    """Open a library for everybody; None where it is no BLAS. Raises OSError where it cannot be."""
    from ctypes import CDLL, RTLD_GLOBAL

    if not hasattr(CDLL(name), "cblas_sgemm"):
        return None
    blas = Blas(name, CDLL(name, mode=RTLD_GLOBAL))
    # It minds its affinity and the variables that it has of its own; of quotas it knows nothing.
    if (n_threads := blas.threads()) is not None and n_threads > (most := usable_processors()):
        blas.use_threads(most)
    return blas
