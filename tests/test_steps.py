import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainer.errors import UsageError
from trainer.steps import check_outputs, classification


def test_classification_gives_one_value_per_sample():
    model, inputs, labels = nn.Linear(4, 3), torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    batch = {"inputs": (inputs,), "label": labels, "index": torch.arange(5)}
    step = classification(label_smoothing=0.1)
    smooth, plain = step(model.train(), batch), step(model.eval(), batch)
    logits = model(inputs)
    assert torch.equal(smooth["loss"], F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1))
    assert torch.equal(plain["loss"], F.cross_entropy(logits, labels, reduction="none"))
    assert torch.equal(plain["accuracy"], logits.argmax(1) == labels)
    check_outputs(plain, size=5)


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        (torch.zeros(4), "returned Tensor"),
        ({"accuracy": torch.zeros(4)}, r"returned \['accuracy'\]"),
        ({"loss": torch.zeros(())}, r"'loss' is \(\); expected one value per sample, shape \(4,\)"),
        ({"loss": torch.zeros(4), "top5": 0.5}, "'top5' is float"),
        (
            {"loss": torch.zeros(4), "outputs": torch.zeros(3, 2)},
            r"'outputs' is \(3, 2\); expected .* shape \(4, ...\)",
        ),
        ({"loss": torch.zeros(4, 1)}, r"'loss' is \(4, 1\)"),
    ],
)
def test_a_step_that_returns_something_else_is_told(outputs, says):
    with pytest.raises(UsageError, match=says):
        check_outputs(outputs, size=4)
