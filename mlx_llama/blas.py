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
NAMES_OF_OFF = (OFF, "none")  # in whatever case
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
    """What was asked for, and what was taken when MLX was looked for."""

    asked: str | None = None
    taken: Blas | None = None
    is_settled: bool = False


_STATE = _State()


def take() -> None:
    """Open the library that was asked for, or that is found: called when MLX is about to be loaded.

    Later is too late, and earlier costs time for nothing; only the first call counts. Raises
    OptionError where what was asked for cannot be opened, each time until another is chosen.
    """
    if not _STATE.is_settled:
        _STATE.taken = _chosen(_STATE.asked)
        _STATE.is_settled = True


def choose(name: str) -> None:
    """Take this BLAS, or none ("off" or "none"), when MLX is imported.

    name: a library of the system's path, such as "libblis.so.4", or an absolute path. Where the
    native kernels are installed they multiply, and it is not opened.
    Raises OptionError where it comes too late, since MLX is loaded or was looked for, and for a
    path below the current folder. What cannot be opened is an OptionError when MLX is imported.
    """
    if name.lower() in NAMES_OF_OFF:
        name = OFF
    if "/" in name and not name.startswith("/"):
        raise OptionError(
            f"{VARIABLE}={name}: expected {OFF}, the name of a library such as libopenblas.so.0, "
            "or its absolute path"
        )
    if name == _STATE.asked:
        return
    if (why := _reason_against_a_choice()) is not None:
        raise OptionError(f"{VARIABLE}={name}: no BLAS can be taken: {why}")
    _STATE.asked = name


def taken() -> Blas | None:
    """Return the library that MLX multiplies with; None where it is MLX's own."""
    return _STATE.taken


def would_be_taken() -> bool:
    """Whether one that was installed would multiply: nothing has the kernels' place or is off."""
    return _STATE.asked != OFF and not are_kernels_installed()


def are_kernels_installed() -> bool:
    """Whether there is something in the native kernels' place, which may not fit; loads nothing."""
    return sys.modules.get(KERNELS) is not None or find_spec(KERNELS) is not None


def _reason_against_a_choice() -> str | None:
    if sys.platform != "linux":
        return "only Linux has a choice; leave it out"
    if "mlx.core" in sys.modules:
        return "MLX is loaded already; choose before it is imported, or leave it out"
    if _STATE.is_settled:
        return "mlx.core was looked for already; choose before that, or leave it out"
    return None


def _chosen(asked: str | None) -> Blas | None:
    if asked == OFF or are_kernels_installed():  # which leave it nothing to do
        return None
    if asked is not None:
        try:
            found = _opened(asked)
        except OSError as error:
            raise OptionError(
                f"{VARIABLE}={asked}: cannot be opened: {error}; install it, name another, or "
                f"give {OFF}"
            ) from error
        if found is None:
            raise OptionError(
                f"{VARIABLE}={asked}: a library without cblas_sgemm, so no BLAS; name another, or "
                f"give {OFF}"
            )
        return found
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
