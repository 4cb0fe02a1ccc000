"""compress: distill a large self-supervised vision model into small ones, without labels.

The public names are the stages, as modules with `Config` and `run`, and the classes that a user's own method, model or
protocol is built from. Each name is imported when it is first used, so that `import compress_ssl` is fast:

    from compress_ssl import distill

    distill.run(distill.Config(store="teacher", student=("timm:resnet18",), method="compress-1q", out=Path("run")))
"""

import importlib
from typing import Any

_PUBLIC = {
    "export_teacher": "compress_ssl.stages.export_teacher",
    "distill": "compress_ssl.stages.distill",
    "evaluate": "compress_ssl.stages.evaluate",
    "compare": "compress_ssl.stages.compare",
    "FeatureStore": "compress_ssl.pipeline.store.feature_store:FeatureStore",
    "Method": "compress_ssl.pipeline.methods.base:Method",
    "Needs": "compress_ssl.pipeline.methods.base:Needs",
    "Recipe": "compress_ssl.pipeline.methods.base:Recipe",
    "Batch": "compress_ssl.pipeline.methods.base:Batch",
    "MemoryBank": "compress_ssl.pipeline.methods.memory_bank:MemoryBank",
    "UserError": "compress_ssl.pipeline.runtime.errors:UserError",
    "Dataset": "compress_ssl.pipeline.datasets.base:Dataset",
    "check_dataset": "compress_ssl.pipeline.testing:check_dataset",
    "Evaluator": "compress_ssl.pipeline.evaluators.base:Evaluator",
    "Result": "compress_ssl.pipeline.evaluators.base:Result",
    "Score": "compress_ssl.pipeline.evaluators.base:Score",
    "Split": "compress_ssl.pipeline.evaluators.base:Split",
    "Lines": "compress_ssl.pipeline.evaluators.base:Lines",
    "Panel": "compress_ssl.pipeline.evaluators.base:Panel",
    "Bars": "compress_ssl.pipeline.evaluators.base:Bars",
    "ConfusionMatrix": "compress_ssl.pipeline.evaluators.base:ConfusionMatrix",
    "ImageGrid": "compress_ssl.pipeline.evaluators.base:ImageGrid",
    "ImageRow": "compress_ssl.pipeline.evaluators.base:ImageRow",
    "Tile": "compress_ssl.pipeline.evaluators.base:Tile",
    "check_model": "compress_ssl.pipeline.testing:check_model",
    "check_method": "compress_ssl.pipeline.testing:check_method",
    "check_protocol": "compress_ssl.pipeline.testing:check_protocol",
}
"""{public name: "module" or "module:object"}"""

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'compress_ssl' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
