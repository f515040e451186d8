from raymill.training.config import EarlyStoppingConfig
from raymill.training.early_stopping import should_stop


def history(*losses: float | None) -> list[dict[str, float | None]]:
    return [{"step": 10 * (number + 1), "loss_nats": loss} for number, loss in enumerate(losses)]


PATIENT = EarlyStoppingConfig(patience=2)


def test_it_stops_after_as_many_validations_without_a_new_best_as_patience_says() -> None:
    assert not should_stop(history(3.0, 2.0, 2.5), PATIENT)
    assert should_stop(history(3.0, 2.0, 2.5, 2.1), PATIENT)


def test_a_new_best_counts_anew() -> None:
    assert not should_stop(history(3.0, 3.5, 2.0, 2.5), PATIENT)
    assert should_stop(history(3.0, 3.5, 2.0, 2.5, 2.0), PATIENT)


def test_an_improvement_below_the_least_is_none() -> None:
    config = EarlyStoppingConfig(patience=2, min_delta=0.1)
    assert should_stop(history(3.0, 2.95, 2.91), config)
    assert not should_stop(history(3.0, 2.95, 2.9), config)  # 0.1 below the best that counted


def test_accuracy_is_better_when_higher() -> None:
    config = EarlyStoppingConfig(metric="accuracy", patience=1)
    rows = [{"step": 1, "accuracy": 0.2}, {"step": 2, "accuracy": 0.3}]
    assert not should_stop(rows, config)
    assert should_stop([*rows, {"step": 3, "accuracy": 0.1}], config)


def test_a_figure_that_is_no_number_is_no_best() -> None:
    assert should_stop(history(3.0, None, float("nan")), PATIENT)
    assert should_stop(history(None, None), PATIENT)
    assert not should_stop(history(None, 3.0), PATIENT)


def test_no_validation_yet_stops_nothing() -> None:
    assert not should_stop([], PATIENT)
