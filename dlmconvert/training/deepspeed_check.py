"""DeepSpeed reads the JSON of a recipe before there is a model: what it refuses, what it would pass over, what the machine cannot do."""

from __future__ import annotations

import copy
import io
from contextlib import redirect_stdout
from typing import Any

from dlmconvert.errors import EXIT_FAILED, UserError
from dlmconvert.training.deepspeed import load_deepspeed


class _Asked(dict):
    """Remembers for which of its keys it was asked: DeepSpeed passes over those that it does not know."""

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: Any) -> bool:
        self.asked.add(key)
        return super().__contains__(key)


def check_config(config: dict[str, Any], ranks: Any) -> list[str]:
    """Let DeepSpeed read the merged JSON before there is a model. Returns top-level keys that it does not know and would ignore.

    Raises UserError for a section that it refuses, and for NVMe where its asynchronous I/O cannot be built.
    """
    load_deepspeed(ranks)
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops.op_builder.builder import probe_is_compatible
    from deepspeed.runtime.config import DeepSpeedConfig

    asked = _Asked(copy.deepcopy(config))
    try:
        DeepSpeedConfig(asked)
    except Exception as error:  # pydantic's, assertions, its own: theirs to name
        complaints = [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()] if hasattr(error, "errors") else [str(error)]
        section = f" ({error.title})" if hasattr(error, "title") else ""
        raise UserError(f"DeepSpeed does not take the JSON of this recipe{section}", "\n".join(complaints), "look at the keys of engine.deepspeed") from error
    zero = config["zero_optimization"]
    if "nvme" in (zero.get(key, {}).get("device") for key in ("offload_optimizer", "offload_param")):
        with redirect_stdout(io.StringIO()):
            is_there = probe_is_compatible(get_accelerator().create_op_builder("AsyncIOBuilder"))
        if not is_there:
            what = "offloading to nvme: DeepSpeed cannot build its asynchronous I/O on this machine"
            raise UserError(what, "it needs the headers of libaio (apt install libaio-dev), a C++ compiler and ninja", "install them, or offload to cpu", exit_code=EXIT_FAILED)
    return sorted(set(config) - asked.asked)
