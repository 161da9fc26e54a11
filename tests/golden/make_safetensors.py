"""Make `library.safetensors` under tests/golden/ with the safetensors library itself.

Needs torch and safetensors (made with 0.8), which the tests do not:
`python tests/golden/make_safetensors.py`. The reader must read it, the writer must write the same.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file


def main() -> None:
    tensors = {
        "b.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3) / 7,
        "a.weight": (torch.arange(10, dtype=torch.float32) / 3).bfloat16().reshape(5, 2),
        "codes": torch.tensor([[1, 2**31 - 1]], dtype=torch.int32),
    }
    path = Path(__file__).parent / "library.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
