"""Which cameras this machine has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import EdgekitError, UsageError
from edgekit.runtime.sources.v4l2_device import Device
from edgekit.runtime.sources.v4l2_modes import choose


@dataclass(frozen=True)
class Camera:
    """A camera of this machine. link: a path that stays when devices are plugged in another order, or "".

    formats: `yuyv 640x480@30 1280x720@10` and the like, of what is readable or compressed; problem: why it cannot be used, or "".
    """

    path: str
    name: str = ""
    driver: str = ""
    bus: str = ""
    link: str = ""
    formats: tuple[str, ...] = ()
    problem: str = ""


def list_cameras() -> list[Camera]:
    """The capture devices of this machine, by number; nodes that do not capture pictures are left out."""
    links = {p.resolve(): str(p) for p in sorted(Path("/dev/v4l/by-id").glob("*"))}
    cameras = []
    for node in _nodes():
        link = links.get(node.resolve(), "")
        try:
            device = Device(str(node))
        except UsageError as error:
            if "permission" in str(error):
                cameras.append(Camera(str(node), link=link, problem=str(error)))
            continue
        except EdgekitError as error:
            cameras.append(Camera(str(node), link=link, problem=str(error)))
            continue
        try:
            formats, problem = _formats(device), ""
            try:
                choose(device.modes(), device.path)
            except UsageError as error:
                problem = str(error)
            cameras.append(Camera(str(node), device.card, device.driver, device.bus, link, formats, problem))
        except EdgekitError as error:
            cameras.append(Camera(str(node), device.card, device.driver, device.bus, link, (), str(error)))
        finally:
            device.close()
    return cameras


def _formats(device: Device) -> tuple[str, ...]:
    lines: dict[str, list[str]] = {}
    for mode in device.modes():
        if not mode.readable and not mode.compressed:
            continue
        rate = f"@{mode.fastest:g}" if mode.rates else ""
        lines.setdefault(mode.name, []).append(f"{mode.width}x{mode.height}{rate}")
    return tuple(f"{name} {' '.join(dict.fromkeys(sizes))}" for name, sizes in lines.items())


def in_words() -> str:
    """What is plugged in, for messages."""
    here = ", ".join(f"{c.path} ({c.name})" if c.name else c.path for c in list_cameras())
    return f"Here are: {here}" if here else "No camera is plugged in"


def _nodes() -> list[Path]:
    nodes = [p for p in Path("/dev").glob("video*") if p.name[5:].isdigit()]
    return sorted(nodes, key=lambda p: int(p.name[5:]))


def identity(device: Device) -> tuple[str, str, str]:
    """What a camera keeps when it is plugged in again: name, port, and which of its nodes this is."""
    try:
        index = Path(f"/sys/class/video4linux/{Path(device.real).name}/index").read_text().strip()
    except OSError:  # unplugged meanwhile
        index = ""
    return device.card, device.bus, index


def find_again(path: str, wanted: tuple[str, str, str]) -> str:
    """The node of the camera with that identity, which may have another number now; `path` where none has it."""
    for node in (path, *map(str, _nodes())):
        try:
            device = Device(node)
        except EdgekitError:  # not there, or no camera: look on
            continue
        try:
            if identity(device) == wanted:
                return node
        finally:
            device.close()
    return path
