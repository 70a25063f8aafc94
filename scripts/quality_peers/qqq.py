"""The official QQQ on a CPU: its functions as they stand, its CUDA-only calls answered by plain torch.

``options["checkout"]`` is a checkout of github.com/HandH1998/QQQ at commit 54c5c99; nothing of it is in here.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch

from quality_peers.contract import CHANNEL, Job, Meter, Quantized, bits, linears, tensors

# Its Llama classes are written for 4.38; the 4.45 of its requirements is for Qwen2, and lacks what they call.
REQUIRES = ("torch==2.13.0", "transformers==4.38.2", "accelerate==0.34.2", "easydict", "scipy", "matplotlib", "numpy<2")
COMMIT = "54c5c99"
BATCH = 8  # its default: how many samples the smoothing search sees


@torch.no_grad()
def quantize(job: Job, meter: Meter) -> Quantized:
    """Run smoothing or rotation, then GPTQ, in the order and with the arguments of its examples/quant_model.py."""
    stand_in()
    sys.path.insert(0, job.options["checkout"])
    from QQQ.gptq import apply_gptq as gptq
    from QQQ.rotation import fuse_layer_norms, rotate_model
    from QQQ.smooth import export_smoothed_model, quantize_model, smooth as smoothing
    from QQQ.utils import setup_seed

    rotate = job.options.get("rotate", False)
    loader = [(row.unsqueeze(0), row.unsqueeze(0)) for row in job.calibration()]
    gptq_module, smooth_module = sys.modules["QQQ.gptq.apply_gptq"], sys.modules["QQQ.smooth.smooth"]
    found: dict[str, Any] = {}
    gptq_module.get_loaders = smooth_module.get_loaders = lambda *_, **__: (loader, None)
    gptq_module.pack_model = lambda model, quantizers, **_: found.update(quantizers)  # needs its CUDA kernel
    with TemporaryDirectory() as folder, meter:
        args = arguments(job, Path(folder), len(loader))
        setup_seed(job.seed)
        model = load(job, Path(folder))
        if rotate:
            model, _ = rotate_model(fuse_layer_norms(model), Namespace(rotate_mode="hadamard"), args)
        if job.options.get("smooth", False):
            pad = model.config.pad_token_id if model.config.pad_token_id is not None else model.config.eos_token_id
            smoothed = quantize_model(model, smooth_arguments(job), args)
            scales = smoothing(smoothed, Namespace(pad_token_id=pad), smooth_arguments(job), args)
            model = export_smoothed_model(load(job, Path(folder)), scales)
        model = gptq(model.eval(), gptq_arguments(job, mse=rotate), args)
        if job.group_size != CHANNEL:
            for name, layer in linears(model).items():
                scale, _, _, extra = found[name]
                if extra is not None:  # a layer of one group has no second level
                    layer.weight.copy_(served(layer.weight, scale, extra))
    sizes = [(layer.out_features, layer.in_features) for layer in linears(model).values()]
    return Quantized(tensors(model), COMMIT, bits(sizes, job.group_size))


def stand_in() -> None:
    """Answer what QQQ calls but a CPU has not: CUDA moves, its kernel, the Hadamard extension, data-set loaders."""
    import transformers.models.llama.modeling_llama  # noqa: F401  # looks for the real `datasets`, so before ours

    transform, kernel, data = (ModuleType(name) for name in ("fast_hadamard_transform", "QQQ._CUDA", "datasets"))
    members: Mapping[ModuleType, dict[str, Any]] = {
        transform: {"hadamard_transform": hadamard}, kernel: {"qqq_gemm": None}, data: {"load_dataset": None},
    }  # fmt: skip
    for module, values in members.items():
        vars(module).update(values)
        sys.modules[module.__name__] = module
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda self, *_, **__: self


def hadamard(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Return ``x`` [..., d] times the Sylvester-Hadamard matrix of size d, a power of two, times ``scale``."""
    d, y = x.shape[-1], x
    step = 1
    while step < d:
        y = y.reshape(*x.shape[:-1], d // (2 * step), 2, step)
        y = torch.stack([y[..., 0, :] + y[..., 1, :], y[..., 0, :] - y[..., 1, :]], dim=-2)
        step *= 2
    return y.reshape(x.shape) * scale


def served(weight: torch.Tensor, scale: torch.Tensor, extra: torch.Tensor) -> torch.Tensor:
    """Return the weight its group kernel multiplies with: codes times scale, rounded again to one int8 grid a row.

    ``w8 = rint(code * fp16(scale / extra))``, times ``extra``; weight is [n, k], scale [n, groups], extra [n, 1].
    """
    size = weight.shape[1] // scale.shape[1]
    codes = (weight.view(len(weight), -1, size) / scale.unsqueeze(-1)).round()  # -8..7
    second = (scale / extra.view(-1, 1)).half().float().unsqueeze(-1)
    return ((codes * second).round() * extra.view(-1, 1, 1)).reshape(weight.shape)


def load(job: Job, folder: Path) -> Any:
    """Load the float model through a folder whose config the older transformers reads."""
    from transformers import LlamaForCausalLM

    source, copy = Path(job.model), folder / "model"
    if not copy.exists():
        copy.mkdir()
        config = json.loads((source / "config.json").read_text())
        config |= {"torch_dtype": "float32", "rope_theta": theta(config), "use_cache": False}
        (copy / "config.json").write_text(json.dumps(config))
        for path in source.resolve().glob("*.safetensors*"):
            (copy / path.name).symlink_to(path)
    model = LlamaForCausalLM.from_pretrained(copy, torch_dtype=torch.float32, attn_implementation="eager")
    if model.config.tie_word_embeddings and job.options.get("rotate") and job.options.get("untie", True):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    return model


def theta(config: Mapping[str, Any]) -> float:
    """Return the rotary base of an old or a new config.

    Raises:
        ValueError: the model scales its rotary positions.
    """
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise ValueError("the adapter knows plain rotary positions only")
    return float(rope["rope_theta"])


def arguments(job: Job, folder: Path, samples: int) -> Namespace:
    """Return what its command line would hold."""
    return Namespace(
        device="cpu", dtype="float32", seed=job.seed, nsamples=samples, save_path=str(folder),
        dataset="", custom_dataset="", tokenizer_path="", max_length=0,
    )  # fmt: skip


def smooth_arguments(job: Job) -> Namespace:
    """Return its defaults for smoothing, with weights per channel or per group."""
    shared = {"observer": "MinMaxObserver", "symmetric": True, "ch_axis": 0}
    weights = "FixedQuantize" if job.group_size == CHANNEL else "GroupFixedQuantize"
    return Namespace(
        batch_size=BATCH,
        is_remove_padding=True,
        smooth_method="os+",
        a_qconfig=Namespace(quantizer="TokenFixedFakeQuantize", bit=8, **shared),
        w_qconfig=Namespace(quantizer=weights, bit=4, group_size=job.group_size, **shared),
    )


def gptq_arguments(job: Job, mse: bool) -> Namespace:
    """Return its defaults for GPTQ; it advises the mse search with rotation and not with smoothing."""
    return Namespace(
        wbits=4, sym=True, groupsize=job.group_size, mse=mse, act_order=True, percdamp=0.01, static_groups=True,
    )  # fmt: skip
