import pytest
import torch

from sam_cache.errors import UsageError
from sam_cache.training.schedule import learning_rate_factor


def test_warmup_is_linear_and_ends_at_one():
    factors = [learning_rate_factor(step, total=100, warmup=4) for step in range(5)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_falls_to_zero():
    factors = [learning_rate_factor(step, 10, warmup=2) for step in range(2, 14)]
    assert factors[0] == 1
    assert factors[4] == pytest.approx(0.5)  # half way
    assert factors == sorted(factors, reverse=True)
    assert factors[8:] == [pytest.approx(0.0)] * 4


def test_steps_of_the_paper():
    def factor(step):
        return learning_rate_factor(step, 90_000, 250, "step", milestones=(60_000, 86_666))

    assert [factor(step) for step in (0, 250, 59_999)] == [1 / 250, 1, 1]
    assert [factor(step) for step in (60_000, 86_665)] == [pytest.approx(0.1)] * 2
    assert factor(86_666) == pytest.approx(0.01)


def test_constant():
    assert {learning_rate_factor(step, 10, kind="constant") for step in range(20)} == {1.0}


@pytest.mark.parametrize("warmup", [0, 5, 9])
def test_warmup_as_long_as_the_run_or_longer(warmup):
    factors = [learning_rate_factor(step, total=5, warmup=warmup) for step in range(6)]
    assert all(0 <= factor <= 1 for factor in factors)


def test_unknown_kind():
    with pytest.raises(UsageError, match="'linear' is unknown: use cosine, step or constant"):
        learning_rate_factor(0, 10, kind="linear")


def test_drives_lambda_lr():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, 6, 2))
    seen = []
    for _ in range(6):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == [pytest.approx(2 * learning_rate_factor(step, 6, 2)) for step in range(6)]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)
