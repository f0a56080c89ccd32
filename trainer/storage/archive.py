"""Check the content of a `torch.save` file before torch reads it.

`torch.load(weights_only=True)` runs no code of a file, but believes the sizes in it, and makes empty tensors, bytes and
sets of any size on request. `check` follows the pickle with stand-ins for everything, which allocate nothing.
"""

import io
import math
import pickle
import pickletools
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch

# What `torch.save` writes for dicts, lists, tuples, strings, numbers and tensors, and nothing else.
_OPCODES = """
PROTO STOP MARK EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 NONE
NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL BINPERSID
REDUCE
"""
_BYTES = {"Bool": 1, "Byte": 1, "Char": 1, "Short": 2, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4, "Long": 8}
_BYTES |= {"Double": 8, "ComplexFloat": 8, "ComplexDouble": 16}  # of an element of torch.DoubleStorage, and so on
# Values that often lie beside the tensors in a file, and do not matter: numbers of NumPy, paths, settings, times.
_ASIDE = re.compile(
    r"argparse\.Namespace|types\.SimpleNamespace|datetime\.\w+|decimal\.Decimal|_codecs\.encode|"
    r"pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path|"
    r"numpy\.(_?core\.multiarray\.(scalar|_reconstruct)|dtype|ndarray|dtypes\.\w+|(float|int|uint)\d+|bool_?)"
)
_LEGACY = 0x1950A86A20F9469CFC6C  # first value in a file of torch.save before PyTorch 1.6, which is no zip file


class Refused(ValueError):
    """The file holds something that is not allowed; says what, and what to do."""


class Aside:
    """A value beside the tensors of a file, which nobody needs: it takes anything and keeps nothing."""

    def __new__(cls, *_: Any, **__: Any) -> "Aside":
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load(path: Path) -> Any:
    """Read a file of `torch.save` from any source: check it, then let torch read it, tensors to the CPU.

    Tensors, plain types and the containers of `collections` are as they were saved. Some harmless values that often lie
    beside them (numbers and arrays of NumPy, paths, argparse.Namespace, dates) become an `Aside`, which is empty.

    Raises:
        Refused: says what the file holds that is not allowed, and what to do.
        Exception: of nearly any type, if the file is damaged.
    """
    with open(path, "rb") as file:
        found = check(file, plain=False)
    with torch.serialization.safe_globals([(Aside, name) for name in found]):
        return torch.load(path, map_location="cpu", weights_only=True)


def check(file: BinaryIO, *, plain: bool = True) -> set[str]:
    """Refuse files that would take more memory than they have bytes.

    Args:
        file: at its beginning.
        plain: also refuse everything that `torch.save` does not write for plain types and tensors.

    Returns:
        The qualified names that become an `Aside`.

    Raises:
        Refused: says what was found.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if not plain and not zipfile.is_zipfile(file):
        file.seek(0)
        return _check_legacy(file, size)
    with zipfile.ZipFile(file) as members:
        check_members(members.infolist(), size)
        infos = {info.filename.partition("/")[2]: info for info in members.infolist()}
        program = members.read(infos["data.pkl"]) if "data.pkl" in infos else b""
    _check_opcodes(io.BytesIO(program), len(program), plain=plain)
    survey = _Survey(io.BytesIO(program), {name: info.file_size for name, info in infos.items()}, plain=plain)
    survey.load()
    return survey.aside


def _check_legacy(file: BinaryIO, size: int) -> set[str]:
    """As `check`, for the format before PyTorch 1.6: several pickles, then the bytes of the storages."""
    found: set[str] = set()
    for number in range(5):  # a magic number, a version, the system, the content, the names of storages
        start = file.tell()
        _check_opcodes(file, size, plain=False)
        file.seek(start)
        survey = _Survey(file, size, plain=False)
        value = survey.load()
        if number == 0 and value != _LEGACY:
            raise Refused("it is a pickle, not a file of torch.save")
        found |= survey.aside
    return found


def _check_opcodes(program: BinaryIO, size: int, *, plain: bool) -> None:
    for opcode, argument, _ in pickletools.genops(program):
        known = not plain or f" {opcode.name} " in _OPCODES.replace("\n", " ")
        if not known or (opcode.name == "LONG_BINPUT" and int(argument or 0) > size):
            raise Refused(f"its pickle uses {opcode.name} as torch.save never does for plain types and tensors")


def check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse the members of a zip file, of `size` bytes, that `torch.save` would not write.

    Raises:
        Refused: says what was found.
    """
    parts = {part for member in members for part in member.filename.split("/")[1:3]}
    if "constants.pkl" in parts and "data.pkl" in parts:
        raise Refused(
            "it is a TorchScript program (torch.jit.save), not a state dict. If you trust it, save its tensors alone: "
            "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
        )
    if "archive_format" in parts or "serialized_exported_program.json" in {member.filename for member in members}:
        raise Refused(
            "it is an exported program (torch.export.save), not a state dict. Save its tensors alone: "
            "torch.save(dict(torch.export.load(FILE).state_dict), 'weights.pt')"
        )
    if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
        raise Refused("it has compressed or encrypted members, which torch.save never writes")
    if sum(member.file_size for member in members) > size:
        raise Refused("its members together are larger than the file")
    # One folder, each name once however it is written, and nothing before the first: else torch's reader might find
    # another member than this one.
    names = {member.filename.lower() for member in members}
    safe = all(".." not in name.split("/") and not name.startswith("/") for name in names)
    first = min((member.header_offset for member in members), default=-1)
    if not safe or len({name.partition("/")[0] for name in names}) > 1 or len(names) < len(members) or first != 0:
        raise Refused(f"its members are not those that torch.save writes: {', '.join(sorted(names)[:4])}")


