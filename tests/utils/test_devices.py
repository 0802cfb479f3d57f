"""`--device`: the best there is, or the one that is named, or one line."""

import pytest
import torch

from looc_ldm.utils.devices import choose_device
from looc_ldm.utils.errors import UserError


def test_a_device_that_there_is():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(None) == (torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))


@pytest.mark.parametrize("name", ["meta", "hpu", "nonsense", "cuda:1000", ""])
def test_a_device_that_nothing_can_be_computed_on_is_one_line(name):
    with pytest.raises(UserError, match=f"--device {name}: ") as caught:
        choose_device(name)
    assert len(str(caught.value).splitlines()) == 1
