"""The suite itself: how it gets to another device."""

import torch
from elsewhere import run_on

from ssd_core import SparseTarget, TeacherHidden


def test_calls_are_made_elsewhere():
    seen = []

    def op(x, target, *, teacher, softcap, weight=None):
        seen.extend([x, target.ids, target.probs, teacher.input, teacher.linear_weight])
        assert softcap == 3.0 and weight is None and teacher.linear_bias is None
        return torch.ones(2, requires_grad=True), (torch.zeros(1), None)

    target = SparseTarget(torch.zeros(2, 1).long(), torch.ones(2, 1))
    found = run_on(op, "meta")(
        torch.ones(2, 3), target, teacher=TeacherHidden(torch.ones(2, 3), torch.ones(5, 3)), softcap=3.0)
    assert [tensor.device.type for tensor in seen] == ["meta"] * 5
    assert found[0].device.type == found[1][0].device.type == "cpu" and found[1][1] is None


def test_gradients_come_back():
    x = torch.ones(3, requires_grad=True)
    result = run_on(lambda x: 2 * x.double(), torch.device("cpu", 0))(x)
    result.sum().backward()
    assert x.grad.tolist() == [2, 2, 2]