class _Survey(pickle.Unpickler):
    """Unpickles with stand-ins: a storage is its number of elements, a tensor nothing at all.

    Args:
        sizes: bytes of each member of the zip file; for the format without members, of the whole file.
    """

    def __init__(self, file: BinaryIO, sizes: dict[str, int] | int, *, plain: bool):
        super().__init__(file)
        self._sizes, self._plain, self._counts = sizes, plain, {}
        self.aside: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        whole = f"{module}.{name}"
        if whole == "collections.OrderedDict":
            return OrderedDict
        if module == "torch" and name.removesuffix("Storage") in _BYTES and name.endswith("Storage"):
            return _Storage(name.removesuffix("Storage"))
        if self._plain:
            if whole == "torch._utils._rebuild_tensor_v2":
                return _check_tensor
            raise Refused(f"it holds {whole}, not only plain types and tensors")
        if whole in _FOREIGN:
            return _FOREIGN[whole]
        if module.startswith("torch") and name.endswith("Storage"):
            return _Storage(name.removesuffix("Storage"))
        if re.fullmatch(r"torch(\.\w+)*\.\w*Tensor", whole):
            return _refuse_tensor
        if whole.startswith("torch."):  # torch decides which of them it makes; none of the rest takes a size
            return Aside
        if _ASIDE.fullmatch(whole):
            self.aside.add(whole)
            return Aside
        raise Refused(
            f"it holds {whole}, not only tensors. Where the file comes from, save the tensors alone: "
            "torch.save(model.state_dict(), FILE)"
        )

    def persistent_load(self, identity: Any) -> int:
        kind, storage, key, _, count, *_ = identity
        if kind != "storage" or not isinstance(storage, _Storage) or not isinstance(count, int):
            raise Refused(f"it refers to {kind!r} outside the pickle")
        size = count * _BYTES.get(storage.name, 1)
        if isinstance(self._sizes, int):
            self._counts[key] = size
            if size < 0 or sum(self._counts.values()) > self._sizes:
                raise Refused(f"it says {count} × {storage.name}, and has {self._sizes} bytes")
        elif size != self._sizes.get(f"data/{key}"):
            bytes_there = self._sizes.get(f"data/{key}", "no")
            raise Refused(f"it says {count} × {storage.name} where there are {bytes_there} bytes")
        return count


class _Storage:
    """The type of a storage, by its name. Torch may not be asked for an empty one."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *sizes: Any) -> None:
        raise Refused(f"it asks for an empty storage of {sizes} elements")


class _Stateless(Aside):
    def __setstate__(self, state: Any) -> None:
        raise Refused("it sets the memory of a parameter as torch.save does not")


def _check_bytes(*arguments: Any) -> Aside:
    if arguments and isinstance(arguments[0], int):
        raise Refused(f"it asks for {arguments[0]:,} empty bytes")
    return Aside()


def _refuse_tensor(*sizes: Any) -> None:
    raise Refused(f"it asks for an empty tensor of size {sizes}")


def _rebuild(function: Any, _: Any, arguments: tuple[Any, ...], *__: Any) -> Any:
    return function(*arguments)


def _check_extent(count: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Aside:
    # Torch enlarges a storage that is too small for a tensor.
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if min((offset, *shape, *stride)) < 0 or (0 not in shape and last >= count):
        raise Refused(f"it has a tensor of shape {shape} and strides {stride} with {count} elements")
    return Aside()


def _check_size(count: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Aside:
    _check_tensor(count, offset, shape, stride)
    return _check_extent(count, offset, shape, stride)


def _check_tensor(count: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> None:
    # Strides of 0 make a tensor of any size out of one number; no tensor needs more elements than its storage has.
    if len(shape) > 64 or min(shape, default=0) < 0 or offset < 0 or math.prod(shape) > count - offset:
        raise Refused(f"it has a tensor of shape {shape} with {count} elements")


_FOREIGN = {
    "builtins.bytearray": _check_bytes,
    "__builtin__.bytearray": _check_bytes,
    **dict.fromkeys(("builtins.set", "__builtin__.set", "builtins.complex", "__builtin__.complex"), Aside),
    "collections.Counter": Aside,
    **{
        f"torch._utils.{name}": _check_extent
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")
    },
    "torch._utils._rebuild_qtensor": _check_size,  # these two make a tensor of the size, whatever the strides are
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _refuse_tensor,
    "torch._tensor._rebuild_from_type_v2": _rebuild,
    "torch.nn.parameter.Parameter": _Stateless,
}
