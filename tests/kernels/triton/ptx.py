"""Runs the PTX of a kernel on a CPU: Gluon kernels, which Triton's interpreter does not know, and others as compiled.

Programs run one after another; the threads of one in lockstep, those behind first where they part. Memory is what the
caller names: an access outside it is an error, and so is a warp's instruction without all of its lanes. Copies into
shared memory arrive as late as they may. Source: NVIDIA's PTX ISA, of which it knows what these kernels use.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

WARP = 32
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
TYPES = {
    **{f"{kind}{bits}": UNSIGNED[bits] for kind in "bu" for bits in UNSIGNED},
    **{f"s{bits}": np.dtype(f"i{bits // 8}").type for bits in UNSIGNED},
    "f32": np.float32,
    "f64": np.float64,
}


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero where the numbers are whole; by zero all ones, as hardware has it."""
    if a.dtype == np.float32:
        return a / b
    found = np.abs(a.astype(np.int64)) // np.where(b == 0, 1, np.abs(b.astype(np.int64)))
    return np.where(b == 0, -1, np.where((a < 0) != (b < 0), -found, found)).astype(a.dtype)


COMPARE = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip
TWO = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": divide, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
NO_EFFECT = ("griddepcontrol", "bar.warp.sync")


class Memory:
    """Bytes of tensors at their own addresses."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        spans = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.numel()}
        self.parts = [(base, torch.empty(0, dtype=torch.uint8).set_(spans[base]).numpy()) for base in sorted(spans)]
        self.bases = np.array(sorted(spans), dtype=np.uint64)

    def _places(self, addresses: np.ndarray, size: int):  # type: ignore[no-untyped-def]
        which = np.searchsorted(self.bases, addresses, "right") - 1
        for i in np.unique(which):
            rows = np.flatnonzero(which == i)
            base, part = self.parts[i]
            at = addresses[rows].astype(np.int64) - base
            if i < 0 or (at + size > part.size).any():
                raise IndexError(
                    f"an access of {size} bytes at {hex(int(addresses[rows][at.argmax()]))} is out of bounds"
                )
            yield rows, part, at[:, None] + np.arange(size)

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """uint8 ``[len(addresses), size]``."""
        found = np.empty((addresses.size, size), np.uint8)
        for rows, part, at in self._places(addresses, size):
            found[rows] = part[at]
        return found

    def store(self, addresses: np.ndarray, data: np.ndarray) -> None:
        """Bytes ``[len(addresses), size]``."""
        for rows, part, at in self._places(addresses, data.shape[1]):
            part[at] = data[rows]


def bf16(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16s."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Nearest bfloat16, as 16 bits."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def halves(x: np.ndarray) -> np.ndarray:
    """The two 16-bit parts of 32 bits, low first, in a last axis."""
    return np.ascontiguousarray(x).view(np.uint16).reshape(*x.shape, 2)


class Kernel:
    """A kernel's PTX, ready to run.

    Parameters
    ----------
    text : str
        PTX of one kernel.
    """

    def __init__(self, text: str) -> None:
        self.threads = int(re.search(r"\.(?:req|max)ntid (\d+)", text).group(1))  # type: ignore[union-attr]
        self.params = re.findall(r"\.param \.(\w+).*?(\w+_param_\d+)", text)
        body = text[text.index("\n{") + 2 :]
        self.code: list[tuple[Any, str, list[str]]] = []
        self.labels: dict[str, int] = {}
        for line in body[: body.index("\n}")].splitlines():
            self._parse(re.sub(r"//.*", "", line).strip())
        unknown = {op for _, op, _ in self.code if not hasattr(self, f"_{op.split('.')[0]}")}
        assert not unknown, f"PTX instructions that are not emulated: {sorted(unknown)}"
        self.run_one = [getattr(self, f"_{op.split('.')[0]}") for _, op, _ in self.code]

    def _parse(self, line: str) -> None:
        if not line or line.startswith("."):
            return
        if line.endswith(":"):
            self.labels[line[:-1]] = len(self.code)
            return
        block = re.fullmatch(r"\{ \.reg \.pred (\w+);(.*)\}", line)
        lines = [line]
        if block:
            lines = [re.sub(rf"\b{block[1]}\b", f"%p_{block[1]}", part).strip() for part in block[2].split(";")]
        for part in filter(None, lines):
            found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*?);?", part)
            assert found, f"PTX that is not understood: {line}"
            guard = (found[2], found[1] == "!") if found[2] else None
            operands = [o.strip() for o in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s][^,]*", found[4])]
            if found[3].startswith(NO_EFFECT):
                continue
            self.code.append((guard, found[3], operands))

    def run(self, grid: int, arguments: list[torch.Tensor | int | float]) -> None:
        """Run all programs.

        Parameters
        ----------
        grid : int
            Number of programs.
        arguments : list
            What the kernel takes, in order and without constants.
        """
        self.memory = Memory([a for a in arguments if torch.is_tensor(a)])
        values = [a.data_ptr() if torch.is_tensor(a) else a for a in arguments]
        # What Triton adds, scratch memory that these kernels do not use, is at no address.
        values += [0] * (len(self.params) - len(values))
        self.given = {}
        for (kind, name), value in zip(self.params, values, strict=True):
            raw = np.array([value], np.float32 if kind == "f32" else np.int64).view(
                UNSIGNED[32 if kind == "f32" else 64]
            )
            self.given[name] = raw
        for program in range(grid):
            self._run_program(program, grid)

    def _run_program(self, program: int, grid: int) -> None:
        self.registers: dict[str, np.ndarray] = {
            "%tid.x": np.arange(self.threads, dtype=np.uint32),
            "%ctaid.x": np.full(self.threads, program, np.uint32),
            "%nctaid.x": np.full(self.threads, grid, np.uint32),
        }
        # Poisoned with what no kernel expects.
        self.shared = np.full(228 << 10, 0xFF, np.uint8)
        self.groups: list[list[tuple[np.ndarray, np.ndarray]]] = [[]]
        self.at = np.zeros(self.threads, np.int64)
        while (first := int(self.at.min())) < len(self.code):
            self.active = self.at == first
            guard, op, operands = self.code[first]
            if guard:
                held = self.registers[guard[0]] ^ guard[1]
                self.at[self.active & ~held] += 1
                self.active = self.active & held
            if not self.active.any():
                continue
            self.at[self.active] += 1
            self.run_one[first](op.split("."), operands)
        assert not any(self.groups), "copies that nothing has waited for"

    def _value(self, operand: str, kind: str) -> np.ndarray:
        dtype = TYPES[kind]
        if operand.startswith("%"):
            held = self.registers[operand][self.active]
            return held if kind == "pred" else held.view(UNSIGNED[8 * held.itemsize]).astype(
                UNSIGNED[8 * np.dtype(dtype).itemsize], copy=False).view(dtype)  # fmt: skip
        count = int(self.active.sum())
        if operand.startswith(("0f", "0d")):
            return np.full(count, int(operand[2:], 16), UNSIGNED[8 * np.dtype(dtype).itemsize]).view(dtype)
        number = 0 if operand == "global_smem" else int(operand.rstrip("U"), 0)
        bits = 8 * np.dtype(dtype).itemsize
        return np.full(count, number & ((1 << bits) - 1), UNSIGNED[bits]).view(dtype)

    def _predicate(self, operand: str) -> np.ndarray:
        if operand in ("-1", "1", "0"):
            return np.full(int(self.active.sum()), operand != "0")
        return self.registers[operand][self.active]

    def _set(self, register: str, value: np.ndarray) -> None:
        if register == "_":
            return
        if value.dtype != bool:
            value = np.ascontiguousarray(value).view(UNSIGNED[8 * value.itemsize])
        if register not in self.registers:
            self.registers[register] = np.zeros(self.threads, value.dtype)
        self.registers[register][self.active] = value

    def _all_lanes(self) -> None:
        assert self.active.reshape(-1, WARP).all(1)[self.active.reshape(-1, WARP).any(1)].all(), "a warp has parted"

    def _address(self, operand: str, kind: str) -> np.ndarray:
        base, _, offset = operand.strip("[] ").partition("+")
        return self._value(base.strip(), kind) + TYPES[kind](int(offset or "0"))

    @staticmethod
    def _names(operand: str) -> list[str]:
        return [name.strip() for name in operand.strip("{} ").split(",")]

    def _ld(self, op: list[str], operands: list[str]) -> None:
        kind, names = TYPES[op[-1]], self._names(operands[0])
        size = np.dtype(kind).itemsize
        if op[1] == "param":
            given = self.given[operands[1].strip("[]")]
            self._set(names[0], np.full(int(self.active.sum()), given.view(UNSIGNED[8 * size])[0]))
            return
        if op[1] == "shared":
            at = self._address(operands[1], "u32").astype(np.int64)[:, None] + np.arange(size * len(names))
            data = self.shared[at]
        else:
            data = self.memory.load(self._address(operands[1], "u64"), size * len(names))
        words = np.ascontiguousarray(data).view(kind)
        for i, name in enumerate(names):
            # A register may be wider than what is loaded.
            self._set(name, words[:, i].astype(np.uint32) if size < 4 and not name.startswith("%rs") else words[:, i])

    def _st(self, op: list[str], operands: list[str]) -> None:
        words = np.stack([self._value(name, op[-1]) for name in self._names(operands[1])], 1)
        data = np.ascontiguousarray(words).view(np.uint8)
        if op[1] == "shared":
            at = self._address(operands[0], "u32").astype(np.int64)[:, None] + np.arange(data.shape[1])
            self.shared[at] = data
        else:
            self.memory.store(self._address(operands[0], "u64"), data)

    def _atom(self, op: list[str], operands: list[str]) -> None:
        added = self._value(operands[2], op[-1])
        found = np.empty_like(added)
        if op[1] == "shared":
            words = self.shared.view(added.dtype)
            for i, at in enumerate(self._address(operands[1], "u32") // added.itemsize):
                found[i] = words[at]
                words[at] += added[i]
            self._set(operands[0], found)
            return
        addresses = self._address(operands[1], "u64")
        for i, address in enumerate(addresses):
            found[i] = self.memory.load(addresses[i : i + 1], added.itemsize).view(added.dtype)[0, 0]
            total = np.array([[found[i] + added[i]]], added.dtype)
            self.memory.store(np.array([address]), total.view(np.uint8))
        self._set(operands[0], found)

    def _cp(self, op: list[str], operands: list[str]) -> None:
        if op[2] == "commit_group":
            self.groups.append([])
        elif op[2] == "wait_group":
            kept = int(operands[0])
            # The last group is still open.
            while len(self.groups) > kept + 1:
                for at, data in self.groups.pop(0):
                    self.shared[at] = data
        else:
            size, given = int(operands[2], 0), self._value(operands[3], "u32")
            data = np.zeros((given.size, size), np.uint8)
            there = np.flatnonzero(given)
            assert (given[there] == size).all()
            data[there] = self.memory.load(self._address(operands[1], "u64")[there], size)
            at = self._address(operands[0], "u32").astype(np.int64)[:, None] + np.arange(size)
            self.shared[at] = 0xFF
            self.groups[-1].append((at, data))

    def _mov(self, op: list[str], operands: list[str]) -> None:
        if op[1] == "pred":
            self._set(operands[0], self._predicate(operands[1]))
            return
        kind = TYPES[op[1]]
        half = f"b{4 * np.dtype(kind).itemsize}"
        if operands[1].startswith("{"):
            parts = np.stack([self._value(name, half) for name in self._names(operands[1])], 1)
            self._set(operands[0], np.ascontiguousarray(parts).view(kind)[:, 0])
        elif operands[0].startswith("{"):
            parts = np.ascontiguousarray(self._value(operands[1], op[1])[:, None]).view(TYPES[half])
            for i, name in enumerate(self._names(operands[0])):
                self._set(name, parts[:, i])
        else:
            self._set(operands[0], self._value(operands[1], op[1]))

    def _binary(self, op: list[str], operands: list[str]) -> None:
        if op[-1] == "pred":
            self._set(operands[0], TWO[op[0]](self._predicate(operands[1]), self._predicate(operands[2])))
            return
        a, b = (self._value(o, op[-1]) for o in operands[1:3])
        with np.errstate(all="ignore"):
            found = TWO[op[0]](a, b)
        self._set(operands[0], np.clip(np.nan_to_num(found), 0, 1) if op[1] == "sat" else found)

    _add = _sub = _min = _max = _and = _or = _xor = _div = _binary

    def _mul(self, op: list[str], operands: list[str]) -> None:
        if op[1] == "bf16x2":
            a, b = (bf16(halves(self._value(o, "b32"))) for o in operands[1:])
            self._set(operands[0], np.ascontiguousarray(to_bf16(a * b)).view(np.uint32)[:, 0])
        elif op[-1] == "f32":
            self._binary(op, operands)
        else:
            self._set(operands[0], self._product(op, operands))

    def _product(self, op: list[str], operands: list[str]) -> np.ndarray:
        a, b = (self._value(o, op[-1]) for o in operands[1:3])
        bits = 8 * a.itemsize
        with np.errstate(all="ignore"):
            if op[1] == "lo":
                return a * b
            wide = (np.int64 if op[-1][0] == "s" else np.uint64)(1) * a.astype(TYPES[f"{op[-1][0]}64"]) * b
            return wide if op[1] == "wide" else (wide >> wide.dtype.type(bits)).astype(a.dtype)

    def _mad(self, op: list[str], operands: list[str]) -> None:
        product = self._product(op, operands)
        self._set(operands[0], product + self._value(operands[3], f"{op[-1][0]}{8 * product.itemsize}"))

    def _fma(self, op: list[str], operands: list[str]) -> None:
        a, b, c = (self._value(o, "f32").astype(np.float64) for o in operands[1:])
        with np.errstate(all="ignore"):
            product = a * b
            exact = product + c
            found = exact.astype(np.float32)
        # Rounded to the nearest, or up, also by a product that float64 loses beside the addend.
        short = ((found < exact) | ((exact == c) & (product > 0))) & (op[1] == "rp")
        self._set(operands[0], np.where(short, np.nextafter(found, np.float32(np.inf)), found))

    def _not(self, op: list[str], operands: list[str]) -> None:
        value = self._predicate(operands[1]) if op[-1] == "pred" else self._value(operands[1], op[-1])
        self._set(operands[0], ~value)

    def _neg(self, op: list[str], operands: list[str]) -> None:
        self._set(operands[0], -self._value(operands[1], op[-1]))

    def _sqrt(self, op: list[str], operands: list[str]) -> None:
        self._set(operands[0], np.sqrt(self._value(operands[1], "f32")))

    def _dp4a(self, op: list[str], operands: list[str]) -> None:
        assert op[1:] == ["u32", "s32"]
        codes, weights = (np.ascontiguousarray(self._value(o, "b32")[:, None]) for o in operands[1:3])
        products = codes.view(np.uint8).astype(np.int32) * weights.view(np.int8)
        self._set(operands[0], products.sum(1, dtype=np.int32) + self._value(operands[3], "s32"))

    def _shift(self, op: list[str], operands: list[str]) -> None:
        value, by = self._value(operands[1], op[-1]), self._value(operands[2], "u32")
        bits = 8 * value.itemsize
        by = np.minimum(by, bits - 1 if op[-1][0] == "s" else bits).astype(value.dtype)
        gone = by >= bits
        by = np.where(gone, 0, by).astype(value.dtype)
        shifted = value << by if op[0] == "shl" else value >> by
        self._set(operands[0], np.where(gone, 0, shifted).astype(value.dtype))

    _shl = _shr = _shift

    def _shf(self, op: list[str], operands: list[str]) -> None:
        assert op[1:3] == ["r", "wrap"]
        low, high = (self._value(o, "b32").astype(np.uint64) for o in operands[1:3])
        self._set(operands[0], ((high << np.uint64(32) | low) >> np.uint64(int(operands[3]) % 32)).astype(np.uint32))

    def _bfe(self, op: list[str], operands: list[str]) -> None:
        value = self._value(operands[1], "b32").astype(np.int64)
        start, length = int(operands[2]), int(operands[3])
        field = (value >> start) & ((1 << length) - 1)
        if op[-1] == "s32":
            field -= (field >> (length - 1)) << length
        self._set(operands[0], field.astype(np.int32))

    def _prmt(self, op: list[str], operands: list[str]) -> None:
        both = np.ascontiguousarray(np.stack([self._value(o, "b32") for o in operands[1:3]], 1)).view(np.uint8)
        pick = self._value(operands[3], "b32")[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & 0xF
        assert (pick < 8).all(), "signs are not replicated"
        found = np.take_along_axis(both, pick.astype(np.int64), 1)
        self._set(operands[0], np.ascontiguousarray(found).view(np.uint32)[:, 0])

    def _popc(self, op: list[str], operands: list[str]) -> None:
        bits = np.unpackbits(np.ascontiguousarray(self._value(operands[1], "b32")[:, None]).view(np.uint8), axis=1)
        self._set(operands[0], bits.sum(1).astype(np.uint32))

    def _setp(self, op: list[str], operands: list[str]) -> None:
        a, b = (self._value(o, op[-1]) for o in operands[1:3])
        if op[1] in COMPARE:
            self._set(operands[0], COMPARE[op[1]](a, b))
        else:
            # Unordered: true of what is no number.
            self._set(operands[0], COMPARE[op[1].removesuffix("u")](a, b) | np.isnan(a) | np.isnan(b))

    def _selp(self, op: list[str], operands: list[str]) -> None:
        a, b = (self._value(o, op[-1]) for o in operands[1:3])
        self._set(operands[0], np.where(self._predicate(operands[3]), a, b))

    def _cvt(self, op: list[str], operands: list[str]) -> None:
        if op[2] == "bf16x2":
            high, low = (to_bf16(self._value(o, "f32")) for o in operands[1:])
            self._set(operands[0], low.astype(np.uint32) | high.astype(np.uint32) << 16)
            return
        value = self._value(operands[1], op[-1])
        if op[-2] == "bf16":
            self._set(operands[0], to_bf16(value))
            return
        if "rmi" in op or "rpi" in op:
            value = (np.floor if "rmi" in op else np.ceil)(value)
        wanted = TYPES[op[-2]]
        if value.dtype.kind == "f" and wanted not in (np.float32, np.float64):
            limits = np.iinfo(wanted)
            value = np.clip(np.trunc(value.astype(np.float64)), limits.min, limits.max)
        self._set(operands[0], value.astype(wanted))

    def _ex2(self, op: list[str], operands: list[str]) -> None:
        with np.errstate(all="ignore"):
            found = np.exp2(self._value(operands[1], "f32").astype(np.float64)).astype(np.float32)
        self._set(operands[0], np.where(found < 2.0**-126, np.float32(0), found))

    def _lanes(self, value: np.ndarray) -> np.ndarray:
        self._all_lanes()
        return value.reshape(-1, WARP)

    def _shfl(self, op: list[str], operands: list[str]) -> None:
        value, by = self._lanes(self._value(operands[1], "b32")), self._lanes(self._value(operands[2], "u32"))
        own = np.arange(WARP)[None, :]
        # From below the first lane a lane gets its own.
        sources = {"up": np.where(own < by, own, own - by), "idx": by % WARP, "bfly": own ^ by}
        self._set(operands[0], np.take_along_axis(value, sources[op[2]].astype(np.int64), 1).ravel())

    def _vote(self, op: list[str], operands: list[str]) -> None:
        bits = self._lanes(self._predicate(operands[1])).astype(np.uint64) << np.arange(WARP, dtype=np.uint64)
        self._set(operands[0], np.repeat(bits.sum(1), WARP).astype(np.uint32))

    def _redux(self, op: list[str], operands: list[str]) -> None:
        lanes = self._lanes(self._value(operands[1], op[-1]))
        found = lanes.max(1) if op[2] == "max" else lanes.sum(1, dtype=lanes.dtype)
        assert op[2] in ("max", "add")
        self._set(operands[0], np.repeat(found, WARP))

    def _bar(self, op: list[str], operands: list[str]) -> None:
        alive = self.at < len(self.code)
        assert (self.active == alive).all(), "a barrier that not all threads have come to"

    def _bra(self, op: list[str], operands: list[str]) -> None:
        self.at[self.active] = self.labels[operands[0]]

    def _ret(self, op: list[str], operands: list[str]) -> None:
        self.at[self.active] = len(self.code)

    def _matrices(self, operand: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows of 8 x 8 matrices of 16 bits lie, ``[warp, matrix, row, 16 bytes]``, and what lies there."""
        rows = self._lanes(self._address(operand, "u32").astype(np.int64))[:, : 8 * count]
        at = rows.reshape(-1, count, 8)[..., None] + np.arange(16)
        return at, np.ascontiguousarray(self.shared[at]).view(np.uint16)

    def _ldmatrix(self, op: list[str], operands: list[str]) -> None:
        names = self._names(operands[0])
        _, found = self._matrices(operands[1], len(names))
        if "trans" in op:
            found = found.swapaxes(2, 3)
        pairs = np.ascontiguousarray(found).view(np.uint32).reshape(found.shape[0], len(names), WARP)
        for i, name in enumerate(names):
            self._set(name, pairs[:, i].ravel())

    def _stmatrix(self, op: list[str], operands: list[str]) -> None:
        assert "trans" not in op
        names = self._names(operands[1])
        at, _ = self._matrices(operands[0], len(names))
        words = np.stack([self._lanes(self._value(name, "b32")) for name in names], 1)
        self.shared[at] = np.ascontiguousarray(words).view(np.uint8).reshape(at.shape)

    def _mma(self, op: list[str], operands: list[str]) -> None:
        """16 x 8 products: a lane holds a row of A, a column of B, both by its number over 4, and two columns of C."""
        names = [self._names(operand) for operand in operands]
        is_float = op[3] == "m16n8k16"
        a, b = (np.stack([self._lanes(self._value(n, "b32")) for n in part], 1) for part in names[1:3])
        c = np.stack([self._lanes(self._value(n, "f32" if is_float else "s32")) for n in names[3]], 1)

        def elements(words: np.ndarray, kind: str) -> np.ndarray:
            if is_float:
                return bf16(halves(words)).astype(np.float64)
            return np.ascontiguousarray(words[..., None]).view({"s8": np.int8, "u8": np.uint8}[kind]).astype(np.int64)

        # [warp, register, lane / 4, lane % 4, element]; registers of A: row + 8, then the second half of the columns.
        left = elements(a, op[-3]).reshape(a.shape[0], 2, 2, 8, 4, -1).transpose(0, 2, 3, 1, 4, 5)
        right = elements(b, op[-2]).reshape(b.shape[0], 2, 8, 4, -1).transpose(0, 2, 1, 3, 4)
        left, right = left.reshape(a.shape[0], 16, -1), right.reshape(b.shape[0], 8, -1)
        product = left @ right.swapaxes(1, 2)  # [warp, 16, 8]
        own = product.reshape(-1, 2, 8, 4, 2).transpose(0, 1, 4, 2, 3).reshape(-1, 4, WARP)
        total = (c + own).astype(c.dtype)
        for i, name in enumerate(names[0]):
            self._set(name, total[:, i].ravel())
