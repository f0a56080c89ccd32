"""What may be in a `torch.save` archive before torch reads it.

`torch.load(weights_only=True)` runs no code of a file, but believes the sizes in it, and makes empty tensors, bytes and
sets of any size on request. `check` follows the pickle with stand-ins for tensors, which allocate nothing.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from typing import Any

# What `torch.save` writes for dicts, lists, tuples, strings, numbers and tensors, and nothing else.
_OPCODES = """
PROTO STOP MARK EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 NONE
NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL BINPERSID
REDUCE
"""
_BYTES = {"Bool": 1, "Byte": 1, "Char": 1, "Short": 2, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4, "Long": 8}
_BYTES |= {"Double": 8}  # of an element of torch.DoubleStorage, and so on


def check(archive: bytes) -> None:
    """Refuse what `torch.save` does not write for plain types and tensors, and tensors larger than their bytes.

    Raises:
        ValueError: says what was found.
    """
    with zipfile.ZipFile(io.BytesIO(archive)) as members:
        check_members(members.infolist(), len(archive))
        infos = {info.filename.partition("/")[2]: info for info in members.infolist()}
        program = members.read(infos["data.pkl"]) if "data.pkl" in infos else b""
    for opcode, argument, _ in pickletools.genops(program):
        known = f" {opcode.name} " in _OPCODES.replace("\n", " ")
        if not known or (opcode.name == "LONG_BINPUT" and argument > len(program)):
            raise ValueError(f"its pickle uses {opcode.name} as torch.save never does for plain types and tensors")
    _Survey(io.BytesIO(program), {name: info.file_size for name, info in infos.items()}).load()


def check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse the members of a zip file, of `size` bytes, that `torch.save` would not write.

    Raises:
        ValueError: says what was found.
    """
    if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
        raise ValueError("it has compressed or encrypted members, which torch.save never writes")
    if sum(member.file_size for member in members) > size:
        raise ValueError("its members together are larger than the file")
    # One folder, each name once however it is written, and nothing before the first: else torch's reader might find
    # another member than this one.
    names = {member.filename.lower() for member in members}
    plain = all(".." not in name.split("/") and not name.startswith("/") for name in names)
    first = min((member.header_offset for member in members), default=-1)
    if not plain or len({name.partition("/")[0] for name in names}) > 1 or len(names) < len(members) or first != 0:
        raise ValueError(f"its members are not those that torch.save writes: {', '.join(sorted(names)[:4])}")


class _Survey(pickle.Unpickler):
    """Unpickles with stand-ins: a storage is its number of elements, a tensor nothing at all."""

    def __init__(self, file: io.BytesIO, sizes: dict[str, int]):
        super().__init__(file)
        self._sizes = sizes

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _check_tensor
        if module == "torch" and name.endswith("Storage") and name.removesuffix("Storage") in _BYTES:
            return name.removesuffix("Storage")
        raise ValueError(f"it holds {module}.{name}, not only plain types and tensors")

    def persistent_load(self, identity: Any) -> int:
        kind, name, key, _, count = identity
        if kind != "storage" or count * _BYTES[name] != self._sizes.get(f"data/{key}"):
            raise ValueError(f"it says {count} × {name} where there are {self._sizes.get(f'data/{key}', 'no')} bytes")
        return count


def _check_tensor(count: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> None:
    # Strides of 0 make a tensor of any size out of one number; no tensor needs more elements than its storage has.
    if len(shape) > 64 or min(shape, default=0) < 0 or offset < 0 or math.prod(shape) > count - offset:
        raise ValueError(f"it has a tensor of shape {shape} with {count} elements")
