"""Make the small real `.pth` files under tests/golden/, with their expected values.

Needs torch (made with 2.13), which the tests do not: `python tests/golden/make_pth.py`.
`torch_<case>.pth` holds the tensors, `torch_pth.json` for each of them dtype, shape and the bytes
in hexadecimal, as torch itself gives them.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import torch

HERE = Path(__file__).parent


def bytes_of(tensor: torch.Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist()).hex() if flat.numel() else ""


def cases() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    block = values(20).bfloat16()
    tied = values(4, 3).half()
    module = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    with torch.no_grad():
        module.weight.copy_(values(2, 3))
        module.bias.copy_(values(2))
    return {
        "dtypes": {
            "bf16": values(3, 5).bfloat16(),
            "fp16": values(2, 3, 2).half(),
            "fp32": values(4),
            "int8": torch.tensor([-128, -1, 0, 127], dtype=torch.int8),
            "uint8": torch.tensor([0, 255], dtype=torch.uint8),
            "int32": torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32),
            "int64": torch.tensor([-(2**63), 2**40], dtype=torch.int64),
            "bool": torch.tensor([True, False, True]),
            "scalar": torch.tensor(2.5),
            "empty": torch.zeros(0, 4),
        },
        "fp8": {"w": values(3, 4).to(torch.float8_e4m3fn), "scale": values(3)},
        "shared": OrderedDict(
            first=block[:8].view(2, 4),
            second=block[8:].view(3, 4),
            whole=block,
            embeddings=tied,
            output=tied,
        ),
        "parameter": {"p": torch.nn.Parameter(values(2, 3).bfloat16())},
        "state_dict": module.state_dict(),  # an OrderedDict with attributes (opcode BUILD)
        "transposed": {"sound": values(2), "turned": values(2, 3).t()},
    }


def main() -> None:
    expected: dict[str, dict[str, dict[str, object]]] = {}
    for case, tensors in cases().items():
        torch.save(tensors, HERE / f"torch_{case}.pth")
        expected[case] = {
            name: {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "hex": bytes_of(tensor),
            }
            for name, tensor in tensors.items()
        }
    torch.save(
        {"a": torch.ones(2)}, HERE / "torch_legacy.pth", _use_new_zipfile_serialization=False
    )
    text = json.dumps(expected, indent=1, sort_keys=True)
    (HERE / "torch_pth.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
