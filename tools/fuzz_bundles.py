"""Mutations of bundles for tools/fuzz.py: damage, zip tricks and forgeries."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import random
import shutil
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgekit import archive
from edgekit.bundle import Bundle
from edgekit.manifest import DECIDING
from edgekit.schema import canonical_json
from tests.bundle_samples import files_of, forge, rebuild, write_sample
from tests.kernel_bundles import check_kernels, write_kernels

KERNELS = 2
"""Number of the bundle with kernels among the three."""

EVIL_NAMES = (
    "../x", "../../etc/passwd", "/etc/passwd", "evidence/../../x", "..", ".", "", "a//b", "a/./b", "C:\\x",
    "evidence\\x", "evidence/x\0y", "evidence/ x", "~/x", "evidence/.x", "segments/head/fp16.onnx/x", "a" * 300,
    "MANIFEST.JSON", "manifest.json", "evidence/" + "d/" * 30 + "x", "evidence/é", "-rf", "evidence/con", "x\n",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63 - 1, 10**19, 1e300, -0.0, 0.5, "", "x", "../x", "\x00", "é" * 500, [], {},
    [[]], {"a": {}}, [1] * 50,
)  # fmt: skip


class Bundles:
    """The mutations, by kind, of three bundles: one plain, one signed, one with kernels, which are loaded and run."""

    def __init__(self, folder: Path) -> None:
        from edgekit.signing import generate_keys

        self.folder = folder
        key, self.public = generate_keys(folder, "fuzz")
        plain = write_sample(folder / "plain.edge")
        signed = write_sample(folder / "signed.edge", sign_key=key)
        kernels = write_kernels(folder / "kernels.edge")
        self.bases = [(path.read_bytes(), files_of(path)) for path in (plain, signed, kernels)]
        self.spans = [_spans(data) for data, _ in self.bases]

    def kinds(self) -> list[str]:
        return [name.removeprefix("m_").replace("_", " ") for name in dir(self) if name.startswith("m_")]

    def handle(self, kind: str, seed: int) -> str:
        """Make mutant `seed` of `kind`, open it and say what came of it."""
        rng = random.Random(seed)
        number = KERNELS if kind.startswith("kernel") else rng.randrange(len(self.bases))
        data, files = self.bases[number]
        make: Callable[..., bytes | Path] = getattr(self, "m_" + kind.replace(" ", "_"))
        made = make(rng, data, dict(files), self.spans[number])
        path = self.folder / "mutant.edge"
        if isinstance(made, Path):
            path = made
        else:
            path.write_bytes(made)
        try:
            with Bundle.open(path) as bundle:
                bundle.verify_files()
                if number == 1:
                    bundle.check_signature(self.public)
                if number == KERNELS:
                    check_kernels(bundle, self.folder / "cache")
                    if kind.startswith("kernel"):
                        return "identical"  # somebody's bundle, which computes the same
                found = {name: bytes(bundle.read(name)) for name in bundle.names}
                return "identical" if found == files else "changed"
        finally:
            if path.is_dir():
                shutil.rmtree(path)

    # damage: bytes change, nobody repairs anything

    def m_flip_header(self, rng: random.Random, data: bytes, _: Any, spans: Any) -> bytes:
        return _flip(rng, data, spans["header"])

    def m_flip_padding(self, rng: random.Random, data: bytes, _: Any, spans: Any) -> bytes:
        return _flip(rng, data, spans["padding"])

    def m_flip_name(self, rng: random.Random, data: bytes, _: Any, spans: Any) -> bytes:
        return _flip(rng, data, spans["name"])

    def m_flip_data(self, rng: random.Random, data: bytes, _: Any, spans: Any) -> bytes:
        return _flip(rng, data, spans["data"])

    def m_flip_manifest(self, rng: random.Random, data: bytes, _: Any, spans: Any) -> bytes:
        return _flip(rng, data, spans["manifest"])

    def m_flip_table(self, rng: random.Random, data: bytes, _: Any, spans: Any) -> bytes:
        return _flip(rng, data, spans["table"])

    def m_flip_end(self, rng: random.Random, data: bytes, _: Any, spans: Any) -> bytes:
        return _flip(rng, data, spans["end"])

    def m_bytes(self, rng: random.Random, data: bytes, _: Any, spans: Any) -> bytes:
        """A run of bytes becomes zeros, ones or noise."""
        at, size = rng.randrange(len(data)), rng.choice((1, 2, 4, 16, 512))
        run = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
        return data[:at] + run + data[at + size :]

    def m_truncate(self, rng: random.Random, data: bytes, _: Any, spans: Any) -> bytes:
        start, end = rng.choice(spans["all"])
        return data[: rng.choice((rng.randrange(len(data)), start, end - 1, len(data) - rng.randint(1, 60)))]

    def m_cut_start(self, rng: random.Random, data: bytes, _: Any, spans: Any) -> bytes:
        return data[rng.choice((1, 4, 30, rng.randrange(1, len(data)))) :]

    def m_insert(self, rng: random.Random, data: bytes, _: Any, spans: Any) -> bytes:
        at = rng.choice((0, len(data), rng.randrange(len(data)), rng.choice(spans["all"])[0]))
        return data[:at] + rng.choice((b"\0", b"\0" * 64, rng.randbytes(rng.randint(1, 200)))) + data[at:]

    def m_delete(self, rng: random.Random, data: bytes, _: Any, spans: Any) -> bytes:
        at = rng.choice((rng.randrange(len(data)), rng.choice(spans["all"])[0]))
        return data[:at] + data[at + rng.choice((1, 4, 64, 4096)) :]

    def m_splice(self, rng: random.Random, data: bytes, _: Any, spans: Any) -> bytes:
        """One part of the file copied over another."""
        start, end = rng.choice(spans["all"])
        at = rng.choice((rng.randrange(len(data)), rng.choice(spans["all"])[0]))
        return data[:at] + data[start:end] + data[at + end - start :]

    def m_huge_field(self, rng: random.Random, data: bytes, _: Any, spans: Any) -> bytes:
        """A 16 or 32 bit field of a header says something enormous."""
        start, end = rng.choice(spans["header"] + spans["table"] + spans["end"])
        form, values = rng.choice((("<H", (0xFFFF, 0x8000, 0)), ("<I", (0xFFFFFFFF, 0x7FFFFFFF, 1 << 31, 0))))
        bad = bytearray(data)
        struct.pack_into(form, bad, min(len(data) - 4, rng.randrange(start, end)), rng.choice(values))
        return bytes(bad)

    # tricks: a valid zip file that tools disagree about

    def m_zip_names(self, rng: random.Random, _: bytes, files: dict[str, bytes], spans: Any) -> bytes:
        """A file more, or one renamed, under a name that leads out or collides."""
        name, entries = rng.choice(EVIL_NAMES), list(files.items())
        if rng.random() < 0.5:
            entries.append((name, b"evil"))
        else:
            at = rng.randrange(len(entries))
            entries[at] = (name, entries[at][1])
        if name and rng.random() < 0.5:  # zipfile itself cannot write an empty name
            return _zip(entries)
        return _canonical_zip(sorted(entries, key=lambda e: archive.order(dict(entries)).index(e[0])))

    def m_zip_duplicate(self, rng: random.Random, _: bytes, files: dict[str, bytes], spans: Any) -> bytes:
        entries = list(files.items())
        name, content = rng.choice(entries)
        double = (name, rng.choice((content, b"", content[::-1])))
        entries.insert(rng.choice((0, len(entries), [e[0] for e in entries].index(name) + 1)), double)
        return rng.choice((_zip, _canonical_zip))(entries)

    def m_zip_order(self, rng: random.Random, _: bytes, files: dict[str, bytes], spans: Any) -> bytes:
        entries = list(files.items())
        a, b = rng.sample(range(len(entries)), 2)
        entries[a], entries[b] = entries[b], entries[a]
        return _canonical_zip(entries)

    def m_zip_rewritten(self, rng: random.Random, _: bytes, files: dict[str, bytes], spans: Any) -> bytes:
        """The same content, written by another tool."""
        method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        return _zip(list(files.items()), method, comment=rng.choice((b"", b"hello")))

    def m_zip_bomb(self, rng: random.Random, _: bytes, files: dict[str, bytes], spans: Any) -> bytes:
        name = rng.choice((*files, "evidence/bomb"))
        return _zip(
            [*((n, d) for n, d in files.items() if n != name), (name, bytes(8 << 20))], zipfile.ZIP_DEFLATED
        )

    def m_zip_attributes(self, rng: random.Random, data: bytes, _: Any, spans: Any) -> bytes:
        """Links, devices, folders and set-uid by external attributes; encryption and method fields."""
        start, _end = rng.choice(spans["table"])
        bad = bytearray(data)
        kind = rng.choice(
            (stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK, 0)
        )
        mode = kind | rng.choice((0o777, 0o4755, 0o600))
        at, form, value = rng.choice(
            (
                (38, "<I", mode << 16),
                (38, "<I", 0x10),
                (8, "<H", 1),
                (8, "<H", 0x800),
                (10, "<H", 8),
                (10, "<H", 99),
            )
        )
        struct.pack_into(form, bad, start + at, value)
        return bytes(bad)

    def m_zip_overlap(self, rng: random.Random, data: bytes, _: Any, spans: Any) -> bytes:
        """Two table entries lead to the same bytes, or one into another's."""
        a, b = rng.sample(spans["table"], 2)
        bad = bytearray(data)
        bad[a[0] + 42 : a[0] + 46] = rng.choice(
            (data[b[0] + 42 : b[0] + 46], struct.pack("<I", rng.randrange(len(data))))
        )
        if rng.random() < 0.5:  # the checksums and sizes along with it
            bad[a[0] + 16 : a[0] + 28] = data[b[0] + 16 : b[0] + 28]
        return bytes(bad)

    def m_zip_gap(self, rng: random.Random, data: bytes, _: Any, spans: Any) -> bytes:
        """Hidden bytes in front of the table, the offsets repaired."""
        table = spans["table"][0][0]
        gap = rng.randbytes(rng.randint(1, 100))
        bad = bytearray(data[:table] + gap + data[table:])
        struct.pack_into("<I", bad, len(bad) - 6, table + len(gap))
        return bytes(bad)

    # forgeries: somebody repairs the container, and more and more of the checksums

    def m_swapped_payloads(self, rng: random.Random, _: bytes, files: dict[str, bytes], spans: Any) -> bytes:
        a, b = rng.sample(
            [n for n in files if n not in ("manifest.json", "manifest.sha256", "signature.json")], 2
        )
        files[a], files[b] = files[b], files[a]
        return rebuild(files)

    def m_edited_file(self, rng: random.Random, _: bytes, files: dict[str, bytes], spans: Any) -> bytes:
        """Any file but the manifest changed, all checksums of the container right."""
        name = rng.choice([n for n in files if n != "manifest.json"])
        files[name] = _flip(rng, files[name], [(0, len(files[name]))])
        return rebuild(files, checksum=name != "manifest.sha256" and "signature.json" not in files)

    def m_edited_json(self, rng: random.Random, _: bytes, files: dict[str, bytes], spans: Any) -> bytes:
        """A value of the manifest or the evidence changed, CRC-32 and zip made to fit, SHA-256 not."""
        name = rng.choice(("manifest.json", "evidence.json"))
        files[name] = _edited(rng, files[name], None)
        return rebuild(files, checksum=False)

    def m_forged_manifest(self, rng: random.Random, _: bytes, files: dict[str, bytes], spans: Any) -> bytes:
        """What decides about the computation changed, every checksum fits but the payload digest."""
        files["manifest.json"] = _edited(rng, files["manifest.json"], DECIDING)
        return rebuild(files)

    def m_forged_signed(self, rng: random.Random, _: bytes, files: dict[str, bytes], spans: Any) -> bytes:
        """Everything made to fit; on the signed bundle only the key is missing. On the plain one the
        forgery leaves a hole in the plan."""
        if "signature.json" in files:
            return forge(files, lambda tree: json.loads(_edited(rng, canonical_json(tree, ""), None)))

        def hole(tree: Any) -> None:
            part = rng.choice(("plan", "tensors", "inputs", "outputs"))
            del tree[part][rng.randrange(len(tree[part]))]

        return forge(files, hole)

    # kernels: everything in the bundle fits, but for what one step is told

    def m_kernel_options(self, rng: random.Random, _: bytes, files: dict[str, bytes], spans: Any) -> bytes:
        """One value in a kernel's options is another."""

        def edit(tree: Any) -> None:
            step = rng.choice([s for s in tree["plan"] if s.get("options")])
            step["options"] = json.loads(_edited(rng, canonical_json(step["options"], ""), None))

        return forge(files, edit)

    def m_kernel_steps(self, rng: random.Random, _: bytes, files: dict[str, bytes], spans: Any) -> bytes:
        """One value of a step, or the shape or type of a tensor, is another."""

        def edit(tree: Any) -> None:
            part = rng.choice(("plan", "tensors"))
            at = rng.randrange(len(tree[part]))
            if part == "tensors" and rng.random() < 0.7:
                shape = tree[part][at]["shape"]
                shape[rng.randrange(len(shape))] = rng.choice((1, 2, 3, 7, 64, 1 << 20, 1 << 28))
            else:
                tree[part][at] = json.loads(_edited(rng, canonical_json(tree[part][at], ""), None))

        return forge(files, edit)

    def m_kernel_files(self, rng: random.Random, _: bytes, files: dict[str, bytes], spans: Any) -> bytes:
        """Other weights, or golden inputs as data of a sensor that nobody checks: numbers of any kind, any length."""
        name = rng.choice([n for n in files if n.startswith(("kernels/", "golden/input"))])
        data = bytearray(files[name])
        trick = rng.randrange(4)
        if trick == 0:
            del data[rng.randrange(len(data)) :]
        elif trick == 1:
            data += rng.randbytes(rng.randint(1, 64))
        else:
            at = 4 * rng.randrange(len(data) // 4)
            number = rng.choice((float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 1e-44, -1.0, 0.0))
            data[at : at + 4] = struct.pack("<f", number) if trick == 2 else rng.randbytes(4)
        files[name] = bytes(data)

        def edit(tree: Any) -> None:
            tree["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

        return forge(files, edit)

    def m_hostile_json(self, rng: random.Random, _: bytes, files: dict[str, bytes], spans: Any) -> bytes:
        """Deep, long, double-keyed or non-JSON manifests, checksums right."""
        text = files["manifest.json"]
        n = rng.choice((70, 1_000, 100_000))
        files["manifest.json"] = rng.choice(
            (
                b"[" * n, b"[" * n + b"]" * n, b'{"a":' * n + b"1" + b"}" * n, b"9" * n, b'"' + b"\\" * n, b"[" + b"1," * n,
                text.replace(b'"tiny"', b"[" * n + b"]" * n), text.replace(b'"tiny"', b"1e" + b"9" * n),
                text.replace(b'"model":', b'"task":"x","model":'), text[:-1] + b',"x":NaN}', text + b"\0" * n,
                b"\xef\xbb\xbf" + text, text.decode().encode("utf-16"), text.replace(b"tiny", b"\xff\xfe"),
                text.replace(b'"tiny"', b'"\\ud800"'), b" " + text, text.replace(b'"schema_version":1', b'"schema_version":2'),
                b"", b"null", b"{}", b'{"schema_version":1}',
            )
        )  # fmt: skip
        return rebuild(files, checksum=rng.random() < 0.8)

    def m_missing_file(self, rng: random.Random, _: bytes, files: dict[str, bytes], spans: Any) -> bytes:
        del files[rng.choice(list(files))]
        return rebuild(files, checksum=False)

    def m_folder(self, rng: random.Random, _: bytes, files: dict[str, bytes], spans: Any) -> Path:
        """The folder form: changed, missing, added, renamed files; links and empty folders."""
        path = self.folder / "mutant"
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        name = rng.choice(list(files))
        target, trick = path / name, rng.randrange(8)
        if trick < 2:
            target.write_bytes(_flip(rng, files[name], [(0, len(files[name]))]))
        elif trick == 2:
            target.unlink()
        elif trick == 3:
            target.write_bytes(files[name] + rng.randbytes(rng.randint(1, 9)))
        elif trick == 4:
            target.rename(target.with_name(rng.choice(("x", "x y", "é", ".x", "MANIFEST.JSON"))))
        elif trick == 5:
            target.unlink()
            target.symlink_to(rng.choice(("/etc/passwd", "/dev/zero", name, str(self.folder / "plain.edge"))))
        elif trick == 6:
            (path / rng.choice(("spare", "evidence/spare", "golden/a/b/c/d/e/f/g/h/i/j"))).mkdir(parents=True)
        else:
            target.unlink()
            target.mkdir()
        return path


def prepare(folder: Path) -> tuple[list[str], Callable[[str, int], str]]:
    """Kinds of mutations and the function that makes and opens one."""
    bundles = Bundles(folder)
    return bundles.kinds(), bundles.handle


def _spans(data: bytes) -> dict[str, list[tuple[int, int]]]:
    """Where the parts of a good bundle lie, by kind."""
    spans: dict[str, list[tuple[int, int]]] = {
        k: [] for k in ("header", "name", "padding", "data", "manifest", "table")
    }
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        entries = file.infolist()
        table = file.start_dir
    for entry in entries:
        start = entry.header_offset
        names, extra = struct.unpack_from("<HH", data, start + 26)
        body = start + 30 + names + extra
        spans["header"].append((start, start + 30))
        spans["name"].append((start + 30, start + 30 + names))
        spans["padding"].append((start + 30 + names, body))
        spans["manifest" if entry.filename.startswith("manifest.") else "data"].append(
            (body, body + entry.file_size)
        )
        spans["table"].append((table, table + 46 + names))
        table += 46 + names
    spans["end"] = [(table, len(data))]
    spans["all"] = [span for part in spans.values() for span in part]
    return spans


def _flip(rng: random.Random, data: bytes, spans: list[tuple[int, int]]) -> bytes:
    """1 to 3 bits changed within one of the spans."""
    start, end = rng.choice(spans)
    bad = bytearray(data)
    for place in {rng.randrange(start, end) for _ in range(rng.randint(1, 3))}:
        bad[place] ^= 1 << rng.randrange(8)
    return bytes(bad)


def _zip(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", method) as file:
        warnings.simplefilter("ignore")  # duplicate names are the point
        file.comment = comment
        for name, data in entries:
            file.writestr(name, data)
    return stream.getvalue()


def _canonical_zip(entries: list[tuple[str, bytes]]) -> bytes:
    """The bundle's own layout for any names in any order."""
    body, central = bytearray(), bytearray()
    for name, data in entries:
        name = name.encode("ascii", "replace").decode("ascii")
        position, crc = len(body), zlib.crc32(data)
        body += archive._local(name, len(data), crc, position) + data
        central += archive._central(name, len(data), crc, position)
    return bytes(body + central + archive._end(len(entries), len(central), len(body)))


def _edited(rng: random.Random, text: bytes, top: tuple[str, ...] | None) -> bytes:
    """The JSON with one value changed, deleted or added (below one of the keys `top`, if given)."""
    while True:
        tree = json.loads(text)
        before = copy.deepcopy(tree)
        node = tree[rng.choice([k for k in tree if k in top])] if top else tree
        while isinstance(node, (dict, list)) and node:
            key: Any = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.3:
                if rng.random() < 0.2:
                    del node[key]
                elif isinstance(node, dict) and rng.random() < 0.1:
                    node["new"] = rng.choice(ODD_VALUES)
                else:
                    node[key] = rng.choice(ODD_VALUES)
                break
            node = node[key]
        if tree != before or repr(tree) != repr(before):
            return canonical_json(tree, "")
