# SPDX-License-Identifier: Apache-2.0
"""fused_expand_int8 and fused_expand_int4 against reference.dequantize and expand."""

import kernel_cases as cases
import kernel_checks as checks
import pytest
import torch


@pytest.mark.parametrize("name", cases.EXPAND)
def test_loose_codes(name: str) -> None:
    checks.check_fused_expand(*cases.EXPAND[name])


def test_all_codes_decode_exactly() -> None:
    """Every int8 code and every pair of nibbles, through an identity basis in fp32."""
    device = cases.DEVICE
    eye, mean = torch.eye(64, device=device)[None].contiguous(), torch.zeros(1, 64, device=device)
    scale = cases.reference.scale_code(torch.full((4, 1), 0.5, device=device))
    codes = torch.arange(-128, 128, dtype=torch.int8, device=device).view(4, 1, 64)
    out = torch.full((4, 1, 64), float("nan"), device=device)
    cases.fused_expand.fused_expand_int8(codes, scale, eye, mean, out)
    assert torch.equal(out, codes.float() * 0.5)
    packed = torch.arange(256, device=device).to(torch.uint8).view(8, 1, 32)
    out = torch.full((8, 1, 64), float("nan"), device=device)
    cases.fused_expand.fused_expand_int4(packed, scale.repeat(2, 1), eye, mean, out)
    assert torch.equal(out, (torch.cat([packed & 15, packed >> 4], -1).float() - 7.5) * 0.5)


def test_wrong_arguments_are_named() -> None:
    codes, scale = torch.zeros(4, 2, 64, dtype=torch.int8), torch.zeros(4, 2, dtype=torch.uint8)
    v_decode, mean, out = torch.zeros(2, 64, 64), torch.zeros(2, 64), torch.zeros(4, 2, 64)
    with pytest.raises(ValueError, match="^codes: expected"):
        cases.fused_expand.fused_expand_int8(codes.view(torch.uint8), scale, v_decode, mean, out)
    with pytest.raises(ValueError, match="^scale: expected"):
        cases.fused_expand.fused_expand_int8(codes, scale.float(), v_decode, mean, out)
    with pytest.raises(ValueError, match="^packed: expected"):
        cases.fused_expand.fused_expand_int4(codes.view(torch.uint8), scale, v_decode, mean, out)
