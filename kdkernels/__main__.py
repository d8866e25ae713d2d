"""python -m kdkernels: versions, the backends that are available, and why one is not."""

from __future__ import annotations

import platform

import torch

from kdkernels import __version__, backends
from kdkernels.backends import native


def describe() -> str:
    """The report, as text."""
    lines = [
        f"kdkernels {__version__}   torch {torch.__version__}   Python {platform.python_version()}   "
        f"{platform.system()} {platform.machine()}",
        f"threads: {torch.get_num_threads()}   CUDA devices: {torch.cuda.device_count()}",
        "",
        "backends, in the order of the automatic choice:",
    ]
    devices = [torch.device("cpu")] + [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for name in backends.ORDER:
        serves = [str(device) for device in devices if backends.why_not(name, device) is None]
        reasons = dict.fromkeys(filter(None, (backends.why_not(name, device) for device in devices)))
        lines.append(f"  {name:<10} " + (f"available on {', '.join(serves)}" if serves else "not available"))
        notes = [native.contents()] if name == "native" and serves else []
        lines += [f"  {'':<10} {note}" for note in (*notes, *reasons)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe())
