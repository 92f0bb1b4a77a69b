"""A backend in a package of its own: built into a wheel, installed by pip without a network, and told by its environment to fail."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

NAME, PACKAGE, VERSION = "outside", "penstock-outside", "2.1"

# What its author would write, but for the faults. Its model is the fake one's, so that every token is known.
_CODE = '''
import ctypes, os, signal, sys, time
from pathlib import Path

FAULT = os.environ.get("OUTSIDE_FAULT", "")
if FAULT == "import raises":
    raise ImportError("libnpu.so.2 is missing")

from penstock.backends.contract import Available, Capabilities, DType, Registration
from penstock.backends.fake import FakeModel


def segfault():
    ctypes.string_at(0)


def once():
    """Whether this is the first time that anybody asks, over all processes."""
    try:
        Path(os.environ["OUTSIDE_MARK"]).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def probe():
    print("a library's banner, on stdout")
    if FAULT == "probe raises":
        raise OSError("no such device")
    if FAULT == "probe hangs":
        time.sleep(3600)
    if FAULT == "probe crashes":
        segfault()
    return Available(("npu:0",), "9.9")


def capabilities(spec):
    if FAULT == "unknown dtype":
        return Capabilities(dtypes=("fp4",))
    if FAULT == "negative size":
        return Capabilities(dtypes=(DType.F32,), max_context=-7)
    return Capabilities(dtypes=(DType.F32,), batch_invariant=True, kv_layouts=("token-ids",), max_context=512, max_batch_size=4)


class Model(FakeModel):
    steps = 0
    ways = {"matmul": "systolic"}

    def step(self, batch):
        self.steps += 1
        if self.steps > 40 and FAULT.startswith("step") and once():
            {"step exits": lambda: os._exit(5), "step crashes": segfault, "step hangs": lambda: time.sleep(3600)}[FAULT]()
        return super().step(batch)


def create(spec, config):
    if FAULT == "create raises":
        raise MemoryError("the device is full")
    if FAULT == "create hangs":
        time.sleep(3600)
    if FAULT == "create crashes":
        segfault()
    model = Model(spec, config)
    if FAULT == "wrong layout":
        object.__setattr__(model.kv, "layout", "upside down")
    model.device = "npu:0"
    return model


REGISTRATION = Registration("outside", probe, capabilities, create)
'''


def install(folder: Path) -> dict[str, str]:
    """Build the wheel and install it under `folder`; the environment in which it is found."""
    wheel = folder / f"penstock_outside-{VERSION}-py3-none-any.whl"
    info = f"penstock_outside-{VERSION}.dist-info"
    files = {
        "penstock_outside.py": _CODE,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {VERSION}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[penstock.backends]\n{NAME} = penstock_outside:REGISTRATION\n",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD")))
    site = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True)
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "OUTSIDE_MARK": str(folder / "mark")}
