"""What anomalib exports: an accelerated model everywhere, one with our masks where there is an operator for them."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("anomalib", reason="anomalib is not installed: pip install 'ttt4as_fast[anomalib]'")

from anomalib.data import InferenceBatch

from ttt4as_fast.integrations.anomalib import Patchcore, TTT4ASPostProcessor, accelerate

from ..untraced import untraced
from .anomalib_models import AMONG_THEMSELVES, SIDE, SIMPLE, bank_model, fitted, read

pytestmark = AMONG_THEMSELVES


def test_torch_export_holds_torch_operations_only(images):
    model = accelerate(bank_model(network=SIMPLE))
    program = torch.export.export(model, (images,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("ttt4as" in target for target in targets) and any("matmul" in target for target in targets)
    expected = model(images)
    found = program.module()(images)
    torch.testing.assert_close(found.anomaly_map, expected.anomaly_map, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.pred_score, expected.pred_score, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory) -> Path:
    for needed in ("onnx", "onnxscript"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed: pip install onnx onnxscript onnxruntime openvino")
    with untraced():
        return accelerate(bank_model(network=SIMPLE)).to_onnx(tmp_path_factory.mktemp("onnx"), input_size=(SIDE, SIDE))


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_onnx_and_openvino_agree(images, onnx_file, runtime):
    if importlib.util.find_spec(runtime) is None:
        pytest.skip(f"{runtime} is not installed: pip install onnx onnxscript onnxruntime openvino")
    if runtime == "openvino":
        import openvino

        compiled = openvino.Core().compile_model(
            onnx_file,
            "CPU",
            {"INFERENCE_PRECISION_HINT": "f32"},  # else bfloat16, where the machine has it
        )
        result = compiled(images.numpy())
        found = {output.get_any_name(): result[output] for output in compiled.outputs}
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(onnx_file)
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(None, {"input": images.numpy()}), strict=True))
    expected = accelerate(bank_model(network=SIMPLE))(images)
    np.testing.assert_allclose(found["pred_score"], expected.pred_score.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["anomaly_map"], expected.anomaly_map.numpy(), rtol=0, atol=1e-3)


class Plain(torch.nn.Module):
    """A model whose result is a plain tuple: `torch.export.save` knows anomalib's type of result not."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return tuple(self.model(batch))


@pytest.mark.parametrize("options", [{}, {"preset": "robust"}], ids=["paper", "robust"])
def test_torch_export_keeps_the_masks(folder, tmp_path, options):
    """A program with the method as one operator: the same masks, labels and gate, whatever the batch."""
    model = copy.deepcopy(fitted("ours", folder)[0])
    model.post_processor.detach(model)
    post = TTT4ASPostProcessor(**options)
    post.load_state_dict(model.post_processor.state_dict())
    post._image_threshold *= 0.999  # the adaptive threshold is the score of an image, which its last bit would decide
    model.post_processor = post.attach(model).eval()
    images = torch.cat([read(folder, f"{kind}/{i:03}.png") for kind in ("bad", "good_test") for i in range(3)])
    batch = torch.export.Dim("batch", min=2, max=16)  # where the host's search starts to work in chunks
    with torch.no_grad(), untraced():
        program = torch.export.export(Plain(model), (images[:2],), dynamic_shapes={"batch": {0: batch}})
    assert [str(node.target) for node in program.graph.nodes if "ttt4as" in str(node.target)] == [
        "ttt4as.segment_robust.default" if options else "ttt4as.segment.default"
    ]
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for some in (images, images[2:4]):
        expected, found = model(some), InferenceBatch(*loaded(some))
        assert torch.equal(found.pred_label, expected.pred_label)
        assert (found.pred_mask != expected.pred_mask).float().mean() < 0.002  # the graph searches in another way
        assert torch.equal(found.pred_mask.flatten(1).any(1), found.pred_label)
    assert not post._features and not post._predicted


def test_onnx_of_masks_is_refused(images, tmp_path):
    pytest.importorskip("onnxscript", reason="the exporter needs onnx and onnxscript")
    model = bank_model(Patchcore, network=SIMPLE, post_processor=TTT4ASPostProcessor())
    with pytest.raises(Exception, match=r"for which ONNX and OpenVINO have no operator\. Export with"):
        model.to_onnx(tmp_path, input_size=(SIDE, SIDE))
