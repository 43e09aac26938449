"""TTT4AS, the main object: any detector's anomaly map and frozen features in, a binary mask out."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .kernels.segment import OPTION_NAMES, Segmentation, SegmentOptions, run

if TYPE_CHECKING:
    from .kernels.arrays import Array

__all__ = ["TTT4AS", "PRESETS", "Segmentation"]

PRESETS = ("paper",)


class TTT4AS:
    """Test-time training for anomaly segmentation: a linear SVM trained on the test image itself.

    Parameters
    ----------
    preset : {"paper"}
        ``"paper"``: the published method.
    percentile : float
        In [0, 100], default 99: the score that a peak must reach, as a percentile of its own map.
    neighbor_radius : int
        Chebyshev radius, in pixels of the map, by which peaks are dilated into anomalous samples, default 5.
    n_nominal : int
        Nominal samples aimed at, default 100.
    C : float
        SVM loss weight, default 1e-3.
    loss : {"squared_hinge", "hinge"}
        As in `sklearn.svm.LinearSVC`.
    nominal_sampling : {"grid", "random"}
        A uniform grid, or a draw without replacement that is the same for every image.
    random_state : int
        Seed of that draw, default 0.
    image_threshold : float, optional
        Images whose score (``pred_score``, else the map's maximum) is below it get an empty mask and the status
        ``"nominal"``. Without it every image has pixels marked, good ones too: the percentile always finds peaks.
    tol : float
        Relative duality gap at which the SVM is solved, default 1e-4.
    max_iter : int
        Limit on the SVM's iterations, default 1000.
    backend : str
        ``"auto"`` or a name from `ttt4as_fast.kernels.backends`.

    Raises
    ------
    ValueError, TypeError
        An option is unknown or out of range.

    References
    ----------
    Test Time Training for Industrial Anomaly Segmentation, CVPR workshops 2024.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> anomaly_map = np.zeros((64, 64), np.float32)
    >>> anomaly_map[20:24, 30:34] = 1.0
    >>> anomaly_map += 0.1 * rng.random((64, 64), dtype=np.float32)
    >>> features = rng.standard_normal((8, 8, 8)).astype(np.float32)
    >>> out = TTT4AS()(anomaly_map, features)
    >>> out.pred_mask.shape, out.status
    ((64, 64), 'ok')
    """

    def __init__(
        self,
        preset: str = "paper",
        percentile: float = 99.0,
        neighbor_radius: int = 5,
        n_nominal: int = 100,
        C: float = 1e-3,
        loss: str = "squared_hinge",
        nominal_sampling: str = "grid",
        random_state: int = 0,
        image_threshold: float | None = None,
        tol: float = 1e-4,
        max_iter: int = 1000,
        backend: str = "auto",
    ) -> None:
        if preset not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(map(repr, PRESETS))}, got {preset!r}")
        self.preset = preset
        self.options = SegmentOptions(
            percentile=percentile,
            neighbor_radius=neighbor_radius,
            n_nominal=n_nominal,
            C=C,
            loss=loss,
            nominal_sampling=nominal_sampling,
            random_state=random_state,
            image_threshold=image_threshold,
            tol=tol,
            max_iter=max_iter,
        )
        self.backend = backend

    def get_params(self) -> dict[str, Any]:
        """The constructor's arguments, as they stand."""
        return {"preset": self.preset, **asdict(self.options), "backend": self.backend}

    def __repr__(self) -> str:
        default = SegmentOptions()
        changed = [name for name in OPTION_NAMES if getattr(self.options, name) != getattr(default, name)]
        shown = [f"preset={self.preset!r}", *(f"{name}={getattr(self.options, name)!r}" for name in changed)]
        if self.backend != "auto":
            shown.append(f"backend={self.backend!r}")
        return f"TTT4AS({', '.join(shown)})"

    def __call__(self, anomaly_map: Array, features: Array, pred_score: Any = None) -> Segmentation:
        """Mark the anomalous pixels of one image, or of each image of a batch.

        Parameters
        ----------
        anomaly_map : array or tensor, (H, W) or (B, H, W)
            Any range, higher is more anomalous; any float dtype.
        features : array or tensor, (C, h, w) or (B, C, h, w)
            Frozen features of the same images; any float dtype, contiguous or channels-last.
            ``anomaly_map[None]`` ((B, 1, H, W): ``anomaly_map[:, None]``) makes the score the only feature.
        pred_score : number or (B,) array, optional
            Image scores for `image_threshold`; each map's maximum when absent.

        Returns
        -------
        Segmentation
            ``pred_mask`` bool, ``decision_map`` float32, ``pseudo_labels`` int8, each in the shape, kind and device of
            `anomaly_map`, and ``status``. An image gives the same bits alone, in any batch, on any thread count.

        Raises
        ------
        ValueError, TypeError
            Wrong ranks or dtypes, batches or kinds that differ, empty axis, non-finite value, unknown backend.
        """
        return run(anomaly_map, features, pred_score, self.options, self.backend)
