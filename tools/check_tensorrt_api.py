"""Holds what the TensorRT backend uses of TensorRT against TensorRT itself, on machines that have neither its libraries nor a GPU.

Every name is in `penstock/backends/tensorrt/api.py`: the backend is typed by its protocols, and mypy refuses what is not in
them. This reads them as text, fetches the wheel of TensorRT's Python bindings from the package index, and asks the binary in
it: each class, method, argument, result, property and member of an enumeration.

The binary is asked for its own docstrings by importing it. It links to libraries of which the wheel has none, and calls one
function of them while it is imported, to learn a version; so a copy is imported, in a process of its own, in which these
libraries are replaced by one that is there, and their functions by `Py_GetVersion`. No function of TensorRT is called.

    tools/check_tensorrt_api.py [VERSION]   # of tensorrt_cu13_bindings; without one, the newest that pyproject.toml allows

Exits with 0 where all agrees, 1 where something differs, 77 where the wheel can not be had or not be imported on this machine.
"""

from __future__ import annotations

import ast
import json
import re
import struct
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
API = ROOT / "backends/penstock/backends/tensorrt/api.py"
PACKAGE = "tensorrt_cu13_bindings"
BINARY = "tensorrt_bindings/tensorrt.so"
NOT_HERE = 77

# Of ELF: System V ABI, chapter 4 and 5, 64-bit.
SEGMENT_LOAD, SEGMENT_DYNAMIC = 1, 2
TAG_NEEDED, TAG_STRINGS, TAG_SYMBOLS = 1, 5, 6
PROGRAM_HEADER, DYNAMIC, SYMBOL = struct.Struct("<IIQQQQQQ"), struct.Struct("<QQ"), struct.Struct("<IBBHQQ")

ASK = """
import importlib.util, json, os, sys
sys.setdlopenflags(os.RTLD_LAZY)
spec = importlib.util.spec_from_file_location("tensorrt_bindings.tensorrt", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
told = {}
for name, members in json.loads(sys.argv[2]).items():
    found = getattr(module, name, None)
    if found is None:
        continue
    told[name] = {}
    for member in members:
        value = getattr(found, member, None)
        if value is not None:
            getter = getattr(value, "fget", None)
            told[name][member] = (getter or value).__doc__ or ""
print(json.dumps(told))
"""
"""What is asked, in a process that may die of it: the docstrings of members of classes."""


@dataclass
class Used:
    """A class as the backend uses it: methods as their text, properties with their types, other members."""

    methods: dict[str, ast.FunctionDef] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)


def main(version: str | None) -> int:
    used = read_api()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            binary, name = fetch(Path(scratch), version)
            documented = ask(binary, used)
        except (OSError, subprocess.SubprocessError, LookupError) as error:
            print(f"not checked: {error}")
            return NOT_HERE
    differences = list(compare(used, documented))
    for difference in differences:
        print(difference)
    checked = sum(len(u.methods) + len(u.attributes) for u in used.values())
    print(f"{name}: {len(used)} classes, {checked} members, {len(differences)} differ")
    return 1 if differences else 0


