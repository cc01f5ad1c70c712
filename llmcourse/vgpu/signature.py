"""What a kernel's parameters are called, and what its pointers point to, read from the C++ source.

`entries` reads the parameters' sizes from PTX, `parameters` their names and types from C++.

PTX keeps a parameter's size and forgets the rest: `float* x`, `double* x` and `size_t x` are all 64 bits. So
that a float64 array passed to a `float*` is an error and not a wrong number, the declaration is read from the
source. The reader is tolerant: what it does not understand (a macro, a type of the reader's own) is `None`,
and then nothing is checked. It never guesses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmcourse.vgpu.isa import DTYPES, Variable


@dataclass(frozen=True)
class Element:
    """A C++ number type: kind (f float, b bfloat16, e4m3, e5m2, i, u, ? bool), bytes, how many.

    float4 is Element("f", 4, 4): its arrays hold float32.
    """

    kind: str
    size: int
    count: int = 1

    @property
    def nbytes(self) -> int:
        return self.size * self.count

    def __str__(self) -> str:
        names = {"f": f"float{8 * self.size}", "b": "bfloat16", "i": f"int{8 * self.size}"}
        names |= {"u": f"uint{8 * self.size}", "?": "bool", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
        return names[self.kind]


@dataclass(frozen=True)
class Parameter:
    """One parameter as the source declares it.

    text      "const float* x", in one line
    element   what it is, or what it points to; None where that is not a number type known here
    """

    name: str
    text: str
    pointer: bool
    const: bool
    element: Element | None


def _elements() -> dict[str, Element]:
    found = {
        "bool": Element("?", 1),
        "char": Element("i", 1),
        "signed char": Element("i", 1),
        "unsigned char": Element("u", 1),
        "short": Element("i", 2),
        "unsigned short": Element("u", 2),
        "int": Element("i", 4),
        "unsigned int": Element("u", 4),
        "long long": Element("i", 8),
        "unsigned long long": Element("u", 8),
        "size_t": Element("u", 8),
        "float": Element("f", 4),
        "double": Element("f", 8),
        "cudaTextureObject_t": Element("u", 8),
    }
    for bits in (8, 16, 32, 64):
        found[f"int{bits}_t"], found[f"uint{bits}_t"] = Element("i", bits // 8), Element("u", bits // 8)
    for name in ("half", "__half"):
        found[name], found[f"{name}2"] = Element("f", 2), Element("f", 2, 2)
    found["__nv_bfloat16"] = found["nv_bfloat16"] = Element("b", 2)
    found["__nv_bfloat162"] = found["nv_bfloat162"] = Element("b", 2, 2)
    found["__nv_fp8_e4m3"], found["__nv_fp8_e5m2"] = Element("e4m3", 1), Element("e5m2", 1)
    for base in ("char", "short", "int", "longlong", "float", "double"):
        plain = found["long long" if base == "longlong" else base]
        for n in (2, 3, 4):
            found[f"{base}{n}"] = Element(plain.kind, plain.size, n)
            if plain.kind == "i":
                found[f"u{base}{n}"] = Element("u", plain.size, n)
    for word in ("char", "short", "int"):
        found[f"u{word}"] = found[f"unsigned {word}"]  # uchar, ushort, uint
    return found


ELEMENTS = _elements()
_BUILT_IN = {"unsigned", "signed", "char", "short", "int", "long", "float", "double", "bool", "void"}
_DROPPED = {"const", "volatile", "__restrict__", "__restrict", "restrict", "struct", "typename", "std", "::"}
_DROPPED |= {"__grid_constant__", "enum", "register"}
_TOKEN = re.compile(r"::|[A-Za-z_]\w*|\d[\w.]*|\S")
_ATTRIBUTE = re.compile(r"__\w+__|__launch_bounds__|static|inline|void|extern|\"C\"")


def without_comments(source: str) -> str:
    """The source with comments blanked, and strings emptied, line breaks kept."""

    def blank(found: re.Match[str]) -> str:
        return '""' if found[0][0] in "\"'" else "\n" * found[0].count("\n") + " "

    return re.sub(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", blank, source, flags=re.S)


def declared_kernels(source: str) -> list[str]:
    """Names of the `__global__` functions, in the source's order."""
    return list(dict.fromkeys(name for name, _, _ in _declarations(without_comments(source))))


