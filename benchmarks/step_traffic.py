"""What a training step asks of the device: operations that are launched, and memory that they read and write, by part.

    python benchmarks/step_traffic.py --imgsz 320 --batch 2

Counted on a CPU, so for a GPU that is not at hand: a large one waits for launches where batches are small, and for its memory
where they are large. An operation's memory is the size of the tensors that go in and come out; views are none. On a GPU a
convolution with a bias is two operations, which this does not see.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from gpu_step import one_step
from made_up import MadeUp  # first: it finds the package
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dfssd.report.tables import render


class Traffic(TorchDispatchMode):
    """Counts by part of a step; `mark` ends one."""

    def __init__(self) -> None:
        super().__init__()
        self.now: dict[str, Counter[str]] = {"operations": Counter(), "bytes": Counter()}
        self.parts: dict[str, dict[str, Counter[str]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            name = func._schema.name.split("::")[1]
            tensors = (t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor))
            self.now["operations"][name] += 1
            self.now["bytes"][name] += sum(t.numel() * t.element_size() for t in tensors)
        return out

    def mark(self, part: str) -> None:
        kept = self.parts.setdefault(part, {"operations": Counter(), "bytes": Counter()})
        for kind, counted in self.now.items():
            kept[kind].update(counted)
            counted.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=2, help="labelled images; as many unlabelled ones on top")
    parser.add_argument("--amp", default="bf16")
    parser.add_argument("--most", type=int, default=4, help="operations to name, those that move most")
    o = parser.parse_args()
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="dfssd-step-traffic-") as folder:
        made = MadeUp(Path(folder), torch.device("cpu"), 48, (320, 240))
        made.write_teacher(o.imgsz)
        s = made.session(o.imgsz, o.batch, o.amp, loader_workers=0, cache_gib=0.0)
        batches = iter(s.loader())
        for _ in range(2):  # the first one measures the balance and fills caches
            with Traffic() as counted:
                one_step(s, next(batches), counted.mark)
    rows, images = [], 2 * o.batch
    for part, kinds in counted.parts.items():
        most = ", ".join(f"{n} {b / images / 1e6:.1f}" for n, b in kinds["bytes"].most_common(o.most))
        rows.append([part, f"{kinds['operations'].total()}", f"{kinds['bytes'].total() / images / 1e6:.1f}", most])
    on_device = [r for r in rows if r[0] != "boxes and images to the device"]  # which is boxes, chosen on the CPU
    rows.append(
        ["all but boxes", str(sum(int(r[1]) for r in on_device)), f"{sum(float(r[2]) for r in on_device):.1f}", ""]
    )
    title = f"a step, {o.imgsz} px, {o.batch} + {o.batch} images, {o.amp}"
    print(render(title, ["part", "operations", "MB an image", "most of it"], rows))


if __name__ == "__main__":
    main()