def read_api() -> dict[str, Used]:
    """The protocols of `api.py`, but for the one that is the module."""
    used = {}
    for node in ast.parse(API.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name != "TensorRt":
            used[node.name] = one = Used()
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    one.methods[member.name] = member
                elif isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
                    one.attributes[member.target.id] = ast.unparse(member.annotation)
    return used


def fetch(folder: Path, version: str | None) -> tuple[Path, str]:
    """The bindings' binary, made to be imported without TensorRT's libraries, and the wheel's name."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "0", "--timeout", "20"]
    asked = f"{PACKAGE}=={version}" if version else f"{PACKAGE}{allowed()}"
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary=:all:", "--dest", folder, asked],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise LookupError(f"pip fetches no {asked}: {reason}")
    with zipfile.ZipFile(wheel) as archive:
        binary = Path(archive.extract(BINARY, folder))
    binary.write_bytes(without_libraries(binary.read_bytes()))
    return binary, wheel.name


def allowed() -> str:
    """The versions that the extra takes."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    return next(line.removeprefix("tensorrt-cu13") for line in extras["tensorrt"] if line.startswith("tensorrt-cu13"))


def without_libraries(original: bytes) -> bytes:
    """An ELF file that needs none of TensorRT's libraries: these entries name libm, and functions of theirs `Py_GetVersion`."""
    image = bytearray(original)
    (headers,), (count,) = struct.unpack_from("<Q", image, 0x20), struct.unpack_from("<H", image, 0x38)
    segments = [PROGRAM_HEADER.unpack_from(image, headers + i * PROGRAM_HEADER.size) for i in range(count)]
    _, _, at, _, _, size, _, _ = next(s for s in segments if s[0] == SEGMENT_DYNAMIC)
    entries = [(p, *DYNAMIC.unpack_from(image, p)) for p in range(at, at + size, DYNAMIC.size)]
    tables = {tag: value for _, tag, value in entries}

    def offset(address: int) -> int:
        loaded = [(start, size, at) for kind, _, at, start, _, size, _, _ in segments if kind == SEGMENT_LOAD]
        return next(address - start + at for start, size, at in loaded if start <= address < start + size)

    strings, symbols = offset(tables[TAG_STRINGS]), offset(tables[TAG_SYMBOLS])

    def text(index: int) -> str:
        return image[strings + index : image.index(0, strings + index)].decode()

    needed = {text(value): (position, value) for position, tag, value in entries if tag == TAG_NEEDED}
    present = next(value for library, (_, value) in needed.items() if library.startswith("libm."))
    for library, (position, _) in needed.items():
        if library.startswith("libnv"):
            DYNAMIC.pack_into(image, position, TAG_NEEDED, present)
    undefined = {
        text(name): position
        for position in range(symbols, strings, SYMBOL.size)  # the strings lie behind the symbols
        for name, _, _, section, _, _ in [SYMBOL.unpack_from(image, position)]
        if section == 0
    }
    harmless = image[undefined["Py_GetVersion"] : undefined["Py_GetVersion"] + 4]
    for function, position in undefined.items():
        if re.match(r"(create|get)(Infer|NvOnnx|Builder|Plugin)|initLibNvInfer", function):
            image[position : position + 4] = harmless
    return bytes(image)


def ask(binary: Path, used: dict[str, Used]) -> dict[str, dict[str, str]]:
    """The docstrings of the members, by class; what is not there is left out."""
    members = json.dumps({name: [*one.methods, *one.attributes] for name, one in used.items()})
    done = subprocess.run(
        [sys.executable, "-c", ASK, binary, members], capture_output=True, text=True, timeout=60, check=False, cwd=binary.parent
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
        raise LookupError(f"the bindings can not be imported on this machine: {last}")
    documented: dict[str, dict[str, str]] = json.loads(done.stdout)
    return documented


def compare(used: dict[str, Used], documented: dict[str, dict[str, str]]) -> Iterator[str]:
    """What the binary does not have as the backend uses it."""
    for name, one in used.items():
        if name not in documented:
            yield f"{name}: there is no such class"
            continue
        for member in [*one.methods, *one.attributes]:
            if member not in documented[name] and member != "__buffer__":
                yield f"{name}.{member}: there is no such member"
        for method, definition in one.methods.items():
            document = documented[name].get(method)
            signatures = re.findall(rf"(?:^|\n)(?:\d+\. )?{method}\((.*)\) -> (.+)", document or "")
            if document is not None and method != "__buffer__" and not any(fits(definition, *s) for s in signatures):
                theirs = ", or ".join(f"({arguments}) -> {result}" for arguments, result in signatures) or repr(document)
                yield f"{name}.{method}({ast.unparse(definition.args)}): it is {theirs}"
        for attribute, annotation in one.attributes.items():
            result = re.search(r"-> (.+)", documented[name].get(attribute, ""))
            if annotation != "Any" and result is not None and plain(result[1]) != annotation:
                yield f"{name}.{attribute}: is a {result[1]}, not {annotation}"


def fits(definition: ast.FunctionDef, arguments: str, result: str) -> bool:
    """Whether a call by the protocol is one that this signature takes, and gives what the protocol says.

    What the protocol leaves out has to have a default.
    """
    named = [part.partition(":") for part in split(arguments)]
    theirs = [(name.strip(), plain(kind.split("=")[0]), "=" in kind) for name, _, kind in named if name.strip() != "self"]
    ours = [(a.arg, ast.unparse(a.annotation) if a.annotation else "Any") for a in definition.args.args if a.arg != "self"]
    given = list(zip(ours, theirs, strict=False))
    returns = ast.unparse(definition.returns) if definition.returns else "Any"
    renamed = {"nvonnxparser::IParserError": "ParserError"}  # bound under this name, and documented before it was
    return (
        len(ours) <= len(theirs)
        and all(name == their and takes(kind, theirs_kind) for (name, kind), (their, theirs_kind, _) in given)
        and all(default for _, _, default in theirs[len(ours) :])
        and returns.removesuffix(" | None") == renamed.get(plain(result), plain(result))
    )


def takes(ours: str, theirs: str) -> bool:
    """Whether an argument that the protocol types so is what the binding takes."""
    same = {
        "int": {"SupportsInt", "int"},
        "bytes | memoryview": {"Buffer", "buffer"},
        "Sequence[int]": {"Dims"},
        "tuple[int, ...]": {"tuple"},
    }
    return ours == "Any" or theirs in same.get(ours, {ours})


def plain(kind: str) -> str:
    """The last part of a dotted name."""
    return kind.strip().split(".")[-1]


def split(arguments: str) -> list[str]:
    """Arguments at the commas that stand in no bracket."""
    return re.split(r",\s*(?![^\[<(]*[\]>)])", arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else None))