def parameters(
    source: str, kernel: str, arguments: Sequence[str] = (), defines: Mapping[str, str] | None = None
) -> list[Parameter] | None:
    """The parameters of a kernel, None where its declaration is not found, or found twice and different.

    kernel     its plain name; `arguments` those of its template ("float", "32")
    defines    macros given to the compiler
    """
    text = without_comments(source)
    aliases = _aliases(text, defines or {})
    found = []
    for name, template, declared in _declarations(text):
        if name != kernel:
            continue
        known = aliases | dict(zip(template, arguments, strict=False))
        for unknown in template[len(arguments) :]:
            known.pop(unknown, None)
        found.append([_parameter(part, known) for part in _split(declared)])
    if not found or any(other != found[0] for other in found[1:]):
        return None
    return found[0]


def _declarations(text: str) -> list[tuple[str, list[str], str]]:
    """(name, template parameters, what stands in its parentheses) of each `__global__` function."""
    out = []
    for start in re.finditer(r"\b__global__\b", text):
        at = start.end()
        while (word := re.compile(r"\s*([A-Za-z_]\w*)\s*").match(text, at)) is not None:
            at = word.end()
            if at < len(text) and text[at] == "(":
                inside = _balanced(text, at)
                if not _ATTRIBUTE.fullmatch(word[1]):
                    out.append((word[1], _template(text[: start.start()]), inside))
                    break
                at += len(inside) + 2
    return out


def _template(before: str) -> list[str]:
    """Names of the parameters of the `template <…>` that ends the text, in order."""
    head = re.search(r"template\s*<((?:[^<>;{}]|<[^<>;{}]*>)*)>\s*(?:static\s+|inline\s+)*$", before)
    names = []
    for part in _split(head[1]) if head else []:
        words = re.findall(r"[A-Za-z_]\w*", part.split("=")[0])
        names.append(words[-1] if words else "")
    return names


def _balanced(text: str, at: int) -> str:
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return text[at + 1 : i]
    return text[at + 1 :]


def _split(text: str) -> list[str]:
    """At the commas that stand in no bracket."""
    parts, depth, last = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth == 0:
            parts.append(text[last:i])
            last = i + 1
    parts.append(text[last:])
    return [p.strip() for p in parts if p.strip() and p.strip() != "void"]


def _aliases(text: str, defines: Mapping[str, str]) -> dict[str, str]:
    """Names that stand for other text: using, typedef, #define. A name with two meanings is left out."""
    found: dict[str, set[str]] = {}
    for name, meaning in re.findall(r"\busing\s+(\w+)\s*=\s*([^;]+);", text):
        found.setdefault(name, set()).add(meaning.strip())
    for meaning, name in re.findall(r"\btypedef\s+([^;{}]+?)\b(\w+)\s*;", text):
        found.setdefault(name, set()).add(meaning.strip())
    for name, meaning in re.findall(r"^[ \t]*#[ \t]*define[ \t]+(\w+)[ \t]+([^\n]+)$", text, re.M):
        found.setdefault(name, set()).add(meaning.strip())
    for name, meaning in defines.items():
        found[name] = {meaning}
    return {name: next(iter(meanings)) for name, meanings in found.items() if len(meanings) == 1}


def _parameter(text: str, aliases: Mapping[str, str]) -> Parameter:
    shown = re.sub(r"\s+", " ", text).strip()
    declared = shown.split("=")[0].strip()
    array = "[" in declared
    tokens = _TOKEN.findall(declared.split("[")[0])
    words = [t for t in tokens if re.match(r"[A-Za-z_]", t) and t not in _DROPPED]
    name = words[-1] if len(words) > 1 and words[-1] not in _BUILT_IN else ""
    if name:
        tokens.reverse()
        tokens.remove(name)
        tokens.reverse()
    tokens = _expanded(tokens, aliases)
    stars = tokens.count("*") + array
    # const before the first star is about what is pointed to; after it, about the pointer.
    const = "const" in (tokens[: tokens.index("*")] if "*" in tokens else tokens)
    kept = [t for t in tokens if t not in _DROPPED and t != "*"]
    element = _element(kept) if stars <= 1 else Element("u", 8)
    return Parameter(name, shown, stars > 0, const, element)


