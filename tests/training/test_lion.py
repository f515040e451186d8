import torch
from torch import nn

from raymill.training.lion import Lion


def test_two_steps_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = Lion([{"params": [weight], "lr": 0.1, "weight_decay": 0.5}], betas=(0.5, 0.75))
    weight.grad = torch.tensor([[4.0, -4.0]])
    optimizer.step()
    # decay to 0.95 and -1.9; the sign of half the gradient; mean = a quarter of the gradient
    torch.testing.assert_close(weight.detach(), torch.tensor([[0.85, -1.8]]))
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], torch.tensor([[1.0, -1.0]]))
    weight.grad = torch.tensor([[-0.5, 2.0]])
    optimizer.step()
    # 0.5 x 1 - 0.5 x 0.5 is still positive, 0.5 x -1 + 0.5 x 2 is positive now
    torch.testing.assert_close(weight.detach(), torch.tensor([[0.85 * 0.95 - 0.1, -1.8 * 0.95 - 0.1]]))
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], torch.tensor([[0.625, -0.25]]))


def test_a_parameter_without_gradient_stays() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    Lion([{"params": [weight], "lr": 0.1, "weight_decay": 0.5}], betas=(0.9, 0.99)).step()
    assert torch.equal(weight, torch.ones(2, 2))
