"""Who else evaluates a model of Forge's family is noticed; the host's modules are the double's."""

import importlib
import sys

import pytest
import torch
from torch import nn

from tests.contract.double import HOST, fresh_imports


@pytest.fixture(scope="module")
def company():
    with fresh_imports("loratorio_ext", *(path.stem for path in HOST.iterdir())):
        sys.path.insert(0, str(HOST))
        yield importlib.import_module("loratorio_ext.hosts.forge_company")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.diffusion_model = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 3)).requires_grad_(False)


class Refused(Exception):
    pass


@pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="PyTorch 2.6 and later can be told not to compile"
)
def test_code_that_was_compiled_before_does_not_hide_who_calls_it(company):
    """The compiled model has seen this shape plainly, and does not look for hooks."""
    model, x, ours = Model(), torch.randn(2, 3), [True]
    compiled = torch.compile(model.diffusion_model, backend="eager")
    plain = compiled(x)
    with company.alone(model, lambda: ours[0], Refused, dict):
        assert torch.equal(compiled(x), plain)
        ours[0] = False
        with pytest.raises(Refused, match="another extension"):
            compiled(x)
    assert torch.equal(compiled(x), plain)