def _expanded(tokens: list[str], aliases: Mapping[str, str]) -> list[str]:
    for _ in range(8):
        out: list[str] = []
        for token in tokens:
            out += _TOKEN.findall(aliases[token]) if token in aliases else [token]
        if out == tokens:
            break
        tokens = out
    return tokens


def _element(words: list[str]) -> Element | None:
    if any(not re.match(r"[A-Za-z_]", w) for w in words):
        return None  # a template, a reference, an expression
    if "long" in words and "double" not in words:
        if words.count("long") == 1:
            return None  # 4 bytes on Windows, 8 elsewhere
        return ELEMENTS["unsigned long long" if "unsigned" in words else "long long"]
    if set(words) <= {"unsigned", "signed", "int", "char", "short"} and words:
        base = next((w for w in words if w in ("char", "short")), "int")
        sign = (
            "unsigned " if "unsigned" in words else "signed " if base == "char" and "signed" in words else ""
        )
        return ELEMENTS[f"{sign}{base}"]
    return ELEMENTS.get(words[0]) if len(words) == 1 else None


@dataclass(frozen=True)
class Entry:
    """A kernel as PTX declares it: its name there, its parameters, and the most threads a block may have."""

    name: str
    parameters: tuple[Variable, ...]
    max_threads: int | None


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\(([^(){};]*)\))?\s*((?:\.\w+[^{;]{0,300})?)[{;]")
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+[^,]*?)?([\w$]+)\s*(?:\[(\d+)\])?\s*$"
)


def entries(ptx: str) -> list[Entry]:
    """The kernels of a PTX text, in its order. Their code is not read: a kernel that the machine cannot run
    may still run on a GPU."""
    out = []
    for name, declared, rest in _ENTRY.findall(re.sub(r"//[^\n]*", "", ptx)):
        parameters = []
        for part in (p.strip() for p in declared.split(",") if p.strip()):
            found = _PARAM.match(part)
            if found is None:
                raise ValueError(f"not a PTX parameter: {part!r}")
            size = DTYPES[found[2]].itemsize
            parameters.append(
                Variable(found[3], "param", int(found[1] or size), size * int(found[4] or 1), type=found[2])
            )
        limit = re.search(r"\.maxntid\s+([\d,\s]+)", rest)
        threads = math.prod(int(n) for n in limit[1].split(",")) if limit else None
        out.append(Entry(name, tuple(parameters), threads))
    return out


def plain_name(entry: str) -> tuple[str, list[str] | None]:
    """A kernel's name in C++ from its name in PTX: `_Z4copyIfEvPKT_PS0_i` → ("copy", ["float"]).

    The template arguments are None where the kernel is no template, and also where they cannot be spelled.
    """
    if not entry.startswith("_Z"):
        return entry, None
    at, name = 2, ""
    if entry[at] == "N":
        at += 1
    while (length := re.compile(r"\d+").match(entry, at)) is not None:
        at = length.end() + int(length[0])
        name = entry[length.end() : at]
    if not name:
        return entry, None
    if at < len(entry) and entry[at] == "I":
        return name, _template_arguments(entry, at + 1)
    return name, None


_CODES = {
    "b": "bool",
    "c": "char",
    "a": "signed char",
    "h": "unsigned char",
    "s": "short",
    "t": "unsigned short",
    "i": "int",
    "j": "unsigned int",
    "x": "long long",
    "y": "unsigned long long",
    "f": "float",
    "d": "double",
}


def _template_arguments(entry: str, at: int) -> list[str] | None:
    out: list[str] = []
    while at < len(entry) and entry[at] != "E":
        if entry[at] in _CODES:
            out.append(_CODES[entry[at]])
            at += 1
        elif (value := re.compile(r"L([a-z])(n?\d+)E").match(entry, at)) is not None:
            number = value[2].replace("n", "-")
            out.append({"0": "false", "1": "true"}.get(number, number) if value[1] == "b" else number)
            at = value.end()
        elif (length := re.compile(r"\d+").match(entry, at)) is not None:
            at = length.end() + int(length[0])
            out.append(entry[length.end() : at])
        else:
            return None
    return out
