"""The kind `torchscript`: a saved TorchScript program, network and weights in one file."""

import warnings
from dataclasses import replace
from pathlib import Path

import torch

from compress_ssl.pipeline.models.factory import ModelOptions, model_kind, safe_name
from compress_ssl.pipeline.models.network import Network
from compress_ssl.pipeline.runtime.errors import UserError
from compress_ssl.pipeline.runtime.formatting import describe_exception
from compress_ssl.pipeline.views.preprocessing import IMAGENET


@model_kind(without=("weights", "key", "prefix", "drop", "head", "pretrained"))
def model(options: ModelOptions, file: Path, /) -> Network:
    """torchscript:FILE, a saved torch.jit program; give size= and, unless they are ImageNet's, mean= and std=."""
    if not file.is_file():
        raise UserError(f"torchscript:{file} does not exist; check the path")
    if options.size is None:
        raise UserError(f"the image size of torchscript:{file} is unknown; add size= or --image-size")
    try:
        with warnings.catch_warnings():
            # torch warns that TorchScript is deprecated; files in this format are still to be read
            warnings.simplefilter("ignore", FutureWarning)
            module = torch.jit.load(str(file), map_location="cpu")
    except Exception as error:  # torch raises several types for damaged and foreign files
        raise UserError(
            f"torchscript:{file} is damaged or no TorchScript program ({describe_exception(error)}); "
            "a state dict is loaded with weights= into a model that is named"
        ) from error
    return Network(module, safe_name("torchscript", file.stem), replace(IMAGENET, size=options.size), trained=True)
