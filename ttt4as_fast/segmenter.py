"""TTT4AS, the main object: any detector's anomaly map and frozen features in, a binary mask out."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING, Any

from .kernels.arrays import check_option
from .kernels.segment import OPERATION, OPTION_NAMES, Segmentation, SegmentOptions, run, warmup
from .kernels.segment_robust import OPERATION as ROBUST_OPERATION
from .kernels.segment_robust import OPTION_NAMES as ROBUST_NAMES
from .kernels.segment_robust import RobustOptions, nominal_level
from .kernels.segment_robust import run as run_robust

if TYPE_CHECKING:
    from .kernels.arrays import Array

__all__ = ["TTT4AS", "PRESETS", "Segmentation"]

PRESETS = ("paper", "robust")


_PAPER_ONLY = tuple(name for name in OPTION_NAMES if name not in ROBUST_NAMES)
ROBUST_ONLY = {name for name in ROBUST_NAMES if name not in OPTION_NAMES}


class TTT4AS:
    """Test-time training for anomaly segmentation: a linear SVM trained on the test image itself.

    Parameters
    ----------
    preset : {"paper", "robust"}
        ``"paper"``: the published method. ``"robust"``: labels that follow the shape of each peak, for defects of any
        size; see `ttt4as_fast.kernels.segment_robust`, and `calibrate`.
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
    **robust
        Of the preset ``"robust"`` only: ``nominal_level`` (set by `calibrate`), ``nominal_share``, ``nominal_weight``,
        ``height``, ``base_quantile``, ``core``, ``n_core``, ``n_background``, ``core_weight``, ``background_weight``,
        ``hard_share``, ``size_exponent``, ``standardize``, ``recentre``, ``score_weight``, as in
        `ttt4as_fast.kernels.segment_robust`. That preset has no use for `percentile`, `neighbor_radius`, `n_nominal`,
        `nominal_sampling` and `random_state`, which must keep their defaults.

    Raises
    ------
    ValueError, TypeError
        An option is unknown, out of range or of the other preset.

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
        *,
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
        **robust: Any,
    ) -> None:
        self.preset = check_option(preset, "preset", PRESETS)
        unknown = set(robust) - ROBUST_ONLY
        if unknown:
            raise TypeError(f"{min(unknown)}: unknown option of TTT4AS")
        given = SegmentOptions(
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
        self.options: SegmentOptions | RobustOptions = given
        if preset == "robust":
            other = [name for name in _PAPER_ONLY if getattr(given, name) != getattr(SegmentOptions(), name)]
            shared = {name: value for name, value in asdict(given).items() if name in ROBUST_NAMES}
            self.options = RobustOptions(**shared, **robust)
        else:
            other = sorted(robust)
        if other:
            raise ValueError(f"{other[0]}: not an option of the preset {preset!r}")
        self._operation = ROBUST_OPERATION if preset == "robust" else OPERATION
        self.backend = check_option(backend, "backend", ("auto", *self._operation.backends))

    @property
    def runs_on_cuda(self) -> bool:
        """Whether the preset has a backend for CUDA tensors; to one without, they go to the host and back."""
        return "gpu" in self._operation.backends

    def calibrate(self, nominal_maps: Array) -> TTT4AS:
        """Set `nominal_level`, the score that nominal pixels rarely exceed, from maps of nominal validation images.

        Optional: without it the level at which a map is split comes from that map alone. `PatchCore.calibrate` keeps
        the same number as ``nominal_statistics_.level``.

        Parameters
        ----------
        nominal_maps : array or tensor, (N, H, W)
            Maps that the detector was not fitted on, any float dtype.

        Returns
        -------
        TTT4AS
            Itself.

        Raises
        ------
        ValueError, TypeError
            The preset ``"paper"``, which has nothing to calibrate; wrong rank or dtype, non-finite value.
        """
        if not isinstance(self.options, RobustOptions):
            raise ValueError("calibrate: the preset 'paper' has nothing to calibrate; 'robust' has")
        self.options = replace(self.options, nominal_level=nominal_level(nominal_maps))
        return self

    def get_params(self) -> dict[str, Any]:
        """The constructor's arguments, as they stand."""
        return {"preset": self.preset, **asdict(self.options), "backend": self.backend}

    def __repr__(self) -> str:
        default = type(self.options)()
        names = [field.name for field in fields(default)]
        changed = [name for name in names if getattr(self.options, name) != getattr(default, name)]
        shown = [f"preset={self.preset!r}", *(f"{name}={getattr(self.options, name)!r}" for name in changed)]
        if self.backend != "auto":
            shown.append(f"backend={self.backend!r}")
        return f"TTT4AS({', '.join(shown)})"

    def warmup(self, anomaly_map: Array, features: Array, pred_score: Any = None) -> bool:
        """Pay for the first call now: load and compile what calls with inputs like these need.

        On a GPU this captures their CUDA graph, which calls with the same shapes, dtypes, layouts and options replay.
        Call it before other threads use the device: a thread that waits for the whole device
        (`torch.cuda.synchronize`) or draws random numbers on it meanwhile gets an error or ends the capture, and calls
        then launch kernels one by one. If another thread is capturing a CUDA graph of its own, that capture fails.
        Without `warmup` all this holds for the second call, which captures then. `kernels.segment` says how much memory
        graphs hold.

        Parameters
        ----------
        anomaly_map, features, pred_score
            As in a call; the values do not matter on a GPU, and must be finite on a host.

        Returns
        -------
        bool
            Whether a CUDA graph waits for the calls.

        Raises
        ------
        ValueError, TypeError, RuntimeError
            As a call; and where a CUDA graph is being captured on the current stream, which to capture another would
            end.
        """
        if isinstance(self.options, RobustOptions):
            run_robust(anomaly_map, features, pred_score, self.options, self.backend)
            return False
        return warmup(anomaly_map, features, pred_score, self.options, self.backend)

    def __call__(self, anomaly_map: Array, features: Array, pred_score: Any = None) -> Segmentation:
        """Mark the anomalous pixels of one image, or of each image of a batch.

        Parameters
        ----------
        anomaly_map : array or tensor, (H, W) or (B, H, W)
            Any range, higher is more anomalous; any float dtype.
        features : array or tensor, (C, h, w) or (B, C, h, w)
            Frozen features of the same images; any float dtype, contiguous or channels-last.
            To make the score the only feature, give ``x[None]`` (of a batch ``x[:, None]``), where ``x`` is the map
            less its mean, over its standard deviation, and raise `C` to 10: the SVM penalises its intercept, and would
            mark every pixel by a single feature that is far from zero, as raw distances are.
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
            Wrong ranks or dtypes, batches or kinds that differ, empty axis, non-finite value.
        RuntimeError
            `backend` names one that cannot serve here.
        """
        if isinstance(self.options, RobustOptions):
            return run_robust(anomaly_map, features, pred_score, self.options, self.backend)
        return run(anomaly_map, features, pred_score, self.options, self.backend)
