"""The trackers that there are. A new one is a file with the three calls of `protocol.Tracker` and a line here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TrackerSpec:
    """A tracker.

    Args:
        name: what `logging.trackers` says; label: what people call it; module: what must be importable; extra: of pip that installs it.
        factory: ``module:Class``, made without arguments in the tracker's own process.
    """

    name: str
    label: str
    module: str
    extra: str
    factory: str


TRACKERS = {
    spec.name: spec
    for spec in (
        TrackerSpec("wandb", "W&B", "wandb", "wandb", "penchant.tracking.weights_and_biases:WeightsAndBiases"),
        TrackerSpec(
            "tensorboard", "TensorBoard", "tensorboard", "tensorboard", "penchant.tracking.tensorboard:TensorBoard"
        ),
        TrackerSpec("mlflow", "MLflow", "mlflow", "mlflow", "penchant.tracking.mlflow:MLflow"),
        TrackerSpec("trackio", "Trackio", "trackio", "trackio", "penchant.tracking.trackio:Trackio"),
    )
}
